"""Disk space: what a run still needs, where, and what to say when there is less.

From:  the plan, the tasks that are left, free bytes of the file systems of work and output.
To:    engine.py before any work; schedule.py and engine.py when a disk is full all the same.
"""

import errno
import shutil
from collections.abc import Collection, Generator
from contextlib import contextmanager
from pathlib import Path

from esm_stream.budget import format_size
from esm_stream.completion import remaining
from esm_stream.errors import BudgetError, TaskError
from esm_stream.planning.plan import Plan
from esm_stream.stages.write import layouts_of
from esm_stream.write.shards import is_reserved

# Configuration, tokenizer, report, index: what is written beside the shards.
BESIDE_BYTES = 16 << 20


def require_space(plan: Plan, todo: Collection[str]) -> None:
    """Refuse to start what the disks cannot hold.

    Raises:
        BudgetError: Needed and free bytes.
    """
    work, output = _needed(plan, todo)
    if plan.work.stat().st_dev == plan.output.stat().st_dev:
        free = shutil.disk_usage(plan.work).free
        if work + output > free:
            raise BudgetError(
                f"{plan.work}: the work directory may need {format_size(work)} more and the output "
                f"{format_size(output)} on the same disk, {format_size(free)} are free. {_ADVICE}"
            )
        return
    for folder, needed, what in (
        (plan.work, work, "the work directory may need"),
        (plan.output, output, "the output needs"),
    ):
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise BudgetError(
                f"{folder}: {what} {format_size(needed)} more, {format_size(free)} are free. "
                f"{_ADVICE}"
            )


_ADVICE = (
    "Free some space, put [run] work or [output] path on another disk, let go of what is no longer "
    'needed ([run] keep = "nothing", or esm-stream clean), or lower [merge.options] rank_factor.'
)


def _needed(plan: Plan, todo: Collection[str]) -> tuple[int, int]:
    """Bytes that tasks may still need in the work directory, and in the output directory."""
    shards = [
        layout.file_size
        for name, layout in layouts_of(plan).items()
        if f"seal/{name}" in todo and not is_reserved(plan.output, layout)
    ]
    return plan.bytes_to_keep(todo), sum(shards) + (BESIDE_BYTES if "finish" in todo else 0)


@contextmanager
def storage_errors(plan: Plan, what: str) -> Generator[None]:
    """Say of a full or failing disk what it means for the run.

    Raises:
        BudgetError: A disk is full; with free bytes and those that are still needed.
        TaskError: A file cannot be read or written.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # nobody reads our output: no matter of disks
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise TaskError(f"{what}: {type(error).__name__}: {error}") from error
        raise BudgetError(_full(plan, what)) from error


def _full(plan: Plan, what: str) -> str:
    work, output = _needed(plan, remaining(plan))
    return (
        f"{what}: the disk is full. {_free(plan.work)} are free under {plan.work}, where up to "
        f"{format_size(work)} more are needed; {_free(plan.output)} under {plan.output}, where "
        f"{format_size(output)} are. Free some space and run the same command again; finished work "
        "is kept"
    )


def _free(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return format_size(shutil.disk_usage(folder).free)
