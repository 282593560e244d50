"""Tensors of a checkpoint as views of read-only file maps, or copied into memory that is there.

From:  the shards of a Checkpoint, mapped when the first tensor of each is asked for.
To:    whoever computes: tensors or panels of their rows, without a copy; `fill` for panels so small
       that mapping their pages would cost more than copying them.
Peak:  no anonymous memory (a copy only of tensors that lie unaligned); pages of the file count as
       RssFile and leave it with `drop` or `close`.

The tensors cannot be written to: an in-place operation on one ends the process with SIGSEGV.
Maps are shared and read-only because a private writable map of a file larger than memory is
refused by the kernel, and an accidental write to one silently becomes anonymous memory.
"""

import ctypes
import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from esm_stream.checkpoints.checkpoint import Checkpoint
from esm_stream.checkpoints.header import Header, TensorInfo
from esm_stream.errors import InputError

COMPARE_BYTES = 32 * 2**20
_STILL = "Let nothing write to it and start again."


@dataclass(frozen=True, slots=True)
class _Map:
    """A mapped file and its bytes as a tensor, which alone keeps the map alive."""

    pages: mmap.mmap
    contents: Tensor  # uint8, the whole file


class TensorReader:
    """Reads tensors of one checkpoint; one reader per thread."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.bytes_read = 0
        self._maps: dict[Path, _Map] = {}
        self._files: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, read-only; it stays valid after the reader is closed."""
        info = self.checkpoint.tensors[name]
        return self._view(info, info.start, info.end, info.shape)

    def lookup(self, name: str) -> Tensor:
        """The whole tensor for looking up a few of its rows: not counted in `bytes_read`."""
        counted = self.bytes_read
        tensor = self.tensor(name)
        self.bytes_read = counted
        return tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop-1 along the first dimension; a scalar is one row, of shape (1,)."""
        info = self.checkpoint.tensors[name]
        if not 0 <= start <= stop <= info.num_rows:
            raise ValueError(f"{name}: rows {start}..{stop} are outside 0..{info.num_rows}")
        first_byte = info.start + start * info.row_nbytes
        last_byte = info.start + stop * info.row_nbytes
        return self._view(info, first_byte, last_byte, (stop - start, *info.shape[1:]))

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start..stop-1 of the flattened tensor, shape (stop - start,)."""
        info = self.checkpoint.tensors[name]
        if not 0 <= start <= stop <= info.numel:
            raise ValueError(f"{name}: elements {start}..{stop} are outside 0..{info.numel}")
        size = info.kind.bits // 8
        return self._view(
            info, info.start + start * size, info.start + stop * size, (stop - start,)
        )

    def raw_bytes(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Bytes start..stop-1 of the tensor as uint8, whatever its dtype."""
        info = self.checkpoint.tensors[name]
        stop = info.nbytes if stop is None else stop
        if not 0 <= start <= stop <= info.nbytes:
            raise ValueError(f"{name}: bytes {start}..{stop} are outside 0..{info.nbytes}")
        return self._bytes(name, info.start + start, info.start + stop)

    def fill(self, name: str, start: int, memory: memoryview) -> None:
        """Copy bytes of the tensor, from byte `start` on, until `memory` is full.

        Raises:
            InputError: The file cannot be read, or has changed.
        """
        header, offset = self.checkpoint.file_of(name), self.checkpoint.tensors[name].start + start
        self.bytes_read += len(memory)
        if header.path not in self._files:
            self._files[header.path] = _open(header)
        while memory:
            count = os.preadv(self._files[header.path], [memory], offset)
            if not count:
                raise InputError([f"{header.path}: became shorter while it was read. {_STILL}"])
            memory, offset = memory[count:], offset + count

    def drop(self) -> None:
        """Let the pages read so far leave this process; tensors stay valid and fault them in."""
        for mapped in self._maps.values():
            mapped.pages.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Drop pages, maps and open files; a map lives on while a tensor of it does."""
        self.drop()
        self._maps.clear()
        while self._files:
            os.close(self._files.popitem()[1])

    def _bytes(self, name: str, start: int, stop: int) -> Tensor:
        self.bytes_read += stop - start
        return self._map_of(self.checkpoint.file_of(name)).contents[start:stop]

    def _view(self, info: TensorInfo, start: int, stop: int, shape: tuple[int, ...]) -> Tensor:
        if info.kind.torch_name is None:
            raise ValueError(f"{info.name}: {info.dtype} is copied, not computed with: raw_bytes")
        dtype: torch.dtype = getattr(torch, info.kind.torch_name)
        if math.prod(shape) == 0:
            return torch.empty(shape, dtype=dtype)
        contents = self._bytes(info.name, start, stop)
        # Old files may have headers of any length; torch needs elements at multiples of their size.
        if start % dtype.itemsize:
            contents = contents.clone()
        return contents.view(dtype).view(shape)

    def _map_of(self, header: Header) -> _Map:
        mapped = self._maps.get(header.path)
        if mapped is None:
            mapped = self._maps[header.path] = _map_file(header)
        return mapped


def equal_bytes(a: TensorReader, b: TensorReader, name: str) -> bool:
    """Whether both checkpoints hold the same dtype, shape and bytes under a name.

    Peak: no memory of its own; at most 32 MiB of either file's pages are resident at a time.
    """
    one, other = a.checkpoint.tensors[name], b.checkpoint.tensors[name]
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for start in range(0, one.nbytes, COMPARE_BYTES):
        stop = min(start + COMPARE_BYTES, one.nbytes)
        if not torch.equal(a.raw_bytes(name, start, stop), b.raw_bytes(name, start, stop)):
            return False
        a.drop()
        b.drop()
    return True


def _map_file(header: Header) -> _Map:
    descriptor = _open(header)
    try:
        pages = mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    except OSError as error:
        raise InputError(
            [f"{header.path}: cannot be mapped ({error.strerror}). Check that it is readable."]
        ) from error
    finally:
        os.close(descriptor)
    return _Map(pages, _as_tensor(pages))


def _open(header: Header) -> int:
    """Descriptor of a file that is still the one whose header was read.

    Raises:
        InputError: It is not, or cannot be opened.
    """
    try:
        descriptor = os.open(header.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(
            [f"{header.path}: cannot be opened ({error.strerror}). Check that it is readable."]
        ) from error
    status = os.fstat(descriptor)
    if (status.st_size, status.st_mtime_ns) != (header.file_size, header.mtime_ns):
        os.close(descriptor)
        raise InputError(
            [
                f"{header.path}: changed since its header was read (size "
                f"{header.file_size} -> {status.st_size} bytes, mtime {header.mtime_ns} -> "
                f"{status.st_mtime_ns} ns). {_STILL}"
            ]
        )
    return descriptor


def _as_tensor(pages: mmap.mmap) -> Tensor:
    """A uint8 tensor over the map, which it keeps alive.

    torch takes read-only buffers only with a warning, so it gets a ctypes array at the address.
    """
    view = np.frombuffer(pages, dtype=np.uint8)
    array = (ctypes.c_uint8 * len(pages)).from_address(view.ctypes.data)
    array.owner = view  # type: ignore[attr-defined]
    return torch.frombuffer(array, dtype=torch.uint8)
