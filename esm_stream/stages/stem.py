"""Stage 2: model inputs of one expert -> hidden states before block 0, and every block's arguments.

The expert's skeleton (embeddings, rotary tables) runs on the CPU from the mapped file: an embedding
touches only the rows it looks up. Blocks are stubs; the head is never reached.
"""

import copy

import torch
from torch import Tensor

from esm_stream.calibration.arguments import load_batches, save_batches, save_calls
from esm_stream.calibration.chain import record_calls
from esm_stream.calibration.skeleton import BlockList, Skeleton, build_skeleton, put_tensor
from esm_stream.planning.plan import ChainPlan
from esm_stream.stages.context import Context, TaskResult, blame, is_finite
from esm_stream.stopping import check


def run(context: Context) -> TaskResult:
    """Run the skeleton on all micro-batches of one expert."""
    expert, chain = context.task.expert, context.plan.chain
    assert chain is not None
    dtype: torch.dtype = getattr(torch, chain.dtype)
    skeleton = expert_skeleton(context, expert)
    model = copy.deepcopy(skeleton.model)
    reader = context.reader(expert)
    used = skeleton.tensors_for(chain.stem)
    unread = {skeleton.stored[n]: skeleton.dtypes[n] for n in chain.stem if n in skeleton.stored}

    def read(tensor: str) -> Tensor:
        value = reader.lookup(tensor)
        return value if unread.get(tensor) == value.dtype else reader.tensor(tensor)

    for name, value in skeleton.values(chain.stem, read).items():
        put_tensor(model, name, value)
    blocks = _blocks(Skeleton(model), chain)
    states, calls = [], []
    for batch in load_batches(context.directory.inputs(expert)):
        check()
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        recording = record_calls(model, blocks, inputs, chain.wrap)
        if not is_finite(recording.hidden):
            raise blame(
                context,
                used,
                f'what precedes block 0 of expert "{expert}" gives NaN or Inf on its calibration '
                "samples; check the samples",
            )
        states.append({"hidden": recording.hidden})
        calls.append(recording.calls)
    arguments, hidden = context.directory.arguments(expert), context.directory.hidden(expert, 0)
    arguments.parent.mkdir(parents=True, exist_ok=True)
    save_calls(arguments, calls)
    save_batches(hidden, states)
    record = context.directory.record
    tokens = sum(state["hidden"].shape[:-1].numel() for state in states)
    return TaskResult([record(arguments), record(hidden, transient=True)], {"tokens": tokens})


def expert_skeleton(context: Context, expert: str) -> Skeleton:
    """The skeleton of one expert by its own configuration (the base's if it has none)."""
    assert context.plan.chain is not None
    checkpoint = context.reader(expert).checkpoint
    root = checkpoint.root if checkpoint.config else context.plan.base
    dtype: torch.dtype = getattr(torch, context.plan.chain.dtype)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    return build_skeleton(root, shapes, dtype)


def _blocks(skeleton: Skeleton, chain: ChainPlan) -> BlockList:
    return next(blocks for blocks in skeleton.lists() if blocks.prefix == chain.prefix)
