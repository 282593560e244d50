"""Numbers small enough to check by hand: methods.md 1.6."""

import pytest
import torch
from torch import Tensor

from esm_stream.methods import create, is_factor_method
from esm_stream.methods.contract import Merged, Moment
from esm_stream.methods.esm import eigenvalue_weights
from esm_stream.scaling import Variant, relative_powers
from esm_stream.scaling.dimension import column_factors
from esm_stream.scaling.layer import layer_scales
from esm_stream.scaling.task import task_factors

UPDATES = ([[2.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 3.0]])
SCALED = {"levels": ["task", "dimension"], "eigenvalue_exponent": 0}


def merge(name: str, **options: object) -> Merged:
    method = create(name, options, "language")
    moment = Moment("input", torch.eye(2, dtype=torch.float64), 2)
    factors = [method.factor(torch.tensor(update), moment, 2) for update in UPDATES]
    return method.combine(factors, (2, 2))


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_core_without_scaling() -> None:
    merged = merge("esm", levels=[], eigenvalue_exponent=0)
    close(merged.update_OI, matrix([2.514911, 0.408114], [-0.408114, 2.514911]))
    assert merged.diagnostics["ranks"] == [1, 1]
    assert merged.diagnostics["energy_kept"] == pytest.approx([0.8, 1.0])


def test_weights_of_a_single_direction_change_nothing() -> None:
    close(
        merge("esm", levels=[], eigenvalue_exponent=0.15).update_OI,
        matrix([2.514911, 0.408114], [-0.408114, 2.514911]),
    )


def test_task_and_dimension_scaling_with_the_full_norm() -> None:
    found = merge("esm", **SCALED).update_OI
    close(found, matrix([5.036614, 0.817330], [-0.817330, 5.036614]))


def test_task_and_dimension_scaling_with_the_truncated_norm() -> None:
    found = merge("esm", **SCALED, task_norm="truncated").update_OI
    close(found[0], torch.tensor([5.986928, 0.971545], dtype=torch.float64))


def test_the_constant_factor_multiplies_the_update() -> None:
    single, double = merge("esm", factor=1.0), merge("esm", factor=2.0)
    close(double.update_OI, 2 * single.update_OI)


def test_tsv_m() -> None:
    found = merge("tsv_m").update_OI
    close(found, matrix([1.974175, 0.506541], [-0.320364, 3.121445]))


def test_tsv_m_times_the_mean_singular_values() -> None:
    # Left vectors (1, 0) and (1, 3)/sqrt(10), right vectors (1, 0) and (0, 1): the means of
    # sqrt(1 +- 1/sqrt(10)) and of 1.
    cosine = 10**-0.5
    mean = ((1 + cosine) ** 0.5 + (1 - cosine) ** 0.5) / 2
    plain, scaled = merge("tsv_m"), merge("tsv_m", mean_singular_factor=True)
    close(scaled.update_OI, mean * plain.update_OI)


def test_eigenvalue_weights() -> None:
    found = eigenvalue_weights(torch.tensor([16.0, 8.0], dtype=torch.float64), 0.15)
    close(found, torch.tensor([1.051939, 0.948061], dtype=torch.float64))


def test_eigenvalue_weights_of_power_zero_are_one() -> None:
    found = eigenvalue_weights(torch.tensor([16.0, 8.0], dtype=torch.float64), 0.0)
    assert found.tolist() == [1.0, 1.0]


def test_layer_scales() -> None:
    assert layer_scales({"a": 1.0, "b": 2.0, "c": 3.0}) == {"a": 0.25, "b": 1.0, "c": 2.25}


def test_a_uniform_group_scales_by_one() -> None:
    assert layer_scales({"a": 0.7, "b": 0.7}) == pytest.approx({"a": 1.0, "b": 1.0})


def test_a_group_without_any_update_stays_unscaled() -> None:
    assert layer_scales({"a": 0.0, "b": 0.0}) == {"a": 1.0, "b": 1.0}
    assert layer_scales({}) == {}


def test_a_layer_without_update_counts_in_the_mean_of_its_group() -> None:
    assert layer_scales({"a": 0.0, "b": 2.0}, exponent=1.0) == {"a": 0.0, "b": 2.0}


def test_task_factors() -> None:
    assert task_factors([1.0, 3.0], 2.0) == [0.25, 2.25]
    assert task_factors([0.0, 3.0], 2.0) == [0.0, 4.0]
    assert task_factors([0.0, 0.0], 2.0) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("variant", "wanted"),
    [
        ("both", [0.0, 0.25, 1.0, 2.25]),
        ("reverse", [0.0, 4.0, 1.0, 1 / 2.25]),
        ("noise", [0.0, 0.25, 1.0, 1.0]),
        ("signal", [1.0, 1.0, 1.0, 2.25]),
    ],
)
def test_variants_of_polarised_scaling(variant: Variant, wanted: list[float]) -> None:
    # The mean of 0, 1, 2, 3 and 4 is 2.
    norms = [0.0, 1.0, 2.0, 3.0]
    found = relative_powers([*norms, 4.0], 2.0, variant)[:4]
    assert found == pytest.approx(wanted)
    columns = column_factors(torch.tensor([[*norms, 4.0]]), 2.0, variant)[:4]
    assert columns.tolist() == pytest.approx(wanted)


def test_variants_change_the_merge_and_only_where_a_level_is_on() -> None:
    options = {"profile": "vit-official", "levels": ["task"]}
    first, second = (torch.randn(6, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 2))

    def merged(**more: object) -> torch.Tensor:
        method = create("esm", {**options, **more}, "vision")
        assert is_factor_method(method)
        factors = [method.factor(update, None, 2) for update in (first, 3 * second)]
        return method.combine(factors, (6, 8)).update_OI

    assert not torch.allclose(merged(variant="reverse"), merged())
    assert torch.equal(merged(variant="reverse", levels=[]), merged(levels=[]))


def test_column_factors() -> None:
    assert column_factors(torch.tensor([[3.0, 0.0], [4.0, 15.0]]), 2.0).tolist() == [0.25, 2.25]
    assert column_factors(torch.tensor([[0.0, 3.0]]), 2.0).tolist() == [0.0, 4.0]
    assert column_factors(torch.zeros(3, 2), 2.0).tolist() == [1.0, 1.0]
