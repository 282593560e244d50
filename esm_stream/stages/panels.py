"""One tensor of base and experts, panel by panel, for methods that work element by element.

From:  the maps of all checkpoints, no copy.
To:    `ElementwiseMethod.measure` and `merge`.
Peak:  a stack of STACK_NUMBERS numbers, shared by all experts, and what a method makes of it.

Panels are small on purpose. Temporaries below the limit of allocation.py are reused by the C
library and stay in the processor's cache; above it every operation would have fresh pages mapped
and zeroed, which costs more than ten times the arithmetic.

Letters: T experts, N elements of a panel.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esm_stream.budget import panel_elements
from esm_stream.methods.contract import ElementwiseMethod, Panel, Sums, Whole
from esm_stream.planning.plan import MethodChoice
from esm_stream.stages.context import BASE, Context, require_finite

# Elements of one view of the maps; panels are cut from it.
_VIEW_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class Panels:
    """All panels of one tensor; every iteration is a sweep over base and experts."""

    context: Context
    tensor: str
    choice: MethodChoice
    whole_rows: bool

    @property
    def whole(self) -> Whole:
        """The tensor as a population of its own."""
        info = self.context.reader(BASE).checkpoint.tensors[self.tensor]
        return Whole(self.context.plan.expert_names, self.choice.weights, info.numel)

    def __iter__(self) -> Iterator[Panel]:
        context, names = self.context, self.context.plan.expert_names
        info = context.reader(BASE).checkpoint.tensors[self.tensor]
        length = panel_elements(len(names), info.columns if self.whole_rows else 1)
        wide = torch.float64 if info.dtype == "F64" else torch.float32
        stack = torch.empty(len(names) * min(length, info.numel), dtype=wide)
        for first, base, experts in self._views(names, length, info.numel):
            base_N = base.to(wide)
            updates_TN = stack[: len(names) * len(base)].view(len(names), len(base))
            for row_N, expert in zip(updates_TN, experts, strict=True):
                torch.sub(expert.to(wide) if wide == torch.float64 else expert, base_N, out=row_N)
            self._require_finite(updates_TN, base_N)
            yield Panel(
                self.tensor, first, info.columns, names, self.choice.weights, base_N, updates_TN
            )

    def _views(
        self, names: tuple[str, ...], length: int, numel: int
    ) -> Iterator[tuple[int, Tensor, tuple[Tensor, ...]]]:
        """First element, and that panel of the base and of every expert, as stored."""
        readers = [self.context.reader(name) for name in (BASE, *names)]
        long = max(1, _VIEW_ELEMENTS // length) * length
        for start in range(0, numel, long):
            stop = min(start + long, numel)
            views = [reader.elements(self.tensor, start, stop).split(length) for reader in readers]
            for number, (base, *experts) in enumerate(zip(*views, strict=True)):
                yield start + number * length, base, tuple(experts)

    def _require_finite(self, updates_TN: Tensor, base_N: Tensor) -> None:
        """Refuse NaN and Inf; a sum that overflows is only a reason to look closer."""
        if math.isfinite(float(updates_TN.sum())):
            return
        for name, row_N in zip(self.context.plan.expert_names, updates_TN, strict=True):
            require_finite(row_N, self.tensor, name, base_N)


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
