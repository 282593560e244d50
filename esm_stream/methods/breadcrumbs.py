"""Model breadcrumbs: leave out the largest and the smallest changes, add (methods.md 3.1).

From:  the engine, panels of base and experts; two sweeps of histograms before.
To:    the engine, the merged panel.
Peak:  one panel, and the histograms of thresholds.py: 4 MiB per expert.

Letters: T experts, N elements of a panel.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from esm_stream.methods.contract import (
    About,
    ElementwiseMethod,
    Panel,
    Shares,
    Sums,
    Whole,
    each,
)
from esm_stream.methods.signs import SumOptions
from esm_stream.methods.thresholds import (
    bins_of,
    count_high,
    count_low,
    drop_above,
    keep_at_least,
    values_of,
)

_Outliers = Annotated[float, Field(ge=0, lt=1)]


class BreadcrumbsOptions(SumOptions):
    """Options of breadcrumbs."""

    density: Shares = Field(0.9, description="Share of each expert's update that is kept.")
    gamma: _Outliers | dict[str, _Outliers] = Field(
        0.01, description="Share of the largest magnitudes that is left out."
    )


class Breadcrumbs(ElementwiseMethod):
    """Per tensor, drop the `gamma` largest |D_t| and the smallest down to `density`, then add.

    Where density + gamma > 1, the density is kept and fewer of the largest are left out.
    """

    name: ClassVar[str] = "breadcrumbs"
    Options = BreadcrumbsOptions
    default_alpha: ClassVar[float] = 0.3
    about: ClassVar[About] = About(
        summary="Leaves out the largest and the smallest changes, adds the rest.",
        source="Davari and Belilovsky 2024, arXiv 2312.06795",
        data="none",
        passes="3",
        memory="panels and 4 MiB per expert",
        when="updates with outliers, many experts",
    )
    sweeps = 2

    def measure(self, panel: Panel, known: Sequence[Any], sums: Sums) -> None:
        """Histograms of |D_t|."""
        if known:
            count_low(panel.updates_TN, known[0]["bins"], sums)
        else:
            count_high(panel.updates_TN, sums)

    def settle(self, sums: Sums, known: Sequence[Any], whole: Whole) -> Any:  # noqa: ANN401
        """Bins, then the smallest and the largest magnitude kept of every expert."""
        if known:
            return values_of(sums["low"], known[0]["bins"], known[0]["ranks"]).tolist()
        densities, gammas = (
            each(option, whole.experts) for option in (self.options.density, self.options.gamma)
        )
        ranks = []
        for density, gamma in zip(densities, gammas, strict=True):
            kept = max(1, int(density * whole.elements))
            lowest = max(0, whole.elements - kept - int(gamma * whole.elements))
            ranks.append([lowest, lowest + kept - 1])
        bins_T2, ranks_T2 = bins_of(sums["high"], ranks)
        return {"bins": bins_T2, "ranks": ranks_T2}

    def merge(self, panel: Panel, known: Sequence[Any]) -> Tensor:
        """Sum of what is kept."""
        kept_TN = torch.stack(
            [
                drop_above(keep_at_least(row_N, lowest), highest)
                for row_N, (lowest, highest) in zip(panel.updates_TN, known[1], strict=True)
            ]
        )
        total_N: Tensor = self.options.total(kept_TN, panel.weights)
        return total_N
