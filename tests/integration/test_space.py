"""What a work directory keeps, what of it can go, and disks that are too small."""

import shutil
from pathlib import Path

import pytest
from conftest import MakeZoo, PlanOf, merge_here
from test_merge import digests
from test_resume import MERGE, Log, again, stop_after
from typer.testing import CliRunner

from esm_stream.clean import COSTS, FREE, clean, shares_of
from esm_stream.completion import remaining
from esm_stream.engine import progress_of
from esm_stream.errors import BudgetError, InputError, LockedError
from esm_stream.planning.plan import Plan
from esm_stream.store.lock import locked
from esm_stream.verify import verify


def chunks(plan: Plan, pattern: str) -> list[Path]:
    return [p for p in plan.directory.factors.glob(f"*/{pattern}/c/**/*") if p.is_file()]


@pytest.mark.parametrize("keep", ["all", "updates", "nothing"])
def test_factors_go_when_they_have_been_used_and_nothing_else_changes(
    keep: str, zoo: MakeZoo, plan_of: PlanOf
) -> None:
    found = zoo("llama", shard="12KB")
    merge_here(plan_of(found, "kept/merged", merge=MERGE))
    plan = plan_of(found, merge=MERGE, run={"keep": keep})
    stop_after(plan, len(plan.tasks) // 2)
    again(plan)
    assert digests(plan.output) == digests(plan.output.parent / "kept/merged")
    there = {kind: bool(chunks(plan, kind)) for kind in ("basis", "coordinates", "update")}
    factors, updates = keep == "all", keep != "nothing"
    assert there == {"basis": factors, "coordinates": factors, "update": updates}
    assert bool(list(plan.work.glob("inputs/*"))) == factors
    assert not remaining(plan)
    assert again(plan) == []
    assert verify(plan.work).damages == ()
    assert progress_of(plan.work).complete


def test_another_alpha_needs_updates_only(zoo: MakeZoo, plan_of: PlanOf) -> None:
    found, run = zoo("llama", shard="12KB"), {"keep": "updates"}
    merge_here(plan_of(found, merge=MERGE, run=run))
    changed, log = {**MERGE, "alpha": 0.5}, Log()
    plan = plan_of(found, merge=changed, run=run)
    merge_here(plan, log, restart=True)
    assert {key.split("/")[0] for key in log.ran} == {"write", "seal", "finish"}
    fresh = plan_of(found, "fresh/merged", merge=changed)
    merge_here(fresh)
    assert digests(plan.output) == digests(fresh.output)


def test_a_complete_merge_stays_complete_when_everything_is_cleaned(
    zoo: MakeZoo, plan_of: PlanOf
) -> None:
    plan = plan_of(zoo("llama", shard="12KB"), merge=MERGE)
    merge_here(plan)
    before = {share.kind: share for share in shares_of(plan.work)}
    assert before["factors"].size > before["updates"].size > 0
    assert not any(share.needed_by for share in before.values())
    removed = clean(plan.work, list(COSTS))
    assert [share.size for share in removed] == [share.size for share in before.values()]
    assert not any(share.size for share in shares_of(plan.work))
    assert again(plan) == []
    changed = {**MERGE, "alpha": 0.5}
    other = plan_of(plan_zoo := zoo("llama", shard="12KB"), merge=changed)
    merge_here(other, restart=True)
    fresh = plan_of(plan_zoo, "fresh/merged", merge=changed)
    merge_here(fresh)
    assert digests(other.output) == digests(fresh.output)


def test_what_is_still_needed_is_not_cleaned(zoo: MakeZoo, plan_of: PlanOf) -> None:
    plan = plan_of(zoo("llama", shard="12KB"), merge=MERGE)
    stop_after(plan, 6)
    (plan.work / "hidden" / "esm-00.tmp").write_bytes(b"left")
    (plan.work / "mine.txt").write_bytes(b"precious")
    with pytest.raises(InputError, match="still to be run need its states"):
        clean(plan.work, FREE)
    assert [(s.kind, s.files) for s in clean(plan.work, ["temporary"])] == [("temporary", 1)]
    with locked(plan.work), pytest.raises(LockedError):
        clean(plan.work, ["temporary"])
    with pytest.raises(InputError, match="no kind of files"):
        clean(plan.work, ["everything"])
    assert (plan.work / "mine.txt").exists()
    moved = plan.work.with_name("moved.work")
    shutil.copytree(plan.work, moved)
    with pytest.raises(InputError, match="was moved"):
        clean(moved, ["temporary"])


def test_the_command_shows_and_removes(zoo: MakeZoo, plan_of: PlanOf) -> None:
    from esm_stream_cli.app import app

    plan = plan_of(zoo("llama", shard="12KB"), merge=MERGE)
    merge_here(plan)
    shown = CliRunner().invoke(app, ["clean", str(plan.work), "factors"])
    assert shown.exit_code == 0
    assert "factors" in shown.stdout
    assert chunks(plan, "basis")
    assert CliRunner().invoke(app, ["clean", str(plan.work), "factors", "--apply"]).exit_code == 0
    assert not chunks(plan, "basis")
    assert chunks(plan, "update")


def test_too_small_disks_are_refused_before_any_work_with_both_numbers(
    zoo: MakeZoo, plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(zoo("llama", shard="12KB"), merge=MERGE)
    usage = shutil.disk_usage(plan.work.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=12_345))
    with pytest.raises(BudgetError, match=r"may need .* and the output .*, 12\.1 KiB are free"):
        merge_here(plan)
    assert not list(plan.output.iterdir())
    assert not plan.directory.factors.exists()
