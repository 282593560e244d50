"""Merging block by block with the inputs of the model merged so far."""

import shutil
from dataclasses import replace
from io import StringIO
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeZoo, PlanOf, merge_here
from merging import merge as merge_one
from models import Zoo, tensors_of
from rich.console import Console
from safetensors.torch import save_file
from test_forward import batches_of, update_of, watch_batches
from test_owl_merges import files
from test_resume import Log
from torch import Tensor

from esm_stream import stopping
from esm_stream.engine import calibrate
from esm_stream.errors import ManifestError, StopRequestedError, UnsupportedModelError
from esm_stream.methods.contract import Moment
from esm_stream.planning.plan import Plan
from esm_stream.stages import walk
from esm_stream_cli.plan import show

EXPERTS = 3
MERGE: dict[str, Any] = {"method": "owl", "alpha": 0.7, "options": {"inputs": "merged"}}


def in_memory(zoo: Zoo, plan: Plan, folder: Path) -> dict[str, Tensor]:
    """All matrices of the merged model, each from plain forwards of the model before it."""
    merged = tensors_of(plan.output)
    base = tensors_of(zoo.base)
    merged |= {name: base[name] for name in plan.matrices}
    shutil.copytree(zoo.base, folder)
    for file in folder.glob("model*"):
        file.unlink()
    matrices = sorted(plan.matrices.values(), key=lambda m: (m.block or 0, m.order))
    for _, found in groupby(matrices, key=lambda m: (m.block, m.order)):
        together = list(found)
        save_file(merged, folder / "model.safetensors", {"format": "pt"})
        current = replace(zoo, experts=dict.fromkeys(zoo.experts, folder))
        seen = {
            name: watch_batches(current, name, batches_of(zoo.inputs[name], torch.float32)).inputs
            for name in zoo.experts
        }
        for matrix in together:
            inputs = [torch.cat(seen[name][str(matrix.leader)]).double() for name in zoo.experts]
            moments = [Moment("input", x.T @ x / len(x), len(x)) for x in inputs]
            updates = [update_of(zoo, name, matrix) for name in zoo.experts]
            update = merge_one("owl", updates, moments=moments, options={}) * matrix.alpha
            stored = update.T if matrix.transposed else update
            merged[matrix.name] = base[matrix.name] + stored.float()
    return merged


@pytest.mark.parametrize("name", ["llama", "vit", "gpt2"])
def test_each_matrix_sees_the_model_merged_before_it(
    name: str, zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    found = zoo(name, experts=EXPERTS)
    plan = plan_of(found, merge=MERGE)
    assert {task.stage for task in plan.tasks.values()}.isdisjoint({"stem", "forward", "merge"})
    merge_here(plan)
    merged, wanted = tensors_of(plan.output), in_memory(found, plan, tmp_path / "plain")
    for matrix in plan.matrices.values():
        torch.testing.assert_close(
            merged[matrix.name], wanted[matrix.name], rtol=2e-3, atol=2e-5, msg=matrix.name
        )


def test_the_order_is_that_of_the_forward(zoo: MakeZoo, plan_of: PlanOf) -> None:
    plan = plan_of(zoo("llama", experts=EXPERTS), merge=MERGE)
    first = [m for m in plan.matrices.values() if m.block == 0]
    order = {m.name.split(".")[-2].removesuffix("_proj"): m.order for m in first}
    assert order == {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 2, "up": 2, "down": 3}


def test_inputs_of_the_merged_model_are_others_than_those_of_the_experts(
    zoo: MakeZoo, plan_of: PlanOf
) -> None:
    found = zoo("llama", experts=EXPERTS)
    walked = merge_here(plan_of(found, "walked", merge=MERGE)).output
    expert = {**MERGE, "options": {"inputs": "expert"}}
    apart = merge_here(plan_of(found, "apart", merge=expert)).output
    assert files(walked) != files(apart)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_neither_mode_nor_memory_moves_a_bit(
    name: str, zoo: MakeZoo, plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of matrices that do not fit together are made in several passes."""
    found = zoo(name, experts=EXPERTS)
    wanted = files(merge_here(plan_of(found, "chain", merge=MERGE)).output)
    replayed = plan_of(found, "replay", merge=MERGE, run={"forward": "replay"})
    assert files(merge_here(replayed).output) == wanted
    monkeypatch.setattr(walk, "SUMS_SHARE", 1 << 40)
    tight = plan_of(found, "tight", merge=MERGE)
    assert files(merge_here(tight).output) == wanted


@pytest.mark.parametrize("mode", ["chain", "replay"])
def test_a_stopped_walk_goes_on_at_its_block(mode: str, zoo: MakeZoo, plan_of: PlanOf) -> None:
    found = zoo("llama", experts=EXPERTS)
    sections = {"merge": MERGE, "run": {"forward": mode}}
    wanted = files(merge_here(plan_of(found, "whole", **sections)).output)
    plan = plan_of(found, "stopped", **sections)
    log = Log(stop_after=EXPERTS + 2)
    with pytest.raises(StopRequestedError):
        merge_here(plan, log)
    assert "walk/0000" in log.ran
    stopping.clear()
    rest = Log()
    assert files(merge_here(plan, rest).output) == wanted
    assert rest.ran[0] == "walk/0001"


def test_another_alpha_repeats_the_walk_but_draws_no_samples(zoo: MakeZoo, plan_of: PlanOf) -> None:
    found = zoo("llama", experts=EXPERTS)
    merge_here(plan_of(found, merge=MERGE))
    plan, log = plan_of(found, merge={**MERGE, "alpha": 0.5}), Log()
    again = merge_here(plan, log, restart=True)
    assert {key.split("/")[0] for key in log.ran} == {"walk", "write", "seal", "finish"}
    fresh = merge_here(plan_of(found, "fresh", merge={**MERGE, "alpha": 0.5}))
    assert files(again.output) == files(fresh.output)


def test_matrices_of_another_method_are_merged_before_their_block_is_walked(
    zoo: MakeZoo, plan_of: PlanOf
) -> None:
    """So that those walked after them see them."""
    found = zoo("llama", experts=EXPERTS)
    rule = {"kinds": ["o"], "method": "tsv_m"}
    plan = plan_of(found, merge={**MERGE, "rules": [rule]})
    keys = list(plan.tasks)
    for task in plan.of_stage("walk"):
        for key in task.after:
            assert keys.index(key) < keys.index(task.key)
    names = [m.name for m in plan.matrices.values() if not m.walked]
    assert {f"merge/{name}" for name in names if ".0." in name} <= set(
        plan.tasks["walk/0000"].after
    )
    mixed, alone = merge_here(plan).output, merge_here(plan_of(found, "alone", merge=MERGE)).output
    earlier, later = (f"model.layers.0.{n}_proj.weight" for n in ("self_attn.q", "mlp.gate"))
    assert torch.equal(tensors_of(mixed)[earlier], tensors_of(alone)[earlier])
    assert not torch.equal(tensors_of(mixed)[later], tensors_of(alone)[later])


def test_the_report_has_what_each_expert_contributed(zoo: MakeZoo, plan_of: PlanOf) -> None:
    import json

    plan = plan_of(zoo("llama", experts=EXPERTS), merge=MERGE)
    report = json.loads((merge_here(plan).output / "report.json").read_text())
    for name, matrix in report["matrices"].items():
        assert set(matrix["update_norms"]) == set(plan.experts), name
        assert all(tokens > 0 for tokens in matrix["tokens"].values())
        assert matrix["norm"] > 0


def test_the_plan_says_that_a_matrix_is_merged_by_the_merged_models_inputs(
    zoo: MakeZoo, plan_of: PlanOf
) -> None:
    text = StringIO()
    show(plan_of(zoo("llama", experts=EXPERTS), merge=MERGE), Console(file=text, width=200))
    assert text.getvalue().count("merged input") >= 5
    assert "3 walk, 1 write" in text.getvalue()


def test_no_experts_forward_is_calibrated(zoo: MakeZoo, plan_of: PlanOf) -> None:
    with pytest.raises(ManifestError, match=r"nothing to calibrate: owl .* runs the merged model"):
        calibrate(plan_of(zoo("llama", experts=EXPERTS), merge=MERGE))


def test_models_whose_blocks_do_not_come_one_by_one_are_refused(
    zoo: MakeZoo, plan_of: PlanOf
) -> None:
    with pytest.raises(UnsupportedModelError, match='inputs = "expert"'):
        plan_of(zoo("llama"), merge=MERGE, run={"forward": "resident"})
    rule = {"tensors": "lm_head.weight", "method": "owl", "options": {"inputs": "merged"}}
    with pytest.raises((ManifestError, UnsupportedModelError), match="outside the blocks"):
        plan_of(zoo("llama"), merge={**MERGE, "rules": [rule]})
