"""Worked examples and invariants of the elementwise methods (methods.md 3.1)."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merging import NAME, merge, merge_all
from torch import Tensor

from esm_stream.errors import ManifestError
from esm_stream.methods import create
from esm_stream.methods.chance import words
from esm_stream.methods.contract import Sums
from esm_stream.methods.thresholds import (
    bins_of,
    count_high,
    count_low,
    drop_above,
    keep_at_least,
    values_of,
    values_within_bins,
)

FIRST = [0.5, -0.1, 0.3, 0.02, -0.9]
SECOND = [0.4, 0.2, -0.6, 0.01, 0.1]
THIRD = [-0.2, 0.1, 0.4, -0.03, 0.05]
EXAMPLE = [torch.tensor(row) for row in (FIRST, SECOND, THIRD)]


def random(count: int, shape: Sequence[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tuple(shape), generator=generator) for _ in range(count)]


def near(found: Tensor, wanted: Tensor | Sequence[float], tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(
        found.double(), torch.as_tensor(wanted).double(), rtol=tolerance, atol=tolerance
    )


def test_average_and_linear_are_the_mean_of_the_weights() -> None:
    base, experts = random(1, (4, 6), 9)[0], random(3, (4, 6))
    updates = [w - base for w in experts]
    near(base + merge("average", updates, base=base), sum(experts) / 3)
    shares = [0.5, 0.25, 1.0]
    mean = sum(a * w for a, w in zip(shares, experts, strict=True)) / sum(shares)
    near(base + merge("linear", updates, base=base, weights=shares), mean)
    near(base + merge("average", updates, base=base, weights=shares), mean)
    total = merge("linear", updates, base=base, weights=shares, options={"normalize": False})
    near(base + total, sum(a * w for a, w in zip(shares, experts, strict=True)))


def test_task_arithmetic_is_the_sum_of_the_updates() -> None:
    updates = random(3, (5, 4))
    near(merge("task_arithmetic", updates), sum(updates))
    near(
        merge("task_arithmetic", updates, weights=[1, -2, 0.5]),
        updates[0] - 2 * updates[1] + 0.5 * updates[2],
    )
    near(merge("task_arithmetic", updates, options={"normalize": True}), merge("average", updates))


@pytest.mark.parametrize("trim", ["tensor", "global"])
@pytest.mark.parametrize("zero_sign", ["plus", "majority"])
def test_ties_worked_example(trim: str, zero_sign: str) -> None:
    options = {"density": 0.4, "trim": trim, "zero_sign": zero_sign}
    near(merge("ties", EXAMPLE, options=options), [0.45, 0, -0.6, 0, -0.9])
    near(merge("ties", EXAMPLE, options={**options, "normalize": False}), [0.9, 0, -0.6, 0, -0.9])


def test_ties_without_a_trim_needs_no_sweep_and_averages_what_agrees() -> None:
    assert create("ties", {"density": 1.0}, "language").sweeps == 0
    found = merge(
        "ties", [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -5.0])], options={"density": 1}
    )
    near(found, [2.0, -5.0])


def test_ties_weighs_what_agrees() -> None:
    updates = [torch.tensor([1.0, 1.0]), torch.tensor([2.0, -1.0])]
    found = merge("ties", updates, weights=[1.0, 3.0], options={"density": 1.0})
    near(found, [7 / 4, -1.0])


def test_ties_elects_the_majority_where_updates_cancel() -> None:
    first = torch.tensor([1.0, -1.0, -1.0, -2.0])
    second = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    minus = merge("ties", [first, second], options={"density": 1.0, "zero_sign": "majority"})
    plus = merge("ties", [first, second], options={"density": 1.0})
    near(minus, [-1.0, -1.0, -1.0, -1.5])
    near(plus, [1.0, -1.0, -1.0, -1.5])


def test_ties_trims_the_whole_model_or_each_tensor() -> None:
    large, small = [100 * d.sign() + d for d in random(2, (6, 5))], random(2, (6, 5), 1)
    tensors = {"a": (torch.zeros(6, 5), large), "b": (torch.zeros(6, 5), small)}
    names, weights = ("e0", "e1"), (1.0, 1.0)
    options = {"density": 0.5, "normalize": False}
    whole = merge_all(create("ties", options, "language"), tensors, names, weights, 7)
    assert not whole["b"].any()
    near(whole["a"], merge("ties", large, options={**options, "density": 1.0}))
    alone = {**options, "trim": "tensor"}
    each = merge_all(create("ties", alone, "language"), tensors, names, weights, 7)
    near(each["b"], merge("ties", small, options=alone))
    assert each["b"].any()


def test_ties_by_expert_keeps_another_share_of_each() -> None:
    options = {"density": {"e0": 0.2, "e1": 1.0}, "trim": "tensor", "normalize": False}
    found = merge("ties", [torch.arange(1.0, 11.0), torch.ones(10)], options=options)
    near(found, [1.0] * 8 + [10.0, 11.0])


def test_approximate_trim_is_near_the_exact_one() -> None:
    updates = random(3, (300, 40))
    exact = merge("ties", updates)
    near_exact = merge("ties", updates, options={"trim": "global-approx"})
    assert 0 < float((exact - near_exact).norm() / exact.norm()) < 0.1


@given(
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    data=st.data(),
)
def test_order_statistics_are_exact_and_do_not_depend_on_panels(
    values: list[float], cuts: list[int], data: st.DataObject
) -> None:
    row = torch.tensor(values)
    ranks = sorted(data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=3)))
    edges = sorted({0, len(values), *(c for c in cuts if c < len(values))})
    panels = [row[a:b].unsqueeze(0) for a, b in itertools.pairwise(edges)]
    sums: Sums = {}
    for panel in panels:
        count_high(panel, sums)
    bins, within = bins_of(sums["high"], [ranks])
    for panel in panels:
        count_low(panel, bins, sums)
    found = values_of(sums["low"], bins, within)
    assert found.tolist() == [row.abs().sort().values[ranks].tolist()]
    roughly = values_within_bins(sums["high"], bins, within)
    torch.testing.assert_close(roughly, found, rtol=0.04, atol=1e-38)


@given(st.lists(st.floats(-10, 10, width=32), min_size=1), st.floats(0, 10, width=32))
def test_thresholds_keep_exactly_what_they_say(values: list[float], threshold: float) -> None:
    for row in (torch.tensor(values), torch.tensor(values, dtype=torch.float64)):
        kept, dropped = keep_at_least(row.clone(), threshold), drop_above(row, threshold)
        assert torch.equal(kept, torch.where(row.abs() >= threshold, row, 0.0))
        assert torch.equal(dropped, torch.where(row.abs() <= threshold, row, 0.0))


@given(start=st.integers(0, 100), count=st.integers(0, 50))
def test_random_words_depend_on_the_element_alone(start: int, count: int) -> None:
    whole = words(3, "math", NAME, 0, 200)
    assert np.array_equal(words(3, "math", NAME, start, count), whole[start : start + count])


def test_random_words_differ_by_seed_expert_and_tensor() -> None:
    found = [words(0, "a", "x", 0, 8), words(1, "a", "x", 0, 8), words(0, "b", "x", 0, 8)]
    found.append(words(0, "a", "y", 0, 8))
    assert len({row.tobytes() for row in found}) == 4


def test_dare_without_drops_is_task_arithmetic() -> None:
    updates = random(3, (5, 4))
    near(merge("dare", updates, options={"density": 1.0}), sum(updates))


def test_dare_has_the_update_as_its_mean_over_seeds() -> None:
    update = random(1, (50, 4))
    found = [merge("dare", update, options={"seed": seed}) for seed in range(400)]
    kept = torch.stack(found)
    assert set((kept / update[0]).round(decimals=4).unique().tolist()) == {0.0, 2.0}
    assert float((kept.mean(0) - update[0]).norm() / update[0].norm()) < 0.1


def test_dare_by_l1_keeps_the_norm_of_every_update() -> None:
    update = random(1, (50, 40))
    found = merge("dare", update, options={"rescale": "l1", "density": 0.3}, length=13)
    assert float(found.abs().sum() / update[0].abs().sum()) == pytest.approx(1.0)
    assert 0.25 < float((found != 0).double().mean()) < 0.35


def test_dare_draws_for_every_expert_by_its_name() -> None:
    updates = [torch.ones(1000), torch.ones(1000)]
    both = merge("dare", updates, options={"rescale": "none"})
    assert set(both.unique().tolist()) == {0.0, 1.0, 2.0}
    turned = merge("dare", updates, experts=["e1", "e0"], options={"rescale": "none"})
    assert torch.equal(both, turned)


def test_dare_can_elect_signs() -> None:
    updates = random(3, (5, 4))
    options = {"density": 1.0, "signs": "elected", "normalize": True}
    near(merge("dare", updates, options=options), merge("ties", updates, options={"density": 1.0}))


def test_consensus_worked_example() -> None:
    near(merge("consensus_ta", EXAMPLE), [0.7, 0.2, 0.1, 0, 0])
    near(merge("consensus_ta", EXAMPLE, options={"agreement": 0}), sum(EXAMPLE))
    assert not merge("consensus_ta", EXAMPLE, options={"agreement": 4}).any()
    near(merge("consensus_ta", EXAMPLE, options={"threshold": 0.0}), sum(EXAMPLE))


def test_breadcrumbs_leaves_out_both_ends() -> None:
    update = torch.arange(1.0, 101.0) * torch.tensor([1.0, -1.0]).repeat(50)
    found = merge("breadcrumbs", [update], options={"density": 0.5, "gamma": 0.1}, length=17)
    wanted = torch.where((update.abs() > 40) & (update.abs() <= 90), update, 0.0)
    assert torch.equal(found, wanted)


def test_breadcrumbs_keeps_the_density_when_both_shares_exceed_one() -> None:
    update = torch.arange(1.0, 101.0)
    found = merge("breadcrumbs", [update], options={"density": 0.98, "gamma": 0.1})
    assert torch.equal(found, torch.where(update <= 98, update, 0.0))


def test_della_keeps_large_elements_more_often() -> None:
    update = torch.arange(1.0, 21.0).repeat(4000, 1)
    options = {"density": 0.5, "epsilon": 0.3, "rescale": "none"}
    kept = (merge("della", [update], options=options, length=999) != 0).double().mean(dim=0)
    wanted = torch.linspace(0.2, 0.8, 20, dtype=torch.float64)
    assert float((kept - wanted).abs().max()) < 0.04


def test_della_by_l1_keeps_the_norm_and_unbiased_keeps_the_mean() -> None:
    update = random(1, (50, 40))
    found = merge("della", update, length=80)
    assert float(found.abs().sum() / update[0].abs().sum()) == pytest.approx(1.0)
    mean = sum(
        merge("della", update, options={"rescale": "unbiased", "seed": seed}) for seed in range(300)
    )
    assert float((mean / 300 - update[0]).norm() / update[0].norm()) < 0.1


def test_della_refuses_probabilities_outside_0_and_1() -> None:
    with pytest.raises(ManifestError, match="have to lie between 0 and 1"):
        create("della", {"density": 0.9}, "language")
    assert create("della", {"density": 1.0}, "language")


def test_sce_by_hand() -> None:
    first, second = torch.tensor([3.0, 1.0, -1.0, 0.0]), torch.tensor([1.0, 1.0, 2.0, 0.0])
    # Energies 11 and 6; the third element elects +, where only the second expert agrees.
    near(merge("sce", [first, second]), [(11 * 3 + 6) / 17, 1.0, 2.0, 0.0])
    # Of the two elements that differ, one: the third. Energies 1 and 4, only the second agrees.
    near(merge("sce", [first, second], options={"select_topk": 0.5}), [0, 0, 2.0, 0])


def test_ram_by_hand() -> None:
    first, second = torch.tensor([1.0, 2.0, 0.0, 0.0]), torch.tensor([3.0, 1e-6, -4.0, 0.0])
    near(merge("ram", [first, second]), [2.0, 2.0, -4.0, 0.0], 1e-5)
    strengthened = merge("ram", [first, second], options={"gain": 0.5, "gain_limit": 0.2})
    near(strengthened, [2.0, 2.2, -4.4, 0.0], 1e-5)


def test_slerp_worked_example() -> None:
    updates = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])]
    near(merge("slerp", updates), [0.707107, 1.414214])
    near(merge("slerp", updates, options={"t": 0.0}), updates[0])
    near(merge("slerp", updates, options={"t": 1.0}), updates[1])


def test_slerp_interpolates_nearly_parallel_tensors_linearly() -> None:
    base, update = torch.ones(4), torch.tensor([0.01, 0, 0, 0])
    near(merge("slerp", [update, -update], base=base, options={"t": 0.25}), update / 2)


@pytest.mark.parametrize("values", [(1.0, -2.0), (1.0, 3.0, -2.0), (-1.0, -3.0, 2.0, -6.0)])
def test_karcher_mean_of_opposite_directions_is_that_of_most(values: tuple[float, ...]) -> None:
    """Scalars have two directions alone; a tie goes to the first."""
    found = float(merge("karcher", [torch.tensor(value) for value in values]))
    sign = 1 if sum(math.copysign(1, value) for value in values) >= 0 else -1
    assert found == pytest.approx(sign * sum(map(abs, values)) / len(values))


@given(seed=st.integers(0, 100), share=st.floats(0.1, 0.9))
def test_karcher_mean_of_two_is_slerp_of_the_directions(seed: int, share: float) -> None:
    first, second = (w / w.norm() for w in random(2, (6, 3), seed))
    found = merge("karcher", [first, second], weights=[1 - share, share])
    near(found, merge("slerp", [first, second], options={"t": share}), 1e-4)
    scaled = merge("karcher", [3 * first, 5 * second], weights=[1 - share, share])
    near(scaled, found * (3 * (1 - share) + 5 * share), 1e-4)


def test_nuslerp_is_slerp_of_the_updates() -> None:
    base, updates = random(1, (4, 3), 9)[0], random(2, (4, 3))
    found = merge("nuslerp", updates, base=base, weights=[1.0, 3.0])
    near(found, merge("slerp", updates, options={"t": 0.75}))


def test_multislerp_of_equal_updates_is_the_update() -> None:
    update = random(1, (4, 3))[0]
    near(merge("multislerp", [update, update, update]), update)
    near(merge("multislerp", [update, -update], weights=[1.0, 1.0]), torch.zeros(4, 3))


def test_model_stock_worked_example_and_limits() -> None:
    updates = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])]
    near(merge("model_stock", updates), [0.828427, 0.414214])
    rows = merge("model_stock", [u.unsqueeze(0) for u in updates], options={"filter_wise": True})
    near(rows, [[0.828427, 0.414214]])
    near(merge("model_stock", [updates[1]] * 3), updates[1])
    near(merge("model_stock", [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]), [0.0, 0.0])


def test_emr_takes_the_largest_that_agrees() -> None:
    near(merge("emr", [row[:3] for row in EXAMPLE]), [0.5, 0.2, 0.4])
