"""Merges killed at random moments, each resumed to the same bytes.

    python tests/benchmarks/kills.py [--count 50] [--seed 0]

Every merge is a process of its own, forked from this one with the plan made, and ended by SIGKILL.
The moment is drawn by the run's progress, so that it does not depend on how busy the machine is:
after one of its events, uniformly, and a part of the time to the next one, uniformly too.
"""

import argparse
import hashlib
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from models import llama_config, write_manifest, write_random
from run import write_result

from esm_stream.engine import merge
from esm_stream.manifest import load_manifest
from esm_stream.planning.make import make_plan
from esm_stream.planning.plan import Plan, Stage

COMMAND = "python tests/benchmarks/kills.py"
LEVELS = '[merge.options]\nlevels = ["task", "layer"]\n'
MERGES = {
    "ESM, forward block by block": ('"esm"', LEVELS, "chain"),
    "ESM, whole forward of each expert": ('"esm"', LEVELS, "resident"),
    "TIES, trimmed over the whole model": ('"ties"', "", "auto"),
    "OWL, sums over the experts": ('"owl"', "", "auto"),
}


def make_models(folder: Path) -> str:
    """A Llama of 2 blocks in several shards with 4 experts; returns the text of its manifest."""
    config = llama_config(32, 88, 2, 4, 2, 1000)
    write_random(folder / "base", config, 0, None, 64 << 10)
    for i in range(4):
        write_random(folder / f"e{i}", config, 1 + i, folder / "base", 64 << 10)
    return write_manifest(folder, 4, "1GiB", samples=8, tokens=16).read_text()


def plan_of(folder: Path, text: str, method: str, options: str, forward: str) -> Plan:
    """The plan of one of MERGES."""
    text = text.replace('method = "esm"\n', f"method = {method}\n{options}")
    (folder / "manifest.toml").write_text(f'{text}forward = "{forward}"\n')
    return make_plan(load_manifest(folder / "manifest.toml"))


@dataclass
class Found:
    """What the kills of one merge gave."""

    whole_seconds: float = 0.0
    kills: int = 0
    losses: int = 0
    late: int = 0
    stages: Counter[Stage] = field(default_factory=Counter)
    resumed_seconds: list[float] = field(default_factory=list)


def in_child(work: Callable[[], object]) -> int:
    """Start a process that does something and ends; returns its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def seconds_of(work: Callable[[], object]) -> float:
    """CPU seconds of a process that has to end well."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _, status = os.waitpid(in_child(work), 0)
    if status:
        raise SystemExit(f"a merge failed: {status}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def events_of(plan: Plan) -> int:
    """Lines of the event log so far."""
    path = plan.directory.events
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_once(plan: Plan, generator: random.Random, events: int, gap_seconds: float) -> bool:
    """Start a merge and kill it; whether it was still running."""
    moment = generator.randrange(events)
    delay = generator.random() * gap_seconds
    pid = in_child(lambda: merge(plan))
    ended = 0
    while not ended and events_of(plan) < moment:
        ended, _ = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.001)
    if not ended:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        return os.WIFSIGNALED(status)
    return False


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file of a merged model."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def killed(plan: Plan, count: int, generator: random.Random) -> Found:
    """Kill a merge again and again, from nothing each time."""

    def clear() -> None:
        for path in (plan.work, plan.output):
            shutil.rmtree(path, ignore_errors=True)

    clear()
    started = time.monotonic()
    found = Found(seconds_of(lambda: merge(plan)))
    wall = time.monotonic() - started
    wanted, events = hashes(plan.output), events_of(plan)
    while found.kills < count:
        clear()
        if not kill_once(plan, generator, events, wall / events):
            found.late += 1
            continue
        found.kills += 1
        left = [task for key, task in plan.tasks.items() if plan.directory.read(key) is None]
        found.stages[left[0].stage if left else "finish"] += 1
        found.resumed_seconds.append(seconds_of(lambda: merge(plan)))
        found.losses += hashes(plan.output) != wanted
    clear()
    return found


def main() -> None:
    """Kill every sort of merge, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50, help="kills of each merge")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"{args.count} kills of each merge, seed {args.seed}: tiny Llama of 2 blocks, 4 experts, "
        "output in several shards, one task at a time. Killed by SIGKILL after an event of the run "
        "drawn uniformly, and a part of the time to the next. Then the same merge again, until it "
        "is done, and the sha256 of every file is compared with those of an undisturbed merge.",
        "",
        "| merge | kills | resumed to the same bytes | killed in | CPU s undisturbed | "
        "CPU s resumed, mean (most) |",
        "|---|---|---|---|---|---|",
    ]
    losses = kills = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        text = make_models(folder)
        for number, (name, settings) in enumerate(MERGES.items()):
            plan = plan_of(folder, text, *settings)
            found = killed(plan, args.count, random.Random(args.seed + number))
            losses, kills = losses + found.losses, kills + found.kills
            stages = ", ".join(f"{stage} {n}" for stage, n in found.stages.items())
            seconds = found.resumed_seconds
            lines.append(
                f"| {name} | {found.kills} | {found.kills - found.losses} | {stages} | "
                f"{found.whole_seconds:.2f} | {sum(seconds) / len(seconds):.2f} "
                f"({max(seconds):.2f}) |"
            )
            end = ["", f"{kills} kills, {losses} losses."]
            title = "Killed at random moments, resumed to the same bytes"
            write_result("kills", title, [*lines, *end], COMMAND)


if __name__ == "__main__":
    main()
