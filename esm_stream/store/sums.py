"""Sums over experts: exact, added to expert by expert, and aware of which experts they hold.

From:  stages/sums.py, one expert's terms of one matrix at a time, panel by panel.
To:    the merge stage, panel by panel; the next run, which adds or takes out single experts.
Peak:  a few panels.

<matrix>/0.sums: int64 panels, one after the other, each in units of its own (subspace/exact.py);
then a JSON table of the *members* (the experts in the sum, by fingerprint) and of the panels, with
their places, sizes of terms and checksums (xxh3_64); then the table's length and checksum. Adding a
term writes a new file and renames it, so that a file and its list of members are never apart.

Tasks that add to one matrix at the same time each take a file of their own, `1.sums` and so on: a
worker's *partial* sum. `whole` adds partials up before the sum is used. Because sums are exact, the
bytes that come out do not depend on order, partition, or who did it.

A file with a member that is not wanted (an expert that left, or changed) counts as absent.
"""

import fcntl
import json
import os
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, zip_longest
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import xxhash
from torch import Tensor

from esm_stream.errors import DataError
from esm_stream.methods.contract import Place
from esm_stream.store.files import REPAIR, write_atomically
from esm_stream.store.work import file_name
from esm_stream.subspace.exact import added, float_of, grid_of, integers, regridded, size_of

_END: Final = struct.Struct("<QQ8s")
_MAGIC: Final = b"ESMSUM01"


class Partial:
    """One file of sums; its table is read, panels when asked for."""

    def __init__(self, path: Path) -> None:
        """Read the table.

        Raises:
            FileNotFoundError: There is no such file.
            DataError: It is damaged.
        """
        self.path = path
        try:
            table = _read_table(path)
            self.members: dict[str, dict[str, Any]] = table["members"]
            self._panels = {Place(*panel.pop("place")): panel for panel in table["panels"]}
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise self._damaged() from error

    @property
    def places(self) -> list[Place]:
        """Panels in the order of the file."""
        return list(self._panels)

    def sizes(self, place: Place) -> dict[str, int | None]:
        """Size of every member's term."""
        return dict(zip(self.members, self._panels[place]["sizes"], strict=True))

    def integers(self, place: Place) -> Tensor:
        """A panel, (J, M, N) int64.

        Raises:
            DataError: Its bytes are not those that were written.
        """
        panel = self._panels[place]
        shape = (grid_of(panel["sizes"]).limbs, place.stop - place.start, place.columns)
        values = np.fromfile(self.path, np.int64, int(np.prod(shape)), offset=panel["offset"])
        if values.size != np.prod(shape) or _checksum(values) != panel["xxh3"]:
            raise self._damaged()
        return torch.from_numpy(values.reshape(shape))

    def __call__(self, place: Place) -> Tensor:
        """A panel in float64."""
        return float_of(self.integers(place), grid_of(self._panels[place]["sizes"]))

    def _damaged(self) -> DataError:
        return DataError(f"{self.path}: damaged. {REPAIR}")


class SumStore:
    """Sums of one merge, by matrix."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def members(self, matrix: str, wanted: Collection[str]) -> dict[str, dict[str, Any]]:
        """Members of a matrix's sums, by fingerprint, with what is known of each."""
        return _members_of(self._partials(matrix, wanted))

    def held(self, matrix: str) -> dict[str, dict[str, Any]]:
        """Members of the first file, wanted or not; none if there is none."""
        partial = self._open(self._path(matrix, 0))
        return partial.members if partial else {}

    def whole(self, matrix: str, wanted: Collection[str]) -> Partial | None:
        """The sum over all wanted members; partials are added up. None if there is none at all.

        Raises:
            DataError: A file is damaged, or members are missing.
        """
        partials = self._partials(matrix, wanted)
        if len(partials) > 1:
            panels = (_sum_of(place, partials) for place in partials[0].places)
            _write(self._path(matrix, 0), _members_of(partials), panels)
        for path in self._files(matrix):
            if path != self._path(matrix, 0):
                path.unlink()
        found = self._open(self._path(matrix, 0))
        missing = set(wanted) - set(found.members if found else ())
        if missing:
            raise DataError(
                f"{self.root / file_name(matrix)}: {len(missing)} of {len(wanted)} experts are "
                f"missing in the sums. {REPAIR}"
            )
        return found

    def add(
        self,
        matrix: str,
        places: Sequence[Place],
        member: str,
        about: Mapping[str, Any],
        term: Iterable[Tensor],
        wanted: Collection[str],
    ) -> None:
        """Add one member's term to the sums of a matrix; what has been added stays added.

        Args:
            matrix: Name of the matrix.
            places: Its panels.
            member: Fingerprint of what the term is made of.
            about: What to remember of the member.
            term: Panels, one for each place, or none for a zero.
            wanted: All members that the sum is to have.
        """
        if member in self.members(matrix, wanted):
            return
        with self._free_file(matrix) as path:
            usable = self._partials(matrix, wanted)
            before = next((partial for partial in usable if partial.path == path), None)
            members = {**(before.members if before else {}), member: dict(about)}
            panels = (
                _changed(place, before, member, panel, sign=1)
                for place, panel in zip_longest(places, term)
            )
            _write(path, members, panels)

    def remove(self, matrix: str, member: str, term: Iterable[Tensor]) -> bool:
        """Take a member's term out of the sum; False, and nothing is done, if it is another term.

        The sum is then what it would be had the member never been added.
        """
        path = self._path(matrix, 0)
        before = Partial(path)
        members = {k: v for k, v in before.members.items() if k != member}
        panels = (
            _changed(place, before, member, panel, sign=-1)
            for place, panel in zip_longest(before.places, term)
        )
        try:
            _write(path, members, panels)
        except _OtherTermError:
            return False
        return True

    def forget(self, matrix: str) -> None:
        """Remove the sums of a matrix."""
        for path in self._files(matrix):
            path.unlink()

    def damaged(self) -> list[Path]:
        """Files that are not what was written; all are read."""
        return [path for path in sorted(self.root.glob("*/*.sums")) if not _is_whole(path)]

    def _partials(self, matrix: str, wanted: Collection[str]) -> list[Partial]:
        """Files all of whose members are wanted and in no file before, in order."""
        found: list[Partial] = []
        for path in self._files(matrix):
            partial = self._open(path)
            if partial is None or not partial.members.keys() <= set(wanted):
                continue
            if not partial.members.keys() & _members_of(found).keys():
                found.append(partial)
        return found

    def _open(self, path: Path) -> Partial | None:
        try:
            return Partial(path)
        except FileNotFoundError:
            return None

    def _files(self, matrix: str) -> list[Path]:
        folder = self.root / file_name(matrix)
        return sorted(folder.glob("*.sums"), key=lambda path: int(path.stem))

    def _path(self, matrix: str, number: int) -> Path:
        return self.root / file_name(matrix) / f"{number}.sums"

    @contextmanager
    def _free_file(self, matrix: str) -> Iterator[Path]:
        """The first file that nobody else is adding to, locked until the block ends."""
        (self.root / file_name(matrix)).mkdir(parents=True, exist_ok=True)
        for number in count():
            path = self._path(matrix, number)
            descriptor = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            try:
                yield path
            finally:
                os.close(descriptor)
            return


def _is_whole(path: Path) -> bool:
    try:
        partial = Partial(path)
        for place in partial.places:
            partial.integers(place)
    except DataError:
        return False
    return True


class _OtherTermError(Exception):
    """A term to be taken out is not the one that was put in."""


@dataclass(frozen=True, slots=True)
class _Panel:
    """A panel to be written, (J, M, N) int64, and the size of every member's term."""

    place: Place
    limbs_JMN: Tensor
    sizes: Mapping[str, int | None]


def _write(path: Path, members: Mapping[str, Mapping[str, Any]], panels: Iterable[_Panel]) -> None:
    """Write a file in the place of `path`, which stays as it is if a panel cannot be made."""
    write_atomically(path, _pieces(dict(sorted(members.items())), panels))


def _pieces(
    members: Mapping[str, Mapping[str, Any]], panels: Iterable[_Panel]
) -> Iterator[bytes | memoryview]:
    """Panels one after the other, then the table of them."""
    rows: list[dict[str, Any]] = []
    offset = 0
    for panel in panels:
        values = panel.limbs_JMN.numpy()
        place = panel.place
        rows.append(
            {
                "place": [place.name, place.start, place.stop, place.columns],
                "sizes": [panel.sizes[member] for member in members],
                "offset": offset,
                "xxh3": _checksum(values),
            }
        )
        offset += values.nbytes
        yield values.data
    table = json.dumps({"members": members, "panels": rows}).encode()
    yield table
    yield _END.pack(len(table), xxhash.xxh3_64_intdigest(table), _MAGIC)


def _read_table(path: Path) -> dict[str, Any]:
    """The table at the end of a file; ValueError if it is not whole."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END.size))
        length, checksum, magic = _END.unpack(file.read())
        if magic != _MAGIC or length > size - _END.size:
            raise ValueError("no table")
        file.seek(size - _END.size - length)
        table = file.read(length)
    if xxhash.xxh3_64_intdigest(table) != checksum:
        raise ValueError("checksum of the table")
    found: dict[str, Any] = json.loads(table)
    return found


def _checksum(values: np.ndarray) -> str:
    return xxhash.xxh3_64_hexdigest(values.data)


def _members_of(partials: Iterable[Partial]) -> dict[str, dict[str, Any]]:
    return {k: v for partial in partials for k, v in partial.members.items()}


def _changed(
    place: Place, before: Partial | None, member: str, panel: Tensor | None, *, sign: int
) -> _Panel:
    """A panel with a member's term added or taken out."""
    sizes = before.sizes(place) if before else {}
    size = None if panel is None else size_of(panel)
    if sign < 0 and sizes[member] != size:
        raise _OtherTermError
    everything = grid_of({**sizes, member: size}.values())
    if before is not None:
        total = regridded(before.integers(place), grid_of(sizes.values()), everything)
    else:
        shape = everything.limbs, place.stop - place.start, place.columns
        total = torch.zeros(shape, dtype=torch.int64)
    if panel is not None and size is not None:
        term, grid = integers(panel.cpu().double(), size)
        total = added(total, regridded(term, grid, everything), sign)
    kept = {k: v for k, v in {**sizes, member: size}.items() if sign > 0 or k != member}
    return _Panel(place, regridded(total, everything, grid_of(kept.values())), kept)


def _sum_of(place: Place, partials: Sequence[Partial]) -> _Panel:
    """A panel of several partials added up."""
    sizes = {k: v for partial in partials for k, v in partial.sizes(place).items()}
    everything = grid_of(sizes.values())
    total = torch.zeros(
        (everything.limbs, place.stop - place.start, place.columns), dtype=torch.int64
    )
    for partial in partials:
        grid = grid_of(partial.sizes(place).values())
        total = added(total, regridded(partial.integers(place), grid, everything))
    return _Panel(place, total, sizes)
