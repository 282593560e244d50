"""What every stage needs (plan, checkpoints, store, device), and what a task returns."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esm_stream.checkpoints.adapter import AdaptedReader, open_expert, open_reader
from esm_stream.checkpoints.checkpoint import Checkpoint, open_checkpoint, open_tensors
from esm_stream.checkpoints.reader import TensorReader
from esm_stream.checkpoints.restacked import restacked
from esm_stream.errors import DataError
from esm_stream.planning.plan import Matrix, Part, Plan, Task
from esm_stream.store.factors import FactorStore
from esm_stream.store.work import Output, WorkDirectory
from esm_stream.subspace.basis import frobenius_norm
from esm_stream.subspace.sizes import PANEL_ROWS

BASE = ""


@dataclass
class TaskResult:
    """Outputs of a task, on disk, and small results for its marker."""

    outputs: list[Output] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)


class Context:
    """One task's view of the merge; readers are opened when asked for and closed with it."""

    def __init__(self, plan: Plan, task: Task, following: Task | None, stack: ExitStack) -> None:
        self.plan = plan
        self.task = task
        self.following = following
        self.directory: WorkDirectory = plan.directory
        self.store = FactorStore(self.directory.factors)
        self.device = torch.device(plan.manifest["run"]["device"])
        self._stack = stack
        self._roots = {BASE: plan.base, **plan.experts}
        self._readers: dict[str, TensorReader] = {}
        self._views: dict[tuple[str, str], Tensor] = {}
        self._held: tuple[tuple[str, str], ...] = ()
        self._whole: set[Path] = set()
        self._ranges: dict[tuple[str, str, int, int], Tensor] = {}

    def whole(self, path: Path) -> Path:
        """A file of an earlier task in the work directory, as that task left it.

        Raises:
            DataError: It is gone or damaged.
        """
        if path not in self._whole:
            name = path.relative_to(self.directory.root).as_posix()
            drawn = (task.key for task in self.plan.of_stage("inputs"))
            writers = (
                key
                for key in dict.fromkeys((*self.task.states, *self.task.after, *drawn))
                if (marker := self.directory.read(key)) is not None
                and any(output.path == name for output in marker.outputs)
            )
            self._whole.add(self.directory.require_whole(next(writers, ""), path))
        return path

    def reader(self, name: str) -> TensorReader:
        """Reader of an expert, or of the base (name BASE)."""
        if name not in self._readers:
            reader = open_reader(checkpoint_at(self.plan, self._roots[name]))
            self._readers[name] = self._stack.enter_context(reader)
        return self._readers[name]

    def fisher_reader(self, expert: str) -> TensorReader:
        """Reader of an expert's Fisher information."""
        key = f"fisher:{expert}"
        if key not in self._readers:
            reader = TensorReader(fisher_of(self.plan, expert))
            self._readers[key] = self._stack.enter_context(reader)
        return self._readers[key]

    def add_model(self, name: str, root: Path) -> None:
        """Let a model be read that the plan does not name."""
        self._roots[name] = root

    def tensor(self, model: str, name: str) -> Tensor:
        """A whole tensor in place (a view of the file); asked for twice, it is read once."""
        if (model, name) in self._views:
            return self._views[model, name]
        tensor = self.reader(model).tensor(name)
        # What is made takes memory: it lives as long as whoever asked for it wants.
        if not self.reader(model).checkpoint.is_computed(name):
            self._views[model, name] = tensor
        return tensor

    def hold(self, tensors: Mapping[tuple[str, str], Tensor]) -> None:
        """Answer with these from now on, by model and name, instead of those held before."""
        for key in self._held:
            self._views.pop(key, None)
        for (model, _), tensor in tensors.items():
            self.reader(model).bytes_read += tensor.nbytes
        self._views |= tensors
        self._held = tuple(tensors)

    def drop_pages(self) -> None:
        """Let pages of the files read so far leave this process; tensors stay valid."""
        for reader in self._readers.values():
            reader.drop()

    @property
    def bytes_read(self) -> dict[str, int]:
        """Bytes of tensors that this task read from the base and from experts."""
        found = {"base": 0, "experts": 0}
        for name, reader in self._readers.items():
            found["base" if name == BASE else "experts"] += reader.bytes_read
        return found

    def update(self, expert: str, matrix: Matrix) -> Tensor:
        """One expert's update of a matrix, D = W_t - W_0, float32 (O, I), on the device.

        Raises:
            DataError: Base or expert hold NaN or Inf there.
        """
        shape = matrix.outputs, matrix.inputs
        update_OI = torch.empty(shape, dtype=torch.float32, device=self.device)
        start = 0
        for part in matrix.parts:
            place_OI = update_OI[start : start + part.outputs]
            start += part.outputs
            if self.reader(expert).checkpoint.rank(part.tensor) is not None:
                self._add_adapted(expert, matrix, part, place_OI)
                continue
            base_OI, tuned_OI = self.part(BASE, matrix, part), self.part(expert, matrix, part)
            # By panels, so that converted copies of whole tensors are never held.
            for rows in range(0, part.outputs, PANEL_ROWS):
                panel = slice(rows, rows + PANEL_ROWS)
                before = base_OI[panel].to(self.device, torch.float32)
                difference = tuned_OI[panel].to(self.device, torch.float32) - before
                require_finite(difference, part.tensor, expert, before)
                place_OI[panel] = difference
        return update_OI

    def _add_adapted(self, expert: str, matrix: Matrix, part: Part, place_OI: Tensor) -> None:
        """Put an adapter's update of a part into its place."""
        found = self.factors(expert, matrix, part)
        if found is None:
            place_OI.zero_()
            return
        left_OR, right_RI = (factor.to(self.device) for factor in found)
        torch.mm(left_OR, right_RI, out=place_OI)
        if not is_finite(place_OI):
            raise DataError(not_finite(part.tensor, f'expert "{expert}"'))

    def factors(self, expert: str, matrix: Matrix, part: Part) -> tuple[Tensor, Tensor] | None:
        """Factors (O, R) and (R, I) of an adapter's update of a part, None where it has none."""
        reader = self.reader(expert)
        update = reader.update_of(part.tensor) if isinstance(reader, AdaptedReader) else None
        if update is None:
            return None
        shape = reader.checkpoint.tensors[part.tensor].shape
        stored_rows, _ = part.stored_shape(shape)
        first = (part.slice or 0) * stored_rows
        left_MR, right_RN = update.left_MR[first : first + stored_rows], update.right_RN
        if matrix.transposed:
            left_MR, right_RN = right_RN.T, left_MR.T
        return left_MR[part.start : part.start + part.outputs], right_RN

    def low_rank(self, expert: str, matrix: Matrix) -> tuple[Tensor, Tensor] | None:
        """Factors (O, R) and (R, I) of an expert's update of a matrix, float64, on the device.

        None unless the expert is an adapter that changes nothing of the matrix but so.
        """
        checkpoint = self.reader(expert).checkpoint
        if any(checkpoint.rank(part.tensor) is None for part in matrix.parts):
            return None
        lefts = [torch.zeros(matrix.outputs, 0, dtype=torch.float64, device=self.device)]
        rights = [torch.zeros(0, matrix.inputs, dtype=torch.float64, device=self.device)]
        start = 0
        for part in matrix.parts:
            found = self.factors(expert, matrix, part)
            if found is not None:
                left_OR, right_RI = (factor.to(self.device, torch.float64) for factor in found)
                whole_OR = left_OR.new_zeros(matrix.outputs, left_OR.shape[1])
                whole_OR[start : start + part.outputs] = left_OR
                lefts.append(whole_OR)
                rights.append(right_RI)
            start += part.outputs
        return torch.cat(lefts, dim=1), torch.cat(rights)

    def part(self, model: str, matrix: Matrix, part: Part) -> Tensor:
        """A part of a matrix in place, (O, I); asked for twice, it is read once."""
        shape = self.reader(model).checkpoint.tensors[part.tensor].shape
        rows, columns = part.stored_shape(shape)
        first = (part.slice or 0) * rows * columns
        if matrix.transposed:
            stored_IO = self._elements(model, part.tensor, first, first + rows * columns)
            return stored_IO.view(rows, columns)[:, part.start : part.start + part.outputs].T
        first += part.start * columns
        stored = self._elements(model, part.tensor, first, first + part.outputs * columns)
        return stored.view(part.outputs, columns)

    def _elements(self, model: str, name: str, start: int, stop: int) -> Tensor:
        """Elements of a tensor; from the view of the whole if that has been asked for."""
        numel = self.reader(model).checkpoint.tensors[name].numel
        if (model, name) in self._views or (start, stop) == (0, numel):
            return self.tensor(model, name).view(-1)[start:stop]
        key = model, name, start, stop
        if key not in self._ranges:
            self._ranges[key] = self.reader(model).elements(name, start, stop)
        return self._ranges[key]


@contextmanager
def task_context(plan: Plan, task: Task, following: Task | None = None) -> Iterator[Context]:
    """A context for one task; files are unmapped on every way out.

    Args:
        plan: The plan.
        task: The task.
        following: The one that this process runs next, if that is known.
    """
    with ExitStack() as stack:
        yield Context(plan, task, following, stack)


def require_finite(difference: Tensor, tensor: str, expert: str, base: Tensor) -> None:
    """Refuse NaN and Inf in an update.

    Raises:
        DataError: Naming tensor and model.
    """
    if not is_finite(difference):
        where = "the base" if not is_finite(base) else f'expert "{expert}"'
        raise DataError(not_finite(tensor, where))


def is_finite(values: Tensor) -> bool:
    """Whether there is no NaN and no Inf; needs no memory to speak of."""
    return math.isfinite(frobenius_norm(values))


def not_finite(tensor: str, where: str) -> str:
    """What to say of NaN or Inf in a tensor."""
    return (
        f"tensor '{tensor}' of {where} holds NaN or Inf; repair or retrain that model, or add the "
        "tensor to [base] skip"
    )


def blame(context: Context, names: Iterable[str], otherwise: str) -> DataError:
    """Why hidden states of the task's expert are not finite: a tensor of it, or `otherwise`."""
    reader = context.reader(context.task.expert)
    for name in names:
        value = reader.lookup(name)
        if value.is_floating_point() and not is_finite(value):
            return DataError(not_finite(name, f'expert "{context.task.expert}"'))
    return DataError(otherwise)


_CHECKPOINTS: dict[Path, Checkpoint] = {}


def checkpoint_at(plan: Plan, root: Path) -> Checkpoint:
    """The base or an expert by its directory, blocks in the order of the output."""
    return restacked(stored_at(root, plan.base), plan.block_order)


def fisher_of(plan: Plan, expert: str) -> Checkpoint:
    """Fisher information of an expert, blocks in the order of the output."""
    return restacked(open_tensors(plan.fishers[expert]), plan.block_order)


def stored_at(root: Path, base: Path) -> Checkpoint:
    """A checkpoint whose headers this process has read; the plan checked them before.

    Args:
        root: Directory of the base, or of an expert.
        base: Directory of the base, which an adapter is one of.
    """
    if root not in _CHECKPOINTS:
        own = None if root == base else stored_at(base, base)
        _CHECKPOINTS[root] = open_expert(root, own) if own else open_checkpoint(root)
    return _CHECKPOINTS[root]


def forget_checkpoints() -> None:
    """Read headers anew: a run begins, and files may have changed since the last one."""
    _CHECKPOINTS.clear()
