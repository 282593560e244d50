"""DARE: drop elements of each update at random, rescale the rest, add (methods.md 3.1).

From:  the engine, panels of base and experts.
To:    the engine, the merged panel.
Peak:  one panel and its random words.

Letters: T experts, N elements of a panel.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from esm_stream.methods.chance import keeps, words
from esm_stream.methods.contract import (
    About,
    ElementwiseMethod,
    Panel,
    Shares,
    Sums,
    Whole,
    add_to,
    each,
)
from esm_stream.methods.signs import SumOptions

_SMALLEST_NORM = 1e-7


class RandomOptions(SumOptions):
    """Options of methods that drop elements at random."""

    rescale: Literal["unbiased", "l1", "none"] = Field(
        "unbiased",
        description="What is done to elements that stay: divided by the probability with which "
        "they stay, or so that the update of each tensor keeps its L1 norm (one more sweep), or "
        "nothing.",
    )
    seed: NonNegativeInt = Field(0, description="Seed of the draws.")


class DareOptions(RandomOptions):
    """Options of DARE."""

    density: Shares = Field(
        0.5, description="Probability that an element of an expert's update stays."
    )


class RandomlySparse(ElementwiseMethod):
    """Drops elements at random, rescales, adds; `sparse` is left to the method."""

    def __init__(self, options: RandomOptions) -> None:
        super().__init__(options)
        self.sweeps = 1 if options.rescale == "l1" else 0

    def sparse(self, panel: Panel) -> Tensor:
        """Updates with dropped elements set to 0, divided by probabilities where unbiased."""
        raise NotImplementedError

    def measure(self, panel: Panel, known: Sequence[Any], sums: Sums) -> None:  # noqa: ARG002
        """L1 norms of the updates before and after."""
        before_T = panel.updates_TN.abs().sum(dim=1, dtype=torch.float64)
        after_T = self.sparse(panel).abs().sum(dim=1, dtype=torch.float64)
        add_to(sums, "before", before_T)
        add_to(sums, "after", after_T)

    def settle(self, sums: Sums, known: Sequence[Any], whole: Whole) -> Any:  # noqa: ANN401, ARG002
        """Factors that give the updates their L1 norms back; 1 where there is nothing."""
        norms = zip(sums["before"].tolist(), sums["after"].tolist(), strict=True)
        return [b / a if min(a, b) >= _SMALLEST_NORM else 1.0 for b, a in norms]

    def merge(self, panel: Panel, known: Sequence[Any]) -> Tensor:
        """Sum of the sparse updates."""
        sparse_TN = self.sparse(panel)
        if known:
            sparse_TN *= sparse_TN.new_tensor(known[0]).unsqueeze(1)
        total_N: Tensor = self.options.total(sparse_TN, panel.weights)
        return total_N


class Dare(RandomlySparse):
    """Keep each element of D_t with probability `density`, divide it by that, add.

    In the mean over seeds the sparse update is D_t; density = 1 is task arithmetic. What is kept
    depends on seed, expert, tensor and element alone.
    """

    name: ClassVar[str] = "dare"
    Options = DareOptions
    default_alpha: ClassVar[float] = 0.3
    about: ClassVar[About] = About(
        summary="Drops elements of the updates at random and rescales the rest.",
        source="Yu et al. 2024, arXiv 2311.03099",
        data="none",
        passes="1; 2 with rescale = l1",
        memory="panels",
        when="small updates of large models, few experts",
    )

    def sparse(self, panel: Panel) -> Tensor:
        """Updates with the elements that were not drawn set to 0."""
        densities = each(self.options.density, panel.experts)
        for row_N, expert, share in zip(panel.updates_TN, panel.experts, densities, strict=True):
            if share < 1:
                drawn = words(self.options.seed, expert, panel.tensor, panel.first, len(row_N))
                row_N.mul_(torch.from_numpy(keeps(drawn, share)))
                if self.options.rescale == "unbiased":
                    row_N.div_(share)
        return panel.updates_TN
