"""Every kind of method on tensors in memory, with panels of any length; no engine."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esm_stream.methods import create, is_factor_method
from esm_stream.methods.contract import (
    ElementwiseMethod,
    Merged,
    Moment,
    Panel,
    Place,
    SpectralMethod,
    SumMethod,
    Sums,
    Whole,
)

NAME = "model.layers.0.mlp.up_proj.weight"


@dataclass(frozen=True)
class Streamed:
    """Updates that are read anew by every iteration."""

    updates: Sequence[Tensor]
    weights: Sequence[float]

    @property
    def device(self) -> torch.device:
        return self.updates[0].device

    def __iter__(self) -> Iterator[Tensor]:
        for update, weight in zip(self.updates, self.weights, strict=True):
            yield update.clone().mul_(weight)

    def __len__(self) -> int:
        return len(self.updates)

    def low_rank(self) -> None:
        return None


def merge(
    method: str,
    updates: Sequence[Tensor],
    *,
    base: Tensor | None = None,
    options: Mapping[str, object] | None = None,
    weights: Sequence[float] | None = None,
    moments: Sequence[Moment] | None = None,
    experts: Sequence[str] | None = None,
    fisher: Sequence[Tensor] | None = None,
    length: int = 1 << 20,
) -> Tensor:
    """Merged update of one tensor; `length` is the number of elements of a panel."""
    made = create(method, options or {}, "vision")
    weights = tuple(weights or [1.0] * len(updates))
    shape = updates[0].shape
    if isinstance(made, ElementwiseMethod):
        names = tuple(experts or (f"e{i}" for i in range(len(updates))))
        base = torch.zeros(shape) if base is None else base
        tensors = {NAME: (base, updates)}
        return merge_all(made, tensors, names, weights, length, {NAME: fisher})[NAME]
    size = (shape[0], shape[1])
    if isinstance(made, SpectralMethod):
        return made.merge(Streamed(updates, weights), size).update_OI
    assert is_factor_method(made) or isinstance(made, SumMethod)
    seen = moments if moments and made.uses_moments else [None] * len(updates)
    weighed = [d.clone().mul_(w) for d, w in zip(updates, weights, strict=True)]
    if isinstance(made, SumMethod):
        return merge_sums(made, weighed, seen).update_OI
    factors = [made.factor(d, m, len(updates)) for d, m in zip(weighed, seen, strict=True)]
    return made.combine(factors, size).update_OI


def merge_sums(
    method: SumMethod, updates: Sequence[Tensor], moments: Sequence[Moment | None]
) -> Merged:
    """Merged update of one matrix, its sums in float64 and in memory."""
    shape = (updates[0].shape[0], updates[0].shape[1])
    places = method.places(shape)
    sums: dict[Place, Tensor] = {}
    for update, moment in zip(updates, moments, strict=True):
        for place, panel in zip(places, method.term(update, moment), strict=False):
            sums[place] = sums[place] + panel if place in sums else panel.double()

    def read(place: Place) -> Tensor:
        zero = updates[0].new_zeros(place.stop - place.start, place.columns, dtype=torch.float64)
        return sums.get(place, zero).clone()

    return method.solve(read, shape)


def merge_all(
    method: ElementwiseMethod,
    tensors: Mapping[str, tuple[Tensor, Sequence[Tensor]]],
    experts: tuple[str, ...],
    weights: tuple[float, ...],
    length: int = 1 << 20,
    fishers: Mapping[str, Sequence[Tensor] | None] | None = None,
) -> dict[str, Tensor]:
    """Merged updates of several tensors, whose statistics belong together if the method says so.

    Fisher information is 1 where none is given.
    """

    def panels(name: str) -> Iterator[Panel]:
        base, updates = tensors[name]
        columns = base[0].numel() if base.ndim > 1 else base.numel()
        step = max(1, length // columns) * columns if method.whole_rows else length
        for start in range(0, base.numel(), step):
            cut = slice(start, start + step)
            stack = torch.stack([update.flatten()[cut] for update in updates])
            given = (fishers or {}).get(name)
            fisher = torch.stack([f.flatten()[cut] for f in given]) if given else None
            if method.needs_fisher and fisher is None:
                fisher = torch.ones_like(stack)
            yield Panel(name, start, columns, experts, weights, base.flatten()[cut], stack, fisher)

    def known_of(names: Sequence[str]) -> list[Any]:
        whole = Whole(experts, weights, sum(tensors[name][0].numel() for name in names))
        known: list[Any] = []
        for _ in range(method.sweeps):
            sums: Sums = {}
            for name in names:
                for panel in panels(name):
                    method.measure(panel, known, sums)
            known.append(method.settle(sums, known, whole))
        return known

    together = known_of(list(tensors)) if method.scope == "model" else []
    merged = {}
    for name, (base, _) in tensors.items():
        known = together if method.scope == "model" else known_of([name])
        parts = [method.merge(panel, known) for panel in panels(name)]
        merged[name] = torch.cat(parts).view(base.shape)
    return merged
