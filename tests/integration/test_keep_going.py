"""A task that fails for good: what does not need it is done first, and its inputs are told."""

import pytest
from conftest import MakeZoo, PlanOf, merge_here
from models import change_tensors
from test_merge import digests
from test_resume import MERGE, Log

from esm_stream.errors import DataError, TaskError
from esm_stream.stages import merge as merge_stage

BROKEN = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("how", [{}, {"scheduler": "threads", "parallel": 2}], ids=["one", "two"])
def test_everything_that_does_not_need_a_failed_task_is_done_first(
    how: dict[str, object], zoo: MakeZoo, plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(zoo("llama", shard="12KB"), merge=MERGE)
    real = merge_stage.run

    def fails(context: merge_stage.Context) -> object:
        if context.task.subject == BROKEN:
            raise RuntimeError("no luck")
        return real(context)

    log = Log()
    with monkeypatch.context() as patch:
        patch.setattr(merge_stage, "run", fails)
        with pytest.raises(TaskError) as error:
            merge_here(plan, log, keep_going=True, **how)
    first, last = str(error.value).splitlines()
    assert f"task 'merge/{BROKEN}' failed: RuntimeError: no luck" in first
    assert "it reads forward/expert0/0000, forward/expert1/0000" in first
    assert "were not tried; all others are done" in last
    waiting = set(plan.tasks) - set(log.ran) - {f"merge/{BROKEN}"}
    assert {plan.tasks[key].stage for key in waiting} == {"scale", "write", "seal", "finish"}
    assert "seal" in {plan.tasks[key].stage for key in log.ran}
    again = Log()
    merge_here(plan, again)
    assert set(again.ran) == set(plan.tasks) - set(log.ran)
    fresh = plan_of(zoo("llama", shard="12KB"), "fresh/merged", merge=MERGE)
    merge_here(fresh)
    assert digests(plan.output) == digests(fresh.output)


def test_the_other_experts_go_on_when_one_is_broken(
    zoo: MakeZoo, plan_of: PlanOf, tmp_path: object
) -> None:
    found = zoo("llama", shard="12KB").copy(tmp_path / "zoo")  # type: ignore[operator]
    change_tensors(found.experts["expert0"], {BROKEN: lambda value: value.fill_(float("nan"))})
    plan, log = plan_of(found, merge=MERGE), Log()
    with pytest.raises(DataError, match=BROKEN):
        merge_here(plan, log, keep_going=True)
    assert "forward/expert1/0001" in log.ran
    assert "forward/expert0/0001" not in log.ran
