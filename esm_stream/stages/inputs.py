"""Stage 1: calibration data of one expert -> model inputs in micro-batches."""

from esm_stream.budget import activation_bytes, format_size
from esm_stream.calibration.arguments import save_batches
from esm_stream.calibration.proxies import Planned, Proxies, read_proxies
from esm_stream.calibration.sources import GENERIC
from esm_stream.errors import BudgetError, InputError
from esm_stream.manifest import Manifest
from esm_stream.planning.plan import Plan
from esm_stream.stages.context import Context, TaskResult


def run(context: Context) -> TaskResult:
    """Draw the expert's samples and write its model inputs.

    Raises:
        InputError: The calibration data cannot be used; each line names the expert.
    """
    manifest = Manifest.model_validate(context.plan.manifest)
    expert = {e.name: e for e in manifest.experts}[context.task.expert]
    source = manifest.calibration_of(expert) or GENERIC
    assert context.plan.forward is not None
    forward = context.plan.forward
    planned = Planned(frozenset(forward.media), forward.mode == "resident", forward.elements)
    try:
        proxies = read_proxies(
            source,
            manifest.calibration,
            context.plan.base,
            forward.tokens_per_sample,
            forward.micro_batch_tokens,
            planned=planned,
        )
    except InputError as error:
        owner = f'expert "{expert.name}"' if expert.calibration else "[calibration] data"
        raise InputError([f"{owner}: {problem}" for problem in error.problems]) from error
    require_room(context.plan, expert.name, proxies)
    path = context.directory.inputs(expert.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_batches(path, proxies.batches)
    return TaskResult(
        [context.directory.record(path)],
        {
            "source": "generic texts of esm-stream" if source == GENERIC else str(source),
            "kind": proxies.kind,
            "samples": proxies.samples,
            "available": proxies.available,
            "tokens_per_sample": proxies.tokens,
            "truncated": proxies.truncated,
        },
    )


def require_room(plan: Plan, expert: str, proxies: Proxies) -> None:
    """Refuse images or sounds so much larger than the plan's example that the budget is too small.

    Raises:
        BudgetError: Naming the largest sample, what is needed and what there is.
    """
    forward = plan.forward
    assert forward is not None
    planned = max(forward.micro_batch_tokens, forward.tokens_per_sample)
    largest, expected = max(proxies.sizes), len(proxies.sizes) * forward.tokens_per_sample
    widest = max(max(m.outputs, m.inputs) for m in plan.matrices.values() if m.moment)
    state = max(step.state_bytes for step in forward.steps) if forward.steps else 0
    own = [task for task in plan.of_stage("forward") if task.expert == expert]
    task = max([*own, *plan.of_stage("walk")], key=lambda task: task.peak_bytes)
    more = activation_bytes(max(0, largest - planned), widest)
    more += int(3 * state * max(0.0, sum(proxies.sizes) / expected - 1))
    if more and task.peak_bytes + more > plan.memory:
        number = proxies.samples[proxies.sizes.index(largest)]
        raise BudgetError(
            f'expert "{expert}", sample {number}: a model makes about {largest} positions of it, '
            f"where the plan's example has {forward.tokens_per_sample}; task '{task.key}' would "
            f"need {format_size(task.peak_bytes + more)} of memory, the budget is "
            f"{format_size(plan.memory)}. Give smaller images or shorter sounds, fewer "
            "[calibration] samples, or raise [run] memory or --memory"
        )
