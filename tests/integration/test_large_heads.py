"""A head is far larger than any matrix of a block: refused with the numbers, or merged in little.

Letters: O outputs (the vocabulary), I inputs (the width).
"""

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from conftest import merge_here
from safetensors.torch import load_file, save_file
from test_cli import esm_stream, words
from torch import Tensor

from esm_stream.errors import BudgetError
from esm_stream.manifest import load_manifest
from esm_stream.planning.make import make_plan
from esm_stream.planning.plan import Plan

HEAD = "lm_head.weight"
EXPERTS = 8


def model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder / "model.safetensors"


def empty_head(path: Path, outputs: int, inputs: int) -> None:
    """A file with a header and a hole: what planning reads."""
    end = outputs * inputs * 2
    entry = {"dtype": "BF16", "shape": [outputs, inputs], "data_offsets": [0, end]}
    header = json.dumps({HEAD: entry}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)


def manifest(root: Path, memory: str, **options: object) -> Path:
    """Experts' heads merged by ESM from the weights alone, everything that is not given default."""
    values = {"decomposition": "svd", "levels": [], **options}
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    text = f"""
[base]
model = "{root}/base"
[merge]
method = "average"
[[merge.rules]]
tensors = "{HEAD}"
method = "esm"
alpha = 1.0
[merge.rules.options]
{chr(10).join(lines)}
[output]
path = "{root}/merged"
dtype = "float32"
[run]
memory = "{memory}"
"""
    for number in range(EXPERTS):
        text += f'[[experts]]\nname = "e{number}"\nmodel = "{root}/e{number}"\n'
    path = root / "merge.toml"
    path.write_text(text)
    return path


def plan(root: Path, memory: str, **options: object) -> Plan:
    return make_plan(load_manifest(manifest(root, memory, **options)))


def test_a_head_of_a_large_vocabulary_is_refused_with_the_option_that_helps(
    tmp_path: Path,
) -> None:
    for name in ("base", *(f"e{number}" for number in range(EXPERTS))):
        empty_head(model(tmp_path / name), 128256, 4096)
    path = manifest(tmp_path, "8GiB")
    for result, code in ((esm_stream("plan", path), 0), (esm_stream("merge", path), 6)):
        assert result.exit_code == code
        # 23.5 GiB for the merge, and the factors of all experts, which are made from weights here.
        found = re.search(r"task 'merge/lm_head.weight' needs ([\d.]+) GiB", words(result))
        assert found, words(result)
        assert float(found[1]) == pytest.approx(39.6, rel=0.05)
        assert "the budget is 8.00 GiB" in words(result)
        assert 'rank_budget = "min_side"' in words(result)
    fitting = esm_stream("plan", manifest(tmp_path, "8GiB", rank_budget="min_side"))
    assert fitting.exit_code == 0, fitting.output
    assert "min_side" not in words(fitting)


def test_a_head_is_merged_within_a_small_budget(tmp_path: Path) -> None:
    # The proportions of 128256 x 4096.
    outputs, inputs = 16032, 512
    random = torch.Generator().manual_seed(0)
    base_OI = 0.02 * torch.randn(outputs, inputs, generator=random)
    save_file({HEAD: base_OI}, model(tmp_path / "base"))
    for number in range(EXPERTS):
        update_OI = 1e-3 * torch.randn(outputs, inputs, generator=random)
        save_file({HEAD: base_OI + update_OI}, model(tmp_path / f"e{number}"))
    with pytest.raises(BudgetError, match='rank_budget = "min_side"'):
        plan(tmp_path, "400MiB")
    merged = merge_here(plan(tmp_path, "400MiB", rank_budget="min_side"))
    update_OI = load_file(merged.output / "model.safetensors")[HEAD].double() - base_OI.double()
    assert_flat(update_OI)


def assert_flat(update_OI: Tensor) -> None:
    """All singular values are equal, as those of a product of two polar factors are."""
    values = torch.linalg.eigvalsh(update_OI.T @ update_OI).sqrt()
    assert float(values[0]) > 0
    torch.testing.assert_close(values, values.mean().expand_as(values), rtol=1e-3, atol=0)
