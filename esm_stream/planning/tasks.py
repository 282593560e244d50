"""The tasks of a merge: what each reads, writes and costs, and the fingerprint that decides resume.

From:  treatments.py (what is merged how), opening.py (headers).
To:    plan.py.

Order: inputs and stem of every expert; then block by block all experts (a real edge: no expert runs
block l + 1 before all have run block l, so that the base's block is read while it is in the page
cache) and the merges of that block; scales; writes; seals; finish.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from esm_stream import budget
from esm_stream.calibration.sources import GENERIC
from esm_stream.calibration.steps import OUTSIDE
from esm_stream.checkpoints.checkpoint import Checkpoint
from esm_stream.checkpoints.companions import model_files
from esm_stream.checkpoints.header import TensorInfo
from esm_stream.checkpoints.layout import ShardLayout
from esm_stream.errors import BudgetError
from esm_stream.methods import elementwise_method, is_factor_method, method_of
from esm_stream.methods.contract import ElementwiseMethod, SpectralMethod, SumMethod
from esm_stream.methods.fisher import Fisher
from esm_stream.methods.regmean import RegMean
from esm_stream.planning.opening import Opened, source_of
from esm_stream.planning.plan import (
    ALL,
    ForwardPlan,
    Matrix,
    MethodChoice,
    Task,
    digest,
    forward_task,
    topological,
    walk_task,
)
from esm_stream.planning.treatments import Treatments
from esm_stream.scaling.singular import calibration_numbers

GROUP_BYTES = 256 << 20
WALK_BEGIN = "walk/begin"
# Base tensors of one measuring task: its sums are kept, whatever it goes over.
MEASURE_BYTES = 4 << 30
# Widest intermediate of a block in units of one float32 per token and feature of its widest matrix:
# gate, up, their product, attention's q, k, v and output, norms.


class TaskBuilder:
    """Builds all tasks of one plan; methods return them stage by stage."""

    def __init__(
        self,
        opened: Opened,
        treatments: Treatments,
        forward: ForwardPlan | None,
        layouts: Sequence[ShardLayout],
    ) -> None:
        self._opened = opened
        self._treatments = treatments
        self._forward = forward
        self._steps = tuple(step.block for step in forward.steps) if forward else ()
        self._block_tensors: dict[str, list[str]] = {}
        self._buffers_outside = _buffers_outside(opened, self._steps)
        self._layouts = layouts
        self._num_experts = len(opened.experts)
        self._fingerprints: dict[str, str] = {}
        self._update_keys = {
            m.name: walk_task(forward, m.observed_in) if forward and m.walked else f"merge/{m.name}"
            for m in treatments.matrices.values()
        }

    def build(self) -> dict[str, Task]:
        """All tasks, each after those it depends on."""
        tasks = [*self._forward_stages(), *self._measures(), *self._merges()]
        tasks += self._walks()
        tasks += self._scales()
        tasks += self._lines()
        tasks += self._writes()
        return topological([*tasks, self._finish(tasks)])

    # Forward ---------------------------------------------------------------------------------

    def _forward_stages(self) -> Iterator[Task]:
        if self._forward is None:
            return
        experts = list(self._opened.experts)
        for name in experts:
            yield self._inputs(name)
        if not self._matrices_in(ALL):
            return
        if self._forward.mode == "resident":
            for name in experts:
                yield self._all_of(name)
            return
        if self._forward.mode == "chain":
            for name in experts:
                yield self._stem(name)
        for block in range(len(self._forward.steps)):
            for name in experts:
                yield self._block(name, block)
        if self._matrices_in(OUTSIDE):
            for name in experts:
                yield self._outside(name)

    def _inputs(self, expert: str) -> Task:
        assert self._forward is not None
        settings = self._opened.manifest.calibration
        named = {e.name: e for e in self._opened.manifest.experts}[expert]
        source = source_of(self._opened.manifest, named)
        drawn = settings.model_dump(mode="json", exclude={"data", "dtype", "min_samples"})
        # Two int64 per token (encoder and decoder, ids and types); images and sounds in float32.
        media = settings.samples * self._forward.elements * budget.F32
        size = 2 * self._hidden_tokens() * 8 + media
        return self._task(
            f"inputs/{expert}",
            "inputs",
            after=(),
            identity=[
                drawn,
                self._forward.micro_batch_tokens,
                self._forward.tokens_per_sample,
                self._forward.elements,
                _source_identity(source),
                _processor_identity(self._opened.base.root),
            ],
            reads=(str(source),),
            writes=(f"inputs/{expert}.safetensors",),
            write_bytes=size,
            kept_bytes=size,
            peak_bytes=budget.TASK_OVERHEAD + 4 * size,
            expert=expert,
        )

    def _stem(self, expert: str) -> Task:
        assert self._forward is not None
        checkpoint = self._opened.experts[expert]
        used = self._tensors_outside(checkpoint, self._forward.stem)
        hidden = self._forward.steps[0].state_bytes
        return self._task(
            f"stem/{expert}",
            "stem",
            after=(f"inputs/{expert}",),
            identity=self._skeleton_identity(expert, self._forward.stem),
            reads=tuple(used),
            writes=(f"hidden/{expert}/0000.safetensors", f"hidden/{expert}/arguments.safetensors"),
            read_bytes=_sizes(checkpoint, self._converted(checkpoint, used)),
            write_bytes=2 * hidden,
            kept_bytes=hidden,
            peak_bytes=budget.TASK_OVERHEAD + 3 * hidden + self._cast_bytes(checkpoint, used),
            expert=expert,
        )

    def _skeleton_identity(self, expert: str, parameters: Sequence[str]) -> list[object]:
        """What decides a pass over what is outside the blocks."""
        checkpoint = self._opened.experts[expert]
        tensors = self._tensors_outside(checkpoint, parameters)
        return [self._forward, checkpoint.config, [checkpoint.identity(n) for n in tensors]]

    def _block(self, expert: str, block: int) -> Task:
        """One block of one expert; in replay mode with a pass over the skeleton before it."""
        assert self._forward is not None
        step, chain = self._forward.steps[block], self._forward.mode == "chain"
        experts = list(self._opened.experts)
        if block:
            before = [forward_task(self._forward, e, self._steps[block - 1]) for e in experts]
        else:
            before = [f"stem/{e}" if chain else f"inputs/{e}" for e in experts]
        own = before[experts.index(expert)]
        states = self._states_before(expert, block)
        hidden = step.state_bytes if self._is_read(block) else 0
        inside = self._tensors_of_block(step.block)
        parameters = () if chain else self._forward.stem
        stem = (f"stem/{expert}",) if chain else ()
        return self._forward_task(
            expert,
            step.block,
            after=(own, *(before if block else ()), *states, *stem),
            depends=(own, *states),
            identity=[] if chain else self._skeleton_identity(expert, self._forward.stem),
            tensors=inside,
            outside=parameters,
            states=states or ((own,) if chain else ()),
            hidden_bytes=hidden,
            block=block,
        )

    def _outside(self, expert: str) -> Task:
        """What is outside the blocks, on the outputs of all blocks."""
        assert self._forward is not None
        states = self._states_before(expert, len(self._forward.steps))
        last = forward_task(self._forward, expert, self._steps[-1])
        return self._forward_task(
            expert,
            OUTSIDE,
            after=(f"inputs/{expert}", last, *states),
            depends=(f"inputs/{expert}", last, *states),
            identity=self._skeleton_identity(expert, self._forward.outside),
            tensors=[],
            outside=self._forward.outside,
            states=states,
            hidden_bytes=0,
            subject=OUTSIDE,
        )

    def _all_of(self, expert: str) -> Task:
        """The whole forward of one expert."""
        assert self._forward is not None
        inside = [name for block in self._steps for name in self._tensors_of_block(block)]
        return self._forward_task(
            expert,
            ALL,
            after=(f"inputs/{expert}",),
            depends=(f"inputs/{expert}",),
            identity=self._skeleton_identity(expert, self._forward.outside),
            tensors=list(dict.fromkeys(inside)),
            outside=self._forward.outside,
            states=(),
            hidden_bytes=0,
            subject=ALL,
        )

    def _forward_task(
        self,
        expert: str,
        where: str,
        *,
        after: Sequence[str],
        depends: Sequence[str],
        identity: list[object],
        tensors: Sequence[str],
        outside: Sequence[str],
        states: Sequence[str],
        hidden_bytes: int,
        block: int = -1,
        subject: str = "",
    ) -> Task:
        """A task of the forward with the matrices observed in it."""
        assert self._forward is not None
        checkpoint, base = self._opened.experts[expert], self._opened.base
        used = self._tensors_outside(checkpoint, outside)
        matrices = self._matrices_in(where)
        parts = _tensors_of(matrices)
        # What is outside is looked up, not read; a matrix there is read for its update.
        own = [*tensors, *(n for n in parts if n not in set(tensors))]
        arrays = sum(self._factor_bytes(m) for m in matrices)
        key = (
            f"forward/{expert}/{ALL}"
            if where == ALL
            else forward_task(self._forward, expert, where)
        )
        return self._task(
            key,
            "forward",
            after=tuple(dict.fromkeys(after)),
            depends=tuple(dict.fromkeys(depends)),
            identity=[
                self._forward,
                # What is summed up goes by names; factors have their place in arrays of all.
                expert
                if all(m.summed for m in matrices)
                else list(self._opened.experts).index(expert),
                checkpoint.config,
                identity,
                [checkpoint.identity(name) for name in own],
                [base.identity(name) for name in parts],
                [[m.name, m.parts, m.rank, m.moment, m.leader, m.also] for m in matrices],
                [_method_identity(m, "factor", self._num_experts) for m in matrices],
            ],
            reads=tuple(own),
            writes=tuple(f"{'sums' if m.summed else 'factors.zarr'}/{m.name}" for m in matrices),
            read_bytes=_sizes(checkpoint, [*own, *self._converted(checkpoint, used)])
            + sum(_part_bytes(base, m) for m in matrices),
            write_bytes=arrays + hidden_bytes,
            kept_bytes=arrays,
            flops=sum(self._moment_flops(m) for m in matrices)
            + 2.0 * self._hidden_tokens() * _numel(checkpoint, tensors),
            peak_bytes=self._forward_peak(checkpoint, tensors, used, matrices, states),
            expert=expert,
            block=block,
            subject=subject,
            states=tuple(states),
        )

    def _states_before(self, expert: str, block: int) -> tuple[str, ...]:
        """Tasks whose outputs a pass up to a block needs: all but those only handed on."""
        assert self._forward is not None
        if self._forward.mode == "chain" and block < len(self._forward.steps):
            return ()
        return tuple(
            forward_task(self._forward, expert, step.block)
            for number, step in enumerate(self._forward.steps[:block])
            if not step.handed_on or number + 1 == block
        )

    def _is_read(self, block: int) -> bool:
        """Whether any task needs a block's output."""
        assert self._forward is not None
        last = block + 1 == len(self._forward.steps)
        return not last or bool(self._matrices_in(OUTSIDE))

    def _matrices_in(self, where: str) -> list[Matrix]:
        matrices = [m for m in self._treatments.matrices.values() if m.observed]
        return matrices if where == ALL else [m for m in matrices if m.observed_in == where]

    def _moment_flops(self, m: Matrix) -> float:
        tokens, side = self._hidden_tokens(), m.inputs if m.moment == "input" else m.outputs
        shift = 2.0 * tokens * m.outputs * m.inputs if m.moment == "shift" else 0.0
        if m.summed:
            return 1.0 * tokens * side * side + _term_flops(m)
        return shift + 1.0 * tokens * side * side + budget.basis_flops(m.outputs, m.inputs, m.rank)

    def _forward_peak(
        self,
        checkpoint: Checkpoint,
        tensors: Sequence[str],
        outside: Sequence[str],
        matrices: Sequence[Matrix],
        states: Sequence[str],
    ) -> int:
        """Block (if converted or copied), hidden states, moments, one matrix being factored.

        Of the whole forward (resident) the largest block counts, and all passes wait with a state.
        """
        assert self._forward is not None
        whole = self._forward.mode == "resident"
        groups: dict[str, list[Matrix]] = {}
        for m in matrices:
            groups.setdefault(m.observed_in, []).append(m)
        moments = {where: self._moments_bytes(group) for where, group in groups.items()}
        kept = moments.pop(OUTSIDE, 0) if whole else 0
        blocks = [tensors]
        if whole:
            blocks = [self._tensors_of_block(block) for block in self._steps]
        weights = [
            self._cast_bytes(checkpoint, names)
            + self._transfer_bytes(checkpoint, names, groups.get(block, matrices))
            for block, names in zip(self._steps if whole else ("",), blocks, strict=True)
        ]
        largest = max((s.state_bytes for s in self._forward.steps), default=0)
        widest = max((max(m.outputs, m.inputs) for m in matrices), default=0)
        activations = budget.activation_bytes(self._micro_batch_tokens(), widest)
        factoring = max((self._factoring_bytes(m) for m in matrices), default=0)
        return (
            budget.TASK_OVERHEAD
            + max(weights, default=0)
            + self._cast_bytes(checkpoint, self._converted(checkpoint, outside))
            + max(3, len(states) + 2) * largest
            + kept
            + max(moments.values(), default=0)
            + max(activations, factoring)
        )

    def _factoring_bytes(self, m: Matrix) -> int:
        """Peak of what is made of one moment and update: factors, or a term of sums."""
        method = method_of(m.method)
        if isinstance(method, SumMethod):
            return _term_bytes(method, m)
        return budget.basis_bytes(m.outputs, m.inputs, m.rank)

    def _moments_bytes(self, matrices: Sequence[Matrix]) -> int:
        """Moments of matrices that are observed together.

        Of the experts of a mixture each keeps its tokens as long as they are fewer than its inputs.
        """
        sizes: dict[str, int] = {}
        stacks: dict[tuple[str, int], tuple[set[str], float]] = {}
        for m in matrices:
            kind, leader = str(m.moment), str(m.leader)
            number = budget.F32 if m.summed and not m.walked else budget.F64
            size = budget.moment_bytes(kind, m.outputs, m.inputs, number)
            if m.routed:
                stack = stacks.setdefault((leader.partition("#")[0], m.inputs), (set(), m.routed))
                stack[0].add(leader)
            elif kind == "input":
                sizes[leader] = max(size, sizes.get(leader, 0))
            else:
                sizes[f"{m.name} shift"] = size
        total = sum(sizes.values())
        for (_, inputs), (leaders, routed) in stacks.items():
            moment = budget.moment_bytes("input", inputs, inputs)
            rows = int(self._hidden_tokens() * routed)
            # Those that get as many tokens as they have inputs begin a sum.
            begun = rows // inputs + 1
            kept = rows * inputs * budget.F32
            total += min(len(leaders) * moment, begun * moment + kept)
        return total

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
        everyone = self._models([self._treatments.populations[population]])
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
            read_bytes=sum(_update_sizes(c, names) for c in everyone),
            write_bytes=self._sums_bytes(),
            kept_bytes=self._sums_bytes(),
            peak_bytes=budget.TASK_OVERHEAD + self._panel_bytes(names) + 3 * self._sums_bytes(),
            subject=population,
            tensors=tuple(names),
            sweep=sweep,
        )

    def _models(self, choices: Iterable[MethodChoice | None]) -> list[Checkpoint]:
        """Base and experts, and the experts' Fisher information where a method needs it."""
        models = [self._opened.base, *self._opened.experts.values()]
        if any(choice is not None and choice.name == Fisher.name for choice in choices):
            models += self._opened.fishers.values()
        return models

    def _sums_bytes(self) -> int:
        """Sums of one sweep: at most two histograms per expert."""
        return 2 * self._num_experts * budget.HISTOGRAM_BYTES

    def _panel_bytes(self, names: Iterable[str]) -> int:
        """Panels of an elementwise method: base, updates, temporaries, rows of any length.

        And the factors of adapters, of one tensor.
        """
        factors = max(
            (
                sum(e.rank(name) or 0 for e in self._opened.experts.values())
                * (info.num_rows + info.columns)
                for name in names
                if (info := self._opened.base.tensors[name])
            ),
            default=0,
        )
        columns = max((self._opened.base.tensors[n].columns for n in names), default=1)
        return (
            8
            * (self._num_experts + 1)
            * budget.F64
            * max(budget.panel_elements(self._num_experts), columns)
            + factors * 2 * budget.F32
        )

    # Merge -----------------------------------------------------------------------------------

    def _merges(self) -> Iterator[Task]:
        for matrix in self._treatments.matrices.values():
            if not matrix.walked:
                yield self._merge(matrix)

    def _merge(self, m: Matrix) -> Task:
        names = _tensors_of([m])
        update = m.outputs * m.inputs * budget.F32
        sums = _sums_bytes(m) if m.summed and not m.moment else 0
        columns = m.rank * self._num_experts
        method = method_of(m.method)
        stacks = is_factor_method(method) and method.forms_stacks
        combine = budget.combine_bytes(m.outputs, m.inputs, columns, forms_stacks=stacks)
        if isinstance(method, RegMean):
            combine = method.combine_numbers((m.outputs, m.inputs)) * budget.F64
        solving = budget.combine_flops(m.outputs, m.inputs, columns)
        if isinstance(method, SumMethod):
            combine = method.solve_numbers((m.outputs, m.inputs)) * budget.F64
            solving = budget.eigh_flops(m.outputs) + 4.0 * m.outputs**2 * m.inputs
            solving += m.inputs**3 / 3 + 2.0 * m.outputs * m.inputs**2
        if m.moment:
            assert self._forward is not None
            forward = self._forward
            after = tuple(forward_task(forward, e, m.observed_in) for e in self._opened.experts)
            read, peak, flops = 0, combine, 0.0
            identity: list[object] = []
        else:
            after = ()
            everyone = self._models([m.method])
            read = sum(_part_bytes(c, m) for c in everyone)
            factors = columns * (m.outputs + m.inputs) * budget.F32
            by_svd = is_factor_method(method) and method.factors_by_svd
            basis = budget.basis_bytes(m.outputs, m.inputs, m.rank, by_svd=by_svd)
            peak = max(combine, basis) + factors
            flops = self._num_experts * budget.basis_flops(m.outputs, m.inputs, m.rank)
            if isinstance(method, SpectralMethod):
                shape = (m.outputs, m.inputs)
                peak = self._spectral_numbers(method, m) * budget.F64
                flops = method.decompositions(self._num_experts) * budget.svd_flops(*shape)
            if isinstance(method, SumMethod):
                peak = max(combine, _term_bytes(method, m))
                flops = self._num_experts * _term_flops(m)
            if isinstance(method, ElementwiseMethod):
                after = self._totals_of(m)
                peak = update + self._panel_bytes(names)
                flops = 0.0
            identity = [
                [c.identity(n) for c in everyone for n in names],
                _method_identity(m, "factor", self._num_experts),
                m.method.weights,
            ]
        if m.svc is not None:
            everyone = [self._opened.base, *self._opened.experts.values()]
            read += sum(_part_bytes(c, m) for c in everyone)
            peak = max(peak, calibration_numbers((m.outputs, m.inputs)) * budget.F64)
            side = min(m.outputs, m.inputs)
            solving += 2.0 * self._num_experts * m.outputs * m.inputs * side
            identity.append([m.svc, [c.identity(n) for c in everyone for n in names]])
        if self._treatments.lines_slope is not None:
            identity.append("magnitude")
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
            reads=tuple(names) if read else (),
            writes=(f"factors.zarr/{m.name}/update",),
            read_bytes=read,
            write_bytes=update + sums,
            kept_bytes=update + sums,
            flops=flops + solving,
            peak_bytes=budget.TASK_OVERHEAD + peak,
            subject=m.name,
        )

    # Walk ------------------------------------------------------------------------------------

    def _walks(self) -> Iterator[Task]:
        """The merged model's way through its blocks, up to the last that is merged by it."""
        walked: dict[str, list[Matrix]] = {}
        for matrix in self._treatments.matrices.values():
            if matrix.walked:
                walked.setdefault(matrix.observed_in, []).append(matrix)
        if not walked:
            return
        yield self._walk_begin()
        last = max(self._steps.index(block) for block in walked)
        for number in range(last + 1):
            matrices = sorted(walked.get(self._steps[number], ()), key=lambda m: m.order)
            yield self._walk_block(number, matrices, is_last=number == last)

    def _walk_begin(self) -> Task:
        """What is outside the blocks, merged; in chain mode all samples on their way to block 0."""
        assert self._forward is not None
        base, chain = self._opened.base, self._forward.mode == "chain"
        names = self._tensors_outside(base, self._forward.stem)
        states = self._num_experts * self._forward.steps[0].state_bytes if chain else 0
        size = sum(self._target_bytes(name) for name in names)
        after = [f"inputs/{name}" for name in self._opened.experts]
        others, identity = self._values_of(names)
        read = [base, *self._opened.experts.values()]
        return self._task(
            WALK_BEGIN,
            "walk",
            after=(*after, *others),
            identity=[self._forward, base.config, identity],
            reads=tuple(names),
            read_bytes=sum(_sizes(checkpoint, names) for checkpoint in read),
            write_bytes=2 * states + size,
            kept_bytes=states + size,
            peak_bytes=budget.TASK_OVERHEAD
            + self._panel_bytes(names)
            + 3 * self._forward.steps[0].state_bytes,
            tensors=tuple(names),
        )

    def _walk_block(self, number: int, matrices: Sequence[Matrix], *, is_last: bool) -> Task:
        """Merge a block's matrices, one input after the other, and take all samples through it."""
        assert self._forward is not None
        base, step = self._opened.base, self._forward.steps[number]
        experts = list(self._opened.experts.values())
        parts = _tensors_of(matrices)
        inside = list(dict.fromkeys([*self._tensors_of_block(step.block), *parts]))
        others, identity = self._values_of(inside, [m.name for m in matrices])
        states = tuple(
            f"walk/{earlier:04d}"
            for earlier in range(number)
            if earlier + 1 == number
            or (self._forward.mode == "replay" and not self._forward.steps[earlier].handed_on)
        )
        states = states or ((WALK_BEGIN,) if self._forward.mode == "chain" else ())
        before = f"walk/{number - 1:04d}" if number else WALK_BEGIN
        hidden = 0 if is_last else self._num_experts * step.state_bytes
        updates = sum(m.outputs * m.inputs for m in matrices) * budget.F32
        tokens = self._hidden_tokens() * self._num_experts
        passes = len({m.order for m in matrices}) + 1
        return self._task(
            f"walk/{number:04d}",
            "walk",
            after=tuple(dict.fromkeys([before, *states, WALK_BEGIN, *others])),
            identity=[
                list(self._opened.experts),
                [[m.name, m.parts, m.transposed, m.leader, m.order, m.alpha] for m in matrices],
                [_method_identity(m, "factor", self._num_experts) for m in matrices],
                [_method_identity(m, "combine", self._num_experts) for m in matrices],
                [[c.identity(name) for name in parts] for c in (base, *experts)],
                identity,
            ],
            reads=tuple(inside),
            writes=tuple(f"factors.zarr/{m.name}/update" for m in matrices),
            read_bytes=_sizes(base, inside) + sum(_sizes(e, inside) for e in experts),
            write_bytes=updates + hidden,
            kept_bytes=updates,
            flops=2.0 * tokens * passes * _numel(base, inside)
            + sum(self._walk_flops(m) for m in matrices),
            peak_bytes=self._walk_peak(inside, matrices, step.state_bytes),
            subject=step.block,
            block=number,
            tensors=tuple(m.name for m in matrices),
            states=states,
        )

    def _values_of(
        self, names: Sequence[str], walked: Sequence[str] = ()
    ) -> tuple[list[str], list[object]]:
        """Tasks before the output's values of tensors are known, and what else decides them."""
        after: list[str] = []
        identity: list[object] = [self._opened.manifest.output.dtype]
        for name in names:
            plan = self._treatments.tensors[name]
            identity.append([name, plan.treatment, plan.alpha, plan.method, plan.source])
            models = self._models([plan.method])
            identity.append([model.identity(name) for model in models])
            if plan.population:
                sweeps = elementwise_method(self._treatments.populations[plan.population]).sweeps
                after += [f"total/{plan.population}/{sweep}" for sweep in range(sweeps)]
            for matrix in (self._treatments.matrices[m] for m in plan.matrices if m not in walked):
                after.append(self._update_keys[matrix.name])
                if matrix.scaled:
                    after.append(f"scale/{matrix.group}")
        return list(dict.fromkeys(after)), identity

    def _walk_flops(self, m: Matrix) -> float:
        tokens = self._hidden_tokens() * self._num_experts
        solving = budget.eigh_flops(m.outputs) + 4.0 * m.outputs**2 * m.inputs
        return 2.0 * tokens * m.inputs**2 + self._num_experts * _term_flops(m) + solving

    def _walk_peak(self, inside: Sequence[str], matrices: Sequence[Matrix], hidden: int) -> int:
        """Merged block, sums that are held together, one expert's moments, term or solution."""
        limit = self._opened.manifest.run.memory // budget.SUMS_SHARE
        block = 2 * sum(self._target_bytes(name) for name in inside)
        block += self._cast_bytes(self._opened.base, inside)
        by_input: dict[int, list[Matrix]] = {}
        for m in matrices:
            by_input.setdefault(m.order, []).append(m)
        widest = max((max(m.outputs, m.inputs) for m in matrices), default=0)
        at_once = budget.activation_bytes(self._micro_batch_tokens(), widest)
        held = 0
        for found in by_input.values():
            sizes = [_sums_numbers(m) * budget.F64 for m in found]
            sums = max(*sizes, min(sum(sizes), limit))
            numbers = 0
            for m in found:
                method = method_of(m.method)
                assert isinstance(method, SumMethod)
                shape = m.outputs, m.inputs
                numbers = max(numbers, method.term_numbers(shape), method.solve_numbers(shape))
            held = max(held, sums + self._moments_bytes(found) + numbers * budget.F64)
        return budget.TASK_OVERHEAD + block + 3 * hidden + max(at_once, held)

    def _target_bytes(self, name: str) -> int:
        """Bytes of a tensor in the output."""
        return next(
            layout.tensors[name].nbytes for layout in self._layouts if name in layout.tensors
        )

    def _spectral_numbers(self, method: SpectralMethod, m: Matrix) -> int:
        """Float64 numbers that a spectral method holds, fewer where adapters give their factors."""
        shape, rank = (m.outputs, m.inputs), self._low_rank(m)
        numbers = method.peak_numbers(shape, self._num_experts)
        if rank is None:
            return numbers
        return min(numbers, method.low_rank_numbers(shape, self._num_experts, rank) or numbers)

    def _low_rank(self, m: Matrix) -> int | None:
        """Ranks of all experts' updates of a matrix together, None if one is no adapter's."""
        ranks = [e.rank(part.tensor) for e in self._opened.experts.values() for part in m.parts]
        known = [rank for rank in ranks if rank is not None]
        return sum(known) if len(known) == len(ranks) else None

    def _scales(self) -> list[Task]:
        groups: dict[str, list[Matrix]] = {}
        for matrix in self._treatments.matrices.values():
            if matrix.scaled:
                groups.setdefault(matrix.group, []).append(matrix)
        options = list(self._treatments.layer_level or ())
        return [
            self._task(
                f"scale/{group}",
                "scale",
                after=tuple(self._update_keys[m.name] for m in matrices),
                identity=[options, [m.name for m in matrices]],
                peak_bytes=budget.TASK_OVERHEAD,
                subject=group,
                tensors=tuple(m.name for m in matrices),
            )
            for group, matrices in groups.items()
        ]

    def _totals_of(self, m: Matrix) -> tuple[str, ...]:
        """Tasks that leave the statistics which a matrix shares with others."""
        populations = {self._treatments.tensors[part.tensor].population for part in m.parts}
        return tuple(
            f"total/{population}/{sweep}"
            for population in sorted(populations - {""})
            for sweep in range(elementwise_method(self._treatments.populations[population]).sweeps)
        )

    # LiNeS -----------------------------------------------------------------------------------

    def _lines(self) -> Iterator[Task]:
        """A pass over the model for the first factor of LiNeS, where the manifest gives none."""
        if self._treatments.lines_slope is None:
            return
        merged = [
            plan.name
            for plan in self._treatments.tensors.values()
            if plan.treatment in ("elementwise", "factors")
        ]
        keys = []
        for number, names in enumerate(_groups(merged, self._opened.base.tensors, MEASURE_BYTES)):
            plans = [self._treatments.tensors[name] for name in names]
            everyone = self._models(p.method for p in plans)
            totals = {p.population for p in plans if p.treatment == "elementwise"} - {""}
            task = self._task(
                f"magnitudes/{number:04d}",
                "magnitudes",
                after=tuple(
                    f"total/{population}/{sweep}"
                    for population in sorted(totals)
                    for sweep in range(
                        elementwise_method(self._treatments.populations[population]).sweeps
                    )
                ),
                identity=[
                    [[p.name, p.treatment, p.method] for p in plans],
                    [c.identity(n) for c in everyone for n in names],
                ],
                reads=tuple(names),
                read_bytes=sum(_update_sizes(c, names) for c in everyone),
                peak_bytes=budget.TASK_OVERHEAD + self._panel_bytes(names),
                tensors=tuple(names),
            )
            keys.append(task.key)
            yield task
        matrices = self._treatments.matrices.values()
        scales = dict.fromkeys(f"scale/{m.group}" for m in matrices if m.scaled)
        yield self._task(
            "lines",
            "lines",
            after=(*keys, *self._update_keys.values(), *scales),
            identity=[],
            peak_bytes=budget.TASK_OVERHEAD,
        )

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
            if self._treatments.lines_slope is not None and plan.method is not None:
                identity.append([self._treatments.lines_slope, plan.depth])
                after.append("lines")
                depends.append("lines")
            if plan.population and plan.treatment == "elementwise":
                sweeps = elementwise_method(self._treatments.populations[plan.population]).sweeps
                totals = [f"total/{plan.population}/{sweep}" for sweep in range(sweeps)]
                after += totals
                depends += totals
            if plan.treatment == "copy" and plan.source:
                identity.append(self._opened.experts[plan.source].identity(plan.name))
            if plan.treatment == "factors":
                for name in plan.matrices:
                    matrix = self._treatments.matrices[name]
                    merge, scale = self._update_keys[name], f"scale/{matrix.group}"
                    depends.append(scale if matrix.scaled else merge)
                    after += [merge, depends[-1]]
                    identity.append(matrix.parts)
            elif plan.treatment != "copy":
                experts = self._models([plan.method])[1:]
                identity += [e.identity(plan.name) for e in experts]
                identity.append(plan.method)
                if plan.treatment == "elementwise":
                    read += sum(_update_sizes(e, [plan.name]) for e in experts)
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
            identity=[
                _folder_identity(base.root),
                [x.file_name for x in self._layouts],
                self._opened.block_order,
            ],
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

    def _tensors_of_block(self, block: str) -> list[str]:
        assert self._opened.skeleton is not None
        if block not in self._block_tensors:
            self._block_tensors[block] = list(self._opened.skeleton.tensors_of(block))
        return self._block_tensors[block]

    def _tensors_outside(self, checkpoint: Checkpoint, parameters: Sequence[str]) -> list[str]:
        """Tensors of parameters and persistent buffers outside the blocks, as far as there are."""
        assert self._opened.skeleton is not None
        found = self._opened.skeleton.tensors_for([*parameters, *self._buffers_outside])
        return [name for name in found if name in checkpoint.tensors]

    def _hidden_tokens(self) -> int:
        assert self._forward is not None
        return self._opened.manifest.calibration.samples * self._forward.tokens_per_sample

    def _micro_batch_tokens(self) -> int:
        assert self._forward is not None
        return max(self._forward.micro_batch_tokens, self._forward.tokens_per_sample)

    def _factor_bytes(self, m: Matrix) -> int:
        """Stored factors of one expert."""
        if m.summed:
            return math.ceil(_sums_bytes(m) / self._num_experts)
        thin = m.rank * (m.outputs + m.inputs) * budget.F32
        return thin + min(m.outputs, m.inputs) * budget.F64

    def _transfer_bytes(
        self, checkpoint: Checkpoint, names: Sequence[str], matrices: Sequence[Matrix]
    ) -> int:
        """Two blocks of expert and base on a GPU, and their way there; on a CPU they are in place.

        The host's and the device's memory are one budget.
        """
        if self._opened.manifest.run.device == "cpu" or not names:
            return 0
        parts = _tensors_of(matrices)
        own = dict.fromkeys([*names, *parts])
        both = _sizes(checkpoint, own) + _sizes(self._opened.base, parts)
        return 2 * (both + budget.STAGING_BYTES)

    def _cast_bytes(self, checkpoint: Checkpoint, names: Iterable[str]) -> int:
        """Copies of tensors that are not stored in the forward's dtype, or not stored at all."""
        size = {"float32": 4, "float64": 8}.get(self._opened.dtype, 2)
        found = list(names)
        copied = self._converted(checkpoint, found)
        made = sum(checkpoint.tensors[n].nbytes for n in found if checkpoint.is_computed(n))
        return made + sum(checkpoint.tensors[n].numel * size for n in copied)

    def _converted(self, checkpoint: Checkpoint, names: Iterable[str]) -> list[str]:
        """Float tensors that are not stored in the forward's dtype."""
        infos = [checkpoint.tensors[n] for n in names]
        dtype = self._opened.dtype
        return [i.name for i in infos if i.kind.is_float and i.kind.torch_name != dtype]


def _buffers_outside(opened: Opened, blocks: Sequence[str]) -> list[str]:
    """Buffers that checkpoints hold outside the blocks."""
    if opened.skeleton is None:
        return []
    inside = tuple(f"{name}." for name in blocks)
    return [n for n in opened.skeleton.persistent_buffers() if not n.startswith(inside)]


def _method_identity(m: Matrix, stage: Literal["factor", "combine"], num_experts: int) -> object:
    """What of a method's options decides its factors or their combination."""
    method = method_of(m.method)
    if isinstance(method, SumMethod):
        return [m.method.name, method.identity("term" if stage == "factor" else "solve")]
    options = method.identity(stage) if is_factor_method(method) else m.method.options
    return [m.method.name, num_experts, options]


def _sums_bytes(m: Matrix) -> int:
    """Sums of one matrix on disk, two numbers of 8 bytes for each element."""
    return _sums_numbers(m) * 2 * budget.F64


def _sums_numbers(m: Matrix) -> int:
    """Numbers of the sums of one matrix."""
    method = method_of(m.method)
    assert isinstance(method, SumMethod)
    return method.sum_numbers((m.outputs, m.inputs))


def _term_bytes(method: SumMethod, m: Matrix) -> int:
    """Peak of one expert's term being made and added to the sums on disk."""
    panels = [(p.stop - p.start) * p.columns for p in method.places((m.outputs, m.inputs))]
    return (method.term_numbers((m.outputs, m.inputs)) + 8 * max(panels)) * budget.F64


def _term_flops(m: Matrix) -> float:
    """Operations of one expert's term: D^T D, D B and D D^T."""
    products = 1.0 * m.inputs + 2.0 * (m.inputs if m.moment else min(m.outputs, m.inputs))
    return m.outputs * m.inputs * (products + m.outputs)


def check_budget(tasks: Mapping[str, Task], memory: int) -> None:
    """Refuse a plan with a task that can never run.

    Raises:
        BudgetError: The largest task, with the numbers.
    """
    largest = max(tasks.values(), key=lambda task: task.peak_bytes)
    if largest.peak_bytes > memory:
        over = sum(task.peak_bytes > memory for task in tasks.values())
        smaller = {
            "merge": ', or make the factors smaller: [merge.options] rank_budget = "min_side" (for '
            "matrices with more outputs than inputs), rank_factor or rank; or a rule with "
            'method = "average" for the largest matrices',
            "forward": ", or make samples shorter or fewer: [calibration] max_length, samples",
        }
        raise BudgetError(
            f"task '{largest.key}' needs {budget.format_size(largest.peak_bytes)} of memory; the "
            f"budget is {budget.format_size(memory)} ({over} of {len(tasks)} tasks are over it). "
            f"Raise [run] memory or --memory{smaller.get(largest.stage, '')}."
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


def _tensors_of(matrices: Iterable[Matrix]) -> list[str]:
    """Names of the stored tensors that matrices are made of."""
    return list(dict.fromkeys(part.tensor for m in matrices for part in m.parts))


def _part_bytes(checkpoint: Checkpoint, m: Matrix) -> int:
    """What is read of a checkpoint for one matrix; of a transposed one, the whole stored matrix."""
    names = _tensors_of([m])
    if all(checkpoint.rank(name) is not None for name in names):
        return _update_sizes(checkpoint, names)
    read: dict[tuple[str, int | None, int], int] = {}
    for part in m.parts:
        info = checkpoint.tensors[part.tensor]
        rows, columns = part.stored_shape(info.shape)
        elements = rows * columns if m.transposed else part.outputs * columns
        start = 0 if m.transposed else part.start
        read[part.tensor, part.slice, start] = elements * info.kind.bits // 8
    return sum(read.values())


def _sizes(checkpoint: Checkpoint, names: Iterable[str]) -> int:
    return sum(checkpoint.tensors[name].nbytes for name in names)


def _update_sizes(checkpoint: Checkpoint, names: Iterable[str]) -> int:
    return sum(checkpoint.update_bytes(name) for name in names)


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
