"""The proof for one architecture: a merge whose forward is held against `from_pretrained`.

Digests of tensors are kept, not tensors. Of the merge: the output of every block as it comes by,
and every update with the moment that the method is handed. Of the plain model, on the same
micro-batches: the output of every block, and moments of what its kernels take (products.py).
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import xxhash
from architectures import Architecture
from making import draw, load, make_model, moved, save
from products import Products
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from esm_stream.calibration.arguments import load_batches
from esm_stream.calibration.moments import InputMoment, ShiftMoment
from esm_stream.calibration.skeleton import build_skeleton
from esm_stream.checkpoints.checkpoint import open_checkpoint
from esm_stream.checkpoints.reader import TensorReader
from esm_stream.engine import merge
from esm_stream.events import Event
from esm_stream.manifest import load_manifest
from esm_stream.methods.contract import Moment
from esm_stream.methods.esm import Esm
from esm_stream.planning.make import make_plan
from esm_stream.planning.plan import Matrix, Plan
from esm_stream.stages.context import task_context

AFTER_FORWARD = ("merge", "scale", "write", "seal", "finish")
EXPERTS = ("one", "two")
MANIFEST = """[base]
model = "base"
[[experts]]
name = "one"
model = "one"
calibration = "one.safetensors"
[[experts]]
name = "two"
model = "two"
calibration = "two.safetensors"
[merge]
method = "esm"
[merge.options]
targets = "all"
rank_factor = 0.25
[output]
path = "merged"
[run]
memory = "1GiB"
"""


@dataclass
class Streamed:
    """What came by during a merge; reads are bytes by directory and tensor."""

    blocks: Counter[str] = field(default_factory=Counter)
    moments: Counter[tuple[str, str, str, int]] = field(default_factory=Counter)
    reads: Counter[tuple[Path, str]] = field(default_factory=Counter)
    forward_reads: Counter[tuple[Path, str]] = field(default_factory=Counter)


@dataclass(frozen=True)
class Row:
    """What a proof has found: a line of the docs' table.

    `others` has the matrices that no moments were summed for, by reason; bytes are of one expert.
    """

    model: str
    mode: str
    why: str
    matrices: int
    others: dict[str, list[str]]
    read: int
    stored: int


def prove(architecture: Architecture, folder: Path) -> Row:
    """Merge two experts of one architecture, and hold the forward against the plain model's."""
    plan = make_case(architecture, folder)
    kinds = {type(block) for block in blocks_of(make_model(architecture, 0))}
    streamed = stream(plan, kinds)
    plain = [plain_run(architecture, plan, expert) for expert in EXPERTS]
    blocks = plain[0].blocks + plain[1].blocks
    missing = blocks - streamed.blocks
    assert blocks
    assert not missing, f"{missing.total()} of {blocks.total()} outputs of blocks are not the same"
    moments = plain[0].moments + plain[1].moments
    assert streamed.moments.total() == moments.total() > 0
    wrong = moments - streamed.moments
    assert not wrong or architecture.shared, f"{wrong.total()} moments are not the same"
    require_read_once(plan, streamed)
    return row_of(architecture, plan, streamed)


def row_of(architecture: Architecture, plan: Plan, streamed: Streamed) -> Row:
    """The line of an architecture that has passed."""
    assert plan.forward is not None
    root = plan.experts[EXPERTS[0]]
    tensors = open_checkpoint(root).tensors
    others: dict[str, list[str]] = {}
    for name, tensor in plan.tensors.items():
        if tensors[name].ndim > 1 and tensor.treatment != "factors":
            names = others.setdefault(tensor.why, [])
            short = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name.removesuffix(".weight"))
            short = ".".join(short.split(".")[-2:]).removeprefix("*.")
            if short not in names:
                names.append(short)
    return Row(
        architecture.model,
        plan.forward.mode,
        plan.forward.why,
        sum(matrix.moment is not None for matrix in plan.matrices.values()),
        others,
        sum(streamed.forward_reads[root, name] for name in tensors),
        sum(info.nbytes for info in tensors.values()),
    )


def require_read_once(plan: Plan, streamed: Streamed) -> None:
    """Each tensor of each expert is read at most once; one that parameters share, for each."""
    for root in plan.experts.values():
        tensors = open_checkpoint(root).tensors
        skeleton = build_skeleton(root, {n: t.shape for n, t in tensors.items()}, torch.float32)
        users = Counter(skeleton.stored.values())
        for name, info in tensors.items():
            read = streamed.forward_reads[root, name]
            most = info.nbytes * max(1, users[name])
            assert read <= most, f"'{name}': {read} bytes read, at most {most} are needed"


def make_case(architecture: Architecture, folder: Path) -> Plan:
    """Write base, experts, samples and manifest into a folder, and plan their merge."""
    base = make_model(architecture, 0)
    save(base, folder / "base")
    for number, name in enumerate(EXPERTS):
        save(moved(base, 100 + number), folder / name)
        draw(architecture, folder / f"{name}.safetensors", 200 + number)
    (folder / "manifest.toml").write_text(MANIFEST)
    return make_plan(load_manifest(folder / "manifest.toml"))


def stream(plan: Plan, kinds: set[type[nn.Module]]) -> Streamed:
    """Run a plan and keep digests of what blocks of these kinds return, and of all moments."""
    found = Streamed()

    def listen(event: Event) -> None:
        if event.kind == "task_finished" and event.stage not in AFTER_FORWARD:
            found.forward_reads += found.reads
        found.reads.clear()

    def keep(module: nn.Module, _: object, output: object) -> None:
        if type(module) in kinds:
            found.blocks[digest(first_tensor(output))] += 1

    with ExitStack() as undo:
        undo.callback(register_module_forward_hook(keep).remove)
        undo.enter_context(_factors_watched(found))
        undo.enter_context(_reads_watched(found))
        merge(plan, scheduler="sync", listener=listen)
    return found


@contextmanager
def _factors_watched(found: Streamed) -> Iterator[None]:
    plain = Esm.factor

    def factor(self: Esm, update_OI: Tensor, moment: Moment | None, num_experts: int) -> Any:  # noqa: ANN401
        found.moments[signature(update_OI, moment)] += 1
        return plain(self, update_OI, moment, num_experts)

    Esm.factor = factor  # type: ignore[method-assign]
    try:
        yield
    finally:
        Esm.factor = plain  # type: ignore[method-assign]


@contextmanager
def _reads_watched(found: Streamed) -> Iterator[None]:
    """Count the reads of each tensor; those of a lookup are not counted."""
    plain, lookup = TensorReader._bytes, TensorReader.lookup

    def read(self: TensorReader, name: str, start: int, stop: int) -> Tensor:
        found.reads[self.checkpoint.root, name] += stop - start
        return plain(self, name, start, stop)

    def look(self: TensorReader, name: str) -> Tensor:
        before = copy.copy(found.reads)
        value = lookup(self, name)
        found.reads = before
        return value

    TensorReader._bytes, TensorReader.lookup = read, look  # type: ignore[method-assign]
    try:
        yield
    finally:
        TensorReader._bytes, TensorReader.lookup = plain, lookup  # type: ignore[method-assign]


def plain_run(architecture: Architecture, plan: Plan, expert: str) -> Streamed:
    """The same of `from_pretrained`'s model of one expert, on the micro-batches of the merge."""
    model = load(architecture, plan.experts[expert])
    text = model.config.get_text_config()
    without_cache = {"use_cache": False} if hasattr(text, "use_cache") else {}
    found = Streamed()
    matrices = [matrix for matrix in plan.matrices.values() if matrix.moment]
    with task_context(plan, next(iter(plan.tasks.values()))) as context, ExitStack() as undo:
        updates = {m.name: context.update(expert, m) for m in matrices}
        sums: dict[str, list[tuple[Matrix, InputMoment | ShiftMoment]]] = {}
        for matrix in matrices:
            sums.setdefault(str(matrix.leader), []).append(
                (matrix, _empty(matrix, updates[matrix.name]))
            )
        for module in blocks_of(model):
            undo.callback(module.register_forward_hook(_keep_output(found)).remove)
        undo.enter_context(torch.no_grad())

        def add(key: str, x: Tensor) -> None:
            for _, moment in sums.get(key, ()):
                moment.add(x)

        undo.enter_context(Products(model, add))
        for batch in load_batches(plan.directory.inputs(expert)):
            torch.manual_seed(0)
            model(**{k: _as(model.dtype, v) for k, v in batch.items()}, **without_cache)
    for matrix, moment in chain.from_iterable(sums.values()):
        whole = moment.result()
        # Experts of a mixture with fewer tokens than the rank get no moment (methods.md 1.3).
        few = whole.tokens < (matrix.rank if matrix.routed else 1)
        found.moments[signature(updates[matrix.name], None if few else whole)] += 1
    return found


def _as(dtype: torch.dtype, value: Tensor) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _empty(matrix: Matrix, update_OI: Tensor) -> InputMoment | ShiftMoment:
    if matrix.moment == "shift":
        return ShiftMoment(update_OI)
    return InputMoment(matrix.inputs, update_OI.device)


def _keep_output(found: Streamed) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, output: object) -> None:  # noqa: ARG001
        found.blocks[digest(first_tensor(output))] += 1

    return hook


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Children of the outermost ModuleLists that hold parameters."""
    found: list[nn.Module] = []
    outer: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(o) for o in outer):
            children = [m for m in module if next(m.parameters(), None) is not None]
            if children:
                outer.append(f"{name}.")
                found += children
    return found


def first_tensor(value: Any) -> Tensor:  # noqa: ANN401 - what a block returns
    """The hidden state among a block's output."""
    if isinstance(value, Tensor):
        return value
    return first_tensor(value[0])


def signature(update_OI: Tensor, moment: Moment | None) -> tuple[str, str, str, int]:
    """An update and the moment that belongs to it, as digests."""
    if moment is None:
        return digest(update_OI), "none", "", 0
    return digest(update_OI), moment.kind, digest(moment.matrix), moment.tokens


def digest(value: Tensor) -> str:
    """Shape, dtype and bits of a tensor."""
    raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{tuple(value.shape)} {value.dtype} {xxhash.xxh3_128_hexdigest(raw)}"
