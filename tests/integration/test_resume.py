"""Stopped, killed, damaged, changed: what runs again, and that the result is the same bytes."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import MakeZoo, PlanOf, merge_here
from models import Zoo, change_tensors, write_manifest
from test_merge import digests

from esm_stream import stopping
from esm_stream.engine import progress_of, remaining
from esm_stream.errors import BudgetError, ChangedError, InputError, LockedError, StopRequestedError
from esm_stream.events import Event
from esm_stream.manifest import load_manifest
from esm_stream.planning.make import make_plan
from esm_stream.planning.plan import Plan
from esm_stream.store.factors import FactorStore
from esm_stream.store.lock import locked

MERGE = {"alpha": 1.5, "options": {"levels": ["task", "layer"]}}


@pytest.fixture(scope="module")
def small(zoo: MakeZoo) -> Zoo:
    """A model in several shards, with layer scaling to be resumed too."""
    return zoo("llama", shard="12KB")


@pytest.fixture(scope="module")
def expected(small: Zoo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an uninterrupted merge of `small` leaves."""
    output = tmp_path_factory.mktemp("straight") / "merged"
    manifest = write_manifest(output.with_suffix(".toml"), small.document(output, merge=MERGE))
    merge_here(make_plan(load_manifest(manifest)))
    return digests(output)


class Log:
    """Keys of the tasks that ran; asks to stop after `stop_after` of them."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.ran: list[str] = []
        self._stop_after = stop_after

    def __call__(self, event: Event) -> None:
        if event.kind == "task_finished":
            self.ran.append(event.task)
            if len(self.ran) == self._stop_after:
                stopping.request()


def stop_after(plan: Plan, count: int, **options: object) -> list[str]:
    """Run `count` tasks of a plan, then give up as after Ctrl-C; returns what ran."""
    log = Log(count)
    with pytest.raises(StopRequestedError):
        merge_here(plan, log, **options)
    return log.ran


def again(plan: Plan, **options: bool) -> list[str]:
    """Plan the same manifest anew and run what is left; returns what ran."""
    log = Log()
    merge_here(make_plan(load_manifest(Path(plan.source))), log, **options)
    return log.ran


def test_running_again_does_nothing(small: Zoo, plan_of: PlanOf, expected: dict[str, str]) -> None:
    plan = plan_of(small, merge=MERGE)
    assert merge_here(plan).tasks_run == len(plan.tasks)
    stamps = {p: p.stat().st_mtime_ns for p in plan.output.iterdir()}
    outcome = merge_here(make_plan(load_manifest(Path(plan.source))))
    assert outcome.tasks_run == 0
    assert outcome.tasks_reused == len(plan.tasks)
    assert {p: p.stat().st_mtime_ns for p in plan.output.iterdir()} == stamps
    assert digests(plan.output) == expected


def test_experts_may_have_dots_in_their_names(zoo: MakeZoo, plan_of: PlanOf) -> None:
    found = zoo("llama")
    experts = [
        {"name": f"math.v{i}", "model": str(path), "calibration": str(found.inputs[name])}
        for i, (name, path) in enumerate(found.experts.items())
    ]
    plan = plan_of(found, experts=experts)
    merge_here(plan)
    assert again(plan) == []


@pytest.mark.parametrize("count", [1, 3, 5, 7, 13, 18, 24, 32])
def test_merge_stopped_after_some_tasks_resumes_to_identical_bytes(
    count: int, small: Zoo, plan_of: PlanOf, expected: dict[str, str]
) -> None:
    plan = plan_of(small, merge=MERGE)
    assert count < len(plan.tasks)
    first = stop_after(plan, count)
    assert not (plan.output / "complete.json").exists()
    second = again(plan)
    assert set(first) | set(second) == set(plan.tasks)
    assert digests(plan.output) == expected


@pytest.mark.parametrize(("scheduler", "parallel"), [("local", 2), ("threads", 2)])
def test_merge_stopped_while_several_tasks_run_resumes_to_identical_bytes(
    scheduler: str, parallel: int, small: Zoo, plan_of: PlanOf, expected: dict[str, str]
) -> None:
    plan = plan_of(small, merge=MERGE, run={"threads": torch.get_num_threads()})
    first = stop_after(plan, 9, scheduler=scheduler, parallel=parallel)
    assert not set(first) & set(again(plan))
    assert digests(plan.output) == expected


@pytest.mark.parametrize("count", [5, 7, 13])
def test_no_finished_task_runs_twice_after_a_stop(count: int, small: Zoo, plan_of: PlanOf) -> None:
    """5: both stems and one forward done; 7: one expert is a block ahead of the other."""
    plan = plan_of(small, merge=MERGE)
    first = stop_after(plan, count)
    second = again(plan)
    assert sorted(set(first) & set(second)) == []


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"merge": {**MERGE, "alpha": 0.5}}, "merge.alpha: 1.5 -> 0.5"),
        ({"merge": {"alpha": 1.5, "options": {"levels": ["task"]}}}, "merge.options.levels"),
        ({"calibration": {"samples": 5}}, "calibration.samples: 32 -> 5"),
        ({"output": {"dtype": "bfloat16"}}, "output.dtype: 'base' -> 'bfloat16'"),
        ({"base": {"skip": ["lm_head*"]}}, "base.skip"),
    ],
)
def test_changed_options_are_refused_by_name(
    change: dict[str, dict[str, object]], key: str, small: Zoo, plan_of: PlanOf
) -> None:
    first = plan_of(small, merge=MERGE)
    stop_after(first, 1)
    before = sorted(p for p in first.work.rglob("*") if p.is_file())
    with pytest.raises(ChangedError) as error:
        merge_here(plan_of(small, **{"merge": MERGE, **change}))
    lines = str(error.value).splitlines()
    assert any(line.strip().startswith(key) for line in lines)
    name = key.partition(":")[0]
    assert all(line.strip().startswith(name) for line in lines if "->" in line)
    assert "--restart" in str(error.value)
    assert sorted(p for p in first.work.rglob("*") if p.is_file()) == before


def test_keys_that_say_where_and_how_may_change(
    small: Zoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    plan = plan_of(small, merge=MERGE, run={"work": str(tmp_path / "work")})
    stop_after(plan, 8)
    other = plan_of(
        small,
        merge=MERGE,
        run={"work": str(tmp_path / "work"), "memory": "2GiB", "parallel": 2},
        output={"path": str(tmp_path / "elsewhere")},
    )
    merge_here(other)
    assert (tmp_path / "elsewhere" / "complete.json").is_file()


def test_restart_with_another_alpha_only_scales_and_writes_again(
    small: Zoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    merge_here(plan_of(small, merge=MERGE))
    changed = {**MERGE, "alpha": 0.5}
    log = Log()
    merge_here(plan_of(small, merge=changed), log, restart=True)
    assert {key.split("/")[0] for key in log.ran} <= {"scale", "write", "seal", "finish"}
    fresh = plan_of(small, "fresh/merged", merge=changed)
    merge_here(fresh)
    assert digests(tmp_path / "merged") == digests(fresh.output)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"levels": ["layer"]}, {"inputs", "stem", "forward"}),
        ({"levels": ["task", "layer"], "exponent": 1.0}, {"inputs", "stem", "forward"}),
        ({"levels": ["task"]}, {"inputs", "stem", "forward", "merge"}),
        ({"levels": ["task", "layer"], "rank_factor": 0.5}, {"inputs", "stem"}),
    ],
)
def test_restart_keeps_what_other_options_do_not_touch_and_equals_a_fresh_merge(
    options: dict[str, object], kept: set[str], small: Zoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    merge_here(plan_of(small, merge=MERGE))
    changed = {"alpha": 1.5, "options": options}
    plan = plan_of(small, merge=changed)
    log = Log()
    merge_here(plan, log, restart=True)
    ran = {key.split("/")[0] for key in log.ran}
    # Hidden states are gone after a run: forwards that must run again need their stems.
    assert ran & kept == set() or (kept == {"inputs", "stem"} and ran & kept == {"stem"})
    fresh = plan_of(small, "fresh/merged", merge=changed)
    merge_here(fresh)
    assert digests(tmp_path / "merged") == digests(fresh.output)


def shift_one_weight(path: Path) -> None:
    change_tensors(path, {"model.layers.1.mlp.up_proj.weight": lambda value: value * 1.5})


def touch(path: Path) -> None:
    for file in path.glob("*.safetensors"):
        status = file.stat()
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


@pytest.mark.parametrize("change", [touch, shift_one_weight])
def test_tasks_of_an_expert_whose_files_changed_run_again(
    change: Callable[[Path], None], zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    found = zoo("llama", shard="12KB").copy(tmp_path / "zoo")
    plan = plan_of(found, merge=MERGE)
    merge_here(plan)
    change(found.experts["expert1"])
    ran = set(again(plan))
    assert {key for key in plan.tasks if key.startswith("forward/expert1/0001")} <= ran
    assert {"merge/model.layers.1.mlp.up_proj.weight", "finish"} <= ran
    fresh = plan_of(found, "fresh/merged", merge=MERGE)
    merge_here(fresh)
    assert digests(plan.output) == digests(fresh.output)


def test_forwards_of_other_experts_are_kept_when_one_expert_changes(
    zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    found = zoo("llama", shard="12KB").copy(tmp_path / "zoo")
    plan = plan_of(found, merge=MERGE)
    merge_here(plan)
    touch(found.experts["expert1"])
    ran = again(plan)
    assert [key for key in ran if key.startswith(("stem/expert0", "forward/expert0"))] == []


def test_other_samples_in_a_calibration_file_run_everything_of_that_expert_again(
    zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    found = zoo("llama", shard="12KB").copy(tmp_path / "zoo")
    plan = plan_of(found, merge=MERGE)
    merge_here(plan)
    found.inputs["expert1"].write_bytes(found.inputs["expert0"].read_bytes())
    ran = set(again(plan))
    assert {"inputs/expert1", "stem/expert1", "forward/expert1/0000"} <= ran
    assert "inputs/expert0" not in ran
    fresh = plan_of(found, "fresh/merged", merge=MERGE)
    merge_here(fresh)
    assert digests(plan.output) == digests(fresh.output)


def test_experts_in_another_order_equal_a_fresh_merge(
    zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    found = zoo("llama", experts=3)
    experts = found.document(tmp_path)["experts"]
    merge_here(plan_of(found, merge=MERGE))
    plan = plan_of(found, merge=MERGE, experts=experts[::-1])
    merge_here(plan, restart=True)
    fresh = plan_of(found, "fresh/merged", merge=MERGE, experts=experts[::-1])
    merge_here(fresh)
    assert digests(plan.output) == digests(fresh.output)


def test_an_expert_that_takes_the_place_of_another_equals_a_fresh_merge(
    zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    found = zoo("llama", experts=3)
    experts = found.document(tmp_path)["experts"]
    merge_here(plan_of(found, merge=MERGE, experts=experts[:2]))
    plan = plan_of(found, merge=MERGE, experts=experts[1:])
    merge_here(plan, restart=True)
    fresh = plan_of(found, "fresh/merged", merge=MERGE, experts=experts[1:])
    merge_here(fresh)
    assert digests(plan.output) == digests(fresh.output)


def test_one_more_expert_equals_a_fresh_merge(
    zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    found = zoo("llama", experts=3)
    experts = found.document(tmp_path)["experts"]
    merge_here(plan_of(found, merge=MERGE, experts=experts[:2]))
    plan = plan_of(found, merge=MERGE)
    merge_here(plan, restart=True)
    fresh = plan_of(found, "fresh/merged", merge=MERGE)
    merge_here(fresh)
    assert digests(plan.output) == digests(fresh.output)


def remove(*patterns: str) -> Callable[[Plan], None]:
    """Remove the first file of each pattern from the work or output directory."""

    def spoil(plan: Plan) -> None:
        for pattern in patterns:
            found = sorted(
                p for r in (plan.work, plan.output) for p in r.glob(pattern) if p.is_file()
            )
            assert found, f"nothing matches {pattern}"
            found[0].unlink()

    return spoil


def cut_marker(plan: Plan) -> None:
    path = plan.directory.marker("merge/model.layers.0.mlp.up_proj.weight")
    path.write_bytes(path.read_bytes()[:40])


def empty_marker(plan: Plan) -> None:
    plan.directory.marker("forward/expert1/0000").write_bytes(b"")


def marker_of_another_kind(plan: Plan) -> None:
    plan.directory.marker("stem/expert0").write_text('["not", "a", "marker"]')


def cut_shard(plan: Plan) -> None:
    path = sorted(plan.output.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-4])


def stray_files(plan: Plan) -> None:
    (plan.work / "hidden/expert0/0001.safetensors.tmp").write_bytes(b"half")
    (plan.work / "factors.zarr/x.partial").write_bytes(b"half")


SPOILS = {
    "hidden states before block 1": (6, remove("hidden/expert0/0001.safetensors")),
    "arguments of the blocks": (8, remove("hidden/expert1/arguments.safetensors")),
    "model inputs": (8, remove("inputs/expert0.safetensors")),
    "a chunk of a basis": (12, remove("factors.zarr/*/basis/c/1/0/0")),
    "a chunk of coordinates": (12, remove("factors.zarr/*/coordinates/c/0/0/0")),
    "a merged update": (99, remove("factors.zarr/*/update/c/0/0")),
    "a marker of a forward": (12, remove("done/forward/expert0/0000.json")),
    "a marker of a merge": (99, remove("done/merge/*up_proj*.json")),
    "a marker of a scale": (99, remove("done/scale/*.json")),
    "a truncated marker": (99, cut_marker),
    "an empty marker": (99, empty_marker),
    "a marker that is something else": (99, marker_of_another_kind),
    "a shard": (99, remove("model-00002*.safetensors")),
    "a shard that became shorter": (99, cut_shard),
    "the report": (99, remove("report.json")),
    "the mark of completeness": (99, remove("complete.json")),
    "the index": (99, remove("model.safetensors.index.json")),
    "leftovers of a kill": (6, stray_files),
}


@pytest.mark.parametrize("what", SPOILS)
def test_what_is_missing_or_damaged_is_made_again(
    what: str, small: Zoo, plan_of: PlanOf, expected: dict[str, str]
) -> None:
    count, spoil = SPOILS[what]
    plan = plan_of(small, merge=MERGE)
    if count < len(plan.tasks):
        stop_after(plan, count)
    else:
        merge_here(plan)
    spoil(plan)
    again(plan)
    assert digests(plan.output) == expected
    assert not remaining(make_plan(load_manifest(Path(plan.source))))
    assert not list(plan.work.rglob("*.tmp"))


def test_nothing_half_made_has_a_final_name(small: Zoo, plan_of: PlanOf) -> None:
    plan = plan_of(small, merge=MERGE)
    for count in (3, 10, 8, 6, 2, 2):
        stop_after(make_plan(load_manifest(Path(plan.source))), count)
        sealed = {t.subject for t in plan.of_stage("seal") if plan.directory.read(t.key)}
        assert {p.name for p in plan.output.glob("*.safetensors")} <= sealed
        assert not (plan.output / "complete.json").exists()


def test_complete_json_is_withdrawn_while_a_change_is_made(small: Zoo, plan_of: PlanOf) -> None:
    merge_here(plan_of(small, merge=MERGE))
    plan = plan_of(small, merge={**MERGE, "alpha": 0.1})
    with pytest.raises(StopRequestedError):
        merge_here(plan, Log(2), restart=True)
    assert not (plan.output / "complete.json").exists()
    progress = progress_of(plan.work)
    assert not progress.complete
    assert {s.name: s.done for s in progress.stages if s.name == "merge"} == {
        "merge": len(plan.of_stage("merge"))
    }


HOLD = """
import sys, time
from pathlib import Path
from esm_stream.store.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_with_process_and_host_until_the_first_is_gone(
    small: Zoo, plan_of: PlanOf
) -> None:
    import socket

    plan = plan_of(small, merge={"method": "average"})
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(plan.work)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError) as error:
            merge_here(plan)
        assert f"process {holder.pid} on {socket.gethostname()}" in str(error.value)
        assert not plan.output.exists()
    finally:
        holder.kill()
        holder.communicate()
    assert (plan.work / "lock").is_file()  # left by the process that was killed
    assert merge_here(plan).tasks_run == len(plan.tasks)
    with locked(plan.work):
        pass


def test_two_merges_give_the_same_bytes_in_every_file(small: Zoo, plan_of: PlanOf) -> None:
    outputs = [merge_here(plan_of(small, f"{n}/merged", merge=MERGE)) for n in "ab"]
    for path in outputs[0].output.iterdir():
        assert path.read_bytes() == (outputs[1].output / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_merge_killed_at_any_moment_resumes_to_identical_bytes(
    zoo: MakeZoo, tmp_path: Path
) -> None:
    """SIGKILL at six moments spread over the running time; each time the same command again."""
    found = zoo("llama", shard="12KB", num_hidden_layers=6)
    commands = {}
    for name in ("straight", "killed"):
        document = found.document(tmp_path / name / "merged", merge=MERGE)
        manifest = write_manifest(tmp_path / f"{name}.toml", document)
        script = "from esm_stream_cli.app import app; app()"
        commands[name] = [sys.executable, "-c", script, "merge", str(manifest), "-q"]
    subprocess.run(commands["straight"], check=True)
    events = (tmp_path / "straight/merged.work/events.jsonl").read_text().splitlines()
    times = [json.loads(line)["time"] for line in events]
    work = tmp_path / "killed/merged.work"
    generator = random.Random(0)
    moments = [(i + generator.random()) / 6 * (times[-1] - times[0]) for i in range(6)]
    previous = 0.0
    for moment in moments:
        process = subprocess.Popen(commands["killed"])
        wait_for_lines(work / "events.jsonl", count_of(work / "events.jsonl") + 1, process)
        time.sleep(moment - previous)
        previous = moment
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(commands["killed"], check=True)
    assert digests(tmp_path / "killed/merged") == digests(tmp_path / "straight/merged")


def count_of(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.is_file() else 0


def wait_for_lines(path: Path, count: int, process: "subprocess.Popen[bytes]") -> None:
    """Wait until a log has so many lines, or the process is gone."""
    while count_of(path) < count and process.poll() is None:
        time.sleep(0.01)


def test_an_output_directory_of_another_model_is_never_touched(
    small: Zoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    work = {"work": str(tmp_path / "shared.work")}
    merge_here(plan_of(small, "first", merge=MERGE, run=work))
    shutil.copytree(small.base, tmp_path / "foreign")
    before = {p.name: p.read_bytes() for p in (tmp_path / "foreign").iterdir()}
    for alpha in (MERGE.get("alpha", 1.0), 0.25):
        plan = plan_of(small, "foreign", merge={**MERGE, "alpha": alpha}, run=work)
        with pytest.raises(InputError, match="did not write last"):
            merge_here(plan, restart=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "foreign").iterdir()} == before


def test_a_work_directory_of_other_files_is_never_touched(
    small: Zoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    (mine / "sub").mkdir(parents=True)
    (mine / "thesis.tmp").write_text("precious")
    (mine / "sub" / "data.partial").write_text("precious")
    plan = plan_of(small, merge=MERGE, run={"work": str(mine)})
    with pytest.raises(InputError, match=r"not of esm-stream \(sub, thesis.tmp\)"):
        merge_here(plan)
    assert {p.name for p in mine.rglob("*")} == {"sub", "thesis.tmp", "data.partial"}


def test_foreign_files_that_come_later_into_a_work_directory_stay(
    small: Zoo, plan_of: PlanOf
) -> None:
    plan = plan_of(small, merge=MERGE)
    merge_here(plan)
    (plan.work / "notes.tmp").write_text("mine")
    merge_here(plan)
    assert (plan.work / "notes.tmp").read_text() == "mine"


def test_a_disk_that_fills_up_is_told_as_such_and_the_merge_goes_on(
    small: Zoo, plan_of: PlanOf, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(small, merge=MERGE)

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(FactorStore, "write_update", no_space)
        with pytest.raises(BudgetError, match="the disk is full"):
            merge_here(plan)
    assert not list(plan.output.glob("*.safetensors"))
    merge_here(plan)
    assert digests(plan.output) == expected
