"""What ESM, TSV-M and the average keep, whatever the numbers: methods.md 1.6 (a) to (i) and 3.1.

Letters: O output features, I input features, K rank, N tokens.
"""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from esm_stream.methods import create
from esm_stream.methods.contract import Factors, Merged, Moment
from esm_stream.methods.esm import Esm
from esm_stream.subspace.basis import essential_basis

SEEDS = st.integers(0, 2**16)
SHAPES = st.sampled_from([(12, 12), (8, 15), (15, 8), (13, 12)])
PROFILES = st.sampled_from(["vit-official", "cvpr-paper", "roberta-official", "journal"])
TOKENS = 40


def gaussian(*shape: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64)


def rotation(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(gaussian(size, size, seed=seed))[0]


def experts(
    shape: tuple[int, int], seed: int, num_experts: int = 3
) -> tuple[list[Tensor], list[Tensor]]:
    """Updates and inputs of every expert, of different sizes and with uneven energy."""
    decay_I = torch.logspace(0, -1, shape[1], dtype=torch.float64)
    updates = [gaussian(*shape, seed=seed + t) * (1 + t) for t in range(num_experts)]
    inputs = [
        gaussian(TOKENS, shape[1], seed=seed + 100 + t) * decay_I + 0.1 for t in range(num_experts)
    ]
    return updates, inputs


def second_moment(rows_NI: Tensor) -> Moment:
    return Moment("input", rows_NI.T @ rows_NI / len(rows_NI), len(rows_NI))


def method(profile: str, **options: object) -> Esm:
    return create("esm", {"profile": profile, **options}, "vision")


def merge(esm: Esm, updates: Sequence[Tensor], moments: Sequence[Moment]) -> Tensor:
    factors = [esm.factor(u, m, len(updates)) for u, m in zip(updates, moments, strict=True)]
    merged = esm.combine(factors, tuple(updates[0].shape))
    assume(well_conditioned(merged))
    return merged.update_OI


def well_conditioned(merged: Merged) -> bool:
    """Whether rounding stays far below the tolerance: it grows with the condition squared."""
    found = merged.diagnostics
    return max(found["condition_bases"], found["condition_coordinates"]) < 1e4


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-7) -> None:
    error = float(torch.linalg.norm(found - wanted) / torch.linalg.norm(wanted))
    assert error < tolerance


@given(SHAPES, st.integers(1, 12), SEEDS)
def test_a_the_basis_loses_the_energy_of_the_eigenvalues_left_out_and_less_than_the_svd(
    shape: tuple[int, int], rank: int, seed: int
) -> None:
    (update_OI,), (rows_NI,) = experts(shape, seed, 1)

    def lost(basis_OK: Tensor) -> float:
        rest_OI = update_OI - basis_OK @ (basis_OK.T @ update_OI)
        return float((rows_NI @ rest_OI.T).square().sum()) / TOKENS

    essential = essential_basis(update_OI, second_moment(rows_NI), rank)
    total = float(essential.eigenvalues.sum())
    left_out = float(essential.eigenvalues[rank:].sum())
    assert lost(essential.basis_OK) == pytest.approx(left_out, abs=1e-10 * total)
    singular_ON = torch.linalg.svd(update_OI, full_matrices=False)[0]
    assert left_out <= lost(singular_ON[:, :rank]) + 1e-10 * total


@given(SHAPES, SEEDS)
def test_b_one_expert_of_full_rank_gives_the_isotropic_update(
    shape: tuple[int, int], seed: int
) -> None:
    updates, inputs = experts(shape, seed, 1)
    esm = method("journal", eigenvalue_exponent=0, levels=[])
    left_ON, values, right_NI = torch.linalg.svd(updates[0], full_matrices=False)
    close(merge(esm, updates, [second_moment(inputs[0])]), values.mean() * left_ON @ right_NI)


@given(PROFILES, SHAPES, st.floats(1e-6, 1e6), st.sampled_from([-1, 1]), SEEDS)
def test_c_a_common_factor_of_all_updates_is_a_factor_of_the_result(
    profile: str, shape: tuple[int, int], size: float, sign: int, seed: int
) -> None:
    updates, inputs = experts(shape, seed)
    moments = [second_moment(rows_NI) for rows_NI in inputs]
    scaled = merge(method(profile), [sign * size * update for update in updates], moments)
    close(scaled, sign * size * merge(method(profile), updates, moments))


@given(PROFILES, SHAPES, st.permutations(range(3)), SEEDS)
def test_d_the_order_of_experts_changes_nothing(
    profile: str, shape: tuple[int, int], order: list[int], seed: int
) -> None:
    updates, inputs = experts(shape, seed)
    moments = [second_moment(rows_NI) for rows_NI in inputs]
    esm = method(profile)
    shuffled = merge(esm, [updates[t] for t in order], [moments[t] for t in order])
    close(shuffled, merge(esm, updates, moments))


@given(PROFILES, SHAPES, st.lists(st.floats(1e-6, 1e6), min_size=3, max_size=3), SEEDS)
def test_d_the_size_of_a_moment_changes_nothing(
    profile: str, shape: tuple[int, int], sizes: list[float], seed: int
) -> None:
    updates, inputs = experts(shape, seed)
    moments = [second_moment(rows_NI) for rows_NI in inputs]
    scaled = [
        Moment("input", moment.matrix * size, moment.tokens)
        for moment, size in zip(moments, sizes, strict=True)
    ]
    close(merge(method(profile), updates, scaled), merge(method(profile), updates, moments))


@given(PROFILES, SHAPES, SEEDS)
def test_d_the_signs_of_eigenvectors_change_nothing(
    profile: str, shape: tuple[int, int], seed: int
) -> None:
    updates, inputs = experts(shape, seed)
    esm = method(profile)
    moments = [second_moment(rows_NI) for rows_NI in inputs]
    factors = [esm.factor(u, m, 3) for u, m in zip(updates, moments, strict=True)]
    flipped = []
    for t, one in enumerate(factors):
        signs_K = gaussian(one.basis_OK.shape[1], seed=seed + t).sign()
        basis_OK, rows_KI = one.basis_OK * signs_K, one.coordinates_KI * signs_K[:, None]
        flipped.append(Factors(basis_OK, rows_KI, one.spectrum, one.norm))
    merged = esm.combine(factors, shape)
    assume(well_conditioned(merged))
    close(esm.combine(flipped, shape).update_OI, merged.update_OI)


@given(PROFILES, SHAPES, SEEDS)
def test_e_rotating_the_outputs_rotates_the_result(
    profile: str, shape: tuple[int, int], seed: int
) -> None:
    updates, inputs = experts(shape, seed)
    moments = [second_moment(rows_NI) for rows_NI in inputs]
    turn_OO = rotation(shape[0], seed + 7)
    rotated = merge(method(profile), [turn_OO @ update for update in updates], moments)
    close(rotated, turn_OO @ merge(method(profile), updates, moments))


@given(st.sampled_from([[], ["task"]]), SHAPES, SEEDS)
def test_e_rotating_the_inputs_rotates_the_result_without_dimension_scaling(
    levels: list[str], shape: tuple[int, int], seed: int
) -> None:
    updates, inputs = experts(shape, seed)
    turn_II = rotation(shape[1], seed + 7)
    esm = method("journal", levels=levels)
    rotated = merge(
        esm,
        [update @ turn_II for update in updates],
        [second_moment(rows_NI @ turn_II) for rows_NI in inputs],
    )
    close(rotated, merge(esm, updates, [second_moment(x) for x in inputs]) @ turn_II)


@given(SEEDS)
def test_e_dimension_scaling_depends_on_the_axes_of_the_inputs(seed: int) -> None:
    updates, inputs = experts((12, 12), seed)
    turn_II = rotation(12, seed + 7)
    esm = method("journal")
    rotated = merge(
        esm,
        [update @ turn_II for update in updates],
        [second_moment(rows_NI @ turn_II) for rows_NI in inputs],
    )
    plain = merge(esm, updates, [second_moment(rows_NI) for rows_NI in inputs])
    assert float(torch.linalg.norm(rotated - plain @ turn_II)) > 0.01 * float(plain.norm())


@given(PROFILES, SHAPES, SEEDS)
def test_f_the_spectrum_is_flat_before_layer_scaling(
    profile: str, shape: tuple[int, int], seed: int
) -> None:
    updates, inputs = experts(shape, seed)
    esm = method(profile)
    factors = [esm.factor(u, second_moment(x), 3) for u, x in zip(updates, inputs, strict=True)]
    merged = esm.combine(factors, shape)
    height = min(sum(one.basis_OK.shape[1] for one in factors), shape[1])
    values = torch.linalg.svdvals(merged.update_OI)
    wanted = torch.zeros_like(values)
    wanted[:height] = merged.diagnostics["factor"]
    torch.testing.assert_close(values, wanted, rtol=1e-6, atol=1e-8)
    means = ("mean_singular_bases", "mean_singular_coordinates")
    product = merged.diagnostics[means[0]] * merged.diagnostics[means[1]]
    assert merged.diagnostics["factor"] == pytest.approx(esm.profile.factor * product)


@given(st.sampled_from(["esm", "tsv_m"]), st.sampled_from([(20, 24), (24, 20)]), SEEDS)
def test_g_low_rank_experts_merge_inside_their_joint_column_and_row_space(
    name: str, shape: tuple[int, int], seed: int
) -> None:
    left = [gaussian(shape[0], 2, seed=seed + t) for t in range(3)]
    right = [gaussian(2, shape[1], seed=seed + 10 + t) for t in range(3)]
    options = {"levels": ["task"]} if name == "esm" else {}
    any_method = create(name, options, "vision")
    moment = second_moment(gaussian(TOKENS, shape[1], seed=seed + 20))
    factors = [any_method.factor(b @ a, moment, 3) for b, a in zip(left, right, strict=True)]
    merged_OI = any_method.combine(factors, shape).update_OI
    columns_OR = torch.linalg.qr(torch.cat(left, 1))[0]
    rows_IR = torch.linalg.qr(torch.cat(right).T)[0]
    close(columns_OR @ (columns_OR.T @ merged_OI) @ rows_IR @ rows_IR.T, merged_OI)


@given(SHAPES, st.integers(1, 30), SEEDS)
def test_h_the_gram_route_is_the_svd_of_the_shifts(
    shape: tuple[int, int], tokens: int, seed: int
) -> None:
    update_OI, rows_NI = gaussian(*shape, seed=seed), gaussian(tokens, shape[1], seed=seed + 1)
    essential = essential_basis(update_OI, second_moment(rows_NI), 4)
    _, values, right = torch.linalg.svd(rows_NI @ update_OI.T, full_matrices=False)
    rank = essential.basis_OK.shape[1]
    assert rank == min(4, tokens)
    wanted = values[:rank].square() / tokens
    torch.testing.assert_close(essential.eigenvalues[:rank], wanted, rtol=1e-8, atol=0)
    overlaps = (essential.basis_OK * right[:rank].T).sum(dim=0).abs()
    torch.testing.assert_close(overlaps, torch.ones_like(overlaps), rtol=0, atol=1e-7)


@given(
    profile=PROFILES,
    shape=SHAPES,
    cuts=st.lists(st.integers(1, TOKENS - 1), unique=True, max_size=5),
    order=st.permutations(range(6)),
    seed=SEEDS,
)
def test_i_moments_may_be_summed_in_chunks_of_any_size_and_order(
    profile: str, shape: tuple[int, int], cuts: list[int], order: list[int], seed: int
) -> None:
    updates, inputs = experts(shape, seed)
    chunked = []
    for rows_NI in inputs:
        chunks = torch.tensor_split(rows_NI, sorted(cuts))
        shuffled = [chunks[i] for i in order if i < len(chunks)]
        moment_II = sum(chunk.T @ chunk for chunk in shuffled) / TOKENS
        chunked.append(Moment("input", moment_II, TOKENS))
    whole = [second_moment(rows_NI) for rows_NI in inputs]
    close(merge(method(profile), updates, chunked), merge(method(profile), updates, whole))


@given(PROFILES, SHAPES, SEEDS)
def test_factors_stored_in_float32_cost_no_more_than_float32(
    profile: str, shape: tuple[int, int], seed: int
) -> None:
    updates, inputs = experts(shape, seed)
    esm = method(profile)
    factors = [esm.factor(u, second_moment(x), 3) for u, x in zip(updates, inputs, strict=True)]
    stored = [
        Factors(one.basis_OK.float(), one.coordinates_KI.float(), one.spectrum, one.norm)
        for one in factors
    ]
    merged = esm.combine(factors, shape)
    worst = max(merged.diagnostics["condition_bases"], merged.diagnostics["condition_coordinates"])
    close(esm.combine(stored, shape).update_OI, merged.update_OI, 1e-6 * worst)


@given(SHAPES, SEEDS)
def test_tsv_m_of_one_expert_is_its_update(shape: tuple[int, int], seed: int) -> None:
    update_OI = gaussian(*shape, seed=seed)
    tsv_m = create("tsv_m", {}, "vision")
    close(tsv_m.combine([tsv_m.factor(update_OI, None, 1)], shape).update_OI, update_OI)


@given(SEEDS)
def test_tsv_m_adds_experts_that_touch_different_rows_and_columns(seed: int) -> None:
    updates = [torch.zeros(9, 12, dtype=torch.float64) for _ in range(3)]
    for t, update in enumerate(updates):
        update[3 * t : 3 * t + 3, 4 * t : 4 * t + 4] = gaussian(3, 4, seed=seed + t)
    tsv_m = create("tsv_m", {}, "vision")
    factors = [tsv_m.factor(update, None, 3) for update in updates]
    close(tsv_m.combine(factors, (9, 12)).update_OI, updates[0] + updates[1] + updates[2])
