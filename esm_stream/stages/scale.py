"""Stage 5: norms of the merged updates of one role -> the scale of each (ESM's layer level)."""

from esm_stream.planning.plan import Matrix, update_results
from esm_stream.scaling.layer import layer_scales
from esm_stream.stages.context import Context, TaskResult


def run(context: Context) -> TaskResult:
    """Scales of all matrices of one group, from the norms of pass 1."""
    names = context.task.tensors
    plan = context.plan
    norms = {name: update_results(plan, plan.matrices[name])["norm"] for name in names}
    assert plan.layer_level is not None
    scales = layer_scales(norms, *plan.layer_level)
    return TaskResult(values={"scales": scales})


def scale_of(context: Context, matrix: Matrix) -> float:
    """Scale of one matrix; 1.0 where layer scaling does not apply."""
    if not matrix.scaled:
        return 1.0
    scales: dict[str, float] = context.directory.results(f"scale/{matrix.group}")["scales"]
    return scales[matrix.name]
