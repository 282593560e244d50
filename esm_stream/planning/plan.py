"""The plan: every matrix, tensor and task of a merge, from the manifest and headers alone.

From:  manifest.py; headers of base and experts; the model on the meta device. No tensor is read.
To:    `esm-stream plan` prints it; schedule.py runs it; stages/ look up in it what a task is about.

A task's fingerprint covers what decides its result: schema, options of its own stage, identities of
the tensors it reads, and the fingerprints of the tasks it depends on. Device, threads and scheduler
are not part of it. A task that finds its marker with the same fingerprint is skipped.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final, Literal, get_args

from pydantic import TypeAdapter

from esm_stream.calibration.steps import OUTSIDE, Mode, Step
from esm_stream.methods import at_depth
from esm_stream.scaling import Variant
from esm_stream.store.files import sealed, unsealed, write_atomically
from esm_stream.store.work import SCHEMA, WorkDirectory, in_merged

ALL: Final = "all"
Treatment = Literal["copy", "equal", "elementwise", "factors"]
Stage = Literal[
    "inputs",
    "stem",
    "forward",
    "measure",
    "total",
    "merge",
    "walk",
    "scale",
    "magnitudes",
    "lines",
    "write",
    "seal",
    "finish",
]
STAGES: Final[tuple[Stage, ...]] = get_args(Stage)
CALIBRATION: Final[frozenset[Stage]] = frozenset({"inputs", "stem", "forward"})
"""Stages that many merges can start from: everything up to the factors of every expert."""


@dataclass(frozen=True, slots=True)
class MethodChoice:
    """A method with its options, as `methods.create` takes them, and one weight per expert."""

    name: str
    options: dict[str, Any]
    modality: Literal["vision", "language"]
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """Outputs of a stored matrix that are outputs of a merged one: `outputs` of them from `start`.

    `slice` is the stored matrix's place in a stack, None for a tensor that is one matrix.
    """

    tensor: str
    outputs: int
    slice: int | None = None
    start: int = 0

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of the stored matrix, from the shape of its tensor."""
        if self.slice is None:
            return shape[0], math.prod(shape[1:])
        return shape[1], shape[2]


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix merged from factors: O outputs x I inputs, made of parts of stored tensors.

    `transposed`: stored as (I, O). `moment` and `leader`: which second moment of which input is
    needed, None for methods that need no data; `observed_in` is the block that it belongs to, or
    OUTSIDE, and `also` names what else is looked at, for a matrix that several blocks share.
    `routed`: of experts of a mixture, which may see too few tokens, how many inputs they get
    together for one token; 0 for other matrices. `scaled`: layer scaling applies. `summed`: merged
    from sums over the experts, not from factors of each. `walked`: its inputs are those in the
    merged model, and `order` says when in its block they are there. `svc`: lower bound of the
    projections of singular value calibration, None without.
    """

    name: str
    parts: tuple[Part, ...]
    outputs: int
    inputs: int
    transposed: bool
    role: str
    block: int | None
    method: MethodChoice
    alpha: float
    rank: int
    scaled: bool
    moment: Literal["input", "shift"] | None = None
    leader: str | None = None
    also: tuple[str, ...] = ()
    observed_in: str = OUTSIDE
    routed: float = 0.0
    summed: bool = False
    walked: bool = False
    order: int = 0
    svc: float | None = None

    @property
    def observed(self) -> bool:
        """Whether its inputs are observed in the experts' own forwards."""
        return self.moment is not None and not self.walked

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of its update in the store: as its parts are stored."""
        return (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)

    @property
    def group(self) -> str:
        """The layer group whose norms are compared: one role and one shape."""
        return f"{self.role}@{self.outputs}x{self.inputs}"


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What happens to one tensor of the output.

    "copy" takes the base's, or that of the expert named by `source`. "equal" tensors are copied
    too, but all experts have to agree with the base. `matrices` are those that "factors" cut it
    into. `population` names the tensors whose statistics this one shares; `depth` is how deep in
    the model it lies.
    """

    name: str
    treatment: Treatment
    alpha: float = 1.0
    method: MethodChoice | None = None
    matrices: tuple[str, ...] = ()
    why: str = ""
    source: str = ""
    population: str = ""
    depth: float = 0.0


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """How the experts' forwards are streamed; absent when no method needs data.

    `why` says what rules out the modes before `mode`; see calibration/trace.py. `outside` names the
    parameters outside the blocks that the forward uses, `stem` those it uses before the last block.
    `media` are the arguments for images and sounds of the sample that the plan was made with,
    `elements` the number of their elements. Samples run together up to `micro_batch_tokens`; a
    longer one runs alone.
    """

    mode: Mode
    why: str
    steps: tuple[Step, ...]
    tokens_per_sample: int
    micro_batch_tokens: int
    dtype: str
    stem: tuple[str, ...]
    outside: tuple[str, ...]
    media: tuple[str, ...]
    elements: int


@dataclass(frozen=True, slots=True)
class Task:
    """One unit of work; equal tasks are the same task.

    `block` is a step's number in the forward; `states` are the tasks whose hidden states it reads.

    `kept_bytes` is what of `write_bytes` stays in the work directory when the task is done; hidden
    states go as soon as the next block is done.
    """

    key: str
    stage: Stage
    after: tuple[str, ...]
    fingerprint: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    read_bytes: int = 0
    write_bytes: int = 0
    kept_bytes: int = 0
    flops: float = 0.0
    peak_bytes: int = 0
    expert: str = ""
    block: int = -1
    subject: str = ""
    tensors: tuple[str, ...] = ()
    sweep: int = -1
    states: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything `merge` will do, and what it costs.

    `block_order`: for every block of the output, the block of the inputs that it is made of.
    `layer_level`: exponent and variant of layer scaling, of the matrices that have it.
    `lines_slope`: what LiNeS adds from the first block to the last, if its first factor has to be
    found by a pass over the model.
    """

    version: str
    schema: int
    source: str
    manifest: dict[str, Any]
    base: Path
    experts: dict[str, Path]
    work: Path
    output: Path
    output_dtype: str
    shard_size: str | int
    memory: int
    modality: Literal["vision", "language"]
    forward: ForwardPlan | None
    matrices: dict[str, Matrix]
    tensors: dict[str, TensorPlan]
    tasks: dict[str, Task]
    populations: dict[str, MethodChoice] = field(default_factory=dict)
    fishers: dict[str, Path] = field(default_factory=dict)
    block_order: tuple[int, ...] | None = None
    layer_level: tuple[float, Variant] | None = None
    lines_slope: float | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def method(self) -> MethodChoice:
        """The merge's main method, with the options of the first block."""
        merge = self.manifest["merge"]
        options = at_depth(merge["method"], merge["options"], 0.0)
        return MethodChoice(merge["method"], options, self.modality)

    @property
    def directory(self) -> WorkDirectory:
        """The work directory of this merge."""
        return WorkDirectory(self.work, self.output)

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Experts in manifest order."""
        return tuple(self.experts)

    def states_of(self, task: Task) -> list[Path]:
        """Files of the hidden states that a task leaves for the next ones."""
        ways = [in_merged(name) for name in self.experts] if task.stage == "walk" else [task.expert]
        return [self.directory.hidden(way, task.block + 1) for way in ways]

    @cached_property
    def readers_of_state(self) -> dict[str, list[str]]:
        """The tasks that read a task's hidden states, in order."""
        found: dict[str, list[str]] = {key: [] for key in self.tasks}
        for task in self.tasks.values():
            for key in task.states:
                found[key].append(task.key)
        return found

    @cached_property
    def sums_filled_by(self) -> dict[str, list[Matrix]]:
        """Matrices whose sums a forward task adds to, by the task's key."""
        found: dict[str, list[Matrix]] = {}
        for matrix in self.matrices.values():
            if matrix.summed and matrix.observed:
                for expert in self.experts:
                    found.setdefault(forward_key(self, expert, matrix), []).append(matrix)
        return found

    @cached_property
    def transient_readers(self) -> dict[str, list[str]]:
        """The tasks that read a task's transient outputs: hidden states; a shard, by its seal."""
        found = {key: list(readers) for key, readers in self.readers_of_state.items()}
        for task in self.of_stage("seal"):
            for key in task.after:
                found[key].append(task.key)
        return found

    def parents(self, task: Task) -> list[str]:
        """Tasks whose results a task needs; forwards of other experts only come before it."""
        alone = task.stage == "forward"
        return [k for k in task.after if not alone or self.tasks[k].expert == task.expert]

    @cached_property
    def product_readers(self) -> dict[str, list[str]]:
        """The tasks that read what a task keeps in the work directory: all but passing states."""
        found: dict[str, list[str]] = {key: [] for key in self.tasks}
        for task in self.tasks.values():
            for key in self.products_read(task):
                found[key].append(task.key)
        return found

    def products_read(self, task: Task) -> tuple[str, ...]:
        """The tasks whose products a task reads."""
        if task.stage == "finish":
            return ()  # it reads markers
        if task.stage == "walk":
            return (*task.after, *(drawn.key for drawn in self.of_stage("inputs")))
        if task.stage not in ("stem", "forward"):
            return task.after
        assert self.forward is not None
        in_chain = self.forward.mode == "chain" and task.stage == "forward"
        stage = "stem" if in_chain and task.subject != OUTSIDE else "inputs"
        return (f"{stage}/{task.expert}",)

    def of_stage(self, stage: Stage) -> list[Task]:
        """Tasks of one stage, in order."""
        return [task for task in self.tasks.values() if task.stage == stage]

    @property
    def peak_bytes(self) -> int:
        """Memory of the largest task."""
        return max((task.peak_bytes for task in self.tasks.values()), default=0)

    @property
    def work_bytes(self) -> int:
        """Disk that the work directory will take at most."""
        return self.bytes_to_keep(self.tasks)

    def bytes_to_keep(self, keys: Iterable[str]) -> int:
        """Disk that tasks need in the work directory: what stays, and passing hidden states."""
        tasks = [self.tasks[key] for key in keys]
        passing = max(
            (t.write_bytes - t.kept_bytes for t in tasks if t.stage in ("stem", "forward")),
            default=0,
        )
        states = 2 * len(self.experts) * passing
        if self.forward is not None and self.forward.mode == "replay":
            states = sum(t.write_bytes - t.kept_bytes for t in tasks if t.stage == "forward")
            states += sum(t.write_bytes - t.kept_bytes for t in tasks if t.stage == "walk")
        else:
            walked = (t.write_bytes - t.kept_bytes for t in tasks if t.stage == "walk")
            states += 2 * max(walked, default=0)
        return sum(task.kept_bytes for task in tasks) + states

    @property
    def output_bytes(self) -> int:
        """Bytes of the merged model."""
        return sum(task.write_bytes for task in self.of_stage("write"))

    @property
    def read_bytes(self) -> int:
        """Bytes of tensors that all tasks read from base and experts."""
        return sum(task.read_bytes for task in self.tasks.values())

    @property
    def flops(self) -> float:
        """Estimated floating-point operations of all tasks."""
        return sum(task.flops for task in self.tasks.values())

    def dump(self) -> bytes:
        """The plan as JSON."""
        return _adapter().dump_json(self, indent=1)


@lru_cache(maxsize=1)
def _adapter() -> TypeAdapter[Plan]:
    return TypeAdapter(Plan)


def forward_key(plan: Plan, expert: str, matrix: Matrix) -> str:
    """The task in which an expert's input of a matrix is observed."""
    assert plan.forward is not None
    return forward_task(plan.forward, expert, matrix.observed_in)


def forward_task(forward: ForwardPlan, expert: str, where: str) -> str:
    """The task that runs a block (or what is OUTSIDE) of an expert's forward."""
    if forward.mode == "resident":
        return f"forward/{expert}/{ALL}"
    if where == OUTSIDE:
        return f"forward/{expert}/{OUTSIDE}"
    number = next(i for i, step in enumerate(forward.steps) if step.block == where)
    return f"forward/{expert}/{number:04d}"


def walk_task(forward: ForwardPlan, where: str) -> str:
    """The task that merges a block's matrices by the merged model's inputs."""
    number = next(i for i, step in enumerate(forward.steps) if step.block == where)
    return f"walk/{number:04d}"


def update_key(plan: Plan, matrix: Matrix) -> str:
    """The task that makes the merged update of a matrix."""
    if not matrix.walked:
        return f"merge/{matrix.name}"
    assert plan.forward is not None
    return walk_task(plan.forward, matrix.observed_in)


def update_results(plan: Plan, matrix: Matrix) -> dict[str, Any]:
    """Norm and diagnostics of a merged update, from the marker of the task that made it."""
    results = plan.directory.results(update_key(plan, matrix))
    found: dict[str, Any] = results[matrix.name]["merged"] if matrix.walked else results
    return found


def observed_results(plan: Plan, expert: str, matrix: Matrix) -> dict[str, Any]:
    """What the task that saw an expert's inputs of a matrix says of it: norms and tokens."""
    found: dict[str, Any]
    if matrix.walked:
        found = plan.directory.results(update_key(plan, matrix))[matrix.name]["experts"][expert]
    else:
        found = plan.directory.results(forward_key(plan, expert, matrix))[matrix.name]
    return found


def save_plan(plan: Plan) -> None:
    """Write a plan into its work directory, for the processes that run its tasks."""
    write_atomically(plan.directory.plan, sealed(plan.dump()))


def load_plan(path: Path) -> Plan:
    """Read a plan written by `save_plan`; kept in memory until the file changes.

    Raises:
        ValueError: The file is not a plan of this version, or not what was written.
    """
    status = path.stat()
    return _load(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4)
def _load(path: Path, mtime_ns: int, size: int) -> Plan:  # noqa: ARG001 - parts of the cache's key
    return _adapter().validate_json(unsealed(path.read_bytes()))


def digest(*parts: Any) -> str:  # noqa: ANN401 - anything JSON can hold
    """Fingerprint of JSON-like values, independent of key order and of the machine."""
    text = json.dumps([SCHEMA, *parts], sort_keys=True, default=str, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def flatten(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested document by their dotted path: ("merge.alpha", 1.0)."""
    for key, value in document.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}.")
        elif isinstance(value, Sequence) and not isinstance(value, str) and value:
            named = {
                f"[{item['name']}]"
                if isinstance(item, Mapping) and "name" in item
                else f"[{i}]": item
                for i, item in enumerate(value)
            }
            yield from flatten(named, name)
        else:
            yield name, value


# Keys that say where and how, not what: they may change between a run and its resumption.
UNBOUND: Final = ("run.", "output.path")


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Lines "merge.alpha: 1.0 -> 0.8" for every key that binds a work directory and differs."""
    old, new = dict(flatten(before)), dict(flatten(after))
    lines = []
    for key in sorted({*old, *new}):
        if key.startswith(UNBOUND) or old.get(key, _ABSENT) == new.get(key, _ABSENT):
            continue
        if any(other.startswith(f"{key}[") for other in (*old, *new)):
            continue  # an empty list that is filled, or the other way: its items tell
        shown = [repr(side[key]) if key in side else "(absent)" for side in (old, new)]
        lines.append(f"{key}: {shown[0]} -> {shown[1]}")
    return lines


_ABSENT: Final = object()


def topological(tasks: Iterable[Task]) -> dict[str, Task]:
    """Tasks by key, each after those it depends on, otherwise in the order given."""
    pending = {task.key: task for task in tasks}
    ordered: dict[str, Task] = {}
    while pending:
        ready = [t for t in pending.values() if all(key in ordered for key in t.after)]
        if not ready:
            raise ValueError(f"tasks depend on each other in a circle: {sorted(pending)[:5]}")
        for task in ready:
            ordered[task.key] = pending.pop(task.key)
    return ordered
