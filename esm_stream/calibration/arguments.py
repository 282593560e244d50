"""Nested values of a forward (arguments and outputs of blocks, model inputs), and them as files.

From:  passes over a skeleton, one per micro-batch; outputs of blocks.
To:    stages/forward.py, in the same or another process.

All are safetensors files. The nesting is JSON in the file's metadata, in which tensors are
numbered; a tensor that many blocks are handed is stored once.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open
from torch import Tensor
from transformers import modeling_outputs
from transformers.utils.generic import ModelOutput

from esm_stream.store.files import save_tensors


class _Hidden(Enum):
    HIDDEN = "hidden"


HIDDEN: Final = _Hidden.HIDDEN
"""Stands for the hidden state among a block's arguments."""

Plain = bool | int | float | str


@dataclass(frozen=True, slots=True)
class Call:
    """What one block was handed: arguments with the hidden state replaced by HIDDEN."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def unsupported_value(value: Any) -> str | None:  # noqa: ANN401 - arguments are any type
    """The type of the first value that cannot be kept in a file, or None if all can."""
    if isinstance(value, ModelOutput):
        known = getattr(modeling_outputs, type(value).__name__, None) is type(value)
        return unsupported_value(tuple(value.values())) if known else type(value).__name__
    if type(value) in (tuple, list):
        return next((found for item in value if (found := unsupported_value(item))), None)
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return unsupported_value(tuple(value.values()))
    if value is None or value is HIDDEN or isinstance(value, Plain | Tensor):
        return None
    return type(value).__name__


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:  # noqa: ANN401
    """The same nesting with every tensor changed; values of other types stay what they are."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, ModelOutput):
        items: Mapping[str, Any] = dict(value.items())
        return type(value)(**{k: map_tensors(v, change) for k, v in items.items()})
    if type(value) in (tuple, list):
        return type(value)(map_tensors(item, change) for item in value)
    if type(value) is dict:
        return {k: map_tensors(v, change) for k, v in value.items()}
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:  # noqa: ANN401
    """All tensors of a nested value, from left to right."""
    found: list[Tensor] = []
    map_tensors(value, found.append)
    yield from found


def equal_values(left: Any, right: Any) -> bool:  # noqa: ANN401, PLR0911 - one case per kind
    """Whether two nested values have one structure and equal contents."""
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        if left is right:
            return True
        both = isinstance(left, Tensor) and isinstance(right, Tensor)
        if not both or left.dtype != right.dtype or left.shape != right.shape:
            return False
        # NaN equals NaN here: an uninitialised or masked value is no difference.
        return bool(((left == right) | ((left != left) & (right != right))).all())  # noqa: PLR0124
    if type(left) is not type(right):
        return False
    if isinstance(left, Mapping):
        same = list(left) == list(right)
        return same and all(equal_values(left[key], right[key]) for key in left)
    if isinstance(left, tuple | list):
        same = len(left) == len(right)
        return same and all(equal_values(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def save_values(path: Path, values: Sequence[Any]) -> None:
    """Write nested values, so that each can be read alone.

    Raises:
        ValueError: A value is of a type that `unsupported_value` names.
    """
    encoder = _Encoder()
    structure = json.dumps([encoder.encode(value) for value in values])
    save_tensors(path, encoder.tensors, {"values": structure})


class _Encoder:
    """Turns nested values into JSON, and collects their tensors under numbers."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._numbers: dict[int, str] = {}

    def encode(self, value: Any) -> Any:  # noqa: ANN401, PLR0911 - one case per kind
        """The JSON node of a value."""
        if value is HIDDEN:
            return {"hidden": True}
        if isinstance(value, Tensor):
            return self._encode_tensor(value)
        if isinstance(value, ModelOutput):
            return {"output": type(value).__name__, "dict": self._encode_items(value)}
        if isinstance(value, Call):
            return {"call": [self.encode(value.args), self.encode(value.kwargs)]}
        if isinstance(value, tuple | list):
            return {type(value).__name__: [self.encode(item) for item in value]}
        if isinstance(value, dict):
            return {"dict": self._encode_items(value)}
        if value is None or isinstance(value, Plain):
            return {"value": value}
        raise ValueError(f"a {type(value).__name__} cannot be kept in a file")

    def _encode_items(self, items: Mapping[str, Any]) -> dict[str, Any]:
        return {key: self.encode(value) for key, value in items.items()}

    def _encode_tensor(self, value: Tensor) -> dict[str, Any]:
        order = _order_in_memory(value)
        if id(value) not in self._numbers:
            number = self._numbers[id(value)] = str(len(self._numbers))
            self.tensors[number] = value.permute(order).contiguous()
        return {"tensor": self._numbers[id(value)], "order": order}


def _order_in_memory(value: Tensor) -> list[int]:
    """Axes from the slowest to the fastest: kernels, and so bits, differ by it."""
    strides = value.stride()
    return sorted(range(value.ndim), key=lambda axis: (-strides[axis], axis))


def load_values(path: Path) -> Iterator[Any]:
    """All values that `save_values` wrote, each read when it is asked for."""
    with safe_open(path, "pt") as file:
        for node in json.loads(file.metadata()["values"]):
            yield _decode(file, node)


def load_value(path: Path, number: int) -> Any:  # noqa: ANN401
    """One of the values that `save_values` wrote; only its tensors are read."""
    with safe_open(path, "pt") as file:
        return _decode(file, json.loads(file.metadata()["values"])[number])


def _decode(file: Any, node: dict[str, Any]) -> Any:  # noqa: ANN401 - one case per kind
    if "tensor" in node:
        # A copy lies where torch aligns it: the bits of small products depend on that.
        stored = file.get_tensor(node["tensor"]).clone()
        order = node["order"]
        return stored.permute([order.index(axis) for axis in range(len(order))])
    if "call" in node:
        args, kwargs = (_decode(file, part) for part in node["call"])
        return Call(args, kwargs)
    if "dict" in node:
        items = {key: _decode(file, value) for key, value in node["dict"].items()}
        return _output_type(node["output"])(**items) if "output" in node else items
    if "tuple" in node:
        return tuple(_decode(file, item) for item in node["tuple"])
    if "list" in node:
        return [_decode(file, item) for item in node["list"]]
    return HIDDEN if "hidden" in node else node["value"]


def _output_type(name: str) -> type[ModelOutput]:
    known = getattr(modeling_outputs, name)
    if not (isinstance(known, type) and issubclass(known, ModelOutput)):
        raise ValueError(f"{name} is no output of a model")
    return known


def save_batches(path: Path, batches: Sequence[dict[str, Tensor]]) -> None:
    """Write named tensors of all micro-batches: the model's inputs."""
    tensors = {
        f"{index:05d}/{name}": value
        for index, batch in enumerate(batches)
        for name, value in batch.items()
    }
    save_tensors(path, tensors)


def load_batches(path: Path) -> list[dict[str, Tensor]]:
    """Read what `save_batches` wrote, micro-batch by micro-batch."""
    batches: dict[str, dict[str, Tensor]] = {}
    with safe_open(path, "pt") as file:
        for key in sorted(file.keys()):
            number, _, name = key.partition("/")
            batches.setdefault(number, {})[name] = file.get_tensor(key)
    return [batches[number] for number in sorted(batches)]
