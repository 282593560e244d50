"""Paths of the work directory, and the markers that decide what a resumed run may skip.

A task is complete when its marker carries the fingerprint that the plan computes for it and every
output it lists is there with its size. The marker is written last, after its outputs are on disk.
A *transient* output (a hidden state, a shard that still has its ".partial" name) may be gone once
every task that reads it is complete.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import quote

import xxhash

from esm_stream.store.files import fsync_path, write_atomically

SCHEMA: Final = 1
OWN_FOLDERS: Final = ("inputs", "hidden", "factors.zarr", "sums", "statistics", "done")
OWN_NAMES: Final = {"lock", "plan.json", "plan.json.tmp", "events.jsonl", *OWN_FOLDERS}
_SAFE: Final = "{},*=+@"
_HASH_BYTES: Final = 4 << 20


def in_merged(expert: str) -> str:
    """Name for an expert's samples in the merged model; no expert is called so."""
    return f"@{expert}"


def file_name(name: str) -> str:
    """A tensor or role name as one path component."""
    return quote(name, safe=_SAFE)


@dataclass(frozen=True, slots=True)
class Output:
    """A file that a task wrote; `path` is relative to the work or the output directory."""

    root: Literal["work", "output"]
    path: str
    size: int
    xxh3_128: str = ""
    transient: bool = False


@dataclass(frozen=True, slots=True)
class Marker:
    """What a finished task left behind."""

    key: str
    fingerprint: str
    outputs: tuple[Output, ...]
    results: dict[str, Any]
    seconds: float


class WorkDirectory:
    """Paths and markers of one merge; cheap to make, holds no state."""

    def __init__(self, root: Path, output: Path) -> None:
        self.root = root
        self.output = output

    @property
    def plan(self) -> Path:
        """The plan that this directory belongs to."""
        return self.root / "plan.json"

    @property
    def events(self) -> Path:
        """One JSON line per event of every run."""
        return self.root / "events.jsonl"

    @property
    def factors(self) -> Path:
        """The Zarr group of factors and merged updates."""
        return self.root / "factors.zarr"

    @property
    def sums(self) -> Path:
        """Sums over experts, by matrix."""
        return self.root / "sums"

    def inputs(self, expert: str) -> Path:
        """Model inputs of one expert."""
        return self.root / "inputs" / f"{expert}.safetensors"

    def arguments(self, expert: str) -> Path:
        """What the skeleton hands to every block of one expert."""
        return self.root / "hidden" / expert / "arguments.safetensors"

    def hidden(self, expert: str, block: int) -> Path:
        """Hidden states of one expert before a block."""
        return self.root / "hidden" / expert / f"{block:04d}.safetensors"

    def statistics(self, key: str) -> Path:
        """Sums that a measuring task, or the task that adds them up, leaves behind."""
        *folders, name = map(file_name, key.split("/"))
        return self.root.joinpath("statistics", *folders, f"{name}.safetensors")

    def marker(self, key: str) -> Path:
        """Marker of one task."""
        *folders, name = map(file_name, key.split("/"))
        return self.root.joinpath("done", *folders, f"{name}.json")

    def of(self, output: Output) -> Path:
        """Absolute path of an output."""
        return (self.root if output.root == "work" else self.output) / output.path

    def finish(
        self,
        key: str,
        fingerprint: str,
        outputs: Sequence[Output],
        results: Mapping[str, Any],
        seconds: float,
    ) -> None:
        """Write the marker of a task whose outputs are on disk."""
        marker = Marker(key, fingerprint, tuple(outputs), dict(results), seconds)
        path = self.marker(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"schema": SCHEMA, **asdict(marker)}
        write_atomically(path, json.dumps(document, indent=1).encode())

    def read(self, key: str) -> Marker | None:
        """The marker of a task; None if there is none or it is not readable as one."""
        try:
            document = json.loads(self.marker(key).read_bytes())
            if document.pop("schema") != SCHEMA:
                return None
            outputs = tuple(Output(**output) for output in document.pop("outputs"))
            return Marker(**document, outputs=outputs)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError):
            return None

    def results(self, key: str) -> dict[str, Any]:
        """Small results of a finished task.

        Raises:
            FileNotFoundError: The task has no readable marker.
        """
        marker = self.read(key)
        if marker is None:
            raise FileNotFoundError(f"{self.marker(key)}: task '{key}' has no readable marker")
        return marker.results

    def forget(self, key: str) -> None:
        """Remove the marker of a task."""
        self.marker(key).unlink(missing_ok=True)

    def persistent_outputs_exist(self, marker: Marker) -> bool:
        """Whether everything that must outlive the run is there with its size."""
        return all(self._exists(o) for o in marker.outputs if not o.transient)

    def transient_outputs_exist(self, marker: Marker) -> bool:
        """Whether what the next tasks read is still there."""
        return all(self._exists(o) for o in marker.outputs if o.transient)

    def _exists(self, output: Output) -> bool:
        path = self.of(output)
        return path.is_file() and path.stat().st_size == output.size

    def record(self, path: Path, *, transient: bool = False) -> Output:
        """Force a file to the disk and describe it."""
        inside = path.is_relative_to(self.root)
        relative = path.relative_to(self.root if inside else self.output)
        fsync_path(path)
        fsync_path(path.parent)
        return Output(
            "work" if inside else "output",
            relative.as_posix(),
            path.stat().st_size,
            hash_file(path),
            transient,
        )

    def sweep(self) -> None:
        """Remove what an interrupted run left unfinished: temporary files of writers."""
        for folder in OWN_FOLDERS:
            for pattern in ("*.tmp", "*.partial"):
                for path in (self.root / folder).rglob(pattern):
                    path.unlink(missing_ok=True)


def hash_file(path: Path) -> str:
    """xxh3_128 of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()


def tasks_to_run(
    order: Sequence[str],
    readers: Mapping[str, Iterable[str]],
    is_valid: Callable[[str], bool],
    has_transients: Callable[[str], bool],
) -> set[str]:
    """Keys of the tasks that a resumed run has to run.

    Args:
        order: All tasks, each after the tasks it depends on.
        readers: The tasks that read the transient outputs of a task.
        is_valid: The marker's fingerprint matches and its persistent outputs are whole.
        has_transients: The transient outputs are whole.
    """
    needed: set[str] = set()
    for key in reversed(order):
        is_read = any(reader in needed for reader in readers.get(key, ()))
        if not is_valid(key) or (is_read and not has_transients(key)):
            needed.add(key)
    return needed
