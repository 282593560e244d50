"""Stage 1: calibration data of one expert -> model inputs in micro-batches."""

from esm_stream.calibration.arguments import save_batches
from esm_stream.calibration.proxies import Planned, read_proxies
from esm_stream.calibration.sources import GENERIC
from esm_stream.errors import InputError
from esm_stream.manifest import Manifest
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
    planned = Planned(frozenset(forward.media), may_differ=forward.mode == "resident")
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
