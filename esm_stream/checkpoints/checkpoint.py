"""A model on disk: which tensors it has, in which file, and whether experts fit their base.

From:  a directory as `save_pretrained` writes it or the hub cache links it; headers and index only.
To:    plan.py (names, sizes, identities), reader.py (the bytes), write/shards.py (the layout).
Peak:  the headers of all shards, a few hundred bytes per tensor.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from esm_stream.checkpoints.header import (
    MAX_HEADER_BYTES,
    Header,
    TensorInfo,
    parse_json,
    quoted,
    read_header,
    shortened,
)
from esm_stream.errors import InputError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_NAME_BYTES = 255  # of a file, on the file systems there are
ADAPTER_NAMES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One model in safetensors files; nothing of it is read but headers and config."""

    root: Path
    headers: tuple[Header, ...]  # in shard order

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors in stored order: shard by shard, by offset."""
        return {name: info for header in self.headers for name, info in header.tensors.items()}

    @cached_property
    def _files(self) -> Mapping[str, Header]:
        return {name: header for header in self.headers for name in header.tensors}

    def file_of(self, name: str) -> Header:
        """The header of the file that holds the tensor."""
        return self._files[name]

    def files_of(self, name: str) -> tuple[Header, ...]:
        """The headers of all files that the tensor is made from."""
        return (self.file_of(name),)

    def identity(self, name: str) -> str:
        """Text that changes when the tensor's file does; the same wherever the file is mounted."""
        header = self.file_of(name)
        return f"{header.file_size}-{header.mtime_ns}-{header.sha256}-{name}"

    def is_computed(self, name: str) -> bool:  # noqa: ARG002
        """Whether a tensor is not in any file, but made when it is asked for."""
        return False

    def rank(self, name: str) -> int | None:  # noqa: ARG002
        """Rank of what a tensor differs from the base's, None if it may be any."""
        return None

    def update_bytes(self, name: str) -> int:
        """Bytes to be read of this model for what a tensor differs from the base's."""
        return self.tensors[name].nbytes

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json of the model, empty where there is none."""
        path = self.root / "config.json"
        return read_object(path) if path.exists() else {}


def open_checkpoint(root: Path) -> Checkpoint:
    """Read the headers of a model's files and hold them against its index.

    Raises:
        InputError: No usable checkpoint there; every problem of every file, one per line.
    """
    if not root.is_dir():
        raise InputError(
            [f"{root}: no such directory. Give the directory of a model in safetensors files."]
        )
    # The order transformers looks in, so that both see the same model.
    if (root / SINGLE_NAME).exists():
        return Checkpoint(root, (read_header(root / SINGLE_NAME),))
    if (root / INDEX_NAME).exists():
        return Checkpoint(root, _read_shards(root))
    raise InputError([_explain_absence(root)])


def open_tensors(path: Path) -> Checkpoint:
    """Tensors by the names of a model: one file, or a directory as of a model.

    Raises:
        InputError: They cannot be read.
    """
    if path.suffix == ".safetensors" and path.is_file():
        return Checkpoint(path.parent, (read_header(path),))
    return open_checkpoint(path)


def _read_shards(root: Path) -> tuple[Header, ...]:
    weight_map = _read_weight_map(root / INDEX_NAME)
    headers: list[Header] = []
    problems: list[str] = []
    for file_name in sorted(set(weight_map.values())):
        if not (root / file_name).exists():
            problems.append(
                f"{root / file_name}: missing, {INDEX_NAME} names it. Download or copy this shard."
            )
            continue
        try:
            headers.append(read_header(root / file_name))
        except InputError as error:
            problems.extend(error.problems)
    # Tensors of unreadable shards would all count as missing: say it once, for the shard.
    unread = set(weight_map.values()) - {header.path.name for header in headers}
    problems.extend(_index_mistakes(root / INDEX_NAME, weight_map, headers, unread))
    if problems:
        raise InputError(problems)
    return tuple(headers)


def _read_weight_map(path: Path) -> dict[str, str]:
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            [
                f"{path}: weight_map is {quoted(weight_map)}, expected tensor names with their "
                "files. Download or save the index again."
            ]
        )
    refused = [
        f"{path}: tensor {quoted(name)} is said to be in {quoted(file_name)}, expected the plain "
        "name of a file in the same directory. Put all shards beside the index and name them so."
        for name, file_name in weight_map.items()
        if not _is_plain(file_name)
    ]
    if refused:
        raise InputError(shortened(refused, str(path)))
    return weight_map


def _is_plain(file_name: object) -> bool:
    return (
        isinstance(file_name, str)
        and file_name not in {"", ".", ".."}
        and not any(mark in file_name for mark in "/\\\0")
        and file_name.isprintable()
        and len(file_name.encode()) <= MAX_NAME_BYTES
    )


def _index_mistakes(
    index: Path, weight_map: Mapping[str, str], headers: list[Header], unread: set[str]
) -> Iterator[str]:
    """Each way in which the index and the headers disagree."""
    stored = {
        (name, header.path.name) for header in headers for name in header.tensors
    }  # a tensor may lie in two files
    absent = [
        f"{index.parent / file_name}: tensor {quoted(name)} is missing, {INDEX_NAME} says it is "
        "there. Download the shard and the index again, from one version of the model."
        for name, file_name in weight_map.items()
        if file_name not in unread and (name, file_name) not in stored
    ]
    surplus = [
        f"{index.parent / file_name}: tensor {quoted(name)} is here, but {INDEX_NAME} "
        + (f"says {weight_map[name]}" if name in weight_map else "does not name it")
        + ". Download the shard and the index again, from one version of the model."
        for name, file_name in sorted(stored)
        if weight_map.get(name) != file_name
    ]
    yield from shortened(absent, str(index))
    yield from shortened(surplus, str(index))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object."""
    try:
        size = path.stat().st_size
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"{size} bytes, expected at most {MAX_HEADER_BYTES}")
        content = parse_json(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"found {quoted(content)}, expected an object")
    except OSError as error:
        raise InputError(
            [f"{path}: cannot be read ({error.strerror}). Check that it is a readable file."]
        ) from error
    except ValueError as error:
        raise InputError(
            [f"{path}: not usable JSON ({error}). Download or save it again."]
        ) from error
    return content


def _explain_absence(root: Path) -> str:
    names = sorted(entry.name for entry in root.iterdir())
    if ADAPTER_NAMES[0] in names:
        return (
            f"{root}: holds an adapter, which can be an expert but not the base. Give the "
            "directory of the model that it was made for."
        )
    if ADAPTER_NAMES[1] in names:
        return (
            f"{root}: has {ADAPTER_NAMES[1]} without {ADAPTER_NAMES[0]}. Copy it from where the "
            "adapter was saved."
        )
    other = [name for name in names if name.endswith(".safetensors")]
    if other:
        return (
            f"{root}: has {quoted(other)}, but neither {SINGLE_NAME} nor {INDEX_NAME}. "
            f"Rename a single file to {SINGLE_NAME}, or add the index of the shards."
        )
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return (
            f"{root}: has its weights as pickle files (*.bin) only, which are not read. Load the "
            "model with transformers and save it again with save_pretrained."
        )
    return (
        f"{root}: no model here, expected {SINGLE_NAME} or {INDEX_NAME} with its shards. "
        "Give the directory that save_pretrained wrote."
    )


def compare(
    base: Checkpoint, experts: Mapping[str, Checkpoint], skip: Callable[[str], bool]
) -> list[str]:
    """Every way in which an expert does not fit the base, one line each.

    Args:
        base: The model the experts were fine-tuned from.
        experts: The fine-tuned models by name.
        skip: Whether a tensor is left out of the merge, so that it may differ or be absent.

    Returns:
        The problems, expert by expert; empty when all fit. Long lists of one sort are shortened.
    """
    names = [name for name in base.tensors if not skip(name)]
    problems: list[str] = []
    for label, expert in experts.items():
        extra = [name for name in expert.tensors if name not in base.tensors and not skip(name)]
        shared = [name for name in names if name in expert.tensors]
        for lines in (
            [_missing(base, expert, label, name) for name in names if name not in expert.tensors],
            [_extra(expert, label, name) for name in extra],
            [line for name in shared if (line := _other_shape(base, expert, label, name))],
            [line for name in shared if (line := _other_dtype(base, expert, label, name))],
        ):
            problems.extend(shortened(lines, f"{expert.root}: expert {quoted(label)}"))
    return problems


def _missing(base: Checkpoint, expert: Checkpoint, label: str, name: str) -> str:
    info = base.tensors[name]
    return (
        f"{expert.root}: expert {quoted(label)}: tensor {quoted(name)} is missing, the base model "
        f"has it with shape {quoted(info.shape)}, {info.dtype}. Give a complete model, or add "
        f"{quoted(name)} to [base] skip."
    )


def _extra(expert: Checkpoint, label: str, name: str) -> str:
    return (
        f"{expert.file_of(name).path}: expert {quoted(label)}: tensor {quoted(name)} has shape "
        f"{quoted(expert.tensors[name].shape)}, the base model has no such tensor. Check that the "
        f"expert was tuned from this base, or add {quoted(name)} to [base] skip."
    )


def _other_shape(base: Checkpoint, expert: Checkpoint, label: str, name: str) -> str | None:
    expected, found = base.tensors[name].shape, expert.tensors[name].shape
    if found == expected:
        return None
    return (
        f"{expert.file_of(name).path}: expert {quoted(label)}: tensor {quoted(name)} has shape "
        f"{quoted(found)}, the base model has {quoted(expected)}. If this expert extends the "
        f"vocabulary, add {quoted(name)} to [base] skip."
    )


def _other_dtype(base: Checkpoint, expert: Checkpoint, label: str, name: str) -> str | None:
    expected, found = base.tensors[name].kind, expert.tensors[name].kind
    if found == expected or (found.is_float and expected.is_float):
        return None
    return (
        f"{expert.file_of(name).path}: expert {quoted(label)}: tensor {quoted(name)} is "
        f"{found.code}, the base model has {expected.code}. Save the expert in the base model's "
        f"dtype, or add {quoted(name)} to [base] skip."
    )
