"""Merges by other methods than ESM through the whole engine, against the same method in memory."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeZoo, PlanOf, Run, merge_here
from merging import merge as merge_one
from merging import merge_all
from models import Zoo, change_tensors, tensors_of
from test_forward import watch
from torch import Tensor

from esm_stream import stopping
from esm_stream.errors import ManifestError, StopRequestedError
from esm_stream.events import Event
from esm_stream.methods import create
from esm_stream.methods.contract import ElementwiseMethod
from esm_stream.stages import panels, write

EXPERTS = 3


def in_memory(
    zoo: Zoo, method: str, options: Mapping[str, Any], weights: Mapping[str, float], alpha: float
) -> dict[str, Tensor]:
    """The merged model by one elementwise method on all tensors."""
    base = tensors_of(zoo.base)
    tuned = [tensors_of(path) for path in zoo.experts.values()]
    made = create(method, options, "language")
    assert isinstance(made, ElementwiseMethod)
    tensors = {name: (w, [one[name] - w for one in tuned]) for name, w in base.items()}
    names = tuple(zoo.experts)
    updates = merge_all(made, tensors, names, tuple(weights.get(n, 1.0) for n in names))
    return {name: base[name] + alpha * update for name, update in updates.items()}


def same(found: Path, expected: Mapping[str, Tensor]) -> None:
    merged = tensors_of(found)
    assert set(merged) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, msg=name)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {"normalize": False}),
        ("task_arithmetic", {}),
        ("ties", {"density": 0.3}),
        ("ties", {"density": 0.3, "trim": "tensor", "zero_sign": "majority"}),
        ("dare", {"rescale": "l1", "seed": 5}),
    ],
)
def test_merge_equals_the_method_in_memory(
    zoo: MakeZoo, run: Run, method: str, options: dict[str, Any]
) -> None:
    found = zoo("llama", experts=EXPERTS)
    weights = {next(iter(found.experts)): 0.5}
    merge = {"method": method, "alpha": 0.7, "options": options, "weights": weights}
    same(run(found, merge=merge), in_memory(found, method, options, weights, 0.7))


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "cart", "wudi_closed", "core_space"])
def test_matrices_equal_the_method_in_memory(zoo: MakeZoo, run: Run, method: str) -> None:
    found = zoo("llama", experts=EXPERTS)
    weights = {next(iter(found.experts)): 0.5}
    base = tensors_of(found.base)
    tuned = [tensors_of(path) for path in found.experts.values()]
    merged = tensors_of(run(found, merge={"method": method, "alpha": 0.7, "weights": weights}))
    for name, value in base.items():
        updates = [one[name] - value for one in tuned]
        outside = method == "wudi_closed" and ".layers." not in name
        used = method if value.ndim == 2 and not outside else "average"
        update = merge_one(used, updates, weights=[0.5, 1.0, 1.0])
        alpha = 0.7 if used == method else 1.0
        expected = value + alpha * update.float()
        torch.testing.assert_close(merged[name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_regmean_equals_its_definition(zoo: MakeZoo, run: Run) -> None:
    found = zoo("llama", experts=2)
    watched = [watch(found, expert) for expert in found.experts]
    output = run(found, merge={"method": "regmean", "alpha": 0.5, "options": {"rho": 0.7}})
    merged, base = tensors_of(output), tensors_of(found.base)
    tuned = [tensors_of(path) for path in found.experts.values()]
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        key = f"model.layers.1.{name}.weight"
        moments = []
        for one in watched:
            x = torch.cat(one.inputs[f"model.layers.1.{name}"]).double()
            moment = x.T @ x / len(x)
            moments.append(0.7 * moment + 0.3 * torch.diag(moment.diagonal()))
        updates = [one[key].double() - base[key].double() for one in tuned]
        total = sum(moments)
        total += 1e-6 * total.trace() / len(total) * torch.eye(len(total))
        target = sum(d @ m for d, m in zip(updates, moments, strict=True))
        expected = base[key] + 0.5 * (target @ torch.linalg.inv(total)).float()
        torch.testing.assert_close(merged[key], expected, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_panels_change_no_bit(
    zoo: MakeZoo, run: Run, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    found = zoo("llama", experts=EXPERTS)
    whole = run(found, "whole", merge={"method": method})
    monkeypatch.setattr(panels, "panel_elements", lambda _, columns=1: 5 * columns)
    monkeypatch.setattr(write, "GATHERED_BYTES", 120)
    cut = run(found, "cut", merge={"method": method})
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_a_stopped_sweep_goes_on_to_the_same_bytes(
    zoo: MakeZoo, plan_of: PlanOf, run: Run, after: int
) -> None:
    found = zoo("llama", experts=EXPERTS)
    whole = run(found, "whole", merge={"method": "ties"})
    plan = plan_of(found, merge={"method": "ties"})
    finished: list[str] = []

    def stop(event: Event) -> None:
        if event.kind == "task_finished":
            finished.append(event.task)
            if len(finished) == after:
                stopping.request()

    with pytest.raises(StopRequestedError):
        merge_here(plan, stop)
    outcome = merge_here(plan)
    assert outcome.tasks_reused == after
    merged = plan.output / "model.safetensors"
    assert merged.read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_tensor_that_nobody_changed_keeps_its_bytes(
    zoo: MakeZoo, run: Run, tmp_path: Path
) -> None:
    found = zoo("llama", experts=EXPERTS).copy(tmp_path / "zoo")
    change_tensors(found.base, {"model.norm.weight": lambda w: torch.full_like(w, -0.0)})
    unchanged = replace(found, experts=dict.fromkeys(found.experts, found.base))
    for method in ("average", "linear", "task_arithmetic", "ties", "dare"):
        output = run(unchanged, method, merge={"method": method})
        wanted = (found.base / "model.safetensors").read_bytes()
        assert (output / "model.safetensors").read_bytes() == wanted, method


def test_lists_over_depth_give_every_block_its_own(zoo: MakeZoo, plan_of: PlanOf) -> None:
    found = zoo("llama", experts=EXPERTS)
    first = next(iter(found.experts))
    plan = plan_of(
        found,
        merge={
            "method": "ties",
            "alpha": [0.2, 0.4],
            "weights": {first: [1.0, 3.0]},
            "options": {"density": [0.1, 0.5], "trim": "tensor"},
            "rules": [{"kinds": ["down"], "alpha": [1.0, 2.0], "weights": {first: 5.0}}],
        },
    )
    last = max(t for t in plan.tensors if ".layers." in t and "up_proj" in t)
    treated = plan.tensors[last]
    assert treated.method is not None
    assert (treated.alpha, treated.method.options["density"]) == (0.4, 0.5)
    assert treated.method.weights == (3.0, 1.0, 1.0)
    outside = plan.tensors["model.embed_tokens.weight"]
    assert outside.method is not None
    assert (outside.alpha, outside.method.options["density"]) == (0.2, 0.1)
    ruled = plan.tensors[last.replace("up_proj", "down_proj")]
    assert ruled.method is not None
    assert (ruled.alpha, ruled.method.weights) == (2.0, (5.0, 1.0, 1.0))


def test_a_rule_can_copy_from_an_expert(zoo: MakeZoo, run: Run) -> None:
    found = zoo("llama", experts=EXPERTS)
    name = list(found.experts)[1]
    rules = [{"tensors": "*embed*", "method": "expert", "expert": name}]
    merged = tensors_of(run(found, merge={"method": "average", "rules": rules}))
    wanted = tensors_of(found.experts[name])
    assert torch.equal(merged["model.embed_tokens.weight"], wanted["model.embed_tokens.weight"])
    assert not torch.equal(merged["model.norm.weight"], wanted["model.norm.weight"])


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ({"method": "ties", "options": {"density": [0.2, 1.5]}}, "method 'ties': density"),
        ({"method": "ties", "options": {"density": {"nobody": 0.2}}}, "wants a value for each of"),
        ({"method": "linear", "weights": {"nobody": 1.0}}, "there is no expert 'nobody'"),
        ({"method": "esm", "weights": {"e0": 1.0}}, "has no weights; leave them out"),
        (
            {"rules": [{"method": "expert", "expert": "nobody"}]},
            "there is no expert 'nobody'",
        ),
        ({"rules": [{"method": "expert"}]}, "go together"),
        ({"rules": [{"method": "base", "alpha": 1.0}]}, "neither alpha nor weights"),
    ],
)
def test_a_mistake_in_weights_or_rules_is_answered_by_name(
    zoo: MakeZoo, plan_of: PlanOf, merge: dict[str, Any], message: str
) -> None:
    found = zoo("llama", experts=EXPERTS)
    with pytest.raises(ManifestError, match=message):
        plan_of(found, merge=merge)


def test_a_merge_without_data_needs_neither_transformers_nor_zarr(
    zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    plan_of(zoo("llama", experts=EXPERTS), merge={"method": "ties"})
    program = (
        "import sys; from pathlib import Path; from esm_stream import engine;"
        "from esm_stream.manifest import load_manifest;"
        "from esm_stream.planning.make import make_plan;"
        f"plan = make_plan(load_manifest(Path({str(tmp_path / 'merged.toml')!r})));"
        "engine.merge(plan);"
        "sys.exit(bool({'transformers', 'zarr', 'distributed'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
