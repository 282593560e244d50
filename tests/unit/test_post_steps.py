"""Scaling after a merge: LiNeS and singular value calibration on worked examples."""

import pytest
import torch
from torch import Tensor

from esm_stream.scaling.lines import factor, first_factor
from esm_stream.scaling.singular import calibrated

SHAPES = [(6, 6), (6, 15), (15, 6)]


def test_lines_grows_linearly_from_a_to_a_plus_b() -> None:
    found = [round(factor(0.1, 0.9, block / 11), 3) for block in range(12)]
    assert found[:3] == [0.1, 0.182, 0.264]
    assert found[-1] == 1.0


def test_lines_gives_a_sum_the_magnitude_of_the_mean() -> None:
    assert first_factor(12.0, 12.0, 4) == 0.25
    assert first_factor(12.0, 3.0, 4) == 1.0
    assert first_factor(0.0, 0.0, 4) == 0.0


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_definition(update: Tensor, updates: list[Tensor], floor: float) -> Tensor:
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    scaled = []
    for u, value, v in zip(left.T, values, right, strict=True):
        own, total = value * v, 0.0
        for one in updates:
            other = u @ one
            total += max(floor, float(own @ other / max(float(other @ other), 1e-12)))
        scaled.append(len(updates) / total * value)
    return (left * torch.stack(scaled)) @ right


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("floor", [0.2, 1.0])
def test_calibration_is_its_definition(shape: tuple[int, int], floor: float) -> None:
    updates = [random(*shape, seed=seed) for seed in range(3)]
    update = sum(updates[1:], updates[0]) + 0.1 * random(*shape, seed=9)
    found, _ = calibrated(update, updates, floor)
    torch.testing.assert_close(found, by_definition(update, updates, floor))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_sum_of_equal_experts_becomes_one_of_them(shape: tuple[int, int]) -> None:
    one = random(*shape, seed=0)
    found, factors = calibrated(4 * one, [one] * 4, 1.0)
    torch.testing.assert_close(found, one)
    torch.testing.assert_close(factors, torch.full_like(factors, 0.25))


@pytest.mark.parametrize("shape", SHAPES)
def test_experts_with_nothing_in_common_stay_as_they_are(shape: tuple[int, int]) -> None:
    updates = [torch.zeros(shape, dtype=torch.float64) for _ in range(2)]
    updates[0][:3, :3] = random(3, 3, seed=0)
    updates[1][3:, 3:] = random(shape[0] - 3, shape[1] - 3, seed=1)
    update = updates[0] + updates[1]
    found, _ = calibrated(update, updates, 1.0)
    torch.testing.assert_close(found, update)


def test_nothing_stays_nothing() -> None:
    zero = torch.zeros(4, 7)
    found, _ = calibrated(zero, [zero, zero], 1.0)
    assert not found.any()
