"""Fisher merging from given files, through the whole engine and on a worked example."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeZoo, PlanOf, Run, merge_here
from merging import merge as merge_one
from models import Zoo, tensors_of
from safetensors.torch import save_file
from torch import Tensor

from esm_stream.errors import DataError, InputError

Fishers = dict[str, dict[str, Tensor]]


def write(root: Path, found: Zoo) -> Fishers:
    """Random Fisher information of every expert."""
    root.mkdir()
    fishers: Fishers = {}
    generator = torch.Generator().manual_seed(3)
    for name in found.experts:
        fishers[name] = {
            key: torch.rand(value.shape, generator=generator).to(torch.bfloat16)
            for key, value in tensors_of(found.base).items()
        }
        save_file(fishers[name], root / f"{name}.safetensors")
    return fishers


def experts_of(found: Zoo, root: Path) -> list[dict[str, str]]:
    return [
        {"name": name, "model": str(path), "fisher": str(root / f"{name}.safetensors")}
        for name, path in found.experts.items()
    ]


def test_weights_that_matter_more_count_more() -> None:
    updates = [torch.tensor([1.0, 0.0, 4.0]), torch.tensor([0.0, 2.0, 8.0])]
    fisher = [torch.tensor([3.0, 0.0, 1.0]), torch.tensor([1.0, 5.0, 1.0])]
    found = merge_one("fisher", updates, fisher=fisher)
    torch.testing.assert_close(found, torch.tensor([0.75, 2.0, 6.0]), rtol=1e-6, atol=1e-6)
    weighted = merge_one("fisher", updates, fisher=fisher, weights=[1.0, 3.0])
    torch.testing.assert_close(weighted[0], torch.tensor(0.5))


def test_normalised_information_does_not_depend_on_its_scale() -> None:
    updates = [torch.tensor([1.0, 0.0, 4.0]), torch.tensor([0.0, 2.0, 8.0])]
    fisher = [torch.tensor([3.0, 1.0, 1.0]), torch.tensor([1.0, 5.0, 1.0])]
    options = {"normalize": True}
    one = merge_one("fisher", updates, fisher=fisher, options=options)
    other = merge_one("fisher", updates, fisher=[fisher[0] * 100, fisher[1]], options=options)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("normalize", [False, True])
def test_merge_is_the_weighted_mean(
    zoo: MakeZoo, run: Run, tmp_path: Path, normalize: bool
) -> None:
    found = zoo("llama", experts=3)
    fishers = write(tmp_path / "fisher", found)
    base = tensors_of(found.base)
    tuned = [tensors_of(path) for path in found.experts.values()]
    merge: dict[str, Any] = {"method": "fisher", "options": {"normalize": normalize}}
    merged = tensors_of(run(found, merge=merge, experts=experts_of(found, tmp_path / "fisher")))
    norms = [
        sum(float(f.double().square().sum()) for f in one.values()) ** 0.5 if normalize else 1.0
        for one in fishers.values()
    ]
    for name in base:
        shares = [
            (one[name].double() / norm).clamp(min=1e-6)
            for one, norm in zip(fishers.values(), norms, strict=True)
        ]
        total = sum(s * one[name].double() for s, one in zip(shares, tuned, strict=True))
        expected = (total / sum(shares)).float()
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_information_that_is_missing_is_named(
    zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    found = zoo("llama", experts=2)
    with pytest.raises(InputError, match='expert "expert1" has no Fisher information'):
        plan_of(found, merge={"method": "fisher"})
    fishers = write(tmp_path / "fisher", found)
    first, gone = next(iter(fishers.items()))
    del gone["model.norm.weight"]
    save_file(gone, tmp_path / "fisher" / f"{first}.safetensors")
    experts = experts_of(found, tmp_path / "fisher")
    with pytest.raises(InputError, match=r"'model.norm.weight'.*does not have it"):
        plan_of(found, merge={"method": "fisher"}, experts=experts)
    rules = [{"tensors": "model.norm.weight", "method": "average"}]
    plan_of(found, merge={"method": "fisher", "rules": rules}, experts=experts)


def test_negative_information_is_refused(zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path) -> None:
    found = zoo("llama", experts=2)
    fishers = write(tmp_path / "fisher", found)
    first, bad = next(iter(fishers.items()))
    bad["model.norm.weight"][2] = -1
    save_file(bad, tmp_path / "fisher" / f"{first}.safetensors")
    plan = plan_of(
        found, merge={"method": "fisher"}, experts=experts_of(found, tmp_path / "fisher")
    )
    with pytest.raises(DataError, match=r"'model.norm.weight' holds NaN, Inf or negative"):
        merge_here(plan)
