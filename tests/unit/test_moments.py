"""Moments are X^T X / n, whatever the batches."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esm_stream.calibration.moments import CHUNK_ROWS, InputMoment, ShiftMoment

CPU = torch.device("cpu")


def rows(count: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -2, width)
    return torch.randn(count, width, generator=generator) * scales


def split(x: Tensor, cuts: list[int], seed: int) -> list[Tensor]:
    """Consecutive pieces of rows, in another order."""
    edges = sorted({0, len(x), *(c for c in cuts if c < len(x))})
    pieces = [x[a:b] for a, b in pairwise(edges)]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))
    return [pieces[i] for i in order]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@given(
    cuts=st.lists(st.integers(1, 199), max_size=6),
    seed=st.integers(0, 2**16),
    width=st.integers(1, 9),
)
def test_shift_moment_does_not_depend_on_batches_and_their_order(
    cuts: list[int], seed: int, width: int
) -> None:
    x, update = rows(200, width, seed), rows(5, width, seed + 1)
    moment = ShiftMoment(update)
    for piece in split(x, cuts, seed):
        moment.add(piece)
    shift = x.double() @ update.double().T
    result = moment.result()
    assert (result.kind, result.tokens, result.matrix.dtype) == ("shift", 200, torch.float64)
    assert relative(result.matrix, shift.T @ shift / 200) < 1e-12


@given(
    cuts=st.lists(st.integers(1, 199), max_size=6),
    seed=st.integers(0, 2**16),
    width=st.integers(1, 9),
)
def test_input_moment_of_exact_products_does_not_depend_on_batches_and_their_order(
    cuts: list[int], seed: int, width: int
) -> None:
    """Small integers have exact float32 products: what is left is the sum, which is float64."""
    x = (rows(200, width, seed) * 8).round() + 1
    moment = InputMoment(width, CPU)
    for piece in split(x, cuts, seed):
        moment.add(piece.unsqueeze(0))
    result = moment.result()
    assert (result.kind, result.tokens, result.matrix.dtype) == ("input", 200, torch.float64)
    assert relative(result.matrix, x.double().T @ x.double() / 200) < 1e-12


def test_input_moment_of_any_numbers_is_the_mean_of_products_to_float32_rounding() -> None:
    x = rows(3000, 8, 0)
    moment = InputMoment(8, CPU)
    moment.add(x.view(30, 100, 8))
    assert relative(moment.result().matrix, x.double().T @ x.double() / 3000) < 1e-6


def test_input_moment_sums_long_batches_in_float64_by_chunks() -> None:
    """float32 alone stops counting at 2 ** 24: chunks of at most CHUNK_ROWS must not."""
    value = 4096.0  # value ** 2 = 2 ** 24
    x = torch.full((CHUNK_ROWS * 8, 1), 1.0)
    x[0] = value
    moment = InputMoment(1, CPU)
    moment.add(x)
    exact = value**2 + len(x) - 1
    assert float(moment.result().matrix) * len(x) == pytest.approx(exact, abs=CHUNK_ROWS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_moments_take_activations_of_any_dtype(dtype: torch.dtype) -> None:
    x = rows(64, 4, 1).to(dtype)
    wide = x.double()
    moment = InputMoment(4, CPU)
    moment.add(x)
    assert relative(moment.result().matrix, wide.T @ wide / 64) < 1e-6
    shift = ShiftMoment(torch.eye(4))
    shift.add(x)
    assert relative(shift.result().matrix, wide.T @ wide / 64) < 1e-12


def test_moments_are_not_centred() -> None:
    moment = InputMoment(2, CPU)
    moment.add(torch.ones(10, 2))
    assert torch.equal(moment.result().matrix, torch.ones(2, 2).double())


def test_no_tokens_give_a_zero_moment() -> None:
    result = InputMoment(3, CPU).result()
    assert result.tokens == 0
    assert not result.matrix.any()


def test_few_tokens_are_kept_and_give_the_same_bits() -> None:
    """64 tokens of 100 inputs wait, the next 64 make them a sum."""
    pieces = rows(128, 100, 3).split(16)
    kept, summed = InputMoment(100, CPU), torch.zeros(100, 100).double()
    for number, piece in enumerate(pieces):
        given = piece.clone()
        kept.add(given)
        given.zero_()  # what a model does with its activations later
        summed += piece.T @ piece
        if number == 3:
            early = copy.deepcopy(kept).result()
            assert torch.equal(early.matrix, summed / 64)
            assert early.tokens == 64
    assert torch.equal(kept.result().matrix, summed / 128)
    assert torch.equal(kept.result().matrix, summed / 128)
