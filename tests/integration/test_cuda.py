"""The same merge on a GPU: same files, numbers within the rounding of another device."""

from pathlib import Path

import pytest
import torch
from conftest import MakeZoo, PlanOf, merge_here
from safetensors.torch import load_file

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["vit", "llama", "gpt2"])
def test_a_merge_on_cuda_equals_one_on_the_cpu(name: str, zoo: MakeZoo, plan_of: PlanOf) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    outputs: dict[str, Path] = {}
    for device in ("cpu", "cuda"):
        plan = plan_of(zoo(name), device, run={"device": device})
        outputs[device] = merge_here(plan).output
    assert {p.name for p in outputs["cpu"].iterdir()} == {p.name for p in outputs["cuda"].iterdir()}
    for path in outputs["cpu"].glob("*.safetensors"):
        wanted, found = load_file(path), load_file(outputs["cuda"] / path.name)
        for tensor, values in wanted.items():
            error = (found[tensor] - values).double().norm() / values.double().norm()
            assert float(error) < 1e-4, tensor
