"""Sweeps whose statistics belong to all tensors of one method: sums by group, then their total.

From:  base and experts, panel by panel; totals of the sweeps before.
To:    statistics/<population>/<sweep>/, one file of sums per group of tensors and one total.
Peak:  one panel and the sums, which do not depend on the size of the model.

A *population* is all tensors that are merged by one method with the same options and weights.
"""

from typing import Any

from safetensors.torch import load_file

from esm_stream.methods import elementwise_method
from esm_stream.methods.contract import Sums, Whole, add_to
from esm_stream.planning.plan import MethodChoice
from esm_stream.stages.context import BASE, Context, TaskResult
from esm_stream.stages.panels import Panels, facts_of_tensor, sums_of
from esm_stream.stopping import check
from esm_stream.store.files import save_tensors


def run(context: Context) -> TaskResult:
    """One sweep over the tensors of one group."""
    task, plan = context.task, context.plan
    choice = plan.populations[task.subject]
    method = elementwise_method(choice)
    known = facts_of_population(context, task.subject, task.sweep)
    sums: Sums = {}
    for name in task.tensors:
        check()
        panels = Panels(context, name, choice, method.whole_rows)
        for key, value in sums_of(panels, method, known).items():
            add_to(sums, key, value)
    return _stored(context, task.key, sums)


def run_total(context: Context) -> TaskResult:
    """Add up the groups of one sweep, in their order."""
    sums: Sums = {}
    for key in context.task.after:
        for name, value in _load(context, key).items():
            add_to(sums, name, value)
    return _stored(context, context.task.key, sums)


def facts_of_population(context: Context, population: str, sweeps: int) -> list[Any]:
    """What the first sweeps over a population found."""
    choice = context.plan.populations[population]
    method = elementwise_method(choice)
    whole = _whole(context, population, choice)
    known: list[Any] = []
    for sweep in range(sweeps):
        sums = _load(context, f"total/{population}/{sweep}")
        known.append(method.settle(sums, known, whole))
    return known


def facts_of(context: Context, panels: Panels, population: str) -> list[Any]:
    """What all sweeps of a tensor's method found: over its population, or over the tensor here."""
    method = elementwise_method(panels.choice)
    if population:
        return facts_of_population(context, population, method.sweeps)
    return facts_of_tensor(panels, method, check)


def _whole(context: Context, population: str, choice: MethodChoice) -> Whole:
    tensors = context.reader(BASE).checkpoint.tensors
    elements = sum(
        tensors[plan.name].numel
        for plan in context.plan.tensors.values()
        if plan.population == population
    )
    return Whole(context.plan.expert_names, choice.weights, elements)


def _load(context: Context, key: str) -> Sums:
    """The sums that another task left."""
    directory = context.directory
    sums: Sums = load_file(directory.require_whole(key, directory.statistics(key)))
    return sums


def _stored(context: Context, key: str, sums: Sums) -> TaskResult:
    path = context.directory.statistics(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, sums)
    return TaskResult([context.directory.record(path)])
