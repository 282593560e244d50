"""Everything that reads a file of a stranger or of an earlier run, for fuzzing.

A target has valid documents to begin with, and a function that is fed bytes in their place. It may
refuse them with the errors that people see; anything else that is raised is a mistake.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy

from esm_stream.checkpoints.checkpoint import INDEX_NAME, open_checkpoint
from esm_stream.checkpoints.header import read_header
from esm_stream.errors import DataError, EsmStreamError
from esm_stream.manifest import load_manifest
from esm_stream.planning.plan import load_plan
from esm_stream.store.files import sealed
from esm_stream.store.sums import Partial
from esm_stream.store.work import WorkDirectory
from esm_stream.verify import verify

MANIFEST = """[base]
model = "base"
skip = ["lm_head*", "re:.*norm.*"]
[[experts]]
name = "math"
model = "experts/math"
[[experts]]
name = "code"
model = "experts/code"
calibration = "code.jsonl"
[calibration]
samples = 32
[merge]
method = "esm"
alpha = [0.5, 1.0]
weights = { math = 1.0, code = [0.1, 2] }
fuse = [["*q_proj*", "*k_proj*"]]
[merge.options]
levels = ["task"]
[[merge.split]]
tensors = "*qkv*"
parts = [4, 1, 1]
[[merge.rules]]
tensors = "*embed*"
method = "base"
[output]
path = "merged"
shard_size = "2GiB"
[run]
memory = "8GiB"
"""
MARKER = {
    "schema": 1,
    "key": "finish",
    "fingerprint": "f",
    "outputs": [{"root": "work", "path": "a/b", "size": 3, "xxh3_128": "00", "transient": False}],
    "results": {"norm": 1.5},
    "seconds": 0.1,
}
COMPLETE = {
    "esm_stream": "0",
    "shards": {"model.safetensors": {"size": 9, "header_sha256": "0", "xxh3_128": {"a": "0"}}},
    "files": {"config.json": {"size": 2, "xxh3_128": "0"}},
}
INDEX = {"metadata": {"total_size": 24}, "weight_map": {"a": "model-1.safetensors"}}


@dataclass(frozen=True)
class Target:
    """A parser: documents that it takes, and how to feed it others."""

    documents: tuple[bytes, ...]
    feed: Callable[[Path, bytes], object]
    refuses_with: tuple[type[Exception], ...] = (EsmStreamError,)


def _header(folder: Path, data: bytes) -> object:
    path = folder / "x.safetensors"
    path.write_bytes(data)
    return read_header(path)


def _index(folder: Path, data: bytes) -> object:
    shard = folder / "model-1.safetensors"
    if not shard.exists():
        shard.write_bytes(TENSORS)
    (folder / INDEX_NAME).write_bytes(data)
    return open_checkpoint(folder)


def _config(folder: Path, data: bytes) -> object:
    (folder / "model.safetensors").write_bytes(TENSORS)
    (folder / "config.json").write_bytes(data)
    return open_checkpoint(folder).config


def _manifest(folder: Path, data: bytes) -> object:
    path = folder / "manifest.toml"
    path.write_bytes(data)
    return load_manifest(path)


def _marker(folder: Path, data: bytes) -> object:
    directory = WorkDirectory(folder, folder)
    path = directory.marker("finish")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return directory.read("finish")


def _resealed_marker(folder: Path, data: bytes) -> object:
    return _marker(folder, sealed(b"{" + data))


def _plan(folder: Path, data: bytes) -> object:
    path = folder / "plan.json"
    path.write_bytes(sealed(b"{" + data))
    return load_plan(path)


def _complete(folder: Path, data: bytes) -> object:
    (folder / "complete.json").write_bytes(sealed(b"{" + data))
    return verify(folder)


def _sums(folder: Path, data: bytes) -> object:
    path = folder / "0.sums"
    path.write_bytes(data)
    partial = Partial(path)
    return [partial.integers(place) for place in partial.places]


def _json(document: object) -> bytes:
    return json.dumps(document).encode()


TENSORS = safetensors.numpy.save({"a": np.ones((3, 2), np.float32)}, {"format": "pt"})
TARGETS = {
    "header": Target((TENSORS,), _header),
    "index": Target((_json(INDEX),), _index),
    "config": Target((_json({"model_type": "llama", "hidden_size": 8}),), _config),
    "manifest": Target((MANIFEST.encode(),), _manifest),
    "marker": Target((sealed(_json(MARKER)),), _marker),
    "marker with its hash": Target((_json(MARKER)[1:],), _resealed_marker),
    "plan with its hash": Target((_json({"version": "0", "tasks": {}})[1:],), _plan, (ValueError,)),
    "complete.json with its hash": Target((_json(COMPLETE)[1:],), _complete),
    "sums": Target((b"\0" * 32 + b"{}" + b"\2" + b"\0" * 15 + b"ESMSUM01",), _sums, (DataError,)),
}

_WORDS = (
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\0", b"\xff", b"null", b"true", b"NaN"),
    *(b"-1", b"1e999", b"0.5", b"9" * 400, b"9" * 5000, b"[" * 2000, b'{"a":' * 2000, b"..", b"/"),
    *(b"../../etc/passwd", b"\xed\xa0\x80", b"\\ud800", b"re:(", b"re:(a+)+$", b"=", b"\n", b"[["),
    *(b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b"9223372036854775807"),
)


def mutated(document: bytes, generator: random.Random) -> bytes:
    """A document with a few changes: bits, bytes, pieces moved or repeated, words put in."""
    data = bytearray(document)
    for _ in range(generator.randint(1, 4)):
        place = generator.randrange(len(data) + 1)
        end = min(len(data), place + generator.choice((1, 1, 2, 8, 40)))
        match generator.randrange(6):
            case 0 if place < len(data):
                data[place] ^= 1 << generator.randrange(8)
            case 1:
                del data[place:end]
            case 2:
                data[place:end] = generator.choice(_WORDS)
            case 3:
                data[place:place] = generator.choice(_WORDS)
            case 4:
                data[place:place] = data[place:end] * generator.randint(1, 5)
            case _:
                data[place:end] = generator.randbytes(end - place)
    return bytes(data)


def feed(name: str, folder: Path, data: bytes) -> bool:
    """Feed a target; whether it took it. Anything but its own errors goes through."""
    target = TARGETS[name]
    try:
        target.feed(folder, data)
    except target.refuses_with:
        return False
    return True
