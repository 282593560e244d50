"""One tensor of base and experts, panel by panel, for methods that work element by element.

From:  the files of all checkpoints, copied as they are stored into memory for one panel.
To:    `ElementwiseMethod.measure` and `merge`.
Peak:  a stack of STACK_NUMBERS numbers, shared by all experts, and what a method makes of it.

Panels are small on purpose. Temporaries below the limit of allocation.py are reused by the C
library and stay in the processor's cache; above it every operation would have fresh pages mapped
and zeroed, which costs more than ten times the arithmetic.

Letters: T experts, N elements of a panel.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from esm_stream.budget import panel_elements
from esm_stream.checkpoints.adapter import AdaptedReader, LowRank
from esm_stream.checkpoints.reader import TensorReader
from esm_stream.errors import DataError
from esm_stream.methods import method_of, needs_fisher
from esm_stream.methods.contract import ElementwiseMethod, Panel, Sums, Whole
from esm_stream.planning.plan import MethodChoice
from esm_stream.stages.context import BASE, Context, require_finite


@dataclass(frozen=True)
class Panels:
    """All panels of one tensor, or of its elements start..stop, which begin and end with a row.

    Every iteration is a sweep over base and experts.
    """

    context: Context
    tensor: str
    choice: MethodChoice
    whole_rows: bool
    start: int = 0
    stop: int | None = None

    @property
    def whole(self) -> Whole:
        """The tensor as a population of its own."""
        info = self.context.reader(BASE).checkpoint.tensors[self.tensor]
        return Whole(self.context.plan.expert_names, self.choice.weights, info.numel)

    def __iter__(self) -> Iterator[Panel]:
        context, names = self.context, self.context.plan.expert_names
        info = context.reader(BASE).checkpoint.tensors[self.tensor]
        length = panel_elements(len(names), info.columns if self.whole_rows else 1)
        stop = info.numel if self.stop is None else self.stop
        length = max(1, min(length, stop - self.start))
        own, *models = (self._model(context.reader(name), length) for name in (BASE, *names))
        assert isinstance(own, _Stored)
        readers = map(context.fisher_reader, names if self._needs_fisher else ())
        fishers = [_Stored(reader, self.tensor, length) for reader in readers]
        wide = torch.float64 if any(m.is_wide for m in (own, *models)) else torch.float32
        stack = torch.empty(len(names) * length, dtype=wide)
        for first in range(self.start, stop, length):
            count = min(length, stop - first)
            base_N = own.elements(first, count).to(wide)
            updates_TN = stack[: len(names) * count].view(len(names), count)
            for row_N, model in zip(updates_TN, models, strict=True):
                model.update(row_N, first, base_N)
            self._require_finite(updates_TN, base_N)
            yield Panel(
                self.tensor,
                first,
                info.columns,
                names,
                self.choice.weights,
                base_N,
                updates_TN,
                self._fisher(fishers, first, updates_TN),
            )

    @property
    def _needs_fisher(self) -> bool:
        return needs_fisher(method_of(self.choice))

    def _fisher(
        self, fishers: "Sequence[_Stored]", first: int, updates_TN: Tensor
    ) -> Tensor | None:
        """Fisher information of the elements of a panel, (T, N).

        Raises:
            DataError: It holds NaN, Inf or negative numbers.
        """
        if not fishers:
            return None
        fisher_TN = torch.empty_like(updates_TN)
        for row_N, fisher, name in zip(
            fisher_TN, fishers, self.context.plan.expert_names, strict=True
        ):
            row_N.copy_(fisher.elements(first, len(row_N)))
            if not (math.isfinite(float(row_N.sum())) and float(row_N.min()) >= 0):
                raise DataError(
                    f"{self.context.plan.fishers[name]}: tensor '{self.tensor}' holds NaN, Inf or "
                    f'negative numbers; Fisher information of expert "{name}" is a mean of squares'
                )
        return fisher_TN

    def _model(self, reader: TensorReader, length: int) -> "_Stored | _Adapted":
        if reader.checkpoint.rank(self.tensor) is None:
            return _Stored(reader, self.tensor, length)
        assert isinstance(reader, AdaptedReader)
        return _Adapted(reader.update_of(self.tensor))

    def _require_finite(self, updates_TN: Tensor, base_N: Tensor) -> None:
        """Refuse NaN and Inf; a sum that overflows is only a reason to look closer."""
        if math.isfinite(float(updates_TN.sum())):
            return
        for name, row_N in zip(self.context.plan.expert_names, updates_TN, strict=True):
            require_finite(row_N, self.tensor, name, base_N)


class _Stored:
    """One model's elements of a tensor, as stored, in memory that is used again and again."""

    def __init__(self, reader: TensorReader, tensor: str, length: int) -> None:
        kind = reader.checkpoint.tensors[tensor].kind
        dtype: torch.dtype = getattr(torch, str(kind.torch_name))
        self.is_wide = dtype == torch.float64
        self._reader, self._tensor, self._size = reader, tensor, kind.bits // 8
        self._values_N = torch.empty(length, dtype=dtype)
        self._memory: memoryview = self._values_N.view(torch.uint8).numpy().data

    def elements(self, first: int, count: int) -> Tensor:
        """Elements (count,), good until the next call."""
        size = self._size
        self._reader.fill(self._tensor, first * size, self._memory[: count * size])
        return self._values_N[:count]

    def update(self, row_N: Tensor, first: int, base_N: Tensor) -> None:
        """Fill a row with what the model differs from the base."""
        row_N.copy_(self.elements(first, len(row_N)))
        row_N -= base_N


@dataclass(frozen=True)
class _Adapted:
    """An adapter's update of a tensor, None where it has none."""

    change: LowRank | None
    is_wide: ClassVar[bool] = False

    def update(self, row_N: Tensor, first: int, base_N: Tensor) -> None:  # noqa: ARG002
        """Fill a row with what the adapter adds to the base."""
        if self.change is None:
            row_N.zero_()
        else:
            row_N.copy_(self.change.elements(first, first + len(row_N)))


def sums_of(panels: Panels, method: ElementwiseMethod, known: list[Any]) -> Sums:
    """One sweep of a method over one tensor."""
    sums: Sums = {}
    for panel in panels:
        method.measure(panel, known, sums)
    return sums


def facts_of_tensor(
    panels: Panels, method: ElementwiseMethod, poll: Callable[[], None]
) -> list[Any]:
    """All sweeps of a method whose statistics belong to one tensor."""
    known: list[Any] = []
    for _ in range(method.sweeps):
        poll()
        known.append(method.settle(sums_of(panels, method, known), known, panels.whole))
    return known
