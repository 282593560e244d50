"""Bases, coordinates, spectra and merged updates in Zarr 3.

From:  the forward (one expert, one matrix at a time) and merge stages.
To:    the merge and write stages; anyone with `zarr.open`.

<matrix>/basis (T, O, K), <matrix>/coordinates (T, K, I) float32, <matrix>/spectrum (T, min(O, I))
float64: one chunk (or several, for large matrices) per expert, so that experts never share a file.
A basis is read by panels of rows when a merge asks for them.
<matrix>/update: the merged update, (I, O) where it is stored so, float32, before layer scaling and
alpha. Checksums (crc32c) and no compression; a missing chunk reads as NaN, never as zeros.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from esm_stream.errors import DataError
from esm_stream.methods.contract import Factors
from esm_stream.store.work import file_name
from esm_stream.subspace.sizes import PANEL_ROWS

if TYPE_CHECKING:
    import zarr

CHUNK_BYTES = 32 << 20
_CPU = torch.device("cpu")


class FactorStore:
    """Arrays of one merge, by matrix."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create(self, matrix: str, experts: int, outputs: int, inputs: int, rank: int) -> None:
        """Lay out the arrays of one matrix; existing ones of the same shape are kept."""
        basis = (experts, outputs, rank)
        self._array(f"{file_name(matrix)}/basis", basis, np.float32, max_rows=PANEL_ROWS)
        self._array(f"{file_name(matrix)}/coordinates", (experts, rank, inputs), np.float32)
        self._array(f"{file_name(matrix)}/spectrum", (experts, min(outputs, inputs)), np.float64)

    def create_update(self, matrix: str, shape: tuple[int, ...]) -> None:
        """Lay out the merged update of one matrix."""
        self._array(f"{file_name(matrix)}/update", shape, np.float32, leading=False)

    def _array(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: type,
        *,
        leading: bool = True,
        max_rows: int | None = None,
    ) -> None:
        chunks = _chunks(shape, np.dtype(dtype).itemsize, leading=leading, max_rows=max_rows)
        path = self.root / name
        import zarr
        import zarr.codecs

        if (path / "zarr.json").is_file():
            found = zarr.open_array(path, mode="r")
            if found.shape == shape and found.chunks == chunks and found.dtype == dtype:
                return
        zarr.create_array(
            path,
            shape=shape,
            chunks=chunks,
            dtype=dtype,
            compressors=[zarr.codecs.Crc32cCodec()],
            fill_value=np.nan,
            config={"write_empty_chunks": True},
            overwrite=True,
        )

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
        import zarr

        return zarr.open_array(self.root / name, mode=mode)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array."""
        return self._open(name, "r").shape

    def read(self, name: str, place: tuple[int | slice, ...]) -> Tensor:
        """A part of an array.

        Raises:
            DataError: A chunk is missing or damaged.
        """
        try:
            values = np.asarray(self._open(name, "r")[place])
        except (ValueError, OSError) as error:
            raise DataError(f"{self.root / name}: cannot be read: {error}") from error
        if np.isnan(values).any():
            raise DataError(f"{self.root / name}: a part is missing; remove it and run again")
        return torch.from_numpy(values)


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
