"""What of a plan is done, by markers and by names and sizes of files.

From:  the markers in the work directory; sizes of the files that they list.
To:    engine.py (what to run), schedule.py (what is no longer needed), verify.py, clean.py.

What a task leaves in the work directory has to be there as long as a task that reads it is still to
be run. What it leaves in the output directory has to be there always.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from esm_stream.errors import DataError
from esm_stream.planning.plan import Plan, Stage, Task
from esm_stream.stages import sums
from esm_stream.store.sums import SumStore
from esm_stream.store.work import Marker


def remaining(plan: Plan) -> set[str]:
    """Keys of the tasks that are still to be run."""
    directory = plan.directory
    markers = {key: finished(plan, key) for key in plan.tasks}

    def is_valid(key: str) -> bool:
        marker = markers[key]
        return marker is not None and directory.all_exist(marker.in_output)

    def has_states(key: str) -> bool:
        marker = markers[key]
        return marker is not None and directory.all_exist(marker.transient)

    def has_products(key: str) -> bool:
        marker = markers[key]
        return (
            marker is not None
            and directory.all_exist(marker.products)
            and _holds_sums(plan, plan.tasks[key])
        )

    reads = [(plan.transient_readers, has_states), (plan.product_readers, has_products)]
    return tasks_to_run(list(plan.tasks), is_valid, reads)


def _holds_sums(plan: Plan, task: Task) -> bool:
    try:
        return sums.complete(plan, task)
    except DataError:
        return False


def finished(plan: Plan, key: str) -> Marker | None:
    """The marker of a task as this plan means it, or None."""
    marker = plan.directory.read(key)
    return marker if marker and marker.fingerprint == plan.tasks[key].fingerprint else None


def stages_left(plan: Plan) -> set[Stage]:
    """Stages with a task that is still to be run."""
    return {plan.tasks[key].stage for key in remaining(plan)}


def let_go(plan: Plan, task: Task) -> None:
    """Remove what nobody needs when a task is done: passing states, and what [run] keep leaves out.

    A state is needed until the last task that reads it is done; so is everything else then.
    """
    directory = plan.directory
    for key in task.states:
        if plan.readers_of_state[key][-1] == task.key:
            for path in plan.states_of(plan.tasks[key]):
                path.unlink(missing_ok=True)
    keep = plan.manifest["run"]["keep"]
    if keep == "all":
        return
    for key in plan.products_read(task):
        marker = finished(plan, key)
        if marker and all(finished(plan, reader) for reader in plan.product_readers[key]):
            for output in marker.products:
                if keep == "nothing" or not is_update(Path(output.path)):
                    directory.of(output).unlink(missing_ok=True)
    if task.stage == "merge" and plan.matrices[task.subject].summed:
        SumStore(directory.sums).forget(task.subject)


def is_update(path: Path) -> bool:
    """Whether a file, by its path in the work directory, is of a merged update."""
    return path.parts[0] == "factors.zarr" and path.parts[2:3] == ("update",)


def tasks_to_run(
    order: Sequence[str],
    is_valid: Callable[[str], bool],
    reads: Iterable[tuple[Mapping[str, Iterable[str]], Callable[[str], bool]]],
) -> set[str]:
    """Keys of the tasks that a resumed run has to run.

    Args:
        order: All tasks, each after the tasks it depends on.
        is_valid: The marker's fingerprint matches and what must always be there is there.
        reads: For each sort of outputs the tasks that read those of a task, and whether they are
            there.
    """
    needed: set[str] = set()
    sorts = list(reads)
    for key in reversed(order):
        if not is_valid(key) or any(
            any(reader in needed for reader in readers.get(key, ())) and not are_there(key)
            for readers, are_there in sorts
        ):
            needed.add(key)
    return needed
