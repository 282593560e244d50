"""The tasks of a merge: what each reads, writes and costs, and the fingerprint that decides resume.

From:  treatments.py (what is merged how), opening.py (headers).
To:    plan.py.

Order: inputs and stem of every expert; then block by block all experts (a real edge: no expert runs
block l + 1 before all have run block l, so that the base's block is read while it is in the page
cache) and the merges of that block; scales; writes; seals; finish.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from esm_stream import budget
from esm_stream.calibration.sources import GENERIC
from esm_stream.checkpoints.checkpoint import Checkpoint
from esm_stream.checkpoints.companions import model_files
from esm_stream.checkpoints.header import TensorInfo
from esm_stream.errors import BudgetError
from esm_stream.methods import elementwise_method, is_factor_method, method_of
from esm_stream.methods.contract import SpectralMethod
from esm_stream.planning.opening import Opened, source_of
from esm_stream.planning.plan import ChainPlan, Matrix, Task, digest, topological
from esm_stream.planning.treatments import Treatments
from esm_stream.write.shards import ShardLayout

GROUP_BYTES = 256 << 20
# Base tensors of one measuring task: its sums are kept, whatever it goes over.
MEASURE_BYTES = 4 << 30
# Widest intermediate of a block in units of one float32 per token and feature of its widest matrix:
# gate, up, their product, attention's q, k, v and output, norms.
ACTIVATION_BUFFERS = 8


class TaskBuilder:
    """Builds all tasks of one plan; methods return them stage by stage."""

    def __init__(
        self,
        opened: Opened,
        treatments: Treatments,
        chain: ChainPlan | None,
        layouts: Sequence[ShardLayout],
    ) -> None:
        self._opened = opened
        self._treatments = treatments
        self._chain = chain
        self._layouts = layouts
        self._num_experts = len(opened.experts)
        self._fingerprints: dict[str, str] = {}
        self._update_keys = {m.name: f"merge/{m.name}" for m in treatments.matrices.values()}

    def build(self) -> dict[str, Task]:
        """All tasks, each after those it depends on."""
        tasks = [*self._forward_stages(), *self._measures(), *self._merges()]
        tasks += self._scales()
        tasks += self._writes()
        return topological([*tasks, self._finish(tasks)])

    # Forward ---------------------------------------------------------------------------------

    def _forward_stages(self) -> Iterator[Task]:
        if self._chain is None:
            return
        for name in self._opened.experts:
            yield self._inputs(name)
        for name in self._opened.experts:
            yield self._stem(name)
        for block in range(self._chain.num_blocks):
            for name in self._opened.experts:
                yield self._forward(name, block)

    def _inputs(self, expert: str) -> Task:
        settings = self._opened.manifest.calibration
        named = {e.name: e for e in self._opened.manifest.experts}[expert]
        source = source_of(self._opened.manifest, named)
        drawn = settings.model_dump(mode="json", exclude={"data", "dtype", "min_samples"})
        size = self._hidden_tokens() * 8
        return self._task(
            f"inputs/{expert}",
            "inputs",
            after=(),
            identity=[drawn, _source_identity(source), _processor_identity(self._opened.base.root)],
            reads=(str(source),),
            writes=(f"inputs/{expert}.safetensors",),
            write_bytes=size,
            kept_bytes=size,
            peak_bytes=budget.TASK_OVERHEAD + 4 * size,
            expert=expert,
        )

    def _stem(self, expert: str) -> Task:
        assert self._chain is not None
        checkpoint = self._opened.experts[expert]
        outside = self._stem_tensors()
        hidden = self._hidden_bytes()
        return self._task(
            f"stem/{expert}",
            "stem",
            after=(f"inputs/{expert}",),
            identity=[
                self._chain,
                checkpoint.config,
                [checkpoint.identity(n) for n in outside],
            ],
            reads=tuple(outside),
            writes=(f"hidden/{expert}/0000.safetensors", f"hidden/{expert}/arguments.safetensors"),
            read_bytes=_sizes(checkpoint, self._converted(checkpoint, outside)),
            write_bytes=2 * hidden,
            kept_bytes=hidden,
            peak_bytes=budget.TASK_OVERHEAD + 6 * hidden + self._cast_bytes(checkpoint, outside),
            expert=expert,
        )

    def _forward(self, expert: str, block: int) -> Task:
        assert self._chain is not None
        checkpoint, chain = self._opened.experts[expert], self._chain
        tensors = self._tensors_of_block(block)
        matrices = [m for m in self._treatments.matrices.values() if m.moment and m.block == block]
        number = list(self._opened.experts).index(expert)
        before = [f"forward/{name}/{block - 1:04d}" for name in self._opened.experts]
        arrays = sum(self._factor_bytes(m) for m in matrices)
        hidden = self._hidden_bytes()
        return self._task(
            f"forward/{expert}/{block:04d}",
            "forward",
            after=(f"stem/{expert}", *(before if block else ())),
            depends=(before[number],) if block else (f"stem/{expert}",),
            identity=[
                chain,
                number,
                checkpoint.config,
                [checkpoint.identity(name) for name in tensors],
                [self._opened.base.identity(p.tensor) for m in matrices for p in m.parts],
                [[m.name, m.parts, m.rank, m.moment, m.leader] for m in matrices],
                [_method_identity(m, "factor", self._num_experts) for m in matrices],
            ],
            reads=tuple(tensors),
            writes=tuple(f"factors.zarr/{m.name}" for m in matrices),
            read_bytes=_sizes(checkpoint, tensors)
            + _sizes(self._opened.base, [p.tensor for m in matrices for p in m.parts]),
            write_bytes=arrays + (hidden if block + 1 < chain.num_blocks else 0),
            kept_bytes=arrays,
            flops=sum(self._forward_flops(m) for m in matrices)
            + 2.0 * self._hidden_tokens() * _numel(checkpoint, tensors),
            peak_bytes=self._forward_peak(checkpoint, tensors, matrices, block),
            expert=expert,
            block=block,
        )

    def _forward_flops(self, m: Matrix) -> float:
        tokens, side = self._hidden_tokens(), m.inputs if m.moment == "input" else m.outputs
        shift = 2.0 * tokens * m.outputs * m.inputs if m.moment == "shift" else 0.0
        return shift + 2.0 * tokens * side * side + budget.basis_flops(m.outputs, m.inputs, m.rank)

    def _forward_peak(
        self, checkpoint: Checkpoint, tensors: Sequence[str], matrices: Sequence[Matrix], block: int
    ) -> int:
        """Block (if converted), hidden states, all moments, one matrix being factored."""
        assert self._opened.chain is not None
        assert self._chain is not None
        sides: dict[object, int] = {}
        for m in matrices:
            kind = str(m.moment)
            key = m.leader if kind == "input" else m.name
            sides[key] = budget.moment_bytes(kind, m.outputs, m.inputs)
            if kind == "shift":
                sides[f"{m.name} update"] = m.outputs * m.inputs * budget.F64
        widest = max(
            (max(m.layout.outputs, m.layout.inputs) for m in self._opened.chain.matrices[block]),
            default=self._chain.width,
        )
        activations = self._micro_batch_tokens() * widest * budget.F32 * ACTIVATION_BUFFERS
        factoring = max((budget.basis_bytes(m.outputs, m.inputs) for m in matrices), default=0)
        return (
            budget.TASK_OVERHEAD
            + self._cast_bytes(checkpoint, tensors)
            + 4 * self._hidden_bytes()
            + sum(sides.values())
            + max(activations, factoring)
        )

    # Statistics ------------------------------------------------------------------------------

    def _measures(self) -> Iterator[Task]:
        """Sweeps over all tensors of a population, one after the other, each with its total."""
        for population, choice in self._treatments.populations.items():
            names = [
                plan.name
                for plan in self._treatments.tensors.values()
                if plan.population == population
            ]
            groups = list(_groups(names, self._opened.base.tensors, MEASURE_BYTES))
            before: tuple[str, ...] = ()
            for sweep in range(elementwise_method(choice).sweeps):
                keys = []
                for number, group in enumerate(groups):
                    key = f"measure/{population}/{sweep}/{number:04d}"
                    yield self._measure(key, population, sweep, group, before)
                    keys.append(key)
                total = f"total/{population}/{sweep}"
                yield self._task(
                    total,
                    "total",
                    after=tuple(keys),
                    identity=[choice.name],
                    writes=(f"statistics/{total}.safetensors",),
                    peak_bytes=budget.TASK_OVERHEAD + 2 * self._sums_bytes(),
                    subject=population,
                    sweep=sweep,
                )
                before = (*before, total)

    def _measure(
        self,
        key: str,
        population: str,
        sweep: int,
        names: Sequence[str],
        before: tuple[str, ...],
    ) -> Task:
        everyone = [self._opened.base, *self._opened.experts.values()]
        return self._task(
            key,
            "measure",
            after=before,
            identity=[
                self._treatments.populations[population],
                list(self._opened.experts),
                sweep,
                list(names),
                [c.identity(n) for c in everyone for n in names],
            ],
            reads=tuple(names),
            writes=(f"statistics/{key}.safetensors",),
            read_bytes=sum(_sizes(c, names) for c in everyone),
            write_bytes=self._sums_bytes(),
            kept_bytes=self._sums_bytes(),
            peak_bytes=budget.TASK_OVERHEAD + self._panel_bytes(names) + 3 * self._sums_bytes(),
            subject=population,
            tensors=tuple(names),
            sweep=sweep,
        )

    def _sums_bytes(self) -> int:
        """Sums of one sweep: at most two histograms per expert."""
        return 2 * self._num_experts * budget.HISTOGRAM_BYTES

    def _panel_bytes(self, names: Iterable[str]) -> int:
        """Panels of an elementwise method: base, updates, temporaries, rows of any length."""
        columns = max((self._opened.base.tensors[n].columns for n in names), default=1)
        return (
            8
            * (self._num_experts + 1)
            * budget.F64
            * max(budget.panel_elements(self._num_experts), columns)
        )

    # Merge -----------------------------------------------------------------------------------

    def _merges(self) -> Iterator[Task]:
        for matrix in self._treatments.matrices.values():
            yield self._merge(matrix)

    def _merge(self, m: Matrix) -> Task:
        names = [p.tensor for p in m.parts]
        update = m.outputs * m.inputs * budget.F32
        columns = m.rank * self._num_experts
        combine = budget.combine_bytes(m.outputs, m.inputs, columns)
        if m.moment:
            after = tuple(f"forward/{e}/{m.block:04d}" for e in self._opened.experts)
            read, peak, flops = 0, combine, 0.0
            identity: list[object] = []
        else:
            after = ()
            everyone = [self._opened.base, *self._opened.experts.values()]
            read = sum(_sizes(c, names) for c in everyone)
            factors = columns * (m.outputs + m.inputs) * budget.F64
            peak = max(combine, factors + budget.basis_bytes(m.outputs, m.inputs)) + factors
            flops = self._num_experts * budget.basis_flops(m.outputs, m.inputs, m.rank)
            method = method_of(m.method)
            if isinstance(method, SpectralMethod):
                shape = (m.outputs, m.inputs)
                peak = method.peak_numbers(shape, self._num_experts) * budget.F64
                flops = method.decompositions(self._num_experts) * budget.svd_flops(*shape)
            identity = [
                [c.identity(n) for c in everyone for n in names],
                _method_identity(m, "factor", self._num_experts),
                m.method.weights,
            ]
        return self._task(
            self._update_keys[m.name],
            "merge",
            after=after,
            identity=[
                m.name,
                m.parts,
                m.transposed,
                m.rank,
                [list(self._opened.experts)],
                _method_identity(m, "combine", self._num_experts),
                *identity,
            ],
            reads=() if m.moment else tuple(names),
            writes=tuple(f"factors.zarr/{n}/update" for n in names),
            read_bytes=read,
            write_bytes=update,
            kept_bytes=update,
            flops=flops + budget.combine_flops(m.outputs, m.inputs, columns),
            peak_bytes=budget.TASK_OVERHEAD + peak,
            subject=m.name,
        )

    def _scales(self) -> list[Task]:
        groups: dict[str, list[Matrix]] = {}
        for matrix in self._treatments.matrices.values():
            if matrix.scaled:
                groups.setdefault(matrix.group, []).append(matrix)
        exponent = self._treatments.profile.exponent if self._treatments.profile else 0.0
        return [
            self._task(
                f"scale/{group}",
                "scale",
                after=tuple(self._update_keys[m.name] for m in matrices),
                identity=[exponent, [m.name for m in matrices]],
                peak_bytes=budget.TASK_OVERHEAD,
                subject=group,
                tensors=tuple(m.name for m in matrices),
            )
            for group, matrices in groups.items()
        ]

    # Write -----------------------------------------------------------------------------------

    def _writes(self) -> Iterator[Task]:
        for layout in self._layouts:
            keys = []
            for number, names in enumerate(_groups(layout.tensors, layout.tensors, GROUP_BYTES)):
                task = self._write(f"write/{layout.file_name}/{number:04d}", layout, names)
                keys.append(task.key)
                yield task
            yield self._task(
                f"seal/{layout.file_name}",
                "seal",
                after=tuple(keys),
                identity=[layout.header.hex()],
                writes=(layout.file_name,),
                peak_bytes=budget.TASK_OVERHEAD,
                subject=layout.file_name,
            )

    def _write(self, key: str, layout: ShardLayout, names: Sequence[str]) -> Task:
        plans = [self._treatments.tensors[name] for name in names]
        after: list[str] = []
        depends, read = [], 0
        identity: list[object] = [layout.header.hex()]
        for plan in plans:
            read += self._opened.base.tensors[plan.name].nbytes
            identity.append([plan.name, plan.treatment, plan.alpha])
            identity.append(self._opened.base.identity(plan.name))
            if plan.population:
                sweeps = elementwise_method(self._treatments.populations[plan.population]).sweeps
                totals = [f"total/{plan.population}/{sweep}" for sweep in range(sweeps)]
                after += totals
                depends += totals
            if plan.treatment == "copy" and plan.source:
                identity.append(self._opened.experts[plan.source].identity(plan.name))
            if plan.treatment == "factors":
                matrix = self._treatments.matrices[str(plan.matrix)]
                merge, scale = self._update_keys[matrix.name], f"scale/{matrix.group}"
                depends.append(scale if matrix.scaled else merge)
                after += [merge, depends[-1]]
            elif plan.treatment != "copy":
                experts = self._opened.experts.values()
                identity += [e.identity(plan.name) for e in experts]
                identity.append(plan.method)
                if plan.treatment == "elementwise":
                    read += sum(_sizes(e, [plan.name]) for e in experts)
        widest = max((self._opened.base.tensors[n].row_nbytes for n in names), default=0)
        return self._task(
            key,
            "write",
            after=tuple(dict.fromkeys(after)),
            depends=tuple(dict.fromkeys(depends)),
            identity=identity,
            reads=tuple(names),
            writes=(layout.file_name,),
            read_bytes=read,
            write_bytes=sum(layout.tensors[name].nbytes for name in names),
            peak_bytes=budget.TASK_OVERHEAD
            + 6 * max(budget.PANEL_BYTES, 4 * widest)
            + 64 * budget.MIB,
            subject=layout.file_name,
            tensors=tuple(names),
        )

    def _finish(self, tasks: Sequence[Task]) -> Task:
        """The report reads the markers of all tasks, so it comes after all of them."""
        base = self._opened.base
        return self._task(
            "finish",
            "finish",
            after=tuple(task.key for task in tasks),
            depends=tuple(f"seal/{layout.file_name}" for layout in self._layouts),
            identity=[_folder_identity(base.root), [x.file_name for x in self._layouts]],
            writes=("config.json", "README.md", "report.json", "complete.json"),
            peak_bytes=budget.TASK_OVERHEAD,
        )

    # Shared ----------------------------------------------------------------------------------

    def _task(
        self,
        key: str,
        stage: str,
        *,
        after: tuple[str, ...],
        identity: object,
        depends: tuple[str, ...] | None = None,
        **rest: object,
    ) -> Task:
        """A task whose fingerprint covers its identity and that of the tasks it depends on.

        `depends` are the tasks whose results it uses, where others in `after` only order it.
        """
        parents = [self._fingerprints[k] for k in (after if depends is None else depends)]
        fingerprint = digest(stage, _plain(identity), parents)
        self._fingerprints[key] = fingerprint
        return Task(key=key, stage=stage, after=after, fingerprint=fingerprint, **rest)  # type: ignore[arg-type]

    def _tensors_of_block(self, block: int) -> list[str]:
        assert self._opened.skeleton is not None
        assert self._chain is not None
        module = f"{self._chain.prefix}.{block}"
        return list(self._opened.skeleton.tensors_of(module))

    def _stem_tensors(self) -> list[str]:
        assert self._opened.skeleton is not None
        assert self._chain is not None
        return list(self._opened.skeleton.tensors_for(self._chain.stem))

    def _hidden_tokens(self) -> int:
        assert self._chain is not None
        return self._opened.manifest.calibration.samples * self._chain.tokens_per_sample

    def _micro_batch_tokens(self) -> int:
        from esm_stream.calibration.proxies import MICRO_BATCH_TOKENS

        assert self._chain is not None
        return max(MICRO_BATCH_TOKENS, self._chain.tokens_per_sample)

    def _hidden_bytes(self) -> int:
        assert self._chain is not None
        return self._hidden_tokens() * self._chain.width * budget.F32

    def _factor_bytes(self, m: Matrix) -> int:
        """Stored factors of one expert."""
        thin = m.rank * (m.outputs + m.inputs) * budget.F32
        return thin + min(m.outputs, m.inputs) * budget.F64

    def _cast_bytes(self, checkpoint: Checkpoint, names: Iterable[str]) -> int:
        """Copies made of tensors that are not stored in the forward's dtype, or not on the CPU."""
        on_cpu = self._opened.manifest.run.device == "cpu"
        size = {"float32": 4, "float64": 8}.get(self._opened.dtype, 2)
        copied = self._converted(checkpoint, names) if on_cpu else names
        return sum(checkpoint.tensors[n].numel * size for n in copied)

    def _converted(self, checkpoint: Checkpoint, names: Iterable[str]) -> list[str]:
        """Float tensors that are not stored in the forward's dtype."""
        infos = [checkpoint.tensors[n] for n in names]
        dtype = self._opened.dtype
        return [i.name for i in infos if i.kind.is_float and i.kind.torch_name != dtype]


def _method_identity(m: Matrix, stage: Literal["factor", "combine"], num_experts: int) -> object:
    """What of a method's options decides its factors or their combination."""
    method = method_of(m.method)
    options = method.identity(stage) if is_factor_method(method) else m.method.options
    return [m.method.name, num_experts, options]


def check_budget(tasks: Mapping[str, Task], memory: int) -> None:
    """Refuse a plan with a task that can never run.

    Raises:
        BudgetError: The largest task, with the numbers.
    """
    largest = max(tasks.values(), key=lambda task: task.peak_bytes)
    if largest.peak_bytes > memory:
        over = sum(task.peak_bytes > memory for task in tasks.values())
        smaller = (
            ", or make the factors smaller: [merge.options] rank or rank_factor, or a rule with "
            'method = "average" for the largest matrices'
        )
        raise BudgetError(
            f"task '{largest.key}' needs {budget.format_size(largest.peak_bytes)} of memory; the "
            f"budget is {budget.format_size(memory)} ({over} of {len(tasks)} tasks are over it). "
            f"Raise [run] memory or --memory{smaller if largest.stage == 'merge' else ''}."
        )


def _groups(
    names: Iterable[str], tensors: Mapping[str, TensorInfo], limit_bytes: int
) -> Iterator[list[str]]:
    """Consecutive tensors, about `limit_bytes` together."""
    group: list[str] = []
    size = 0
    for name in names:
        if group and size + tensors[name].nbytes > limit_bytes:
            yield group
            group, size = [], 0
        group.append(name)
        size += tensors[name].nbytes
    if group:
        yield group


def _plain(value: object) -> object:
    """Dataclasses and tuples as JSON-like values."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _sizes(checkpoint: Checkpoint, names: Iterable[str]) -> int:
    return sum(checkpoint.tensors[name].nbytes for name in names)


def _numel(checkpoint: Checkpoint, names: Iterable[str]) -> int:
    return sum(checkpoint.tensors[name].numel for name in names)


def _source_identity(path: Path) -> object:
    """Sizes and times of calibration data: one file, or all files of a folder.

    The generic texts are known by their bytes: their times are those of the installation.
    """
    if path == GENERIC:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        return [[p.relative_to(path).as_posix(), *_stamp(p)] for p in files]
    return _stamp(path) if path.exists() else None


def _processor_identity(root: Path) -> object:
    """Tokenizer and processor files of a model."""
    return [[p.name, *_stamp(p)] for p in model_files(root) if p.name != "config.json"]


def _folder_identity(root: Path) -> object:
    return [[p.name, *_stamp(p)] for p in model_files(root)]


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
