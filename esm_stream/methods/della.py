"""DELLA: drop elements at random, small ones more often, then add (methods.md 3.1).

From:  the engine, panels of whole rows of base and experts.
To:    the engine, the merged panel.
Peak:  one panel, its ranks and random words.

Letters: T experts, N elements of a panel, R rows of it, C columns.
"""

from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from esm_stream.methods.chance import keeps, words
from esm_stream.methods.contract import About, Panel, Shares, each
from esm_stream.methods.dare import RandomlySparse, RandomOptions

_Spread = Annotated[float, Field(ge=0, lt=0.5)]


class DellaOptions(RandomOptions):
    """Options of DELLA."""

    density: Shares = Field(
        0.5, description="Mean probability that an element of an expert's update stays."
    )
    epsilon: _Spread | dict[str, _Spread] = Field(
        0.15,
        description="How far the probability of a row's smallest element lies below the density, "
        "and that of its largest above.",
    )
    rescale: Literal["unbiased", "l1", "none"] = Field(
        "l1",
        description="What is done to elements that stay: divided by the probability with which "
        "they stay, or so that the update of each tensor keeps its L1 norm (one more sweep), or "
        "nothing.",
    )
    signs: Literal["all", "elected"] = Field(
        "elected",
        description="Add all updates (as task arithmetic), or only those with the elected sign "
        "(as TIES).",
    )
    normalize: bool = Field(
        True, description="Divide by the sum of the weights of the updates that are added."
    )

    @model_validator(mode="after")
    def _probabilities(self) -> Self:
        densities = self.density if isinstance(self.density, dict) else {"": self.density}
        for expert, density in densities.items():
            epsilon = self.epsilon[expert] if isinstance(self.epsilon, dict) and expert else None
            spread = epsilon if epsilon is not None else self._widest()
            if density < 1 and not 0 < density - spread <= density + spread < 1:
                raise ValueError(
                    f"density - epsilon and density + epsilon have to lie between 0 and 1, "
                    f"got {density} and {spread}"
                )
        return self

    def _widest(self) -> float:
        return max(self.epsilon.values()) if isinstance(self.epsilon, dict) else self.epsilon


class Della(RandomlySparse):
    """Keep an element with a probability that grows with its rank in its row, rescale, add.

    The probability runs linearly from density - epsilon for the smallest |D_t| of a row to
    density + epsilon for the largest.
    """

    name: ClassVar[str] = "della"
    Options = DellaOptions
    about: ClassVar[About] = About(
        summary="Drops elements at random, small ones more often, elects signs.",
        source="Deep et al. 2024, arXiv 2406.11617",
        data="none",
        passes="2; 1 with rescale = unbiased or none",
        memory="panels of whole rows",
        when="where DARE helps and magnitudes mean something",
    )
    whole_rows: ClassVar[bool] = True

    def sparse(self, panel: Panel) -> Tensor:
        """Updates with the elements that were not drawn set to 0."""
        densities = each(self.options.density, panel.experts)
        spreads = each(self.options.epsilon, panel.experts)
        for row_N, expert, density, epsilon in zip(
            panel.updates_TN, panel.experts, densities, spreads, strict=True
        ):
            if density == 1:
                continue
            shares_N = _probabilities(row_N, panel.columns, density, epsilon)
            drawn = words(self.options.seed, expert, panel.tensor, panel.first, len(row_N))
            row_N.mul_(torch.from_numpy(keeps(drawn, shares_N)))
            if self.options.rescale == "unbiased":
                row_N.div_(torch.from_numpy(shares_N))
        return panel.updates_TN


def _probabilities(row_N: Tensor, columns: int, density: float, epsilon: float) -> np.ndarray:
    """Probability of every element by its rank in its row; equal magnitudes by their order."""
    magnitudes_RC = row_N.abs().view(-1, columns).numpy()
    order_RC = np.argsort(magnitudes_RC, axis=1, kind="stable")
    ranks_RC = np.empty_like(order_RC)
    np.put_along_axis(ranks_RC, order_RC, np.arange(columns)[None, :], axis=1)
    shares_RC = (density - epsilon) + ranks_RC * (2 * epsilon / max(columns - 1, 1))
    return shares_RC.reshape(-1)
