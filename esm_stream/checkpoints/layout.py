"""Where the tensors of a safetensors file will lie: its header before its first tensor is there.

From:  names, dtypes and shapes.
To:    write/shards.py (output files), store/files.py (states, arguments, sums).
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from esm_stream.checkpoints.header import LENGTH_BYTES, METADATA_KEY, TensorInfo

FORMAT_METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written, before it has a place."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """One output file: its header, and where in it each tensor goes."""

    file_name: str
    tensors: Mapping[str, TensorInfo]  # in the order of their bytes
    metadata: Mapping[str, str]
    header: bytes  # with its length: everything before the first tensor

    @property
    def file_size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(info.nbytes for info in self.tensors.values())


def lay_out(
    file_name: str,
    specs: Iterable[TensorSpec],
    metadata: Mapping[str, str] = FORMAT_METADATA,
) -> ShardLayout:
    """Place tensors one after the other, in the order given, behind a header that says so."""
    entries: dict[str, object] = {METADATA_KEY: dict(metadata)}
    places: list[tuple[TensorSpec, int]] = []
    offset = 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": spec.shape,
            "data_offsets": (offset, offset + spec.nbytes),
        }
        places.append((spec, offset))
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    # Spaces up to a multiple of 8, so that the data of all types starts aligned.
    text += b" " * (-len(text) % 8)
    start = LENGTH_BYTES + len(text)
    return ShardLayout(
        file_name=file_name,
        tensors={
            spec.name: TensorInfo(
                spec.name, spec.dtype, spec.shape, start + offset, start + offset + spec.nbytes
            )
            for spec, offset in places
        },
        metadata=dict(metadata),
        header=len(text).to_bytes(LENGTH_BYTES, "little") + text,
    )
