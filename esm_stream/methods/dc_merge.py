"""DC-Merge: elect signs in a common singular basis (methods.md 3.2).

From:  the engine, the experts' updates of one matrix.
To:    the engine, the merged update.
Peak:  float64: thin factors of all experts, both polar factors, one core of min(O, I)^2.

Letters: T experts, O output features, I input features, K rank of one expert, R sum of all K.
"""

from typing import ClassVar

import torch
from pydantic import Field
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
from esm_stream.methods.options import TsvMOptions
from esm_stream.methods.signs import elected_sum
from esm_stream.methods.thresholds import keep_at_least
from esm_stream.methods.tsv_m import TsvM
from esm_stream.subspace.polar import polar


class DcMergeOptions(MethodOptions):
    """Options of DC-Merge."""

    density: Share = Field(
        0.001, description="Share of each expert's core that is kept, the largest magnitudes."
    )


class DcMerge(SpectralMethod):
    """Truncate each D_t to K = min(O, I) / T triples; merge their cores in a cover basis.

    U and V are the polar factors of all left and all right vectors; the cores are
    M_t = U^T D_t V. Of each the `density` largest are kept; signs are elected and what agrees is
    averaged; what lies outside the T diagonal K x K blocks is dropped, and the rest mapped back.
    """

    name: ClassVar[str] = "dc_merge"
    Options = DcMergeOptions
    about: ClassVar[About] = About(
        summary="Elects signs in a singular basis that covers all experts.",
        source="DC-Merge (CVPR 2026), its code for full fine-tuning",
        data="none",
        passes="1",
        memory="factors of one matrix",
        when="distinct experts without samples",
    )

    def merge(self, updates: Updates, shape: tuple[int, int]) -> Merged:
        """Factors, cover bases, cores, their diagonal blocks, and back."""
        tsv = TsvM(TsvMOptions())
        factors = [tsv.factor(update_OI, None, len(updates)) for update_OI in updates]
        ranks = [one.basis_OK.shape[1] for one in factors]
        if not sum(ranks):
            return Merged(zeros(updates, *shape), {"ranks": ranks})
        bases = [one.basis_OK[:] for one in factors]
        left = polar(torch.cat(bases, dim=1))
        rows = [
            one.coordinates_KI / one.spectrum[:kept, None]
            for one, kept in zip(factors, ranks, strict=True)
        ]
        right = polar(torch.cat(rows))
        blocks = torch.block_diag(*(torch.ones(k, k) for k in ranks)).bool().to(updates.device)
        cores = zeros(updates, len(factors), int(blocks.sum()))
        for row, one, basis_OK in zip(cores, factors, bases, strict=True):
            core_RR = (left.factor.T @ basis_OK) @ (one.coordinates_KI @ right.factor.T)
            row.copy_(self._trimmed(core_RR)[blocks])
        merged_RR = zeros(updates, *blocks.shape)
        merged_RR[blocks] = elected_sum(cores, [1.0] * len(cores), normalize=True)
        return Merged(
            left.factor @ merged_RR @ right.factor,
            {
                "ranks": ranks,
                "condition_bases": left.condition,
                "condition_coordinates": right.condition,
                "dropped_bases": left.dropped,
                "dropped_coordinates": right.dropped,
            },
        )

    def _trimmed(self, core_RR: Tensor) -> Tensor:
        kept = max(1, int(self.options.density * core_RR.numel()))
        magnitudes = core_RR.abs().float().view(-1)
        threshold = float(magnitudes.kthvalue(magnitudes.numel() - kept + 1).values)
        return keep_at_least(core_RR, threshold)

    def peak_numbers(self, shape: tuple[int, int], num_experts: int) -> int:  # noqa: ARG002
        """Factors, both polar factors, cores and the SVD of one update."""
        return 9 * shape[0] * shape[1] + 10 * min(shape) ** 2

    def decompositions(self, num_experts: int) -> int:
        """One per expert, two polar factors."""
        return num_experts + 2
