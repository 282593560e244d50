"""Output shards: laid out before the merge, reserved, filled in any order, sealed.

From:  plan_shards, from the base model's headers; write tasks, with tensors or panels of rows.
To:    safetensors files byte-identical to those of `save_file` for tensors in the same order.
Peak:  what the caller hands in; 4 MiB where bytes have to be read back to be hashed.

A reserved shard has its final size and a valid header before its first tensor, so until it is
sealed it is called `<name>.partial`. Written with pwrite, never through a map: a full disk is then
an error of the reservation and not a SIGBUS.
"""

import errno
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import xxhash

from esm_stream.checkpoints.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from esm_stream.checkpoints.header import DTYPES, TensorInfo
from esm_stream.checkpoints.layout import FORMAT_METADATA, ShardLayout, TensorSpec, lay_out
from esm_stream.errors import BudgetError, TaskError
from esm_stream.store.files import fsync_path, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

OutputDType = Literal["base", "float32", "bfloat16", "float16"]
PARTIAL_SUFFIX = ".partial"
HASH_BYTES = 4 * 2**20

_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_WRITE_RANK = {code: rank for rank, code in enumerate(reversed(tuple(DTYPES)))}


def plan_shards(
    base: Checkpoint, dtype: OutputDType, shard_size: Literal["base"] | int
) -> tuple[ShardLayout, ...]:
    """The files of a merged model.

    Args:
        base: The model whose tensors, and by default whose files, the output has.
        dtype: Type of the output's float tensors; "base" keeps each tensor's own.
        shard_size: "base" for the base's files, names and metadata; or the largest number of
            tensor bytes per file, filled in stored order and named as transformers does.
    """
    if shard_size == "base":
        return tuple(
            lay_out(
                header.path.name,
                _arrange(header.tensors.values(), dtype),
                header.metadata or FORMAT_METADATA,
            )
            for header in base.headers
        )
    groups = _fill([_convert(info, dtype) for info in base.tensors.values()], shard_size)
    return tuple(
        lay_out(_shard_name(number, len(groups)), sorted(group, key=_write_order))
        for number, group in enumerate(groups, start=1)
    )


def _arrange(infos: Iterable[TensorInfo], dtype: OutputDType) -> list[TensorSpec]:
    """The tensors of one base file in its own order, unless that would leave some unaligned."""
    infos = tuple(infos)
    specs = [_convert(info, dtype) for info in infos]
    if all(info.dtype == spec.dtype for info, spec in zip(infos, specs, strict=True)):
        return specs
    return sorted(specs, key=_write_order)


def _convert(info: TensorInfo, dtype: OutputDType) -> TensorSpec:
    if dtype == "base" or not info.kind.is_float:
        return TensorSpec(info.name, info.dtype, info.shape, info.nbytes)
    code = _CODES[dtype]
    return TensorSpec(info.name, code, info.shape, info.numel * DTYPES[code].bits // 8)


def _write_order(spec: TensorSpec) -> tuple[int, str]:
    """The order of the format's own writer: larger types first, then names."""
    return _WRITE_RANK[spec.dtype], spec.name


def _fill(specs: Iterable[TensorSpec], limit_bytes: int) -> list[list[TensorSpec]]:
    """Files of at most `limit_bytes`; a larger tensor has one alone, before the one in work."""
    groups: list[list[TensorSpec]] = []
    filling: list[TensorSpec] = []
    filled_bytes = 0
    for spec in specs:
        if spec.nbytes > limit_bytes:
            groups.append([spec])
            continue
        if filled_bytes + spec.nbytes > limit_bytes:
            groups.append(filling)
            filling, filled_bytes = [], 0
        filling.append(spec)
        filled_bytes += spec.nbytes
    if filling or not groups:
        groups.append(filling)
    return groups


def _shard_name(number: int, count: int) -> str:
    return SINGLE_NAME if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def is_reserved(directory: Path, layout: ShardLayout) -> bool:
    """Whether a shard's space is taken, under either of its names, and its header written."""
    return any(_fits(path, layout) for path in _paths(directory, layout))


def reserve(directory: Path, layout: ShardLayout) -> Path:
    """Take the disk space of a shard and write its header.

    Returns:
        `<name>.partial`; one that is there with the same header and size is kept with what it
        holds. The final name when the shard is sealed already: it is left as it is.

    Raises:
        BudgetError: The disk is full; nothing of this shard is left on it.
    """
    final, partial = _paths(directory, layout)
    for path in (partial, final):
        if _fits(path, layout):
            return path
    partial.unlink(missing_ok=True)
    try:
        _allocate(partial, layout)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        disk = os.statvfs(directory)
        raise BudgetError(
            f"{partial}: needs {layout.file_size} bytes of disk, {disk.f_bavail * disk.f_frsize} "
            "bytes are free. Free some space or choose an output directory on another disk."
        ) from error
    # Markers of written tensors may outlive a power failure: so must the name they speak of.
    fsync_path(directory)
    return partial


def _paths(directory: Path, layout: ShardLayout) -> tuple[Path, Path]:
    return directory / layout.file_name, directory / f"{layout.file_name}{PARTIAL_SUFFIX}"


def _fits(path: Path, layout: ShardLayout) -> bool:
    # A link would lead what is written to another place.
    if path.is_symlink() or not path.is_file() or path.stat().st_size != layout.file_size:
        return False
    with path.open("rb") as file:
        return file.read(len(layout.header)) == layout.header


def _allocate(path: Path, layout: ShardLayout) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        # Header last: a file without it is not taken for a reservation after a crash.
        os.posix_fallocate(descriptor, 0, layout.file_size)
        _write_all(descriptor, memoryview(layout.header), 0)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data = data[written:]
        offset += written


class _Hash:
    """Hash of a tensor's bytes as long as they are written one after the other."""

    def __init__(self) -> None:
        self.digest = xxhash.xxh3_128()
        self.end = 0
        self.in_order = True

    def add(self, offset: int, data: memoryview) -> None:
        self.in_order = self.in_order and offset == self.end
        if self.in_order:
            self.digest.update(data)
            self.end += len(data)


class ShardWriter:
    """Puts tensors at their places in a reserved shard; any number of writers, in any order."""

    def __init__(self, directory: Path, layout: ShardLayout) -> None:
        self.layout = layout
        self._path = _paths(directory, layout)[1]
        self._descriptor = -1
        self._hashes: dict[str, _Hash] = {}

    def __enter__(self) -> Self:
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_NOFOLLOW)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)

    def write_rows(self, name: str, first_row: int, rows: "Tensor") -> None:
        """Write a panel of rows, or a whole tensor from row 0; a scalar is one row.

        Args:
            name: The tensor.
            first_row: Where along the first dimension the panel goes.
            rows: Contiguous, on the CPU, in the layout's dtype.

        Raises:
            ValueError: The panel is not of this tensor; nothing was written.
        """
        info = self.layout.tensors[name]
        num_rows = rows.shape[0] if rows.ndim else 1
        if str(rows.dtype) != f"torch.{info.kind.torch_name}":
            raise ValueError(f"{name}: panel is {rows.dtype}, the shard has {info.dtype}")
        if rows.shape[1:] != info.shape[1:]:
            raise ValueError(f"{name}: panel has shape {tuple(rows.shape)}, of {info.shape}")
        if not 0 <= first_row <= first_row + num_rows <= info.num_rows:
            raise ValueError(
                f"{name}: rows {first_row}..{first_row + num_rows} are outside 0..{info.num_rows}"
            )
        self._write(info, first_row * info.row_nbytes, rows)

    def write_bytes(self, name: str, offset: int, data: "Tensor") -> None:
        """Write uint8 `data` at byte `offset` of a tensor of any dtype, for copies.

        Raises:
            ValueError: The bytes do not lie within the tensor; nothing was written.
        """
        info = self.layout.tensors[name]
        if str(data.dtype) != "torch.uint8" or data.ndim != 1:
            raise ValueError(f"{name}: want a vector of uint8, got {data.dtype} {data.ndim}-d")
        if not 0 <= offset <= offset + data.numel() <= info.nbytes:
            raise ValueError(
                f"{name}: bytes {offset}..{offset + data.numel()} are outside 0..{info.nbytes}"
            )
        self._write(info, offset, data)

    def sync(self) -> None:
        """Return when everything written is on the disk."""
        os.fsync(self._descriptor)

    def hashes(self, names: Iterable[str]) -> dict[str, str]:
        """xxh3_128 of tensors in hexadecimal.

        What this writer wrote in order was hashed on its way; bytes of other tensors are read back.
        """
        return {name: self._hash(name) for name in names}

    def _hash(self, name: str) -> str:
        written = self._hashes.get(name, _Hash())
        if written.in_order and written.end == self.layout.tensors[name].nbytes:
            return written.digest.hexdigest()
        return hash_tensor(self._path, self.layout, name)

    def _write(self, info: TensorInfo, offset: int, data: "Tensor") -> None:
        import torch

        if data.device.type != "cpu" or not data.is_contiguous():
            raise ValueError(f"{info.name}: want a contiguous CPU tensor, got {data.device}")
        flat = data.detach().reshape(-1).view(torch.uint8).numpy().data
        _write_all(self._descriptor, flat, info.start + offset)
        self._hashes.setdefault(info.name, _Hash()).add(offset, flat)


def seal(directory: Path, layout: ShardLayout) -> Path:
    """Give a filled shard its final name; doing it again changes nothing.

    Raises:
        TaskError: There is no shard with this layout.
    """
    final, partial = _paths(directory, layout)
    path = partial if partial.exists() else final
    if not _fits(path, layout):
        raise TaskError(
            f"{path}: not the shard that was reserved ({layout.file_size} bytes). Something "
            "else removed or changed it; run again to write it anew."
        )
    fsync_path(path)
    path.rename(final)
    fsync_path(directory)
    return final


def hash_tensor(path: Path, layout: ShardLayout, name: str) -> str:
    """xxh3_128 of the bytes of one tensor in a file of this layout, in hexadecimal."""
    info = layout.tensors[name]
    buffer = memoryview(bytearray(min(HASH_BYTES, info.nbytes)))
    digest = xxhash.xxh3_128()
    left = info.nbytes
    with path.open("rb", buffering=0) as file:
        file.seek(info.start)
        while left:
            count = file.readinto(buffer[: min(left, HASH_BYTES)])
            if not count:
                raise TaskError(f"{path}: became shorter while it was read. Run again.")
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()


def write_index(directory: Path, layouts: Sequence[ShardLayout]) -> None:
    """Write the index of a model of several shards, as transformers does; one shard has none."""
    if len(layouts) == 1:
        return
    infos = [info for layout in layouts for info in layout.tensors.values()]
    index = {
        "metadata": {
            "total_parameters": sum(info.numel for info in infos),
            "total_size": sum(info.nbytes for info in infos),
        },
        "weight_map": {name: layout.file_name for layout in layouts for name in layout.tensors},
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    write_atomically(directory / INDEX_NAME, text.encode())
