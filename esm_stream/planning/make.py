"""From a manifest to a plan: open the inputs, decide every tensor's treatment, build the tasks."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from esm_stream import __version__
from esm_stream.allocation import return_freed_memory
from esm_stream.calibration.steps import MICRO_BATCH_TOKENS
from esm_stream.manifest import Manifest
from esm_stream.planning.opening import Opened, longest_sample, open_inputs
from esm_stream.planning.plan import ForwardPlan, Plan, Task
from esm_stream.planning.tasks import TaskBuilder, check_budget
from esm_stream.planning.treatments import Treatments
from esm_stream.store.work import SCHEMA
from esm_stream.write.shards import plan_shards


def make_plan(manifest: Manifest, *, check_memory: bool = True) -> Plan:
    """Plan a merge from headers alone.

    Args:
        manifest: A manifest with absolute paths.
        check_memory: Refuse a plan with a task over the budget.

    Raises:
        ManifestError, InputError, UnsupportedModelError, BudgetError: See opening.py and tasks.py.
    """
    return_freed_memory()
    opened = open_inputs(manifest)
    treatments = Treatments(opened)
    needed = any(matrix.moment for matrix in treatments.matrices.values())
    forward = _forward_plan(opened) if needed else None
    shard_size = _shard_size(opened)
    layouts = plan_shards(opened.base, manifest.output.dtype, shard_size)
    tasks = TaskBuilder(opened, treatments, forward, layouts).build()
    while forward is not None and _may_run_smaller(forward, tasks, manifest.run.memory):
        forward = replace(forward, micro_batch_tokens=forward.micro_batch_tokens // 2)
        tasks = TaskBuilder(opened, treatments, forward, layouts).build()
    if check_memory:
        check_budget(tasks, manifest.run.memory)
    return Plan(
        version=__version__,
        schema=SCHEMA,
        source=str(manifest.source or ""),
        manifest=manifest.model_dump(mode="json"),
        base=opened.base.root,
        experts={name: checkpoint.root for name, checkpoint in opened.experts.items()},
        fishers={e.name: e.fisher for e in manifest.experts if e.fisher and opened.fishers},
        work=manifest.work,
        output=manifest.output.path,
        output_dtype=manifest.output.dtype,
        shard_size=shard_size,
        memory=manifest.run.memory,
        modality=opened.modality,
        forward=forward,
        matrices=treatments.matrices,
        tensors=treatments.tensors,
        tasks=tasks,
        populations=treatments.populations,
        block_order=opened.block_order,
        layer_level=treatments.layer_level,
        lines_slope=treatments.lines_slope,
        notes=(*opened.notes, *treatments.unobserved(), *treatments.unused_patterns()),
    )


def _shard_size(opened: Opened) -> Literal["base"] | int:
    """As asked for; with other layers than the base's, its files are no layout: only their size."""
    asked = opened.manifest.output.shard_size
    if asked != "base" or opened.block_order is None:
        return asked
    return max(header.file_size for header in opened.base.headers)


def _forward_plan(opened: Opened) -> ForwardPlan:
    trace = opened.trace
    assert trace is not None
    tokens = _tokens_per_sample(opened)
    media = {k: v.numel() for k, v in opened.sample.items() if v.is_floating_point()}
    times = opened.manifest.calibration.samples * tokens / trace.sample_tokens
    return ForwardPlan(
        mode=trace.mode,
        why=trace.why,
        steps=tuple(replace(s, state_bytes=int(s.state_bytes * times)) for s in trace.steps),
        tokens_per_sample=tokens,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        dtype=opened.dtype,
        stem=trace.stem,
        outside=trace.outside,
        media=tuple(sorted(media)),
        elements=sum(media.values()),
    )


def _may_run_smaller(forward: ForwardPlan, tasks: Mapping[str, Task], memory: int) -> bool:
    """Whether the forward is over the budget, and fewer samples at a time might not be."""
    largest = max((t.peak_bytes for t in tasks.values() if t.stage == "forward"), default=0)
    return largest > memory and forward.micro_batch_tokens > forward.tokens_per_sample


def _tokens_per_sample(opened: Opened) -> int:
    """Tokens of one sample: exact for ready-made inputs and images, an upper bound for texts."""
    assert opened.trace is not None
    return max(longest_sample(opened.manifest), opened.trace.sample_tokens)
