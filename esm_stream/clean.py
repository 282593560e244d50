"""What of a work directory can go, how much it is, and what it costs to have it no more.

From:  the files of a work directory, by kind; the tasks that are still to be run.
To:    `esm-stream clean`.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from esm_stream.completion import finished, is_update, remaining
from esm_stream.errors import InputError
from esm_stream.planning.plan import Plan, load_plan
from esm_stream.store.files import TEMPORARY
from esm_stream.store.lock import locked

COSTS: Final = {
    "temporary": "nothing",
    "states": "model inputs and hidden states are made again if a forward has to run again",
    "factors": "another merge from this calibration begins with the forward",
    "statistics": "other options of methods that look at whole models measure again",
    "updates": "another alpha merges again",
}
"""Kinds of files, and what the loss of them costs."""
FREE: Final = ("temporary", "states")
"""Kinds that are removed if none are named."""


@dataclass(frozen=True, slots=True)
class Share:
    """The files of one kind; `needed_by` tasks that are still to be run read some of them."""

    kind: str
    files: int
    size: int
    needed_by: int

    @property
    def costs(self) -> str:
        """What is lost with them."""
        return COSTS[self.kind]

    def as_dict(self) -> dict[str, Any]:
        """JSON-like values."""
        return {**asdict(self), "costs": self.costs}


def shares_of(work: Path) -> list[Share]:
    """What a work directory holds, by kind; takes no lock and changes nothing.

    Raises:
        InputError: There is no work directory.
    """
    plan = _plan_of(work)
    left = [plan.tasks[key] for key in remaining(plan)]
    shares = []
    for kind in COSTS:
        sizes = [path.lstat().st_size for path in _files(plan, kind)]
        readers = [
            task
            for task in left
            if any(_holds(plan, key, kind) for key in (*plan.products_read(task), *task.states))
        ]
        shares.append(Share(kind, len(sizes), sum(sizes), len(readers)))
    return shares


def clean(work: Path, kinds: Collection[str]) -> list[Share]:
    """Remove files by kind; what it was.

    Raises:
        InputError: There is no such kind, or tasks that are still to be run need it.
        LockedError: A run holds the work directory.
    """
    unknown = [kind for kind in kinds if kind not in COSTS]
    if unknown:
        raise InputError([f"'{kind}' is no kind of files: {', '.join(COSTS)}" for kind in unknown])
    plan = _plan_of(work)
    with locked(plan.work):
        chosen = [share for share in shares_of(work) if share.kind in kinds]
        needed = [share for share in chosen if share.needed_by]
        if needed:
            raise InputError(
                [
                    f"{work}: {share.needed_by} tasks that are still to be run need its "
                    f"{share.kind}; finish the merge first, or remove the whole directory"
                    for share in needed
                ]
            )
        for share in chosen:
            for path in _files(plan, share.kind):
                path.unlink(missing_ok=True)
    return chosen


def _plan_of(work: Path) -> Plan:
    try:
        plan = load_plan(work / "plan.json")
    except (OSError, ValueError) as error:
        raise InputError([f"{work}: not a work directory of esm-stream"]) from error
    if plan.work.resolve() != work.resolve():
        raise InputError([f"{work}: was moved; it belongs to {plan.work}"])
    return plan


def _files(plan: Plan, kind: str) -> Iterator[Path]:
    """Files of one kind; links are not followed."""
    root, of_kind = plan.work, _OF_KIND[kind]
    folders = ("inputs", "hidden", "factors.zarr", "sums", "statistics", "done")
    candidates = [p for name in folders for p in (root / name).rglob("*")]
    for path in [*root.glob(TEMPORARY), *candidates]:
        if path.is_file() and not path.is_symlink() and of_kind(path.relative_to(root)):
            yield path


def _is_temporary(path: Path) -> bool:
    return path.match(TEMPORARY) or path.suffix == ".partial"


def _is_factor(path: Path) -> bool:
    if path.parts[0] == "sums":
        return path.suffix == ".sums"
    return path.parts[0] == "factors.zarr" and not is_update(path)


def _is_chunk(path: Path) -> bool:
    return path.name != "zarr.json" and not _is_temporary(path)


_OF_KIND: Final[dict[str, Callable[[Path], bool]]] = {
    "temporary": _is_temporary,
    "states": lambda path: path.parts[0] in ("inputs", "hidden") and not _is_temporary(path),
    "factors": lambda path: _is_factor(path) and _is_chunk(path),
    "statistics": lambda path: path.parts[0] == "statistics" and not _is_temporary(path),
    "updates": lambda path: is_update(path) and _is_chunk(path),
}


def _holds(plan: Plan, key: str, kind: str) -> bool:
    """Whether a finished task left files of a kind."""
    marker = finished(plan, key)
    inside = [Path(o.path) for o in marker.outputs if o.root == "work"] if marker else []
    summed = kind == "factors" and bool(plan.sums_filled_by.get(key))
    return summed or any(_OF_KIND[kind](path) for path in inside)
