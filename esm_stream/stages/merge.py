"""Stage 4 (pass 1): factors of all experts -> merged update of one matrix, and its norm.

From:  the store, where the forward put them; for methods without data, base and experts themselves.
To:    factors.zarr/<matrix>/update, before layer scaling and alpha, transposed if it is stored so.
Peak:  subspace/product.py. Bases that the forward stored are read panel by panel; those made here
       are kept in float32, all experts' together no larger than the matrix or its square.
       An elementwise method comes here only if [merge.post] needs whole matrices.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from esm_stream.methods import is_factor_method, method_of
from esm_stream.methods.contract import (
    ElementwiseMethod,
    FactorMethod,
    Factors,
    Merged,
    SpectralMethod,
    SumMethod,
)
from esm_stream.planning.plan import Matrix, Part, forward_key
from esm_stream.scaling.singular import calibrated
from esm_stream.stages import sums
from esm_stream.stages.context import BASE, Context, TaskResult
from esm_stream.stages.lines import magnitude
from esm_stream.stages.measure import facts_of
from esm_stream.stages.panels import Panels
from esm_stream.stopping import check
from esm_stream.subspace.basis import frobenius_norm


def run(context: Context) -> TaskResult:
    """Merge one matrix of all experts."""
    matrix = context.plan.matrices[context.task.subject]
    merged = _merged(context, matrix)
    if matrix.svc is not None:
        merged = _calibrated(context, matrix, merged, matrix.svc)
    norm = frobenius_norm(merged.update_OI)
    result = TaskResult(values={"norm": norm, **merged.diagnostics})
    if context.plan.lines_slope is not None:
        result.values["magnitude"] = magnitude(merged.update_OI)
    update = merged.update_OI.T if matrix.transposed else merged.update_OI
    written = context.store.write_update(matrix.name, update)
    result.outputs += [context.directory.record(path) for path in written]
    return result


def _merged(context: Context, matrix: Matrix) -> Merged:
    """The merged update, from stored factors or from the updates themselves."""
    method, shape = method_of(matrix.method), (matrix.outputs, matrix.inputs)
    if isinstance(method, ElementwiseMethod):
        return Merged(_by_panels(context, matrix, method).to(context.device))
    if isinstance(method, SpectralMethod):
        return method.merge(_Updates(context, matrix), shape)
    if isinstance(method, SumMethod):
        return sums.merged(context, matrix)
    assert is_factor_method(method)
    found = _stored(context, matrix) if matrix.moment else _factored(context, matrix, method)
    return method.combine(found if method.streams else list(found), shape)


def _calibrated(context: Context, matrix: Matrix, merged: Merged, floor: float) -> Merged:
    """Singular value calibration of a merged update (scaling/singular.py)."""
    update_OI, factors_R = calibrated(merged.update_OI, _Updates(context, matrix), floor)
    figures = {"svc_mean": float(factors_R.mean()), "svc_smallest": float(factors_R.min())}
    return Merged(update_OI.float(), {**merged.diagnostics, **figures})


def _by_panels(context: Context, matrix: Matrix, method: ElementwiseMethod) -> Tensor:
    """Update of a matrix (O, I), merged panel by panel."""
    found, tensors = [], context.reader(BASE).checkpoint.tensors
    stored: dict[tuple[str, int | None], Tensor] = {}
    for part in matrix.parts:
        place = part.tensor, part.slice
        if place not in stored:
            rows, columns = part.stored_shape(tensors[part.tensor].shape)
            values = _stored_by_panels(context, matrix, part, method, rows * columns)
            stored[place] = values.view(rows, columns)
        whole = stored[place].T if matrix.transposed else stored[place]
        found.append(whole[part.start : part.start + part.outputs])
    return found[0] if len(found) == 1 else torch.cat(found)


def _stored_by_panels(
    context: Context, matrix: Matrix, part: Part, method: ElementwiseMethod, numel: int
) -> Tensor:
    """Merged update of one stored matrix, flat, float32."""
    panels = Panels(context, part.tensor, matrix.method, method.whole_rows)
    known = facts_of(context, panels, context.plan.tensors[part.tensor].population)
    first = (part.slice or 0) * numel
    values = torch.empty(numel, dtype=torch.float32)
    for panel in replace(panels, start=first, stop=first + numel):
        check()
        merged_N = method.merge(panel, known)
        values[panel.first - first :][: len(merged_N)] = merged_N
    return values


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

    def low_rank(self) -> list[tuple[Tensor, Tensor]] | None:
        names, weights = self.context.plan.expert_names, self.matrix.method.weights
        found = []
        for expert, weight in zip(names, weights, strict=True):
            pair = self.context.low_rank(expert, self.matrix)
            if pair is None:
                return None
            found.append((pair[0] * weight, pair[1]))
        return found


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
