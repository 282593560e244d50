"""Paths of the work directory, and the markers that decide what a resumed run may skip.

A task is complete when its marker carries the fingerprint that the plan computes for it. The marker
is written last, after its outputs are on disk, and knows when it is damaged. What it lists in the
work directory has to be there as long as a task that reads it is not complete; *transient* outputs
(a hidden state, a shard that still has its ".partial" name) are then removed.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal
from urllib.parse import quote

import xxhash

from esm_stream.errors import DataError
from esm_stream.store.files import (
    REPAIR,
    TEMPORARY,
    fsync_up_to,
    hash_file,
    remove_for_good,
    sealed,
    unsealed,
    write_atomically,
)

SCHEMA: Final = 1
OWN_FOLDERS: Final = ("inputs", "hidden", "factors.zarr", "sums", "statistics", "done")
OWN_NAMES: Final = {"lock", "plan.json", "inputs.json", "events.jsonl", *OWN_FOLDERS}
_LONGEST: Final = 160
_SAFE: Final = "{},*=+@"


def in_merged(expert: str) -> str:
    """Name for an expert's samples in the merged model; no expert is called so."""
    return f"@{expert}"


def file_name(name: str) -> str:
    """A tensor or role name as one path component: never "..", never too long for a file."""
    quoted = quote(name, safe=_SAFE)
    if not quoted.strip("."):
        return quoted.replace(".", "%2E")
    if len(quoted) > _LONGEST:
        return f"{quoted[:_LONGEST]}~{xxhash.xxh3_128_hexdigest(name.encode())}"
    return quoted


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

    @property
    def transient(self) -> tuple[Output, ...]:
        """What may be gone once every task that reads it is complete, and is then removed."""
        return tuple(o for o in self.outputs if o.transient)

    @property
    def products(self) -> tuple[Output, ...]:
        """What stays in the work directory unless the user wants the space."""
        return tuple(o for o in self.outputs if o.root == "work" and not o.transient)

    @property
    def in_output(self) -> tuple[Output, ...]:
        """What belongs to the merged model."""
        return tuple(o for o in self.outputs if o.root == "output" and not o.transient)


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
    def input_hashes(self) -> Path:
        """Hashes of the contents of all inputs."""
        return self.root / "inputs.json"

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
        write_atomically(path, sealed(json.dumps(document, indent=1).encode()))
        fsync_up_to(self.root, path.parent)

    def read(self, key: str) -> Marker | None:
        """The marker of a task; None if there is none or it is not what was written."""
        try:
            document = json.loads(unsealed(self.marker(key).read_bytes()))
            if document.pop("schema") != SCHEMA:
                return None
            outputs = tuple(Output(**output) for output in document.pop("outputs"))
            if not all(map(_stays_inside, outputs)):
                return None
            return Marker(**document, outputs=outputs)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
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

    def forget(self, keys: Iterable[str]) -> None:
        """Remove the markers of tasks, for good: what they speak of may be written again.

        A marker that came back after a power failure would vouch for files of other options.
        """
        remove_for_good(map(self.marker, keys))

    def all_exist(self, outputs: Iterable[Output]) -> bool:
        """Whether files are there with their sizes."""
        return all(self._exists(output) for output in outputs)

    def _exists(self, output: Output) -> bool:
        path = self.of(output)
        return path.is_file() and path.stat().st_size == output.size

    def damage(self, output: Output) -> str | None:
        """What is wrong with an output, found by reading it; None if nothing is."""
        path = self.of(output)
        if not path.is_file():
            return f"{path}: missing"
        size = path.stat().st_size
        if size != output.size:
            return f"{path}: has {size} bytes, {output.size} were written"
        if output.xxh3_128 and hash_file(path) != output.xxh3_128:
            return f"{path}: holds other bytes than were written"
        return None

    def require_whole(self, key: str, path: Path) -> Path:
        """A file of the work directory, if it still is what a task left.

        Args:
            key: The task that wrote it, "" if there is none.
            path: The file.

        Raises:
            DataError: It is gone or damaged.
        """
        marker = self.read(key) if key else None
        name = path.relative_to(self.root).as_posix()
        written = [o for o in marker.outputs if o.path == name] if marker else []
        damage = self.damage(written[0]) if written else f"{path}: no marker says what it is"
        if damage:
            raise DataError(f"{damage}. {REPAIR}")
        return path

    def record(self, path: Path, *, transient: bool = False) -> Output:
        """Force a file to the disk and describe it."""
        inside = path.is_relative_to(self.root)
        root = self.root if inside else self.output
        relative = path.relative_to(root)
        fsync_up_to(root, path)
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
        for root in (self.root, self.output):
            for path in root.glob(TEMPORARY):
                path.unlink(missing_ok=True)


def _stays_inside(output: Output) -> bool:
    """Whether an output lies in the directory that it is said to be in."""
    path = PurePosixPath(output.path)
    return (
        output.root in ("work", "output")
        and not path.is_absolute()
        and ".." not in path.parts
        and type(output.size) is int
    )
