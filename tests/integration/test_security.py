"""Nothing leads out of the directories of a merge, and nothing secret gets into them."""

import json
from pathlib import Path

import pytest
import torch
from conftest import MakeZoo, PlanOf, merge_here
from safetensors.torch import load_file, save_file
from test_resume import MERGE, stop_after

from esm_stream.calibration.arguments import load_values, save_values
from esm_stream.errors import EsmStreamError, LockedError, TaskError
from esm_stream.store.files import save_tensors
from esm_stream.store.lock import locked

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def test_no_secret_of_the_environment_is_written_anywhere(
    zoo: MakeZoo, plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, "s3cr3t-of-mine")
    plan = plan_of(zoo("llama"), merge={"method": "average"})
    merge_here(plan)
    files = [p for root in (plan.work, plan.output) for p in root.rglob("*") if p.is_file()]
    assert len(files) > 5
    assert [path for path in files if b"s3cr3t-of-mine" in path.read_bytes()] == []


def test_a_link_in_the_place_of_a_shard_is_not_followed(
    zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    plan = plan_of(zoo("llama", shard="12KB"), merge=MERGE)
    stop_after(plan, 4)
    partial = sorted(plan.output.glob("*.partial"))[0]
    outside = tmp_path / "precious"
    outside.write_bytes(partial.read_bytes())
    before = outside.read_bytes()
    partial.unlink()
    partial.symlink_to(outside)
    merge_here(plan)
    assert outside.read_bytes() == before
    assert not any(path.is_symlink() for path in plan.output.iterdir())


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "work/lock").symlink_to(tmp_path / "precious")
    with pytest.raises((OSError, LockedError)), locked(tmp_path / "work"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("name", ["..", ".", "../../x", "/etc/x", "a" * 300])
def test_tensors_of_any_name_stay_in_the_work_directory(
    name: str, zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    found = zoo("llama").copy(tmp_path / "zoo")
    for path in (found.base, *found.experts.values()):
        weights = torch.ones(4, 4) * len(path.name)
        file = path / "model.safetensors"
        save_file({**load_file(file), name: weights}, file, {"format": "pt"})
    around = {p.name for p in tmp_path.iterdir()}
    plan = plan_of(found, merge={"method": "tsv_m"})
    merge_here(plan)
    assert {p.name for p in tmp_path.iterdir()} - around == {
        "merged.toml",
        "merged",
        "merged.work",
    }
    assert name in load_file(plan.output / "model.safetensors")
    allowed = {"done", "events.jsonl", "factors.zarr", "lock", "plan.json", "statistics"}
    assert {p.name for p in plan.work.iterdir()} <= allowed


def test_stored_values_name_outputs_of_models_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_values(path, [{"a": torch.ones(2)}])
    assert torch.equal(next(iter(load_values(path)))["a"], torch.ones(2))
    for name in ("dataclass", "torch", "ModelOutput.__init__", "Optional"):
        values = json.dumps([{"output": name, "dict": {}}])
        save_tensors(path, {"0": torch.ones(1)}, {"values": values})
        with pytest.raises((ValueError, AttributeError)):
            list(load_values(path))


def test_a_read_only_place_is_told(zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    plan = plan_of(zoo("llama"), merge=MERGE, run={"work": str(tmp_path / "file/work")})
    with pytest.raises(EsmStreamError) as error:
        merge_here(plan)
    assert isinstance(error.value, TaskError)
    assert str(tmp_path / "file") in str(error.value)
