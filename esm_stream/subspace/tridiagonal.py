"""Functions of a symmetric block tridiagonal matrix B, without its eigenvectors.

From:  band.py and bidiagonal.py, which reduce large matrices to one.
To:    the same, functions of B times a few columns, counts and traces.
Peak:  float64: B, eight times 2 N P of eliminated blocks, and three times the columns.

x^(-1/2) is a sum of shifted inverses (rational.py), each of which costs two sweeps over the blocks.

Letters: N side of B, P side of a block, B number of blocks, S shifts, Q columns.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esm_stream.subspace.rational import inverse_power_poles, inverse_root_poles

# Shifts that are eliminated together.
_SHIFTS = 8
_LANCZOS_STEPS = 40
# Ritz values are inside the spectrum: the interval of the approximation is a little larger.
_MARGIN = 1.05
# Relative width of the step between eigenvalues that `above` keeps and those it does not.
_STEP = 1e-6


@dataclass(frozen=True, slots=True)
class RootSums:
    """Sums over the eigenvalues x of x^(1/2), x^(-1/2) and 1/x."""

    roots: float
    inverse_roots: float
    inverses: float


class BlockTridiagonal:
    """A symmetric, nonnegative matrix of square blocks; the last one is filled up.

    Args:
        diagonal_BPP: Diagonal blocks, float64; the last is completed in place.
        lower_BPP: Blocks below them.
        side: Rows that exist.
    """

    def __init__(self, diagonal_BPP: Tensor, lower_BPP: Tensor, side: int) -> None:
        self.side, self.block = side, diagonal_BPP.shape[1]
        self._diagonal_BPP, self._lower_BPP = diagonal_BPP, lower_BPP
        # Filled up with eigenvalues of the matrix's own size.
        self._padding = len(diagonal_BPP) * self.block - side
        self._filling = float(diagonal_BPP.diagonal(dim1=1, dim2=2).sum()) / side
        diagonal_BPP[-1].diagonal()[self.block - self._padding :] = self._filling
        self.largest = self._largest_of(self._times)

    # Spectrum --------------------------------------------------------------------------------

    def count_below(self, value: float) -> int:
        """Number of eigenvalues below a value, from the inertia of B - value."""
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
        """Smallest eigenvalue of a positive definite B, to a few digits."""
        return 1 / self._largest_of(self._eliminated([0.0]).sweeps(0).solve)

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

    def inverse_root(
        self, columns_NQ: Tensor, low: float, offset: float = 0.0, error: float = 1e-9
    ) -> Tensor:
        """(B + offset)^(-1/2) Y; `low` is a lower bound of the eigenvalues of B + offset.

        To a relative error of 1e-9, or as asked, for eigenvalues from `low` upwards.
        """
        shifts, weights = inverse_root_poles(low, self._upper + offset, error)
        return self._map(columns_NQ, [shift + offset for shift in shifts], weights)

    def inverse_power(self, columns_NQ: Tensor, power: float, low: float) -> Tensor:
        """B^(-power) Y, 0 < power <= 1; `low` is a lower bound of the eigenvalues."""
        return self._map(columns_NQ, *inverse_power_poles(power, low, self._upper))

    def inverse_root_above(self, columns_NQ: Tensor, low: float) -> Tensor:
        """B^(-1/2) Y, and nothing of eigenvalues that are rounding: none is between them and `low`.

        With r(x) the approximation of x^(-1/2), x r(x)^3 is as good from `low` up, and small near 0
        where r(x) is large.
        """
        for _ in range(3):
            columns_NQ = self.inverse_root(columns_NQ, low)
        whole_BPQ = self._blocks(columns_NQ, torch.float64)
        return self._times(whole_BPQ).view(-1, columns_NQ.shape[1])[: self.side]

    def root_sums(self, low: float, offset: float = 0.0) -> RootSums:
        """Sums over the eigenvalues of B + offset, none of which is below `low`."""
        shifts, weights = inverse_root_poles(low, self._upper + offset)
        places = [0.0, *shifts]
        traces: list[float] = []
        for first in range(0, len(places), _SHIFTS):
            some = [place + offset for place in places[first : first + _SHIFTS]]
            traces += self._eliminated(some).traces().tolist()
        size, filling = len(self._diagonal_BPP) * self.block, self._filling + offset
        pairs = list(zip(shifts, weights, traces[1:], strict=True))
        # x^(1/2) = x x^(-1/2), and x / (x + shift) = 1 - shift / (x + shift).
        roots = math.fsum(weight * (size - shift * trace) for shift, weight, trace in pairs)
        inverse_roots = math.fsum(weight * trace for _, weight, trace in pairs)
        return RootSums(
            roots - self._padding * math.sqrt(filling),
            inverse_roots - self._padding / math.sqrt(filling),
            traces[0] - self._padding / filling,
        )

    def above(self, columns_NQ: Tensor, value: float) -> Tensor:
        """Y without its part in eigenvectors of eigenvalues below a value.

        Half of 1 + sign(B - value), where sign(x) = x (x^2)^(-1/2) and x / (x^2 + c^2) is the real
        part of 1 / (x + i c): the same sweeps in complex numbers.
        """
        shifts, weights = inverse_root_poles((_STEP * value) ** 2, self._upper**2)
        poles = [complex(-value, math.sqrt(shift)) for shift in shifts]
        return self._map(columns_NQ, poles, weights).add_(columns_NQ).mul_(0.5)

    def _map(
        self, columns_NQ: Tensor, shifts: Sequence[complex], weights: Sequence[float]
    ) -> Tensor:
        """The real part of sum_j weight_j (B + shift_j)^(-1) Y, a few shifts at a time."""
        is_real = not any(isinstance(shift, complex) for shift in shifts)
        right_BPQ = self._blocks(columns_NQ, torch.float64 if is_real else torch.complex128)
        total_BPQ = torch.zeros_like(right_BPQ, dtype=torch.float64)
        work_BPQ = torch.empty_like(right_BPQ)
        for first in range(0, len(shifts), _SHIFTS):
            eliminated = self._eliminated(shifts[first : first + _SHIFTS])
            for number, weight in enumerate(weights[first : first + _SHIFTS]):
                sweeps = eliminated.sweeps(number)
                sweeps.add_solution(right_BPQ, total_BPQ, weight, work_BPQ)
        return total_BPQ.view(-1, columns_NQ.shape[1])[: self.side]

    def _blocks(self, columns_NQ: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of Y as a block vector, filled up with zeros."""
        columns = columns_NQ.shape[1]
        found_BPQ = columns_NQ.new_zeros(len(self._diagonal_BPP), self.block, columns, dtype=dtype)
        found_BPQ.view(-1, columns)[: self.side] = columns_NQ
        return found_BPQ

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
        return self._diagonal_BPP.device


@dataclass(frozen=True, slots=True)
class _Elimination:
    """Inverse pivots of B + shift for S shifts, in two halves: right @ left."""

    lower_BPP: Tensor
    left_BSPP: Tensor
    right_BSPP: Tensor

    def sweeps(self, number: int) -> "_Sweeps":
        """What solves systems of one shift."""
        left_BPP, right_BPP = self.left_BSPP[:, number], self.right_BSPP[:, number]
        down_BPP = self.lower_BPP @ right_BPP[:-1]
        return _Sweeps(left_BPP, right_BPP, down_BPP, left_BPP[:-1] @ self.lower_BPP.mT)

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


@dataclass(frozen=True, slots=True)
class _Sweeps:
    """Inverse pivots of one shift, and their couplings to the blocks below and above."""

    left_BPP: Tensor
    right_BPP: Tensor
    down_BPP: Tensor
    up_BPP: Tensor

    def solve(self, columns_BPQ: Tensor) -> Tensor:
        """(B + shift)^(-1) times a block vector."""
        result_BPQ = torch.zeros_like(columns_BPQ)
        self.add_solution(columns_BPQ, result_BPQ, 1.0, torch.empty_like(columns_BPQ))
        return result_BPQ

    def add_solution(
        self, columns_BPQ: Tensor, total_BPQ: Tensor, weight: float, work_BPQ: Tensor
    ) -> None:
        """Add the real part of weight (B + shift)^(-1) Y to a sum; `work_BPQ` is overwritten."""
        last, rest_PQ = len(self.left_BPP) - 1, torch.empty_like(columns_BPQ[0])
        for block, column_PQ in enumerate(columns_BPQ):
            rest_PQ.copy_(column_PQ)
            if block:
                rest_PQ.addmm_(self.down_BPP[block - 1], work_BPQ[block - 1], alpha=-1)
            torch.mm(self.left_BPP[block], rest_PQ, out=work_BPQ[block])
        for block in reversed(range(last + 1)):
            if block < last:
                work_BPQ[block].addmm_(self.up_BPP[block], rest_PQ, alpha=-1)
            torch.mm(self.right_BPP[block], work_BPQ[block], out=rest_PQ)
            total_BPQ[block].add_(rest_PQ.real, alpha=weight)


def _inverse_triangle(triangles_SPP: Tensor, *, upper: bool) -> Tensor:
    """Inverses of triangular matrices."""
    size, kind = triangles_SPP.shape[-1], triangles_SPP
    identity_SPP = torch.eye(size, dtype=kind.dtype, device=kind.device).expand_as(kind)
    inverse: Tensor = torch.linalg.solve_triangular(triangles_SPP, identity_SPP, upper=upper)
    return inverse
