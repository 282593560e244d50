"""One calibration serves many merges: it is kept, found again, and never lost by another option."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeZoo, PlanOf, merge_here
from models import Zoo, write_manifest
from typer.testing import CliRunner

from esm_stream.engine import Outcome, calibrate, progress_of
from esm_stream.errors import ChangedError, ManifestError, StopRequestedError
from esm_stream.events import Event
from esm_stream.planning.plan import CALIBRATION, Plan
from esm_stream_cli.app import app

ESM: dict[str, Any] = {"alpha": 1.5, "options": {"levels": ["task", "layer"]}}


class Log:
    """A listener that keeps what ran, and may stop a run."""

    def __init__(self, stop_after: int = 10**6) -> None:
        self.ran: list[str] = []
        self._left = stop_after

    def __call__(self, event: Event) -> None:
        if event.kind == "task_finished":
            self.ran.append(event.task)
            self._left -= 1
            if self._left == 0:
                raise StopRequestedError("enough")


def calibrate_here(plan: Plan, log: Log | None = None, **options: bool) -> Outcome:
    return calibrate(plan, scheduler="sync", listener=log or Log(), **options)


def ran_by(plan: Plan, **options: bool) -> set[str]:
    """Stages of the tasks that a merge runs."""
    log = Log()
    merge_here(plan, log, **options)
    return {key.split("/")[0] for key in log.ran}


def shards(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.safetensors"))}


@pytest.fixture
def llama(zoo: MakeZoo) -> Zoo:
    return zoo("llama")


@pytest.fixture
def work(tmp_path: Path) -> dict[str, str]:
    """[run] with a work directory that several manifests share."""
    return {"work": str(tmp_path / "work")}


def test_a_merge_starts_from_a_calibration_and_ends_in_the_same_bytes(
    llama: Zoo, plan_of: PlanOf
) -> None:
    plan = plan_of(llama, merge=ESM)
    log = Log()
    outcome = calibrate_here(plan, log)
    assert {key.split("/")[0] for key in log.ran} == CALIBRATION
    assert outcome.output == plan.work
    assert outcome.tasks_run == len(log.ran)
    assert list(plan.output.iterdir()) == []
    assert not ran_by(plan) & CALIBRATION
    fresh = plan_of(llama, "fresh/merged", merge=ESM)
    merge_here(fresh)
    assert shards(plan.output) == shards(fresh.output)


def test_a_calibration_that_is_done_is_not_done_again(llama: Zoo, plan_of: PlanOf) -> None:
    plan = plan_of(llama, merge=ESM)
    first = calibrate_here(plan)
    again = calibrate_here(plan)
    assert (again.tasks_run, again.tasks_reused) == (0, first.tasks_run)
    merge_here(plan)
    before = shards(plan.output)
    assert calibrate_here(plan).tasks_run == 0
    assert (plan.output / "complete.json").is_file()
    assert shards(plan.output) == before


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_stopped_calibration_goes_on(count: int, llama: Zoo, plan_of: PlanOf) -> None:
    plan = plan_of(llama, merge=ESM)
    first, second = Log(count), Log()
    with pytest.raises(StopRequestedError):
        calibrate_here(plan, first)
    assert not progress_of(plan.work).calibrated
    calibrate_here(plan, second)
    assert progress_of(plan.work).calibrated
    assert not set(first.ran) & set(second.ran)


@pytest.mark.parametrize(
    "other",
    [
        {"merge": {**ESM, "alpha": 0.5}},
        {"merge": {"options": {"levels": []}}},
        {"merge": ESM, "output": {"dtype": "float16"}},
    ],
)
def test_other_merge_options_start_from_a_calibration_without_restart(
    other: dict[str, Any], llama: Zoo, plan_of: PlanOf
) -> None:
    calibrate_here(plan_of(llama, merge=ESM))
    plan = plan_of(llama, **other)
    assert not ran_by(plan) & CALIBRATION
    fresh = plan_of(llama, "fresh/merged", **other)
    merge_here(fresh)
    assert shards(plan.output) == shards(fresh.output)


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ({"merge": {**ESM, "options": {"rank_factor": 0.5}}}, "merge.options.rank_factor"),
        ({"merge": ESM, "calibration": {"seed": 1}}, "calibration.seed: 0 -> 1"),
        ({"merge": {"method": "average"}}, "merge.method: 'esm' -> 'average'"),
    ],
)
def test_options_that_would_lose_a_calibration_are_refused(
    other: dict[str, Any], key: str, llama: Zoo, plan_of: PlanOf
) -> None:
    calibrate_here(plan_of(llama, merge=ESM))
    with pytest.raises(ChangedError, match=re.escape(key)):
        merge_here(plan_of(llama, **other))


def test_many_merges_share_one_work_directory(
    llama: Zoo, plan_of: PlanOf, work: dict[str, str]
) -> None:
    calibrate_here(plan_of(llama, "any", merge=ESM, run=work))
    weak = plan_of(llama, "weak", merge={**ESM, "alpha": 0.5}, run=work)
    assert "merge" in ran_by(weak)
    kept = shards(weak.output)
    strong = plan_of(llama, "strong", merge=ESM, run=work)
    assert ran_by(strong) == {"write", "seal", "finish"}
    assert shards(weak.output) == kept
    assert (weak.output / "complete.json").is_file()
    for plan in (weak, strong):
        options = {"merge": plan.manifest["merge"]}
        fresh = plan_of(llama, f"fresh/{plan.output.name}", **options)
        merge_here(fresh)
        assert shards(plan.output) == shards(fresh.output)


def test_a_merge_that_is_half_done_is_not_lost_to_another(
    llama: Zoo, plan_of: PlanOf, work: dict[str, str]
) -> None:
    first = plan_of(llama, "first", merge=ESM, run=work)
    calibrate_here(first)
    with pytest.raises(StopRequestedError):
        merge_here(first, Log(3))
    other = plan_of(llama, "other", merge={**ESM, "alpha": 0.5}, run=work)
    with pytest.raises(ChangedError, match=r"merge\.alpha"):
        merge_here(other)
    merge_here(first)
    merge_here(other)
    assert (other.output / "complete.json").is_file()


def test_the_same_output_with_other_options_still_needs_restart(
    llama: Zoo, plan_of: PlanOf
) -> None:
    plan = plan_of(llama, merge=ESM)
    calibrate_here(plan)
    merge_here(plan)
    with pytest.raises(ChangedError):
        merge_here(plan_of(llama, merge={**ESM, "alpha": 0.5}))


def test_a_merge_without_data_keeps_the_calibration_for_the_next(
    llama: Zoo, plan_of: PlanOf, work: dict[str, str]
) -> None:
    esm = plan_of(llama, "esm", merge=ESM, run=work)
    calibrate_here(esm)
    average = plan_of(llama, "average", merge={"method": "average"}, run=work)
    merge_here(average, restart=True)
    assert not ran_by(esm, restart=True) & CALIBRATION
    assert not ran_by(plan_of(llama, "esm", merge=ESM, run=work))


def test_methods_that_need_no_data_have_nothing_to_calibrate(llama: Zoo, plan_of: PlanOf) -> None:
    plan = plan_of(llama, merge={"method": "average"})
    with pytest.raises(ManifestError, match="nothing to calibrate: average"):
        calibrate_here(plan)
    assert not plan.work.exists()


def test_the_command_line(llama: Zoo, tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
        return re.sub(r"\s+", " ", result.output)

    path = write_manifest(tmp_path / "m.toml", llama.document(tmp_path / "merged", merge=ESM))
    text = run("calibrate", path, "--scheduler", "sync")
    assert "merged.work: calibrated" in text
    assert f"esm-stream merge {path}" in text
    assert "calibrated, nothing merged yet; to merge: esm-stream merge" in run(
        "status", tmp_path / "merged.work"
    )
    found = json.loads(
        CliRunner().invoke(app, ["status", str(tmp_path / "merged.work"), "--json"]).output
    )
    assert (found["calibrated"], found["complete"]) == (True, False)
    events = [
        json.loads(line)
        for line in CliRunner()
        .invoke(app, ["calibrate", str(path), "--scheduler", "sync", "--json"])
        .output.splitlines()
    ]
    assert events[0]["data"]["pending"] == []
    assert events[0]["data"]["reused"] > 4
    assert "0 tasks run" not in run("merge", path, "--scheduler", "sync")
    assert "complete; nothing remains" in run("status", tmp_path / "merged.work")
    average = llama.document(tmp_path / "average", merge={"method": "average"})
    other = write_manifest(tmp_path / "a.toml", average)
    refused = CliRunner().invoke(app, ["calibrate", str(other)])
    assert refused.exit_code == 3
    assert "nothing to calibrate" in refused.output
