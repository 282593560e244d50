"""Weights on their way to a GPU: the next block is copied while one computes.

From:  mapped checkpoints, through pinned staging buffers that are made once.
To:    the context of a task, as views on the device: a block's weights, updates of its matrices.
Peak:  on the device two blocks, of expert and base; on the host 2 STAGING_BYTES.

A processor reads weights in place, from the mapped files, and has no use for this.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from esm_stream.budget import STAGING_BYTES
from esm_stream.checkpoints.adapter import open_reader
from esm_stream.checkpoints.header import TensorInfo
from esm_stream.planning.plan import Plan
from esm_stream.stages.context import BASE, Context, stored_at

# Where the allocator of CUDA would put a tensor of its own.
ALIGNMENT: Final = 512

Wanted = Mapping[tuple[str, Path], tuple[str, ...]]
"""Names of tensors, by model and directory of its checkpoint."""
Loaded = dict[tuple[str, str], Tensor]
"""Tensors on the device, by model and name."""


def in_place(device: torch.device) -> bool:
    """Whether a device computes with mapped files as they are."""
    return device.type == "cpu"


@dataclass(frozen=True, slots=True)
class Block:
    """A block of an expert, and the tensors of the checkpoint that it is made of."""

    expert: str
    name: str
    tensors: tuple[str, ...]


def bring(context: Context, block: Block, following: Block | None) -> None:
    """Have a block's weights on the device, and those of the following one on their way.

    Raises:
        InputError: A file changed, or cannot be read.
    """
    if in_place(context.device):
        return
    if context.device not in _BUFFERS:
        _BUFFERS[context.device] = BlockBuffers(context.device)
    buffers = _BUFFERS[context.device]
    context.hold(buffers.take(_wanted(context.plan, block)))
    if following is not None:
        buffers.begin(_wanted(context.plan, following))


def _wanted(plan: Plan, block: Block) -> Wanted:
    """A block's tensors, and the base's of the matrices observed in it."""
    observed = (m for m in plan.matrices.values() if m.observed and m.observed_in == block.name)
    parts = dict.fromkeys(part.tensor for m in observed for part in m.parts)
    own = dict.fromkeys(block.tensors) | parts
    return {
        (block.expert, plan.experts[block.expert]): tuple(own),
        (BASE, plan.base): tuple(parts),
    }


def release() -> None:
    """Give the device's memory back: no block follows."""
    while _BUFFERS:
        _BUFFERS.popitem()[1].close()


class BlockBuffers:
    """Two places on a device, each for the tensors of a block: one in use, one being filled."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._used, self._free = _bytes_on(device, 0), _bytes_on(device, 0)
        on_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_cuda else None
        self._staging = [
            (
                torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=on_cuda),
                torch.cuda.Event() if on_cuda else None,
            )
            for _ in range(2)
        ]
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="block copy")
        self._pending: tuple[Wanted, Future[Loaded]] | None = None

    def begin(self, wanted: Wanted) -> None:
        """Start to fill the place that is not in use, in a thread of its own."""
        self._settle()
        size = _size(wanted)
        if self._free.numel() < size:
            self._free = _bytes_on(self._device, 0)  # before a larger one is made
            self._free = _bytes_on(self._device, size)
        filled = self._copier.submit(self._fill, wanted, self._free, self._beside())
        self._pending = wanted, filled

    def take(self, wanted: Wanted) -> Loaded:
        """Tensors on the device; the place of those taken before is filled from the next `begin`.

        Waits for the copy if `begin` has started one of the same tensors, and makes it otherwise.

        Raises:
            InputError: A file changed, or cannot be read.
        """
        if self._pending is None or self._pending[0] != wanted:
            self.begin(wanted)
        assert self._pending is not None
        (_, filled), self._pending = self._pending, None
        loaded = filled.result()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._used, self._free = self._free, self._used
        return loaded

    def close(self) -> None:
        """Wait for a copy that nobody takes."""
        self._settle()
        self._copier.shutdown()

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending[1].exception()

    def _beside(self) -> AbstractContextManager[object]:
        """While active, copies run beside the computation, after what has been asked for so far."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)

    def _fill(
        self, wanted: Wanted, place: Tensor, beside: AbstractContextManager[object]
    ) -> Loaded:
        loaded: Loaded = {}
        start = 0
        with beside:
            for (model, root), names in wanted.items():
                with open_reader(stored_at(root, _base_of(wanted))) as reader:
                    for name in names:
                        source = reader.raw_bytes(name)
                        target = place[start : start + len(source)]
                        self._copy(source, target)
                        loaded[model, name] = _typed(target, reader.checkpoint.tensors[name])
                        start += _aligned(len(source))
        return loaded

    def _copy(self, source: Tensor, target: Tensor) -> None:
        """Copy bytes of a mapped file to the device through both staging buffers in turn."""
        for start in range(0, len(source), STAGING_BYTES):
            piece = source[start : start + STAGING_BYTES]
            self._staging.reverse()
            staging, copied = self._staging[0]
            if copied is not None:
                copied.synchronize()
            staging[: len(piece)].copy_(piece)
            target[start : start + len(piece)].copy_(staging[: len(piece)], non_blocking=True)
            if copied is not None:
                copied.record()


_BUFFERS: dict[torch.device, BlockBuffers] = {}


def _bytes_on(device: torch.device, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _size(wanted: Wanted) -> int:
    """Bytes of a place for all of them."""
    return sum(
        _aligned(stored_at(root, _base_of(wanted)).tensors[name].nbytes)
        for (_, root), names in wanted.items()
        for name in names
    )


def _base_of(wanted: Wanted) -> Path:
    """Directory of the base, which is always among what is wanted."""
    return next(root for model, root in wanted if model == BASE)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _typed(source: Tensor, info: TensorInfo) -> Tensor:
    dtype: torch.dtype = getattr(torch, str(info.kind.torch_name))
    return source.view(dtype).view(info.shape)
