"""Experts that are LoRA adapters: merged as the whole models they stand for."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeZoo, PlanOf, Run, merge_here
from models import Zoo, tensors_of
from safetensors.torch import save_file
from torch import Tensor

from esm_stream.checkpoints.adapter import AdaptedReader, open_adapter, open_reader
from esm_stream.checkpoints.checkpoint import open_checkpoint
from esm_stream.errors import InputError
from esm_stream.stages.context import Context

RANK = 3
ALPHA = 6.0


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_adapter(
    root: Path,
    base: Mapping[str, Tensor],
    seed: int,
    *,
    turned: bool = False,
    whole: tuple[str, ...] = (),
    **config: Any,  # noqa: ANN401
) -> dict[str, Tensor]:
    """An adapter of all attention and MLP weights as PEFT saves it; returns the whole model."""
    root.mkdir(parents=True)
    tuned, saved = dict(base), {}
    wanted = [n for n in base if base[n].ndim == 2 and any(p in n for p in ("attn", "mlp"))]
    for number, name in enumerate(wanted):
        outputs, inputs = base[name].shape[::-1] if turned else base[name].shape
        a = 0.1 * draw(RANK, inputs, seed=seed + 2 * number)
        b = 0.1 * draw(outputs, RANK, seed=seed + 2 * number + 1)
        module = f"base_model.model.{name.removesuffix('.weight')}"
        saved[f"{module}.lora_A.weight"], saved[f"{module}.lora_B.weight"] = a, b
        update = ALPHA / RANK * b @ a
        tuned[name] = base[name] + (update.T if turned else update)
    for number, name in enumerate(whole):
        tuned[name] = base[name] + 0.1 * draw(*base[name].shape, seed=seed + 900 + number)
        saved[f"base_model.model.{name}"] = tuned[name]
    document = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "fan_in_fan_out": turned}
    (root / "adapter_config.json").write_text(json.dumps({**document, **config}))
    save_file(saved, root / "adapter_model.safetensors", {"format": "pt"})
    return tuned


@pytest.fixture(scope="module")
def pair_of(zoo: MakeZoo, tmp_path_factory: pytest.TempPathFactory) -> Any:  # noqa: ANN401
    """A function (architecture) -> the same experts as adapters and as whole models."""
    made: dict[str, tuple[Zoo, Zoo]] = {}

    def make(name: str) -> tuple[Zoo, Zoo]:
        if name not in made:
            found, root = zoo(name, experts=3), tmp_path_factory.mktemp(f"{name}-adapters")
            base = tensors_of(found.base)
            thin, whole = {}, {}
            for number, expert in enumerate(found.experts):
                extra = tuple(n for n in base if "norm" in n or "ln_1" in n)[:number]
                tuned = write_adapter(
                    root / "thin" / expert, base, 100 * number, turned=name == "gpt2", whole=extra
                )
                thin[expert], whole[expert] = root / "thin" / expert, root / "whole" / expert
                whole[expert].mkdir(parents=True)
                save_file(tuned, whole[expert] / "model.safetensors", {"format": "pt"})
            made[name] = replace(found, experts=thin), replace(found, experts=whole)
        return made[name]

    return make


def same(one: Path, other: Path, **tolerance: float) -> None:
    expected = tensors_of(other)
    for name, value in tensors_of(one).items():
        torch.testing.assert_close(value, expected[name], msg=name, **tolerance)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "merge",
    [
        {"method": "task_arithmetic", "alpha": 0.7},
        {"method": "ties", "alpha": 0.7, "options": {"density": 0.4}},
        {"method": "model_stock"},
        # Rounded to float32, whole models have directions that adapters do not.
        {"method": "tsv_m", "options": {"rank_tolerance": 1e-3}},
        {"method": "knots", "alpha": 0.7, "options": {"density": 1.0}},
        {"method": "core_space", "alpha": 0.7},
        {"method": "esm", "options": {"decomposition": "svd", "rank_tolerance": 1e-6}},
        {"method": "esm", "options": {"rank_tolerance": 1e-6}},
        {"method": "linear", "post": {"svc": 0.5}},
    ],
    ids=lambda merge: "-".join(map(str, merge.values())),
)
def test_adapters_merge_as_the_models_they_stand_for(
    pair_of: Any,  # noqa: ANN401
    run: Run,
    architecture: str,
    merge: dict[str, Any],
) -> None:
    thin, whole = pair_of(architecture)
    one, other = run(thin, "thin", merge=merge), run(whole, "whole", merge=merge)
    same(one, other, rtol=1e-3, atol=2e-4)


def test_weights_of_adapters_count(pair_of: Any, run: Run) -> None:  # noqa: ANN401
    thin, whole = pair_of("llama")
    weights = {next(iter(thin.experts)): 0.3}
    for method in ("linear", "knots"):
        merge = {"method": method, "weights": weights}
        one, other = run(thin, f"{method}-1", merge=merge), run(whole, f"{method}-2", merge=merge)
        same(one, other, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("method", ["knots", "core_space"])
def test_methods_for_adapters_never_form_an_update(
    pair_of: Any,  # noqa: ANN401
    plan_of: PlanOf,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    thin, whole = pair_of("llama")

    def refuse(*_: object) -> Tensor:
        raise AssertionError("formed an update")

    plan = plan_of(thin, merge={"method": method})
    monkeypatch.setattr(Context, "update", refuse)
    merge_here(plan)
    dense = plan_of(whole, "whole", merge={"method": method})
    read = [sum(t.read_bytes for t in p.of_stage("merge")) for p in (plan, dense)]
    assert read[0] < read[1]


def test_a_reader_gives_the_tensors_of_the_whole_model(pair_of: Any) -> None:  # noqa: ANN401
    thin, whole = pair_of("gpt2")
    base = open_checkpoint(thin.base)
    for expert, root in thin.experts.items():
        expected = tensors_of(whole.experts[expert])
        with open_reader(open_adapter(root, base)) as reader:
            assert isinstance(reader, AdaptedReader)
            for name, value in expected.items():
                found = reader.tensor(name)
                torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-6)
                raw = reader.raw_bytes(name, 3, value.nbytes - 1)
                assert torch.equal(raw, found.contiguous().view(torch.uint8).view(-1)[3:-1])
                part = reader.elements(name, 5, value.numel() - 2)
                torch.testing.assert_close(part, value.view(-1)[5:-2], rtol=1e-6, atol=1e-6)


def test_an_expert_may_be_copied_from_its_adapter(pair_of: Any, run: Run) -> None:  # noqa: ANN401
    thin, whole = pair_of("llama")
    expert = list(thin.experts)[1]
    rules = [{"tensors": "*", "method": "expert", "expert": expert}]
    same(run(thin, merge={"method": "average", "rules": rules}), whole.experts[expert])


@pytest.fixture
def small(zoo: MakeZoo, tmp_path: Path) -> tuple[Zoo, Path]:
    found = zoo("llama")
    write_adapter(tmp_path / "a", tensors_of(found.base), 0)
    return found, tmp_path / "a"


def change(root: Path, **config: Any) -> None:  # noqa: ANN401
    path = root / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def test_scales_follow_patterns_and_the_square_root(small: tuple[Zoo, Path]) -> None:
    found, root = small
    base = open_checkpoint(found.base)
    change(root, alpha_pattern={"mlp.up_proj": 12, r"layers\.1\..*": 3})
    pairs = open_adapter(root, base).pairs
    assert pairs["model.layers.0.mlp.up_proj.weight"].scale == 12 / RANK
    assert pairs["model.layers.1.mlp.down_proj.weight"].scale == 3 / RANK
    assert pairs["model.layers.0.mlp.down_proj.weight"].scale == ALPHA / RANK
    change(root, use_rslora=True, alpha_pattern={})
    pairs = open_adapter(root, base).pairs
    assert pairs["model.layers.0.mlp.up_proj.weight"].scale == ALPHA / RANK**0.5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, r"adapter_config.json: use_dora: DoRA.* not supported.*merge_and_un"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base's weights too"),
        ({"r": 4}, "has rank 3, adapter_config.json says 4"),
        ({"fan_in_fan_out": True}, r"has shape .*the base's 'model.layers.0.*' has"),
    ],
)
def test_adapters_that_are_not_read_are_refused(
    small: tuple[Zoo, Path], config: dict[str, Any], message: str
) -> None:
    found, root = small
    change(root, **config)
    with pytest.raises(InputError, match=message):
        open_adapter(root, open_checkpoint(found.base))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base_model.model.model.layers.9.mlp.up_proj.lora_A.weight", "without B"),
        ("base_model.model.lm_head.lora_magnitude_vector", "is no factor of a plain LoRA"),
    ],
)
def test_tensors_of_an_adapter_that_fit_nothing_are_refused(
    small: tuple[Zoo, Path], name: str, message: str
) -> None:
    found, root = small
    path = root / "adapter_model.safetensors"
    save_file({**tensors_of(root), name: torch.ones(2, 3)}, path, {"format": "pt"})
    with pytest.raises(InputError, match=message):
        open_adapter(root, open_checkpoint(found.base))


def test_what_an_adapted_layer_has_besides_its_factors_is_read(
    zoo: MakeZoo, tmp_path: Path
) -> None:
    base = tensors_of(zoo("gpt2").base)
    write_adapter(tmp_path / "a", base, 0, turned=True)
    path, name = tmp_path / "a" / "adapter_model.safetensors", "h.0.mlp.c_fc.bias"
    tuned = base[f"transformer.{name}"] + 1
    key = "base_model.model.transformer.h.0.mlp.c_fc.base_layer.bias"
    save_file({**tensors_of(tmp_path / "a"), key: tuned}, path, {"format": "pt"})
    with open_reader(open_adapter(tmp_path / "a", open_checkpoint(zoo("gpt2").base))) as reader:
        assert torch.equal(reader.tensor(f"transformer.{name}"), tuned)


def test_a_changed_adapter_is_merged_again(small: tuple[Zoo, Path]) -> None:
    found, root = small
    base = open_checkpoint(found.base)
    name = "model.layers.0.mlp.up_proj.weight"
    before = open_adapter(root, base)
    change(root, lora_alpha=1)
    after = open_adapter(root, base)
    assert before.identity(name) != after.identity(name)
    assert before.identity("model.norm.weight") == base.identity("model.norm.weight")


def test_an_adapter_cannot_be_the_base(small: tuple[Zoo, Path], plan_of: PlanOf) -> None:
    found, root = small
    with pytest.raises(InputError, match="can be an expert but not the base"):
        plan_of(replace(found, base=root), merge={"method": "average"})
