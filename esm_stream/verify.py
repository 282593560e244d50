"""Whether what is on the disk still is what was written: hashes of files, of tensors, of markers.

From:  a work directory (plan, markers, store, shards), or a merged model with its complete.json.
To:    `esm-stream verify`; `merge --verify`, which makes again what is damaged.

Nothing is changed here. Every file is read once; peak 4 MiB beside the headers.
"""

import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from esm_stream.checkpoints.checkpoint import open_checkpoint
from esm_stream.checkpoints.header import read_header
from esm_stream.checkpoints.layout import ShardLayout
from esm_stream.completion import finished, remaining
from esm_stream.errors import EsmStreamError, InputError
from esm_stream.planning.plan import Plan, Task, forward_key, load_plan, update_key
from esm_stream.stages.finish import COMPLETE
from esm_stream.stages.write import HASHES, layouts_of
from esm_stream.store.factors import FactorStore
from esm_stream.store.files import hash_file, remove_for_good, unsealed
from esm_stream.store.sums import SumStore
from esm_stream.store.work import Marker, Output, file_name
from esm_stream.write.shards import PARTIAL_SUFFIX, hash_tensor


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is not what was written, and the task that makes it again ("" if unknown)."""

    task: str
    problem: str


@dataclass(frozen=True, slots=True)
class Verified:
    """What was looked at, and what is wrong with it."""

    files: int
    size: int
    damages: tuple[Damage, ...]
    tasks_left: int
    repair: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-like values."""
        return asdict(self)


def verify(root: Path) -> Verified:
    """Read everything in a work directory, or in a merged model, and compare it with its hashes.

    Raises:
        InputError: The directory is neither.
    """
    if (root / "plan.json").is_file():
        return _verify_work(root)
    if (root / COMPLETE).is_file():
        return _verify_output(root)
    raise InputError(
        [
            f"{root}: neither a work directory of esm-stream (no plan.json) nor a complete merged "
            f"model (no {COMPLETE})"
        ]
    )


# A work directory -----------------------------------------------------------------------------


def _verify_work(root: Path) -> Verified:
    path = root / "plan.json"
    try:
        plan = load_plan(path)
    except ValueError as error:
        raise InputError(
            [f"{path}: damaged, or of another version; run merge with --restart --verify"]
        ) from error
    try:
        layouts = layouts_of(plan)
    except EsmStreamError:
        layouts = {}  # the base is gone: what it laid out cannot be compared
    damages = list(damages_of(plan, layouts))
    outputs = {plan.directory.of(o) for m in _markers(plan).values() for o in m.outputs}
    present = [path for path in outputs if path.is_file()]
    return Verified(
        len(present),
        sum(path.stat().st_size for path in present),
        tuple(damages),
        len(remaining(plan)),
        _command(plan.source),
    )


def damages_of(plan: Plan, layouts: dict[str, ShardLayout]) -> Iterator[Damage]:
    """Everything that finished tasks of a plan left and that is not what they left.

    What was removed because nothing needs it is no damage.
    """
    yield from _damaged_markers(plan)
    for path in SumStore(plan.directory.sums).damaged():
        yield Damage("", f"{path}: damaged")
    left = remaining(plan)
    arrays = _damaged_arrays(plan)
    for key, marker in _markers(plan).items():
        for output in marker.outputs:
            if _is_let_go(plan, key, output, left):
                continue
            problem = plan.directory.damage(output)
            if problem:
                yield Damage(key, problem)
        for name in _arrays_of(plan, plan.tasks[key]):
            if name in arrays:
                yield Damage(key, arrays[name])
        yield from _damaged_tensors(plan, plan.tasks[key], marker, layouts)


def forget_damaged(plan: Plan) -> None:
    """Make the tasks count as not done that wrote what is damaged; damaged sums are removed."""
    remove_for_good(SumStore(plan.directory.sums).damaged())
    damages = damages_of(plan, layouts_of(plan))
    plan.directory.forget({damage.task for damage in damages if damage.task})


def _markers(plan: Plan) -> dict[str, Marker]:
    found = {key: finished(plan, key) for key in plan.tasks}
    return {key: marker for key, marker in found.items() if marker is not None}


def _damaged_markers(plan: Plan) -> Iterator[Damage]:
    for key in plan.tasks:
        path = plan.directory.marker(key)
        if path.is_file() and plan.directory.read(key) is None:
            yield Damage(key, f"{path}: damaged; its task counts as not done")


def _is_let_go(plan: Plan, key: str, output: Output, left: set[str]) -> bool:
    """Whether a file is gone and no task that is left reads what the task wrote."""
    may_go = output.transient or output.root == "work"
    return may_go and key not in left and not plan.directory.of(output).exists()


def _arrays_of(plan: Plan, task: Task) -> list[str]:
    """Arrays of the store that a task writes into."""
    if task.stage not in ("forward", "merge", "walk"):
        return []
    found = []
    for m in plan.matrices.values():
        if update_key(plan, m) == task.key:
            found.append(f"{file_name(m.name)}/update")
        if task.stage == "forward" and m.observed and forward_key(plan, task.expert, m) == task.key:
            kinds = ("basis", "coordinates", "spectrum")
            found += [f"{file_name(m.name)}/{kind}" for kind in kinds]
    return found


def _damaged_arrays(plan: Plan) -> dict[str, str]:
    store = FactorStore(plan.directory.factors)
    found = {name: store.damage(name) for name in store.names()}
    return {name: problem for name, problem in found.items() if problem}


def _damaged_tensors(
    plan: Plan, task: Task, marker: Marker, layouts: dict[str, ShardLayout]
) -> Iterator[Damage]:
    """Tensors in a shard, sealed or not, whose bytes are not those that were written."""
    if task.stage not in ("write", "seal") or task.subject not in layouts:
        return
    layout = layouts[task.subject]
    path = plan.output / (task.subject + (PARTIAL_SUFFIX if task.stage == "write" else ""))
    if not path.is_file() or path.stat().st_size != layout.file_size:
        return  # told as a damaged output, or sealed
    if _head(path, len(layout.header)) != layout.header:
        yield Damage(task.key, f"{path}: its header is damaged")
    hashes = marker.results.get(HASHES, {})
    names = task.tensors if task.stage == "write" else layout.tensors
    for name in names:
        if hash_tensor(path, layout, name) != hashes.get(name):
            yield Damage(task.key, f"{path}: tensor '{name}' holds other bytes than were written")


def _head(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


# A merged model -------------------------------------------------------------------------------


def _verify_output(root: Path) -> Verified:
    try:
        complete = json.loads(unsealed((root / COMPLETE).read_bytes()))
        _require_form(complete)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        problem = f"{root / COMPLETE}: damaged, or of another version of esm-stream"
        return Verified(1, 0, (Damage("finish", problem),), 0, _repair_of(root))
    problems: list[str] = []
    for name, entry in complete["shards"].items():
        problems += _shard_problems(root / name, entry)
    for name, entry in complete["files"].items():
        problems += _file_problems(root / name, entry)
    if not problems:
        problems += _not_opened(root, complete)
    names = [*complete["shards"], *complete["files"]]
    sizes = [e["size"] for kind in ("shards", "files") for e in complete[kind].values()]
    damages = tuple(Damage("", problem) for problem in problems)
    return Verified(len(names), sum(sizes), damages, 0, _repair_of(root))


def _require_form(complete: dict[str, Any]) -> None:
    """Refuse what the finish stage does not write, such as names that lead out of the directory.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: It is something else.
    """
    hashes = [entry[HASHES] for entry in complete["files"].values()]
    for entry in complete["shards"].values():
        hashes += [entry["header_sha256"], *entry[HASHES].values()]
    sizes = [e["size"] for kind in ("shards", "files") for e in complete[kind].values()]
    names = [*complete["shards"], *complete["files"]]
    plain = all(name not in ("", ".", "..") and Path(name).name == name for name in names)
    short = all(len(os.fsencode(name)) < 256 and "\0" not in name for name in names)
    typed = all(type(size) is int for size in sizes) and all(type(h) is str for h in hashes)
    if not (plain and short and typed):
        raise ValueError("not what the finish stage writes")


def _repair_of(root: Path) -> str:
    """The command that makes a damaged model whole: that of the work directory beside it."""
    try:
        source = load_plan(root.with_name(f"{root.name}.work") / "plan.json").source
    except (OSError, ValueError):
        source = "MANIFEST"
    return _command(source)


def _command(manifest: str) -> str:
    return shlex.join(["esm-stream", "merge", manifest, "--verify"])


def _shard_problems(path: Path, entry: dict[str, Any]) -> list[str]:
    try:
        header = read_header(path)
    except InputError as error:
        return list(error.problems)
    layout = ShardLayout(path.name, header.tensors, header.metadata, b"")
    if header.file_size != entry["size"] or header.sha256 != entry["header_sha256"]:
        return [f"{path}: size or header is not that of the shard that was written"]
    if set(header.tensors) != set(entry[HASHES]):
        return [f"{path}: holds other tensors than {COMPLETE} names"]
    return [
        f"{path}: tensor '{name}' holds other bytes than were written"
        for name, written in entry[HASHES].items()
        if hash_tensor(path, layout, name) != written
    ]


def _file_problems(path: Path, entry: dict[str, Any]) -> list[str]:
    if not path.is_file():
        return [f"{path}: missing"]
    if path.stat().st_size != entry["size"] or hash_file(path) != entry[HASHES]:
        return [f"{path}: holds other bytes than were written"]
    return []


def _not_opened(root: Path, complete: dict[str, Any]) -> list[str]:
    """What is wrong when the model is opened as others will: by its index, and by safetensors."""
    try:
        open_checkpoint(root)
        for name in complete["shards"]:
            with safe_open(root / name, "pt") as file:
                list(file.keys())
    except InputError as error:
        return list(error.problems)
    except (SafetensorError, OSError) as error:
        return [f"{root}: safetensors cannot open it: {error}"]
    return []
