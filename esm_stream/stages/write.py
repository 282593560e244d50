"""Stage 6 (pass 2): base + alpha * scale * update -> its place in a reserved shard; sealing.

From:  base (and experts, for elementwise methods), merged updates in the store, scales.
To:    `<shard>.partial` in the output directory, in panels of rows; sealed, `<shard>`.
Peak:  a few panels of PANEL_BYTES, whatever the number of experts and the size of the tensor.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from esm_stream.budget import PANEL_BYTES
from esm_stream.methods import elementwise_method
from esm_stream.planning.plan import Plan, TensorPlan
from esm_stream.stages.context import (
    BASE,
    Context,
    TaskResult,
    checkpoint_at,
    require_finite,
)
from esm_stream.stages.scale import scale_of
from esm_stream.stopping import check
from esm_stream.store.work import Output
from esm_stream.write.shards import PARTIAL_SUFFIX, ShardLayout, ShardWriter, plan_shards, seal


def layouts_of(plan: Plan) -> dict[str, ShardLayout]:
    """Output shards by file name."""
    shards = plan_shards(checkpoint_at(plan.base), plan.output_dtype, plan.shard_size)  # type: ignore[arg-type]
    return {layout.file_name: layout for layout in shards}


def run(context: Context) -> TaskResult:
    """Merge and write the tensors of one group."""
    layout = layouts_of(context.plan)[context.task.subject]
    with ShardWriter(context.plan.output, layout) as writer:
        for name in context.task.tensors:
            _write_tensor(context, context.plan.tensors[name], layout, writer)
        writer.sync()
    partial = Output("output", layout.file_name + PARTIAL_SUFFIX, layout.file_size, transient=True)
    return TaskResult([partial])


def run_seal(context: Context) -> TaskResult:
    """Give a complete shard its final name."""
    layout = layouts_of(context.plan)[context.task.subject]
    sealed = seal(context.plan.output, layout)
    return TaskResult(
        [Output("output", sealed["file"], sealed["size"])], {"xxh3_128": sealed["tensors"]}
    )


def _write_tensor(
    context: Context, plan: TensorPlan, layout: ShardLayout, writer: ShardWriter
) -> None:
    info = context.reader(BASE).checkpoint.tensors[plan.name]
    if not info.kind.is_float:
        _copy(context, plan.name, writer)
        return
    dtype: torch.dtype = getattr(torch, str(layout.tensors[plan.name].kind.torch_name))
    rows = max(1, PANEL_BYTES // max(info.row_nbytes, 1)) if info.num_rows else 1
    for start in range(0, info.num_rows, rows):
        check()
        stop = min(start + rows, info.num_rows)
        base = context.reader(BASE).rows(plan.name, start, stop)
        # float64 weights keep their precision; everything else is computed in float32.
        wide = base.to(torch.float64 if base.dtype == torch.float64 else torch.float32)
        merged = _merged_rows(context, plan, wide, start, stop)
        writer.write_rows(plan.name, start, merged.to(dtype).contiguous())


def _merged_rows(context: Context, plan: TensorPlan, base: Tensor, start: int, stop: int) -> Tensor:
    """Rows of the merged tensor, rounded once by the caller; base rows where the update is zero."""
    if plan.treatment == "copy":
        return base
    if plan.treatment == "factors":
        matrix = context.plan.matrices[str(plan.matrix)]
        update = context.store.read_update(plan.name, start, stop)
        coefficient = plan.alpha * scale_of(context, matrix)
    else:
        assert plan.method is not None
        method = elementwise_method(plan.method)
        update = method.merge(_updates(context, plan.name, base, start, stop))
        coefficient = plan.alpha
    update = update.to(base.dtype).mul_(coefficient)
    # -0.0 + 0.0 is +0.0: a tensor that nobody tuned keeps the base's bytes.
    return torch.where(update == 0, base, base + update)


def _updates(context: Context, name: str, base: Tensor, start: int, stop: int) -> Iterator[Tensor]:
    """The experts' updates of some rows, one after the other."""
    for expert in context.plan.expert_names:
        difference = context.reader(expert).rows(name, start, stop).to(base.dtype) - base
        require_finite(difference, name, expert, base)
        yield difference


def _copy(context: Context, name: str, writer: ShardWriter) -> None:
    """Copy the base's tensor byte by byte; the run has made sure that experts agree with it."""
    base = context.reader(BASE)
    size = base.checkpoint.tensors[name].nbytes
    for start in range(0, size, PANEL_BYTES):
        stop = min(start + PANEL_BYTES, size)
        writer.write_bytes(name, start, base.raw_bytes(name, start, stop))
