"""The polar factor of a large tall matrix in float32, by an orthogonal reduction from both sides.

From:  polar.py, stacked bases, which are stored in float32.
To:    polar.py: polar(A) Y, the sums of the singular values, and how exact that is.
Peak:  A in float32 (overwritten); polar(A) Y in float32; float64: five tiles of N * 1024.

A = Q B P^T, B upper block bidiagonal: B^T B is block tridiagonal (tridiagonal.py), and

    polar(A) Y = Q [B (B^T B)^(-1/2)] P^T Y.

Reductions and rotations are float32 products, what is between them is float64. A reduction by
reflectors is that of A + dA, with a dA of the size of float32 rounding, as storing A made one. It
would be the end of inverses, but not of a polar factor: in coordinates of the singular vectors

    d polar(A)_ij = (dA_ij - dA_ji) / (s_i + s_j),

so only pairs of singular values that are both small feel it. With entries of one size for dA and
(s_i + s_j)^2 >= 2 s_i s_j, the sums of 1/s and 1/s^2 bound the whole of it: `error`.

Letters: M rows, N columns, M >= N, P side of a block, B number of blocks, C = P but for the last
block, Q columns of another matrix.
"""

import math

import torch
from torch import Tensor

from esm_stream.subspace.reflectors import reflect, turn
from esm_stream.subspace.sizes import TILE_COLUMNS, block_of_bidiagonal
from esm_stream.subspace.tridiagonal import BlockTridiagonal, RootSums

# Size of dA beside A, in the Frobenius norm. With it `error` is two to four times what is measured.
_BACKWARD_ERROR = 1e-6
# Of the inverse root: it is applied to what is float32.
_ROOT_ERROR = 1e-7
# Below this, s_min / s_max is rounding.
_SMALLEST_RATIO = 1e-6


class Bidiagonal:
    """A tall matrix A = Q B P^T in block bidiagonal form.

    Args:
        matrix_MN: A, float32, M >= N, not zero; overwritten with the reflectors of both sides.
    """

    def __init__(self, matrix_MN: Tensor) -> None:
        self.rows, self.side = matrix_MN.shape
        self.block = block_of_bidiagonal(self.side)
        count = math.ceil(self.side / self.block)
        norm = float(torch.linalg.vector_norm(matrix_MN, dtype=torch.float64))
        self._entry = norm / math.sqrt(self.rows * self.side)
        self._reflectors_MN = matrix_MN
        shape = count, self.block, self.block
        self._diagonal_BPP = matrix_MN.new_zeros(shape, dtype=torch.float64)
        self._upper_BPP = torch.zeros_like(self._diagonal_BPP[1:])
        self._left_CC: list[Tensor] = []
        self._right_CC: list[Tensor] = []
        for number in range(count):
            self._reduce(number)
        squares_BPP = self._diagonal_BPP.mT @ self._diagonal_BPP
        squares_BPP[1:] += self._upper_BPP.mT @ self._upper_BPP
        lower_BPP = self._upper_BPP.mT @ self._diagonal_BPP[:-1]
        self.form = BlockTridiagonal(squares_BPP, lower_BPP, self.side)
        self.sums: RootSums | None = None
        if not self.form.count_below(_SMALLEST_RATIO**2 * self.form.largest):
            self.smallest = self.form.smallest()
            self.sums = self.form.root_sums(self.smallest / 2)

    @property
    def error(self) -> float:
        """Relative error of polar(A) Y as it is to be expected; Inf where A is nearly singular."""
        if self.sums is None:
            return math.inf
        pairs = self.sums.inverse_roots**2 + (self.rows - self.side - 1) * self.sums.inverses
        return _BACKWARD_ERROR * self._entry * math.sqrt(max(pairs, 0.0) / self.side)

    def polar(self, columns_NQ: Tensor) -> Tensor:
        """The polar factor of A times Y, float32, (M, Q)."""
        result_MQ = self._reflectors_MN.new_zeros(self.rows, columns_NQ.shape[1])
        result_MQ[: self.side] = columns_NQ
        for tile_MQ in result_MQ.split(TILE_COLUMNS, dim=1):
            turned_MQ = tile_MQ.contiguous()
            for number, compact_CC in enumerate(self._right_CC):
                rest_NQ = turned_MQ[(number + 1) * self.block : self.side]
                turn(rest_NQ, self._right_rows(number), compact_CC, back=False)
            turned_MQ[: self.side] = self._polar_of_form(turned_MQ[: self.side].double())
            for number in reversed(range(len(self._left_CC))):
                rest_MQ = turned_MQ[number * self.block :]
                turn(rest_MQ, self._left_rows(number), self._left_CC[number], back=True)
            tile_MQ.copy_(turned_MQ)
        return result_MQ

    def _polar_of_form(self, columns_NQ: Tensor) -> Tensor:
        """B (B^T B)^(-1/2) Y."""
        found_NQ = self.form.inverse_root(columns_NQ, self.smallest / 2, error=_ROOT_ERROR)
        result_NQ = torch.empty_like(found_NQ)
        for number, diagonal_PP in enumerate(self._diagonal_BPP):
            start, stop = number * self.block, min((number + 1) * self.block, self.side)
            size, following_PQ = stop - start, found_NQ[stop : stop + self.block]
            torch.mm(diagonal_PP[:size, :size], found_NQ[start:stop], out=result_NQ[start:stop])
            if stop < self.side:
                upper_PP = self._upper_BPP[number, :, : len(following_PQ)]
                result_NQ[start:stop].addmm_(upper_PP, following_PQ)
        return result_NQ

    def _reduce(self, number: int) -> None:
        """Reflectors of a block's columns and of its rows, applied to what is below and right."""
        start = number * self.block
        size = min(self.block, self.side - start)
        rest_MN = self._reflectors_MN[start:, start:]
        triangle_CC, left_CM, compact_CC = reflect(rest_MN[:, :size])
        self._diagonal_BPP[number, :size, :size] = triangle_CC
        self._left_CC.append(compact_CC)
        if start + size < self.side:
            # A - V X, in the rows that U comes from first; then A - V X - Z U^T in the others.
            across_CN = compact_CC.T @ (left_CM @ rest_MN[:, size:])
            rows_CN, below_MN = rest_MN[:size, size:], rest_MN[size:, size:]
            rows_CN.addmm_(left_CM[:, :size].T, across_CN, alpha=-1)
            triangle_CP, right_CN, compact_CC = reflect(rows_CN.T)
            self._upper_BPP[number, :, : len(triangle_CP)] = triangle_CP.T
            self._right_CC.append(compact_CC)
            left_CM_below = left_CM[:, size:]
            down_MC = below_MN @ right_CN.T
            down_MC.addmm_(left_CM_below.T, across_CN @ right_CN.T, alpha=-1)
            left_CM_below = torch.cat([left_CM_below, (down_MC @ compact_CC).T])
            below_MN.addmm_(left_CM_below.T, torch.cat([across_CN, right_CN]), alpha=-1)
            rows_CN.zero_()[: len(right_CN)] = right_CN
        rest_MN[:, :size] = left_CM.T

    def _left_rows(self, number: int) -> Tensor:
        """V^T of a block."""
        start = number * self.block
        return self._reflectors_MN[start:, start : start + len(self._left_CC[number])].T

    def _right_rows(self, number: int) -> Tensor:
        """U^T of a block."""
        start = number * self.block
        stop = start + len(self._right_CC[number])
        return self._reflectors_MN[start:stop, start + self.block :]
