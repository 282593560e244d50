"""Laws of the banded form and of products of polar factors, against eigenvectors and SVDs.

Letters: M rows, N columns, O outputs, I inputs, K columns of one expert, R columns of all.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esm_stream.subspace.band import Band
from esm_stream.subspace.bidiagonal import Bidiagonal
from esm_stream.subspace.gram import gram, row_panels
from esm_stream.subspace.polar import banded_root, factor_by_reflectors, polar
from esm_stream.subspace.product import PolarProduct, Stack
from esm_stream.subspace.rational import inverse_power_poles, inverse_root_poles

SIDES = st.integers(1, 150)
SEEDS = st.integers(0, 2**16)


def gaussian(*shape: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(gaussian(rows, columns, seed=seed))[0]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@given(st.floats(-16, 0), st.floats(-3, 6), st.sampled_from([1e-4, 1e-9]))
def test_the_rational_inverse_root_is_as_exact_as_asked(
    decades: float, scale: float, error: float
) -> None:
    high = 10.0**scale
    low = high * 10.0**decades
    shifts, weights = inverse_root_poles(low, high, error)
    assert shifts == sorted(shifts)
    assert min(shifts + weights) > 0
    for step in range(101):
        x = low * (high / low) ** (step / 100)
        found = math.fsum(w / (x + c) for c, w in zip(shifts, weights, strict=True))
        assert abs(found * math.sqrt(x) - 1) <= 2 * error


@given(st.floats(-12, 0), st.floats(-3, 6), st.floats(0.01, 1))
def test_the_rational_power_is_exact_to_the_digits_of_float32(
    decades: float, scale: float, power: float
) -> None:
    high = 10.0**scale
    low = high * 10.0**decades
    shifts, weights = inverse_power_poles(power, low, high)
    assert shifts == sorted(shifts)
    assert min(shifts) > 0
    for step in range(101):
        x = low * (high / low) ** (step / 100)
        terms = [w / (x + c) for c, w in zip(shifts, weights, strict=True)]
        assert abs(math.fsum(terms) * x**power - 1) <= 3e-7
        assert math.fsum(map(abs, terms)) * x**power <= 20


@settings(max_examples=30)
@given(side=SIDES, power=st.floats(0.1, 1), decades=st.floats(-6, 0), seed=SEEDS)
def test_powers_of_a_banded_form_are_those_of_its_eigenvectors(
    side: int, power: float, decades: float, seed: int
) -> None:
    vectors_NN = orthonormal(side, side, seed)
    values = torch.logspace(0, decades, side, dtype=torch.float64)
    columns_NQ = gaussian(side, 7, seed=seed + 1)
    wanted_NQ = vectors_NN @ (values.pow(-power).unsqueeze(1) * (vectors_NN.T @ columns_NQ))
    band = Band(vectors_NN * values @ vectors_NN.T)
    band.inverse_power(columns_NQ, power, 10.0**decades)
    assert relative(columns_NQ, wanted_NQ) <= 3e-7


@settings(max_examples=30)
@given(side=SIDES, columns=st.integers(1, 20), decades=st.floats(-8, 0), seed=SEEDS)
def test_functions_of_a_banded_form_are_those_of_its_eigenvectors(
    side: int, columns: int, decades: float, seed: int
) -> None:
    vectors_NN = orthonormal(side, side, seed)
    values = torch.logspace(0, decades, side, dtype=torch.float64)
    symmetric_NN = vectors_NN * values @ vectors_NN.T
    right_NQ = gaussian(side, columns, seed=seed + 1)
    band = Band(symmetric_NN.clone())
    assert band.form.largest == pytest.approx(1, rel=1e-2)
    assert band.form.smallest() == pytest.approx(float(values[-1]), rel=1e-2)
    low = 0.5 * float(values[-1])
    assert band.form.root_sums(low).roots == pytest.approx(float(values.sqrt().sum()), rel=1e-8)
    inverses = float(values.rsqrt().sum())
    assert band.form.root_sums(low).inverse_roots == pytest.approx(inverses, rel=1e-6)
    assert band.form.root_sums(low).inverses == pytest.approx(float((1 / values).sum()), rel=1e-4)
    found_NQ = right_NQ.clone()
    band.inverse_root(found_NQ, low)
    assert relative(found_NQ, vectors_NN / values.sqrt() @ (vectors_NN.T @ right_NQ)) < 1e-6
    if side > 1 and decades < -1:
        middle = float((values[side // 2 - 1] * values[side // 2]).sqrt())
        above = values > middle
        assert band.form.count_below(middle) == int((~above).sum())
        found_NQ = right_NQ.clone()
        band.above(found_NQ, middle)
        wanted_NQ = vectors_NN[:, above] @ (vectors_NN[:, above].T @ right_NQ)
        assert float((found_NQ - wanted_NQ).norm()) < 1e-6 * float(right_NQ.norm())


SPECTRA = {
    "well conditioned": torch.linspace(1, 0.01, 100, dtype=torch.float64),
    "condition 1e5": torch.logspace(0, -5, 100, dtype=torch.float64),
    "one small": torch.cat([torch.linspace(1, 0.01, 99), torch.tensor([3e-7])]).double(),
    "down to the tolerance": torch.logspace(0, -6.9, 100, dtype=torch.float64),
    "through the tolerance": torch.logspace(0, -9.05, 100, dtype=torch.float64),
    "half of it missing": torch.cat([torch.linspace(1, 0.01, 50), torch.zeros(50)]).double(),
}


@pytest.mark.parametrize("rows", [100, 170])
@pytest.mark.parametrize("kind", SPECTRA)
def test_a_banded_root_is_that_of_the_svd_nearly_singular_matrices_included(
    kind: str, rows: int
) -> None:
    values = SPECTRA[kind]
    left_MN, right_NN = orthonormal(rows, 100, 1), orthonormal(100, 100, 2)
    matrix_MN = left_MN * values @ right_NN.T
    gram_NN = gram(row_panels(matrix_MN), 100)
    assert gram_NN is not None
    found = banded_root(gram_NN, lambda: row_panels(matrix_MN), 1e-7)
    kept = values > 1e-7
    factor_MN = matrix_MN @ found.root(torch.eye(100, dtype=torch.float64))
    assert relative(factor_MN, left_MN[:, kept] @ right_NN[:, kept].T) < 5e-5
    assert found.dropped == int((~kept).sum())
    assert found.mean_singular_value == pytest.approx(float(values.mean()), rel=1e-5)
    if float(values[-1]) > 0:
        assert found.condition == pytest.approx(float(values[0] / values[-1]), rel=0.02)
    else:
        assert found.condition > 1e9


@settings(max_examples=30)
@given(side=SIDES, more=st.integers(0, 40), columns=st.integers(1, 20), seed=SEEDS)
def test_a_polar_factor_by_reflectors_is_as_exact_as_it_says(
    side: int, more: int, columns: int, seed: int
) -> None:
    # A square Gaussian matrix has singular values down to 1 / side of the largest.
    matrix_MN, right_NQ = gaussian(side + more, side, seed=seed), gaussian(side, columns, seed=1)
    left, values, right = torch.linalg.svd(matrix_MN, full_matrices=False)
    form = Bidiagonal(matrix_MN.float())
    assert form.sums is not None
    error = relative(form.polar(right_NQ).double(), left @ (right @ right_NQ))
    assert error < max(form.error, 2e-6)
    assert form.error < 1e-5 * math.sqrt(float(values[0] / values[-1]))
    assert form.sums.roots == pytest.approx(float(values.sum()), rel=1e-6)
    assert math.sqrt(form.smallest) == pytest.approx(float(values[-1]), rel=0.02)


@pytest.mark.parametrize("kind", SPECTRA)
def test_a_polar_factor_by_reflectors_is_given_up_where_float32_does_not_say_it(kind: str) -> None:
    values = SPECTRA[kind]
    left_MN, right_NN = orthonormal(120, 100, 1), orthonormal(100, 100, 2)
    matrix_MN = left_MN * values @ right_NN.T
    found = factor_by_reflectors(lambda: row_panels(matrix_MN), 120, 100)
    if kind != "well conditioned":
        assert found is None
        return
    assert found is not None
    assert found.is_factor
    assert found.condition == pytest.approx(100, rel=1e-3)
    factor_MN = found.root(torch.eye(100, dtype=torch.float64)).double()
    assert relative(factor_MN, left_MN @ right_NN.T) < 1e-5


@pytest.mark.parametrize(
    ("outputs", "inputs", "ranks"),
    [(20, 8, (5, 6, 4)), (8, 20, (2, 3, 3)), (8, 20, (5, 6, 4)), (12, 9, (5, 6, 4)), (9, 4, (4,))],
    ids=["tall", "wide", "more columns than outputs", "more than both", "one expert"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_of_polar_factors_is_that_of_whole_stacks(
    outputs: int, inputs: int, ranks: tuple[int, ...], dtype: torch.dtype
) -> None:
    blocks = [orthonormal(outputs, rank, seed) for seed, rank in enumerate(ranks)]
    weights = [torch.linspace(1.5, 0.5, rank, dtype=torch.float64) for rank in ranks]
    right_RI = gaussian(sum(ranks), inputs, seed=9)
    middle_R = torch.linspace(1, 2, sum(ranks), dtype=torch.float64)
    stacked = torch.cat([b * w for b, w in zip(blocks, weights, strict=True)], dim=1)
    wanted = polar(stacked).factor * middle_R @ polar(right_RI).factor
    product = PolarProduct(Stack(blocks, weights), right_RI.clone())
    found = product.update(middle_R, dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted.to(dtype), rtol=1e-6, atol=1e-7)
    assert product.left.mean_singular_value == pytest.approx(polar(stacked).mean_singular_value)


@pytest.mark.parametrize(("outputs", "inputs"), [(20, 8), (8, 20), (16, 9), (9, 12)])
def test_a_product_of_nearly_singular_stacks_is_that_of_their_svds(
    outputs: int, inputs: int
) -> None:
    blocks = [orthonormal(outputs, 3, seed) for seed in range(3)]
    blocks.append(blocks[1] + 1e-6 * orthonormal(outputs, 3, 7))
    weights = [torch.ones(3, dtype=torch.float64)] * 4
    right_RI = gaussian(12, inputs, seed=9)
    right_RI[5:7] = right_RI[1:3] + 1e-6 * gaussian(2, inputs, seed=10)
    stacked = torch.cat([b * w for b, w in zip(blocks, weights, strict=True)], dim=1)
    left, _, inner = torch.linalg.svd(stacked, full_matrices=False)
    outer, _, right = torch.linalg.svd(right_RI, full_matrices=False)
    product = PolarProduct(Stack(blocks, weights), right_RI.clone())
    found = product.update(torch.ones(12, dtype=torch.float64), torch.float64)
    assert relative(found, left @ (inner @ outer) @ right) < 1e-6


@pytest.mark.parametrize(("outputs", "inputs"), [(48, 48), (48, 60), (60, 48), (48, 30)])
def test_a_product_by_reflectors_is_exact_where_the_coordinates_are_nearly_singular(
    outputs: int, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esm_stream.subspace.product.is_reduced", lambda *_: True)
    blocks = [orthonormal(outputs, 12, seed).float() for seed in range(4)]
    weights = [torch.linspace(1.5, 0.5, 12, dtype=torch.float64)] * 4
    values = torch.logspace(0, -5, min(48, inputs), dtype=torch.float64)
    right_RI = orthonormal(48, len(values), 5) * values @ orthonormal(inputs, len(values), 6).T
    product = PolarProduct(Stack(blocks, weights), right_RI.clone())
    assert product.left.is_factor
    found = product.update(torch.ones(48, dtype=torch.float64), torch.float64)
    stacked = torch.cat([b.double() * w for b, w in zip(blocks, weights, strict=True)], dim=1)
    left, _, inner = torch.linalg.svd(stacked, full_matrices=False)
    outer, _, right = torch.linalg.svd(right_RI, full_matrices=False)
    assert relative(found, left @ (inner @ outer) @ right) < 2e-5


@pytest.mark.parametrize("twice", [False, True], ids=["distinct", "one expert twice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_stacks_give_what_their_svds_give(dtype: torch.dtype, *, twice: bool) -> None:
    # Sides from which reductions are taken, more rows than one panel.
    outputs, inputs = 1100, 64
    blocks = [
        (orthonormal(outputs, inputs, seed) @ orthonormal(inputs, inputs, seed + 9)).to(dtype)
        for seed in range(17)
    ]
    blocks += [blocks[0]] * twice
    weights = [torch.linspace(1.5, 0.5, inputs, dtype=torch.float64)] * len(blocks)
    right_RI = gaussian(len(blocks) * inputs, inputs, seed=3)
    product = PolarProduct(Stack(blocks, weights), right_RI.clone())
    assert product.left.is_factor == (dtype == torch.float32 and not twice)
    found = product.update(torch.ones(len(right_RI), dtype=torch.float64), torch.float64)
    stacked = torch.cat([b.double() * w for b, w in zip(blocks, weights, strict=True)], dim=1)
    left, values, right = torch.linalg.svd(stacked, full_matrices=False)
    kept = values > 1e-7 * values[0]
    outer, _, inner = torch.linalg.svd(right_RI, full_matrices=False)
    wanted = left[:, kept] @ (right[kept] @ outer) @ inner
    assert relative(found, wanted) < (1e-4 if twice else 1e-5)
    assert product.left.dropped == int((~kept).sum())
    assert product.left.mean_singular_value == pytest.approx(float(values.mean()), rel=1e-5)
