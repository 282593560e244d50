"""One graph for every way to run it: task after task, by Dask in this process, or on a cluster.

From:  plan.py's tasks, those that are not complete.
To:    stages/, one call per task; a task is a name, and so is what it returns.

One task at a time needs no scheduler: the plan's order is one in which each finds what it reads.
Where several run, memory is bounded by admission: a task declares its projected peak and starts
when as much of the budget is free. Dask's own resources do that on workers; a gate in this process
does it for threads.
"""

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from esm_stream import stopping
from esm_stream.allocation import return_freed_memory
from esm_stream.errors import (
    BudgetError,
    EsmStreamError,
    InputError,
    ManifestError,
    StopRequestedError,
    TaskError,
)
from esm_stream.planning.plan import Plan, Stage, Task, load_plan

if TYPE_CHECKING:
    from esm_stream.stages.context import Context, TaskResult

Report = Callable[[str, float], None]
INPUTS_SHOWN: Final = 4
MEMORY: Final = "MEMORY"
SCHEDULERS: Final = ("local", "sync", "threads")


def run_task(plan_path: str, key: str, *after: object, following: str = "") -> float:  # noqa: ARG001
    """Run one task and write its marker; the function that Dask calls, in any process.

    Args:
        plan_path: The plan.
        key: The task.
        after: Edges of the graph.
        following: The task that this process runs next, if that is known.

    Returns:
        Seconds it took.

    Raises:
        EsmStreamError: The task found a mistake in its input, or was asked to stop.
        TaskError: It failed otherwise.
    """
    from esm_stream.completion import let_go
    from esm_stream.space import storage_errors
    from esm_stream.stages.context import task_context

    stopping.check()
    return_freed_memory()
    plan = _plan_at(Path(plan_path))
    task = plan.tasks[key]
    started = time.perf_counter()
    try:
        with storage_errors(plan, f"task '{key}'"):
            after_it = plan.tasks.get(following)
            with _threads_of(plan), task_context(plan, task, after_it) as context:
                result = _body(task.stage)(context)
                read = context.bytes_read
                result.values["bytes_read"] = sum(read.values())
                result.values["bytes_read_experts"] = read["experts"]
            seconds = time.perf_counter() - started
            plan.directory.finish(key, task.fingerprint, result.outputs, result.values, seconds)
            let_go(plan, task)
    except EsmStreamError:
        raise
    except MemoryError as error:
        raise TaskError(f"task '{key}' ran out of memory; lower [run] parallel") from error
    except Exception as error:
        what = f"task '{key}' failed: {type(error).__name__}: {error}"
        raise TaskError(f"{what} (it reads {_inputs_of(task)})") from error
    return seconds


def _inputs_of(task: Task) -> str:
    """What a task reads, in a few words."""
    names = [*task.reads, *task.after][:INPUTS_SHOWN]
    more = len(task.reads) + len(task.after) - len(names)
    of = f' of expert "{task.expert}"' if task.expert else ""
    return f"{', '.join(names) or 'nothing'}{f' and {more} more' if more else ''}{of}"


@dataclass(frozen=True, slots=True)
class Failure:
    """What became of a task when the run goes on without it: its error, or a task before it."""

    key: str
    error: EsmStreamError | None


def attempt_task(
    plan_path: str, key: str, *after: object, following: str = ""
) -> "float | Failure":
    """`run_task`, but a failure is an answer; what comes after it is not tried.

    Raises:
        StopRequestedError: The run was asked to stop.
        BudgetError: A disk is full, which no other task would fare better with.
    """
    plan = _plan_at(Path(plan_path))
    needed = set(plan.parents(plan.tasks[key]))
    for before in after:
        if isinstance(before, Failure) and before.key in needed:
            return Failure(key, None)
    try:
        return run_task(plan_path, key, following=following)
    except (StopRequestedError, BudgetError):
        raise
    except EsmStreamError as error:
        return Failure(key, error)


class _Outcomes:
    """Reports what is done; of what failed it makes one error at the end."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self.failures: dict[str, Failure] = {}

    def add(self, key: str, outcome: "float | Failure") -> None:
        """Take the outcome of a task."""
        if isinstance(outcome, Failure):
            self.failures[key] = outcome
        else:
            self._report(key, outcome)

    def require_none_failed(self) -> None:
        """Raise what failed.

        Raises:
            EsmStreamError: The only failure, with the number of tasks that wait for it.
            TaskError: All of several.
        """
        errors = [f.error for f in self.failures.values() if f.error is not None]
        if not errors:
            return
        waiting = len(self.failures) - len(errors)
        lines = [str(error) for error in errors]
        left = f"{waiting} tasks that need their results were not tried; all others are done"
        if len(errors) == 1 and isinstance(errors[0], InputError):
            raise InputError([*errors[0].problems, left])
        kinds = {type(error) for error in errors}
        raise (kinds.pop() if len(kinds) == 1 and InputError not in kinds else TaskError)(
            "\n".join([*lines, left])
        ) from errors[0]


def _plan_at(path: Path) -> Plan:
    try:
        return load_plan(path)
    except (OSError, ValueError) as error:
        raise TaskError(f"{path}: cannot be read as the plan of this run: {error}") from error


def _body(stage: Stage) -> "Callable[[Context], TaskResult]":
    """What runs a task; transformers is imported for the stages of the forward alone."""
    if stage in ("inputs", "stem", "forward"):
        from esm_stream.stages import forward, inputs, stem

        return {"inputs": inputs.run, "stem": stem.run, "forward": forward.run}[stage]
    if stage == "walk":
        from esm_stream.stages import walk

        return walk.run
    from esm_stream.stages import finish, lines, measure, merge, scale, write

    bodies: dict[Stage, Callable[[Context], TaskResult]] = {
        "measure": measure.run,
        "total": measure.run_total,
        "merge": merge.run,
        "scale": scale.run,
        "magnitudes": lines.run,
        "lines": lines.run_total,
        "write": write.run,
        "seal": write.run_seal,
        "finish": finish.run,
    }
    return bodies[stage]


def require_scheduler(name: str) -> None:
    """Refuse a scheduler that cannot be one, before any work.

    Raises:
        ManifestError: Neither a known name, nor an address, nor a file.
    """
    if name not in SCHEDULERS and "://" not in name and not Path(name).is_file():
        raise ManifestError(
            f"--scheduler '{name}' is neither one of {', '.join(SCHEDULERS)}, nor an address such "
            "as tcp://host:8786, nor a scheduler file"
        )


def run_tasks(
    plan: Plan,
    keys: list[str],
    scheduler: str,
    parallel: int,
    report: Report,
    *,
    keep_going: bool = False,
) -> None:
    """Run the given tasks, each after those it depends on, and report each when it is done.

    Args:
        plan: The plan, already written to its work directory.
        keys: Tasks to run, each after those of them it depends on; all others are complete.
        scheduler: "local", "sync", "threads", a scheduler's address, or a scheduler file.
        parallel: Tasks at once in this process.
        report: Called with key and seconds, in this process.
        keep_going: After a failure run everything that does not need its result.

    Raises:
        EsmStreamError: The first failure, or all of them with `keep_going`; tasks that were
            running are finished first.
    """
    if not keys:
        return
    outcomes = _Outcomes(report)
    run = attempt_task if keep_going else run_task
    if scheduler == "sync" or (scheduler == "local" and parallel == 1):
        _run_here(plan, keys, run, outcomes)
    elif scheduler == "threads":
        _run_threaded(plan, _graph(plan, keys, run), parallel, outcomes)
    elif scheduler == "local":
        with _local_client(plan.memory, parallel) as client:
            _run_distributed(plan, _graph(plan, keys, run), client, outcomes)
    else:
        with _remote_client(scheduler) as client:
            _run_distributed(plan, _graph(plan, keys, run), client, outcomes)
    outcomes.require_none_failed()


def _run_here(plan: Plan, keys: list[str], run: Callable[..., Any], outcomes: _Outcomes) -> None:
    """Task after task, in this thread."""
    path = str(plan.directory.plan)
    for key, following in zip(keys, [*keys[1:], ""], strict=True):
        before = (outcomes.failures.get(k) for k in plan.tasks[key].after)
        outcomes.add(key, run(path, key, *before, following=following))


def _graph(plan: Plan, keys: list[str], run: Callable[..., Any]) -> dict[str, tuple[Any, ...]]:
    """The tasks as a graph of Dask."""
    path, chosen = str(plan.directory.plan), set(keys)
    # Nodes of two runs on one cluster must not be taken for each other.
    name = uuid.uuid4().hex
    return {
        f"{name}:{key}": (
            run,
            path,
            key,
            *(f"{name}:{k}" for k in plan.tasks[key].after if k in chosen),
        )
        for key in keys
    }


def with_threads(plan: Plan, scheduler: str, parallel: int) -> Plan:
    """The plan with a number of threads for every task, in whatever process it runs.

    The number decides the last bits. Where the manifest names none, a work directory goes on with
    what it began with: the cores, shared between the tasks that run at once.
    """
    import torch

    run = plan.manifest["run"]
    if run["threads"]:
        return plan
    at_once = 1 if scheduler == "sync" else parallel
    threads = _threads_before(plan.directory.plan) or max(1, torch.get_num_threads() // at_once)
    return replace(plan, manifest={**plan.manifest, "run": {**run, "threads": threads}})


def _threads_before(path: Path) -> int:
    """Threads that a work directory's last run gave to a task; 0 where it was not used."""
    try:
        return int(load_plan(path).manifest["run"]["threads"] or 0)
    except (OSError, ValueError):
        return 0


@contextmanager
def _threads_of(plan: Plan) -> Iterator[None]:
    """As many threads for a task as `with_threads` said."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(plan.manifest["run"]["threads"] or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_threaded(
    plan: Plan, graph: Mapping[str, tuple[Any, ...]], parallel: int, outcomes: _Outcomes
) -> None:
    """Dask's threaded scheduler."""
    from dask.callbacks import Callback
    from dask.threaded import get

    gate = _Gate(plan.memory)

    def admitted(run: Callable[..., Any], path: str, key: str, *after: object) -> Any:  # noqa: ANN401
        with gate.admit(plan.tasks[key].peak_bytes):
            return run(path, key, *after)

    def done(node: str, outcome: Any, *_: object) -> None:  # noqa: ANN401
        outcomes.add(_key(node), outcome)

    waiting = {node: (partial(admitted, call[0]), *call[1:]) for node, call in graph.items()}
    with Callback(posttask=done):
        get(waiting, list(waiting), num_workers=parallel)


def _key(node: str) -> str:
    """Task key of a node of the graph."""
    return node.partition(":")[2]


class _Gate:
    """Lets tasks in while their bytes are free."""

    def __init__(self, memory: int) -> None:
        self._free = memory
        self._changed = threading.Condition()

    @contextmanager
    def admit(self, size: int) -> Iterator[None]:
        """Wait until `size` bytes are free and hold them."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()


@contextmanager
def _local_client(memory: int, parallel: int) -> Iterator[Any]:
    """A scheduler and one worker in this process."""
    import dask
    from distributed import Client, LocalCluster

    settings = {
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
        "distributed.worker.memory.terminate": False,
        "distributed.admin.tick.limit": "1h",
        "distributed.worker.profile.enabled": False,
    }
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=1,
            threads_per_worker=parallel,
            processes=False,
            dashboard_address="127.0.0.1:0",
            worker_dashboard_address="127.0.0.1:0",
            memory_limit=0,
            resources={MEMORY: memory},
            silence_logs=50,
            protocol="inproc",
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@contextmanager
def _remote_client(address: str) -> Iterator[Any]:
    """A running cluster by address ("tcp://host:8786") or scheduler file.

    Raises:
        ManifestError: There is no such scheduler.
    """
    from distributed import Client

    by_file = "://" not in address
    try:
        client = Client(
            **({"scheduler_file": address} if by_file else {"address": address}),
            timeout="30s",
            set_as_default=False,
        )
    except (OSError, TimeoutError) as error:
        raise ManifestError(f"--scheduler '{address}': no scheduler answers: {error}") from error
    with client:
        _require_resources(client)
        yield client


def _require_resources(client: Any) -> None:  # noqa: ANN401
    """Workers without a declared MEMORY would never be given a task.

    Raises:
        ManifestError: No worker declares it.
    """
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    if workers and not any(MEMORY in worker.get("resources", {}) for worker in workers):
        raise ManifestError(
            "the workers of this scheduler declare no memory for admission; start them with "
            '--resources "MEMORY=8e9" (bytes that esm-stream may use on each)'
        )


def _run_distributed(
    plan: Plan,
    graph: Mapping[str, tuple[Any, ...]],
    client: Any,  # noqa: ANN401 - distributed has no types
    outcomes: _Outcomes,
) -> None:
    """Hand the graph to a scheduler and follow its futures."""
    from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
    from distributed import CancelledError, as_completed

    order = {node: number for number, node in enumerate(graph)}
    annotations = {
        "resources": lambda node: {MEMORY: plan.tasks[_key(node)].peak_bytes},
        "priority": lambda node: -order[node],
        "retries": 0,
    }
    layer = MaterializedLayer(dict(graph), annotations=annotations)
    futures = client.get(
        HighLevelGraph({"merge": layer}, {"merge": set()}), list(graph), sync=False
    )
    failure: BaseException | None = None
    waiting = as_completed(futures, loop=client.loop)
    try:
        for future in waiting:
            if future.status == "finished":
                outcomes.add(_key(future.key), future.result())
            elif failure is None and future.status == "error":
                failure = future.exception()
                stopping.request()
            if stopping.requested():
                client.cancel([f for f in futures if f.status == "pending"])
                break
    except CancelledError:
        pass
    finally:
        _wait_for_running(client, graph)
    if failure is not None:
        raise failure
    if stopping.requested():
        raise StopRequestedError("stopped on request")


def _wait_for_running(client: Any, graph: Mapping[str, object]) -> None:  # noqa: ANN401
    """Our tasks that were running when the rest was cancelled finish or give up."""
    deadline = time.monotonic() + 600
    while stopping.requested() and time.monotonic() < deadline:
        running = (node for nodes in client.processing().values() for node in nodes)
        if not any(node in graph for node in running):
            return
        time.sleep(0.05)
