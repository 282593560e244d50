"""One expert's forward, in a process of its own: streamed or in memory, with or without moments.

python tests/benchmarks/forward.py streamed|plain nothing|moments DIR RESULT.json [DEVICE]

The streamed one runs the tasks that a merge runs, in their order, without factoring the moments.
The plain one is `from_pretrained` and the model's own forward on the same micro-batches, without
the head. Both start from imported modules; what they measure themselves goes to RESULT.json.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.models.llama import modeling_llama

from esm_stream.calibration.arguments import load_batches
from esm_stream.calibration.hooks import observe_inputs
from esm_stream.calibration.moments import InputMoment, ShiftMoment
from esm_stream.manifest import load_manifest
from esm_stream.planning.make import make_plan
from esm_stream.planning.plan import Plan, Task, save_plan
from esm_stream.schedule import run_task
from esm_stream.stages import expert, forward, inputs, observation, stem  # noqa: F401 - beforehand
from esm_stream.stages.context import task_context

EXPERT = "e0"
Measured = dict[str, Any]


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


def prepare(folder: Path, device: str) -> Plan:
    """The plan of the manifest, in its work directory, and the inputs drawn."""
    manifest = load_manifest(folder / "manifest.toml")
    run = manifest.run.model_copy(update={"device": device})
    plan = make_plan(manifest.model_copy(update={"run": run}))
    plan.directory.root.mkdir(parents=True, exist_ok=True)
    save_plan(plan)
    for task in plan.of_stage("inputs")[:1]:
        run_task(str(plan.directory.plan), task.key)
    return plan


class Computing:
    """How long a GPU computes blocks, by events around each; nothing on a CPU."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device != "cpu"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._started = time.perf_counter()

    def around(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """The same computation, measured."""
        if not self._on_gpu:
            return compute

        def measured(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            result = compute(*args, **kwargs)
            events[1].record()
            self._events.append(events)
            return result

        return measured

    def figures(self) -> Measured:
        """Share of the time since the start that the GPU computed, and its peak memory."""
        if not self._on_gpu:
            return {}
        torch.cuda.synchronize()
        wall = time.perf_counter() - self._started
        busy = sum(before.elapsed_time(after) for before, after in self._events) / 1000
        return {"computing": busy / wall, "device_peak": torch.cuda.max_memory_allocated()}


def streamed(folder: Path, observed: str, device: str) -> Measured:
    """Run stem and forward tasks of one expert."""
    observation.Observation.factor = lambda self, result: None  # type: ignore[method-assign] # noqa: ARG005
    if observed == "nothing":
        keep = observation.Observation.__init__

        def see_nothing(self: Any, context: Any, matrices: Any) -> None:  # noqa: ANN401, ARG001
            keep(self, context, [])

        observation.Observation.__init__ = see_nothing  # type: ignore[method-assign]
    plan = prepare(folder, device)
    started, computing = time.process_time(), Computing(device)
    expert.Expert.compute = computing.around(expert.Expert.compute)  # type: ignore[method-assign]
    keys = [
        t.key for t in plan.tasks.values() if t.stage in ("stem", "forward") and t.expert == EXPERT
    ]
    for key, following in zip(keys, [*keys[1:], ""], strict=True):
        run_task(str(plan.directory.plan), key, following=following)
    seconds = time.process_time() - started
    read = sum(plan.directory.results(key)["bytes_read_experts"] for key in keys)
    figures = computing.figures()
    return {"cpu_seconds": seconds, "bytes_read": read, **figures, **sizes(plan)}


def sizes(plan: Plan) -> Measured:
    """Bytes of the parts that a peak is made of: largest block, hidden states, activations."""
    from esm_stream.checkpoints.checkpoint import open_checkpoint

    assert plan.forward is not None
    found = open_checkpoint(plan.experts[EXPERT])
    blocks = [t for t in plan.of_stage("forward") if t.block >= 0]
    config = found.config
    tokens = [b["input_ids"].numel() for b in load_batches(plan.directory.inputs(EXPERT))]
    # One micro-batch at its widest: gate, up and their product, residual and normalised input.
    width = 3 * config["intermediate_size"] + 2 * config["hidden_size"]
    stored = [sum(found.tensors[n].nbytes for n in t.reads) for t in blocks]
    return {
        "block": max(stored),
        "hidden": 2 * sum(tokens) * config["hidden_size"],
        "activations": 2 * max(tokens) * width,
        "stored": sum(info.nbytes for info in found.tensors.values()),
        "mode": plan.forward.mode,
    }


def plain(folder: Path, observed: str, device: str) -> Measured:
    """Load one expert whole and run it without its head."""
    plan = prepare(folder, device)
    started, computing = time.process_time(), Computing(device)
    model = modeling_llama.LlamaForCausalLM.from_pretrained(
        plan.experts[EXPERT], dtype=torch.bfloat16
    )
    model = model.eval().to(device)  # type: ignore[arg-type]
    run_model = computing.around(model.model)
    loaded = time.process_time()
    moments = moments_of(plan, plan.of_stage("forward")[0]) if observed == "moments" else {}

    def see(key: str, x: torch.Tensor) -> None:
        for one in moments[key].values():
            one.add(x)

    with torch.no_grad(), observe_inputs(model.model, see, moments, prefix="model"):
        for batch in load_batches(plan.directory.inputs(EXPERT)):
            run_model(**{k: v.to(device) for k, v in batch.items()}, use_cache=False)
    return {
        "cpu_seconds": time.process_time() - started,
        "load_seconds": loaded - started,
        "bytes_read": sum(v.numel() * v.element_size() for v in model.parameters()),
        **computing.figures(),
    }


def moments_of(plan: Plan, task: Task) -> dict[str, dict[str, InputMoment | ShiftMoment]]:
    """Empty moments by observed matrix, as the streamed forward has them."""
    found: dict[str, dict[str, InputMoment | ShiftMoment]] = {}
    with task_context(plan, task) as context:
        for matrix in plan.matrices.values():
            if matrix.moment == "shift":
                moment: InputMoment | ShiftMoment = ShiftMoment(context.update(EXPERT, matrix))
                found.setdefault(str(matrix.leader), {})[matrix.name] = moment
            elif matrix.moment == "input":
                module = found.setdefault(str(matrix.leader), {})
                module.setdefault("input", InputMoment(matrix.inputs, context.device))
    return found


def main() -> None:
    """Measure one of them."""
    how, observed, folder, result, *device = sys.argv[1:]
    base = anonymous_bytes()
    run = streamed if how == "streamed" else plain
    measured = run(Path(folder), observed, *(device or ["cpu"]))
    Path(result).write_text(json.dumps({"base": base, **measured}))


if __name__ == "__main__":
    main()
