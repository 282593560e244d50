"""Laws of bases and polar factors, for any shape and conditioning.

Letters: O output features, I input features, K rank, N tokens, M rows, N columns.
"""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esm_stream.methods.contract import Moment
from esm_stream.subspace.basis import coordinates, essential_basis
from esm_stream.subspace.polar import polar

SIDES = st.integers(1, 24)
SEEDS = st.integers(0, 2**16)
KINDS = st.sampled_from(["input", "shift", "none"])


def gaussian(*shape: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(gaussian(rows, columns, seed=seed))[0]


def with_spectrum(rows: int, columns: int, values: Sequence[float], seed: int) -> Tensor:
    left, right = orthonormal(rows, len(values), seed), orthonormal(columns, len(values), seed + 1)
    return left * torch.tensor(values, dtype=torch.float64) @ right.T


def moment_of(kind: str, update_OI: Tensor, rows_NI: Tensor) -> Moment | None:
    if kind == "none":
        return None
    rows = rows_NI if kind == "input" else rows_NI @ update_OI.T.double()
    return Moment(kind, rows.T @ rows / len(rows), len(rows))


def assert_orthonormal(columns: Tensor) -> None:
    gram = columns.T @ columns
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=gram.dtype), rtol=0, atol=1e-10)


@given(
    outputs=SIDES,
    inputs=SIDES,
    tokens=st.integers(1, 30),
    kind=KINDS,
    rank=st.integers(1, 24),
    seed=SEEDS,
)
def test_a_basis_is_orthonormal_ordered_and_signed(
    *, outputs: int, inputs: int, tokens: int, kind: str, rank: int, seed: int
) -> None:
    update_OI = gaussian(outputs, inputs, seed=seed).float()
    moment = moment_of(kind, update_OI, gaussian(tokens, inputs, seed=seed + 1))
    essential = essential_basis(update_OI, moment, rank)
    basis_OK, values = essential.basis_OK, essential.eigenvalues
    assert basis_OK.dtype == values.dtype == torch.float64
    assert basis_OK.shape == (outputs, min(rank, essential.rank))
    assert essential.rank <= min(outputs, inputs, tokens if moment else outputs)
    assert_orthonormal(basis_OK)
    assert values.shape == (min(outputs, inputs),)
    assert bool((values >= 0).all())
    assert bool((values.diff() <= 0).all())
    largest = basis_OK.gather(0, basis_OK.abs().argmax(dim=0, keepdim=True))
    assert bool((largest > 0).all())


@given(SIDES, SIDES, st.floats(-9.5, 0), KINDS, SEEDS)
def test_a_basis_stays_orthonormal_when_eigenvalues_are_tiny(
    outputs: int, inputs: int, decade: float, kind: str, seed: int
) -> None:
    side = min(outputs, inputs)
    values = torch.logspace(0, decade / 2, side, dtype=torch.float64).tolist()
    update_OI = with_spectrum(outputs, inputs, values, seed)
    moment = moment_of(kind, update_OI, torch.eye(inputs, dtype=torch.float64))
    essential = essential_basis(update_OI, moment, side)
    assert essential.rank == side
    assert_orthonormal(essential.basis_OK)


@given(SIDES, SIDES, KINDS, SEEDS)
def test_coordinates_of_the_full_basis_rebuild_the_update(
    outputs: int, inputs: int, kind: str, seed: int
) -> None:
    update_OI = gaussian(outputs, inputs, seed=seed)
    moment = moment_of(kind, update_OI, gaussian(60, inputs, seed=seed + 1))
    basis_OK = essential_basis(update_OI, moment, outputs, tolerance=1e-14).basis_OK
    rebuilt_OI = basis_OK @ coordinates(basis_OK, update_OI)
    torch.testing.assert_close(rebuilt_OI, update_OI, rtol=0, atol=1e-9)


@given(SIDES, SIDES, st.integers(1, 30), SEEDS)
def test_moments_of_inputs_and_of_shifts_give_the_same_basis(
    outputs: int, inputs: int, tokens: int, seed: int
) -> None:
    update_OI = gaussian(outputs, inputs, seed=seed)
    rows_NI = gaussian(tokens, inputs, seed=seed + 1)
    first = essential_basis(update_OI, moment_of("input", update_OI, rows_NI), outputs)
    second = essential_basis(update_OI, moment_of("shift", update_OI, rows_NI), outputs)
    scale = float(first.eigenvalues[0])
    torch.testing.assert_close(first.eigenvalues, second.eigenvalues, rtol=0, atol=1e-12 * scale)
    projectors = [one.basis_OK @ one.basis_OK.T for one in (first, second)]
    torch.testing.assert_close(*projectors, rtol=0, atol=1e-5)


@given(SIDES, SIDES, st.integers(1, 24), SEEDS)
def test_without_a_moment_the_basis_is_that_of_the_singular_vectors(
    outputs: int, inputs: int, rank: int, seed: int
) -> None:
    update_OI = gaussian(outputs, inputs, seed=seed)
    essential = essential_basis(update_OI, None, rank)
    left_ON, values, _ = torch.linalg.svd(update_OI, full_matrices=False)
    torch.testing.assert_close(essential.eigenvalues, values**2, rtol=1e-9, atol=1e-9)
    overlaps = (left_ON[:, : essential.basis_OK.shape[1]] * essential.basis_OK).sum(dim=0).abs()
    torch.testing.assert_close(overlaps, torch.ones_like(overlaps), rtol=0, atol=1e-7)


def test_row_panels_do_not_change_a_product() -> None:
    # More rows than one panel, on both sides of the algebra.
    tall_OI, wide_OI = gaussian(1500, 6, seed=1), gaussian(1030, 1031, seed=2)
    rows_NI = gaussian(40, 6, seed=3)
    found = essential_basis(tall_OI, moment_of("input", tall_OI, rows_NI), 6)
    wanted = torch.linalg.svd(rows_NI @ tall_OI.T, full_matrices=False)[2][:6].T
    overlaps = (found.basis_OK * wanted).sum(dim=0).abs()
    torch.testing.assert_close(overlaps, torch.ones_like(overlaps), rtol=0, atol=1e-9)
    basis_OK = orthonormal(1030, 3, seed=4)
    torch.testing.assert_close(coordinates(basis_OK, wide_OI), basis_OK.T @ wide_OI)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_tolerance_zero_completes_the_basis(shape: tuple[int, int]) -> None:
    update_OI = with_spectrum(*shape, [2.0, 1.0], seed=5)
    essential = essential_basis(update_OI, None, shape[0], tolerance=0)
    assert essential.basis_OK.shape == (shape[0], shape[0])
    assert essential.eigenvalues.shape == (5,)
    assert_orthonormal(essential.basis_OK)


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        essential_basis(torch.ones(2, 2), None, 0)


def svd_polar(matrix_MN: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix_MN, full_matrices=False)
    return left @ right


@given(SIDES, SIDES, st.floats(-9, 0), SEEDS)
def test_a_polar_factor_is_the_isometry_of_the_svd(
    rows: int, columns: int, decade: float, seed: int
) -> None:
    side = min(rows, columns)
    values = torch.logspace(0, decade, side, dtype=torch.float64)
    matrix_MN = with_spectrum(rows, columns, values.tolist(), seed)
    found = polar(matrix_MN, tolerance=1e-10)
    assert found.dropped == 0
    torch.testing.assert_close(found.factor, svd_polar(matrix_MN), rtol=0, atol=2e-3)
    assert found.condition == pytest.approx(float(values[0] / values[-1]), rel=1e-3)
    assert found.mean_singular_value == pytest.approx(float(values.mean()), rel=1e-6)


@given(SIDES, SIDES, st.floats(-3, 0), SEEDS)
def test_a_polar_factor_is_exact_where_the_matrix_is_well_conditioned(
    rows: int, columns: int, decade: float, seed: int
) -> None:
    values = torch.logspace(0, decade, min(rows, columns)).tolist()
    matrix_MN = with_spectrum(rows, columns, values, seed)
    factor_MN = polar(matrix_MN).factor
    torch.testing.assert_close(factor_MN, svd_polar(matrix_MN), rtol=0, atol=1e-8)
    positive = factor_MN.T @ matrix_MN if rows > columns else matrix_MN @ factor_MN.T
    torch.testing.assert_close(positive, positive.T, rtol=0, atol=1e-8)
    assert float(torch.linalg.eigvalsh(positive)[0]) > 0


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
@pytest.mark.parametrize("smallest", [2e-6, 5e-7, 1e-8])
def test_a_nearly_singular_matrix_is_more_exact_below_the_ratio(
    shape: tuple[int, int], smallest: float
) -> None:
    matrix_MN = with_spectrum(*shape, [1.0] * 18 + [2 * smallest, smallest], seed=6)
    found = polar(matrix_MN, tolerance=1e-9).factor
    # Above the ratio of 1e-6 the Gram matrix is good to 1e-4, below it two of them to 1e-7.
    tolerance = 1e-3 if smallest > 1e-6 else 1e-6
    error = float(torch.linalg.matrix_norm(found - svd_polar(matrix_MN), 2))
    assert error < tolerance
    narrow = found if shape[0] > shape[1] else found.T
    isometry = torch.linalg.svdvals(narrow)
    torch.testing.assert_close(isometry, torch.ones_like(isometry), rtol=0, atol=tolerance)


@given(SIDES, SIDES, st.integers(1, 10), SEEDS)
def test_missing_directions_are_dropped_and_nothing_is_put_in_their_place(
    rows: int, columns: int, rank: int, seed: int
) -> None:
    side = min(rows, columns)
    rank = min(rank, side)
    matrix_MN = with_spectrum(rows, columns, [1.0] * rank, seed)
    found = polar(matrix_MN)
    assert found.dropped == side - rank
    torch.testing.assert_close(found.factor, matrix_MN, rtol=0, atol=1e-9)
    assert found.mean_singular_value == pytest.approx(rank / side, rel=1e-5)
    completed = torch.linalg.svdvals(polar(matrix_MN, complete=True).factor)
    torch.testing.assert_close(completed, torch.ones_like(completed), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(3, 2), (2, 3), (0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("complete", [False, True])
def test_zero_and_empty_matrices_have_a_zero_factor(shape: tuple[int, int], complete: bool) -> None:
    found = polar(torch.zeros(shape), complete=complete)
    assert found.factor.shape == shape
    assert not found.factor.any()
    assert found.dropped == min(shape)
    assert found.mean_singular_value == 0.0
    assert found.condition == 1.0


@given(SEEDS)
def test_a_polar_factor_does_not_depend_on_the_side_it_is_computed_on(seed: int) -> None:
    matrix_MN = gaussian(9, 6, seed=seed)
    torch.testing.assert_close(
        polar(matrix_MN).factor, polar(matrix_MN.T).factor.T, rtol=0, atol=1e-9
    )
