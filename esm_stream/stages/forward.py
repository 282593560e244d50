"""Stage 3: one block of one expert: hidden states through it, moments by hooks, factors out.

From:  hidden states before the block, the block's weights in expert and base.
To:    factors.zarr (basis, coordinates, spectrum of every matrix), hidden states after the block.
Peak:  moments of the block's distinct inputs, hidden states in and out, one matrix being factored;
       the weights are read in place unless they have to be converted or moved to a GPU.
"""

import math
from collections.abc import Callable

from torch import Tensor, nn

from esm_stream.calibration.arguments import load_batches, load_calls, save_batches
from esm_stream.calibration.chain import run_call
from esm_stream.calibration.hooks import observe_inputs
from esm_stream.calibration.moments import InputMoment, ShiftMoment
from esm_stream.calibration.skeleton import move_buffers, with_tensors
from esm_stream.methods import factor_method
from esm_stream.methods.contract import Moment
from esm_stream.planning.plan import Matrix
from esm_stream.stages.context import BASE, Context, TaskResult, blame, is_finite
from esm_stream.stages.stem import expert_skeleton
from esm_stream.stopping import check
from esm_stream.subspace.basis import frobenius_norm

Moments = dict[str, InputMoment | ShiftMoment]


def run(context: Context) -> TaskResult:
    """Run one block of one expert on all its micro-batches and factor its matrices."""
    task, chain, record = context.task, context.plan.chain, context.directory.record
    assert chain is not None
    matrices = [m for m in context.plan.matrices.values() if m.moment and m.block == task.block]
    moments = _empty_moments(context, matrices)
    states = _run_block(context, _observers(matrices, moments))
    result = TaskResult()
    if task.block + 1 < chain.num_blocks:
        path = context.directory.hidden(task.expert, task.block + 1)
        save_batches(path, states)
        result.outputs.append(record(path, transient=True))
    del states
    while matrices:
        check()
        matrix = matrices.pop(0)
        moment = moments[_moment_key(matrix)].result()
        values = _factor(context, matrix, moment, result)
        result.values[matrix.name] = values
        if all(_moment_key(m) != _moment_key(matrix) for m in matrices):
            del moments[_moment_key(matrix)]
    return result


def _moment_key(matrix: Matrix) -> str:
    """Input moments belong to the observed matrix, maybe shared; shift moments to the matrix."""
    return str(matrix.leader) if matrix.moment == "input" else f"shift of {matrix.name}"


def _empty_moments(context: Context, matrices: list[Matrix]) -> Moments:
    moments: Moments = {}
    for matrix in matrices:
        key = _moment_key(matrix)
        if matrix.moment == "shift":
            moments[key] = ShiftMoment(context.update(context.task.expert, matrix))
        elif key not in moments:
            moments[key] = InputMoment(matrix.inputs, context.device)
    return moments


def _observers(
    matrices: list[Matrix], moments: Moments
) -> dict[str, list[Callable[[Tensor], None]]]:
    """What to call with the input of each observed matrix."""
    observers: dict[str, dict[str, Callable[[Tensor], None]]] = {}
    for matrix in matrices:
        key = _moment_key(matrix)
        observers.setdefault(str(matrix.leader), {})[key] = moments[key].add
    return {key: list(calls.values()) for key, calls in observers.items()}


def _run_block(
    context: Context, observers: dict[str, list[Callable[[Tensor], None]]]
) -> list[dict[str, Tensor]]:
    """Hidden states after the block, micro-batch by micro-batch; hooks fill the moments."""
    task, chain, directory = context.task, context.plan.chain, context.directory
    assert chain is not None
    name = f"{chain.prefix}.{task.block}"
    block = _load_block(context, name)

    def observe(key: str, x: Tensor) -> None:
        for add in observers[key]:
            add(x)

    calls = load_calls(directory.arguments(task.expert), task.block)
    before = load_batches(directory.hidden(task.expert, task.block))
    after = []
    with observe_inputs(block, observe, observers, name):
        for call, batch in zip(calls, before, strict=True):
            check()
            output = run_call(block, call, batch.pop("hidden").to(context.device), context.device)
            hidden = output if isinstance(output, Tensor) else output[0]
            if not is_finite(hidden):
                raise blame(
                    context,
                    task.reads,
                    f'block {task.block} of expert "{task.expert}" gives NaN or Inf on its '
                    'calibration samples; try [calibration] dtype = "float32"',
                )
            after.append({"hidden": hidden.cpu()})
    return after


def _load_block(context: Context, name: str) -> nn.Module:
    """The block with the expert's weights: in place on the CPU, copied to a GPU."""
    skeleton = expert_skeleton(context, context.task.expert)

    def read(tensor: str) -> Tensor:
        return context.tensor(context.task.expert, tensor).to(context.device)

    block = with_tensors(skeleton.model.get_submodule(name), skeleton.load(name, read))
    move_buffers(block, context.device)
    return block


def _base_norm(context: Context, matrix: Matrix) -> float:
    """Frobenius norm of the base's matrix, to judge how large the update is."""
    return math.hypot(*(frobenius_norm(context.tensor(BASE, p.tensor)) for p in matrix.parts))


def _factor(
    context: Context, matrix: Matrix, moment: Moment, result: TaskResult
) -> dict[str, float | int]:
    """Factor one expert's update of one matrix and store it; returns its norm, rank, tokens."""
    plan, expert = context.plan, context.task.expert
    method = factor_method(matrix.method)
    factors = method.factor(context.update(expert, matrix), moment, len(plan.experts))
    written = context.store.write_factors(matrix.name, plan.expert_names.index(expert), factors)
    result.outputs += [context.directory.record(path) for path in written]
    return {
        "norm": factors.norm,
        "base_norm": _base_norm(context, matrix),
        "rank": int(factors.basis_OK.shape[1]),
        "tokens": moment.tokens,
    }
