"""LoRA adapters as experts: a model that differs from the base by thin factors.

From:  a directory as PEFT writes it (adapter_config.json, adapter_model.safetensors), and the base.
To:    the same questions answered as by the checkpoint of a whole model; and, for whoever can use
       them, the factors themselves.
Peak:  what is asked for: factors of one tensor, rows of an update, or a whole tensor.

Letters: M rows of a tensor as it is stored, N its columns, R rank of the adapter.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from esm_stream.checkpoints.checkpoint import (
    ADAPTER_NAMES,
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    open_checkpoint,
    read_object,
)
from esm_stream.checkpoints.header import Header, TensorInfo, read_header
from esm_stream.checkpoints.reader import TensorReader
from esm_stream.errors import InputError

# Elements that are made at a time, in float32, before they are rounded.
_MADE_ELEMENTS: Final = 1 << 20
_PREFIX: Final = "base_model.model."
# Endings of the factors' names, their places in B A, and whether the tensor is (B A)^T.
_FACTOR: Final = re.compile(r"(.*)\.lora_(embedding_)?([AB])(?:\.weight)?")
# Initial values that are taken out of the base's weights, which therefore are not the base's.
_CHANGE_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
_REFUSED: Final = {
    "use_dora": "DoRA's magnitudes",
    "lora_bias": "biases of the factors",
    "layer_replication": "replicated layers",
    "target_parameters": "factors of parameters that are not a layer's weight",
    "trainable_token_indices": "single trained tokens",
    "alora_invocation_tokens": "adapters that begin at a token",
    "megatron_config": "Megatron's layout",
    "use_qalora": "grouped inputs (QALoRA)",
    "arrow_config": "routing between adapters",
    "use_bdlora": "block-diagonal factors",
}


@dataclass(frozen=True, slots=True)
class LowRank:
    """The update of one stored tensor, left @ right, both float32."""

    left_MR: Tensor
    right_RN: Tensor

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop-1 of the update."""
        return self.left_MR[start:stop] @ self.right_RN

    def elements(self, start: int, stop: int) -> Tensor:
        """Elements start..stop-1 of the flattened update."""
        columns = self.right_RN.shape[1]
        first, last = start // columns, -(-stop // columns)
        return self.rows(first, last).view(-1)[start - first * columns : stop - first * columns]


@dataclass(frozen=True, slots=True)
class Pair:
    """Names of a tensor's factors in the adapter's file; B A is multiplied by `scale`.

    `turned`: the tensor is stored as (inputs, outputs), as embeddings are.
    """

    a: str
    b: str
    scale: float
    turned: bool


@dataclass(frozen=True, eq=False)
class AdaptedCheckpoint(Checkpoint):
    """The base with an adapter's updates; tensors that it does not touch are the base's own."""

    base: Checkpoint
    pairs: Mapping[str, Pair]
    replaced: Mapping[str, TensorInfo]
    settings: str

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The base's tensors, those that the adapter's file holds whole in their place."""
        return {**self.base.tensors, **self.replaced}

    def file_of(self, name: str) -> Header:
        """The adapter's file for what it holds whole, the base's for everything else."""
        return self.headers[0] if name in self.replaced else self.base.file_of(name)

    def files_of(self, name: str) -> tuple[Header, ...]:
        """The base's file, and the adapter's where it changes the tensor."""
        own = self.file_of(name)
        return (own, self.headers[0]) if name in self.pairs else (own,)

    def identity(self, name: str) -> str:
        """That of the base's tensor, and of the adapter if it changes the tensor."""
        own = self.headers[0]
        changed = f"{own.file_size}-{own.mtime_ns}-{own.sha256}-{self.settings}"
        if name in self.replaced:
            return f"{changed}-{name}"
        if name in self.pairs:
            return f"{changed}-{self.base.identity(name)}"
        return self.base.identity(name)

    def is_computed(self, name: str) -> bool:
        """Whether a tensor is not in any file, but made when it is asked for."""
        return name in self.pairs

    def rank(self, name: str) -> int | None:
        """Rank of the update of a tensor, None if it may be any."""
        if name in self.replaced:
            return None
        return self._own[self.pairs[name].a].shape[0] if name in self.pairs else 0

    def update_bytes(self, name: str) -> int:
        """Bytes to be read for what a tensor differs from the base's."""
        if name in self.replaced:
            return self.replaced[name].nbytes
        pair = self.pairs.get(name)
        return self._own[pair.a].nbytes + self._own[pair.b].nbytes if pair else 0

    @property
    def _own(self) -> Mapping[str, TensorInfo]:
        return self.headers[0].tensors


def is_adapter(root: Path) -> bool:
    """Whether a directory holds an adapter and no model."""
    whole = any((root / name).exists() for name in (SINGLE_NAME, INDEX_NAME))
    return not whole and (root / ADAPTER_NAMES[0]).exists()


def open_expert(root: Path, base: Checkpoint) -> Checkpoint:
    """A fine-tuned model, or an adapter of the base.

    Raises:
        InputError: Neither is there, or it is an adapter of a sort that is not read.
    """
    return open_adapter(root, base) if is_adapter(root) else open_checkpoint(root)


def open_reader(checkpoint: Checkpoint) -> TensorReader:
    """A reader of a checkpoint of either sort."""
    if isinstance(checkpoint, AdaptedCheckpoint):
        return AdaptedReader(checkpoint)
    return TensorReader(checkpoint)


def open_adapter(root: Path, base: Checkpoint) -> AdaptedCheckpoint:
    """Read an adapter's configuration and header and find the tensors that it changes.

    Raises:
        InputError: It cannot be read, is of a sort that is not supported, or does not fit the base.
    """
    path = root / ADAPTER_NAMES[1]
    if not path.exists():
        raise InputError(
            [f"{path}: missing. Save the adapter in safetensors (peft: save_pretrained)."]
        )
    config, header = read_object(root / ADAPTER_NAMES[0]), read_header(path)
    problems = [f"{root / ADAPTER_NAMES[0]}: {line}" for line in _unsupported(config)]
    if problems:
        raise InputError(problems)
    return _Opening(root, base, config, header).result()


def _unsupported(config: Mapping[str, Any]) -> Iterator[str]:
    """What of a configuration is no plain LoRA."""
    merge = "Merge it into its base (peft: merge_and_unload, then save_pretrained)."
    if config.get("peft_type") != "LORA":
        yield f"peft_type is {config.get('peft_type')!r}, expected 'LORA'. {merge}"
    for key, what in _REFUSED.items():
        if config.get(key):
            yield f"{key}: {what} are not supported. {merge}"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGE_BASE):
        yield (
            f"init_lora_weights is {start!r}, which changes the base's weights too. Save it as a "
            "plain LoRA (peft: path_initial_model_for_weight_conversion)."
        )


class _Opening:
    """One adapter's names, matched with the base's tensors."""

    def __init__(
        self, root: Path, base: Checkpoint, config: Mapping[str, Any], header: Header
    ) -> None:
        self.root, self.base, self.config, self.header = root, base, config, header
        self.problems: list[str] = []

    def result(self) -> AdaptedCheckpoint:
        factors: dict[str, dict[str, str]] = {}
        replaced: dict[str, TensorInfo] = {}
        for name, info in self.header.tensors.items():
            # What an adapted layer has besides its factors, PEFT calls its base layer's.
            path = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
            match = _FACTOR.fullmatch(path)
            if match:
                module, embedding, side = match[1], match[2] or "", match[3]
                factors.setdefault(f"{embedding}{module}", {"module": module})[side] = name
            elif ".lora_" in path or "token_adapter" in path:
                self._mistake(name, "is no factor of a plain LoRA")
            else:
                own = self._stored(path) or path
                replaced[own] = TensorInfo(own, info.dtype, info.shape, info.start, info.end)
        pairs = dict(self._pairs(factors))
        if not pairs and not replaced and not self.problems:
            self.problems.append(f"{self.header.path}: holds no factors")
        if self.problems:
            raise InputError(self.problems)
        settings = repr([(name, pairs[name]) for name in sorted(pairs)])
        return AdaptedCheckpoint(self.root, (self.header,), self.base, pairs, replaced, settings)

    def _pairs(self, factors: Mapping[str, dict[str, str]]) -> Iterator[tuple[str, Pair]]:
        for key, found in factors.items():
            module, embedding = found["module"], key.startswith("embedding_")
            if "A" not in found or "B" not in found:
                name = found.get("A") or found["B"]
                self._mistake(name, "has no counterpart, A without B or the other way round")
                continue
            stored = self._stored(f"{module}.weight")
            if stored is None:
                self._mistake(
                    found["A"], f"is for '{module}.weight', which the base model does not have"
                )
                continue
            turned = embedding or bool(self.config.get("fan_in_fan_out"))
            pair = Pair(found["A"], found["B"], self._scale(module, found["A"]), turned)
            if self._fits(stored, pair):
                yield stored, pair

    def _stored(self, path: str) -> str | None:
        """The base's tensor of a parameter; heads and bare models differ in the first component."""
        bare = path.partition(".")[2]
        if path in self.base.tensors:
            return path
        if bare in self.base.tensors:
            return bare
        longer = [name for name in self.base.tensors if name.partition(".")[2] == path]
        return longer[0] if len(longer) == 1 else None

    def _scale(self, module: str, name: str) -> float:
        """Alpha / r, or alpha / sqrt(r), with what the configuration says of the module."""
        rank = int(self._of("rank_pattern", module, self.config.get("r", 8)))
        alpha = float(self._of("alpha_pattern", module, self.config.get("lora_alpha", 8)))
        found = self.header.tensors[name].shape[0]
        if found != rank:
            self._mistake(name, f"has rank {found}, adapter_config.json says {rank}")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _of(self, key: str, module: str, otherwise: Any) -> Any:  # noqa: ANN401 - JSON values
        """The value of the first pattern of a module's name."""
        for pattern, value in (self.config.get(key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return otherwise

    def _fits(self, stored: str, pair: Pair) -> bool:
        """Whether B A has the shape of the tensor; convolutions have B of 1 x 1."""
        tensors, info = self.header.tensors, self.base.tensors[stored]
        a, b = tensors[pair.a], tensors[pair.b]
        points = math.prod(b.shape[2:]) == 1 and a.kind.is_float and b.kind.is_float
        sizes = info.num_rows, info.columns
        outputs, inputs = reversed(sizes) if pair.turned else sizes
        sides = b.shape[0], math.prod(a.shape[1:]), b.shape[1]
        if points and info.kind.is_float and sides == (outputs, inputs, a.shape[0]):
            return True
        self._mistake(
            pair.a,
            f"has shape {a.shape}, and B {b.shape}; the base's '{stored}' has {info.shape}",
        )
        return False

    def _mistake(self, name: str, what: str) -> None:
        self.problems.append(
            f"{self.header.path}: tensor '{name}' {what}. Check that the adapter belongs to this "
            "base, or merge it into its base (peft: merge_and_unload)."
        )


class AdaptedReader(TensorReader):
    """Reads a base with an adapter: changed tensors are made, rounded to the base's dtype."""

    checkpoint: AdaptedCheckpoint

    def __init__(self, checkpoint: AdaptedCheckpoint) -> None:
        super().__init__(checkpoint)
        self._adapter = TensorReader(Checkpoint(checkpoint.root, checkpoint.headers))
        self._kept: tuple[str, LowRank] | None = None

    def update_of(self, name: str) -> LowRank | None:
        """Factors of a tensor's update, float32; None if the adapter does not change it so.

        Asked for again and again, the factors of one tensor are read once.
        """
        pair = self.checkpoint.pairs.get(name)
        if pair is None:
            return None
        if self._kept is None or self._kept[0] != name:
            before = self._adapter.bytes_read
            a, b = self._adapter.tensor(pair.a).float(), self._adapter.tensor(pair.b).float()
            self.bytes_read += self._adapter.bytes_read - before
            a_RI, b_OR = a.flatten(1), b.flatten(1) * pair.scale
            self._kept = name, LowRank(a_RI.T, b_OR.T) if pair.turned else LowRank(b_OR, a_RI)
        return self._kept[1]

    def tensor(self, name: str) -> Tensor:
        """The whole tensor; one that the adapter changes is a copy in memory."""
        shape = self.checkpoint.tensors[name].shape
        return self.elements(name, 0, math.prod(shape)).view(shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop-1 along the first dimension."""
        info = self.checkpoint.tensors[name]
        found = self.elements(name, start * info.columns, stop * info.columns)
        return found.view(stop - start, *info.shape[1:])

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start..stop-1 of the flattened tensor."""
        stored_N, update = super().elements(name, start, stop), self.update_of(name)
        if update is None:
            return stored_N
        made_N = torch.empty_like(stored_N)
        for first in range(0, stop - start, _MADE_ELEMENTS):
            last = min(first + _MADE_ELEMENTS, stop - start)
            change_N = update.elements(start + first, start + last)
            made_N[first:last] = change_N.add_(stored_N[first:last])
        return made_N

    def raw_bytes(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Bytes start..stop-1 of the tensor as uint8."""
        if not self.checkpoint.is_computed(name):
            return super().raw_bytes(name, start, stop)
        info = self.checkpoint.tensors[name]
        size, end = info.kind.bits // 8, info.nbytes if stop is None else stop
        first, last = start // size, -(-end // size)
        made = self.elements(name, first, last).contiguous().view(torch.uint8)
        return made[start - first * size : end - first * size]

    def drop(self) -> None:
        """Let the pages read so far leave this process."""
        super().drop()
        self._adapter.drop()

    def close(self) -> None:
        """Drop pages, maps, open files and factors."""
        super().close()
        self._adapter.close()
        self._kept = None
