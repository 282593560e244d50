"""Second moments of what one expert's matrices see, from hooks to stored factors.

From:  stages/forward.py, which runs blocks and skeleton with these hooks.
To:    factors.zarr (basis, coordinates, spectrum of every matrix).
Peak:  moments of the distinct inputs, one matrix being factored.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from esm_stream.calibration.moments import InputMoment, ShiftMoment
from esm_stream.methods import factor_method
from esm_stream.methods.contract import Moment
from esm_stream.planning.plan import Matrix
from esm_stream.stages import sums
from esm_stream.stages.context import BASE, Context, TaskResult
from esm_stream.stopping import check
from esm_stream.subspace.basis import frobenius_norm


class Observation:
    """Moments of some matrices of one expert, filled by `see` and used up by `factor`."""

    def __init__(self, context: Context, matrices: Iterable[Matrix]) -> None:
        self._context = context
        self._matrices = list(matrices)
        self._moments: dict[str, InputMoment | ShiftMoment] = {}
        self._users: dict[str, dict[str, Callable[[Tensor], None]]] = {}
        for matrix in self._matrices:
            key = _moment_key(matrix)
            if matrix.moment == "shift":
                update = context.update(context.task.expert, matrix)
                self._moments[key] = ShiftMoment(update)
            elif key not in self._moments:
                alone = all(m.summed for m in self._matrices if _moment_key(m) == key)
                dtype = torch.float32 if alone else torch.float64
                self._moments[key] = InputMoment(matrix.inputs, context.device, dtype)
            for seen in (str(matrix.leader), *matrix.also):
                self._users.setdefault(seen, {})[key] = self._moments[key].add

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the matrices whose inputs are wanted."""
        return tuple(self._users)

    def see(self, key: str, x: Tensor) -> None:
        """Add what a matrix is multiplied with."""
        for add in self._users[key].values():
            add(x)

    def factor(self, result: TaskResult) -> None:
        """Factor and store every matrix; its norm, rank and tokens go into the result."""
        waiting, self._users = self._matrices, {}
        while waiting:
            check()
            matrix, *waiting = waiting
            key = _moment_key(matrix)
            moment = self._moments[key].result()
            result.values[matrix.name] = factor(self._context, matrix, moment, result)
            if all(_moment_key(m) != key for m in waiting):
                del self._moments[key]


def factor(
    context: Context, matrix: Matrix, moment: Moment, result: TaskResult
) -> dict[str, float | int]:
    """Factor one expert's update of one matrix and store it; returns its norm, rank, tokens."""
    plan, expert = context.plan, context.task.expert
    if matrix.summed:
        return {
            **sums.add_observed(context, matrix, moment),
            "base_norm": base_norm(context, matrix),
            "tokens": moment.tokens,
            "too_few": int(moment.tokens == 0),
        }
    method = factor_method(matrix.method)
    # Too little was seen of it: no moment at all takes the basis from the update alone.
    few = moment.tokens == 0 or (bool(matrix.routed) and moment.tokens < matrix.rank)
    update_OI = context.update(expert, matrix)
    factors = method.factor(update_OI, None if few else moment, len(plan.experts))
    written = context.store.write_factors(matrix.name, plan.expert_names.index(expert), factors)
    result.outputs += [context.directory.record(path) for path in written]
    return {
        "norm": factors.norm,
        "base_norm": base_norm(context, matrix),
        "rank": int(factors.basis_OK.shape[1]),
        "tokens": moment.tokens,
        "too_few": int(few),
    }


def _moment_key(matrix: Matrix) -> str:
    """Input moments belong to the observed matrix, maybe shared; shift moments to the matrix."""
    return str(matrix.leader) if matrix.moment == "input" else f"shift of {matrix.name}"


def base_norm(context: Context, matrix: Matrix) -> float:
    """Frobenius norm of the base's matrix, to judge how large the update is."""
    return math.hypot(*(frobenius_norm(context.part(BASE, matrix, p)) for p in matrix.parts))
