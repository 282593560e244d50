"""Moments are X^T X / n, whatever the batches."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esm_stream.calibration.moments import CHUNK_ROWS, InputMoment, ShiftMoment
from esm_stream.subspace.basis import essential_basis

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
    # The shifts are float32.
    assert relative(result.matrix, shift.T @ shift / 200) < 1e-6


@given(cuts=st.lists(st.integers(1, 2499), max_size=6), seed=st.integers(0, 2**16))
def test_where_batches_end_moves_no_bit_of_a_moment(cuts: list[int], seed: int) -> None:
    x, update = rows(2500, 7, seed), rows(5, 7, seed + 1)
    edges = sorted({0, 2500, *cuts})
    for make in (lambda: InputMoment(7, CPU), lambda: ShiftMoment(update)):
        whole, pieces = make(), make()
        whole.add(x)
        for a, b in pairwise(edges):
            pieces.add(x[a:b])
        assert torch.equal(whole.result().matrix, pieces.result().matrix)


def test_a_direction_without_energy_stays_without_in_an_input_moment() -> None:
    x = rows(3000, 12, 3)
    x -= x.mean(dim=1, keepdim=True)
    x = (x * 2**12).round() / 2**12
    x[:, 0] -= x.sum(dim=1)
    moment = InputMoment(12, CPU)
    moment.add(x)
    values = torch.linalg.eigvalsh(moment.result().matrix)
    assert float(values[0]) < 1e-13 * float(values[-1])


def test_rounding_of_the_shifts_of_an_update_of_low_rank_is_no_direction() -> None:
    x = rows(5000, 96, 4) + 1
    update = (rows(64, 3, 5).double() @ rows(3, 96, 6).double()).float()
    moment = ShiftMoment(update)
    moment.add(x)
    assert essential_basis(update, moment.result(), 8).rank == 3


@given(
    cuts=st.lists(st.integers(1, 199), max_size=6),
    seed=st.integers(0, 2**16),
    width=st.integers(1, 9),
)
def test_input_moment_of_exact_products_does_not_depend_on_batches_and_their_order(
    cuts: list[int], seed: int, width: int
) -> None:
    x = (rows(200, width, seed) * 8).round() + 1
    moment = InputMoment(width, CPU)
    for piece in split(x, cuts, seed):
        moment.add(piece.unsqueeze(0))
    result = moment.result()
    assert (result.kind, result.tokens, result.matrix.dtype) == ("input", 200, torch.float64)
    assert relative(result.matrix, x.double().T @ x.double() / 200) < 1e-12


def test_input_moment_of_any_numbers_is_the_mean_of_products() -> None:
    x = rows(3000, 8, 0)
    moment = InputMoment(8, CPU)
    moment.add(x.view(30, 100, 8))
    assert relative(moment.result().matrix, x.double().T @ x.double() / 3000) < 1e-13


def test_input_moment_sums_long_batches_in_float64() -> None:
    """float32 alone stops counting at 2 ** 24."""
    x = torch.full((CHUNK_ROWS * 8, 1), 1.0)
    x[0] = 4096.0
    moment = InputMoment(1, CPU)
    moment.add(x)
    assert float(moment.result().matrix) * len(x) == 4096.0**2 + len(x) - 1


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
    x = rows(128, 100, 3)
    kept = InputMoment(100, CPU)
    for number, piece in enumerate(x.split(16)):
        given = piece.clone()
        kept.add(given)
        given.zero_()  # what a model does with its activations later
        if number == 3:
            early = copy.deepcopy(kept).result()
            assert torch.equal(early.matrix, x[:64].double().T @ x[:64].double() / 64)
            assert early.tokens == 64
    whole = InputMoment(100, CPU)
    whole.add(x)
    assert torch.equal(kept.result().matrix, whole.result().matrix)
    assert torch.equal(kept.result().matrix, whole.result().matrix)
