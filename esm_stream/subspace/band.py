"""K^(-1/2) of a large symmetric matrix K applied to a few columns, without eigenvectors of K.

From:  polar.py, Gram matrices of stacked factors.
To:    polar.py, K^(-1/2) Y and the trace of K^(1/2).
Peak:  float64: K itself (overwritten) and four tiles of N * 1024.

K = Q B Q^T, B block tridiagonal with blocks of P: nearly all of the reduction is products with P
columns, where an eigendecomposition spends half of its time in products with single vectors and
then makes N^2 numbers of eigenvectors that nobody asks for. x^(-1/2) is a sum of shifted inverses
(rational.py), each of which costs two sweeps over the blocks. To rounding, the result is that of an
eigendecomposition.

Letters: N side of K, P side of a block, B number of blocks, S shifts, Q columns.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from esm_stream.subspace.rational import inverse_root_poles
from esm_stream.subspace.sizes import TILE, TILE_COLUMNS, block_of_band

# Shifts that are eliminated together.
_SHIFTS = 8
_LANCZOS_STEPS = 40
# Ritz values are inside the spectrum: the interval of the approximation is a little larger.
_MARGIN = 1.05
# Relative width of the step between eigenvalues that `Band.above` keeps and those it does not.
_STEP = 1e-6


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
        self._compact_PP: list[Tensor] = []
        for number in range(count):
            self._reduce_panel(number)
        # The last block is filled up with eigenvalues of K's own size.
        self._padding = count * block - self.side
        self._filling = float(self._diagonal_BPP.diagonal(dim1=1, dim2=2).sum()) / self.side
        self._diagonal_BPP[-1].diagonal()[block - self._padding :] = self._filling
        self.largest = self._largest_of(self._times)

    # Reduction -------------------------------------------------------------------------------

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
        packed_MP, scales_P = torch.geqrf(panel_MP)
        columns = len(scales_P)
        self._lower_BPP[number, :columns] = packed_MP[:columns].triu()
        reflectors_MP = packed_MP[:, :columns].tril_(-1)
        reflectors_MP.diagonal().fill_(1.0)
        compact_PP = _compact(reflectors_MP, scales_P)
        self._compact_PP.append(compact_PP)
        cuts = _cuts(stop, self.side)
        product_MP = _symmetric_product(whole_NN[stop:, stop:], reflectors_MP, cuts) @ compact_PP
        inner_PP = compact_PP.T @ (reflectors_MP.T @ product_MP)
        product_MP.addmm_(reflectors_MP, inner_PP, alpha=-0.5)
        left_MP = torch.cat([reflectors_MP, product_MP], dim=1)
        right_MP = torch.cat([product_MP, reflectors_MP], dim=1)
        for first, last in pairwise(cuts):
            tile = whole_NN[stop + first :, stop + first : stop + last]
            tile.addmm_(left_MP[first:], right_MP[first:last].T, alpha=-1)
        panel_MP.zero_()
        panel_MP[:, :columns] = reflectors_MP

    def _rotate(self, columns_NQ: Tensor, *, back: bool) -> None:
        """Q^T Y in place, or Q Y to go `back`."""
        numbers = range(len(self._compact_PP))
        for number in reversed(numbers) if back else numbers:
            compact_PP, start = self._compact_PP[number], number * self.block
            rest_MQ = columns_NQ[start + self.block :]
            reflectors_MP = self._reflectors_NN[
                start + self.block :, start : start + len(compact_PP)
            ]
            turned_PP = compact_PP if back else compact_PP.T
            rest_MQ.addmm_(reflectors_MP, turned_PP @ (reflectors_MP.T @ rest_MQ), alpha=-1)

    # Spectrum --------------------------------------------------------------------------------

    def count_below(self, value: float) -> int:
        """Number of eigenvalues below a value, from the inertia of K - value."""
        shift_PP = value * torch.eye(self.block, dtype=torch.float64, device=self._device)
        count, pivot_PP = 0, shift_PP
        for number, diagonal_PP in enumerate(self._diagonal_BPP):
            schur_PP = diagonal_PP - shift_PP
            if number:
                lower_PP = self._lower_BPP[number - 1]
                schur_PP -= lower_PP @ torch.linalg.solve(pivot_PP, lower_PP.T)
            pivot_PP = schur_PP
            count += int((torch.linalg.eigvalsh(pivot_PP) < 0).sum())
        return count - (self._padding if value > self._filling else 0)

    def smallest(self) -> float:
        """Smallest eigenvalue of a positive definite K, to a few digits."""
        eliminated = self._eliminated([0.0])
        return 1 / self._largest_of(lambda vector_BPQ: eliminated.solve(0, vector_BPQ))

    def _times(self, vector_BPQ: Tensor) -> Tensor:
        """B v."""
        result_BPQ = self._diagonal_BPP @ vector_BPQ
        result_BPQ[1:] += self._lower_BPP @ vector_BPQ[:-1]
        result_BPQ[:-1] += self._lower_BPP.mT @ vector_BPQ[1:]
        return result_BPQ

    def _largest_of(self, apply: Callable[[Tensor], Tensor]) -> float:
        """Largest eigenvalue of a positive operator on block vectors, by Lanczos.

        Every vector is made orthogonal to all before it, so few steps and no surprises.
        """
        shape = (len(self._diagonal_BPP), self.block, 1)
        random = torch.Generator().manual_seed(0)
        start = torch.randn(shape, generator=random, dtype=torch.float64).to(self._device)
        basis = [start.flatten() / torch.linalg.vector_norm(start)]
        projected: list[Tensor] = []
        # As many steps as there can be eigenvalues, the one of the padding included.
        for _ in range(min(_LANCZOS_STEPS, self.side + 1)):
            image = apply(basis[-1].view(shape)).flatten()
            known = torch.stack(basis)
            weights = known @ image
            projected.append(weights)
            image -= known.T @ weights
            image -= known.T @ (known @ image)
            norm = torch.linalg.vector_norm(image)
            if float(norm) <= 1e-12 * float(weights[-1].abs()):
                break
            basis.append(image / norm)
        small = torch.zeros(len(projected), len(projected), dtype=torch.float64)
        for column, weights in enumerate(projected):
            small[: len(weights), column] = weights.cpu()
        return float(torch.linalg.eigvalsh(small, UPLO="U")[-1])

    # Functions -------------------------------------------------------------------------------

    def inverse_root(self, columns_NQ: Tensor, low: float, offset: float = 0.0) -> None:
        """(K + offset)^(-1/2) Y in place; `low` is a lower bound of the eigenvalues of K + offset.

        To a relative error of 1e-9 for eigenvalues from `low` upwards.
        """
        shifts, weights = inverse_root_poles(low, self._upper + offset)
        self._map(columns_NQ, [shift + offset for shift in shifts], weights)

    def trace_of_root(self, low: float, offset: float = 0.0) -> float:
        """Trace of (K + offset)^(1/2) for eigenvalues of K + offset from `low` upwards."""
        shifts, weights = inverse_root_poles(low, self._upper + offset)
        traces: list[float] = []
        for first in range(0, len(shifts), _SHIFTS):
            some = [shift + offset for shift in shifts[first : first + _SHIFTS]]
            traces += self._eliminated(some).traces().tolist()
        size = len(self._diagonal_BPP) * self.block
        # x^(1/2) = x x^(-1/2), and x / (x + shift) = 1 - shift / (x + shift).
        whole = math.fsum(
            weight * (size - shift * trace)
            for shift, weight, trace in zip(shifts, weights, traces, strict=True)
        )
        return whole - self._padding * math.sqrt(self._filling + offset)

    def above(self, columns_NQ: Tensor, value: float) -> None:
        """Y without its part in eigenvectors of eigenvalues below a value, in place.

        Half of 1 + sign(K - value), where sign(x) = x (x^2)^(-1/2) and x / (x^2 + c^2) is the real
        part of 1 / (x + i c): the same sweeps in complex numbers.
        """
        shifts, weights = inverse_root_poles((_STEP * value) ** 2, self._upper**2)
        poles = [complex(-value, math.sqrt(shift)) for shift in shifts]
        whole_NQ = columns_NQ.clone()
        self._map(columns_NQ, poles, weights)
        columns_NQ.add_(whole_NQ).mul_(0.5)

    def _map(self, columns_NQ: Tensor, shifts: Sequence[complex], weights: Sequence[float]) -> None:
        """Q sum_j weight_j (B + shift_j)^(-1) Q^T Y in place, the real part of it.

        Tile by tile of the columns of Y, a few shifts at a time: memory is that of four tiles.
        """
        count = len(self._diagonal_BPP)
        is_real = not any(isinstance(shift, complex) for shift in shifts)
        for tile_NQ in columns_NQ.split(TILE_COLUMNS if is_real else TILE_COLUMNS // 2, dim=1):
            padded_NQ = tile_NQ.new_zeros(count * self.block, tile_NQ.shape[1])
            padded_NQ[: self.side] = tile_NQ
            self._rotate(padded_NQ[: self.side], back=False)
            right_BPQ = padded_NQ.view(count, self.block, -1)
            total_BPQ = torch.zeros_like(right_BPQ)
            right_BPQ = right_BPQ.to(torch.float64 if is_real else torch.complex128)
            for first in range(0, len(shifts), _SHIFTS):
                eliminated = self._eliminated(shifts[first : first + _SHIFTS])
                for number, weight in enumerate(weights[first : first + _SHIFTS]):
                    total_BPQ.add_(eliminated.solve(number, right_BPQ).real, alpha=weight)
            result_NQ = total_BPQ.view(-1, tile_NQ.shape[1])[: self.side]
            self._rotate(result_NQ, back=True)
            tile_NQ.copy_(result_NQ)

    # Shifted systems -------------------------------------------------------------------------

    def _eliminated(self, shifts: Sequence[complex]) -> "_Elimination":
        """Block elimination of B + shift, for all shifts at once.

        Pivots near singularity are large when inverted: products of a whole inverse with a coupling
        would cancel each other, products with its halves do not.
        """
        is_real = not any(isinstance(shift, complex) for shift in shifts)
        dtype = torch.float64 if is_real else torch.complex128
        lower_BPP = self._lower_BPP.to(dtype)
        identity_PP = torch.eye(self.block, dtype=dtype, device=self._device)
        shifts_SPP = torch.tensor(shifts, dtype=dtype, device=self._device)[:, None, None]
        left_BSPP = identity_PP.new_empty(len(self._diagonal_BPP), len(shifts), *identity_PP.shape)
        right_BSPP = left_BSPP.mT if is_real else torch.empty_like(left_BSPP)
        for number, diagonal_PP in enumerate(self._diagonal_BPP):
            pivots_SPP = diagonal_PP + shifts_SPP * identity_PP
            if number:
                coupling_PP = lower_BPP[number - 1]
                before_SPP = left_BSPP[number - 1] @ coupling_PP.T
                after_SPP = coupling_PP @ right_BSPP[number - 1]
                pivots_SPP -= after_SPP @ before_SPP
            if is_real:
                root_SPP = torch.linalg.cholesky(pivots_SPP)
                left_BSPP[number] = _inverse_triangle(root_SPP, upper=False)
            else:
                places, below_SPP, above_SPP = torch.linalg.lu(pivots_SPP)
                left_BSPP[number] = _inverse_triangle(below_SPP, upper=False) @ places.mT
                right_BSPP[number] = _inverse_triangle(above_SPP, upper=True)
        return _Elimination(lower_BPP, left_BSPP, right_BSPP)

    @property
    def _upper(self) -> float:
        """An upper bound of the eigenvalues."""
        return _MARGIN * self.largest

    @property
    def _device(self) -> torch.device:
        return self._reflectors_NN.device


@dataclass(frozen=True, slots=True)
class _Elimination:
    """Inverse pivots of B + shift for S shifts, in two halves: right @ left."""

    lower_BPP: Tensor
    left_BSPP: Tensor
    right_BSPP: Tensor

    def solve(self, number: int, columns_BPQ: Tensor) -> Tensor:
        """(B + shift)^(-1) times a block vector, for one shift."""
        left_BPP, right_BPP = self.left_BSPP[:, number], self.right_BSPP[:, number]
        down_BPP = self.lower_BPP @ right_BPP[:-1]
        up_BPP = left_BPP[:-1] @ self.lower_BPP.mT
        rest_BPQ, result_BPQ = columns_BPQ.clone(), torch.empty_like(columns_BPQ)
        for block in range(len(left_BPP)):
            if block:
                rest_BPQ[block].addmm_(down_BPP[block - 1], result_BPQ[block - 1], alpha=-1)
            torch.mm(left_BPP[block], rest_BPQ[block], out=result_BPQ[block])
        rest_BPQ, result_BPQ = result_BPQ, rest_BPQ
        for block in reversed(range(len(left_BPP))):
            if block < len(up_BPP):
                rest_BPQ[block].addmm_(up_BPP[block], result_BPQ[block + 1], alpha=-1)
            torch.mm(right_BPP[block], rest_BPQ[block], out=result_BPQ[block])
        return result_BPQ

    def traces(self) -> Tensor:
        """Traces of (B + shift)^(-1), from the diagonal blocks of the inverse alone."""
        total_S, block_SPP = torch.zeros(()), torch.zeros(())
        for number in reversed(range(len(self.left_BSPP))):
            inverse_SPP = self.right_BSPP[number] @ self.left_BSPP[number]
            if number < len(self.lower_BPP):
                coupling_SPP = inverse_SPP @ self.lower_BPP[number].T
                block_SPP = inverse_SPP + coupling_SPP @ block_SPP @ coupling_SPP.mT
            else:
                block_SPP = inverse_SPP
            total_S = total_S + block_SPP.diagonal(dim1=1, dim2=2).sum(1)
        return total_S


def _inverse_triangle(triangles_SPP: Tensor, *, upper: bool) -> Tensor:
    """Inverses of triangular matrices."""
    size, kind = triangles_SPP.shape[-1], triangles_SPP
    identity_SPP = torch.eye(size, dtype=kind.dtype, device=kind.device).expand_as(kind)
    inverse: Tensor = torch.linalg.solve_triangular(triangles_SPP, identity_SPP, upper=upper)
    return inverse


def _cuts(start: int, side: int) -> list[int]:
    """Boundaries of the lower tiles, counted from `start`."""
    aligned = range((start // TILE + 1) * TILE, side, TILE)
    return [0, *(place - start for place in aligned), side - start]


def _symmetric_product(lower_MM: Tensor, columns_MP: Tensor, cuts: Sequence[int]) -> Tensor:
    """A V of a symmetric A whose lower tiles are known."""
    result_MP = torch.zeros_like(columns_MP)
    for first, last in pairwise(cuts):
        result_MP[first:].addmm_(lower_MM[first:, first:last], columns_MP[first:last])
        result_MP[first:last].addmm_(lower_MM[last:, first:last].T, columns_MP[last:])
    return result_MP


def _compact(reflectors_MP: Tensor, scales_P: Tensor) -> Tensor:
    """T of the product of reflectors I - V T V^T: its inverse is the upper half of V^T V.

    A reflector of scale 0 does nothing, and gets an empty column.
    """
    reflectors_MP *= scales_P != 0
    inverse_PP = (reflectors_MP.T @ reflectors_MP).triu_(1)
    inverse_PP.diagonal().copy_(torch.where(scales_P != 0, 1 / scales_P, 1.0))
    identity_PP = torch.eye(len(scales_P), dtype=scales_P.dtype, device=scales_P.device)
    result: Tensor = torch.linalg.solve_triangular(inverse_PP, identity_PP, upper=True)
    return result
