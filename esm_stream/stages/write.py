"""Stage 6 (pass 2): base + alpha * scale * update -> its place in a reserved shard; sealing.

From:  base (and experts, for elementwise methods), merged updates in the store, scales.
To:    `<shard>.partial` in the output directory, in panels of rows; sealed, `<shard>`.
Peak:  a few panels of PANEL_BYTES, whatever the number of experts and the size of the tensor.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from esm_stream.budget import PANEL_BYTES
from esm_stream.methods import elementwise_method
from esm_stream.planning.plan import Plan, TensorPlan
from esm_stream.stages.context import BASE, Context, TaskResult, checkpoint_at
from esm_stream.stages.measure import facts_of_population
from esm_stream.stages.panels import Panels, facts_of_tensor
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
    stored = context.reader(plan.source or BASE).checkpoint.tensors[plan.name]
    target = layout.tensors[plan.name]
    if not target.kind.is_float or (plan.treatment == "copy" and stored.kind == target.kind):
        _copy(context, plan, writer)
        return
    merge = _merged_panels if plan.treatment == "elementwise" else _merged_rows
    dtype: torch.dtype = getattr(torch, str(target.kind.torch_name))
    size = target.kind.bits // 8
    for first, merged in merge(context, plan):
        check()
        data = merged.to(dtype).contiguous().view(-1).view(torch.uint8)
        writer.write_bytes(plan.name, first * size, data)


def _merged_panels(context: Context, plan: TensorPlan) -> Iterator[tuple[int, Tensor]]:
    """Elements of a tensor merged by an elementwise method, rounded once by the caller."""
    assert plan.method is not None
    method = elementwise_method(plan.method)
    panels = Panels(context, plan.name, plan.method, method.whole_rows)
    known: list[Any] = (
        facts_of_population(context, plan.population, method.sweeps)
        if plan.population
        else facts_of_tensor(panels, method, check)
    )
    for panel in panels:
        yield panel.first, added(panel.base_N, method.merge(panel, known), plan.alpha)


def _merged_rows(context: Context, plan: TensorPlan) -> Iterator[tuple[int, Tensor]]:
    """Rows of a copied tensor, or of one whose merged update is in the store."""
    reader = context.reader(plan.source or BASE)
    stored = reader.checkpoint.tensors[plan.name]
    rows = max(1, PANEL_BYTES // max(stored.row_nbytes, 1))
    for start in range(0, stored.num_rows, rows):
        stop = min(start + rows, stored.num_rows)
        base = reader.rows(plan.name, start, stop)
        # float64 weights keep their precision; everything else is computed in float32.
        wide = base.to(torch.float64 if base.dtype == torch.float64 else torch.float32)
        first = start * (stored.numel // stored.num_rows)
        if plan.treatment == "copy":
            yield first, wide
            continue
        matrix = context.plan.matrices[str(plan.matrix)]
        update = context.store.read_update(plan.name, start, stop)
        yield first, added(wide, update.to(wide.dtype), plan.alpha * scale_of(context, matrix))


def added(base: Tensor, update: Tensor, coefficient: float) -> Tensor:
    """Sum of base and coefficient * update; overwrites the update.

    Where the update is zero the base's bits stay, -0.0 included: x - 0.0 is x for every x, and
    adding 0.0 turns zeros of either sign into +0.0.
    """
    return torch.sub(base, update.mul_(-coefficient).add_(0.0))


def _copy(context: Context, plan: TensorPlan, writer: ShardWriter) -> None:
    """Copy a tensor byte by byte; the run has made sure that experts agree where they have to."""
    reader = context.reader(plan.source or BASE)
    size = reader.checkpoint.tensors[plan.name].nbytes
    for start in range(0, size, PANEL_BYTES):
        check()
        stop = min(start + PANEL_BYTES, size)
        writer.write_bytes(plan.name, start, reader.raw_bytes(plan.name, start, stop))
