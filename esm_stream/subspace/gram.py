"""Gram matrices by panels of rows, and what else is done to a matrix panel by panel.

From:  basis.py, polar.py.
To:    the same.
Peak:  the Gram matrix and one float64 panel of 1024 rows.

Letters: M rows, N columns.
"""

from collections.abc import Iterable, Iterator

from torch import Tensor

from esm_stream.subspace.sizes import PANEL_ROWS, TILE


def row_panels(matrix_MN: Tensor) -> Iterator[Tensor]:
    """Panels of a matrix at hand, float64."""
    return (panel_MN.double() for panel_MN in matrix_MN.split(PANEL_ROWS))


def lower_tiles(side: int) -> Iterator[tuple[int, int]]:
    """Rows start..stop whose columns ..stop make up the lower triangle, whole on its diagonal."""
    for start in range(0, side, TILE):
        yield start, min(start + TILE, side)


def add_gram(sum_NN: Tensor, panel_MN: Tensor) -> None:
    """Add A^T A to the lower tiles of a sum: little more than half the work of a whole product."""
    for start, stop in lower_tiles(len(sum_NN)):
        sum_NN[start:stop, :stop].addmm_(panel_MN[:, start:stop].T, panel_MN[:, :stop])


def gram(panels: Iterable[Tensor], side: int) -> Tensor | None:
    """K = A^T A, float64, its lower tiles alone; None where A has no panel or no column."""
    gram_NN = None
    for panel_MN in panels:
        if gram_NN is None:
            gram_NN = panel_MN.new_zeros(side, side)
        add_gram(gram_NN, panel_MN)
    return gram_NN if side else None


def fill_upper(lower_NN: Tensor) -> Tensor:
    """The whole symmetric matrix of lower tiles, in place."""
    for start, stop in lower_tiles(len(lower_NN)):
        lower_NN[:start, start:stop] = lower_NN[start:stop, :start].T
    return lower_NN
