"""The same merges by mergekit and by us, through `esm-stream import`, on a random tiny Llama.

mergekit runs in its own process and environment, whose interpreter ESM_MERGEKIT names:

    python -m venv mk && mk/bin/pip install mergekit==0.1.5 -c constraints.txt
    ESM_MERGEKIT=mk/bin/python pytest tests/integration/test_mergekit.py
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import MakeZoo, merge_here
from models import Zoo, tensors_of

from esm_stream.manifest import load_manifest
from esm_stream.mergekit import manifest_of
from esm_stream.planning.make import make_plan

INTERPRETER = os.environ.get("ESM_MERGEKIT", "")
RUNNER = Path(__file__).with_name("mergekit_runner.py")
CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "weights": [1.0, [0.2, 0.8], 0.5]},
    "linear-sum": {"merge_method": "linear", "parameters": {"normalize": False}},
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "weights": [0.4, [0.1, 0.9], -0.3],
        "parameters": {"lambda": 0.8},
    },
    "ties": {
        "merge_method": "ties",
        "density": [0.3, [0.2, 0.9], 0.5],
        "weights": [0.4, 1.0, 0.7],
    },
    "ties-filters": {
        "merge_method": "ties",
        "parameters": {
            "density": [{"filter": "mlp", "value": 0.2}, {"value": 0.6}],
            "normalize": False,
        },
    },
    "breadcrumbs": {
        "merge_method": "breadcrumbs",
        "parameters": {"density": 0.7, "gamma": 0.05},
    },
    "breadcrumbs_ties": {
        "merge_method": "breadcrumbs_ties",
        "parameters": {"density": 0.97, "gamma": 0.05},
    },
    "dare": {"merge_method": "dare_linear", "parameters": {"density": 1.0}},
    "della": {"merge_method": "della", "parameters": {"density": 1.0}},
    "sce": {"merge_method": "sce"},
    "sce-select": {"merge_method": "sce", "parameters": {"select_topk": 0.3}},
    "ram": {"merge_method": "ram"},
    "ramplus_tl": {"merge_method": "ramplus_tl"},
    "model_stock": {"merge_method": "model_stock"},
    "model_stock-rows": {"merge_method": "model_stock", "parameters": {"filter_wise": True}},
    "slerp": {"merge_method": "slerp", "two": True, "parameters": {"t": [0.2, 0.9]}},
    "nuslerp": {"merge_method": "nuslerp", "weights": [0.4, 0.9]},
    "multislerp": {"merge_method": "multislerp", "weights": [0.4, 0.9, 1.0]},
    "karcher": {"merge_method": "karcher"},
    "passthrough": {"merge_method": "passthrough", "slices": [(0, 0, 1), (1, 1, 2)]},
    "passthrough-deeper": {
        "merge_method": "passthrough",
        "slices": [(0, 0, 2), (1, 0, 2), (2, 1, 2)],
    },
}
# What mergekit computes in float32 by many steps.
TOLERANCE = {"karcher": 2e-5, "multislerp": 2e-6}


def config_of(zoo: Zoo, settings: dict[str, Any]) -> dict[str, Any]:
    """The configuration as mergekit reads it."""
    method, paths = settings["merge_method"], [str(path) for path in zoo.experts.values()]
    if method == "passthrough":
        sources = [
            {"sources": [{"model": paths[number], "layer_range": [first, end]}]}
            for number, first, end in settings["slices"]
        ]
        return {"merge_method": method, "slices": sources, "dtype": "float32"}
    weights = settings.get("weights") or [1.0] * len(paths)
    densities = settings.get("density") or [None] * len(paths)
    weighted = method not in ("sce", "ram", "ramplus_tl", "model_stock", "slerp", "karcher")
    models = []
    for path, weight, density in zip(paths, weights, densities, strict=False):
        own = {"weight": weight} if weighted else {}
        models.append(
            {"model": path, "parameters": own | ({"density": density} if density else {})}
        )
    if settings.get("two"):
        models = [{"model": str(zoo.base)}, models[0]]
    config = {"merge_method": method, "models": models, "dtype": "float32"}
    if method not in ("linear", "karcher"):
        config["base_model"] = str(zoo.base)
    return config | {"parameters": settings.get("parameters", {})}


@pytest.fixture(scope="session")
def theirs(zoo: MakeZoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output directories of mergekit, by the names of the configurations."""
    if not INTERPRETER:
        pytest.skip("ESM_MERGEKIT names no interpreter with mergekit 0.1.5")
    root = tmp_path_factory.mktemp("mergekit")
    (root / "configs").mkdir()
    found = zoo("llama", experts=3, noise=0.1)
    for name, settings in CONFIGS.items():
        path = root / "configs" / f"{name}.yml"
        path.write_text(yaml.safe_dump(config_of(found, settings)))
    command = [INTERPRETER, str(RUNNER), str(root / "configs"), str(root / "out")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.parametrize("name", CONFIGS)
def test_merge_equals_mergekits(theirs: Path, tmp_path: Path, name: str) -> None:
    document = yaml.safe_load((theirs / "configs" / f"{name}.yml").read_text())
    path = tmp_path / "manifest.toml"
    path.write_text(manifest_of(document, "ours"))
    ours = tensors_of(merge_here(make_plan(load_manifest(path))).output)
    expected = tensors_of(theirs / "out" / name)

    assert set(ours) == set(expected)
    tolerance = TOLERANCE.get(name, 5e-7)
    for tensor, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(
            ours[tensor], value, rtol=1e-5, atol=tolerance * max(scale, 1.0), msg=tensor
        )
