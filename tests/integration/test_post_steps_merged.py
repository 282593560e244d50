"""[merge.post] through the whole engine, against the same steps in memory."""

import pytest
import torch
from conftest import MakeZoo, PlanOf, Run, merge_here
from merging import merge as merge_one
from models import Zoo, tensors_of
from torch import Tensor

from esm_stream.checkpoints.names import block_of, role_of
from esm_stream.engine import merge
from esm_stream.errors import ManifestError
from esm_stream.events import Event
from esm_stream.scaling.singular import calibrated

EXPERTS = 3
BLOCKS = 2


def updates_of(zoo: Zoo) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    base = tensors_of(zoo.base)
    tuned = [tensors_of(path) for path in zoo.experts.values()]
    return base, {name: [one[name] - value for one in tuned] for name, value in base.items()}


def in_block(name: str, value: Tensor) -> bool:
    return value.ndim == 2 and block_of(name) is not None


def same(merged: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value.float(), rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "tsv_m"])
def test_calibration_of_singular_values_of_any_method(zoo: MakeZoo, run: Run, method: str) -> None:
    found = zoo("llama", experts=EXPERTS)
    options = {"trim": "tensor"} if method == "ties" else {}
    document = {"method": method, "alpha": 0.7, "options": options}
    base, updates = updates_of(found)
    plain = tensors_of(run(found, "plain", merge=document))
    merged = tensors_of(run(found, "svc", merge={**document, "post": {"svc": 0.5}}))
    for name, value in base.items():
        if in_block(name, value):
            update = merge_one(method, updates[name], options=options)
            update, _ = calibrated(update, updates[name], 0.5)
            same(merged, {name: value + 0.7 * update})
            assert not torch.equal(merged[name], plain[name])
        else:
            assert torch.equal(merged[name], plain[name]), name


def test_a_threshold_of_the_whole_model_is_the_same_with_calibration(
    zoo: MakeZoo, run: Run
) -> None:
    found = zoo("llama", experts=EXPERTS)
    document = {"method": "ties", "alpha": 0.7}
    plain = run(found, "plain", merge=document)
    # A floor no projection exceeds: each factor is T / (T * floor).
    merged = tensors_of(run(found, "svc", merge={**document, "post": {"svc": 1e6}}))
    base, before = tensors_of(found.base), tensors_of(plain)
    for name, value in base.items():
        expected = value if in_block(name, value) else before[name]
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize("method", ["task_arithmetic", "iso_c"])
def test_layers_are_scaled_by_their_norms(zoo: MakeZoo, run: Run, method: str) -> None:
    found = zoo("llama", experts=EXPERTS)
    base, updates = updates_of(found)
    names = [name for name, value in base.items() if in_block(name, value)]
    one = {name: merge_one(method, updates[name]).float() for name in names}
    expected = {}
    for name in names:
        norms = [float(one[n].norm()) for n in names if role_of(n) == role_of(name)]
        assert len(norms) == BLOCKS
        scale = (float(one[name].norm()) / (sum(norms) / BLOCKS)) ** 2
        expected[name] = base[name] + 0.7 * scale * one[name]
    merged = run(found, merge={"method": method, "alpha": 0.7, "post": {"layers": 2.0}})
    same(tensors_of(merged), expected)


@pytest.mark.parametrize(
    ("method", "extra"), [("task_arithmetic", {}), ("ties", {}), ("iso_c", {"layers": 1.0})]
)
def test_the_first_factor_of_lines_makes_the_merge_as_large_as_the_mean(
    zoo: MakeZoo, run: Run, method: str, extra: dict[str, float]
) -> None:
    found = zoo("llama", experts=EXPERTS)
    base, updates = updates_of(found)
    plain = {"method": method, "alpha": 1.0, "post": extra}
    whole = tensors_of(run(found, "plain", merge=plain))
    merged_norm = sum(float((whole[n] - v).double().abs().sum()) for n, v in base.items())
    sums = {name: torch.stack(ones).double().sum(0) for name, ones in updates.items()}
    first = sum(float(d.abs().sum()) for d in sums.values()) / EXPERTS / merged_norm
    document = {"method": method, "post": {**extra, "lines": {"b": 0.3}}}
    merged = tensors_of(run(found, "lines", merge=document))
    for name, value in base.items():
        depth = (block_of(name) or 0) / (BLOCKS - 1)
        expected = value + (first + 0.3 * depth) * (whole[name] - value)
        torch.testing.assert_close(merged[name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_lines_with_a_given_factor_is_alpha_over_depth(zoo: MakeZoo, run: Run) -> None:
    found = zoo("llama", experts=EXPERTS)
    lines = {"method": "linear", "post": {"lines": {"a": 0.2, "b": 0.6}}}
    graded = {"method": "linear", "alpha": [0.2, 0.8]}
    one, other = run(found, "lines", merge=lines), run(found, "graded", merge=graded)
    same(tensors_of(one), tensors_of(other))


def test_alpha_afterwards_is_for_everything_merged(zoo: MakeZoo, run: Run) -> None:
    found = zoo("llama", experts=EXPERTS)
    base = tensors_of(found.base)
    whole = tensors_of(run(found, "whole", merge={"method": "iso_c", "alpha": 0.6}))
    document = {"method": "iso_c", "alpha": 0.6, "post": {"alpha": 0.5}}
    half = tensors_of(run(found, "half", merge=document))
    same(half, {name: (whole[name] + value) / 2 for name, value in base.items()})


def test_layers_that_the_profile_scales_are_not_scaled_twice(zoo: MakeZoo, plan_of: PlanOf) -> None:
    merge = {"options": {"levels": ["layer"]}, "post": {"layers": 2.0}}
    with pytest.raises(ManifestError, match=r"merge\.post\.layers: the method's profile scales"):
        plan_of(zoo("llama"), merge=merge)


def test_another_slope_of_lines_merges_no_matrix_again(zoo: MakeZoo, plan_of: PlanOf) -> None:
    found, ran = zoo("llama", experts=EXPERTS), []

    def listen(event: Event) -> None:
        if event.kind == "task_finished":
            ran.append(event.stage)

    document = {"method": "iso_c", "post": {"lines": {"b": 0.3}}}
    merge_here(plan_of(found, merge=document))
    document["post"] = {"lines": {"b": 0.4}}
    merge(plan_of(found, merge=document), restart=True, listener=listen)
    assert set(ran) == {"write", "seal", "finish"}
