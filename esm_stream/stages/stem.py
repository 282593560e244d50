"""Stage 2 (chain mode): model inputs of one expert -> what every block is handed.

That is the hidden states before block 0 and the other arguments of all blocks.

The expert's skeleton (embeddings, rotary tables) runs on the CPU from the mapped file; an embedding
touches only the rows it looks up. Blocks are stubs; what follows the last one is not run.
"""

from typing import Any

from torch import Tensor

from esm_stream.calibration.arguments import Call, save_values
from esm_stream.calibration.passes import PassEndedError, blocks_answered, run_pass
from esm_stream.calibration.trace import as_call, stand_in
from esm_stream.stages.context import Context, TaskResult
from esm_stream.stages.expert import Expert, Samples
from esm_stream.stopping import check
from esm_stream.store.work import Output


def run(context: Context) -> TaskResult:
    """Run the skeleton on all micro-batches of one expert."""
    samples = Samples(context, context.task.expert)
    return TaskResult(run_stem(context, Expert(context), samples))


def run_stem(context: Context, expert: Expert, samples: Samples) -> list[Output]:
    """Run a model's skeleton on an expert's samples; returns the files written."""
    model, steps = expert.model(), expert.forward.steps
    states: list[Tensor] = []
    calls: list[list[Call]] = [[] for _ in steps]

    def record(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        call, hidden = as_call(steps[number], args, kwargs)
        calls[number].append(call)
        if number == 0:
            expert.require_finite(
                hidden,
                f"what precedes block 0 of {expert.owner} gives NaN or Inf on its calibration "
                "samples; check the samples",
            )
            states.append(hidden.clone())
        if number + 1 == len(steps):
            raise PassEndedError
        return stand_in(steps[number], args, kwargs)

    with blocks_answered(model, expert.block_names):
        for batch in samples.batches:
            check()
            run_pass(model, expert.inputs(batch), record)
    arguments, hidden = samples.arguments, samples.hidden(0)
    arguments.parent.mkdir(parents=True, exist_ok=True)
    save_values(arguments, calls)
    save_values(hidden, states)
    directory = context.directory
    return [directory.record(arguments), directory.record(hidden, transient=True)]
