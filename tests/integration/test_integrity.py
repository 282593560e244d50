"""Damage on the disk: found, told or made again, and never another result."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeZoo, PlanOf, merge_here
from models import Zoo, write_manifest
from test_merge import digests
from test_resume import MERGE, Log, stop_after
from typer.testing import CliRunner

from esm_stream.errors import DataError, EsmStreamError, InputError
from esm_stream.manifest import load_manifest
from esm_stream.planning.make import make_plan
from esm_stream.planning.plan import Plan
from esm_stream.verify import verify

TIES = {"tensors": "*down_proj*", "method": "ties", "options": {"trim": "global"}}
MIXED = {**MERGE, "rules": [TIES]}


@dataclass
class Kept:
    """A merge at some point of its way, put back as often as it is asked for."""

    plan: Plan
    copy: Path

    def restore(self) -> None:
        for path in (self.plan.work, self.plan.output):
            shutil.rmtree(path, ignore_errors=True)
            if (self.copy / path.name).exists():
                shutil.copytree(self.copy / path.name, path)

    def file(self, pattern: str) -> Path:
        roots = (self.plan.work, self.plan.output)
        found = sorted(p for r in roots for p in r.glob(pattern) if p.is_file())
        assert found, f"nothing matches {pattern}"
        return found[len(found) // 2]


def keep(plan: Plan, copy: Path) -> Kept:
    for path in (plan.work, plan.output):
        shutil.copytree(path, copy / path.name)
    return Kept(plan, copy)


@pytest.fixture(scope="module")
def merges(zoo: MakeZoo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One merge of ESM and TIES, stopped twice on its way, and what it ends in."""
    found = zoo("llama", shard="12KB")
    root = tmp_path_factory.mktemp("damage")
    document = found.document(root / "merged", merge=MIXED)
    plan = make_plan(load_manifest(write_manifest(root / "merged.toml", document)))
    order = [task.stage for task in plan.tasks.values()]
    early, late = order.index("forward") + 3, order.index("seal") - 1
    stop_after(plan, early)
    stages = {"early": keep(plan, root / "early")}
    stop_after(plan, late - early)
    stages["late"] = keep(plan, root / "late")
    merge_here(plan)
    stages["whole"] = keep(plan, root / "whole")
    return {**stages, "digests": digests(plan.output)}


KINDS = [
    ("early", "lock"),
    ("early", "plan.json"),
    ("early", "events.jsonl"),
    ("early", "inputs/*"),
    ("early", "hidden/*/arguments.safetensors"),
    ("early", "hidden/*/000*.safetensors"),
    ("early", "factors.zarr/*/basis/c/*/*/*"),
    ("early", "factors.zarr/*/coordinates/c/*/*/*"),
    ("early", "factors.zarr/*/spectrum/c/*/*"),
    ("early", "factors.zarr/*/basis/zarr.json"),
    ("early", "factors.zarr/*/spectrum/zarr.json"),
    ("early", "done/inputs/*"),
    ("early", "done/forward/*/*"),
    ("late", "statistics/measure/*/*/*"),
    ("late", "statistics/total/*/*"),
    ("late", "factors.zarr/*/update/c/*/*"),
    ("late", "factors.zarr/*/update/zarr.json"),
    ("late", "done/merge/*"),
    ("late", "done/scale/*"),
    ("late", "done/total/*/*"),
    ("late", "done/write/*/*"),
    ("late", "*.partial"),
    ("whole", "factors.zarr/*/update/c/*/*"),
    ("whole", "done/finish.json"),
]


@pytest.mark.parametrize(("stage", "pattern"), KINDS)
def test_a_flipped_bit_in_any_kind_of_file_never_gives_another_result(
    stage: str, pattern: str, merges: dict[str, Any]
) -> None:
    kept: Kept = merges[stage]
    kept.restore()
    path = kept.file(pattern)
    flip(path, path.stat().st_size // 2)
    found = verify_or_refuse(kept.plan)
    # A bit of white space in metadata changes nothing and is not looked for.
    assert found or path.name in ("lock", "events.jsonl", "zarr.json")
    try:
        merge_here(kept.plan)
    except EsmStreamError:
        merge_here(kept.plan, restart=True, verify=True)
    assert digests(kept.plan.output) == merges["digests"]


def verify_or_refuse(plan: Plan) -> bool:
    """Whether a damaged work directory is told as such."""
    try:
        return bool(verify(plan.work).damages)
    except InputError:
        return True


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("pattern", "runs"),
    [
        ("factors.zarr/*/basis/c/*/*/*", {"forward"}),
        ("factors.zarr/*/update/c/*/*", {"merge"}),
        ("model-00002-*.safetensors", {"write", "seal"}),
        ("config.json", set()),
        ("complete.json", set()),
    ],
)
def test_what_is_damaged_in_a_complete_merge_is_named_and_made_again_alone(
    pattern: str, runs: set[str], merges: dict[str, Any]
) -> None:
    kept: Kept = merges["whole"]
    kept.restore()
    path = kept.file(pattern)
    flip(path, path.stat().st_size // 2)
    damages = verify(kept.plan.work).damages
    assert damages
    # Metadata of an array are told for each task that writes to it; a chunk has one.
    assert all(str(path) in damage.problem for damage in damages)
    command = verify(kept.plan.work).repair
    assert command == f"esm-stream merge {kept.plan.source} --verify"
    log = Log()
    merge_here(kept.plan, log, verify=True)
    ran = {key.partition("/")[0] for key in log.ran}
    # Hidden states are gone after a merge: a forward that runs again needs those before it.
    assert ran - {"finish"} <= runs | ({"stem"} if "forward" in runs else set())
    assert runs <= ran
    if runs == {"write", "seal"}:
        assert {key.split("/")[1] for key in log.ran if key != "finish"} == {path.name}
    assert digests(kept.plan.output) == merges["digests"]
    assert not verify(kept.plan.work).damages


def test_a_whole_merge_is_verified_by_reading_it(merges: dict[str, Any]) -> None:
    kept: Kept = merges["whole"]
    kept.restore()
    for root in (kept.plan.work, kept.plan.output):
        before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
        found = verify(root)
        assert found.damages == ()
        assert found.tasks_left == 0
        assert found.size > 10_000
        assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before


def every_file(output: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    for path in sorted(output.iterdir()):
        for place in (0, path.stat().st_size // 2, path.stat().st_size - 1):
            yield path.name, lambda p, place=place: flip(p, place)
        yield path.name, lambda p: p.write_bytes(p.read_bytes()[:-1])
        if path.name != "complete.json":
            yield path.name, Path.unlink


def test_every_damage_to_a_merged_model_is_found(merges: dict[str, Any]) -> None:
    kept: Kept = merges["whole"]
    kept.restore()
    for name, spoil in list(every_file(kept.plan.output)):
        path = kept.plan.output / name
        content = path.read_bytes()
        spoil(path)
        damages = verify(kept.plan.output).damages
        assert damages, name
        assert any(name in damage.problem for damage in damages)
        path.write_bytes(content)
    assert not verify(kept.plan.output).damages


def test_the_command_tells_damage_and_exits_with_9(merges: dict[str, Any]) -> None:
    from esm_stream_cli.app import app

    kept: Kept = merges["whole"]
    kept.restore()
    fine = CliRunner().invoke(app, ["verify", str(kept.plan.output)])
    assert fine.exit_code == 0
    assert "whole" in fine.stdout
    path = kept.file("model-00002-*.safetensors")
    flip(path, path.stat().st_size - 1)
    for directory in (kept.plan.work, kept.plan.output):
        found = CliRunner().invoke(app, ["verify", str(directory)])
        assert found.exit_code == DataError.exit_code
        assert f"{path}: tensor 'model" in found.stderr
        assert f"esm-stream merge {kept.plan.source} --verify" in found.stderr
    listed = CliRunner().invoke(app, ["verify", str(kept.plan.work), "--json"])
    assert [d["task"] for d in json.loads(listed.stdout)["damages"]] == [f"seal/{path.name}"]
    refused = CliRunner().invoke(app, ["verify", str(kept.plan.base)])
    assert refused.exit_code == InputError.exit_code


def overwrite(path: Path, from_end: int) -> None:
    """Other contents under the same size and time."""
    status = path.stat()
    flip(path, status.st_size - from_end)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("owner", "untouched"),
    [("base", set()), ("expert1", {"stem/expert0"}), ("data", {"inputs/expert0", "stem/expert0"})],
)
def test_inputs_that_change_unseen_are_refused_or_read_anew(
    owner: str, untouched: set[str], zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    found: Zoo = zoo("llama", shard="12KB").copy(tmp_path / "zoo")
    plan = plan_of(found, merge=MERGE)
    merge_here(plan, verify_inputs=True)
    assert merge_here(plan, verify_inputs=True).tasks_run == 0
    roots = {"base": found.base, **found.experts}
    path = sorted(roots[owner].glob("*.safetensors"))[1] if owner in roots else None
    path = path or found.inputs["expert1"]
    overwrite(path, 8 if owner == "data" else 2)  # low byte of a token id, high one of a weight
    fresh = plan_of(found, "fresh/merged", merge=MERGE)
    assert fresh.tasks["finish"].fingerprint == plan.tasks["finish"].fingerprint
    assert merge_here(plan).tasks_run == 0  # as far as size and time tell, nothing changed
    with pytest.raises(InputError, match=f"{path}: holds something else") as error:
        merge_here(plan, verify_inputs=True)
    assert len(error.value.problems) == 1
    log = Log()
    merge_here(plan, log, verify_inputs=True, restart=True)
    assert not untouched & set(log.ran)
    merge_here(fresh)
    assert digests(plan.output) == digests(fresh.output)
    assert merge_here(plan, verify_inputs=True).tasks_run == 0
