"""Ready-made model inputs in .safetensors -> samples.

Two forms: tensors named as the forward's arguments, whose first dimension is the samples; or
"NUMBER/ARGUMENT" for samples of different shapes, each tensor as the forward takes it for that one
sample, batch dimension included. Only the samples that are drawn are read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from esm_stream.calibration.encoding import Sample, without_padding
from esm_stream.errors import InputError


@dataclass(frozen=True, slots=True)
class Ready:
    """Samples of one file by number.

    `longest` is the most token ids that one of them has, `fullest` one with the most arguments;
    `media` has the arguments that are no ids and masks, once for all samples alike.
    """

    count: int
    longest: int
    fullest: int
    media: frozenset[frozenset[str]]
    read: Callable[[int], Sample]


def open_ready(path: Path) -> Ready:
    """Find out what a file holds, from its header.

    Raises:
        InputError: Not readable, or its tensors do not make samples.
    """
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(one.get_shape()) for name, one in slices.items()}
            floats = {name for name, one in slices.items() if "F" in one.get_dtype()}
    except (OSError, SafetensorError) as error:
        raise InputError([f"{path}: not a readable safetensors file: {error}"]) from error
    numbered = {name: name.partition("/") for name in shapes if name.partition("/")[0].isdigit()}
    if numbered and len(numbered) < len(shapes):
        other = next(name for name in shapes if name not in numbered)
        raise InputError(
            [
                f"{path}: tensor '{other}' has no number before a '/', others have; name all "
                "tensors NUMBER/ARGUMENT, or none"
            ]
        )
    return _one_by_one(path, shapes, floats) if numbered else _stacked(path, shapes, floats)


def _stacked(path: Path, shapes: dict[str, tuple[int, ...]], floats: set[str]) -> Ready:
    counts = {name: shape[0] if shape else 0 for name, shape in shapes.items()}
    if not counts or len(set(counts.values())) > 1:
        raise InputError(
            [
                f"{path}: the first dimension of every tensor must be the samples; found "
                f"{counts or 'no tensors'} (samples of different shapes: NUMBER/ARGUMENT)"
            ]
        )
    ids = shapes.get("input_ids", ())

    def read(i: int) -> Sample:
        with safe_open(path, "pt") as file:
            tensors: dict[str, Tensor] = {n: file.get_slice(n)[i : i + 1] for n in shapes}
        return Sample(without_padding(tensors, f"{path}, sample {i}"))

    longest = ids[1] if len(ids) > 1 else 0
    return Ready(next(iter(counts.values())), longest, 0, frozenset({frozenset(floats)}), read)


def _one_by_one(path: Path, shapes: dict[str, tuple[int, ...]], floats: set[str]) -> Ready:
    samples: dict[int, dict[str, str]] = {}
    longest = 0
    for name, shape in shapes.items():
        number, _, argument = name.partition("/")
        samples.setdefault(int(number), {})[argument] = name
        if argument.endswith("input_ids"):
            if len(shape) != 2 or shape[0] != 1:
                raise InputError(
                    [f"{path}: tensor '{name}' has shape {shape}; expected (1, tokens)"]
                )
            longest = max(longest, shape[1])
    order = sorted(samples)

    def read(i: int) -> Sample:
        names = samples[order[i]]
        with safe_open(path, "pt") as file:
            tensors: dict[str, Tensor] = {a: file.get_tensor(n) for a, n in names.items()}
        return Sample(without_padding(tensors, f"{path}, sample {order[i]}"))

    fullest = max(range(len(order)), key=lambda i: len(samples[order[i]]))
    media = {frozenset(a for a, n in names.items() if n in floats) for names in samples.values()}
    return Ready(len(order), longest, fullest, frozenset(media), read)
