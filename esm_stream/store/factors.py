"""Bases, coordinates, spectra and merged updates in Zarr 3.

From:  the forward (one expert, one matrix at a time) and merge stages.
To:    the merge and write stages; anyone with `zarr.open`.

<matrix>/basis (T, O, K), <matrix>/coordinates (T, K, I) float32, <matrix>/spectrum (T, min(O, I))
float64: one chunk (or several, for large matrices) per expert, so that experts never share a file.
A basis is read by panels of rows when a merge asks for them.
<matrix>/update: the merged update, (I, O) where it is stored so, float32, before layer scaling and
alpha. Checksums (crc32c) and no compression; a missing chunk reads as NaN, never as zeros. What an
array says of itself (shape, chunks, type) has a hash among its attributes.
"""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import xxhash
from torch import Tensor

from esm_stream.errors import DataError
from esm_stream.methods.contract import Factors
from esm_stream.store.files import REPAIR, fsync_up_to
from esm_stream.store.work import file_name
from esm_stream.subspace.sizes import PANEL_ROWS

if TYPE_CHECKING:
    import zarr

CHUNK_BYTES = 32 << 20
METADATA = "zarr.json"
HASH = "xxh3_128"
_CPU = torch.device("cpu")


class FactorStore:
    """Arrays of one merge, by matrix."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create(self, matrix: str, experts: int, outputs: int, inputs: int, rank: int) -> bool:
        """Lay out the arrays of one matrix; existing ones of the same shape are kept.

        Returns:
            Whether any was made anew: it holds nothing, whatever it held before.
        """
        name = file_name(matrix)
        thin = min(outputs, inputs)
        made = [
            self._array(f"{name}/basis", (experts, outputs, rank), np.float32, max_rows=PANEL_ROWS),
            self._array(f"{name}/coordinates", (experts, rank, inputs), np.float32),
            self._array(f"{name}/spectrum", (experts, thin), np.float64),
        ]
        return any(made)

    def create_update(self, matrix: str, shape: tuple[int, ...]) -> bool:
        """Lay out the merged update of one matrix; whether it was made anew."""
        return self._array(f"{file_name(matrix)}/update", shape, np.float32, leading=False)

    def _array(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: type,
        *,
        leading: bool = True,
        max_rows: int | None = None,
    ) -> bool:
        chunks = _chunks(shape, np.dtype(dtype).itemsize, leading=leading, max_rows=max_rows)
        wanted = _description(shape, chunks, np.dtype(dtype))
        if self._is_laid_out(name, wanted):
            return False
        import zarr
        import zarr.codecs

        # Metadata last: chunks of an array that was laid out otherwise must not outlive it.
        shutil.rmtree(self.root / name, ignore_errors=True)
        zarr.create_array(
            self.root / name,
            shape=shape,
            chunks=chunks,
            dtype=dtype,
            compressors=[zarr.codecs.Crc32cCodec()],
            fill_value=np.nan,
            config={"write_empty_chunks": True},
            attributes={HASH: wanted},
        )
        fsync_up_to(self.root, self.root / name / METADATA)
        return True

    def _is_laid_out(self, name: str, wanted: str) -> bool:
        try:
            return bool(self._open(name, "r").attrs[HASH] == wanted)
        except DataError as error:
            # Damage is made anew; a disk that cannot be read now may hold it all the same.
            if isinstance(error.__cause__, OSError) and not _is_absent(error.__cause__):
                raise error.__cause__ from error
            return False

    def write_factors(self, matrix: str, expert: int, factors: Factors) -> list[Path]:
        """Store one expert's factors, zeros beyond its rank; returns the files written."""
        written = []
        for kind, values in (
            ("basis", factors.basis_OK[:]),
            ("coordinates", factors.coordinates_KI),
            ("spectrum", factors.spectrum),
        ):
            array = self._open(f"{file_name(matrix)}/{kind}", "r+")
            whole = np.zeros(array.shape[1:], array.dtype)
            part = values.cpu().numpy()
            whole[tuple(slice(n) for n in part.shape)] = part
            array[expert] = whole
            written += list(_chunk_files(self.root / file_name(matrix) / kind, array, expert))
        return written

    def read_factors(
        self, matrix: str, expert: int, rank: int, norm: float, device: torch.device = _CPU
    ) -> Factors:
        """One expert's factors, its first `rank` columns; the basis when its rows are asked for.

        Raises:
            DataError: A chunk is missing or damaged.
        """
        name = file_name(matrix)
        basis = StoredRows(self, f"{name}/basis", expert, rank, device)
        coordinates = self.read(f"{name}/coordinates", (expert, slice(0, rank), slice(None)))
        spectrum = self.read(f"{name}/spectrum", (expert, slice(None)))
        return Factors(basis, coordinates.to(device), spectrum.to(device), norm)

    def write_update(self, matrix: str, update: Tensor) -> list[Path]:
        """Store a merged update; returns the files written."""
        array = self._open(f"{file_name(matrix)}/update", "r+")
        array[...] = update.float().cpu().numpy()
        return list(_chunk_files(self.root / file_name(matrix) / "update", array))

    def read_update(self, matrix: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of a merged update, float32.

        Raises:
            DataError: A chunk is missing or damaged.
        """
        return self.read(f"{file_name(matrix)}/update", (slice(start, stop),))

    def _open(self, name: str, mode: Literal["r", "r+"]) -> "zarr.Array[Any]":
        """An array whose metadata are what was written.

        Raises:
            DataError: They are not.
        """
        import zarr

        place = self.root / name
        try:
            array = zarr.open_array(place, mode=mode)
            found = _description(array.shape, array.chunks, array.dtype)
            whole = array.attrs[HASH] == found and math.isnan(array.fill_value)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise DataError(f"{place}: cannot be read: {_first_line(error)}. {REPAIR}") from error
        if not whole:
            raise DataError(f"{place / METADATA}: damaged. {REPAIR}")
        return array

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array."""
        return self._open(name, "r").shape

    def read(self, name: str, place: tuple[int | slice, ...]) -> Tensor:
        """A part of an array.

        Raises:
            DataError: A chunk is missing or damaged.
        """
        array = self._open(name, "r")
        try:
            values = np.asarray(array[place])
        except (ValueError, OSError) as error:
            raise DataError(
                f"{self.root / name}: cannot be read: {_first_line(error)}. {REPAIR}"
            ) from error
        if np.isnan(values).any():
            raise DataError(f"{self.root / name}: a part is missing. {REPAIR}")
        return torch.from_numpy(values)

    def names(self) -> list[str]:
        """All arrays that are laid out."""
        return sorted(p.parent.relative_to(self.root).as_posix() for p in _metadata(self.root))

    def damage(self, name: str) -> str | None:
        """What is wrong with what an array says of itself; None if nothing is."""
        try:
            self._open(name, "r")
        except DataError as error:
            return str(error).removesuffix(f" {REPAIR}")
        return None


class StoredRows:
    """First columns of one expert's basis, read by rows when asked for."""

    def __init__(
        self, store: FactorStore, name: str, expert: int, rank: int, device: torch.device
    ) -> None:
        self._store, self._name, self._expert, self._device = store, name, expert, device
        self.shape = (store.shape(name)[1], rank)

    def __getitem__(self, rows: slice) -> Tensor:
        """Rows of a slice, float32, on the device."""
        place = (self._expert, rows, slice(0, self.shape[1]))
        return self._store.read(self._name, place).to(self._device)


def _description(shape: tuple[int, ...], chunks: tuple[int, ...], dtype: "np.dtype[Any]") -> str:
    """Hash of what decides how the bytes of an array are read."""
    text = json.dumps([list(shape), list(chunks), dtype.str])
    return xxhash.xxh3_128_hexdigest(text.encode())


def _is_absent(error: OSError) -> bool:
    return isinstance(error, FileNotFoundError | NotADirectoryError)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _metadata(root: Path) -> Iterator[Path]:
    return root.glob(f"*/*/{METADATA}")


def _chunks(
    shape: tuple[int, ...], itemsize: int, *, leading: bool, max_rows: int | None = None
) -> tuple[int, ...]:
    """Whole trailing rows, as many as CHUNK_BYTES holds; one expert per chunk if `leading`."""
    head, body = ((1,), shape[1:]) if leading else ((), shape)
    row_bytes = math.prod(body[1:]) * itemsize
    rows = max(1, min(body[0], CHUNK_BYTES // max(row_bytes, 1), max_rows or body[0]))
    return (*head, rows, *(max(1, n) for n in body[1:]))


def _chunk_files(root: Path, array: "zarr.Array[Any]", expert: int | None = None) -> Iterator[Path]:
    """Files of all chunks of an array, or of one expert's."""
    grid = [range(math.ceil(n / c)) for n, c in zip(array.shape, array.chunks, strict=True)]
    if expert is not None:
        grid[0] = range(expert, expert + 1)
    for place in np.ndindex(*(len(axis) for axis in grid)):
        yield root.joinpath("c", *(str(axis[i]) for axis, i in zip(grid, place, strict=True)))
