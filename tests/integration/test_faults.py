"""Whatever fails, and whenever: the error is told, nothing half-made has a final name, and the same
command goes on to the same bytes.

One merge of ESM and TIES is begun again and again. Each time the next step of the storage that has
not failed yet fails, so that all of them fail once (see faults.py).
"""

import random
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeZoo, merge_here
from faults import (
    IO_ERROR,
    NO_SPACE,
    Disk,
    Faults,
    KilledError,
    put,
    reads_short,
    tree_of,
    watched,
)
from models import write_manifest
from test_integrity import TIES
from test_merge import digests
from test_resume import MERGE, Log

from esm_stream import stopping
from esm_stream.errors import BudgetError, EsmStreamError, StopRequestedError
from esm_stream.manifest import load_manifest
from esm_stream.planning.make import make_plan
from esm_stream.planning.plan import Plan
from esm_stream.verify import verify

# All sorts of files are there with two matrices of a block merged by ESM; the rest takes time.
FEW = "re:.*(k_proj|v_proj|o_proj|gate_proj|lm_head).*"


@dataclass
class Straight:
    """A plan, its inputs, and what an uninterrupted merge of it leaves."""

    plan: Plan
    inputs: Path
    digests: dict[str, str]

    @property
    def roots(self) -> dict[str, Path]:
        return {"work": self.plan.work, "output": self.plan.output, "inputs": self.inputs}

    def clear(self) -> None:
        for path in (self.plan.work, self.plan.output):
            shutil.rmtree(path, ignore_errors=True)

    def require_nothing_half_made(self) -> None:
        found = digests(self.plan.output) if self.plan.output.exists() else {}
        for name, digest in found.items():
            if not name.endswith((".partial", ".tmp")):
                assert digest == self.digests[name], name
        if "complete.json" in found:
            assert found == self.digests


@pytest.fixture(scope="module")
def straight(zoo: MakeZoo, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    found = zoo("llama", shard="12KB")
    root = tmp_path_factory.mktemp("faults")
    merge = {**MERGE, "rules": [TIES, {"tensors": FEW, "method": "average"}]}
    document = found.document(root / "merged", merge=merge)
    plan = make_plan(load_manifest(write_manifest(root / "merged.toml", document)))
    merge_here(plan)
    return Straight(plan, found.root, digests(plan.output))


def sort_of(step: str) -> str:
    """Steps of one sort: the call, and the kind of file by the folders that it lies in."""
    what, _, place = step.partition(" ")
    parts = place.split("/")
    kind = "array" if "factors.zarr" in parts else parts[1] if len(parts) > 1 else ""
    if kind == "done" and len(parts) > 2:
        kind = f"done {parts[2]}"
    if kind == "array":
        kind = parts[3] if len(parts) > 3 else "array"
    return f"{what} {parts[0]} {kind} {Path(place).suffix}"


class OncePerSort:
    """Wants the first step of every sort."""

    def __init__(self) -> None:
        self._sorts: set[str] = set()

    def __call__(self, step: str) -> bool:
        sort = sort_of(step)
        if sort in self._sorts:
            return False
        self._sorts.add(sort)
        return True


def every(_: str) -> bool:
    return True


def run_until_done(
    straight: Straight,
    faults: Faults,
    check: Callable[[BaseException], None],
    limit: int = 3000,
) -> int:
    """Merge until nothing is left that has not failed; returns how often something failed."""
    straight.clear()
    for count in range(limit):
        try:
            with watched(faults):
                merge_here(straight.plan)
        except (EsmStreamError, KilledError) as error:
            stopping.clear()
            check(error)
            straight.require_nothing_half_made()
            continue
        assert digests(straight.plan.output) == straight.digests
        if not faults.last:
            return count
    pytest.fail(f"still failing after {limit} times; the last was {faults.last}")


def sorts(slow: Any) -> Any:  # noqa: ANN401
    """Both ways: the first step of each sort, and every single step (slow)."""
    return pytest.mark.parametrize(
        "wanted",
        [
            pytest.param(OncePerSort, id="each-sort"),
            pytest.param(lambda: every, id="every-step", marks=slow),
        ],
    )


@sorts(pytest.mark.slow)
@pytest.mark.parametrize("strike", [IO_ERROR, NO_SPACE], ids=["EIO", "ENOSPC"])
def test_a_failing_call_is_told_and_the_merge_goes_on(
    strike: Callable[..., Any], wanted: Callable[[], Callable[[str], bool]], straight: Straight
) -> None:
    wanted_now = wanted()
    full = strike is NO_SPACE

    def writes(step: str) -> bool:
        what = step.partition(" ")[0]
        return (not full or what not in ("open", "read", "unlink", "rmdir")) and wanted_now(step)

    faults = Faults(straight.roots, strike, writes)

    def check(error: BaseException) -> None:
        assert isinstance(error, EsmStreamError)
        assert str(error)
        if full:
            assert isinstance(error, BudgetError), (faults.last, error)

    failures = run_until_done(straight, faults, check)
    assert failures > 30


def test_short_reads_are_noticed_or_read_on(straight: Straight) -> None:
    wanted = OncePerSort()
    faults = Faults(
        straight.roots, reads_short, lambda step: step.startswith("read") and wanted(step)
    )
    run_until_done(straight, faults, lambda _: None)
    assert len(faults.struck) > 10


def test_a_stop_at_any_step_is_followed_and_nothing_is_done_twice(straight: Straight) -> None:
    def stop(faults: Faults, name: str, path: Path) -> None:  # noqa: ARG001
        stopping.request()

    faults = Faults(straight.roots, stop, OncePerSort())

    def check(error: BaseException) -> None:
        assert isinstance(error, StopRequestedError)

    assert run_until_done(straight, faults, check) > 20


class Kill:
    """The process, or with a disk the whole machine, ends at a step."""

    def __init__(self, plan: Plan, disk: Disk | None, seed: int) -> None:
        self._roots = [path for path in (plan.work, plan.output) if path.exists()]
        self._disk, self._generator = disk, random.Random(seed)
        self.left: dict[Path, Any] = {}

    def __call__(self, faults: Faults, name: str, path: Path) -> None:  # noqa: ARG002
        if self._disk is None:
            self.left = {root: tree_of(root) for root in self._roots if root.exists()}
        else:
            self.left = self._disk.after_power_failure(self._generator)
        faults.dead = True
        raise KilledError


def run_with_kills(
    straight: Straight, wanted: Callable[[str], bool], *, power: bool, seed: int
) -> int:
    """Merge until done, each time killed at another step; no finished task may run again."""
    straight.clear()
    for path in (straight.plan.work, straight.plan.output):
        path.mkdir()
    roots = {name: root for name, root in straight.roots.items() if name != "inputs"}
    struck: set[str] = set()
    finished: set[str] = set()
    for count in range(3000):
        disk = Disk([straight.plan.work, straight.plan.output]) if power else None
        kill = Kill(straight.plan, disk, zlib.crc32(f"{seed} {count}".encode()))
        faults = Faults(roots, kill, wanted, struck)
        log = Log()
        try:
            with watched(faults, disk.forced if disk else lambda _: None):
                merge_here(straight.plan, log)
        except KilledError:
            put(kill.left)
        finally:
            if disk:
                disk.close()
        twice = {key for key in log.ran if key != "finish"} & finished
        assert not twice, faults.last
        finished |= set(log.ran)
        straight.require_nothing_half_made()
        if not faults.last:
            assert digests(straight.plan.output) == straight.digests
            assert verify(straight.plan.work).damages == ()
            return count
    pytest.fail("still being killed")


@sorts(pytest.mark.slow)
def test_a_kill_at_any_step_loses_nothing(
    wanted: Callable[[], Callable[[str], bool]], straight: Straight
) -> None:
    assert run_with_kills(straight, wanted(), power=False, seed=0) > 50


@sorts(pytest.mark.slow)
def test_a_power_failure_at_any_step_loses_nothing_that_was_finished(
    wanted: Callable[[], Callable[[str], bool]], straight: Straight
) -> None:
    assert run_with_kills(straight, wanted(), power=True, seed=1) > 50
