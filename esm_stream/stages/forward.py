"""Stage 3: one expert's forward on its proxies, moments by hooks, factors out.

From:  the expert's and the base's weights; in chain mode the hidden states before the block and its
       recorded arguments, in replay mode model inputs and the outputs of earlier blocks.
To:    factors.zarr of every matrix observed, the block's output for the tasks that come after.
Peak:  moments of the distinct inputs, hidden states in and out, one matrix being factored; weights
       are read in place unless they have to be converted or moved to a GPU.

A task is one block (chain, replay), what is outside the blocks, or the whole forward (resident).
"""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from esm_stream.calibration.arguments import (
    HIDDEN,
    Call,
    load_value,
    load_values,
    save_values,
)
from esm_stream.calibration.hooks import observe_inputs
from esm_stream.calibration.passes import PassEndedError, blocks_answered, run_pass
from esm_stream.calibration.steps import OUTSIDE
from esm_stream.calibration.suspended import Request, SuspendedPass
from esm_stream.calibration.trace import stand_in
from esm_stream.errors import UnsupportedModelError
from esm_stream.planning.plan import ALL, Plan, Task
from esm_stream.stages import transfer
from esm_stream.stages.context import Context, TaskResult
from esm_stream.stages.expert import Expert, Samples
from esm_stream.stages.observation import Observation
from esm_stream.stopping import check

Compute = Callable[[tuple[Any, ...], dict[str, Any]], Any]
"""Gives a block's output from its arguments."""


def run(context: Context) -> TaskResult:
    """Run the part of one expert's forward that the task is about, and factor its matrices."""
    task, following, result = context.task, context.following, TaskResult()
    try:
        if task.subject == ALL:
            _run_all(context, result)
        elif task.subject == OUTSIDE:
            _run_outside(context, result)
        else:
            _run_block(context, result)
    except BaseException:
        transfer.release()
        raise
    if following is None or not _is_block(following):
        transfer.release()
    return result


def _is_block(task: Task) -> bool:
    return task.stage == "forward" and task.block >= 0


def _observation(context: Context, where: str) -> Observation:
    """Moments of the matrices of a block, or of those outside and those that blocks share."""
    matrices = [m for m in context.plan.matrices.values() if m.observed]
    alone = [m for m in matrices if m.observed_in == where and (where == OUTSIDE or not m.also)]
    shared = [m for m in matrices if m.also and m.observed_in != OUTSIDE and where == OUTSIDE]
    return Observation(context, [*alone, *shared])


# One block ------------------------------------------------------------------------------------


def _run_block(context: Context, result: TaskResult) -> None:
    plan, task, following = context.plan, context.task, context.following
    expert, samples = Expert(context), Samples(context, context.task.expert)
    step = expert.forward.steps[task.block]
    ahead = _block(plan, following) if following and _is_block(following) else None
    transfer.bring(context, _block(plan, task), ahead)
    observation = _observation(context, step.block)
    outputs = _outputs(expert, samples, task.block, observation)
    if plan.readers_of_state[task.key]:
        path = samples.hidden(task.block + 1)
        save_outputs(expert, path, outputs)
        result.outputs.append(context.directory.record(path, transient=True))
    del outputs
    observation.factor(result)


def _outputs(expert: Expert, samples: Samples, number: int, observation: Observation) -> list[Any]:
    """Run a block on all samples while its matrices are observed."""
    name, outputs = expert.forward.steps[number].block, []
    block = expert.block(name)

    def visit(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        outputs.append(expert.compute(name, block, args, kwargs))

    with _seen_by(observation, block, name):
        visit_calls(expert, samples, number, visit)
    return outputs


def _block(plan: Plan, task: Task) -> transfer.Block:
    assert plan.forward is not None
    return transfer.Block(task.expert, plan.forward.steps[task.block].block, task.reads)


def visit_calls(expert: Expert, samples: Samples, number: int, visit: Callable[..., None]) -> None:
    """Reach a block with all samples; `visit` gets the arguments of each of its calls."""
    if expert.forward.mode == "chain":
        calls: list[Call] = load_value(samples.whole(samples.arguments), number)
        states = load_values(samples.whole(samples.hidden(number)))
        for call, hidden in zip(calls, states, strict=True):
            check()
            visit(*_with_hidden(call, hidden))
        return

    def finish(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        visit(args, kwargs)
        raise PassEndedError

    _replay(expert, samples, expert.model(), number, finish)


def save_outputs(expert: Expert, path: Path, outputs: list[Any]) -> None:
    """Keep a block's outputs for the tasks after it: in chain mode the hidden states alone."""
    if expert.forward.mode == "chain":
        outputs = [output if isinstance(output, Tensor) else output[0] for output in outputs]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_values(path, outputs)


def _with_hidden(call: Call, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Recorded arguments with the hidden state in its place."""
    args = tuple(hidden if value is HIDDEN else value for value in call.args)
    return args, {k: hidden if value is HIDDEN else value for k, value in call.kwargs.items()}


def _replay(
    expert: Expert,
    samples: Samples,
    model: PreTrainedModel,
    end: int,
    finish: Compute | None = None,
) -> None:
    """Run the forward on all micro-batches, with stored outputs for the blocks before `end`.

    Outputs that only the next block reads are not needed again, and stood in for. `finish` answers
    for block `end`, if there is one.
    """
    steps = expert.forward.steps
    with blocks_answered(model, expert.block_names):
        for index, batch in enumerate(samples.batches):
            check()

            def answer(
                number: int,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                index: int = index,
            ) -> Any:  # noqa: ANN401
                if finish is not None and number == end:
                    return finish(args, kwargs)
                step = steps[number]
                if step.handed_on and number + 1 != end:
                    return stand_in(step, args, kwargs)
                stored = load_value(samples.whole(samples.hidden(number + 1)), index)
                if expert.forward.mode == "chain" and step.extra >= 0:
                    return (stored, *([None] * step.extra))
                return stored

            run_pass(model, expert.inputs(batch), answer)


# What is outside the blocks -------------------------------------------------------------------


def _run_outside(context: Context, result: TaskResult) -> None:
    expert = Expert(context)
    observation = _observation(context, OUTSIDE)
    samples, model = Samples(context, context.task.expert), expert.model()
    with _seen_by(observation, model):
        _replay(expert, samples, model, len(expert.forward.steps))
    observation.factor(result)


# Everything -----------------------------------------------------------------------------------


def _run_all(context: Context, result: TaskResult) -> None:
    """All blocks of one expert: every micro-batch waits at each block until all have come to it."""
    expert = Expert(context)
    model = expert.model()
    outside = _observation(context, OUTSIDE)
    batches = Samples(context, context.task.expert).batches
    passes = [SuspendedPass(partial(run_pass, model, expert.inputs(b))) for b in batches]
    with ExitStack() as undo:
        undo.enter_context(torch.random.fork_rng(devices=[]))
        undo.enter_context(blocks_answered(model, expert.block_names))
        undo.enter_context(_seen_by(outside, model))
        for one in passes:
            undo.callback(one.abandon)
            check()
            one.start()
        _run_in_step(context, expert, model, passes, outside, result)
    outside.factor(result)


def _run_in_step(
    context: Context,
    expert: Expert,
    model: PreTrainedModel,
    passes: list[SuspendedPass],
    outside: Observation,
    result: TaskResult,
) -> None:
    """Load one block after the other and answer all passes that wait for it."""
    steps = expert.forward.steps
    open_: dict[int, Observation] = {}
    done: Counter[int] = Counter()
    while any(one.request for one in passes):
        number = min(one.request.number for one in passes if one.request)
        step = steps[number]
        ahead = expert.weights(steps[number + 1].block) if number + 1 < len(steps) else None
        transfer.bring(context, expert.weights(step.block), ahead)
        if number not in open_:
            if done[number]:
                raise UnsupportedModelError(
                    f"'{step.block}' is called more often for some samples than for others; give "
                    "samples of one length"
                )
            open_[number] = _observation(context, step.block)
        observation = open_[number]
        block = expert.block(step.block, model)

        def compute(request: Request, block: nn.Module = block, name: str = step.block) -> Any:  # noqa: ANN401
            return expert.compute(name, block, request.args, request.kwargs)

        with _seen_by(observation, block, step.block), _seen_by(outside, block, step.block):
            # One pass after the other, so that sums are added up as the plain model's would be.
            for one in passes:
                while one.request and one.request.number == number:
                    check()
                    one.proceed(compute)
                    done[number] += 1
        if done[number] >= step.calls * len(passes):
            open_.pop(number).factor(result)
        context.drop_pages()
    for observation in open_.values():
        observation.factor(result)


def _seen_by(
    observation: Observation, root: nn.Module, name: str = ""
) -> AbstractContextManager[None]:
    return seen_by(observation.see, observation.keys, root, name)


def seen_by(
    see: Callable[[str, Tensor], None], keys: Iterable[str], root: nn.Module, name: str = ""
) -> AbstractContextManager[None]:
    """While active, `see` gets what matrices of a module are multiplied with."""
    inside = [key for key in keys if not name or key.startswith(f"{name}.")]
    return observe_inputs(root, see, inside, name) if inside else nullcontext()
