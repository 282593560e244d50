"""Configurations of mergekit become manifests, or the list of what cannot be expressed."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from esm_stream.errors import ManifestError
from esm_stream.manifest import load_manifest
from esm_stream.mergekit import manifest_of


def manifest(text: str) -> dict[str, Any]:
    return tomllib.loads(manifest_of(yaml.safe_load(text)))


TIES = """
merge_method: ties
base_model: models/base
models:
  - model: models/base
  - model: models/math
    parameters: {density: 0.5, weight: [0.1, 0.9]}
  - model: other/math
    parameters: {density: [0.2, 0.4], weight: 1}
parameters: {lambda: 0.7, int8_mask: true, normalize: false}
dtype: bfloat16
"""


def test_ties_with_gradients_by_model() -> None:
    found = manifest(TIES)
    assert found["base"]["model"] == "models/base"
    assert [e["name"] for e in found["experts"]] == ["math", "math-2"]
    assert found["merge"] == {
        "method": "ties",
        "alpha": 0.7,
        "weights": {"math": [0.1, 0.9], "math-2": 1},
        "options": {
            "trim": "tensor",
            "normalize": False,
            "density": {"math": 0.5, "math-2": [0.2, 0.4]},
        },
    }
    assert found["output"] == {"path": "merged", "dtype": "bfloat16"}


def test_filters_become_rules_and_the_base_is_the_first_of_slerp() -> None:
    found = manifest(
        """
        merge_method: slerp
        base_model: b
        slices:
          - sources:
              - {model: a, layer_range: [0, 32]}
              - {model: b, layer_range: [0, 32]}
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 1]}
            - {filter: mlp, value: 0.3}
            - value: 0.5
        """
    )
    assert [e["name"] for e in found["experts"]] == ["b", "a"]
    assert found["merge"]["options"] == {"t": 0.5}
    rules = [(r["tensors"], r["options"]["t"], r["alpha"]) for r in found["merge"]["rules"]]
    assert rules == [("*self_attn*", [0, 0.5, 1], 1.0), ("*mlp*", 0.3, 1.0)]


def test_layers_from_different_models_become_rules() -> None:
    found = manifest(
        """
        merge_method: passthrough
        slices:
          - sources: [{model: a, layer_range: [0, 2]}]
          - sources: [{model: b, layer_range: [2, 4]}]
        """
    )
    rules = [(r["tensors"], r["expert"]) for r in found["merge"]["rules"]]
    assert rules == [
        ("re:.*(embed|wte|wpe).*", "a"),
        (r"re:([^0-9]*\.)?(0|1)\..*", "a"),
        ("*", "b"),
    ]
    assert found["output"]["layers"] == [[0, 2], [2, 4]]


def test_layers_may_be_repeated_and_left_out() -> None:
    found = manifest(
        """
        merge_method: passthrough
        slices:
          - sources: [{model: a, layer_range: [0, 3]}]
          - sources: [{model: b, layer_range: [1, 4]}]
        """
    )
    assert found["output"]["layers"] == [[0, 3], [1, 4]]
    patterns = [r["tensors"] for r in found["merge"]["rules"]]
    assert patterns == ["re:.*(embed|wte|wpe).*", r"re:([^0-9]*\.)?(0|1|2)\..*", "*"]


def test_manifests_can_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "manifest.toml").write_text(manifest_of(yaml.safe_load(TIES)))
    found = load_manifest(tmp_path / "manifest.toml")
    assert found.merge.weights["math"] == (0.1, 0.9)
    assert found.experts[0].model == tmp_path / "models/math"


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("merge_method: nearswap", ["merge_method 'nearswap' has no counterpart"]),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b}]",
            ["weight is missing for a model"],
        ),
        (
            "merge_method: task_arithmetic\nmodels: [{model: a}, {model: b}]\n"
            "parameters: {weight: 1}",
            ["base_model: missing"],
        ),
        (
            "merge_method: linear\nmodels: [{model: a+lora}, {model: b}]\n"
            "parameters: {weight: 1, colour: red}\ntokenizer_source: union\nfoo: 1",
            ["'a+lora': adapters", "'colour' of linear", "tokenizer_source", "foo: unknown key"],
        ),
        (
            "merge_method: ties\nbase_model: c\nmodels: [{model: a}, {model: b}]\n"
            "parameters:\n  weight: [{filter: mlp, value: 1}, {value: 2}]\n"
            "  density: [{filter: attn, value: 0.1}, {value: 0.2}]",
            ["filters that differ between parameters: attn; mlp"],
        ),
    ],
)
def test_what_cannot_be_expressed_is_listed(text: str, problems: list[str]) -> None:
    with pytest.raises(ManifestError) as caught:
        manifest(text)
    assert [p for p in problems if p not in str(caught.value)] == []
