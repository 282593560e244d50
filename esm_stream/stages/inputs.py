"""Stage 1: calibration data of one expert -> model inputs in micro-batches."""

from pathlib import Path

from esm_stream.calibration.arguments import save_batches
from esm_stream.calibration.proxies import read_proxies
from esm_stream.manifest import Manifest
from esm_stream.stages.context import Context, TaskResult


def run(context: Context) -> TaskResult:
    """Draw the expert's samples and write its model inputs.

    Raises:
        InputError: The calibration data cannot be used.
    """
    expert = context.task.expert
    manifest = Manifest.model_validate(context.plan.manifest)
    source = _source(manifest, expert)
    assert context.plan.chain is not None
    tokens = context.plan.chain.tokens_per_sample
    proxies = read_proxies(source, manifest.calibration, context.plan.base, tokens)
    path = context.directory.inputs(expert)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_batches(path, proxies.batches)
    return TaskResult(
        [context.directory.record(path)],
        {
            "source": str(source),
            "samples": proxies.samples,
            "available": proxies.available,
            "truncated": proxies.truncated,
        },
    )


def _source(manifest: Manifest, expert: str) -> Path:
    named = {e.name: e for e in manifest.experts}[expert]
    source = manifest.calibration_of(named)
    assert source is not None
    return source
