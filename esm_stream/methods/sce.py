"""SCE: select elements that differ, calculate weights, erase minority signs (methods.md 3.1).

From:  the engine, panels of base and experts; three sweeps before (one with select_topk = 1).
To:    the engine, the merged panel.
Peak:  one panel, and the histograms of thresholds.py: 2 MiB.

Letters: T experts, N elements of a panel.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from esm_stream.methods.contract import (
    About,
    ElementwiseMethod,
    MethodOptions,
    Panel,
    Share,
    Sums,
    Whole,
    add_to,
)
from esm_stream.methods.signs import weigh
from esm_stream.methods.thresholds import (
    bins_of,
    count_high,
    count_low,
    keep_at_least,
    values_of,
)


class SceOptions(MethodOptions):
    """Options of SCE."""

    select_topk: Share = Field(
        1.0,
        description="Share of the elements on which experts differ that is kept, those with the "
        "largest variance over experts.",
    )


class Sce(ElementwiseMethod):
    """Select, calculate, erase.

    1. Per tensor, keep the `select_topk` elements with the largest variance over experts (of those
       with any).
    2. Weight a_t is the mean square of what is left of D_t, relative to the sum over experts.
    3. Per element, mean with these weights of those D_t that have the sign of the sum of all D_t.
    """

    name: ClassVar[str] = "sce"
    Options = SceOptions
    about: ClassVar[About] = About(
        summary="Keeps elements on which experts differ, weighs experts by their energy.",
        source="Wan et al. 2024, arXiv 2408.07990",
        data="none",
        passes="2; 4 with select_topk < 1",
        memory="panels and 2 MiB",
        when="chat models of different strengths",
    )

    def __init__(self, options: SceOptions) -> None:
        super().__init__(options)
        self._selecting = 2 if options.select_topk < 1 else 0
        self.sweeps = self._selecting + 1

    def measure(self, panel: Panel, known: Sequence[Any], sums: Sums) -> None:
        """Histograms of the variance, then energies of what is selected."""
        updates_TN = weigh(panel.updates_TN, panel.weights)
        if len(known) == self._selecting:
            selected_TN = self._selected(updates_TN, known)
            add_to(sums, "energies", selected_TN.square().sum(dim=1, dtype=torch.float64))
            return
        variance_1N = _variance(updates_TN).unsqueeze(0)
        if known:
            count_low(variance_1N, known[0]["bins"], sums)
        else:
            count_high(variance_1N, sums)
            add_to(sums, "nonzero", torch.count_nonzero(variance_1N))

    def settle(self, sums: Sums, known: Sequence[Any], whole: Whole) -> Any:  # noqa: ANN401
        """Bins, then the smallest variance kept, then the weights of experts."""
        if len(known) == self._selecting:
            energies_T = sums["energies"]
            total = energies_T.sum()
            return (energies_T / total if total > 0 else torch.ones_like(energies_T)).tolist()
        if known:
            values = values_of(sums["low"], known[0]["bins"], known[0]["ranks"])
            return float(values) if known[0]["kept"] else float("inf")
        kept = int(int(sums["nonzero"]) * self.options.select_topk)
        rank = min(whole.elements - kept, whole.elements - 1)
        bins_11, ranks_11 = bins_of(sums["high"], [[rank]])
        return {"bins": bins_11, "ranks": ranks_11, "kept": kept}

    def merge(self, panel: Panel, known: Sequence[Any]) -> Tensor:
        """Mean of what is selected and agrees."""
        selected_TN = self._selected(weigh(panel.updates_TN, panel.weights), known)
        signs_TN = selected_TN.sign()
        wanted_N = torch.where(selected_TN.sum(dim=0) >= 0, 1.0, -1.0)
        agree_TN = weigh((signs_TN == wanted_N).to(selected_TN.dtype), known[-1])
        total_N = (selected_TN * agree_TN).sum(dim=0)
        return total_N.div_(agree_TN.sum(dim=0).clamp_(min=1e-6))

    def _selected(self, updates_TN: Tensor, known: Sequence[Any]) -> Tensor:
        """Updates, 0 where the variance over experts is too small."""
        if not self._selecting:
            return updates_TN
        variance_N = _variance(updates_TN)
        return updates_TN * (keep_at_least(variance_N, known[1]) != 0)


def _variance(updates_TN: Tensor) -> Tensor:
    return updates_TN.var(dim=0, unbiased=False)
