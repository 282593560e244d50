"""KnOTS: merge in a basis that all experts share (methods.md 3.1).

From:  the engine, the experts' updates of one matrix, twice; or their factors.
To:    the engine, the merged update.
Peak:  float64: an eigenproblem of the outputs' side (none with factors); float32: all experts'
       right factors, T R I.

Letters: T experts, O output features, I input features, R directions of all updates together.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from esm_stream.methods.contract import (
    About,
    Merged,
    MethodOptions,
    Share,
    SpectralMethod,
    Updates,
    zeros,
)
from esm_stream.methods.low_rank import joint_columns
from esm_stream.methods.signs import elected_sum, weighted_sum
from esm_stream.methods.thresholds import keep_at_least


class KnotsOptions(MethodOptions):
    """Options of KnOTS."""

    signs: Literal["all", "elected"] = Field(
        "elected", description="Merge right factors by their mean, or as TIES."
    )
    density: Share = Field(
        0.2, description="Share of each right factor that is kept, the largest magnitudes."
    )
    normalize: bool = Field(True, description="Mean of what is added; otherwise the sum.")
    tolerance: NonNegativeFloat = Field(
        1e-4, description="Directions with singular values up to this are dropped."
    )


class Knots(SpectralMethod):
    """D = U S V, where [D_1 | ... | D_T] = U S [V_1 | ... | V_T] and V is the merge of the V_t.

    The mean of the V_t gives the mean of the D_t. Made for adapters, whose updates share no basis
    but have low rank.
    """

    name: ClassVar[str] = "knots"
    Options = KnotsOptions
    about: ClassVar[About] = About(
        summary="TIES in a basis that all updates share.",
        source="Stoica et al. 2024, arXiv 2410.19735",
        data="none",
        passes="2",
        memory="right factors of all experts for one matrix",
        when="experts tuned by LoRA",
    )

    def merge(self, updates: Updates, shape: tuple[int, int]) -> Merged:
        """Shared basis, right factors, their merge."""
        pairs = updates.low_rank()
        if pairs is None:
            basis_OR, scales_R = self._basis(updates, shape[0])
            rights_RI = (basis_OR.T @ update_OI.double() for update_OI in updates)
        else:
            basis_OR, scales_R = self._kept(*joint_columns(pairs))
            rights_RI = ((basis_OR.T @ left_OR) @ right_RI for left_OR, right_RI in pairs)
        if not len(scales_R):
            return Merged(zeros(updates, *shape), {"rank": 0})
        rights = basis_OR.new_empty(len(updates), len(scales_R) * shape[1], dtype=torch.float32)
        for row, right_RI in zip(rights, rights_RI, strict=True):
            scaled_RI = right_RI / scales_R.unsqueeze(1)
            row.copy_(self._trimmed(scaled_RI.float().view(-1)))
        merged_RI = self._added(rights).view(len(scales_R), shape[1]).double()
        return Merged((basis_OR * scales_R) @ merged_RI, {"rank": len(scales_R)})

    def _basis(self, updates: Updates, outputs: int) -> tuple[Tensor, Tensor]:
        """Left singular vectors (O, R) and values of all updates, from the sum of D_t D_t^T."""
        gram_OO = zeros(updates, outputs, outputs)
        for update_OI in updates:
            wide_OI = update_OI.double()
            gram_OO.addmm_(wide_OI, wide_OI.T)
        values_O, vectors_OO = torch.linalg.eigh(gram_OO)
        # Eigenvalues of a Gram matrix carry errors of eps times the largest.
        noise = 16 * torch.finfo(torch.float64).eps * float(values_O[-1].clamp(min=0))
        values_O[values_O <= noise] = 0
        return self._kept(vectors_OO, values_O.sqrt())

    def _kept(self, vectors_ON: Tensor, values_N: Tensor) -> tuple[Tensor, Tensor]:
        """Directions that are not dropped."""
        kept = values_N > self.options.tolerance
        return vectors_ON[:, kept], values_N[kept]

    def _trimmed(self, right: Tensor) -> Tensor:
        kept = max(1, int(self.options.density * right.numel()))
        if self.options.signs == "all" or kept == right.numel():
            return right
        threshold = float(right.abs().kthvalue(right.numel() - kept + 1).values)
        return keep_at_least(right, threshold)

    def _added(self, rights: Tensor) -> Tensor:
        """Mean, or mean of what agrees; weights are in the updates already."""
        ones = [1.0] * len(rights)
        add = weighted_sum if self.options.signs == "all" else elected_sum
        return add(rights, ones, self.options.normalize)

    def peak_numbers(self, shape: tuple[int, int], num_experts: int) -> int:
        """Right factors in float32 and what their merge makes of them, and the eigenproblem."""
        right = shape[0] * shape[1]
        return num_experts * right + 4 * right + 6 * shape[0] ** 2

    def low_rank_numbers(self, shape: tuple[int, int], num_experts: int, rank: int) -> int:
        """Right factors of all experts, factors, and the merged update."""
        rights = (num_experts + 6) * rank * shape[1]
        return rights + 4 * rank * sum(shape) + 2 * shape[0] * shape[1]
