"""Sums of matrices that are exact: the same bits in any order and partition, and undone to the bit.

From:  the terms of a sum, float64 matrices, one at a time.
To:    store/sums.py as integers; the methods as float64.
Peak:  a few matrices of the size of a term.

A term is rounded once, to PRECISION bits below its own largest element. What is left are integers
times a power of two, and their sum is formed in integers too: one int64 per element where the terms
are alike in size, more where they differ by more than 2^(63 - PRECISION) together. The grid of
a sum follows from the sizes of its terms alone, so equal sets of terms give equal integers.

Letters: J limbs, M rows, N columns.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

PRECISION = 50
# Bits of every limb but the last, which has the sign and what is left of 63 bits.
LIMB = 62
_MASK = (1 << LIMB) - 1
# Below 2^LEAST a term counts as zero: its grid would leave the range of float64.
_LEAST = -900


@dataclass(frozen=True, slots=True)
class Grid:
    """Integers of J `limbs` each, in units of 2^unit; no limbs where every term is zero."""

    unit: int
    limbs: int


def size_of(term_MN: Tensor) -> int | None:
    """The smallest s with all elements below 2^s in magnitude; None for a zero.

    Raises:
        ValueError: The term holds NaN or Inf.
    """
    if not term_MN.numel():
        return None
    least, most = (float(value) for value in term_MN.aminmax())
    largest = max(abs(least), abs(most))
    if not math.isfinite(largest):
        raise ValueError("a term of a sum holds NaN or Inf")
    size = math.frexp(largest)[1]
    return size if largest and size > _LEAST else None


def grid_of(sizes: Iterable[int | None]) -> Grid:
    """Units and limbs that hold the sum of terms of these sizes."""
    found = [size for size in sizes if size is not None]
    if not found:
        return Grid(0, 0)
    unit = min(found) - PRECISION
    bits = max(found) - unit + len(found).bit_length()
    return Grid(unit, 1 + math.ceil(max(0, bits - 63) / LIMB))


def integers(term_MN: Tensor, size: int | None) -> tuple[Tensor, Grid]:
    """A term of this size as integers, (J, M, N) int64, and their grid."""
    grid = grid_of([size])
    if size is None:
        return term_MN.new_zeros((0, *term_MN.shape), dtype=torch.int64), grid
    return (term_MN * math.ldexp(1.0, -grid.unit)).round_().long().unsqueeze(0), grid


def added(left: Tensor, right: Tensor, sign: int = 1) -> Tensor:
    """The sum left + sign * right on one grid, which has room for it; overwrites the left."""
    left.add_(right, alpha=sign)
    for j in range(len(left) - 1):
        left[j + 1] += left[j] >> LIMB
        left[j] &= _MASK
    return left


def regridded(limbs_JMN: Tensor, before: Grid, after: Grid) -> Tensor:
    """The same numbers on another grid, which they have to fit."""
    if before == after:
        return limbs_JMN
    if not before.limbs or not after.limbs:
        return limbs_JMN.new_zeros((after.limbs, *limbs_JMN.shape[1:]))
    up = before.unit - after.unit
    digits = _multiplied(limbs_JMN, up) if up > 0 else _divided(limbs_JMN, -up)
    while len(digits) > after.limbs:
        last = digits.pop()
        digits[-1] = digits[-1] + (last << LIMB)
    while len(digits) < after.limbs:
        digits[-1:] = _split(digits[-1])
    return torch.stack(digits)


def float_of(limbs_JMN: Tensor, grid: Grid) -> Tensor:
    """The numbers as float64, (M, N); overwrites the integers."""
    if not grid.limbs:
        return limbs_JMN.new_zeros(limbs_JMN.shape[1:], dtype=torch.float64)
    # Digits in -2^61..2^61, so that nothing cancels between a limb and the next.
    for j in range(grid.limbs - 1):
        carry_MN = (limbs_JMN[j] + (1 << (LIMB - 1))) >> LIMB
        limbs_JMN[j] -= carry_MN << LIMB
        limbs_JMN[j + 1] += carry_MN
    total_MN = limbs_JMN[-1].double()
    for j in reversed(range(grid.limbs - 1)):
        total_MN.mul_(2.0**LIMB).add_(limbs_JMN[j])
    return total_MN.mul_(math.ldexp(1.0, grid.unit))


def _multiplied(limbs_JMN: Tensor, bits: int) -> list[Tensor]:
    """Digits of the numbers times 2^bits; what leaves the last limb is a digit of its own."""
    whole, rest = divmod(bits, LIMB)
    digits = [torch.zeros_like(limbs_JMN[0]) for _ in range(whole + 1)]
    for limb_MN in limbs_JMN:
        digits[-1] += (limb_MN << rest) & _MASK
        digits.append(limb_MN >> (LIMB - rest))
    return digits


def _divided(limbs_JMN: Tensor, bits: int) -> list[Tensor]:
    """Digits of the numbers over 2^bits, which divides them."""
    whole, rest = divmod(bits, LIMB)
    digits = list(limbs_JMN)
    while len(digits) <= whole:
        digits[-1:] = _split(digits[-1])
    digits = digits[whole:]
    lower = [(low >> rest) + ((high << (LIMB - rest)) & _MASK) for low, high in pairwise(digits)]
    return [*lower, digits[-1] >> rest]


def _split(last_MN: Tensor) -> list[Tensor]:
    """A last limb as a digit and the last limb above it."""
    return [last_MN & _MASK, last_MN >> LIMB]
