"""Laws of the header parser: it reads what safetensors writes and survives everything else."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from esm_stream.checkpoints.header import DTYPES, Header, read_header
from esm_stream.errors import InputError

NUMPY_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "uint8": "U8"}
TORCH_CODES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
}
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


def read_bytes(content: bytes) -> Header | None:
    """The header, or None when it is refused; anything else that is raised fails the test."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "x.safetensors")
        path.write_bytes(content)
        try:
            return read_header(path)
        except InputError as error:
            problems = error.problems
    assert problems
    assert all(str(path) in problem for problem in problems)
    return None


def covers_the_file(header: Header) -> bool:
    position = header.data_start
    for info in header.tensors.values():
        if info.start != position or info.nbytes * 8 != info.numel * info.kind.bits:
            return False
        position = info.end
    return position == header.file_size


def valid_file() -> bytes:
    tensors = {
        "a": torch.ones(3, 2),
        "b.c": torch.ones(5, dtype=torch.bfloat16),
        "d": torch.ones(()),
    }
    return safetensors.torch.save(tensors, {"format": "pt"})


def with_header(text: bytes, data: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=300))
def test_random_bytes_are_refused_as_input(content: bytes) -> None:
    header = read_bytes(content)
    assert header is None or covers_the_file(header)


@settings(max_examples=200, deadline=None)
@given(text=st.binary(max_size=200), data=st.binary(max_size=8))
def test_random_header_text_is_refused_as_input(text: bytes, data: bytes) -> None:
    header = read_bytes(with_header(b"{" + text, data))
    assert header is None or covers_the_file(header)


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.none() | st.integers(0, 400),
)
def test_damaged_files_are_refused_or_still_consistent(
    edits: list[tuple[int, int]], cut: int | None
) -> None:
    content = bytearray(valid_file())
    for place, value in edits:
        content[place % len(content)] = value
    header = read_bytes(bytes(content[:cut]))
    assert header is None or covers_the_file(header)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(sorted(DTYPES)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F4"]) | JSON,
        "shape": st.lists(st.integers(-1, 3), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 20), max_size=3) | JSON,
    },
    optional={"extra": JSON},
)


@settings(max_examples=300, deadline=None)
@given(
    entries=st.dictionaries(st.text() | st.just("__metadata__"), ENTRIES | JSON, max_size=3),
    data=st.binary(max_size=20),
)
def test_well_formed_json_of_any_shape_is_refused_or_consistent(
    entries: dict[str, Any], data: bytes
) -> None:
    header = read_bytes(with_header(json.dumps(entries).encode(), data))
    assert header is None or covers_the_file(header)


@settings(max_examples=100, deadline=None)
@given(
    tensors=st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(NUMPY_CODES)), SHAPES)),
    metadata=st.none() | st.dictionaries(NAMES, st.text(st.characters(exclude_categories=["Cs"]))),
)
def test_everything_numpy_saves_is_read_back(
    tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None
) -> None:
    tensors.pop("__metadata__", None)
    # safetensors 0.8 writes no valid JSON for a file with neither tensors nor metadata entries.
    assume(tensors or metadata != {})
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in tensors.items()}
    header = read_bytes(safetensors.numpy.save(arrays, metadata))
    assert header is not None
    assert covers_the_file(header)
    assert header.metadata == (metadata or {})
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == {
        name: (NUMPY_CODES[dtype], shape) for name, (dtype, shape) in tensors.items()
    }


@settings(max_examples=100, deadline=None)
@given(tensors=st.dictionaries(NAMES, st.tuples(st.sampled_from(list(TORCH_CODES)), SHAPES)))
def test_everything_torch_saves_is_read_back(
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]],
) -> None:
    tensors.pop("__metadata__", None)
    values = {name: torch.zeros(shape).to(dtype) for name, (dtype, shape) in tensors.items()}
    header = read_bytes(safetensors.torch.save(values, {"format": "pt"}))
    assert header is not None
    assert covers_the_file(header)
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == {
        name: (TORCH_CODES[dtype], shape) for name, (dtype, shape) in tensors.items()
    }
