"""Iso-CTS: common and task-specific directions, all equally strong (methods.md 3.1).

From:  the engine, the experts' updates of one matrix, twice.
To:    the engine, the merged update.
Peak:  float64: the sum or one update with its SVD, and both stacks of directions.

Letters: T experts, O output features, I input features, M = min(O, I), S directions stacked.
"""

from typing import ClassVar

import torch
from pydantic import Field

from esm_stream.methods.contract import About, Merged, MethodOptions, SpectralMethod, Updates
from esm_stream.methods.iso_c import sum_of
from esm_stream.subspace.polar import polar

_RANK_TOLERANCE = 1e-10


class IsoCtsOptions(MethodOptions):
    """Options of Iso-CTS."""

    common: float = Field(
        0.8, gt=0, le=1, description="Share of the directions that all experts have together."
    )


class IsoCts(SpectralMethod):
    """Top directions of the sum, then each expert's top directions outside them, made isotropic.

    With M = min(O, I): s = round((M - floor(common M)) / T) T directions are task-specific, s / T
    of each expert, and M - s are common. Common ones are the top singular triples of the sum of
    all a_t D_t; those of expert t are the top triples of D_t - U U^T D_t, with U the common left
    vectors. All left vectors together and all right vectors together are made orthonormal by their
    polar factors, and all singular values are set to their mean.
    """

    name: ClassVar[str] = "iso_cts"
    Options = IsoCtsOptions
    about: ClassVar[About] = About(
        summary="Iso-C with room for directions of single experts.",
        source="Marczak et al. 2025, arXiv 2502.04959",
        data="none",
        passes="2",
        memory="one matrix, whatever the number of experts",
        when="many experts (14, 20) without samples",
    )

    def merge(self, updates: Updates, shape: tuple[int, int]) -> Merged:
        """Common triples, triples of every expert, polar factors."""
        side, count = min(shape), len(updates)
        own = round((side - int(self.options.common * side)) / count)
        total_OI = sum_of(updates)
        left_OM, values_M, right_MI = torch.linalg.svd(total_OI, full_matrices=False)
        del total_OI
        kept = min(side - own * count, _rank(values_M))
        common_OC = left_OM[:, :kept].clone()
        common = (common_OC, values_M[:kept].clone(), right_MI[:kept].clone())
        del left_OM, right_MI
        found = []
        for update_OI in updates if own else ():
            rest_OI = update_OI.double()
            rest_OI -= common_OC @ (common_OC.T @ rest_OI)
            left_OM, values_M, right_MI = torch.linalg.svd(rest_OI, full_matrices=False)
            kept = min(own, _rank(values_M, float(common[1][:1].sum())))
            found.append((left_OM[:, :kept].clone(), values_M[:kept], right_MI[:kept].clone()))
        found.append(common)
        left_OS = torch.cat([left for left, _, _ in found], dim=1)
        values_S = torch.cat([values for _, values, _ in found])
        right_SI = torch.cat([right for _, _, right in found])
        level = float(values_S.mean()) if len(values_S) else 0.0
        left, right = polar(left_OS), polar(right_SI)
        return Merged(
            (left.factor @ right.factor).mul_(level),
            {
                "condition_bases": left.condition,
                "condition_coordinates": right.condition,
                "dropped_bases": left.dropped,
                "dropped_coordinates": right.dropped,
            },
        )

    def peak_numbers(self, shape: tuple[int, int], num_experts: int) -> int:  # noqa: ARG002
        """Update, rest and SVD of one expert beside both stacks, or polar factors of the stacks."""
        return 9 * shape[0] * shape[1] + 8 * min(shape) ** 2

    def decompositions(self, num_experts: int) -> int:
        """One of the sum, one per expert, two polar factors."""
        return num_experts + 3


def _rank(values_M: torch.Tensor, scale: float = 0.0) -> int:
    """Singular values that are not rounding, of a matrix that came from numbers of that scale."""
    largest = max(float(values_M[0]) if len(values_M) else 0.0, scale)
    return int((values_M > _RANK_TOLERANCE * largest).sum())
