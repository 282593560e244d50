"""A merge from a plan to a complete output directory, resumable at every point.

From:  the CLI or a program: `merge(make_plan(load_manifest(path)))`.
To:    schedule.py, once for the inputs of all experts, once for everything else.

Before any work: the lock, the comparison with what the work directory belongs to, the sweep of what
an interrupted run left, integer tensors that must be equal, and disk for factors and output.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from esm_stream import stopping
from esm_stream.budget import format_size
from esm_stream.checkpoints.reader import TensorReader, equal_bytes
from esm_stream.errors import BudgetError, ChangedError, InputError
from esm_stream.events import Event, Listener, broadcast, log_to
from esm_stream.planning.plan import STAGES, Plan, Task, changed_keys, load_plan
from esm_stream.schedule import require_scheduler, run_task, run_tasks
from esm_stream.stages.context import checkpoint_at, forget_checkpoints
from esm_stream.stages.finish import COMPLETE
from esm_stream.stages.write import layouts_of
from esm_stream.store.factors import FactorStore
from esm_stream.store.files import write_atomically
from esm_stream.store.lock import is_locked, locked
from esm_stream.store.work import OWN_NAMES, Marker, tasks_to_run
from esm_stream.write.shards import PARTIAL_SUFFIX, reserve


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did."""

    output: Path
    tasks_run: int
    tasks_reused: int


def merge(
    plan: Plan,
    *,
    scheduler: str = "local",
    parallel: int = 1,
    restart: bool = False,
    listener: Listener = lambda _: None,
) -> Outcome:
    """Run a plan, or what is left of it.

    Args:
        plan: Made by `make_plan`.
        scheduler: See schedule.py.
        parallel: Tasks at once in this process.
        restart: Accept other options than the work directory was made with; results that the
            change does not touch are kept.
        listener: Called with every event.

    Raises:
        EsmStreamError: Lock, changed options, space, bad input, or a failed task; finished work
            is kept and the same call goes on from there.
    """
    directory = plan.directory
    require_scheduler(scheduler)
    stopping.clear()
    forget_checkpoints()
    _require_own_work(plan)
    with locked(directory.root):
        _require_same(plan, restart=restart)
        _require_own_output(plan)
        _require_equal_integers(plan)
        directory.sweep()
        todo = _todo(plan)
        _require_space(plan, todo)
        write_atomically(directory.plan, plan.dump())
        _lay_out(plan, todo)
        listen = broadcast(log_to(directory.events), listener)
        keys = [key for key in plan.tasks if key in todo]
        reused = len(plan.tasks) - len(keys)
        listen(Event("run_started", data={"reused": reused, "pending": keys}))
        _draw_inputs(plan, [key for key in keys if plan.tasks[key].stage == "inputs"], listen)
        rest = [key for key in keys if plan.tasks[key].stage != "inputs"]
        _run(plan, rest, scheduler, parallel, listen)
        listen(Event("run_finished", message=str(plan.output)))
    return Outcome(plan.output, len(todo), len(plan.tasks) - len(todo))


def _draw_inputs(plan: Plan, keys: list[str], listen: Listener) -> None:
    """Draw the calibration inputs of all experts, here and first: the last mistakes to be found.

    Raises:
        InputError: Every mistake in the calibration data of every expert.
    """
    problems: list[str] = []
    for key in keys:
        try:
            listen(finished(plan.tasks[key], run_task(str(plan.directory.plan), key)))
        except InputError as error:
            problems += error.problems
    if problems:
        listen(Event("task_failed", message=problems[0]))
        raise InputError(list(dict.fromkeys(problems)))


def _run(plan: Plan, keys: list[str], scheduler: str, parallel: int, listen: Listener) -> None:
    def report(key: str, seconds: float) -> None:
        listen(finished(plan.tasks[key], seconds))

    try:
        run_tasks(plan, keys, scheduler, parallel, report)
    except Exception as error:
        listen(Event("task_failed", message=str(error)))
        raise


def finished(task: Task, seconds: float) -> Event:
    """The event of one finished task."""
    return Event(
        "task_finished",
        task=task.key,
        stage=task.stage,
        read_bytes=task.read_bytes,
        write_bytes=task.write_bytes,
        seconds=round(seconds, 4),
    )


def remaining(plan: Plan) -> set[str]:
    """Keys of the tasks that are still to be run."""
    directory = plan.directory
    markers: dict[str, Marker | None] = {key: directory.read(key) for key in plan.tasks}

    def is_valid(key: str) -> bool:
        marker = markers[key]
        return (
            marker is not None
            and marker.fingerprint == plan.tasks[key].fingerprint
            and directory.persistent_outputs_exist(marker)
        )

    def has_transients(key: str) -> bool:
        marker = markers[key]
        return marker is not None and directory.transient_outputs_exist(marker)

    return tasks_to_run(list(plan.tasks), plan.transient_readers, is_valid, has_transients)


def _todo(plan: Plan) -> set[str]:
    """Tasks to run; their markers are dropped, and so is a complete mark that is not true."""
    todo = remaining(plan)
    if any(plan.tasks[key].stage in ("write", "seal", "finish") for key in todo):
        todo.add("finish")
        (plan.output / COMPLETE).unlink(missing_ok=True)
    for key in todo:
        plan.directory.forget(key)
    done = plan.directory.root / "done"
    if done.is_dir():
        known = {plan.directory.marker(key) for key in plan.tasks}
        for path in done.rglob("*.json"):
            if path not in known:
                path.unlink()
    return todo


def _require_same(plan: Plan, *, restart: bool) -> None:
    """Refuse a work directory that was made with other options.

    Raises:
        ChangedError: With every key that differs.
    """
    path = plan.directory.plan
    if restart or not path.is_file():
        return
    try:
        before = json.loads(path.read_bytes())["manifest"]
    except (ValueError, KeyError, TypeError) as error:
        raise ChangedError(f"{path}: damaged; run again with --restart") from error
    lines = changed_keys(before, plan.manifest)
    if lines:
        raise ChangedError(
            f"{plan.work} belongs to a merge with other options:\n  "
            + "\n  ".join(lines)
            + "\nRun with --restart to continue with the new options (what they do not touch is "
            "kept), or choose another [run] work."
        )


def _require_own_output(plan: Plan) -> None:
    """Refuse to write into a directory that holds something else.

    Raises:
        InputError: The output directory is an input, or holds files of another origin.
    """
    inputs = {plan.base.resolve(), *(root.resolve() for root in plan.experts.values())}
    if plan.output.resolve() in inputs:
        raise InputError([f"{plan.output}: is the base or an expert; choose another [output] path"])
    if not plan.output.exists():
        plan.output.mkdir(parents=True)
        return
    if not plan.output.is_dir():
        raise InputError([f"{plan.output}: is not a directory; choose another [output] path"])
    names = sorted(path.name for path in plan.output.iterdir())
    if names and _last_output(plan) != plan.output:
        raise InputError(
            [
                f"{plan.output}: holds files that {plan.work} did not write last "
                f"({', '.join(names[:5])}); choose another [output] path, or remove it"
            ]
        )


def _last_output(plan: Plan) -> Path | None:
    """The output directory that the last run of this work directory wrote to."""
    try:
        return Path(json.loads(plan.directory.plan.read_bytes())["output"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _require_own_work(plan: Plan) -> None:
    """Refuse to use a directory of other files as work directory: it is swept and rewritten.

    Raises:
        InputError: Naming some of the files.
    """
    directory = plan.directory
    if directory.plan.is_file() or not directory.root.exists():
        return
    if not directory.root.is_dir():
        raise InputError([f"{directory.root}: is not a directory; choose another [run] work"])
    foreign = sorted({path.name for path in directory.root.iterdir()} - OWN_NAMES)
    if foreign:
        raise InputError(
            [
                f"{directory.root}: holds files that are not of esm-stream "
                f"({', '.join(foreign[:5])}); choose another [run] work"
            ]
        )


def _require_equal_integers(plan: Plan) -> None:
    """Tensors that cannot be merged by arithmetic must be the same in all models.

    Raises:
        InputError: Every tensor of every expert that differs.
    """
    base = checkpoint_at(plan.base)
    names = [name for name, tensor in plan.tensors.items() if tensor.treatment == "equal"]
    problems = []
    with TensorReader(base) as own:
        for expert, root in plan.experts.items():
            with TensorReader(checkpoint_at(root)) as other:
                problems += [
                    _different(plan, expert, name)
                    for name in names
                    if not equal_bytes(own, other, name)
                ]
    if problems:
        raise InputError(problems)


def _different(plan: Plan, expert: str, name: str) -> str:
    """What to say of an integer or FP8 tensor that differs between base and expert."""
    return (
        f"{plan.experts[expert]}: tensor '{name}' of expert \"{expert}\" differs from the base's "
        "and is not a floating-point tensor that can be merged; add it to [base] skip to keep the "
        "base's, or convert the models to bfloat16 first"
    )


def _require_space(plan: Plan, todo: set[str]) -> None:
    """Refuse to start what the disk cannot hold; output shards are reserved besides.

    Raises:
        BudgetError: Needed and free bytes.
    """
    need = plan.bytes_to_keep(todo)
    free = shutil.disk_usage(plan.work).free
    if need > free:
        raise BudgetError(
            f"{plan.work}: the work directory may need {format_size(need)} more, "
            f"{format_size(free)} are free. Free some space, put [run] work on another disk, or "
            "lower [merge.options] rank_factor."
        )


def _lay_out(plan: Plan, todo: set[str]) -> None:
    """Create the arrays of the store and reserve the output's shards.

    Raises:
        BudgetError: The output's disk is full; what was reserved by this call is removed.
    """
    stages = {plan.tasks[key].stage for key in todo}
    store = FactorStore(plan.directory.factors)
    shapes = checkpoint_at(plan.base).tensors
    if stages & {"forward", "merge"}:
        for matrix in plan.matrices.values():
            if matrix.moment:
                store.create(
                    matrix.name, len(plan.experts), matrix.outputs, matrix.inputs, matrix.rank
                )
            for part in matrix.parts:
                store.create_update(part.tensor, shapes[part.tensor].shape)
    rewritten = {plan.tasks[key].subject for key in todo if plan.tasks[key].stage == "write"}
    reserved: list[Path] = []
    try:
        for name, layout in layouts_of(plan).items():
            if f"seal/{name}" not in todo:
                continue
            if name in rewritten:
                (plan.output / name).unlink(missing_ok=True)
            fresh = not (plan.output / (name + PARTIAL_SUFFIX)).exists()
            path = reserve(plan.output, layout)
            if fresh:
                reserved.append(path)
    except BudgetError:
        for path in reserved:
            path.unlink(missing_ok=True)
        raise


@dataclass(frozen=True, slots=True)
class StageProgress:
    """One stage of a work directory."""

    name: str
    done: int
    tasks: int
    bytes_left: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a work directory is."""

    output: Path
    manifest: str
    stages: tuple[StageProgress, ...]
    holder: str | None

    @property
    def complete(self) -> bool:
        """Whether every task is done."""
        return all(stage.done == stage.tasks for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """JSON-like values."""
        return {
            "output": str(self.output),
            "complete": self.complete,
            "running": self.holder,
            "stages": [asdict(stage) for stage in self.stages],
        }


def progress_of(work: Path) -> Progress:
    """Read how far a work directory is; takes no lock and changes nothing.

    Raises:
        InputError: There is no work directory.
    """
    path = work / "plan.json"
    if not path.is_file():
        raise InputError([f"{work}: not a work directory of esm-stream (no plan.json)"])
    try:
        plan = load_plan(path)
    except ValueError as error:
        raise InputError([f"{path}: damaged, or of another version of esm-stream"]) from error
    todo = remaining(plan)
    stages = []
    for name in STAGES:
        tasks = plan.of_stage(name)
        left = [task for task in tasks if task.key in todo]
        size = sum(task.read_bytes + task.write_bytes for task in left)
        if tasks:
            stages.append(StageProgress(name, len(tasks) - len(left), len(tasks), size))
    return Progress(plan.output, plan.source, tuple(stages), is_locked(work))
