"""One expert's model as a stage runs it: blocks loaded whole, everything else when it is used."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from esm_stream.calibration.arguments import load_batches, map_tensors, tensors_in
from esm_stream.calibration.lazy import load_when_used
from esm_stream.calibration.passes import own_copy
from esm_stream.calibration.skeleton import (
    Skeleton,
    build_skeleton,
    move_buffers,
    put_tensor,
)
from esm_stream.planning.plan import ForwardPlan
from esm_stream.stages.context import Context, blame, is_finite
from esm_stream.stages.transfer import Block
from esm_stream.store.work import in_merged


@dataclass(frozen=True, slots=True)
class Samples:
    """An expert's samples on their way through a model: that expert's own, or the merged one."""

    context: Context
    expert: str
    in_merged: bool = False

    @property
    def batches(self) -> list[dict[str, Tensor]]:
        """Model inputs, micro-batch by micro-batch."""
        return load_batches(self.whole(self.context.directory.inputs(self.expert)))

    @property
    def arguments(self) -> Path:
        """What the skeleton hands to every block."""
        return self.context.directory.arguments(self._way)

    def hidden(self, block: int) -> Path:
        """Hidden states before a block."""
        return self.context.directory.hidden(self._way, block)

    def whole(self, path: Path) -> Path:
        """One of the files, to be read: as the task that wrote it left it."""
        return self.context.whole(path)

    @property
    def _way(self) -> str:
        return in_merged(self.expert) if self.in_merged else self.expert


class Expert:
    """The model of the task's expert; everything outside the blocks runs on the CPU."""

    def __init__(self, context: Context) -> None:
        assert context.plan.forward is not None
        self.forward: ForwardPlan = context.plan.forward
        self._context = context
        self._dtype: torch.dtype = getattr(torch, self.forward.dtype)
        self._skeleton = _skeleton(context, self._dtype)
        self._converted: dict[str, Tensor] = {}

    @property
    def owner(self) -> str:
        """What messages call it."""
        return f'expert "{self._context.task.expert}"'

    @property
    def block_names(self) -> tuple[str, ...]:
        """Modules of all blocks, in order of the forward."""
        return tuple(step.block for step in self.forward.steps)

    def model(self) -> PreTrainedModel:
        """The whole model; parameters are read when they are used, embeddings row by row."""
        model = copy.deepcopy(self._skeleton.model)
        inside = tuple(f"{name}." for name in self.block_names)
        for name in self._skeleton.persistent_buffers():
            if not name.startswith(inside) and name in self._skeleton.stored:
                put_tensor(model, name, self._value(name))
        load_when_used(model, self._value)
        return model

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Model inputs in the forward's dtype."""
        return {k: v.to(self._dtype) if v.is_floating_point() else v for k, v in batch.items()}

    def weights(self, block: str) -> Block:
        """The block, to be brought to the device."""
        return Block(self._context.task.expert, block, self._skeleton.tensors_of(block))

    def block(self, name: str, model: PreTrainedModel | None = None) -> nn.Module:
        """A block with the expert's weights: in place on the CPU, where `bring` put them on a GPU.

        Args:
            name: Full name of the block.
            model: One that `model` made, for a block with the settings that a forward gave it.
        """
        device = self._context.device

        def read(tensor: str) -> Tensor:
            return self._tensor(tensor).to(device)

        values = self._skeleton.load(name, read)
        block = own_copy((model or self._skeleton.model).get_submodule(name))
        for local, value in values.items():
            put_tensor(block, local, value)
        move_buffers(block, device)
        return block

    def compute(
        self, name: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:  # noqa: ANN401 - whatever the block returns
        """A block's output, on the CPU.

        Raises:
            DataError: It holds NaN or Inf.
        """
        device = self._context.device

        def here(value: Tensor) -> Tensor:
            return value.to(device)

        with torch.no_grad():
            output = block(*map_tensors(args, here), **map_tensors(kwargs, here))
        output = map_tensors(output, Tensor.cpu)
        self.require_finite(
            output,
            f"block '{name}' of {self.owner} gives NaN or Inf on its calibration samples; "
            'try [calibration] dtype = "float32"',
        )
        return output

    def require_finite(self, value: Any, otherwise: str) -> None:  # noqa: ANN401 - nested tensors
        """Refuse hidden states with NaN or Inf.

        Raises:
            DataError: Naming the tensor of the expert that is to blame, else `otherwise`.
        """
        if not all_finite(value):
            stored = self._skeleton.stored
            outside = (stored[name] for name in self.forward.outside if name in stored)
            raise blame(self._context, [*self._context.task.reads, *outside], otherwise)

    def _value(self, parameter: str) -> Tensor:
        """A parameter outside the blocks, in place where it is stored as it is used."""
        if parameter in self._converted:
            return self._converted[parameter]
        skeleton = self._skeleton
        if parameter in skeleton.stored:
            value = self._lookup(skeleton.stored[parameter])
            if value.dtype == skeleton.dtypes[parameter]:
                return value
        found = skeleton.values([parameter], self._tensor)
        self._converted |= found
        return found[parameter]

    def _tensor(self, name: str) -> Tensor:
        """A tensor of the checkpoint."""
        return self._context.tensor(self._context.task.expert, name)

    def _lookup(self, name: str) -> Tensor:
        """A tensor outside the blocks, of which a few rows may be used."""
        return self._context.reader(self._context.task.expert).lookup(name)


def all_finite(value: Any) -> bool:  # noqa: ANN401 - nested tensors
    """Whether no tensor of a nested value has NaN or Inf."""
    return all(is_finite(tensor) for tensor in tensors_in(value) if tensor.is_floating_point())


def _skeleton(context: Context, dtype: torch.dtype) -> Skeleton:
    """The skeleton of the expert by its own configuration (the base's if it has none)."""
    checkpoint = context.reader(context.task.expert).checkpoint
    root = checkpoint.root if checkpoint.config else context.plan.base
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    return build_skeleton(root, shapes, dtype)
