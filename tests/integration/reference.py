"""ESM and its neighbours written down once more from methods.md, in float64 and in memory.

Nothing of esm_stream is used: matrices as lists, SVDs where the product takes eigenproblems.
Letters: O output features, I input features, K rank, T experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EXPONENT = 2.0


@dataclass(frozen=True, slots=True)
class Variant:
    """What of a profile decides the merged update of one matrix."""

    power: float = 0.15
    factor: float = 1.0
    task: bool = False
    dimension: bool = False


def essential_factors(update_OI: Tensor, inputs_NI: Tensor, rank: int) -> tuple[Tensor, ...]:
    """Steps 1 and 2: eigenvalues, basis and coordinates from the SVD of the shifts themselves."""
    shift_NO = inputs_NI @ update_OI.T
    _, values, right = torch.linalg.svd(shift_NO, full_matrices=False)
    energies = values.square()
    kept = min(rank, int((energies > 1e-10 * energies[0]).sum()), *update_OI.shape)
    basis_OK = right[:kept].T
    return energies[:kept], basis_OK, basis_OK.T @ update_OI


def esm(updates: Sequence[Tensor], inputs: Sequence[Tensor], variant: Variant) -> Tensor:
    """Steps 1 to 7."""
    rank = max(1, updates[0].shape[0] // len(updates))
    mean_norm = sum(float(update.norm()) for update in updates) / len(updates)
    bases, rows = [], []
    for update, x in zip(updates, inputs, strict=True):
        energies, basis, coordinates = essential_factors(update, x, rank)
        weights = (energies / energies.mean()) ** variant.power
        weights = weights / weights.mean()
        gamma = (float(update.norm()) / mean_norm) ** EXPONENT if variant.task else 1.0
        bases.append(basis * weights)
        rows.append(gamma * weights[:, None] * coordinates)
    left, right = torch.cat(bases, 1), torch.cat(rows)
    if variant.dimension:
        norms = right.norm(dim=0)
        right = right * (norms / norms.mean()) ** EXPONENT
    scale = variant.factor * mean_singular_value(left) * mean_singular_value(right)
    return scale * polar(left) @ polar(right)


def tsv(updates: Sequence[Tensor], *, by_mean_singular_values: bool = False) -> Tensor:
    """TSV-M: U_cat and V_cat of the leading triples made orthonormal, singular values kept."""
    rank = max(1, min(updates[0].shape) // len(updates))
    parts = [torch.linalg.svd(update, full_matrices=False) for update in updates]
    left = torch.cat([u[:, :rank] for u, _, _ in parts], 1)
    values = torch.cat([s[:rank] for _, s, _ in parts])
    right = torch.cat([v[:rank] for _, _, v in parts])
    merged = polar(left) @ torch.diag(values) @ polar(right)
    if by_mean_singular_values:
        merged = merged * mean_singular_value(left) * mean_singular_value(right)
    return merged


def layer_scales(merged: Sequence[Tensor]) -> list[float]:
    """Step 8: (norm / mean norm of the role) squared."""
    norms = [float(one.norm()) for one in merged]
    mean = sum(norms) / len(norms)
    return [(norm / mean) ** EXPONENT for norm in norms]


def polar(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def mean_singular_value(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix).mean())
