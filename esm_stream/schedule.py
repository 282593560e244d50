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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from esm_stream import stopping
from esm_stream.allocation import return_freed_memory
from esm_stream.errors import (
    EsmStreamError,
    ManifestError,
    StopRequestedError,
    TaskError,
)
from esm_stream.planning.plan import Plan, Stage, Task, load_plan

if TYPE_CHECKING:
    from esm_stream.stages.context import Context, TaskResult

Report = Callable[[str, float], None]
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
            _drop_consumed_states(plan, task)
    except EsmStreamError:
        raise
    except MemoryError as error:
        raise TaskError(f"task '{key}' ran out of memory; lower [run] parallel") from error
    except Exception as error:
        raise TaskError(f"task '{key}' failed: {type(error).__name__}: {error}") from error
    return seconds


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


def _drop_consumed_states(plan: Plan, task: Task) -> None:
    """A hidden state is only needed until the last task that reads it is done."""
    for key in task.states:
        if plan.readers_of_state[key][-1] == task.key:
            for path in plan.states_of(plan.tasks[key]):
                path.unlink(missing_ok=True)


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


def run_tasks(plan: Plan, keys: list[str], scheduler: str, parallel: int, report: Report) -> None:
    """Run the given tasks, each after those it depends on, and report each when it is done.

    Args:
        plan: The plan, already written to its work directory.
        keys: Tasks to run, each after those of them it depends on; all others are complete.
        scheduler: "local", "sync", "threads", a scheduler's address, or a scheduler file.
        parallel: Tasks at once in this process.
        report: Called with key and seconds, in this process.

    Raises:
        EsmStreamError: The first failure; tasks that were running are finished first.
    """
    if not keys:
        return
    path = str(plan.directory.plan)
    if scheduler == "sync" or (scheduler == "local" and parallel == 1):
        for key, following in zip(keys, [*keys[1:], ""], strict=True):
            report(key, run_task(path, key, following=following))
        return
    chosen = set(keys)
    # Nodes of two runs on one cluster must not be taken for each other.
    run = uuid.uuid4().hex
    graph = {
        f"{run}:{key}": (
            run_task,
            path,
            key,
            *(f"{run}:{k}" for k in plan.tasks[key].after if k in chosen),
        )
        for key in keys
    }
    if scheduler == "threads":
        _run_threaded(plan, graph, parallel, report)
    elif scheduler == "local":
        with _local_client(plan.memory, parallel) as client:
            _run_distributed(plan, graph, client, report)
    else:
        with _remote_client(scheduler) as client:
            _run_distributed(plan, graph, client, report)


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
    plan: Plan, graph: Mapping[str, tuple[Any, ...]], parallel: int, report: Report
) -> None:
    """Dask's threaded scheduler."""
    from dask.callbacks import Callback
    from dask.threaded import get

    gate = _Gate(plan.memory)

    def admitted(path: str, key: str, *after: object) -> float:
        with gate.admit(plan.tasks[key].peak_bytes):
            return run_task(path, key, *after)

    def done(node: str, seconds: float, *_: object) -> None:
        report(_key(node), seconds)

    waiting = {node: (admitted, *call[1:]) for node, call in graph.items()}
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
    report: Report,
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
                report(_key(future.key), future.result())
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
