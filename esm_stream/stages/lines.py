"""Sums of magnitudes over the whole model, and LiNeS' factor of the first block from them.

From:  base and experts, panel by panel; norms that the merges of matrices left in their markers.
To:    markers: sums by group of tensors, then the factor that every write task looks up.
Peak:  one panel.
"""

import math

import torch
from torch import Tensor

from esm_stream.methods import elementwise_method
from esm_stream.planning.plan import MethodChoice, TensorPlan, update_results
from esm_stream.scaling.lines import factor, first_factor
from esm_stream.stages.context import Context, TaskResult
from esm_stream.stages.measure import facts_of
from esm_stream.stages.panels import Panels
from esm_stream.stages.scale import scale_of
from esm_stream.stopping import check


def run(context: Context) -> TaskResult:
    """Magnitudes of the tensors of one group: of the sum of all updates, and of what is merged.

    Merged updates of matrices are left out: their merges have summed them up.
    """
    updates, merged = [], []
    for name in context.task.tensors:
        check()
        plan = context.plan.tensors[name]
        assert plan.method is not None
        if plan.treatment == "elementwise":
            method = elementwise_method(plan.method)
            panels = Panels(context, name, plan.method, method.whole_rows)
            known = facts_of(context, panels, plan.population)
            for panel in panels:
                updates.append(magnitude(panel.updates_TN.sum(dim=0)))
                merged.append(magnitude(method.merge(panel, known)))
        else:
            alike = MethodChoice("average", {}, plan.method.modality, plan.method.weights)
            for panel in Panels(context, name, alike, whole_rows=False):
                updates.append(magnitude(panel.updates_TN.sum(dim=0)))
    return TaskResult(values={"updates": math.fsum(updates), "merged": math.fsum(merged)})


def run_total(context: Context) -> TaskResult:
    """The factor of the first block."""
    plan, results = context.plan, context.directory.results
    sums = [results(key) for key in context.task.after if plan.tasks[key].stage == "magnitudes"]
    matrices = [
        update_results(plan, m)["magnitude"] * abs(scale_of(context, m))
        for m in plan.matrices.values()
    ]
    merged = math.fsum([*(s["merged"] for s in sums), *matrices])
    first = first_factor(math.fsum(s["updates"] for s in sums), merged, len(plan.experts))
    return TaskResult(values={"first": first})


def magnitude(values: Tensor) -> float:
    """Sum of magnitudes, in float64."""
    return float(values.abs().sum(dtype=torch.float64))


def lines_factor(context: Context, tensor: TensorPlan) -> float:
    """What LiNeS multiplies a tensor's merged update by; 1.0 where nothing is left to find out."""
    if context.plan.lines_slope is None:
        return 1.0
    first = context.directory.results("lines")["first"]
    return factor(first, context.plan.lines_slope, tensor.depth)
