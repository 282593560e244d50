"""How a run is shown: bars per stage on a terminal, lines elsewhere, JSON events, or nothing."""

import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from esm_stream.events import Event, Listener

if TYPE_CHECKING:
    from esm_stream.planning.plan import Plan, Task

LINE_SECONDS = 10.0
NAMES = {
    "inputs": "calibration inputs",
    "stem": "embeddings",
    "forward": "forward and bases",
    "merge": "merge matrices",
    "measure": "statistics",
    "total": "totals",
    "walk": "merge block by block",
    "scale": "layer scales",
    "magnitudes": "magnitudes",
    "lines": "scale over depth",
    "write": "write tensors",
    "seal": "seal shards",
    "finish": "finish",
}


@contextmanager
def shown(
    plan: "Plan", stages: Collection[str], *, quiet: bool, as_json: bool
) -> Iterator[Listener]:
    """A listener that shows events of some stages in the way that fits; closed on every way out."""
    if as_json:
        yield lambda event: typer.echo(event.as_json())
    elif quiet:
        yield lambda _: None
    elif sys.stderr.isatty():
        with _bars(plan, stages) as listener:
            yield listener
    else:
        yield _lines(plan)


@contextmanager
def _bars(plan: "Plan", stages: Collection[str]) -> Iterator[Listener]:
    """One bar per stage, advancing by the bytes its tasks read and write."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    from esm_stream.budget import format_size

    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        TextColumn("{task.fields[done]}/{task.fields[tasks]} tasks"),
        TextColumn("{task.fields[moved]:>9}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars: dict[str, TaskID] = {}

        def start(pending: set[str]) -> None:
            for stage, name in NAMES.items():
                tasks = [t for t in plan.tasks.values() if t.stage == stage and stage in stages]
                if not tasks:
                    continue
                done = [t for t in tasks if t.key not in pending]
                bars[stage] = progress.add_task(
                    name,
                    total=sum(map(_weight, tasks)),
                    completed=sum(map(_weight, done)),
                    done=len(done),
                    tasks=len(tasks),
                    moved="",
                )

        def listen(event: Event) -> None:
            if event.kind == "run_started":
                start(set(event.data["pending"]))
            if event.kind == "task_finished":
                bar = bars[event.stage]
                row = progress.tasks[bar]
                weight = _weight(plan.tasks[event.task])
                moved = format_size(row.completed + weight) if event.write_bytes else ""
                progress.update(bar, advance=weight, done=row.fields["done"] + 1, moved=moved)

        yield listen


def _weight(task: "Task") -> int:
    """Bytes that a task moves; at least one, so that every task counts."""
    return max(1, task.read_bytes + task.write_bytes)


def _lines(plan: "Plan") -> Listener:
    """A line at the start, every few seconds, and when a stage is done."""
    from esm_stream.budget import format_size

    left = dict.fromkeys(NAMES, 0)
    counts = {"tasks": 0, "bytes": 0, "pending": 0}
    clock = {"last": time.monotonic()}

    def listen(event: Event) -> None:
        if event.kind == "run_started":
            pending, reused = event.data["pending"], event.data["reused"]
            counts["pending"] = len(pending)
            for key in pending:
                left[plan.tasks[key].stage] += 1
            typer.echo(f"{len(pending)} tasks to run, {reused} reused from {plan.work}", err=True)
        if event.kind != "task_finished":
            return
        counts["tasks"] += 1
        counts["bytes"] += event.read_bytes + event.write_bytes
        left[event.stage] -= 1
        now = time.monotonic()
        if left[event.stage] == 0 or now - clock["last"] > LINE_SECONDS:
            clock["last"] = now
            what = f"{NAMES[event.stage]} done" if left[event.stage] == 0 else event.task
            typer.echo(
                f"{counts['tasks']}/{counts['pending']} tasks, "
                f"{format_size(counts['bytes'])} moved: {what}",
                err=True,
            )

    return listen
