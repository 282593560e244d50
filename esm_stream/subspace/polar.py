"""Polar factor of one matrix: the nearest matrix whose singular values are all one.

From:  methods/, stacked bases (tall or wide) and stacked coordinates.
To:    methods/, the factor and the singular values it was taken from.
Peak:  float64: the matrix, the factor, and five squares of the smaller side (eigenproblem with its
       workspace); by SVD the matrix three times, the factor, and five squares.

Letters: M rows, N columns, S = min(M, N).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Eigenvalues of a Gram matrix carry errors of eps * s_max^2: below this ratio the square root of
# the smallest is worth less than four digits.
_SMALLEST_RATIO_FROM_GRAM = 1e-6
_LARGEST_CONDITION = 1 / torch.finfo(torch.float64).eps


@dataclass(frozen=True, slots=True)
class Polar:
    """Polar factor and the spectrum it flattened.

    Attributes:
        factor: Partial isometry of minimal norm, float64, shape of the matrix.
        singular_values: All of them, descending, float64, shape (S,).
        dropped: Number of directions too small to have a factor.
        condition: s_max / s_min, at most 1/eps; 1.0 for a zero or an empty matrix.
    """

    factor: Tensor
    singular_values: Tensor
    dropped: int
    condition: float

    @property
    def mean_singular_value(self) -> float:
        """Mean over min(M, N) of all singular values, dropped ones too (methods.md 1.3, rule 3)."""
        return float(self.singular_values.mean()) if len(self.singular_values) else 0.0


def polar(matrix_MN: Tensor, tolerance: float = 1e-7, complete: bool = False) -> Polar:
    """Polar factor U V^T over the directions that exist (methods.md 1.1 step 7, 1.3 rule 4).

    Args:
        matrix_MN: Any float dtype and shape, zero and empty included.
        tolerance: Directions with s <= tolerance * s_max are dropped.
        complete: U V^T of the SVD as LAPACK completes it; nothing is dropped.

    Returns:
        Factor, singular values, number dropped and condition number.
    """
    matrix_MN = matrix_MN.double()
    if matrix_MN.numel() == 0 or not bool(matrix_MN.any()):
        side = min(matrix_MN.shape)
        return Polar(torch.zeros_like(matrix_MN), matrix_MN.new_zeros(side), side, 1.0)
    if complete:
        return _from_svd(matrix_MN, -1.0)
    return _from_gram(matrix_MN) or _from_svd(matrix_MN, tolerance)


def _from_gram(matrix_MN: Tensor) -> Polar | None:
    """(A A^T)^(-1/2) A, or A (A^T A)^(-1/2), on the smaller side; None if too ill-conditioned."""
    wide = matrix_MN.shape[0] <= matrix_MN.shape[1]
    gram_SS = matrix_MN @ matrix_MN.T if wide else matrix_MN.T @ matrix_MN
    values, vectors_SS = torch.linalg.eigh(gram_SS)
    del gram_SS
    singular_values = values.clamp_(min=0).sqrt_()
    if float(singular_values[0]) < _SMALLEST_RATIO_FROM_GRAM * float(singular_values[-1]):
        return None
    inverse_root_SS = (vectors_SS / singular_values) @ vectors_SS.T
    factor_MN = inverse_root_SS @ matrix_MN if wide else matrix_MN @ inverse_root_SS
    singular_values = singular_values.flip(0)
    return Polar(factor_MN, singular_values, 0, _condition(singular_values))


def _from_svd(matrix_MN: Tensor, tolerance: float) -> Polar:
    """U V^T over singular values above the tolerance; a negative tolerance keeps them all."""
    left_MS, singular_values, right_SN = torch.linalg.svd(matrix_MN, full_matrices=False)
    kept = int((singular_values > tolerance * singular_values[0]).sum())
    factor_MN = left_MS[:, :kept] @ right_SN[:kept]
    dropped = len(singular_values) - kept
    return Polar(factor_MN, singular_values, dropped, _condition(singular_values))


def _condition(singular_values: Tensor) -> float:
    """s_max / s_min of a nonzero matrix, capped where float64 ends so that it stays a number."""
    largest, smallest = float(singular_values[0]), float(singular_values[-1])
    return largest / max(smallest, largest / _LARGEST_CONDITION)
