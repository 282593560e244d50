"""Faults of storage, injected under a running merge: errors, short reads, kills, power failures.

`watched` replaces the calls by which Python touches files. Each call on a file under one of the
roots is a *step* with a name, such as "write work/done/forward/expert0/0000.json". A fault lets one
step fail. As a step that failed once is let through afterwards, running the same thing again and
again meets a fault at every step there is, and gets on all the same.

What a power failure leaves (`Disk`) is what was forced to the disk. Of all else, each name and each
file is independently there or not, old or new, cut, or zeros.
"""

import errno
import io
import os
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

_NUMBERS = re.compile(r"esm-[0-9a-f]{16}|[0-9a-f]{32}")


class KilledError(BaseException):
    """The process is gone: from here on nothing it tries has any effect."""


@dataclass
class Faults:
    """Which steps there were, and what becomes of the next one that is wanted."""

    roots: Mapping[str, Path]
    strike: Callable[["Faults", str, Path], Any]
    wanted: Callable[[str], bool] = lambda _: True
    struck: set[str] = field(default_factory=set)
    last: str = ""
    dead: bool = False
    active: bool = False
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def step(self, what: str, path: Any) -> Any:  # noqa: ANN401 - what `strike` returns
        """Take a step: None to go on, or what the fault makes of it."""
        place = self._place(path)
        if place is None or not self.active:
            return None
        if self.dead:
            raise KilledError
        with self._lock:
            name = f"{what} {place}"
            if self.last or name in self.struck or not self.wanted(name):
                return None
            self.struck.add(name)
            self.last = name
            return self.strike(self, name, _path(path))

    def _place(self, path: Any) -> str | None:  # noqa: ANN401
        text = str(_path(path))
        for label, root in self.roots.items():
            if text == str(root) or text.startswith(f"{root}/"):
                return label + _NUMBERS.sub("*", text.removeprefix(str(root)))
        return None


def _path(path: Any) -> Path:  # noqa: ANN401
    """The path of a path or a descriptor."""
    if isinstance(path, int):
        return Path(f"/proc/self/fd/{path}").readlink()
    return Path(os.fsdecode(path))


def fails_with(number: int) -> Callable[[Faults, str, Path], Any]:
    """A strike: the call fails with an errno; of what is to be written, half is written."""

    def strike(faults: Faults, name: str, path: Path) -> Any:  # noqa: ANN401, ARG001
        error = OSError(number, os.strerror(number), str(path))
        if name.startswith("write"):
            return error
        raise error

    return strike


def reads_short(faults: Faults, name: str, path: Path) -> Any:  # noqa: ANN401, ARG001
    """A strike: half of what is there is read."""
    return "short"


class _File:
    """A file object whose reads and writes are steps."""

    def __init__(self, file: Any, path: Any, faults: Faults) -> None:  # noqa: ANN401
        self._file, self._path, self._faults = file, path, faults

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._file, name)

    def read(self, *size: int) -> Any:  # noqa: ANN401
        found = self._faults.step("read", self._path)
        data = self._file.read(*size)
        return data[: len(data) // 2] if found == "short" else data

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401
        found = self._faults.step("read", self._path)
        view = memoryview(buffer)
        return self._file.readinto(view[: max(1, len(view) // 2)] if found == "short" else view)

    def write(self, data: Any) -> int:  # noqa: ANN401
        found = self._faults.step("write", self._path)
        if isinstance(found, OSError):
            view = data if isinstance(data, str) else memoryview(data).cast("B")
            self._file.write(view[: len(view) // 2])
            raise found
        return self._file.write(data)

    def writelines(self, pieces: Any) -> None:  # noqa: ANN401
        for piece in pieces:
            self.write(piece)


@contextmanager
def watched(faults: Faults, forced: Callable[[int], None] = lambda _: None) -> Iterator[None]:
    """While active, every touch of a file under the roots is a step.

    Args:
        faults: Told of every step.
        forced: Called with the descriptor of what has been forced to the disk.
    """
    real = {
        name: getattr(os, name)
        for name in (
            *("open", "fsync", "pwrite", "posix_fallocate", "replace", "rename", "unlink"),
            *("mkdir", "rmdir", "link"),
        )
    }
    real_open = io.open

    def opened(file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:  # noqa: ANN401
        if isinstance(file, int) or faults._place(file) is None or not faults.active:
            return real_open(file, mode, *args, **more)
        faults.step("open" if set(mode) <= set("rbt") else "create", file)
        return _File(real_open(file, mode, *args, **more), file, faults)

    def pwrite(descriptor: int, data: Any, offset: int) -> int:  # noqa: ANN401
        found = faults.step("write", descriptor)
        if isinstance(found, OSError):
            real["pwrite"](descriptor, memoryview(data)[: len(data) // 2], offset)
            raise found
        return real["pwrite"](descriptor, data, offset)

    def os_open(path: Any, flags: int, *args: Any, **more: Any) -> int:  # noqa: ANN401
        if "dir_fd" not in more or more["dir_fd"] is None:
            faults.step("create" if flags & os.O_CREAT else "open", path)
        return real["open"](path, flags, *args, **more)

    def plain(name: str) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **more: Any) -> Any:  # noqa: ANN401
            if more.get("dir_fd") is None:
                faults.step(name, args[0] if name in ("replace", "rename", "link") else path)
            return real[name](path, *args, **more)

        return call

    def fsync(descriptor: int) -> None:
        faults.step("fsync", descriptor)
        real["fsync"](descriptor)
        forced(descriptor)

    own = ("open", "pwrite", "fsync")
    patches = [mock.patch.object(os, name, plain(name)) for name in real if name not in own]
    patches += [
        mock.patch.object(os, "fsync", fsync),
        mock.patch.object(os, "open", os_open),
        mock.patch.object(os, "pwrite", pwrite),
        mock.patch.object(io, "open", opened),
    ]
    for patch in patches:
        patch.start()
    faults.active, faults.last, faults.dead = True, "", False
    try:
        yield
    finally:
        faults.active = False
        for patch in patches:
            patch.stop()


Tree = dict[str, "Tree | bytes"]


class Disk:
    """What of some directories has been forced to the disk, and what a power failure leaves."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = roots
        self._names: dict[str, dict[str, int]] = {}
        self._data: dict[int, bytes] = {}
        self._held: list[int] = []
        for root in roots:
            for folder, _, files in os.walk(root):
                self._names[folder] = _names(Path(folder))
                for name in files:
                    self._hold(os.open(Path(folder, name), os.O_RDONLY))

    def forced(self, descriptor: int) -> None:
        """A file or a directory was forced to the disk."""
        path = _path(descriptor)
        if path.is_dir():
            self._names[str(path)] = _names(path)
        else:
            # Held open, so that its number is not given to another file.
            self._hold(os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY))

    def _hold(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        self._data[status.st_ino] = os.pread(descriptor, status.st_size, 0)
        self._held.append(descriptor)

    def after_power_failure(self, generator: random.Random) -> dict[Path, Tree]:
        """What is there when the machine is on again."""
        return {root: self._folder(str(root), generator) for root in self.roots}

    def _folder(self, path: str, generator: random.Random) -> Tree:
        forced = self._names.get(path, {})
        there = _names(Path(path)) if Path(path).is_dir() else {}
        found: Tree = {}
        for name in sorted({*forced, *there}):
            kept = forced.get(name)
            if kept != there.get(name) and generator.random() < 0.5:
                kept = there.get(name)
            if kept is None:
                continue
            place = f"{path}/{name}"
            if place in self._names or Path(place).is_dir():
                found[name] = self._folder(place, generator)
            else:
                current = Path(place).read_bytes() if there.get(name) == kept else None
                found[name] = self._file(kept, current, generator)
        return found

    def _file(self, inode: int, current: bytes | None, generator: random.Random) -> bytes:
        forced = self._data.get(inode)
        if current is None or current == forced:
            return forced or b""
        return generator.choice(
            [forced or b"", current, current[: len(current) // 2], bytes(len(current))]
        )

    def close(self) -> None:
        """Let go of all files."""
        for descriptor in self._held:
            os.close(descriptor)
        self._held.clear()


def _names(folder: Path) -> dict[str, int]:
    """The files of a folder by name, as numbers."""
    return {path.name: path.lstat().st_ino for path in folder.iterdir()}


def put(trees: Mapping[Path, Tree]) -> None:
    """Make directories what they are said to be."""
    for root, tree in trees.items():
        shutil.rmtree(root, ignore_errors=True)
        _put(root, tree)


def _put(path: Path, tree: Tree) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, content in tree.items():
        if isinstance(content, bytes):
            (path / name).write_bytes(content)
        else:
            _put(path / name, content)


def tree_of(path: Path) -> Tree:
    """Everything in a directory, as it is."""
    return {
        entry.name: tree_of(entry) if entry.is_dir() else entry.read_bytes()
        for entry in path.iterdir()
    }


NO_SPACE = fails_with(errno.ENOSPC)
IO_ERROR = fails_with(errno.EIO)
