"""Merges of models with stacked and fused matrices, against the definition in memory.

What the matrices see is found without the code under test: linear modules by their inputs, experts
of mixtures by the tokens that the plain model's router sends them.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeZoo, PlanOf, Run, merge_here
from models import FUSED, Family, Zoo, build, draw_inputs, load, save, tensors_of, tuned
from reference import Variant, esm
from safetensors.torch import save_file
from torch import Tensor, nn

from esm_stream.errors import ManifestError
from esm_stream.planning.plan import Matrix, Plan

Inputs = dict[str, Tensor]
MIXTURES = ["mixtral", "qwen2-moe", "deepseek-v3", "gpt-oss", "llama4"]


def stored_names(family: str, experts: str, number: int) -> dict[str, tuple[str, ...]]:
    """Stored matrices of one expert that see what its first, and its second, product takes."""
    if family in ("gpt-oss", "llama4"):
        return {
            "up": (f"{experts}.gate_up_proj[{number}]",),
            "down": (f"{experts}.down_proj[{number}]",),
        }
    parts = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    prefix = experts.replace(".mlp.", ".block_sparse_moe.") if family == "mixtral" else experts
    gate, up, down = (f"{prefix}.{number}.{part}.weight" for part in parts)
    return {"up": (gate, up), "down": (down,)}


class Watched:
    """A plain model on its samples; what every stored matrix of its blocks sees."""

    def __init__(self, family: str, model: nn.Module, ids: Tensor) -> None:
        self._family = family
        self._seen: dict[str, list[Tensor]] = {}
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if name.endswith(".experts"):
                module.register_forward_pre_hook(self._keep_routed(name))
            elif isinstance(weight, Tensor) and weight.ndim == 2:
                self._keep(module, name)
        with torch.inference_mode():
            for one in ids:
                model(input_ids=one[None], use_cache=False)

    @property
    def inputs(self) -> Inputs:
        return {name: torch.cat(rows).double() for name, rows in self._seen.items()}

    def _keep(self, module: nn.Module, name: str) -> None:
        stored = f"{name}.weight"
        if self._family == "mixtral":
            stored = stored.replace(".mlp.gate", ".block_sparse_moe.gate")

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if x.is_floating_point():
                self._seen.setdefault(stored, []).append(x.reshape(-1, x.shape[-1]).clone())

        module.register_forward_pre_hook(hook)

    def _keep_routed(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            for number, x, mixed in routed(self._family, module, args):
                names = stored_names(self._family, name, number)
                for stored in names["up"]:
                    self._seen.setdefault(stored, []).append(x)
                for stored in names["down"]:
                    self._seen.setdefault(stored, []).append(mixed)

        return hook


def routed(
    family: str, module: nn.Module, args: tuple[Any, ...]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Expert, the tokens it gets, and what lies between its two products."""
    hidden = args[0]
    for number in range(module.num_experts):  # type: ignore[arg-type]
        if family == "llama4":
            x = hidden.view(module.num_experts, -1, hidden.shape[-1])[number]
            x = x[x.abs().sum(dim=1) > 0]
            gate, up = (x @ module.gate_up_proj[number]).chunk(2, dim=-1)
            yield number, x, up * module.act_fn(gate)  # type: ignore[operator]
            continue
        x = hidden[(args[1] == number).any(dim=1)]
        joined = module.gate_up_proj[number]  # type: ignore[index]
        if family == "gpt-oss":
            joined = x @ joined + module.gate_up_proj_bias[number]  # type: ignore[index]
        else:
            joined = x @ joined.T
        yield number, x, module._apply_gate(joined)  # type: ignore[operator]


def watch(zoo: Zoo, family: str) -> list[Inputs]:
    """What every expert's matrices see, in its own forward."""
    return [
        Watched(
            family,
            load(zoo.family, path, torch.float32),
            tensors_of_file(zoo.inputs[name])["input_ids"],
        ).inputs
        for name, path in zoo.experts.items()
    ]


def tensors_of_file(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def value_of(tensors: dict[str, Tensor], matrix: Matrix) -> Tensor:
    """A matrix (O, I) in float64, its parts one under the other."""
    parts = []
    for part in matrix.parts:
        stored = tensors[part.tensor].double()
        stored = stored.flatten(1) if part.slice is None else stored[part.slice]
        stored = stored.T if matrix.transposed else stored
        parts.append(stored[part.start : part.start + part.outputs])
    return torch.cat(parts)


def assert_merged(plan: Plan, zoo: Zoo, inputs: dict[str, list[Tensor]], alpha: float) -> set[str]:
    """Every matrix is what the definition gives; returns those where samples were too few."""
    base, merged = tensors_of(zoo.base), tensors_of(plan.output)
    tuned = [tensors_of(path) for path in zoo.experts.values()]
    fallen = set()
    for matrix in plan.matrices.values():
        updates = [value_of(one, matrix) - value_of(base, matrix) for one in tuned]
        rank = max(1, matrix.outputs // len(tuned))
        seen = inputs[matrix.name]
        few = [len(x) == 0 or (matrix.routed and len(x) < rank) for x in seen]
        if any(few):
            fallen.add(matrix.name)
        # Without samples all inputs count alike.
        seen = [
            torch.eye(matrix.inputs).double() if f else x for x, f in zip(seen, few, strict=True)
        ]
        expected = alpha * esm(updates, seen, Variant())
        error = value_of(merged, matrix) - value_of(base, matrix) - expected
        rounding = 2**-23 * float(value_of(merged, matrix).norm())
        assert float(error.norm()) <= 1e-3 * float(expected.norm()) + rounding, matrix.name
    return fallen


def all_inputs(zoo: Zoo, family: str, plan: Plan) -> dict[str, list[Tensor]]:
    each = watch(zoo, family)
    empty = torch.empty(0, 1).double()
    return {name: [one.get(name, empty) for one in each] for name in plan.matrices}


@pytest.mark.parametrize("name", FUSED)
def test_every_matrix_of_the_blocks_is_merged_by_what_it_sees(
    name: str, zoo: MakeZoo, plan_of: PlanOf
) -> None:
    found = zoo(name)
    plan = plan_of(found, merge={"alpha": 1.2})
    merge_here(plan)
    assert_merged(plan, found, all_inputs(found, name, plan), 1.2)
    merged = {part.tensor for matrix in plan.matrices.values() for part in matrix.parts}
    inside = {
        tensor
        for tensor, value in tensors_of(found.base).items()
        if f"{found.family.blocks}." in tensor
        and (value.ndim == 3 or (value.ndim == 2 and "bias" not in tensor))
    }
    assert merged == inside
    model = load(found.family, plan.output, torch.float32)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_that_see_too_few_tokens_are_merged_from_their_updates_and_reported(
    name: str, zoo: MakeZoo, plan_of: PlanOf
) -> None:
    found = zoo(name, samples=4, seed=3)
    plan = plan_of(
        found,
        merge={"alpha": 1.0, "options": {"rank": 5}} if name == "llama4" else {"alpha": 1.0},
        calibration={"samples": 4, "min_samples": 1},
    )
    merge_here(plan)
    inputs = all_inputs(found, name, plan)
    report = json.loads((plan.output / "report.json").read_text())
    few = {
        (matrix.name, expert)
        for matrix in plan.matrices.values()
        for expert, x in zip(plan.experts, inputs[matrix.name], strict=True)
        if len(x) == 0 or (matrix.routed and len(x) < matrix.rank)
    }
    assert {
        (matrix, expert)
        for matrix, numbers in report["matrices"].items()
        for expert in numbers["without_samples"]
    } == few
    for matrix, numbers in report["matrices"].items():
        assert numbers["tokens"] == {
            expert: len(x) for expert, x in zip(plan.experts, inputs[matrix], strict=True)
        }
    for expert in {expert for _, expert in few}:
        count = sum(one == expert for _, one in few)
        assert any(
            line.startswith(f'expert "{expert}": {count} matrices saw no token')
            for line in report["warnings"]
        )


def test_few_tokens_change_nothing_but_the_basis(zoo: MakeZoo, plan_of: PlanOf) -> None:
    found = zoo("qwen2-moe", samples=2, seed=1)
    plan = plan_of(found, merge={"alpha": 1.0}, calibration={"samples": 2, "min_samples": 1})
    merge_here(plan)
    assert assert_merged(plan, found, all_inputs(found, "qwen2-moe", plan), 1.0)


PHI3 = "model.layers.{}.self_attn.qkv_proj.weight"  # 16 for q, 8 for k, 8 for v


def test_a_fused_matrix_split_by_the_manifest_is_merged_in_parts(
    zoo: MakeZoo, plan_of: PlanOf
) -> None:
    found = zoo("phi3")
    split = [{"tensors": "*.qkv_proj.weight", "parts": [2, 1, 1]}]
    plan = plan_of(found, merge={"alpha": 1.0, "split": split})
    parts = [m for m in plan.matrices.values() if m.parts[0].tensor == PHI3.format(0)]
    assert [(m.name, m.outputs) for m in parts] == [
        (f"{PHI3.format(0)}[part {i}]", n) for i, n in enumerate((16, 8, 8))
    ]
    merge_here(plan)
    inputs = all_inputs(found, "phi3", plan)
    seen = watch(found, "phi3")
    for matrix in plan.matrices.values():
        inputs[matrix.name] = [one[matrix.parts[0].tensor] for one in seen]
    assert_merged(plan, found, inputs, 1.0)


def test_q_k_v_of_each_head_are_split_by_groups(zoo: MakeZoo, plan_of: PlanOf) -> None:
    found = zoo("gpt-neox")  # rows: q, k, v of head 0, of head 1, ...
    split = [{"tensors": "*.query_key_value.weight", "parts": [1, 1, 1], "groups": 4}]
    plan = plan_of(found, merge={"alpha": 1.0, "split": split})
    name = "gpt_neox.layers.1.attention.query_key_value.weight"
    keys = plan.matrices[f"{name}[part 1]"]
    assert [(part.start, part.outputs) for part in keys.parts] == [
        (4, 4), (16, 4), (28, 4), (40, 4)
    ]  # fmt: skip
    merge_here(plan)
    seen = watch(found, "gpt-neox")
    inputs = {m.name: [one[m.parts[0].tensor] for one in seen] for m in plan.matrices.values()}
    assert_merged(plan, found, inputs, 1.0)


def test_tensors_fused_by_the_manifest_are_one_matrix(zoo: MakeZoo, plan_of: PlanOf) -> None:
    found = zoo("mixtral")
    fuse = [
        ["*.self_attn.q_proj.weight", "*.self_attn.k_proj.weight", "*.self_attn.v_proj.weight"],
        ["*.w1.weight", "*.w3.weight"],
    ]
    plan = plan_of(found, merge={"alpha": 1.0, "fuse": fuse})
    together = [m for m in plan.matrices.values() if len(m.parts) > 1]
    assert {len(m.parts) for m in together} == {2, 3}
    assert len(together) == 2 + 2 * 3
    merge_here(plan)
    seen = watch(found, "mixtral")
    inputs = {m.name: [one[m.parts[0].tensor] for one in seen] for m in plan.matrices.values()}
    assert_merged(plan, found, inputs, 1.0)


@pytest.mark.parametrize(
    ("name", "merge", "message"),
    [
        ("phi3", {"split": [{"tensors": "*.qkv_proj.weight", "parts": [3, 2]}]}, "equal shares"),
        ("llama", {"fuse": [["*.q_proj.weight", "*.o_proj.weight"]]}, "do not have the same input"),
        ("llama", {"fuse": [["*.q_proj.weight", "*.qk_proj.weight"]]}, "one tensor for each"),
        (
            "llama",
            {
                "fuse": [["*.q_proj.weight", "*.k_proj.weight"]],
                "rules": [{"tensors": "*.k_proj.weight", "alpha": 0.5}],
            },
            "rules treat",
        ),
    ],
)
def test_splits_and_fusions_that_do_not_fit_are_refused(
    name: str, merge: dict[str, Any], message: str, zoo: MakeZoo, plan_of: PlanOf
) -> None:
    with pytest.raises(ManifestError, match=message):
        plan_of(zoo(name), merge=merge)


def test_rules_choose_for_whole_stacks(zoo: MakeZoo, run: Run) -> None:
    found = zoo("gpt-oss")
    rules = [
        {"tensors": "*.experts.down_proj", "method": "tsv_m"},
        {"tensors": "*.experts.gate_up_proj", "method": "base"},
    ]
    output = run(found, merge={"rules": rules})
    base, merged = tensors_of(found.base), tensors_of(output)
    report = json.loads((output / "report.json").read_text())
    for name, value in base.items():
        if name.endswith("experts.gate_up_proj"):
            assert torch.equal(merged[name], value)
        if name.endswith("experts.down_proj"):
            assert all(report["matrices"][f"{name}[{i}]"]["method"] == "tsv_m" for i in range(4))


def test_matrices_that_no_hook_sees_are_named_with_what_is_done(
    plan_of: PlanOf, tmp_path: Path
) -> None:
    """Mamba's A_log has two dimensions and is never multiplied with an input."""
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 60}
    family = Family("MambaForCausalLM", "MambaConfig", sizes, "backbone.layers", "tokens")
    base = build(family, 0)
    save(base, tmp_path / "base")
    inputs = tmp_path / "inputs.safetensors"
    save_file(draw_inputs(family, 4, 0, base.config), inputs)
    for number in range(2):
        save(tuned(base, number, 0.02), tmp_path / f"{number}")
    zoo = Zoo(
        tmp_path,
        family,
        tmp_path / "base",
        {name: tmp_path / name for name in "01"},
        dict.fromkeys("01", inputs),
    )
    plan = plan_of(zoo)
    names = ", ".join(f"backbone.layers.{i}.mixer.A_log" for i in range(2))
    assert f"no hook sees the inputs of {names}; merged by average" in plan.notes
    assert plan.tensors["backbone.layers.0.mixer.A_log"].why == "no hook sees its input"
    assert "backbone.layers.0.mixer.x_proj.weight" in plan.matrices


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "phi3"])
def test_stacks_are_read_once_and_costs_are_foreseen(
    name: str, zoo: MakeZoo, plan_of: PlanOf
) -> None:
    plan = plan_of(zoo(name))
    merge_here(plan)
    for task in plan.tasks.values():
        assert plan.directory.results(task.key)["bytes_read"] == task.read_bytes, task.key
