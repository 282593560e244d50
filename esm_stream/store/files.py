"""Files that are whole or absent, also after a crash or a power failure, and JSON that knows it."""

import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import xxhash

from esm_stream.checkpoints.header import DTYPES
from esm_stream.checkpoints.layout import FORMAT_METADATA, TensorSpec, lay_out

if TYPE_CHECKING:
    from torch import Tensor

REPAIR: Final = "Run the same command with --verify: what is damaged is made again"
TEMPORARY: Final = "esm-*.tmp"
"""What files are called while they are written."""
_CODES = {kind.torch_name: code for code, kind in DTYPES.items()} | {"complex64": "C64"}
_HASH_BYTES: Final = 4 << 20
_SEAL: Final = b'{"xxh3_128":"%s",'
_SEAL_BYTES: Final = len(_SEAL % (b"0" * 32))


def write_atomically(path: Path, data: bytes | Iterable[bytes | memoryview]) -> None:
    """Write a file so that its name never stands for anything but the old or the new content.

    Args:
        path: The file.
        data: Its bytes, or pieces of them, one after the other.
    """
    # A name of its own for each writer: a task that a cluster runs twice writes its files twice.
    temporary = path.with_name(TEMPORARY.replace("*", secrets.token_hex(8)))
    try:
        with temporary.open("wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def fsync_path(path: Path) -> None:
    """Force a file's content, or a directory's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_up_to(top: Path, path: Path) -> None:
    """Force a file to the disk, and the names of all directories that lead to it from `top`."""
    fsync_path(path)
    for folder in path.parents:
        fsync_path(folder)
        if folder == top:
            return


def remove_for_good(paths: Iterable[Path]) -> None:
    """Remove files so that a power failure does not bring them back."""
    folders = set()
    for path in paths:
        if path.is_file():
            path.unlink()
            folders.add(path.parent)
    for folder in folders:
        fsync_path(folder)


def save_tensors(
    path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] = FORMAT_METADATA
) -> None:
    """Write a safetensors file atomically.

    Args:
        path: The file.
        tensors: On the CPU; those that are contiguous are not copied.
        metadata: Texts for the header.
    """
    # Wide types first: every tensor then lies at a multiple of its elements' size.
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    specs = [_spec(name, tensors[name]) for name in order]
    header = lay_out(path.name, specs, metadata).header
    write_atomically(path, _pieces(header, [tensors[name] for name in order]))


def _spec(name: str, value: "Tensor") -> TensorSpec:
    code = _CODES[str(value.dtype).removeprefix("torch.")]
    return TensorSpec(name, code, tuple(value.shape), value.numel() * value.element_size())


def _pieces(header: bytes, tensors: Iterable["Tensor"]) -> Iterator[bytes | memoryview]:
    import torch

    yield header
    for value in tensors:
        yield value.detach().contiguous().view(-1).view(torch.uint8).numpy().data


def hash_file(path: Path) -> str:
    """xxh3_128 of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sealed(document: bytes) -> bytes:
    """A JSON object with a hash of all that follows as its first entry."""
    rest = document.removeprefix(b"{")
    return _SEAL % xxhash.xxh3_128_hexdigest(rest).encode() + rest


def unsealed(data: bytes) -> bytes:
    """The JSON object that `sealed` was given.

    Raises:
        ValueError: It is not what was written; any flipped bit is found.
    """
    rest = data[_SEAL_BYTES:]
    if data != _SEAL % xxhash.xxh3_128_hexdigest(rest).encode() + rest:
        raise ValueError("not what was written: the hash at its beginning is of something else")
    return b"{" + rest
