"""[output] layers: blocks left out, repeated, and from different experts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeZoo, PlanOf, Run
from models import tensors_of
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from esm_stream.checkpoints.checkpoint import open_checkpoint
from esm_stream.checkpoints.names import block_of, in_block
from esm_stream.checkpoints.restacked import block_order, restacked_config
from esm_stream.errors import ManifestError

ORDER = (0, 1, 0, 1, 1)
RANGES = [[0, 2], [0, 2], [1, 2]]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_blocks_of_different_experts_are_stacked(zoo: MakeZoo, run: Run, architecture: str) -> None:
    found = zoo(architecture)
    first, second = found.experts
    rules: list[dict[str, Any]] = [
        {"tensors": r"re:([^0-9]*\.)?(0|1)\..*", "method": "expert", "expert": first},
        {"tensors": "*", "method": "expert", "expert": second},
    ]
    output = run(found, merge={"method": "average", "rules": rules}, output={"layers": RANGES})
    merged = tensors_of(output)
    one, other = (tensors_of(path) for path in found.experts.values())
    expected = {name: value for name, value in other.items() if block_of(name) is None}
    for number, block in enumerate(ORDER):
        source = one if number < 2 else other
        expected |= {in_block(n, number): v for n, v in source.items() if block_of(n) == block}
    assert set(merged) == set(expected)
    assert all(torch.equal(merged[name], value) for name, value in expected.items())
    model = AutoModelForCausalLM.from_pretrained(output)
    assert len([m for m in model.modules() if type(m).__name__.endswith(("Layer", "Block"))]) == 5
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_all_models_are_merged_in_the_order_of_the_output(zoo: MakeZoo, run: Run) -> None:
    found = zoo("llama", shard="12KB")
    merge = {"method": "ties", "alpha": 0.7, "options": {"trim": "tensor"}}
    plain = tensors_of(run(found, "plain", merge=merge))
    output = run(found, "deep", merge=merge, output={"layers": RANGES})
    assert (output / "model.safetensors.index.json").exists()
    for name, value in tensors_of(output).items():
        block = block_of(name)
        own = name if block is None else in_block(name, ORDER[block])
        assert torch.equal(value, plain[own]), name


def test_all_layers_in_order_change_nothing(zoo: MakeZoo, plan_of: PlanOf) -> None:
    plan = plan_of(zoo("llama"), merge={"method": "average"}, output={"layers": [[0, 1], [1, 2]]})
    assert plan.block_order is None


@pytest.mark.parametrize(
    ("merge", "layers", "message"),
    [
        ({"method": "average"}, [[0, 3]], r"\[0, 3\] outside the model's layers"),
        ({}, [[0, 1]], "methods that look at samples"),
    ],
)
def test_what_cannot_be_stacked_is_refused(
    zoo: MakeZoo,
    plan_of: PlanOf,
    merge: dict[str, Any],
    layers: list[list[int]],
    message: str,
) -> None:
    with pytest.raises(ManifestError, match=rf"output\.layers: .*{message}"):
        plan_of(zoo("llama"), merge=merge, output={"layers": layers})


def test_two_stacks_of_blocks_are_refused(tmp_path: Path) -> None:
    tensors = {f"{part}.block.{n}.w": torch.zeros(2) for part in ("a", "b") for n in range(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ManifestError, match=r"one stack of blocks, found a\.block, b\.block"):
        block_order(open_checkpoint(tmp_path), [(0, 1)])


def test_the_configuration_follows() -> None:
    config = {"num_hidden_layers": 2, "layer_types": ["full", "sliding"], "ids": [1, 2, 3]}
    changed = restacked_config(config, (1, 1, 0))
    assert changed["num_hidden_layers"] == 3
    assert changed["layer_types"] == ["sliding", "sliding", "full"]
    assert changed["ids"] == [1, 2, 3]
    nested = {"text_config": {"num_hidden_layers": 2}, "num_labels": 2}
    assert restacked_config(nested, (0,)) == {
        "text_config": {"num_hidden_layers": 1},
        "num_labels": 2,
    }
    with pytest.raises(ManifestError, match=r"mlp_only_layers in .* about single"):
        restacked_config({"num_hidden_layers": 8, "mlp_only_layers": [0, 3]}, (0, 1))
    with pytest.raises(ManifestError, match="has none of num_hidden_layers"):
        restacked_config({"hidden_size": 8}, (0, 1))


def test_nothing_of_the_base_is_lost_beside_the_layers(zoo: MakeZoo, run: Run) -> None:
    found = zoo("llama")
    output = run(found, merge={"method": "average"}, output={"layers": [[1, 2]]})
    config = json.loads((output / "config.json").read_text())
    before = json.loads((Path(found.base) / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    changed = {key for key in before if config[key] != before[key]}
    assert changed <= {"num_hidden_layers", "layer_types"}
