"""Stage 6 (pass 2): base + alpha * scale * update -> its place in a reserved shard; sealing.

From:  base (and experts, for elementwise methods), merged updates in the store, scales.
To:    `<shard>.partial` in the output directory, in panels of rows; sealed, `<shard>`.
Peak:  a few panels of PANEL_BYTES, whatever the number of experts and the size of the tensor.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from esm_stream.budget import PANEL_BYTES
from esm_stream.checkpoints.header import TensorInfo
from esm_stream.checkpoints.layout import ShardLayout
from esm_stream.methods import elementwise_method
from esm_stream.planning.plan import Matrix, Part, Plan, TensorPlan
from esm_stream.stages.context import BASE, Context, TaskResult, checkpoint_at
from esm_stream.stages.lines import lines_factor
from esm_stream.stages.measure import facts_of
from esm_stream.stages.panels import Panels
from esm_stream.stages.scale import scale_of
from esm_stream.stopping import check
from esm_stream.store.work import Output
from esm_stream.write.shards import PARTIAL_SUFFIX, ShardWriter, plan_shards, seal

# A call to write costs as much as a panel of an elementwise method: many go into one.
GATHERED_BYTES: Final = 1 << 20
HASHES: Final = "xxh3_128"
"""Result of a writing or sealing task: the hash of each of its tensors."""


def layouts_of(plan: Plan) -> dict[str, ShardLayout]:
    """Output shards by file name."""
    shards = plan_shards(checkpoint_at(plan, plan.base), plan.output_dtype, plan.shard_size)  # type: ignore[arg-type]
    return {layout.file_name: layout for layout in shards}


def run(context: Context) -> TaskResult:
    """Merge and write the tensors of one group."""
    layout = layouts_of(context.plan)[context.task.subject]
    with ShardWriter(context.plan.output, layout) as writer:
        for name in context.task.tensors:
            write_tensor(context, context.plan.tensors[name], layout, writer)
        writer.sync()
        hashes = writer.hashes(context.task.tensors)
    partial = Output("output", layout.file_name + PARTIAL_SUFFIX, layout.file_size, transient=True)
    return TaskResult([partial], {HASHES: hashes})


def run_seal(context: Context) -> TaskResult:
    """Give a complete shard its final name; its hashes are those of what was written."""
    layout = layouts_of(context.plan)[context.task.subject]
    hashes: dict[str, str] = {}
    for key in context.task.after:
        hashes |= context.directory.results(key)[HASHES]
    seal(context.plan.output, layout)
    return TaskResult([Output("output", layout.file_name, layout.file_size)], {HASHES: hashes})


def write_tensor(
    context: Context, plan: TensorPlan, layout: ShardLayout, writer: ShardWriter
) -> None:
    """Put a tensor at its place in a reserved file, as the output has it."""
    target = layout.tensors[plan.name]
    if is_copied(context, plan, target):
        _copy(context, plan, writer)
        return
    size = target.kind.bits // 8
    for first, merged in output_elements(context, plan, target):
        check()
        writer.write_bytes(plan.name, first * size, merged.view(torch.uint8))


def is_copied(context: Context, plan: TensorPlan, target: TensorInfo) -> bool:
    """Whether the output has a tensor's bytes as they are in the base, or in plan.source."""
    stored = context.reader(plan.source or BASE).checkpoint.tensors[plan.name]
    return not target.kind.is_float or (plan.treatment == "copy" and stored.kind == target.kind)


def output_elements(
    context: Context, plan: TensorPlan, target: TensorInfo
) -> Iterator[tuple[int, Tensor]]:
    """Elements of a tensor as the output has them, from some element on; vectors, rounded once.

    What is given is overwritten by what follows.
    """
    dtype: torch.dtype = getattr(torch, str(target.kind.torch_name))
    return _rounded(_WAYS[plan.treatment](context, plan), dtype)


def _rounded(
    panels: Iterable[tuple[int, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """Panels flat and in the output's dtype; small ones that follow each other in one piece."""
    gathered_N = torch.empty(GATHERED_BYTES // dtype.itemsize, dtype=dtype)
    begin = filled = 0
    for first, merged in panels:
        count = merged.numel()
        if filled and (first != begin + filled or filled + count > len(gathered_N)):
            yield begin, gathered_N[:filled]
            filled = 0
        if count > len(gathered_N):
            yield first, merged.to(dtype).reshape(-1)
            continue
        if not filled:
            begin = first
        gathered_N[filled : filled + count].view(merged.shape).copy_(merged)
        filled += count
    if filled:
        yield begin, gathered_N[:filled]


def _merged_panels(context: Context, plan: TensorPlan) -> Iterator[tuple[int, Tensor]]:
    """Elements of a tensor merged by an elementwise method, rounded once by the caller."""
    assert plan.method is not None
    method = elementwise_method(plan.method)
    panels = Panels(context, plan.name, plan.method, method.whole_rows)
    known = facts_of(context, panels, plan.population)
    coefficient = plan.alpha * lines_factor(context, plan)
    for panel in panels:
        yield panel.first, added(panel.base_N, method.merge(panel, known), coefficient)


def _copied_rows(context: Context, plan: TensorPlan) -> Iterator[tuple[int, Tensor]]:
    """Rows of a tensor that is copied into another dtype."""
    reader = context.reader(plan.source or BASE)
    stored = reader.checkpoint.tensors[plan.name]
    rows = max(1, PANEL_BYTES // max(stored.row_nbytes, 1))
    for start in range(0, stored.num_rows, rows):
        values = reader.rows(plan.name, start, min(start + rows, stored.num_rows))
        yield start * (stored.numel // stored.num_rows), _wide(values)


def _merged_matrices(context: Context, plan: TensorPlan) -> Iterator[tuple[int, Tensor]]:
    """Rows of the stored matrices of a tensor, whose merged updates are in the store.

    The parts of one stored matrix lie below each other; those of a transposed one side by side.
    """
    stored: dict[int | None, list[_Laid]] = {}
    for name in dict.fromkeys(plan.matrices):
        matrix, offset = context.plan.matrices[name], 0
        coefficient = plan.alpha * scale_of(context, matrix) * lines_factor(context, plan)
        for part in matrix.parts:
            if part.tensor == plan.name:
                laid = _Laid(matrix, part, offset, coefficient)
                stored.setdefault(part.slice, []).append(laid)
            offset += part.outputs
    info = context.reader(BASE).checkpoint.tensors[plan.name]
    for laid_parts in stored.values():
        laid_parts.sort(key=lambda laid: laid.part.start)
        part = laid_parts[0].part
        rows, columns = part.stored_shape(info.shape)
        first = (part.slice or 0) * rows * columns
        if laid_parts[0].matrix.transposed:
            yield from _panels(context, plan.name, laid_parts, (first, rows, columns))
        else:
            for laid in laid_parts:
                here = first + laid.part.start * columns, laid.part.outputs, columns
                yield from _panels(context, plan.name, [laid], here)


@dataclass(frozen=True, slots=True)
class _Laid:
    """A part of a tensor, where it begins in its matrix's outputs, and what its update is times."""

    matrix: Matrix
    part: Part
    offset: int
    coefficient: float

    def update(self, context: Context, start: int, stop: int) -> Tensor:
        """Stored rows of its merged update."""
        if not self.matrix.transposed:
            rows = self.offset + start, self.offset + stop
            return context.store.read_update(self.matrix.name, *rows)
        update_IO = context.store.read_update(self.matrix.name, start, stop)
        return update_IO[:, self.offset : self.offset + self.part.outputs]


def _panels(
    context: Context, tensor: str, parts: Sequence[_Laid], place: tuple[int, int, int]
) -> Iterator[tuple[int, Tensor]]:
    """Panels of stored rows that parts take up side by side; `place` is first element and shape."""
    first, rows, columns = place
    reader = context.reader(BASE)
    size = reader.checkpoint.tensors[tensor].kind.bits // 8
    step = max(1, PANEL_BYTES // max(columns * size, 1))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        panel = first + start * columns, first + stop * columns
        base = _wide(reader.elements(tensor, *panel).view(-1, columns))
        widths = [p.part.outputs for p in parts] if len(parts) > 1 else [columns]
        merged = [
            added(one, part.update(context, start, stop).to(base.dtype), part.coefficient)
            for one, part in zip(base.split(widths, dim=1), parts, strict=True)
        ]
        yield panel[0], merged[0] if len(merged) == 1 else torch.cat(merged, dim=1)


def _wide(values: Tensor) -> Tensor:
    """float64 weights keep their precision; everything else is computed in float32."""
    return values.to(torch.float64 if values.dtype == torch.float64 else torch.float32)


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


_WAYS: Final = {
    "copy": _copied_rows,
    "elementwise": _merged_panels,
    "factors": _merged_matrices,
}
