"""Sums over experts of one matrix: terms added as experts come, taken out as they go.

From:  an expert's update and its moment, in the forward; or, without data, the update alone.
To:    store/sums.py; from there the merged update.
Peak:  what the method says of one term, and of the solution.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esm_stream.checkpoints.checkpoint import Checkpoint
from esm_stream.errors import InputError
from esm_stream.methods import method_of
from esm_stream.methods.contract import Merged, Moment, SumMethod
from esm_stream.planning.plan import Matrix, Plan, Task, digest, forward_key
from esm_stream.stages.context import Context, checkpoint_at
from esm_stream.stopping import check
from esm_stream.store.sums import SumStore
from esm_stream.subspace.basis import frobenius_norm


def add_observed(context: Context, matrix: Matrix, moment: Moment) -> dict[str, float]:
    """Add the term of the task's expert, from what the forward saw; returns the update's norm."""
    expert = context.task.expert
    wanted = members(context.plan, matrix)
    update_OI = context.update(expert, matrix)
    method = sum_method(matrix)
    _store(context.plan).add(
        matrix.name,
        method.places((matrix.outputs, matrix.inputs)),
        next(member for member, name in wanted.items() if name == expert),
        {"expert": expert},
        method.term(update_OI, moment if moment.tokens else None),
        wanted,
    )
    return {"norm": frobenius_norm(update_OI)}


def merged(context: Context, matrix: Matrix) -> Merged:
    """The merged update of a matrix, from the sum over all experts."""
    if not matrix.moment:
        _complete(context, matrix)
    method, shape = sum_method(matrix), (matrix.outputs, matrix.inputs)
    sums = _store(context.plan).whole(matrix.name, members(context.plan, matrix))
    assert sums is not None
    return method.solve(lambda place: sums(place).to(context.device), shape)


def complete(plan: Plan, task: Task) -> bool:
    """Whether the terms that a finished forward task has added are still in their sums."""
    return all(
        task.fingerprint in _store(plan).members(matrix.name, members(plan, matrix))
        for matrix in plan.sums_filled_by.get(task.key, ())
    )


def members(plan: Plan, matrix: Matrix) -> dict[str, str]:
    """The experts that a sum is over, by the fingerprint of what each adds."""
    if matrix.moment:
        keys = {name: forward_key(plan, name, matrix) for name in plan.experts}
        return {plan.tasks[key].fingerprint: name for name, key in keys.items()}
    return {
        _fingerprint(plan, matrix, name, checkpoint_at(plan, root), weight): name
        for (name, root), weight in zip(plan.experts.items(), matrix.method.weights, strict=True)
    }


def _complete(context: Context, matrix: Matrix) -> None:
    """Take out experts that left and add those that are missing; of all others nothing is read."""
    store, wanted = _store(context.plan), members(context.plan, matrix)
    held = store.held(matrix.name)
    leaving = [member for member in held if member not in wanted]
    joining = [member for member in wanted if member not in held]
    if leaving:
        shorter = len(leaving) + len(joining) < len(wanted)
        if not shorter or not all(_take_out(context, matrix, m, held[m]) for m in leaving):
            store.forget(matrix.name)
    method, shape = sum_method(matrix), (matrix.outputs, matrix.inputs)
    weights = dict(zip(context.plan.experts, matrix.method.weights, strict=True))
    for member, expert in wanted.items():
        check()
        if member in store.held(matrix.name):
            continue
        update_OI = context.update(expert, matrix).mul_(weights[expert])
        store.add(
            matrix.name,
            method.places(shape),
            member,
            {
                "expert": expert,
                "root": str(context.plan.experts[expert]),
                "weight": weights[expert],
            },
            method.term(update_OI, None),
            wanted,
        )


def _take_out(context: Context, matrix: Matrix, member: str, about: Mapping[str, Any]) -> bool:
    """Take out an expert that left, if its files are still what they were."""
    root, weight = Path(about["root"]), about["weight"]
    try:
        checkpoint = checkpoint_at(context.plan, root)
    except InputError:
        return False
    if _fingerprint(context.plan, matrix, about["expert"], checkpoint, weight) != member:
        return False
    check()
    context.add_model(str(root), root)
    update_OI = context.update(str(root), matrix).mul_(weight)
    return _store(context.plan).remove(
        matrix.name, member, sum_method(matrix).term(update_OI, None)
    )


def _fingerprint(
    plan: Plan, matrix: Matrix, expert: str, checkpoint: Checkpoint, weight: float
) -> str:
    """What one expert's term of a matrix is made of, where no forward makes it."""
    names = dict.fromkeys(part.tensor for part in matrix.parts)
    if any(name not in checkpoint.tensors for name in names):
        return ""
    return digest(
        expert,
        weight,
        [(p.tensor, p.outputs, p.slice, p.start) for p in matrix.parts],
        matrix.transposed,
        sum_method(matrix).identity("term"),
        [[c.identity(n) for n in names] for c in (checkpoint_at(plan, plan.base), checkpoint)],
    )


def sum_method(matrix: Matrix) -> SumMethod:
    """The method of a matrix that is merged from sums."""
    method = method_of(matrix.method)
    assert isinstance(method, SumMethod)
    return method


def _store(plan: Plan) -> SumStore:
    return SumStore(plan.directory.sums)
