"""Merging with the merged model's inputs: block after block, each on what those before it give.

From:  base and experts; samples of all experts; what the plan merges otherwise in the same block.
To:    factors.zarr/<matrix>/update of every matrix walked, and the merged model's hidden states of
       all samples for the next block. No expert's forward is run.
Peak:  a block of the merged model, sums of the matrices that share an input (fewer at a time where
       they would take more than a part of the budget), one expert's moments, hidden states.

Within a block matrices are merged in the order in which the forward comes to them, so that each
sees what the merged ones before it make of the samples: once per input, all samples run through the
block as far as that input.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from esm_stream.budget import F64, SUMS_SHARE
from esm_stream.calibration.moments import InputMoment
from esm_stream.calibration.passes import PassEndedError
from esm_stream.checkpoints.header import TensorInfo
from esm_stream.checkpoints.layout import TensorSpec, lay_out
from esm_stream.errors import DataError
from esm_stream.methods.contract import Merged, Moment, Place
from esm_stream.planning.plan import Matrix, Task
from esm_stream.stages.context import BASE, Context, TaskResult
from esm_stream.stages.expert import Expert, Samples, all_finite
from esm_stream.stages.forward import save_outputs, seen_by, visit_calls
from esm_stream.stages.observation import base_norm
from esm_stream.stages.stem import run_stem
from esm_stream.stages.sums import sum_method
from esm_stream.stages.write import is_copied, layouts_of, output_elements, write_tensor
from esm_stream.stopping import check
from esm_stream.subspace.basis import frobenius_norm
from esm_stream.write.shards import ShardWriter, reserve, seal

OUTSIDE_WEIGHTS: Final = "@"
"""The merged model's tensors outside the blocks, as a model of the context."""


def run(context: Context) -> TaskResult:
    """Take all samples to the first block, or merge one block."""
    result = TaskResult()
    if context.task.block < 0:
        _begin(context, result)
    else:
        _merge_block(context, result)
    return result


class MergedModel(Expert):
    """The model merged so far: what is outside the blocks, and one block whose matrices change."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._targets = output_tensors(context)
        self._merged: set[str] = set()
        self._values: dict[str, Tensor] = {}
        path = outside_weights(context)
        if context.task.block >= 0:
            context.whole(path)
        context.add_model(OUTSIDE_WEIGHTS, path.parent)

    @property
    def owner(self) -> str:
        """What messages call it."""
        return "the merged model"

    def merged(self, matrices: Sequence[Matrix]) -> None:
        """From now on the block has the merged updates of these."""
        self._merged |= {matrix.name for matrix in matrices}
        for matrix in matrices:
            for part in matrix.parts:
                self._values.pop(part.tensor, None)

    def require_finite(self, value: Any, otherwise: str) -> None:  # noqa: ANN401 - nested tensors
        """Refuse hidden states with NaN or Inf.

        Raises:
            DataError: `otherwise`; inputs were looked at when their updates were made.
        """
        if not all_finite(value):
            raise DataError(f"{otherwise}; or lower [merge] alpha")

    def _tensor(self, name: str) -> Tensor:
        """A tensor as the output will have it."""
        if name in self._context.reader(OUTSIDE_WEIGHTS).checkpoint.tensors:
            return self._lookup(name)
        if name not in self._values:
            self._values[name] = self._made(name)
        return self._values[name]

    def _made(self, name: str) -> Tensor:
        context, target = self._context, self._targets[name]
        plan = context.plan.tensors[name]
        matrices = (context.plan.matrices[n] for n in plan.matrices)
        if any(m.walked and m.name not in self._merged for m in matrices):
            return context.tensor(BASE, name)
        if is_copied(context, plan, target):
            return context.tensor(plan.source or BASE, name)
        value = torch.empty(target.shape, dtype=getattr(torch, str(target.kind.torch_name)))
        for first, elements in output_elements(context, plan, target):
            check()
            value.view(-1)[first : first + len(elements)] = elements
        return value

    def _lookup(self, name: str) -> Tensor:
        """A tensor outside the blocks, as the output will have it."""
        return self._context.reader(OUTSIDE_WEIGHTS).lookup(name)


def outside_weights(context: Context) -> Path:
    """The file of the merged model's tensors outside the blocks."""
    return context.directory.hidden(OUTSIDE_WEIGHTS, 0).parent / "model.safetensors"


def output_tensors(context: Context) -> Mapping[str, TensorInfo]:
    """What every tensor will be in the output."""
    layouts = layouts_of(context.plan).values()
    return {name: info for layout in layouts for name, info in layout.tensors.items()}


# Outside the blocks ---------------------------------------------------------------------------


def _begin(context: Context, result: TaskResult) -> None:
    """Merge what is outside the blocks into a file; in chain mode take the samples to block 0."""
    path = outside_weights(context)
    path.parent.mkdir(parents=True, exist_ok=True)
    targets = output_tensors(context)
    infos = sorted((targets[n] for n in context.task.tensors), key=lambda info: -info.kind.bits)
    layout = lay_out(path.name, [TensorSpec(i.name, i.dtype, i.shape, i.nbytes) for i in infos])
    path.unlink(missing_ok=True)
    reserve(path.parent, layout)
    with ShardWriter(path.parent, layout) as writer:
        for name in context.task.tensors:
            write_tensor(context, context.plan.tensors[name], layout, writer)
        writer.sync()
    seal(path.parent, layout)
    result.outputs.append(context.directory.record(path))
    assert context.plan.forward is not None
    if context.plan.forward.mode == "chain":
        model = MergedModel(context)
        for expert in context.plan.experts:
            samples = Samples(context, expert, in_merged=True)
            result.outputs += run_stem(context, model, samples)


# One block ------------------------------------------------------------------------------------


def _merge_block(context: Context, result: TaskResult) -> None:
    """Merge a block's matrices input by input, then take all samples through it."""
    task, model = context.task, MergedModel(context)
    inputs = list(_inputs(context, task))
    for matrices, following in zip(inputs, [*inputs[1:], []], strict=True):
        stop = {str(matrix.leader) for matrix in following}
        for together in _affordable(matrices, context.plan.memory // SUMS_SHARE):
            sums = _sums(context, model, together, stop, result)
            for matrix in together:
                _solve(context, matrix, sums.pop(matrix.name), result)
        model.merged(matrices)
    if context.plan.readers_of_state[task.key]:
        _save_states(context, model, result)


def _inputs(context: Context, task: Task) -> Iterator[list[Matrix]]:
    """The block's matrices by the input they have, in the order of the forward."""
    walked = [context.plan.matrices[name] for name in task.tensors]
    for _, found in groupby(walked, key=lambda matrix: matrix.order):
        yield list(found)


def _affordable(matrices: Sequence[Matrix], limit: int) -> Iterator[list[Matrix]]:
    """Matrices whose sums take no more than `limit` bytes together; at least one at a time."""
    together: list[Matrix] = []
    held = 0
    for matrix in matrices:
        size = sums_bytes(matrix)
        if together and held + size > limit:
            yield together
            together, held = [], 0
        together.append(matrix)
        held += size
    yield together


def sums_bytes(matrix: Matrix) -> int:
    """Sums of one matrix in memory."""
    return sum_method(matrix).sum_numbers((matrix.outputs, matrix.inputs)) * F64


def _sums(
    context: Context,
    model: MergedModel,
    matrices: Sequence[Matrix],
    stop: set[str],
    result: TaskResult,
) -> dict[str, "_Sums"]:
    """Terms of all experts for matrices whose input comes at the same time."""
    sums = {matrix.name: _Sums(matrix) for matrix in matrices}
    block = model.block(model.forward.steps[context.task.block].block)
    for expert in context.plan.experts:
        moments = _moments(context, model, block, expert, matrices, stop)
        for matrix in matrices:
            check()
            moment = moments[str(matrix.leader)]
            update_OI = context.update(expert, matrix)
            figures = {
                "norm": frobenius_norm(update_OI),
                "base_norm": base_norm(context, matrix),
                "tokens": moment.tokens,
                "too_few": int(moment.tokens == 0),
            }
            sums[matrix.name].add(update_OI, moment if moment.tokens else None)
            values = result.values.setdefault(matrix.name, {"experts": {}})
            values["experts"][expert] = figures
    return sums


def _moments(
    context: Context,
    model: MergedModel,
    block: nn.Module,
    expert: str,
    matrices: Sequence[Matrix],
    stop: set[str],
) -> dict[str, Moment]:
    """Moments of inputs of the merged model on one expert's samples, by leader."""
    number = context.task.block
    name = model.forward.steps[number].block
    kept = {str(m.leader): InputMoment(m.inputs, context.device) for m in matrices}

    def see(key: str, x: Tensor) -> None:
        if key in stop:
            raise PassEndedError
        kept[key].add(x)

    def visit(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            model.compute(name, block, args, kwargs)
        except PassEndedError:
            return

    with seen_by(see, (*kept, *stop), block, name):
        visit_calls(model, Samples(context, expert, in_merged=True), number, visit)
    return {key: moment.result() for key, moment in kept.items()}


class _Sums:
    """Sums over the experts of one matrix, in memory, in the order in which they are added."""

    def __init__(self, matrix: Matrix) -> None:
        self._method = sum_method(matrix)
        self._shape = matrix.outputs, matrix.inputs
        self._panels: dict[Place, Tensor] = {}

    def add(self, update_OI: Tensor, moment: Moment | None) -> None:
        """Add one expert's term."""
        terms = self._method.term(update_OI, moment)
        for place, panel in zip(self._method.places(self._shape), terms, strict=False):
            if place in self._panels:
                self._panels[place] += panel
            else:
                self._panels[place] = panel.clone()

    def solve(self) -> Merged:
        """The merged update; the sums are used up."""
        if not self._panels:
            return Merged(torch.zeros(self._shape), {})
        return self._method.solve(self._panels.pop, self._shape)


def _solve(context: Context, matrix: Matrix, sums: _Sums, result: TaskResult) -> None:
    """Solve for one matrix and store its merged update."""
    check()
    merged = sums.solve()
    update = merged.update_OI.T if matrix.transposed else merged.update_OI
    written = context.store.write_update(matrix.name, update)
    result.outputs += [context.directory.record(path) for path in written]
    norm = frobenius_norm(merged.update_OI)
    result.values[matrix.name]["merged"] = {"norm": norm, **merged.diagnostics}


def _save_states(context: Context, model: MergedModel, result: TaskResult) -> None:
    """Run the whole block on all samples and keep what it gives."""
    number = context.task.block
    name = model.forward.steps[number].block
    block = model.block(name)
    for expert in context.plan.experts:
        samples = Samples(context, expert, in_merged=True)
        outputs: list[Any] = []

        def visit(
            args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Any] = outputs
        ) -> None:
            outputs.append(model.compute(name, block, args, kwargs))

        visit_calls(model, samples, number, visit)
        path = samples.hidden(number + 1)
        save_outputs(model, path, outputs)
        result.outputs.append(context.directory.record(path, transient=True))
