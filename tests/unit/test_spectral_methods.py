"""Worked examples and invariants of the spectral methods (methods.md 3.1 and 3.2)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merging import merge
from torch import Tensor

from esm_stream.methods.contract import Moment

SHAPES = [(12, 12), (20, 9), (9, 20)]
FIRST, SECOND = [[2.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 3.0]]
EXAMPLE = [torch.tensor(FIRST), torch.tensor(SECOND)]


def random(count: int, shape: tuple[int, int], seed: int = 0, rank: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if not rank:
        return [torch.randn(shape, generator=generator) for _ in range(count)]
    left = [torch.randn(shape[0], rank, generator=generator) for _ in range(count)]
    return [u @ torch.randn(rank, shape[1], generator=generator) for u in left]


def near(found: Tensor, wanted: object, tolerance: float = 1e-5) -> None:
    wanted = torch.as_tensor(wanted).double()
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


def test_iso_c_worked_example() -> None:
    near(merge("iso_c", EXAMPLE), [[3, 0.5], [-0.5, 3]])


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_c_has_a_flat_spectrum_at_the_mean(shape: tuple[int, int]) -> None:
    updates = random(3, shape)
    values = torch.linalg.svdvals(merge("iso_c", updates))
    mean = torch.linalg.svdvals(sum(updates).double()).mean()
    near(values, mean.expand(len(values)))


def test_iso_c_compact_takes_the_mean_over_directions_that_exist() -> None:
    updates = random(2, (12, 10), rank=2)
    values = torch.linalg.svdvals(merge("iso_c", updates, options={"compact": True}))
    found = torch.linalg.svdvals(sum(updates).double())
    near(values[:4], found[:4].mean().expand(4))
    near(values[4:], torch.zeros(6))


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_cts_without_directions_of_experts_is_iso_c(shape: tuple[int, int]) -> None:
    updates = random(3, shape)
    near(merge("iso_cts", updates, options={"common": 1.0}), merge("iso_c", updates))


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_cts_equals_its_definition(shape: tuple[int, int]) -> None:
    updates = [d.double() for d in random(3, shape)]
    side = min(shape)
    own = round((side - int(0.8 * side)) / 3)
    left, values, right = torch.linalg.svd(sum(updates), full_matrices=False)
    kept = side - 3 * own
    common = left[:, :kept]
    lefts, sizes, rights = [], [], []
    for update in updates:
        u, s, v = torch.linalg.svd(update - common @ common.T @ update, full_matrices=False)
        lefts.append(u[:, :own])
        sizes.append(s[:own])
        rights.append(v[:own])
    u = torch.linalg.svd(torch.cat([*lefts, common], 1), full_matrices=False)
    v = torch.linalg.svd(torch.cat([*rights, right[:kept]]), full_matrices=False)
    level = torch.cat([*sizes, values[:kept]]).mean()
    assert own == 1
    near(merge("iso_cts", updates), level * (u[0] @ u[2]) @ (v[0] @ v[2]))


def test_cart_between_the_average_and_all_experts() -> None:
    updates = random(3, (12, 10))
    near(merge("cart", updates, options={"scale": 0.0}), merge("average", updates))
    # All directions: the mean, and the sum of what deviates from it, which is nothing.
    near(merge("cart", updates, options={"rank_share": 1.0}), merge("average", updates))
    centred = [d.double() - sum(updates).double() / 3 for d in updates]
    wanted = sum(updates).double() / 3
    for update in centred:
        u, s, v = torch.linalg.svd(update, full_matrices=False)
        wanted = wanted + s[0] * torch.outer(u[:, 0], v[0])
    near(merge("cart", updates), wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_wudi_closed_is_a_stationary_point_of_its_objective(shape: tuple[int, int]) -> None:
    updates = [d.double() for d in random(3, shape)]
    found = merge("wudi_closed", updates, options={"ridge": 0.0}).requires_grad_()
    loss = sum(((found - d) @ d.T).square().sum() / d.square().sum() for d in updates)
    loss.backward()
    near(found.grad, torch.zeros(shape), 1e-8)


def test_wudi_equals_adam_on_its_objective() -> None:
    updates = random(3, (8, 6))
    point = sum(updates).double().requires_grad_()
    optimiser = torch.optim.Adam([point], lr=1e-3)
    for _ in range(20):
        optimiser.zero_grad()
        loss = sum(
            ((point - d) @ d.double().T).square().sum() / d.double().square().sum() for d in updates
        )
        loss.backward()
        optimiser.step()
    found = merge("wudi", updates, options={"steps": 20, "learning_rate": 1e-3})
    near(found, point.detach(), 1e-6)


@given(st.integers(0, 100))
def test_knots_by_the_mean_is_the_average(seed: int) -> None:
    updates = random(3, (12, 10), seed, rank=2)
    near(merge("knots", updates, options={"signs": "all"}), sum(updates) / 3, 1e-4)


def test_knots_stays_in_the_column_space_of_the_updates() -> None:
    updates = random(3, (12, 10), rank=2)
    basis = torch.linalg.svd(torch.cat(updates, 1).double(), full_matrices=False)[0][:, :6]
    found = merge("knots", updates)
    near(basis @ (basis.T @ found), found)
    assert found.any()


def test_core_space_loses_nothing() -> None:
    updates = random(3, (12, 10), rank=2)
    compact = merge("iso_c", updates, options={"compact": True})
    level = torch.linalg.svdvals(merge("core_space", updates))[:6]
    # The core is 6 x 6 and full: flat at the mean over the directions that exist.
    near(level, torch.linalg.svdvals(compact)[:6])
    near(merge("core_space", updates), compact, 1e-4)
    tsv = merge("core_space", updates, options={"inner": "tsv_m"})
    near(tsv, merge("tsv_m", updates, options={"rank": 2}), 1e-4)


def test_dc_merge_of_experts_apart_is_their_mean_of_what_agrees() -> None:
    updates = []
    for t, block in enumerate(random(3, (4, 4))):
        update = torch.zeros(12, 12)
        update[4 * t : 4 * t + 4, 4 * t : 4 * t + 4] = block
        updates.append(update)
    near(merge("dc_merge", updates, options={"density": 1.0}), sum(updates), 1e-4)


def moments(num_inputs: int, count: int = 3) -> list[Moment]:
    inputs = [x.double() for x in random(count, (50, num_inputs), 5)]
    return [Moment("input", x.T @ x / 50, 50) for x in inputs]


def test_regmean_of_equal_moments_is_the_average() -> None:
    updates, seen = random(3, (12, 8)), moments(8)
    equal = [seen[0]] * 3
    near(merge("regmean", updates, moments=equal, options={"ridge": 0.0}), sum(updates) / 3)
    near(merge("regmean", [updates[0]] * 3, moments=seen), updates[0], 1e-4)


def test_regmean_minimises_what_it_says() -> None:
    updates, seen = [d.double() for d in random(3, (12, 8))], moments(8)
    options = {"rho": 1.0, "ridge": 0.0}
    found = merge("regmean", updates, moments=seen, options=options).requires_grad_()
    loss = sum(
        torch.trace((found - d) @ m.matrix @ (found - d).T)
        for d, m in zip(updates, seen, strict=True)
    )
    loss.backward()
    near(found.grad, torch.zeros(12, 8), 1e-8)


def test_regmean_without_correlations_weighs_every_input_apart() -> None:
    updates, seen = random(3, (12, 8)), moments(8)
    weights = torch.stack([m.matrix.diagonal() for m in seen]).unsqueeze(1)
    wanted = (torch.stack(updates) * weights).sum(0) / weights.sum(0)
    near(merge("regmean", updates, moments=seen, options={"rho": 0.0}), wanted, 1e-4)


def test_weights_multiply_updates() -> None:
    updates = random(2, (8, 6))
    for method in ("iso_c", "iso_cts", "cart", "knots", "tsv_m"):
        weighed = merge(method, updates, weights=[1.0, -0.5])
        near(weighed, merge(method, [updates[0], -0.5 * updates[1]]))
