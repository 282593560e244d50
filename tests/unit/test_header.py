"""Headers: what a good one gives, and the answer to every way to break one."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from esm_stream.checkpoints.header import DTYPES, MAX_HEADER_BYTES, TensorInfo, read_header
from esm_stream.errors import InputError

GOOD: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "b": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [8, 20]},
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
}


def write_raw(path: Path, text: bytes, data_bytes: int = 20) -> Path:
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data_bytes))
    return path


def write_good(path: Path, **changes: object) -> Path:
    return write_raw(path, json.dumps({**GOOD, **changes}).encode())


def entry(**changes: object) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


def problems_of(path: Path) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        read_header(path)
    return caught.value.problems


def test_good_header_is_read_in_the_order_of_the_bytes(tmp_path: Path) -> None:
    path = write_good(tmp_path / "good.safetensors")
    header = read_header(path)
    start = len(json.dumps(GOOD)) + 8
    assert list(header.tensors.values()) == [
        TensorInfo("a", "F32", (2,), start, start + 8),
        TensorInfo("b", "BF16", (2, 3), start + 8, start + 20),
    ]
    assert header.metadata == {"format": "pt"}
    assert header.data_start == start
    assert header.file_size == start + 20 == path.stat().st_size
    assert header.mtime_ns == path.stat().st_mtime_ns


def test_tensor_info_counts_elements_rows_and_bytes() -> None:
    matrix = TensorInfo("m", "BF16", (2, 3), 100, 112)
    assert (matrix.nbytes, matrix.numel, matrix.ndim) == (12, 6, 2)
    assert (matrix.num_rows, matrix.row_nbytes) == (2, 6)
    scalar = TensorInfo("s", "F32", (), 0, 4)
    assert (scalar.numel, scalar.num_rows, scalar.row_nbytes) == (1, 1, 4)
    empty = TensorInfo("e", "F32", (0, 3), 0, 0)
    assert (empty.numel, empty.num_rows, empty.row_nbytes) == (0, 0, 0)


def test_only_the_four_float_types_are_floats() -> None:
    assert {d.code for d in DTYPES.values() if d.is_float} == {"F64", "F32", "BF16", "F16"}


def test_torch_names_are_torch_types_of_the_same_size() -> None:
    import torch

    for dtype in DTYPES.values():
        if dtype.torch_name is not None:
            assert getattr(torch, dtype.torch_name).itemsize * 8 == dtype.bits


def test_sha256_depends_on_the_header_and_not_on_the_data(tmp_path: Path) -> None:
    path = write_good(tmp_path / "good.safetensors")
    first = read_header(path).sha256
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert read_header(path).sha256 == first
    assert read_header(write_good(path, __metadata__={"format": "np"})).sha256 != first


def test_empty_model_and_zero_size_tensors_are_fine(tmp_path: Path) -> None:
    assert read_header(write_raw(tmp_path / "none.safetensors", b"{}", 0)).tensors == {}
    zero = entry(shape=[0, 7], data_offsets=[8, 8])
    tensors = read_header(write_good(tmp_path / "zero.safetensors", z=zero)).tensors
    assert tensors["z"].nbytes == 0
    assert list(tensors) == ["a", "z", "b"]


def test_types_smaller_than_a_byte_are_counted_in_bits(tmp_path: Path) -> None:
    four = entry(dtype="F4", shape=[40], data_offsets=[0, 20])
    text = json.dumps({"four": four}).encode()
    assert read_header(write_raw(tmp_path / "f4.safetensors", text)).tensors["four"].numel == 40
    text = json.dumps({"six": {**four, "dtype": "F6_E2M3", "shape": [27]}}).encode()
    (problem,) = problems_of(write_raw(tmp_path / "f6.safetensors", text))
    assert "hold 20 bytes, expected 20.25 for F6_E2M3 (27,)" in problem


BAD_ENTRIES: dict[str, tuple[object, str]] = {
    "unknown dtype": (entry(dtype="F128"), "dtype 'F128' is not known, expected one of BOOL, F4"),
    "dtype not text": (entry(dtype=["F32"]), "dtype ['F32'] is not known"),
    "negative size": (entry(shape=[-2]), "shape is [-2], expected a list of integers >= 0"),
    "size is a bool": (entry(shape=[True, 2]), "shape is [True, 2], expected a list of integers"),
    "size is a float": (entry(shape=[2.0]), "shape is [2.0], expected a list of integers"),
    "shape is a number": (entry(shape=2), "shape is 2, expected a list of integers"),
    "too many dimensions": (entry(shape=[1] * 65), "shape has 65 dimensions, expected at most 64"),
    "size too large": (entry(shape=[2**63]), "is too large, expected at most 2**63 - 1"),
    "product too large": (entry(shape=[2**32, 2**32, 0]), "is too large, expected at most"),
    "wrong bytes": (entry(shape=[3]), "data_offsets [0, 8] hold 8 bytes, expected 12 for F32 (3,)"),
    "one offset": (entry(data_offsets=[0]), "data_offsets is [0], expected [start, end]"),
    "offsets reversed": (entry(data_offsets=[8, 0]), "data_offsets is [8, 0], expected"),
    "offset negative": (entry(data_offsets=[-8, 0]), "data_offsets is [-8, 0], expected"),
    "offset is a bool": (entry(data_offsets=[False, 8]), "data_offsets is [False, 8], expected"),
    "offsets are text": (entry(data_offsets="08"), "data_offsets is '08', expected"),
    "key missing": ({"dtype": "F32", "shape": [2]}, "found ['dtype', 'shape'], expected an object"),
    "key unknown": (entry(device="cuda"), "expected an object with exactly dtype, shape and data"),
    "not an object": (7, "found 7, expected an object with exactly dtype, shape"),
}


@pytest.mark.parametrize("flaw", BAD_ENTRIES)
def test_bad_entry_is_answered_with_file_tensor_and_expectation(tmp_path: Path, flaw: str) -> None:
    bad, message = BAD_ENTRIES[flaw]
    path = write_good(tmp_path / "bad.safetensors", a=bad)
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}: tensor 'a': ")
    assert message in problem
    assert problem.endswith("The file is damaged: download or save it again.")


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short for safetensors: 0 bytes, expected at least 8"),
    "seven bytes": (b"1234567", "too short for safetensors: 7 bytes"),
    "header beyond the file": (
        (100).to_bytes(8, "little") + b"{}",
        "header ends at byte 108, but the file has 10 bytes",
    ),
    "pickle": (b"PK\x03\x04" + bytes(range(4, 60)), "this may not be a safetensors file"),
    "largest length": (b"\xff" * 8 + b"{}", f"expected at most {MAX_HEADER_BYTES}"),
}


@pytest.mark.parametrize("flaw", BAD_FILES)
def test_bad_file_is_refused(tmp_path: Path, flaw: str) -> None:
    content, message = BAD_FILES[flaw]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}: ")
    assert message in problem


A = b'"a":{"dtype":"F32","shape":[5],"data_offsets":[0,20]}'
BAD_TEXTS: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "header starts with b'', expected b'{'"),
    "a list": (b"[]", "header starts with b'[', expected b'{'"),
    "space before": (b" {" + A + b"}", "header starts with b' ', expected b'{'"),
    "not UTF-8": (b'{"\xff":1}', "header is not valid JSON ('utf-8' codec can't decode"),
    "not JSON": (b'{"a"', "header is not valid JSON (Expecting ':'"),
    "two objects": (b"{" + A + b"}{}", "header is not valid JSON (Extra data"),
    "NaN": (b'{"a":NaN}', "header is not valid JSON (NaN is not JSON)"),
    "nested": (b'{"a":' + b"[" * 100_000, "header is not valid JSON (nested too deep)"),
    "huge number": (b'{"a":' + b"9" * 5000 + b"}", "header is not valid JSON (Exceeds the limit"),
    "tensor twice": (b"{" + A + b"," + A + b"}", "key 'a' occurs twice in one object"),
    "key twice": (
        b'{"a":{"dtype":"F32","shape":[5],"shape":[5],"data_offsets":[0,20]}}',
        "key 'shape' occurs twice in one object",
    ),
    "metadata key twice": (b'{"__metadata__":{"k":"1","k":"1"}}', "key 'k' occurs twice"),
    "metadata a list": (b'{"__metadata__":[],' + A + b"}", "__metadata__ is [], expected an obj"),
    "metadata a number": (
        b'{"__metadata__":{"k":1},' + A + b"}",
        "__metadata__ 'k' is 1, expected a string",
    ),
    "metadata surrogate": (
        b'{"__metadata__":{"k":"\\ud800"},' + A + b"}",
        "__metadata__ 'k' is not Unicode",
    ),
    "empty name": (
        b"{" + A.replace(b'"a"', b'""') + b"}",
        "tensor '': name expected to be Unicode",
    ),
    "NUL in name": (b"{" + A.replace(b'"a"', b'"a\\u0000"') + b"}", "tensor 'a\\x00': name expec"),
    "surrogate": (b"{" + A.replace(b'"a"', b'"\\udc00"') + b"}", "name expected to be Unicode"),
}


@pytest.mark.parametrize("flaw", BAD_TEXTS)
def test_bad_header_text_is_refused(tmp_path: Path, flaw: str) -> None:
    text, message = BAD_TEXTS[flaw]
    path = write_raw(tmp_path / "bad.safetensors", text)
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}: ")
    assert message in problem
    assert "\n" not in problem


MISPLACED: dict[str, tuple[list[tuple[int, int]], int, str]] = {
    "overlap": ([(0, 8), (4, 12)], 12, "tensor 'b': starts at data byte 4, expected 8 where 'a'"),
    "same bytes": ([(0, 8), (0, 8)], 8, "starts at data byte 0, expected 8 where 'a' ends (an ove"),
    "gap": (
        [(0, 8), (12, 20)],
        20,
        "tensor 'b': starts at data byte 12, expected 8 where 'a' ends",
    ),
    "gap at the start": ([(4, 12), (12, 20)], 20, "tensor 'a': a gap of 4 bytes before it"),
    "left over": ([(0, 8), (8, 16)], 17, "17 bytes (bytes left over)"),
    "cut short": ([(0, 8), (8, 16)], 15, "15 bytes (cut short)"),
}


@pytest.mark.parametrize("flaw", MISPLACED)
def test_offsets_cover_the_file_exactly(tmp_path: Path, flaw: str) -> None:
    places, data_bytes, message = MISPLACED[flaw]
    entries = {name: entry(data_offsets=place) for name, place in zip("ab", places, strict=True)}
    # The header's length is added to the byte counts in the messages about the file's end.
    text = json.dumps(entries).encode()
    path = write_raw(tmp_path / "bad.safetensors", text, data_bytes)
    message = message.replace(f"{data_bytes} bytes (", f"{8 + len(text) + data_bytes} bytes (")
    assert any(message in problem for problem in problems_of(path))


def test_file_without_tensors_has_no_data(tmp_path: Path) -> None:
    (problem,) = problems_of(write_raw(tmp_path / "bad.safetensors", b"{}", 1))
    assert "the tensors end at byte 10, but the file has 11 bytes (bytes left over)" in problem


def test_all_flaws_are_reported_together(tmp_path: Path) -> None:
    changes = {"a": entry(dtype="F128"), "b": entry(shape=[-1]), "__metadata__": 3}
    problems = problems_of(write_good(tmp_path / "bad.safetensors", **changes))
    assert len(problems) == 3


def test_thousands_of_flaws_and_long_names_give_a_short_message(tmp_path: Path) -> None:
    text = json.dumps({f"{number}" * 1000: 0 for number in range(1000)}).encode()
    problems = problems_of(write_raw(tmp_path / "bad.safetensors", text))
    assert len(problems) == 21
    assert "there may be more flaws" in problems[-1]
    assert max(map(len, problems)) < 500


def test_missing_file_and_directory_are_refused_by_name(tmp_path: Path) -> None:
    assert problems_of(tmp_path / "no.safetensors") == (
        f"{tmp_path / 'no.safetensors'}: cannot be read (No such file or directory). "
        "Check that it exists and is readable.",
    )
    assert "not a regular file" in problems_of(tmp_path)[0]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in problems_of(tmp_path / "pipe")[0]


def test_header_module_does_not_import_torch() -> None:
    import subprocess
    import sys

    program = "import sys, esm_stream.checkpoints.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
