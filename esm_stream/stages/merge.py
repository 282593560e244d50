"""Stage 4 (pass 1): factors of all experts -> merged update of one matrix, and its norm.

From:  the store, where the forward put them; for methods without data, base and experts themselves.
To:    factors.zarr/<matrix>/update, before layer scaling and alpha, transposed if it is stored so.
Peak:  subspace/product.py. Bases that the forward stored are read panel by panel; those made here
       are kept in float32, all experts' together no larger than the matrix or its square.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from esm_stream.methods import is_factor_method, method_of
from esm_stream.methods.contract import (
    FactorMethod,
    Factors,
    Merged,
    SpectralMethod,
    SumMethod,
)
from esm_stream.planning.plan import Matrix, forward_key
from esm_stream.stages import sums
from esm_stream.stages.context import Context, TaskResult
from esm_stream.stopping import check
from esm_stream.subspace.basis import frobenius_norm


def run(context: Context) -> TaskResult:
    """Merge one matrix of all experts."""
    matrix = context.plan.matrices[context.task.subject]
    merged = _merged(context, matrix)
    norm = frobenius_norm(merged.update_OI)
    result = TaskResult(values={"norm": norm, **merged.diagnostics})
    update = merged.update_OI.T if matrix.transposed else merged.update_OI
    written = context.store.write_update(matrix.name, update)
    result.outputs += [context.directory.record(path) for path in written]
    return result


def _merged(context: Context, matrix: Matrix) -> Merged:
    """The merged update, from stored factors or from the updates themselves."""
    method, shape = method_of(matrix.method), (matrix.outputs, matrix.inputs)
    if isinstance(method, SpectralMethod):
        return method.merge(_Updates(context, matrix), shape)
    if isinstance(method, SumMethod):
        return sums.merged(context, matrix)
    assert is_factor_method(method)
    found = _stored(context, matrix) if matrix.moment else _factored(context, matrix, method)
    return method.combine(found if method.streams else list(found), shape)


@dataclass(frozen=True)
class _Updates:
    """All experts' updates of one matrix, weights applied; every iteration computes them anew."""

    context: Context
    matrix: Matrix

    @property
    def device(self) -> torch.device:
        return self.context.device

    def __iter__(self) -> Iterator[Tensor]:
        names, weights = self.context.plan.expert_names, self.matrix.method.weights
        for expert, weight in zip(names, weights, strict=True):
            check()
            yield self.context.update(expert, self.matrix).mul_(weight)

    def __len__(self) -> int:
        return len(self.context.plan.experts)


def _stored(context: Context, matrix: Matrix) -> Iterator[Factors]:
    """Factors that the forward stage stored, in manifest order, on the device."""
    for number, expert in enumerate(context.plan.expert_names):
        check()
        key = forward_key(context.plan, expert, matrix)
        values = context.directory.results(key)[matrix.name]
        yield context.store.read_factors(
            matrix.name, number, values["rank"], values["norm"], context.device
        )


def _factored(context: Context, matrix: Matrix, method: FactorMethod) -> Iterator[Factors]:
    """Factors made here from base and experts, one expert at a time, rounded as stored ones are."""
    for update_OI in _Updates(context, matrix):
        factors = method.factor(update_OI, None, len(context.plan.experts))
        yield Factors(
            factors.basis_OK[:].float(),
            factors.coordinates_KI.float(),
            factors.spectrum,
            factors.norm,
        )
