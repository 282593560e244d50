"""A merge from a plan to a complete output directory, resumable at every point.

From:  the CLI or a program: `merge(make_plan(load_manifest(path)))`, or `calibrate` for its first
       stages alone.
To:    schedule.py, once for the inputs of all experts, once for everything else.

Before any work: the lock, the comparison with what the work directory belongs to, the sweep of what
an interrupted run left, integer tensors that must be equal, and disk for factors and output.
"""

import json
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from esm_stream import stopping
from esm_stream.checkpoints.adapter import open_reader
from esm_stream.checkpoints.layout import ShardLayout
from esm_stream.checkpoints.reader import TensorReader, equal_bytes
from esm_stream.completion import finished, remaining, stages_left
from esm_stream.errors import BudgetError, ChangedError, InputError, ManifestError
from esm_stream.events import Event, Listener, broadcast, log_to
from esm_stream.planning.plan import (
    CALIBRATION,
    STAGES,
    Plan,
    Stage,
    Task,
    changed_keys,
    forward_key,
    load_plan,
    save_plan,
    update_key,
)
from esm_stream.same_inputs import changed_unseen, contents_of, readers_of, record
from esm_stream.schedule import require_scheduler, run_task, run_tasks, with_threads
from esm_stream.space import require_space, storage_errors
from esm_stream.stages.context import checkpoint_at, forget_checkpoints
from esm_stream.stages.finish import COMPLETE
from esm_stream.stages.write import HASHES, layouts_of
from esm_stream.store.factors import FactorStore
from esm_stream.store.files import TEMPORARY, fsync_path, remove_for_good, unsealed
from esm_stream.store.lock import is_locked, locked
from esm_stream.store.work import OWN_NAMES
from esm_stream.verify import forget_damaged
from esm_stream.write.shards import PARTIAL_SUFFIX, hash_tensor, is_reserved, reserve


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did; `output` is the merged model, or the work directory that was calibrated."""

    output: Path
    tasks_run: int
    tasks_reused: int


def merge(
    plan: Plan,
    *,
    scheduler: str = "local",
    parallel: int = 1,
    restart: bool = False,
    verify: bool = False,
    verify_inputs: bool = False,
    keep_going: bool = False,
    listener: Listener = lambda _: None,
) -> Outcome:
    """Run a plan, or what is left of it.

    Args:
        plan: Made by `make_plan`.
        scheduler: See schedule.py.
        parallel: Tasks at once in this process.
        restart: Accept other options than the work directory was made with; results that the
            change does not touch are kept.
        verify: Read everything that is there first, and make again what is damaged.
        verify_inputs: Read all inputs first, and refuse contents that changed unseen since the
            last run with this option; with `restart`, compute anew what read them.
        keep_going: When a task fails, run all that does not need its result before giving up.
        listener: Called with every event.

    Raises:
        EsmStreamError: Lock, changed options, space, bad input, or a failed task; finished work
            is kept and the same call goes on from there.
    """
    how = _How(scheduler, parallel, restart, verify, verify_inputs, keep_going)
    return _run_stages(plan, frozenset(STAGES), how, listener)


def calibrate(
    plan: Plan,
    *,
    scheduler: str = "local",
    parallel: int = 1,
    restart: bool = False,
    verify: bool = False,
    verify_inputs: bool = False,
    keep_going: bool = False,
    listener: Listener = lambda _: None,
) -> Outcome:
    """Run what of a plan comes before the merges: samples, forward, factors of every expert.

    Merges with any options that this does not depend on then start from the same work directory.

    Args and errors are those of `merge`; besides:

    Raises:
        ManifestError: No method of the plan needs the experts' forwards.
    """
    if not plan.of_stage("forward"):
        walks = plan.of_stage("walk")
        why = "runs the merged model, which the merge makes" if walks else "looks at weights only"
        raise ManifestError(
            f"nothing to calibrate: {plan.manifest['merge']['method']} with these options {why}; "
            "run merge"
        )
    how = _How(scheduler, parallel, restart, verify, verify_inputs, keep_going)
    return _run_stages(plan, CALIBRATION, how, listener)


@dataclass(frozen=True, slots=True)
class _How:
    """What the caller of a run chose."""

    scheduler: str
    parallel: int
    restart: bool
    verify: bool
    verify_inputs: bool
    keep_going: bool


def _run_stages(plan: Plan, stages: frozenset[Stage], how: _How, listener: Listener) -> Outcome:
    directory = plan.directory
    require_scheduler(how.scheduler)
    stopping.clear()
    forget_checkpoints()
    _require_own_work(plan)
    with storage_errors(plan, str(plan.work)), locked(directory.root):
        _require_same(plan, restart=how.restart)
        _require_own_output(plan)
        _require_equal_integers(plan)
        directory.sweep()
        if how.verify:
            forget_damaged(plan)
        if how.verify_inputs:
            _require_same_inputs(plan, restart=how.restart)
        if "seal" in stages:
            _unseal(plan)
        todo = _todo(plan, stages)
        require_space(plan, todo)
        plan = with_threads(plan, how.scheduler, how.parallel)
        save_plan(plan)
        gone = _lay_out(plan, todo)
        if gone:
            directory.forget(gone)
            todo = _todo(plan, stages)
        listen = broadcast(log_to(directory.events), listener)
        wanted = [key for key, task in plan.tasks.items() if task.stage in stages]
        keys = [key for key in wanted if key in todo]
        reused = len(wanted) - len(keys)
        listen(Event("run_started", data={"reused": reused, "pending": keys}))
        _draw_inputs(plan, [key for key in keys if plan.tasks[key].stage == "inputs"], listen)
        rest = [key for key in keys if plan.tasks[key].stage != "inputs"]
        _run(plan, rest, how, listen)
        filled = plan.output if "finish" in stages else plan.work
        listen(Event("run_finished", message=str(filled)))
    return Outcome(filled, len(keys), reused)


def _draw_inputs(plan: Plan, keys: list[str], listen: Listener) -> None:
    """Draw the calibration inputs of all experts, here and first: the last mistakes to be found.

    Raises:
        InputError: Every mistake in the calibration data of every expert.
    """
    problems: list[str] = []
    for key in keys:
        try:
            listen(event_of(plan.tasks[key], run_task(str(plan.directory.plan), key)))
        except InputError as error:
            problems += error.problems
    if problems:
        listen(Event("task_failed", message=problems[0]))
        raise InputError(list(dict.fromkeys(problems)))


def _run(plan: Plan, keys: list[str], how: _How, listen: Listener) -> None:
    def report(key: str, seconds: float) -> None:
        listen(event_of(plan.tasks[key], seconds))

    try:
        run_tasks(plan, keys, how.scheduler, how.parallel, report, keep_going=how.keep_going)
    except Exception as error:
        listen(Event("task_failed", message=str(error)))
        raise


def event_of(task: Task, seconds: float) -> Event:
    """The event of one finished task."""
    return Event(
        "task_finished",
        task=task.key,
        stage=task.stage,
        read_bytes=task.read_bytes,
        write_bytes=task.write_bytes,
        seconds=round(seconds, 4),
    )


def _unseal(plan: Plan) -> None:
    """Take their names from shards that are not, or no longer, those of this plan.

    What of them is still right is kept: a run may have ended between a shard's name and its marker,
    or other options may change a few of its tensors.
    """
    for task in plan.of_stage("seal"):
        shard = plan.output / task.subject
        if all(finished(plan, key) for key in (task.key, *task.after)) or not shard.is_file():
            continue
        plan.directory.forget([task.key])
        remove_for_good([plan.output / COMPLETE])
        partial = shard.with_name(shard.name + PARTIAL_SUFFIX)
        if partial.exists():
            shard.unlink()
        else:
            shard.rename(partial)
        fsync_path(plan.output)


def _todo(plan: Plan, stages: frozenset[Stage]) -> set[str]:
    """Tasks of some stages to run; their markers go, and so does a complete mark that is not true.

    Markers of tasks that the plan does not know go too. Those of calibrations stay if this plan
    has none itself: what they speak of is not touched, and the next plan may want it.
    """
    todo = {key for key in remaining(plan) if plan.tasks[key].stage in stages}
    if any(plan.tasks[key].stage in ("write", "seal", "finish") for key in todo):
        todo.add("finish")
        remove_for_good([plan.output / COMPLETE])
    plan.directory.forget(todo)
    known = {plan.directory.marker(key) for key in plan.tasks}
    kept = CALIBRATION if not _stages_of(plan) & CALIBRATION else frozenset[Stage]()
    remove_for_good(
        path for path in _markers(plan) if path not in known and _stage_of(plan, path) not in kept
    )
    return todo


def _stages_of(plan: Plan) -> set[Stage]:
    return {task.stage for task in plan.tasks.values()}


def _markers(plan: Plan) -> list[Path]:
    """Files that say which tasks are finished, also those of earlier plans."""
    return list((plan.directory.root / "done").rglob("*.json"))


def _stage_of(plan: Plan, marker: Path) -> str:
    """Stage of the task of a marker: the first part of its key."""
    return marker.relative_to(plan.directory.root / "done").parts[0].removesuffix(".json")


def _require_same(plan: Plan, *, restart: bool) -> None:
    """Refuse a work directory that was made with other options, where they would lose work.

    Raises:
        ChangedError: With every key that differs.
    """
    path = plan.directory.plan
    if restart or not path.is_file():
        return
    try:
        document = json.loads(unsealed(path.read_bytes()))
        before, output = document["manifest"], Path(document["output"])
    except (ValueError, KeyError, TypeError) as error:
        raise ChangedError(f"{path}: damaged; run again with --restart") from error
    lines = changed_keys(before, plan.manifest)
    if lines and not _is_free(plan, output) and not _sums_go_on(plan, lines):
        raise ChangedError(
            f"{plan.work} belongs to a merge with other options:\n  "
            + "\n  ".join(lines)
            + "\nRun with --restart to continue with the new options (what they do not touch is "
            "kept), or choose another [run] work."
        )


def _require_same_inputs(plan: Plan, *, restart: bool) -> None:
    """Refuse inputs that changed though size and time did not, or forget what was read of them.

    Raises:
        InputError: Every such file.
    """
    found = contents_of(plan)
    changed = changed_unseen(plan, found)
    if changed and not restart:
        raise InputError(
            [
                f"{path}: holds something else than when it was last read, though its size and "
                "time are the same. Put it back, or run with --restart --verify-inputs to compute "
                "anew what depends on it."
                for path in changed
            ]
        )
    plan.directory.forget(readers_of(plan, changed))
    record(plan, found)


def _is_free(plan: Plan, last_output: Path) -> bool:
    """Whether other options lose nothing that was done in a work directory.

    So it is when all calibration that this plan needs is there, and the merge that the directory
    was last used for has either not begun, or is complete in an output directory of its own.
    """
    stages = _stages_of(plan)
    if not stages & CALIBRATION or stages_left(plan) & CALIBRATION:
        return False
    begun = any(_stage_of(plan, path) not in CALIBRATION for path in _markers(plan))
    return not begun or (plan.directory.read("finish") is not None and plan.output != last_output)


def _sums_go_on(plan: Plan, changes: list[str]) -> bool:
    """Whether all that changes are experts that sums can be told of: nothing is lost by it.

    Experts may come; they may leave where no forward is needed to take their terms out again.
    """
    matrices = plan.matrices.values()
    if not matrices or any(m.walked or not m.summed for m in matrices):
        return False
    coming = [line for line in changes if line.startswith("experts[") and ": (absent) -> " in line]
    leaving = [line for line in changes if line.startswith("experts[") and "-> (absent)" in line]
    if any(matrix.moment for matrix in matrices):
        leaving = []
    return len(coming) + len(leaving) == len(changes)


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
        data = plan.directory.plan.read_bytes()
    except OSError:
        return None
    try:
        return Path(json.loads(unsealed(data))["output"])
    except (ValueError, KeyError, TypeError):
        # Damaged, but what it still says of this output is no accident.
        named = f'"output": {json.dumps(str(plan.output), ensure_ascii=False)}'
        return plan.output if named.encode() in data else None


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
    names = {path.name for path in directory.root.iterdir()} - OWN_NAMES
    foreign = sorted(name for name in names if not fnmatch(name, TEMPORARY))
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
    base = checkpoint_at(plan, plan.base)
    names = [name for name, tensor in plan.tensors.items() if tensor.treatment == "equal"]
    problems = []
    with TensorReader(base) as own:
        for expert, root in plan.experts.items():
            with open_reader(checkpoint_at(plan, root)) as other:
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


def _lay_out(plan: Plan, todo: set[str]) -> set[str]:
    """Create the arrays of the store and reserve the output's shards, where tasks will need them.

    Returns:
        Tasks whose markers speak of what was not there, or is not what they wrote.

    Raises:
        BudgetError: The output's disk is full; what was reserved by this call is removed.
    """
    stages = {plan.tasks[key].stage for key in todo}
    gone = _lay_out_arrays(plan) if stages & {"forward", "merge", "walk", "write"} else set()
    return gone | _reserve_shards(plan, todo)


def _lay_out_arrays(plan: Plan) -> set[str]:
    store = FactorStore(plan.directory.factors)
    gone: set[str] = set()
    for matrix in plan.matrices.values():
        if (
            matrix.moment
            and not matrix.summed
            and store.create(
                matrix.name, len(plan.experts), matrix.outputs, matrix.inputs, matrix.rank
            )
        ):
            gone |= {forward_key(plan, expert, matrix) for expert in plan.experts}
        if store.create_update(matrix.name, matrix.stored_shape):
            gone.add(update_key(plan, matrix))
    return {key for key in gone if plan.directory.marker(key).is_file()}


def _reserve_shards(plan: Plan, todo: set[str]) -> set[str]:
    writes = {task.key: task for task in plan.of_stage("write")}
    gone: set[str] = set()
    reserved: list[Path] = []
    try:
        for name, layout in layouts_of(plan).items():
            if f"seal/{name}" not in todo:
                continue
            there = is_reserved(plan.output, layout)
            path = reserve(plan.output, layout)
            if not there:
                reserved.append(path)
            for key in plan.tasks[f"seal/{name}"].after:
                # What an earlier run wrote may have been lost with the power, or damaged since.
                if key not in todo and not (there and _is_written(plan, writes[key], path, layout)):
                    gone.add(key)
    except BudgetError:
        for path in reserved:
            path.unlink(missing_ok=True)
        raise
    return gone


def _is_written(plan: Plan, task: Task, path: Path, layout: ShardLayout) -> bool:
    """Whether a shard holds what a finished task wrote into it."""
    hashes = plan.directory.results(task.key)[HASHES]
    return all(hash_tensor(path, layout, name) == hashes[name] for name in task.tensors)


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
    def calibrated(self) -> bool:
        """Whether all that comes before the merges is done, and there is any."""
        found = [stage for stage in self.stages if stage.name in CALIBRATION]
        return bool(found) and all(stage.done == stage.tasks for stage in found)

    @property
    def begun(self) -> bool:
        """Whether a merge has been begun."""
        return any(stage.done for stage in self.stages if stage.name not in CALIBRATION)

    @property
    def complete(self) -> bool:
        """Whether every task is done."""
        return all(stage.done == stage.tasks for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """JSON-like values."""
        return {
            "output": str(self.output),
            "calibrated": self.calibrated,
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
