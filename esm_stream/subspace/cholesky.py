"""Least squares with a positive definite matrix given by its lower half, in place and by panels.

From:  methods: closed forms N (K + r I)^-1.
To:    the same, N overwritten with the result.
Peak:  no more than what is given, and two panels of TILE rows.

K = C C^T, C lower triangular, both in panels of TILE rows that end at the diagonal. A panel is
finished with the panels above it, so that all but one TILE in each row is a product of matrices.

Letters: N side of K, M rows of a panel, O rows of the right-hand side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from esm_stream.subspace.basis import frobenius_norm
from esm_stream.subspace.gram import lower_tiles

_EPSILON = torch.finfo(torch.float64).eps


def lower_panels(symmetric_NN: Tensor) -> list[Tensor]:
    """Panels of a matrix at hand: rows of TILE, columns up to the end of the diagonal tile."""
    return [symmetric_NN[start:stop, :stop] for start, stop in lower_tiles(len(symmetric_NN))]


def solve_ridge(target_ON: Tensor, panels: Sequence[Tensor], ridge: float) -> Tensor:
    """R = N (K + ridge tr(K) / side I)^-1, float64; zero where K is; overwrites both.

    Args:
        target_ON: N.
        panels: Lower panels of K, positive semi-definite.
        ridge: Relative to the mean of K's diagonal; at least some rounding is added in any case.
    """
    return fit_ridge(target_ON, panels, ridge)[0]


def fit_ridge(target_ON: Tensor, panels: Sequence[Tensor], ridge: float) -> tuple[Tensor, float]:
    """`solve_ridge`, and tr(R (2 N - R K)^T): by how much R lowers the squares that it fits."""
    diagonals = [_diagonal_of(panel_MN) for panel_MN in panels]
    trace = sum(float(tile_MM.trace()) for tile_MM in diagonals)
    if trace == 0:
        return target_ON.zero_(), 0.0
    shift = max(ridge / target_ON.shape[1], 4 * _EPSILON) * trace
    for tile_MM in diagonals:
        tile_MM.diagonal().add_(shift)
    factor_in_place(panels)
    # With K + shift = C C^T: R K = N - shift R, and tr(R N^T) is the square of N C^-T.
    _eliminate(target_ON, panels)
    product = frobenius_norm(target_ON) ** 2
    _substitute_back(target_ON, panels)
    return target_ON, product + shift * frobenius_norm(target_ON) ** 2


def factor_in_place(panels: Sequence[Tensor]) -> None:
    """The Cholesky factor in the place of K.

    Raises:
        torch.linalg.LinAlgError: K is not positive definite.
    """
    for number, panel_MN in enumerate(panels):
        _eliminate(panel_MN, panels[:number])
        start = panel_MN.shape[1] - len(panel_MN)
        left_MN, tile_MM = panel_MN[:, :start], _diagonal_of(panel_MN)
        if start:
            tile_MM.addmm_(left_MN, left_MN.T, alpha=-1)
        tile_MM.copy_(torch.linalg.cholesky(tile_MM))


def _substitute_back(target_ON: Tensor, factor: Sequence[Tensor]) -> None:
    """The rows times C^-1, in place."""
    for panel_MN in reversed(factor):
        stop = panel_MN.shape[1]
        start = stop - len(panel_MN)
        own_OM = target_ON[:, start:stop]
        own_OM.copy_(
            torch.linalg.solve_triangular(_diagonal_of(panel_MN), own_OM, upper=False, left=False)
        )
        if start:
            target_ON[:, :start].addmm_(own_OM, panel_MN[:, :start], alpha=-1)


def _eliminate(rows_ON: Tensor, factor: Sequence[Tensor]) -> None:
    """The first columns of rows times C^-T, in place."""
    for panel_MN in factor:
        stop = panel_MN.shape[1]
        start = stop - len(panel_MN)
        own_OM = rows_ON[:, start:stop]
        if start:
            own_OM.addmm_(rows_ON[:, :start], panel_MN[:, :start].T, alpha=-1)
        tile_MM = _diagonal_of(panel_MN)
        own_OM.copy_(torch.linalg.solve_triangular(tile_MM.T, own_OM, upper=True, left=False))


def _diagonal_of(panel_MN: Tensor) -> Tensor:
    """The tile of a panel that is on the diagonal of K."""
    return panel_MN[:, panel_MN.shape[1] - len(panel_MN) :]
