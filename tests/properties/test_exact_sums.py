"""Laws of exact sums: any order, any partition, and back."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esm_stream.subspace.exact import (
    PRECISION,
    added,
    float_of,
    grid_of,
    integers,
    regridded,
    size_of,
)

SCALES = st.lists(st.integers(-120, 120), min_size=1, max_size=8)


def terms_of(scales: list[int], seed: int) -> list[Tensor]:
    """Terms of sizes many powers of two apart."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 5)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) * 2.0**s for s in scales]


def sum_of(terms: list[Tensor], order: list[int]) -> Tensor:
    """Integers of the sum, added one after the other in this order, on ever changing grids."""
    sizes: list[int | None] = []
    total = torch.zeros(0, 3, 5, dtype=torch.int64)
    for number in order:
        size = size_of(terms[number])
        before, after = grid_of(sizes), grid_of([*sizes, size])
        term, grid = integers(terms[number], size)
        total = added(regridded(total, before, after), regridded(term, grid, after))
        sizes.append(size)
    return total


@given(scales=SCALES, seed=st.integers(0, 2**16), data=st.data())
def test_order_moves_no_bit(scales: list[int], seed: int, data: st.DataObject) -> None:
    terms = terms_of(scales, seed)
    order = data.draw(st.permutations(range(len(terms))))
    assert torch.equal(sum_of(terms, list(order)), sum_of(terms, list(range(len(terms)))))


@given(scales=SCALES, seed=st.integers(0, 2**16), cut=st.integers(0, 8))
def test_partition_moves_no_bit(scales: list[int], seed: int, cut: int) -> None:
    terms = terms_of(scales, seed)
    order = list(range(len(terms)))
    left, right = order[:cut], order[cut:]
    sizes = [size_of(term) for term in terms]
    whole = grid_of(sizes)
    parts = [
        regridded(sum_of(terms, part), grid_of(sizes[i] for i in part), whole)
        for part in (left, right)
    ]
    assert torch.equal(added(*parts), sum_of(terms, order))


@given(scales=SCALES, seed=st.integers(0, 2**16), leaving=st.integers(0, 7))
def test_what_is_taken_out_leaves_no_trace(scales: list[int], seed: int, leaving: int) -> None:
    terms = terms_of(scales, seed)
    leaving %= len(terms)
    order = list(range(len(terms)))
    sizes = [size_of(term) for term in terms]
    rest = [i for i in order if i != leaving]
    whole, kept = grid_of(sizes), grid_of(sizes[i] for i in rest)
    term, grid = integers(terms[leaving], sizes[leaving])
    left = added(sum_of(terms, order), regridded(term, grid, whole), -1)
    assert torch.equal(regridded(left, whole, kept), sum_of(terms, rest))


@given(scales=SCALES, seed=st.integers(0, 2**16))
def test_the_sum_is_that_of_the_rounded_terms(scales: list[int], seed: int) -> None:
    terms = terms_of(scales, seed)
    sizes = [size_of(term) for term in terms]
    grid = grid_of(sizes)
    found = float_of(sum_of(terms, list(range(len(terms)))), grid)
    for place in ((0, 0), (2, 4)):
        exact = Fraction(0)
        for term, size in zip(terms, sizes, strict=True):
            assert size is not None
            unit = Fraction(2) ** (size - PRECISION)
            exact += round(Fraction(float(term[place])) / unit) * unit
        error = abs(Fraction(float(found[place])) - exact)
        assert error <= Fraction(2) ** -52 * max(abs(exact), Fraction(2) ** (grid.unit + 8))


def test_terms_alike_in_size_need_one_integer_each() -> None:
    assert grid_of([3] * 20).limbs == 1
    assert grid_of([3, 9] * 10).limbs == 1
    assert grid_of([-20, 20]).limbs == 2
    assert grid_of([-40, 40]).limbs == 3


def test_a_zero_needs_nothing() -> None:
    assert size_of(torch.zeros(3, 5, dtype=torch.float64)) is None
    assert grid_of([None, None]).limbs == 0
    assert float_of(torch.zeros(0, 3, 5, dtype=torch.int64), grid_of([None])).abs().max() == 0


def test_a_term_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN or Inf"):
        size_of(torch.tensor([[1.0, float("inf")]], dtype=torch.float64))
