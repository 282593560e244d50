"""TIES: trim each update, elect signs, average what agrees (methods.md 3.1).

From:  the engine, panels of base and experts; with a trim, two sweeps of histograms before.
To:    the engine, the merged panel.
Peak:  one panel, and the histograms of thresholds.py: 2 MiB per expert.

Letters: T experts, N elements of a panel.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from esm_stream.methods.contract import (
    About,
    ElementwiseMethod,
    MethodOptions,
    Panel,
    Shares,
    Sums,
    Whole,
    add_to,
    each,
)
from esm_stream.methods.signs import elected_sum, weigh
from esm_stream.methods.thresholds import (
    bins_of,
    count_high,
    count_low,
    keep_at_least,
    values_of,
    values_within_bins,
)


class TiesOptions(MethodOptions):
    """Options of TIES."""

    density: Shares = Field(
        0.2, description="Share of each expert's update that is kept, the largest magnitudes."
    )
    trim: Literal["global", "global-approx", "tensor"] = Field(
        "global",
        description="What the share is taken of: all tensors merged by this method with the same "
        "options (exactly, or with an approximate threshold, which saves a sweep), or each tensor.",
    )
    normalize: bool = Field(
        True, description="Mean of the updates that agree; otherwise their sum."
    )
    zero_sign: Literal["plus", "majority"] = Field(
        "plus",
        description="Sign elected where trimmed updates cancel exactly: plus, or the sign that "
        "most elements elect, which costs a sweep.",
    )


class Ties(ElementwiseMethod):
    """Trim, elect, disjoint mean.

    1. Of each update keep the `density` largest magnitudes (ties at the threshold are all kept).
    2. Per element, elect the sign of the sum of a_t D_t.
    3. W = W0 + alpha * mean of those a_t D_t that are kept and have this sign.
    """

    name: ClassVar[str] = "ties"
    Options = TiesOptions
    about: ClassVar[About] = About(
        summary="Trims small changes, elects signs, averages what agrees.",
        source="Yadav et al. 2023, arXiv 2306.01708",
        data="none",
        passes="3; 2 with trim = global-approx; 1 with density = 1",
        memory="panels and 2 MiB per expert",
        when="many experts whose small changes are noise",
    )

    def __init__(self, options: TiesOptions) -> None:
        super().__init__(options)
        shares = options.density
        trims = any(s < 1 for s in (shares.values() if isinstance(shares, dict) else [shares]))
        self._trimming = (1 if options.trim == "global-approx" else 2) if trims else 0
        self._votes = options.zero_sign == "majority"
        self.sweeps = self._trimming + self._votes
        self.scope = "tensor" if options.trim == "tensor" else "model"

    def measure(self, panel: Panel, known: Sequence[Any], sums: Sums) -> None:
        """Histograms of |D_t|, then, for the majority, the elected signs."""
        if len(known) == self._trimming:
            totals_N = weigh(self._trimmed(panel, known), panel.weights).sum(dim=0)
            add_to(sums, "signs", totals_N.sign_().sum(dtype=torch.float64))
            return
        if not known:
            count_high(panel.updates_TN, sums)
        else:
            count_low(panel.updates_TN, known[0]["bins"], sums)

    def settle(self, sums: Sums, known: Sequence[Any], whole: Whole) -> Any:  # noqa: ANN401
        """Bins, then thresholds per expert, then the majority's sign."""
        if len(known) == self._trimming:
            return {"sign": -1.0 if float(sums["signs"]) < 0 else 1.0}
        if known:
            values = values_of(sums["low"], known[0]["bins"], known[0]["ranks"])
            return {"thresholds": values.squeeze(1).tolist()}
        kept = [
            max(1, int(share * whole.elements))
            for share in each(self.options.density, whole.experts)
        ]
        bins_T1, ranks_T1 = bins_of(sums["high"], [[whole.elements - k] for k in kept])
        approximate = values_within_bins(sums["high"], bins_T1, ranks_T1).squeeze(1).tolist()
        return {"bins": bins_T1, "ranks": ranks_T1, "thresholds": approximate}

    def merge(self, panel: Panel, known: Sequence[Any]) -> Tensor:
        """Disjoint mean of the trimmed updates."""
        zero_sign = known[-1]["sign"] if self._votes else 1.0
        trimmed_TN = self._trimmed(panel, known)
        return elected_sum(trimmed_TN, panel.weights, self.options.normalize, zero_sign)

    def _trimmed(self, panel: Panel, known: Sequence[Any]) -> Tensor:
        """Updates with everything below its expert's threshold set to 0, in place."""
        if self._trimming:
            thresholds = known[self._trimming - 1]["thresholds"]
            for row_N, threshold in zip(panel.updates_TN, thresholds, strict=True):
                keep_at_least(row_N, threshold)
        return panel.updates_TN
