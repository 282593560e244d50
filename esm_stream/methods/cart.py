"""CART: centre the updates at their mean and keep the top directions of each (methods.md 3.1).

From:  the engine, the experts' updates of one matrix, twice.
To:    the engine, the merged update.
Peak:  float64: mean, result, and one centred update with its SVD.

Letters: T experts, O output features, I input features.
"""

import math
from typing import ClassVar

import torch
from pydantic import Field

from esm_stream.methods.contract import About, Merged, MethodOptions, SpectralMethod, Updates
from esm_stream.methods.iso_c import sum_of


class CartOptions(MethodOptions):
    """Options of CART."""

    rank_share: float = Field(
        0.04, gt=0, le=1, description="Directions kept of each expert, as a share of min(O, I)."
    )
    scale: float = Field(1.0, description="Coefficient of the centred parts.")


class Cart(SpectralMethod):
    """D = M + scale * sum of svd_k(D_t - M), with M the mean of all D_t.

    svd_k keeps the k = ceil(rank_share min(O, I)) largest singular triples. scale = 0 is the
    average.
    """

    name: ClassVar[str] = "cart"
    Options = CartOptions
    about: ClassVar[About] = About(
        summary="The average, and the strongest deviations of each expert from it.",
        source="Choi et al. 2024, arXiv 2412.12153",
        data="none",
        passes="2",
        memory="one matrix, whatever the number of experts",
        when="experts whose average is already good",
    )

    def merge(self, updates: Updates, shape: tuple[int, int]) -> Merged:
        """Mean, then one truncated SVD per expert."""
        kept = math.ceil(self.options.rank_share * min(shape))
        mean_OI = sum_of(updates).div_(len(updates))
        merged_OI = mean_OI.clone()
        for update_OI in updates:
            centred_OI = update_OI.double().sub_(mean_OI)
            left_OM, values_M, right_MI = torch.linalg.svd(centred_OI, full_matrices=False)
            merged_OI.addmm_(
                left_OM[:, :kept] * values_M[:kept], right_MI[:kept], alpha=self.options.scale
            )
        return Merged(merged_OI, {"rank": kept})

    def peak_numbers(self, shape: tuple[int, int], num_experts: int) -> int:  # noqa: ARG002
        """Mean, result, update, centred update and its SVD."""
        return 8 * shape[0] * shape[1] + 6 * min(shape) ** 2

    def decompositions(self, num_experts: int) -> int:
        """One per expert."""
        return num_experts
