"""Stage 4 (pass 1): factors of all experts -> merged update of one matrix, and its norm.

From:  the store, where the forward put them; for methods without data, base and experts themselves.
To:    factors.zarr/<tensor>/update, before layer scaling and alpha, in the tensor's stored shape.
Peak:  the stacks of all experts' thin factors, whose size does not depend on their number, and one
       expert's matrix at a time.
"""

from collections.abc import Iterator

from esm_stream.methods import factor_method
from esm_stream.methods.contract import FactorMethod, Factors
from esm_stream.planning.plan import Matrix
from esm_stream.stages.context import Context, TaskResult
from esm_stream.stopping import check
from esm_stream.subspace.basis import frobenius_norm


def run(context: Context) -> TaskResult:
    """Combine all experts' factors of one matrix."""
    matrix = context.plan.matrices[context.task.subject]
    method = factor_method(matrix.method)
    factors = list(
        _stored(context, matrix) if matrix.moment else _factored(context, matrix, method)
    )
    merged = method.combine(factors, (matrix.outputs, matrix.inputs))
    del factors
    norm = frobenius_norm(merged.update_OI)
    result = TaskResult(values={"norm": norm, **merged.diagnostics})
    start = 0
    for part in matrix.parts:
        update = merged.update_OI[start : start + part.outputs]
        start += part.outputs
        written = context.store.write_update(part.tensor, update.T if matrix.transposed else update)
        result.outputs += [context.directory.record(path) for path in written]
    return result


def _stored(context: Context, matrix: Matrix) -> Iterator[Factors]:
    """Factors that the forward stage stored, in manifest order, on the device."""
    for number, expert in enumerate(context.plan.expert_names):
        check()
        key = f"forward/{expert}/{matrix.block:04d}"
        values = context.directory.results(key)[matrix.name]
        found = context.store.read_factors(matrix.name, number, values["rank"], values["norm"])
        yield Factors(
            found.basis_OK.to(context.device),
            found.coordinates_KI.to(context.device),
            found.spectrum.to(context.device),
            found.norm,
        )


def _factored(context: Context, matrix: Matrix, method: FactorMethod) -> Iterator[Factors]:
    """Factors made here from base and experts, one expert at a time, rounded as stored ones are."""
    for expert, weight in zip(context.plan.expert_names, matrix.method.weights, strict=True):
        check()
        update_OI = context.update(expert, matrix).mul_(weight)
        factors = method.factor(update_OI, None, len(context.plan.experts))
        yield Factors(
            factors.basis_OK.float(), factors.coordinates_KI.float(), factors.spectrum, factors.norm
        )
