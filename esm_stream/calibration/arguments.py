"""What the skeleton hands to each block, and hidden states between blocks, as files.

From:  chain.py's recordings, one per micro-batch; outputs of blocks.
To:    stages/forward.py, in the same or another process.

Both are safetensors files. The nesting of the arguments is JSON in the file's metadata, in which
tensors are numbered; a tensor that many blocks are handed is stored once.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from esm_stream.store.files import write_atomically


class _Hidden(Enum):
    HIDDEN = "hidden"


HIDDEN: Final = _Hidden.HIDDEN
"""Stands for the hidden state among a block's arguments."""


@dataclass(frozen=True, slots=True)
class Call:
    """What one block was handed: arguments with the hidden state replaced by HIDDEN."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def unsupported_value(value: Any) -> str | None:  # noqa: ANN401 - arguments are any type
    """The type of the first value that cannot be kept in a file, or None if all can."""
    if isinstance(value, tuple):
        return next((found for item in value if (found := unsupported_value(item))), None)
    if value is None or value is HIDDEN or isinstance(value, bool | int | float | str | Tensor):
        return None
    return type(value).__name__


def save_calls(path: Path, batches: Sequence[Sequence[Call]]) -> None:
    """Write the calls of all blocks (inner) for all micro-batches (outer)."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[int, str] = {}

    def encode(value: Any) -> Any:  # noqa: ANN401
        if value is HIDDEN:
            return {"hidden": True}
        if isinstance(value, Tensor):
            if id(value) not in numbers:
                numbers[id(value)] = str(len(numbers))
                tensors[numbers[id(value)]] = value.contiguous().clone()
            return {"tensor": numbers[id(value)]}
        if isinstance(value, tuple):
            return {"tuple": [encode(item) for item in value]}
        return {"value": value}

    structure = [
        [
            {
                "args": [encode(v) for v in c.args],
                "kwargs": {k: encode(v) for k, v in c.kwargs.items()},
            }
            for c in calls
        ]
        for calls in batches
    ]
    write_atomically(path, save(tensors, {"calls": json.dumps(structure)}))


def load_calls(path: Path, block: int) -> list[Call]:
    """The calls of one block, one per micro-batch, in order."""
    with safe_open(path, "pt") as file:
        structure = json.loads(file.metadata()["calls"])

        def decode(node: dict[str, Any]) -> Any:  # noqa: ANN401
            if "tensor" in node:
                return file.get_tensor(node["tensor"])
            if "tuple" in node:
                return tuple(decode(item) for item in node["tuple"])
            return HIDDEN if "hidden" in node else node["value"]

        return [
            Call(
                tuple(decode(v) for v in calls[block]["args"]),
                {k: decode(v) for k, v in calls[block]["kwargs"].items()},
            )
            for calls in structure
        ]


def save_batches(path: Path, batches: Sequence[dict[str, Tensor]]) -> None:
    """Write named tensors of all micro-batches: model inputs, or {"hidden": state}."""
    tensors = {
        f"{index:05d}/{name}": value.contiguous()
        for index, batch in enumerate(batches)
        for name, value in batch.items()
    }
    write_atomically(path, save(tensors))


def load_batches(path: Path) -> list[dict[str, Tensor]]:
    """Read what `save_batches` wrote, micro-batch by micro-batch."""
    batches: dict[str, dict[str, Tensor]] = {}
    with safe_open(path, "pt") as file:
        for key in sorted(file.keys()):
            number, _, name = key.partition("/")
            batches.setdefault(number, {})[name] = file.get_tensor(key)
    return [batches[number] for number in sorted(batches)]
