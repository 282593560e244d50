"""Headers of safetensors files, read strictly.

From:  the first kilobytes of a shard; no tensor is touched.
To:    checkpoint.py (what a model holds), reader.py (where it lies), write/shards.py (same format).
Peak:  a few hundred bytes per tensor. A hostile header is at most 25 MB of JSON, parsed once.

The format: 8 bytes little-endian length, that many bytes of JSON, then the data of all tensors,
each at its `data_offsets` and together covering the rest of the file exactly.
"""

import json
import math
import os
import reprlib
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from esm_stream.errors import InputError

LENGTH_BYTES = 8
# 200 000 tensors with names of 50 letters; files of the largest models hold a few thousand.
MAX_HEADER_BYTES = 25_000_000
MAX_DIMENSIONS = 64
MAX_ELEMENTS = 2**63 - 1
MAX_PROBLEMS = 20

AGAIN = "The file is damaged: download or save it again."
ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
METADATA_KEY = "__metadata__"


@dataclass(frozen=True, slots=True)
class DType:
    """One element type of the format; `torch_name` is None for types that are only copied."""

    code: str
    bits: int
    torch_name: str | None = None

    @property
    def is_float(self) -> bool:
        """Whether tensors of this type are merged; all others are copied byte by byte."""
        return self.code in {"F64", "F32", "BF16", "F16"}


# In the order of the format's own writer, which lays out the later types first (write/shards.py).
DTYPES: Mapping[str, DType] = {
    dtype.code: dtype
    for dtype in (
        DType("BOOL", 8, "bool"),
        DType("F4", 4),
        DType("F6_E2M3", 6),
        DType("F6_E3M2", 6),
        DType("U8", 8, "uint8"),
        DType("I8", 8, "int8"),
        DType("F8_E5M2", 8),
        DType("F8_E4M3", 8),
        DType("F8_E8M0", 8),
        DType("F8_E4M3FNUZ", 8),
        DType("F8_E5M2FNUZ", 8),
        DType("I16", 16, "int16"),
        DType("U16", 16, "uint16"),
        DType("F16", 16, "float16"),
        DType("BF16", 16, "bfloat16"),
        DType("I32", 32, "int32"),
        DType("U32", 32, "uint32"),
        DType("F32", 32, "float32"),
        DType("C64", 64),
        DType("F64", 64, "float64"),
        DType("I64", 64, "int64"),
        DType("U64", 64, "uint64"),
    )
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a tensor is and which bytes of its file it takes."""

    name: str
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    end: int

    @property
    def kind(self) -> DType:
        """The element type."""
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.end - self.start

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def columns(self) -> int:
        """Elements of a row; all elements where there are fewer than two dimensions."""
        return math.prod(self.shape[1:]) if self.ndim > 1 else self.numel

    @property
    def num_rows(self) -> int:
        """Length of the first dimension; a scalar is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row, 0 for a tensor without rows."""
        return self.nbytes // self.num_rows if self.num_rows else 0


@dataclass(frozen=True, slots=True)
class Header:
    """Everything a safetensors file says about itself, and what identifies the file."""

    path: Path
    tensors: dict[str, TensorInfo]  # in the order of their bytes
    metadata: dict[str, str]
    data_start: int
    file_size: int
    mtime_ns: int
    sha256: str  # of the header with its length, that is of the file's first `data_start` bytes


class _FlawError(Exception):
    """One thing wrong with a header, without the name of the file."""


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 120
_short.maxtuple = _short.maxlist = 16


def quoted(value: object) -> str:
    """The value as Python shows it, on one line and never longer than a message can bear."""
    return _short.repr(value)


def shortened(problems: Sequence[str], rest: str) -> list[str]:
    """The first problems of one sort, and a line that counts the others."""
    hidden = len(problems) - MAX_PROBLEMS
    if hidden <= 0:
        return list(problems)
    return [*problems[:MAX_PROBLEMS], f"{rest}: and {hidden} more like these."]


def parse_json(text: bytes) -> Any:  # noqa: ANN401 - JSON is anything until it is checked
    """Parse UTF-8 JSON from a stranger.

    Raises:
        ValueError: Not UTF-8, not JSON, nested too deep, or an object with a key twice.
    """
    try:
        return json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise ValueError("nested too deep") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {quoted(key)} occurs twice in one object")
        found[key] = value
    return found


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def read_header(path: Path) -> Header:
    """Read and check the header of one safetensors file.

    Raises:
        InputError: The file cannot be read or breaks the format; all flaws found, by tensor.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError([f"{path}: not a regular file. Give a safetensors file."])
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            prefix = file.read(LENGTH_BYTES)
            length = _header_length(prefix, status.st_size)
            text = file.read(length)
        if len(text) < length:
            raise _FlawError("became shorter while it was read")
        tensors, metadata = _parse(text, status.st_size)
    except OSError as error:
        raise InputError(
            [f"{path}: cannot be read ({error.strerror}). Check that it exists and is readable."]
        ) from error
    except _FlawError as error:
        raise InputError([f"{path}: {flaw}. {AGAIN}" for flaw in error.args]) from error
    return Header(
        path=path,
        tensors=tensors,
        metadata=metadata,
        data_start=LENGTH_BYTES + length,
        file_size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        sha256=sha256(prefix + text).hexdigest(),
    )


def _header_length(prefix: bytes, file_size: int) -> int:
    if len(prefix) < LENGTH_BYTES:
        raise _FlawError(
            f"too short for safetensors: {len(prefix)} bytes, expected at least {LENGTH_BYTES}"
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise _FlawError(
            f"header length is {length} bytes, expected at most {MAX_HEADER_BYTES}; "
            "this may not be a safetensors file"
        )
    if LENGTH_BYTES + length > file_size:
        raise _FlawError(
            f"header ends at byte {LENGTH_BYTES + length}, but the file has {file_size} bytes"
        )
    return length


def _parse(text: bytes, file_size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    if not text.startswith(b"{"):
        raise _FlawError(f"header starts with {quoted(text[:1])}, expected b'{{'")
    try:
        entries: dict[str, Any] = parse_json(text)
    except ValueError as error:
        raise _FlawError(f"header is not valid JSON ({error})") from error
    data_start = LENGTH_BYTES + len(text)
    flaws: list[str] = []
    tensors: list[TensorInfo] = []
    metadata: dict[str, str] = {}
    for name, entry in entries.items():
        try:
            if name == METADATA_KEY:
                metadata = _metadata(entry)
            else:
                tensors.append(_tensor(name, entry, data_start))
        except _FlawError as flaw:
            flaws.append(str(flaw))
        if len(flaws) == MAX_PROBLEMS:
            raise _FlawError(*flaws, "there may be more flaws, these are the first")
    tensors.sort(key=lambda info: (info.start, info.end))
    # Where one entry is unusable its bytes are unknown, and every neighbour would look misplaced.
    if not flaws:
        flaws.extend(islice(_misplaced(tensors, data_start, file_size), MAX_PROBLEMS))
    if flaws:
        raise _FlawError(*flaws)
    return {info.name: info for info in tensors}, metadata


def _metadata(entry: object) -> dict[str, str]:
    if not isinstance(entry, dict):
        raise _FlawError(f"{METADATA_KEY} is {quoted(entry)}, expected an object of strings")
    for key, value in entry.items():
        if not isinstance(value, str):
            raise _FlawError(f"{METADATA_KEY} {quoted(key)} is {quoted(value)}, expected a string")
        if not (_is_unicode(key) and _is_unicode(value)):
            raise _FlawError(f"{METADATA_KEY} {quoted(key)} is not Unicode (a lone surrogate)")
    return entry


def _tensor(name: str, entry: object, data_start: int) -> TensorInfo:
    place = f"tensor {quoted(name)}"
    if not name or "\0" in name or not _is_unicode(name):
        raise _FlawError(f"{place}: name expected to be Unicode, not empty and without NUL")
    if not isinstance(entry, dict) or entry.keys() != ENTRY_KEYS:
        found = sorted(entry) if isinstance(entry, dict) else entry
        raise _FlawError(
            f"{place}: found {quoted(found)}, expected an object with exactly "
            "dtype, shape and data_offsets"
        )
    code = entry["dtype"]
    if not isinstance(code, str) or code not in DTYPES:
        raise _FlawError(
            f"{place}: dtype {quoted(code)} is not known, expected one of {', '.join(DTYPES)}"
        )
    shape = _shape(place, entry["shape"])
    start, end = _offsets(place, entry["data_offsets"])
    bits = math.prod(shape) * DTYPES[code].bits
    if (end - start) * 8 != bits:
        raise _FlawError(
            f"{place}: data_offsets [{start}, {end}] hold {end - start} bytes, expected "
            f"{bits / 8:.15g} for {code} {quoted(shape)}"
        )
    return TensorInfo(name, code, shape, data_start + start, data_start + end)


def _shape(place: str, sizes: object) -> tuple[int, ...]:
    if not isinstance(sizes, list) or any(type(size) is not int or size < 0 for size in sizes):
        raise _FlawError(f"{place}: shape is {quoted(sizes)}, expected a list of integers >= 0")
    if len(sizes) > MAX_DIMENSIONS:
        raise _FlawError(
            f"{place}: shape has {len(sizes)} dimensions, expected at most {MAX_DIMENSIONS}"
        )
    # Sizes next to a 0 count too: torch multiplies them for its strides.
    if any(size > MAX_ELEMENTS for size in sizes) or math.prod(filter(None, sizes)) > MAX_ELEMENTS:
        raise _FlawError(f"{place}: shape {quoted(sizes)} is too large, expected at most 2**63 - 1")
    return tuple(sizes)


def _offsets(place: str, offsets: object) -> tuple[int, int]:
    match offsets:
        case [int() as start, int() as end] if (
            type(start) is type(end) is int and 0 <= start <= end <= MAX_ELEMENTS
        ):
            return start, end
    raise _FlawError(
        f"{place}: data_offsets is {quoted(offsets)}, expected [start, end] with 0 <= start <= end"
    )


def _misplaced(tensors: list[TensorInfo], data_start: int, file_size: int) -> Iterator[str]:
    """Overlaps and gaps between neighbours, and bytes before the first and after the last."""
    if tensors and tensors[0].start != data_start:
        yield (
            f"tensor {quoted(tensors[0].name)}: a gap of {tensors[0].start - data_start} bytes "
            "before it, expected it right after the header"
        )
    for before, info in pairwise(tensors):
        if info.start != before.end:
            word = "a gap" if info.start > before.end else "an overlap"
            yield (
                f"tensor {quoted(info.name)}: starts at data byte {info.start - data_start}, "
                f"expected {before.end - data_start} where {quoted(before.name)} ends ({word})"
            )
    end = tensors[-1].end if tensors else data_start
    if end != file_size:
        word = "cut short" if end > file_size else "bytes left over"
        yield f"the tensors end at byte {end}, but the file has {file_size} bytes ({word})"


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
