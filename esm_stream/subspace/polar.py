"""Polar factors: the nearest matrices whose singular values are all one.

From:  methods/ and product.py, stacked bases and stacked coordinates.
To:    the same: K^(-1/2) of a tall matrix A with Gram matrix K, which makes it A K^(-1/2); or that
       factor applied.
Peak:  float64, for a tall matrix of N columns: by eigenvectors 6 * N^2; banded (large N, or nearly
       singular) twice N^2 and eight tiles of N * 1024. A itself is seen by panels of rows. By
       reflectors half a square in place of two: A itself, in float32.

Letters: M rows, N columns, M >= N for a tall matrix, S = min(M, N), Q columns of another matrix.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from esm_stream.subspace.band import Band
from esm_stream.subspace.bidiagonal import Bidiagonal
from esm_stream.subspace.gram import gram, row_panels
from esm_stream.subspace.sizes import is_banded

# Eigenvalues of a Gram matrix carry errors of eps * s_max^2: below this ratio the square root of
# the smallest is worth less than four digits.
_SMALLEST_RATIO_FROM_GRAM = 1e-6
_LARGEST_CONDITION = 1 / torch.finfo(torch.float64).eps
# Without the singular values below this, relative to the largest, their sum is the same.
_SMALLEST_SUMMED_SQUARE = 1e-13

_SMALLEST_LIFT = 1e-10
# Eigenvalues of the lifted matrix that are rounding: they belong to s of at most 1e-12 s_max.
_NOTHING = 1e-14
_SMALLEST_QUICK_SIDE = 512
# Of a polar factor in float32. The product is promised to 1e-4.
_LARGEST_ERROR = 2e-5

Panels = Callable[[], Iterable[Tensor]]
"""Row panels of one tall matrix, float64, from the top, as often as asked for."""


class Root(Protocol):
    """K^(-1/2) or polar(A), over the directions that exist."""

    def __call__(self, columns_NQ: Tensor, /) -> Tensor:
        """K^(-1/2) Y, or polar(A) Y; Y may be overwritten."""


@dataclass(frozen=True, slots=True)
class PolarRoot:
    """What makes a tall matrix A its polar factor A @ root.

    Attributes:
        root: A root(Y) = polar(A) Y. Not symmetric where A is nearly singular.
        is_factor: It is root(Y) that is polar(A) Y.
        mean_singular_value: Mean of all N, dropped ones too (methods.md 1.3, rule 3).
        dropped: Number of directions too small to have a factor.
        condition: s_max / s_min, at most 1/eps; 1.0 for a zero or an empty matrix.
    """

    root: Root
    mean_singular_value: float
    dropped: int
    condition: float
    is_factor: bool = False


@dataclass(frozen=True, slots=True)
class Polar:
    """Polar factor of a whole matrix, a partial isometry of minimal norm; see `PolarRoot`."""

    factor: Tensor
    mean_singular_value: float
    dropped: int
    condition: float


def polar(matrix_MN: Tensor, tolerance: float = 1e-7, complete: bool = False) -> Polar:
    """Polar factor U V^T over the directions that exist (methods.md 1.1 step 7, 1.3 rule 4).

    Args:
        matrix_MN: Any float dtype and shape, zero and empty included.
        tolerance: Directions with s <= tolerance * s_max are dropped.
        complete: U V^T of the SVD as LAPACK completes it; nothing is dropped.

    Returns:
        Factor, float64, shape of the matrix, and what was found on the way.
    """
    matrix_MN = matrix_MN.double()
    if complete and bool(matrix_MN.any()):
        left_MS, values, right_SN = torch.linalg.svd(matrix_MN, full_matrices=False)
        return Polar(left_MS @ right_SN, float(values.mean()), 0, _condition(values))
    wide = matrix_MN.shape[0] < matrix_MN.shape[1]
    tall_MN = matrix_MN.T if wide else matrix_MN
    side = tall_MN.shape[1]
    found = polar_root(lambda: row_panels(tall_MN), side, side, tolerance)
    factor_MN = tall_MN @ found.root(torch.eye(side, dtype=torch.float64, device=tall_MN.device))
    factor_MN = factor_MN.T if wide else factor_MN
    return Polar(factor_MN, found.mean_singular_value, found.dropped, found.condition)


def polar_root(panels: Panels, side: int, columns: int, tolerance: float = 1e-7) -> PolarRoot:
    """K^(-1/2) = (A^T A)^(-1/2) of a tall matrix A, over the directions that exist.

    Args:
        panels: Row panels of A.
        side: Number N of columns of A.
        columns: Number Q of columns that the root is going to be applied to, to choose the way.
        tolerance: Directions with s <= tolerance * s_max are dropped.
    """
    gram_NN = gram(panels(), side)
    if gram_NN is None or not bool(gram_NN.diagonal().any()):
        return PolarRoot(Tensor.zero_, 0.0, side, 1.0)
    if is_banded(side, columns):
        return banded_root(gram_NN, panels, tolerance)
    return _dense_root(gram_NN, panels, tolerance)


def factor_by_reflectors(panels: Panels, rows: int, side: int) -> PolarRoot | None:
    """polar(A) of a tall A stored in float32; None where float32 is not enough to say it."""
    matrix_MN, start = None, 0
    for panel_MN in panels():
        if matrix_MN is None:
            matrix_MN = panel_MN.new_empty(rows, side, dtype=torch.float32)
        matrix_MN[start : start + len(panel_MN)] = panel_MN
        start += len(panel_MN)
    if matrix_MN is None or not bool(matrix_MN.any()):
        return None
    form = Bidiagonal(matrix_MN)
    if form.sums is None or form.error > _LARGEST_ERROR:
        return None
    condition = math.sqrt(form.form.largest / form.smallest)
    return PolarRoot(form.polar, form.sums.roots / side, 0, condition, is_factor=True)


def _dense_root(gram_NN: Tensor, panels: Panels, tolerance: float) -> PolarRoot:
    """By eigenvectors of K; where K is nearly singular, by its banded form."""
    values, vectors_NN = torch.linalg.eigh(gram_NN)
    values = values.clamp_(min=0).sqrt_()
    ratio = float(values[0] / values[-1])
    if ratio < _SMALLEST_RATIO_FROM_GRAM and tolerance < _SMALLEST_RATIO_FROM_GRAM:
        del vectors_NN
        return banded_root(gram_NN, panels, tolerance)
    kept = values > tolerance * values.max()
    vectors_NK = vectors_NN[:, kept]
    root_NN = (vectors_NK / values[kept]) @ vectors_NK.T
    dropped = len(values) - int(kept.sum())
    return PolarRoot(root_NN.matmul, float(values.mean()), dropped, _condition(values))


def banded_root(gram_NN: Tensor, panels: Panels, tolerance: float) -> PolarRoot:
    """By the banded form of K, without eigenvectors; K is overwritten.

    Where K is too close to singular for its square root, A is first multiplied by (K + d)^(-1/2)
    which lifts the singular values s to s / sqrt(s^2 + d): with d = 1e-10 s_max^2 those at 1e-7 of
    the largest to 1e-2 of it, where the Gram matrix of the product has them with all digits. As
    both factors are functions of K, but for rounding, the polar factor of the product is that of A.
    """
    side = gram_NN.shape[0]
    first = Band(gram_NN)
    edge = max(_SMALLEST_RATIO_FROM_GRAM, tolerance) ** 2
    if first.form.count_below(edge * first.form.largest) == 0:
        smallest = first.form.smallest()
        low = smallest / 2

        def well(columns_NQ: Tensor) -> Tensor:
            first.inverse_root(columns_NQ, low)
            return columns_NQ

        condition = math.sqrt(first.form.largest / smallest)
        return PolarRoot(well, first.form.root_sums(low).roots / side, 0, condition)
    square = max(1e-3 * tolerance, _SMALLEST_LIFT)
    lift = square * first.form.largest
    lifted_NN = gram((_lifted(first, panel_MN, lift) for panel_MN in panels()), side)
    assert lifted_NN is not None
    second = Band(lifted_NN)
    # A singular value s of A is s / sqrt(s^2 + d) of the product.
    cut = max(tolerance**2 / (tolerance**2 + square), _SMALLEST_SUMMED_SQUARE)
    dropped = second.form.count_below(cut)
    # Directions that are missing altogether are rounding after the lift too, far below the cut: to
    # leave them out needs no projector, for an error of 1e-5. Small sides are cheap without that.
    missing = bool(dropped) and dropped == second.form.count_below(_NOTHING)
    quick = missing and side >= _SMALLEST_QUICK_SIDE

    def nearly_singular(columns_NQ: Tensor) -> Tensor:
        if quick:
            second.inverse_root_above(columns_NQ, cut / 2)
        else:
            if dropped:
                second.above(columns_NQ, cut)
            second.inverse_root(columns_NQ, cut / 2)
        first.inverse_root(columns_NQ, lift / 2, offset=lift)
        return columns_NQ

    small = _SMALLEST_SUMMED_SQUARE * first.form.largest
    mean = first.form.root_sums(small / 2, offset=small).roots / side
    return PolarRoot(nearly_singular, mean, dropped, _lifted_condition(second, square))


def _lifted(band: Band, panel_MN: Tensor, lift: float) -> Tensor:
    """Rows of A (K + lift)^(-1/2)."""
    columns_NM = panel_MN.T.clone(memory_format=torch.contiguous_format)
    band.inverse_root(columns_NM, lift / 2, offset=lift)
    return columns_NM.T


def _lifted_condition(band: Band, square: float) -> float:
    """Condition of A from the spectrum of A (K + d)^(-1/2), d = square * s_max^2."""
    if band.form.count_below(_SMALLEST_SUMMED_SQUARE):
        return _LARGEST_CONDITION
    smallest = band.form.smallest()
    return min(math.sqrt((1 - smallest) / (smallest * square)), _LARGEST_CONDITION)


def _condition(values: Tensor) -> float:
    """s_max / s_min of a nonzero matrix, capped where float64 ends so that it stays a number."""
    largest, smallest = float(values.max()), float(values.min())
    return largest / max(smallest, largest / _LARGEST_CONDITION)
