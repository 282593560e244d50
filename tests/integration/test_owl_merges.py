"""OWL through the whole engine: numbers of its definition, sums that outlive a merge."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeZoo, PlanOf, Run, merge_here
from merging import merge as merge_one
from models import Zoo, tensors_of
from test_forward import update_of, watch
from test_resume import Log
from torch import Tensor

from esm_stream.engine import calibrate
from esm_stream.errors import ChangedError, DataError, StopRequestedError
from esm_stream.methods.contract import Moment
from esm_stream.planning.plan import Plan
from esm_stream.verify import verify

EXPERTS = 3
WITHOUT: dict[str, Any] = {"method": "owl", "alpha": 0.7, "options": {"inputs": "none"}}
WITH: dict[str, Any] = {"method": "owl", "alpha": 0.7}


def files(root: Path) -> dict[str, bytes]:
    """All tensors that a merge left, as bytes."""
    return {path.name: path.read_bytes() for path in sorted(root.glob("*.safetensors"))}


def sums(plan: Plan) -> dict[str, bytes]:
    root = plan.directory.sums
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*.sums"))}


def experts_read(plan: Plan) -> dict[str, int]:
    """Bytes that every merge task of a finished run read of experts."""
    keys = [task.key for task in plan.of_stage("merge")]
    return {key: plan.directory.results(key)["bytes_read_experts"] for key in keys}


def moment_of(zoo: Zoo, expert: str, leader: str) -> Moment:
    """Second moment of what a matrix of the plain model sees."""
    x = torch.cat(watch(zoo, expert).inputs[leader]).double()
    return Moment("input", x.T @ x / len(x), len(x))


def expected(zoo: Zoo, plan: Plan, name: str, **options: object) -> Tensor:
    """W0 + alpha M of one matrix from its definition in memory, as it is stored."""
    matrix = plan.matrices[name]
    updates = [update_of(zoo, expert, matrix) for expert in zoo.experts]
    moments = None
    if matrix.leader:
        moments = [moment_of(zoo, expert, matrix.leader) for expert in zoo.experts]
    found = merge_one("owl", updates, moments=moments, options=options) * matrix.alpha
    return found.T if matrix.transposed else found


def test_without_data_it_is_the_method_in_memory(zoo: MakeZoo, plan_of: PlanOf) -> None:
    found = zoo("llama", experts=EXPERTS)
    plan = plan_of(found, merge=WITHOUT)
    merge_here(plan)
    merged, base = tensors_of(plan.output), tensors_of(found.base)
    tuned = [tensors_of(path) for path in found.experts.values()]
    assert len(plan.matrices) == sum(".layers." in n and v.ndim == 2 for n, v in base.items())
    for name, value in base.items():
        if name in plan.matrices:
            wanted = value + expected(found, plan, name, inputs="none").float()
        else:
            wanted = torch.stack([one[name] for one in tuned]).double().mean(0).float()
        torch.testing.assert_close(merged[name], wanted, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_with_the_experts_inputs_it_is_the_method_in_memory(
    name: str, zoo: MakeZoo, plan_of: PlanOf
) -> None:
    found = zoo(name, experts=EXPERTS)
    plan = plan_of(found, merge={**WITH, "options": {"m": 0.7, "p": 0.3}})
    merge_here(plan)
    merged, base = tensors_of(plan.output), tensors_of(found.base)
    assert plan.matrices
    for matrix in plan.matrices.values():
        assert matrix.moment == "input"
        wanted = base[matrix.name] + expected(found, plan, matrix.name, m=0.7, p=0.3).float()
        torch.testing.assert_close(
            merged[matrix.name], wanted, rtol=1e-3, atol=1e-5, msg=matrix.name
        )


def test_q_k_v_can_be_one_matrix(zoo: MakeZoo, plan_of: PlanOf) -> None:
    found = zoo("llama", experts=EXPERTS)
    attention = "model.layers.*.self_attn"
    fuse = [[f"{attention}.{part}_proj.weight" for part in "qkv"]]
    plan = plan_of(found, merge={**WITH, "fuse": fuse})
    merge_here(plan)
    merged, base = tensors_of(plan.output), tensors_of(found.base)
    fused = [m for m in plan.matrices.values() if len(m.parts) == 3]
    assert len(fused) == 2
    for matrix in fused:
        updates = [update_of(found, expert, matrix) for expert in found.experts]
        moments = [moment_of(found, expert, str(matrix.leader)) for expert in found.experts]
        whole = 0.7 * merge_one("owl", updates, moments=moments).float()
        names = [part.tensor for part in matrix.parts]
        for tensor, update in zip(
            names, whole.split([p.outputs for p in matrix.parts]), strict=True
        ):
            wanted = base[tensor] + update
            torch.testing.assert_close(merged[tensor], wanted, rtol=1e-3, atol=1e-5, msg=tensor)


def test_experts_of_a_mixture_are_matrices_of_their_own(zoo: MakeZoo, plan_of: PlanOf) -> None:
    found = zoo("mixtral", experts=2)
    plan = plan_of(found, merge=WITH)
    merge_here(plan)
    routed = [m for m in plan.matrices.values() if m.routed]
    assert routed
    assert all(m.summed for m in routed)
    merged, base = tensors_of(plan.output), tensors_of(found.base)
    assert all(not torch.equal(merged[m.parts[0].tensor], base[m.parts[0].tensor]) for m in routed)


def test_rules_give_options_by_kind(zoo: MakeZoo, plan_of: PlanOf) -> None:
    found = zoo("llama", experts=2)
    rule = {"kinds": ["down"], "method": "owl", "alpha": 0.5, "options": {"inputs": "none", "p": 0}}
    plan = plan_of(found, merge={**WITHOUT, "rules": [rule]})
    merge_here(plan)
    name = "model.layers.1.mlp.down_proj.weight"
    wanted = (
        tensors_of(found.base)[name] + expected(found, plan, name, inputs="none", p=0.0).float()
    )
    torch.testing.assert_close(tensors_of(plan.output)[name], wanted, rtol=1e-4, atol=1e-5)


def test_no_basis_is_stored(zoo: MakeZoo, plan_of: PlanOf) -> None:
    plan = plan_of(zoo("llama"), merge=WITH)
    merge_here(plan)
    assert {path.name for path in plan.directory.factors.glob("*/*")} == {"update"}


@pytest.mark.parametrize("merge", [WITHOUT, WITH], ids=["none", "expert"])
class TestOneMoreExpert:
    def test_reads_that_expert_alone(
        self, merge: dict[str, Any], zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
    ) -> None:
        found = zoo("llama", experts=EXPERTS)
        experts = found.document(tmp_path)["experts"]
        merge_here(plan_of(found, merge=merge, experts=experts[:2]))
        plan, log = plan_of(found, merge=merge), Log()
        merge_here(plan, log, restart=True)
        new = experts[2]["name"]
        forwards = {k.split("/")[1] for k in log.ran if k.split("/")[0] in ("stem", "forward")}
        assert forwards == ({new} if merge is WITH else set())
        for key, size in experts_read(plan).items():
            matrix = plan.matrices[key.removeprefix("merge/")]
            own = 4 * matrix.outputs * matrix.inputs
            assert size == (0 if merge is WITH else own), key
        fresh = plan_of(found, "fresh/merged", merge=merge)
        merge_here(fresh)
        assert files(plan.output) == files(fresh.output)
        assert sums(plan) == sums(fresh)

    def test_needs_no_restart(
        self, merge: dict[str, Any], zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
    ) -> None:
        found = zoo("llama", experts=EXPERTS)
        experts = found.document(tmp_path)["experts"]
        merge_here(plan_of(found, merge=merge, experts=experts[:2]))
        plan = plan_of(found, merge=merge, experts=experts[::-1])
        merge_here(plan)
        fewer = plan_of(found, merge=merge, experts=experts[1:])
        if merge is WITH:
            with pytest.raises(ChangedError, match=r"experts\[.*\]\.model"):
                merge_here(fewer)
        else:
            merge_here(fewer)
        other = {**merge, "options": {**merge.get("options", {}), "p": 0.1}}
        with pytest.raises(ChangedError, match=r"merge\.options\.p"):
            merge_here(plan_of(found, merge=other))

    def test_order_of_experts_moves_no_byte_of_the_sums(
        self, merge: dict[str, Any], zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
    ) -> None:
        found = zoo("llama", experts=EXPERTS)
        experts = found.document(tmp_path)["experts"]
        one = plan_of(found, merge=merge)
        other = plan_of(found, "other/merged", merge=merge, experts=experts[::-1])
        merge_here(one)
        merge_here(other)
        assert sums(one) == sums(other)

    def test_tasks_at_once_move_no_byte(
        self, merge: dict[str, Any], zoo: MakeZoo, plan_of: PlanOf
    ) -> None:
        found = zoo("llama", experts=EXPERTS)
        one = plan_of(found, merge=merge, run={"threads": 1})
        many = plan_of(found, "many/merged", merge=merge, run={"threads": 1})
        merge_here(one)
        merge_here(many, scheduler="threads", parallel=3)
        assert sums(one) == sums(many)
        assert files(one.output) == files(many.output)

    def test_fewer_experts_equal_a_fresh_merge(
        self, merge: dict[str, Any], zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
    ) -> None:
        found = zoo("llama", experts=EXPERTS)
        experts = found.document(tmp_path)["experts"]
        merge_here(plan_of(found, merge=merge))
        plan = plan_of(found, merge=merge, experts=[experts[0], experts[2]])
        merge_here(plan, restart=True)
        fresh = plan_of(found, "fresh/merged", merge=merge, experts=[experts[0], experts[2]])
        merge_here(fresh)
        assert files(plan.output) == files(fresh.output)
        assert sums(plan) == sums(fresh)
        if merge is WITHOUT:
            for key, size in experts_read(plan).items():
                matrix = plan.matrices[key.removeprefix("merge/")]
                assert size == 4 * matrix.outputs * matrix.inputs, key

    @pytest.mark.parametrize("count", [1, 4, 9, 14])
    def test_a_stopped_merge_goes_on_to_the_same_bytes(
        self, merge: dict[str, Any], count: int, zoo: MakeZoo, plan_of: PlanOf
    ) -> None:
        found = zoo("llama", experts=2)
        whole, plan = plan_of(found, "whole/merged", merge=merge), plan_of(found, merge=merge)
        merge_here(whole)
        with pytest.raises(StopRequestedError):
            merge_here(plan, Log(count))
        merge_here(plan)
        assert files(plan.output) == files(whole.output)
        assert sums(plan) == sums(whole)


@pytest.mark.parametrize("merge", [WITHOUT, WITH], ids=["none", "expert"])
def test_sums_that_are_gone_are_made_again(
    merge: dict[str, Any], zoo: MakeZoo, plan_of: PlanOf
) -> None:
    plan = plan_of(zoo("llama"), merge=merge)
    merge_here(plan)
    before, output = sums(plan), files(plan.output)
    for path in plan.directory.sums.rglob("*layers.1*/*.sums"):
        path.unlink()
    for path in (plan.directory.root / "done" / "merge").glob("*layers.1*"):
        path.unlink()
    merge_here(plan)
    assert sums(plan) == before
    assert files(plan.output) == output


def test_a_damaged_sum_is_named(zoo: MakeZoo, plan_of: PlanOf) -> None:
    plan = plan_of(zoo("llama"), merge=WITH)
    calibrate(plan, scheduler="sync")
    path = next(plan.directory.sums.rglob("*.sums"))
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"0\.sums: damaged"):
        merge_here(plan)
    merge_here(plan, verify=True)
    path.write_bytes(bytes(content))
    assert [d.problem for d in verify(plan.work).damages] == [f"{path}: damaged"]


def test_one_calibration_serves_other_solutions(zoo: MakeZoo, plan_of: PlanOf, run: Run) -> None:
    found = zoo("llama")
    other = {**WITH, "options": {"mu": 0.2, "p": 0.3, "eps": 0.01}}
    merge_here(plan_of(found, merge=WITH))
    plan, log = plan_of(found, merge=other), Log()
    with pytest.raises(ChangedError):
        merge_here(plan)
    merge_here(plan, log, restart=True)
    assert {key.split("/")[0] for key in log.ran} == {"merge", "write", "seal", "finish"}
    assert files(plan.output) == files(run(found, "fresh/merged", merge=other))


def test_the_report_tells_of_experts_without_tokens_and_of_norms(
    zoo: MakeZoo, plan_of: PlanOf
) -> None:
    import json

    plan = plan_of(zoo("llama"), merge=WITH)
    merge_here(plan)
    report = json.loads((plan.output / "report.json").read_text())
    for name, found in report["matrices"].items():
        assert set(found["update_norms"]) == set(plan.experts), name
        assert found["effective_outputs"] > 1
        assert found["without_samples"] == []
