"""Fisher merging: a mean weighted by how much each expert's task depends on each weight.

From:  the engine, panels of base, experts and their Fisher information, which the manifest names.
To:    the engine, the merged panel.
Peak:  one panel, twice as large as of other methods.

Letters: T experts, N elements of a panel.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from esm_stream.methods.contract import (
    About,
    ElementwiseMethod,
    MethodOptions,
    Panel,
    Sums,
    Whole,
    add_to,
)


class FisherOptions(MethodOptions):
    """Options of Fisher merging."""

    normalize: bool = Field(
        False,
        description="Divide each expert's Fisher information by its norm over all tensors merged "
        "so, which makes experts weigh alike. Costs a sweep.",
    )
    floor: PositiveFloat = Field(1e-6, description="Smallest Fisher information of a weight.")


class Fisher(ElementwiseMethod):
    """W = sum of a_t F_t W_t / sum of a_t F_t, element by element, with F_t at least `floor`.

    F_t is the diagonal of the Fisher information, the mean over examples of expert t's task of the
    squared gradient of its loss. Where all F_t are equal it is the mean.
    """

    name: ClassVar[str] = "fisher"
    Options = FisherOptions
    needs_fisher: ClassVar[bool] = True
    about: ClassVar[About] = About(
        summary="Mean of the experts' weights, weighted by their Fisher information.",
        source="Matena and Raffel 2022, arXiv 2111.09832",
        data="Fisher information of every expert, as files",
        passes="1; 2 with normalize",
        memory="panels",
        when="squared gradients of the experts' training at hand",
    )
    scope = "model"

    def __init__(self, options: FisherOptions) -> None:
        super().__init__(options)
        self.sweeps = int(options.normalize)

    def measure(self, panel: Panel, known: Sequence[Any], sums: Sums) -> None:  # noqa: ARG002
        """Squared norms of the Fisher information of every expert."""
        squares_T = _given(panel).square().sum(dim=1, dtype=torch.float64)
        add_to(sums, "squares", squares_T)

    def settle(self, sums: Sums, known: Sequence[Any], whole: Whole) -> Any:  # noqa: ANN401, ARG002
        """Norms; 1 where there is no information at all."""
        norms_T = sums["squares"].sqrt()
        return torch.where(norms_T > 0, norms_T, 1.0)

    def merge(self, panel: Panel, known: Sequence[Any]) -> Tensor:
        """Weighted mean of the updates."""
        fisher_TN = _given(panel)
        if known:
            fisher_TN = fisher_TN / known[0].unsqueeze(1).to(fisher_TN.dtype)
        shares_TN = fisher_TN.clamp(min=self.options.floor)
        shares_TN *= shares_TN.new_tensor(panel.weights).unsqueeze(1)
        total_N = shares_TN.sum(dim=0)
        # Weights that cancel have no mean: what they add up to stays as it is.
        total_N[total_N == 0] = 1.0
        return (panel.updates_TN * shares_TN).sum(dim=0).div_(total_N)


def _given(panel: Panel) -> Tensor:
    assert panel.fisher_TN is not None
    return panel.fisher_TN
