"""Files that are whole or absent, also after a crash or a power failure."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from esm_stream.checkpoints.header import DTYPES
from esm_stream.checkpoints.layout import FORMAT_METADATA, TensorSpec, lay_out

if TYPE_CHECKING:
    from torch import Tensor

_CODES = {kind.torch_name: code for code, kind in DTYPES.items()} | {"complex64": "C64"}


def write_atomically(path: Path, data: bytes | Iterable[bytes | memoryview]) -> None:
    """Write a file so that its name never stands for anything but the old or the new content.

    Args:
        path: The file.
        data: Its bytes, or pieces of them, one after the other.
    """
    temporary = path.with_name(f"{path.name}.tmp")
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
