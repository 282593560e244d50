"""K^(-1/2) of a large symmetric matrix K applied to a few columns, without eigenvectors of K.

From:  polar.py, Gram matrices of stacked factors.
To:    polar.py, K^(-1/2) Y and the trace of K^(1/2).
Peak:  float64: K itself (overwritten) and four tiles of N * 1024.

K = Q B Q^T, B block tridiagonal with blocks of P (tridiagonal.py): nearly all of the reduction is
products with P columns, where an eigendecomposition spends half of its time in products with single
vectors and then makes N^2 numbers of eigenvectors that nobody asks for. To rounding, the result is
that of an eigendecomposition.

Letters: N side of K, M rows of it that are left, P side of a block, C = P but near the end, B
number of blocks, Q columns.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from esm_stream.subspace.reflectors import reflect, turn
from esm_stream.subspace.sizes import TILE, TILE_COLUMNS, block_of_band
from esm_stream.subspace.tridiagonal import BlockTridiagonal


class Band:
    """A symmetric matrix K = Q B Q^T in block tridiagonal form.

    Args:
        symmetric_NN: K, float64; its lower tiles are read, and all of it is overwritten with Q.
    """

    def __init__(self, symmetric_NN: Tensor) -> None:
        self.side = symmetric_NN.shape[0]
        self.block = block = block_of_band(self.side)
        count = math.ceil(self.side / block)
        self._diagonal_BPP = symmetric_NN.new_zeros(count, block, block)
        self._lower_BPP = symmetric_NN.new_zeros(count - 1, block, block)
        self._reflectors_NN = symmetric_NN
        self._compact_CC: list[Tensor] = []
        for number in range(count):
            self._reduce_panel(number)
        self.form = BlockTridiagonal(self._diagonal_BPP, self._lower_BPP, self.side)

    def _reduce_panel(self, number: int) -> None:
        """Make one block column of K banded: reflectors under it, and K' - V W^T - W V^T there."""
        whole_NN, start = self._reflectors_NN, number * self.block
        stop = min(start + self.block, self.side)
        self._diagonal_BPP[number, : stop - start, : stop - start] = whole_NN[
            start:stop, start:stop
        ]
        if stop == self.side:
            return
        panel_MP = whole_NN[stop:, start:stop]
        triangle_CP, rows_CM, compact_CC = reflect(panel_MP)
        self._lower_BPP[number, : len(rows_CM)] = triangle_CP
        self._compact_CC.append(compact_CC)
        panel_MP.zero_()[:, : len(rows_CM)] = rows_CM.T
        rest_MM, cuts = whole_NN[stop:, stop:], _cuts(stop, self.side)
        product_CM = compact_CC.T @ _symmetric_product(rows_CM, rest_MM, cuts)
        product_CM.addmm_(product_CM @ rows_CM.T @ compact_CC, rows_CM, alpha=-0.5)
        left_CM, right_CM = torch.cat([rows_CM, product_CM]), torch.cat([product_CM, rows_CM])
        for first, last in pairwise(cuts):
            tile = rest_MM[first:last, :last]
            tile.addmm_(left_CM[:, first:last].T, right_CM[:, :last], alpha=-1)

    def inverse_root(self, columns_NQ: Tensor, low: float, offset: float = 0.0) -> None:
        """(K + offset)^(-1/2) Y in place; see `BlockTridiagonal.inverse_root`."""
        self._map(lambda tile_NQ: self.form.inverse_root(tile_NQ, low, offset), columns_NQ)

    def inverse_power(self, columns_NQ: Tensor, power: float, low: float) -> None:
        """K^(-power) Y in place; see `BlockTridiagonal.inverse_power`."""
        self._map(lambda tile_NQ: self.form.inverse_power(tile_NQ, power, low), columns_NQ)

    def inverse_root_above(self, columns_NQ: Tensor, low: float) -> None:
        """K^(-1/2) Y over eigenvalues from `low` up, in place, where all others are rounding."""
        self._map(lambda tile_NQ: self.form.inverse_root_above(tile_NQ, low), columns_NQ)

    def above(self, columns_NQ: Tensor, value: float) -> None:
        """Y without its part in eigenvectors of eigenvalues below a value, in place."""
        self._map(lambda tile_NQ: self.form.above(tile_NQ, value), columns_NQ)

    def _map(self, function: Callable[[Tensor], Tensor], columns_NQ: Tensor) -> None:
        """Q f(B) Q^T Y in place, tile by tile of the columns of Y."""
        for tile_NQ in columns_NQ.split(TILE_COLUMNS, dim=1):
            turned_NQ = tile_NQ.clone(memory_format=torch.contiguous_format)
            self._rotate(turned_NQ, back=False)
            turned_NQ = function(turned_NQ)
            self._rotate(turned_NQ, back=True)
            tile_NQ.copy_(turned_NQ)

    def _rotate(self, columns_NQ: Tensor, *, back: bool) -> None:
        """Q^T Y in place, or Q Y to go `back`."""
        numbers = range(len(self._compact_CC))
        for number in reversed(numbers) if back else numbers:
            compact_CC, start = self._compact_CC[number], number * self.block
            reflectors_MC = self._reflectors_NN[
                start + self.block :, start : start + len(compact_CC)
            ]
            turn(columns_NQ[start + self.block :], reflectors_MC.T, compact_CC, back=back)


def _cuts(start: int, side: int) -> list[int]:
    """Boundaries of the lower tiles, counted from `start`."""
    aligned = range((start // TILE + 1) * TILE, side, TILE)
    return [0, *(place - start for place in aligned), side - start]


def _symmetric_product(rows_CM: Tensor, lower_MM: Tensor, cuts: Sequence[int]) -> Tensor:
    """V^T A of a symmetric A whose lower tiles are known."""
    result_CM = torch.zeros_like(rows_CM)
    for first, last in pairwise(cuts):
        result_CM[:, first:last].addmm_(rows_CM[:, :last], lower_MM[first:last, :last].T)
        result_CM[:, :first].addmm_(rows_CM[:, first:last], lower_MM[first:last, :first])
    return result_CM
