"""Inputs whose contents changed though size and time did not: what `--verify-inputs` looks for.

From:  every file of weights of base and experts, and all calibration data, read whole.
To:    work/inputs.json, their hashes; engine.py, which refuses or computes anew what read them.

A file whose size, time or header changed needs none of this: its tasks have other fingerprints.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from esm_stream.checkpoints.checkpoint import Checkpoint
from esm_stream.planning.plan import Plan, Task
from esm_stream.stages.context import checkpoint_at, fisher_of
from esm_stream.store.files import hash_file, sealed, unsealed, write_atomically


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file held when it was read."""

    size: int
    mtime_ns: int
    xxh3_128: str


def contents_of(plan: Plan) -> dict[str, Contents]:
    """Contents of all inputs, by path."""
    return {str(path): _contents(path) for path in dict.fromkeys(_files(plan))}


def changed_unseen(plan: Plan, found: Mapping[str, Contents]) -> list[Path]:
    """Files that hold something else than when they were last read, with the same size and time."""
    before = _recorded(plan)
    return [
        Path(path)
        for path, now in found.items()
        if (old := before.get(path)) is not None
        and (old.size, old.mtime_ns) == (now.size, now.mtime_ns)
        and old.xxh3_128 != now.xxh3_128
    ]


def record(plan: Plan, found: Mapping[str, Contents]) -> None:
    """Keep what the inputs hold for the next run."""
    document = {"files": {path: asdict(contents) for path, contents in found.items()}}
    write_atomically(plan.directory.input_hashes, sealed(json.dumps(document, indent=1).encode()))


def readers_of(plan: Plan, files: list[Path]) -> set[str]:
    """Tasks that read any of the files, and all that depend on them."""
    found: set[str] = set()
    for task in plan.tasks.values():
        if any(_reads(plan, task, path) for path in files) or found & set(plan.parents(task)):
            found.add(task.key)
    return found


def _files(plan: Plan) -> Iterator[Path]:
    for _, checkpoint in _models(plan):
        yield from (header.path for header in checkpoint.headers)
    for task in plan.of_stage("inputs"):
        for source in map(Path, task.reads):
            yield from sorted(p for p in source.rglob("*") if p.is_file())
            if source.is_file():
                yield source


def _contents(path: Path) -> Contents:
    status = path.stat()
    return Contents(status.st_size, status.st_mtime_ns, hash_file(path))


def _recorded(plan: Plan) -> dict[str, Contents]:
    """What an earlier run found; nothing if there is no record or it is damaged."""
    try:
        document = json.loads(unsealed(plan.directory.input_hashes.read_bytes()))
        return {path: Contents(**entry) for path, entry in document["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _reads(plan: Plan, task: Task, path: Path) -> bool:
    if task.stage == "inputs":
        return any(path.is_relative_to(source) for source in task.reads)
    for expert, checkpoint in _models(plan):
        # A task of one expert reads that expert and the base; others read all of them.
        if not expert or task.expert in ("", expert):
            names = (name for name in task.reads if name in checkpoint.tensors)
            if any(path == header.path for n in names for header in checkpoint.files_of(n)):
                return True
    return False


def _models(plan: Plan) -> Iterator[tuple[str, Checkpoint]]:
    """Base, experts by name, and their Fisher information."""
    for name, root in (("", plan.base), *plan.experts.items()):
        yield name, checkpoint_at(plan, root)
    for name in plan.fishers:
        yield name, fisher_of(plan, name)
