"""Experts without rank, without update, or of awkward shape: methods.md 1.3.

Letters: T experts, O output features, I input features, N tokens, R directions of all experts.
"""

import pytest
import torch
from torch import Tensor

from esm_stream.methods import create
from esm_stream.methods.contract import Merged, Moment
from esm_stream.subspace.basis import essential_basis

TOKENS = 100


def updates_of(num_experts: int, shape: tuple[int, int], seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random) for _ in range(num_experts)]


def low_rank(shape: tuple[int, int], rank: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    left_OK = torch.randn(shape[0], rank, generator=random, dtype=torch.float64)
    right_KI = torch.randn(rank, shape[1], generator=random, dtype=torch.float64)
    return left_OK @ right_KI


def moments_of(num_experts: int, size: int) -> list[Moment]:
    random = torch.Generator().manual_seed(99)
    rows = torch.randn(num_experts, TOKENS, size, generator=random, dtype=torch.float64)
    return [Moment("input", rows_NI.T @ rows_NI / TOKENS, TOKENS) for rows_NI in rows]


def merge(updates: list[Tensor], name: str = "esm", **options: object) -> Merged:
    if name == "esm":
        options = {"profile": "vit-official", **options}
    method = create(name, options, "vision")
    moments = moments_of(len(updates), updates[0].shape[1])
    factors = [
        method.factor(update, moment, len(updates))
        for update, moment in zip(updates, moments, strict=True)
    ]
    return method.combine(factors, tuple(updates[0].shape))


def outside(update_OI: Tensor, spanning_OR: Tensor) -> float:
    """Share of an update outside the column space of another matrix."""
    basis_OR = torch.linalg.qr(spanning_OR)[0]
    rest_OI = update_OI - basis_OR @ (basis_OR.T @ update_OI)
    return float(torch.linalg.norm(rest_OI) / torch.linalg.norm(update_OI))


@pytest.mark.parametrize("name", ["esm", "tsv_m"])
@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (8, 8)])
def test_experts_without_update_merge_to_zero(name: str, shape: tuple[int, int]) -> None:
    merged = merge([torch.zeros(shape)] * 3, name)
    assert merged.update_OI.shape == shape
    assert merged.update_OI.dtype == torch.float64
    assert not merged.update_OI.any()
    assert merged.diagnostics["ranks"] == [0, 0, 0]


def test_strict_official_merges_zero_experts_to_zero_too() -> None:
    merged = merge([torch.zeros(12, 8)] * 3, strict_official=True)
    assert not merged.update_OI.any()


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_an_expert_without_update_counts_in_the_rank(shape: tuple[int, int]) -> None:
    first, second = updates_of(2, shape)
    merged = merge([first, torch.zeros(shape), second])
    assert merged.diagnostics["ranks"] == [shape[0] // 3, 0, shape[0] // 3]


def test_an_expert_without_update_counts_in_the_mean_norm_and_does_nothing_else() -> None:
    # The mean norm of three is two thirds of that of two: each gamma grows by (3/2)^2 = 2.25.
    first, second = updates_of(2, (12, 20))
    moments = moments_of(2, 20)
    method = create("esm", {"profile": "vit-official", "rank": 4}, "vision")
    factors = [method.factor(u, m, 3) for u, m in zip((first, second), moments, strict=True)]
    zero = method.factor(torch.zeros(12, 20), moments[0], 3)
    without = method.combine(factors, (12, 20)).update_OI
    with_zero = method.combine([factors[0], zero, factors[1]], (12, 20)).update_OI
    torch.testing.assert_close(with_zero, 2.25 * without, rtol=1e-10, atol=0)


def test_a_zero_expert_changes_nothing_for_tsv_m_of_the_same_rank() -> None:
    first, second = updates_of(2, (12, 20))
    with_zero = merge([first, torch.zeros(12, 20), second], "tsv_m")
    without = merge([first, second], "tsv_m", rank=4)
    torch.testing.assert_close(with_zero.update_OI, without.update_OI, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_duplicates_add_no_direction_of_rounding_noise(shape: tuple[int, int]) -> None:
    method = create("esm", {"profile": "vit-official", "levels": []}, "vision")
    first, second = updates_of(2, shape)
    moments = moments_of(2, shape[1])
    one, two = (method.factor(u, m, 4) for u, m in zip((first, second), moments, strict=True))
    merged = method.combine([one, two, one], shape)
    rank = shape[0] // 4
    assert merged.diagnostics["dropped_bases"] == rank
    assert merged.diagnostics["dropped_coordinates"] == min(3 * rank, shape[1]) - 2 * rank
    assert int(torch.linalg.matrix_rank(merged.update_OI)) == 2 * rank
    assert outside(merged.update_OI, torch.cat([one.basis_OK, two.basis_OK], 1)) < 1e-10


def test_strict_official_keeps_the_directions_of_duplicates() -> None:
    method = create("esm", {"strict_official": True}, "language")
    first, second = updates_of(2, (12, 20))
    moments = moments_of(2, 20)
    one, two = (method.factor(u, m, 3) for u, m in zip((first, second), moments, strict=True))
    merged = method.combine([one, two, one], (12, 20))
    assert merged.diagnostics["dropped_bases"] == 0
    assert int(torch.linalg.matrix_rank(merged.update_OI)) == 12
    assert merged.diagnostics["dropped_coordinates"] == 0


def test_the_tolerances_decide_what_counts_as_a_direction() -> None:
    # Eigenvalues 1 and 1e-12 of the first expert; the second one's basis is 1e-8 off the first's.
    first, second = torch.zeros(6, 6).double(), torch.zeros(6, 6).double()
    first[0, 0], first[1, 1] = 1, 1e-6
    second[0, 1], second[2, 1] = 1, 1e-8
    identity_II = Moment("input", torch.eye(6, dtype=torch.float64), 6)

    def found(**options: object) -> tuple[object, object]:
        options = {"levels": [], "eigenvalue_exponent": 0, **options}
        method = create("esm", options, "language")
        factors = [method.factor(update, identity_II, 2) for update in (first, second)]
        diagnostics = method.combine(factors, (6, 6)).diagnostics
        return diagnostics["ranks"], diagnostics["dropped_bases"]

    assert found() == ([1, 1], 1)
    assert found(rank_tolerance=1e-13) == ([2, 1], 1)
    assert found(drop_tolerance=1e-10) == ([1, 1], 0)


def test_svd_decomposition_does_not_look_at_the_moment() -> None:
    (update,), (moment,) = updates_of(1, (12, 20)), moments_of(1, 20)
    svd = create("esm", {"decomposition": "svd", "rank": 3}, "language")
    esd = create("esm", {"rank": 3}, "language")
    without = svd.factor(update, None, 1).basis_OK
    assert torch.equal(svd.factor(update, moment, 1).basis_OK, without)
    assert torch.equal(esd.factor(update, None, 1).basis_OK, without)
    assert not torch.allclose(esd.factor(update, moment, 1).basis_OK, without)


@pytest.mark.parametrize("name", ["esm", "tsv_m"])
@pytest.mark.parametrize("shape", [(24, 30), (30, 24)])
def test_experts_of_low_rank_keep_their_rank(name: str, shape: tuple[int, int]) -> None:
    updates = [low_rank(shape, 2, seed) for seed in range(3)]
    merged = merge(updates, name)
    assert merged.diagnostics["ranks"] == [2, 2, 2]
    assert outside(merged.update_OI, torch.cat([u[:, :2] for u in updates], 1)) < 1e-7
    assert int(torch.linalg.matrix_rank(merged.update_OI, rtol=1e-7)) == 6


@pytest.mark.parametrize("shape", [(24, 30), (30, 24)])
def test_fewer_tokens_than_k_limit_the_rank(shape: tuple[int, int]) -> None:
    rows_NI = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(3)).double()
    moment = Moment("input", rows_NI.T @ rows_NI / 5, 5)
    essential = essential_basis(updates_of(1, shape)[0], moment, 12)
    assert essential.rank == 5
    assert essential.basis_OK.shape == (shape[0], 5)


def test_a_moment_of_float32_products_that_is_not_quite_definite_is_usable() -> None:
    rows_NI = torch.randn(5, 24, generator=torch.Generator().manual_seed(3)) * 30 + 10
    exact_II = rows_NI.double().T @ rows_NI.double() / 5
    rounded_II = (rows_NI.T @ rows_NI / 5).double()
    assert float(torch.linalg.eigvalsh(rounded_II)[0]) < -1e-7
    update_OI = updates_of(1, (30, 24))[0]
    found = essential_basis(update_OI, Moment("input", rounded_II, 5), 5, tolerance=1e-6)
    wanted = essential_basis(update_OI, Moment("input", exact_II, 5), 5)
    assert found.rank == wanted.rank == 5
    overlap_KK = found.basis_OK.T @ wanted.basis_OK
    torch.testing.assert_close(overlap_KK, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(10, 8), (8, 10)])
@pytest.mark.parametrize("kind", ["input", "shift"])
def test_a_moment_without_energy_gives_no_columns(shape: tuple[int, int], kind: str) -> None:
    size = shape[1] if kind == "input" else shape[0]
    moment = Moment(kind, torch.zeros(size, size, dtype=torch.float64), 1)
    essential = essential_basis(updates_of(1, shape)[0], moment, 3)
    assert essential.rank == 0
    assert essential.basis_OK.shape == (shape[0], 0)
    assert essential.eigenvalues.tolist() == [0.0] * 8


@pytest.mark.parametrize("shape", [(16, 8), (8, 16)])
def test_an_update_of_features_that_never_fire_gives_no_columns(shape: tuple[int, int]) -> None:
    update_OI = updates_of(1, shape)[0]
    update_OI[:, : shape[1] // 2] = 0
    rows_NI = torch.randn(TOKENS, shape[1], generator=torch.Generator().manual_seed(1)).double()
    rows_NI[:, shape[1] // 2 :] = 0
    essential = essential_basis(update_OI, Moment("input", rows_NI.T @ rows_NI, TOKENS), 3)
    assert essential.rank == 0


@pytest.mark.parametrize("shape", [(16, 8), (8, 16)])
def test_rounding_of_strong_features_is_no_direction_of_an_update_of_weak_ones(
    shape: tuple[int, int],
) -> None:
    update_OI, half = updates_of(1, shape)[0], shape[1] // 2
    update_OI[:, :half] = 0
    rows_NI = torch.randn(TOKENS, shape[1], generator=torch.Generator().manual_seed(1)).double()
    rows_NI[:, :half] *= 1e6
    rows_NI[:, half:] = rows_NI[:, half : half + 1]
    essential = essential_basis(update_OI, Moment("input", rows_NI.T @ rows_NI, TOKENS), 3)
    assert essential.rank == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    update_OI = torch.ones(3, 4)
    moment_II = torch.eye(4, dtype=torch.float64)
    broken_OI, broken_II = update_OI.clone(), moment_II.clone()
    broken_OI[1, 2] = value
    broken_II[1, 2] = value
    with pytest.raises(ValueError, match="update holds NaN or Inf"):
        essential_basis(broken_OI, Moment("input", moment_II, 1), 1)
    with pytest.raises(ValueError, match="moment holds NaN or Inf"):
        essential_basis(update_OI, Moment("input", broken_II, 1), 1)


def test_more_experts_than_outputs_keep_one_direction_each() -> None:
    merged = merge(updates_of(7, (4, 9)), levels=[])
    assert merged.diagnostics["ranks"] == [1] * 7
    # E_cat is wide, its polar factor has orthonormal rows: the spectrum is flat over O.
    values = torch.linalg.svdvals(merged.update_OI)
    assert merged.diagnostics["dropped_bases"] == 0
    assert bool((values <= merged.diagnostics["factor"] * (1 + 1e-9)).all())


@pytest.mark.parametrize("shape", [(30, 8), (23, 40), (48, 16)])
def test_tall_and_indivisible_shapes_have_a_flat_spectrum(shape: tuple[int, int]) -> None:
    merged = merge(updates_of(4, shape))
    total = sum(merged.diagnostics["ranks"])
    assert merged.diagnostics["ranks"] == [shape[0] // 4] * 4
    values = torch.linalg.svdvals(merged.update_OI)[: min(total, shape[1])]
    wanted = torch.full_like(values, merged.diagnostics["factor"])
    torch.testing.assert_close(values, wanted, rtol=1e-9, atol=0)


def test_rank_is_the_floor_of_outputs_over_experts() -> None:
    method = create("esm", {}, "language")
    assert method.rank((24, 99), 8) == 3
    assert method.rank((23, 99), 8) == 2
    assert method.rank((5, 99), 8) == 1
    assert method.rank((99, 10), 2) == 10
    # 98 * (1 / 49) is a little less than 2 in floating point.
    assert method.rank((98, 99), 49) == 2


def test_rank_options() -> None:
    assert create("esm", {"rank": 7}, "language").rank((24, 99), 8) == 7
    assert create("esm", {"rank": 700}, "language").rank((24, 99), 8) == 24
    assert create("esm", {"rank_factor": 2.0}, "language").rank((24, 99), 8) == 6
    # 0.7 * 10 / 7 is exactly 1; 0.1 * 30 is exactly 3.
    assert create("esm", {"rank_factor": 0.7}, "language").rank((10, 99), 7) == 1
    assert create("esm", {"rank_factor": 0.1}, "language").rank((30, 99), 1) == 3
    assert create("esm", {"strict_official": True}, "language").rank((99, 10), 2) == 49
    smaller = create("esm", {"rank_budget": "min_side"}, "language")
    assert (smaller.rank((96, 24), 8), smaller.rank((24, 96), 8)) == (3, 3)
    assert create("tsv_m", {}, "language").rank((99, 10), 2) == 5
    assert create("tsv_m", {}, "language").rank((3, 10), 8) == 1


def test_strict_official_counts_directions_without_energy_in_the_weights() -> None:
    # O = 30, I = 8, T = 3: k = 10 of which 8 exist, so weights with mean 1 over 10 are 10/8 larger.
    # In E that cancels against a mean singular value over 30 instead of 24; in C it is over 8.
    updates = updates_of(3, (30, 8))
    default = merge(updates, levels=[])
    strict = merge(updates, levels=[], strict_official=True)
    assert strict.diagnostics["ranks"] == [10] * 3
    assert default.diagnostics["ranks"] == [8] * 3
    torch.testing.assert_close(strict.update_OI, 1.25 * default.update_OI, rtol=1e-8, atol=1e-10)
