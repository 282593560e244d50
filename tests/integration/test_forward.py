"""The streamed forward is the plain model's, bit for bit, and so is what its hooks see."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeZoo, PlanOf, merge_here
from models import (
    BLOCKS,
    FAMILIES,
    FUSED,
    Zoo,
    build,
    change_tensors,
    load,
    save_image_processor,
    save_tokenizer,
    tensors_of,
    write_images,
    write_manifest,
    write_texts,
)
from torch import Tensor, nn

from esm_stream.calibration.arguments import load_values
from esm_stream.calibration.proxies import Proxies, micro_batches
from esm_stream.calibration.skeleton import build_skeleton
from esm_stream.calibration.steps import MICRO_BATCH_TOKENS
from esm_stream.checkpoints.checkpoint import open_checkpoint
from esm_stream.errors import BudgetError, DataError, UnsupportedModelError
from esm_stream.events import Event
from esm_stream.manifest import load_manifest
from esm_stream.planning.make import make_plan
from esm_stream.planning.plan import Matrix, Plan
from esm_stream.stages.inputs import require_room
from esm_stream.store.factors import FactorStore

PICTURE_TOKENS = (16 // 4) ** 2 + 1
States = dict[tuple[str, int], list[Tensor]]


def stream(plan: Plan) -> States:
    """Merge, and keep the hidden states before each block as they come by."""
    states: States = {}

    def listen(event: Event) -> None:
        if event.stage not in ("stem", "forward"):
            return
        task = plan.tasks[event.task]
        path = plan.directory.hidden(task.expert, task.block + 1)
        if path.is_file():
            states[task.expert, task.block + 1] = list(load_values(path))

    merge_here(plan, listen)
    return states


class Watched:
    """A plain model's forward: hidden states before each block and inputs of each matrix."""

    def __init__(self, model: nn.Module, blocks: str, batches: list[dict[str, Tensor]]) -> None:
        self.states: dict[int, list[Tensor]] = {}
        self.inputs: dict[str, list[Tensor]] = {}
        for index, block in enumerate(model.get_submodule(blocks)):
            block.register_forward_pre_hook(self._keep_state(index), with_kwargs=True)
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2 and "Embedding" not in str(module):
                module.register_forward_pre_hook(self._keep_input(name))
        with torch.inference_mode():
            for batch in batches:
                model(**batch)

    def _keep_state(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001
            state = args[0] if args else kwargs["hidden_states"]
            self.states.setdefault(index, []).append(state.clone())

        return hook

    def _keep_input(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG001
            self.inputs.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]).clone())

        return hook


def watch(zoo: Zoo, expert: str, dtype: torch.dtype = torch.float32) -> Watched:
    """The plain model of one expert on its ready-made inputs."""
    return watch_batches(zoo, expert, batches_of(zoo.inputs[expert], dtype), dtype)


def watch_batches(
    zoo: Zoo, expert: str, batches: list[dict[str, Tensor]], dtype: torch.dtype = torch.float32
) -> Watched:
    model = load(zoo.family, zoo.experts[expert], dtype)
    return Watched(model, zoo.family.blocks, batches)


def batches_of(path: Path, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Micro-batches of ready-made inputs, floats in the forward's dtype."""
    tensors = tensors_of_file(path)
    count = next(iter(tensors.values())).shape[0]
    samples = [{name: value[i : i + 1] for name, value in tensors.items()} for i in range(count)]
    return [
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        for batch in micro_batches(samples, PICTURE_TOKENS)
    ]


def tensors_of_file(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def assert_same_states(states: States, watched: Watched, expert: str) -> None:
    for block in range(BLOCKS):
        ours, plain = states[expert, block], watched.states[block]
        assert len(ours) == len(plain)
        for one, other in zip(ours, plain, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other), f"{expert}, before block {block}"


def update_of(zoo: Zoo, expert: str, matrix: Matrix) -> Tensor:
    """D of one expert in float64, (O, I), fused parts one under the other."""
    base, tuned = tensors_of(zoo.base), tensors_of(zoo.experts[expert])
    updates = []
    for part in matrix.parts:
        update = tuned[part.tensor].double() - base[part.tensor].double()
        updates.append(update.T if matrix.transposed else update)
    return torch.cat(updates)


def factors_of(plan: Plan, matrix: Matrix, expert: str) -> Any:  # noqa: ANN401
    directory = plan.directory
    values = directory.results(f"forward/{expert}/{matrix.block:04d}")[matrix.name]
    number = plan.expert_names.index(expert)
    store = FactorStore(directory.factors)
    found = store.read_factors(matrix.name, number, values["rank"], values["norm"])
    return replace(found, basis_OK=found.basis_OK[:]), values


def assert_same_bases(plan: Plan, zoo: Zoo, watched: Watched, expert: str) -> None:
    """What is stored are the eigenpairs of S = D G D^T of what plain hooks saw, in float64."""
    # What experts of a mixture see is held against plain models in test_kinds.py.
    matrices = [m for m in plan.matrices.values() if m.moment and not m.routed]
    assert matrices
    for matrix in matrices:
        inputs = watched.inputs[str(matrix.leader)]
        update = update_of(zoo, expert, matrix)
        shift = torch.cat(inputs).double() @ update.T
        moment = shift.T @ shift / len(shift)
        values = torch.linalg.eigvalsh(moment).flip(0)
        found, results = factors_of(plan, matrix, expert)
        assert results["tokens"] == len(shift)
        assert results["norm"] == pytest.approx(float(update.norm()), rel=1e-6)
        near = {"rtol": 1e-5, "atol": 5e-7 * float(values[0])}
        assert len(found.spectrum) == min(update.shape)
        assert torch.allclose(found.spectrum, values[: len(found.spectrum)], **near)
        basis = found.basis_OK.double()
        assert basis.shape[1] == min(max(1, matrix.outputs // len(zoo.experts)), *update.shape)
        assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]).double(), atol=1e-6)
        kept = torch.diag(values[: basis.shape[1]])
        assert torch.allclose(basis.T @ moment @ basis, kept, **near)
        assert torch.allclose(found.coordinates_KI.double(), basis.T @ update, atol=1e-6)


@pytest.mark.parametrize("name", [*FAMILIES, *FUSED])
def test_streamed_forward_equals_the_plain_model_bit_for_bit(
    name: str, zoo: MakeZoo, plan_of: PlanOf
) -> None:
    found = zoo(name)
    plan = plan_of(found)
    states = stream(plan)
    for expert in found.experts:
        watched = watch(found, expert)
        assert_same_states(states, watched, expert)
        assert_same_bases(plan, found, watched, expert)


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_models_in_several_shards_stream_the_same(name: str, zoo: MakeZoo, plan_of: PlanOf) -> None:
    found = zoo(name, shard="12KB")
    assert len(list(found.base.glob("*.safetensors"))) > 2
    plan = plan_of(found)
    states = stream(plan)
    for expert in found.experts:
        assert_same_states(states, watch(found, expert), expert)


@pytest.mark.parametrize("name", ["llama", "gpt2", "clip"])
def test_bfloat16_models_run_in_bfloat16(name: str, zoo: MakeZoo, plan_of: PlanOf) -> None:
    found = zoo(name, dtype=torch.bfloat16, noise=0.1)
    plan = plan_of(found)
    assert plan.forward is not None
    assert plan.forward.dtype == "bfloat16"
    states = stream(plan)
    for expert in found.experts:
        assert states[expert, 1][0].dtype == torch.bfloat16
        assert_same_states(states, watch(found, expert, torch.bfloat16), expert)


def test_calibration_dtype_decides_the_arithmetic(zoo: MakeZoo, plan_of: PlanOf) -> None:
    found = zoo("llama", dtype=torch.bfloat16, noise=0.1)
    states = stream(plan_of(found, calibration={"dtype": "float32"}))
    for expert in found.experts:
        assert_same_states(states, watch(found, expert, torch.float32), expert)


def test_float16_experts_of_a_float32_base_run_in_float32(
    zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    found = zoo("bert").copy(tmp_path / "zoo")
    for path in found.experts.values():
        change_tensors(path, dict.fromkeys(tensors_of(path), lambda value: value.half()))
    plan = plan_of(found)
    states = stream(plan)
    for expert in found.experts:
        watched = watch(found, expert, torch.float32)
        assert_same_states(states, watched, expert)
        assert_same_bases(plan, found, watched, expert)


def test_texts_of_different_lengths_run_unpadded_in_the_drawn_micro_batches(
    zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    import numpy as np

    found = zoo("llama").copy(tmp_path / "zoo")
    save_tokenizer(found.base)
    texts = write_texts(tmp_path / "texts.jsonl", 20, seed=5)
    experts = [{"name": name, "model": str(path)} for name, path in found.experts.items()]
    settings = {"data": str(tmp_path / "texts.jsonl"), "samples": 9, "seed": 3, "max_length": 15}
    plan = plan_of(found, calibration=settings, experts=experts)
    states = stream(plan)
    drawn = np.random.RandomState(3).choice(20, 9, replace=False)
    ids = [torch.tensor([int(w[1:]) for w in texts[i].split()][:15]) for i in drawn]
    results = plan.directory.results("inputs/expert0")
    assert results["samples"] == drawn.tolist()
    assert results["available"] == 20
    seen = plan.directory.results("forward/expert0/0000")
    assert {v["tokens"] for v in seen.values() if isinstance(v, dict)} == {sum(map(len, ids))}
    assert results["truncated"] == [i for i in drawn if len(texts[i].split()) > 15]
    assert results["tokens_per_sample"] == [len(one) for one in ids]
    batches = micro_batches([{"input_ids": one[None]} for one in ids], 1)
    assert {b["input_ids"].shape[1] for b in batches} == {len(one) for one in ids}
    watched = watch_batches(found, "expert0", batches)
    assert_same_states(states, watched, "expert0")
    assert_same_bases(plan, found, watched, "expert0")


def test_images_go_through_the_processor_of_the_base(
    zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    from PIL import Image
    from transformers import AutoImageProcessor

    found = zoo("vit").copy(tmp_path / "zoo")
    save_image_processor(found.base)
    images = write_images(tmp_path / "images.npz", 6, seed=1)
    experts = [{"name": name, "model": str(path)} for name, path in found.experts.items()]
    plan = plan_of(found, calibration={"data": str(tmp_path / "images.npz")}, experts=experts)
    states = stream(plan)
    processor = AutoImageProcessor.from_pretrained(found.base, backend="pil")
    pixels = [
        processor(Image.fromarray(image), return_tensors="pt")["pixel_values"] for image in images
    ]
    batches = micro_batches([{"pixel_values": one} for one in pixels], PICTURE_TOKENS)
    assert_same_states(states, watch_batches(found, "expert1", batches), "expert1")


def test_masked_positions_of_ready_made_inputs_are_dropped(
    zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    found = zoo("bert").copy(tmp_path / "zoo")
    ids = tensors_of_file(found.inputs["expert0"])["input_ids"]
    lengths = torch.arange(len(ids)) % 5 + 6
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    save_file({"input_ids": ids, "attention_mask": mask}, found.inputs["expert0"])
    states = stream(plan_of(found))
    batches = micro_batches(
        [{"input_ids": one[None, :n]} for one, n in zip(ids, lengths.tolist(), strict=True)], 1
    )
    assert len(batches) == 5
    assert_same_states(states, watch_batches(found, "expert0", batches), "expert0")


def test_an_expert_runs_by_its_own_configuration(
    zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    found = zoo("llama").copy(tmp_path / "zoo")
    path = found.experts["expert1"] / "config.json"
    config = json.loads(path.read_text())
    config["rms_norm_eps"] = 0.1
    path.write_text(json.dumps(config))
    plan = plan_of(found)
    assert any("rms_norm_eps" in note for note in plan.notes)
    states = stream(plan)
    for expert in found.experts:
        assert_same_states(states, watch(found, expert), expert)


def test_a_block_that_overflows_is_an_error_that_names_block_and_expert(
    zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    found = zoo("llama", dtype=torch.float16).copy(tmp_path / "zoo")
    name = "model.layers.1.mlp.down_proj.weight"
    change_tensors(found.experts["expert1"], {name: lambda value: torch.full_like(value, 6e4)})
    with pytest.raises(
        DataError, match=r"block 'model.layers.1' of expert \"expert1\".*NaN or Inf"
    ) as error:
        stream(plan_of(found))
    assert "float32" in str(error.value)


@pytest.mark.parametrize("mode", ["chain", "replay", "resident"])
def test_a_tensor_outside_the_blocks_that_is_not_finite_is_named_in_every_mode(
    mode: str, zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    found = zoo("llama").copy(tmp_path / "zoo")
    name = "model.embed_tokens.weight"
    change_tensors(found.experts["expert1"], {name: lambda value: value * torch.nan})
    with pytest.raises(DataError, match=r"'model\.embed_tokens\.weight' of expert \"expert1\""):
        merge_here(plan_of(found, run={"forward": mode, "memory": "4GiB"}))


@pytest.mark.parametrize("mode", ["replay", "resident"])
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_a_later_mode_merges_to_the_same_bytes(
    name: str, mode: str, zoo: MakeZoo, plan_of: PlanOf, tmp_path: Path
) -> None:
    found = zoo(name)
    chain = plan_of(found)
    merge_here(chain)
    other = plan_of(
        found, output={"path": str(tmp_path / "other")}, run={"forward": mode, "memory": "4GiB"}
    )
    assert other.forward is not None
    assert (other.forward.mode, other.forward.why) == (mode, "asked for")
    merge_here(other)
    merged, again = tensors_of(chain.output), tensors_of(other.output)
    assert merged.keys() == again.keys()
    for tensor, value in merged.items():
        assert torch.equal(value, again[tensor]), tensor


def test_a_mode_that_does_not_fit_is_refused_with_the_reason(
    plan_of: PlanOf, tmp_path: Path
) -> None:
    from models import Family, draw_inputs, save, tuned
    from safetensors.torch import save_file

    settings = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    family = Family("T5Model", "T5Config", {**settings, "vocab_size": 60}, "", "tokens")
    base = build(family, 0)
    save(base, tmp_path / "base")
    save(tuned(base, 1, 0.02), tmp_path / "expert")
    ids = draw_inputs(family, 2, 0, base.config)
    start = ids["input_ids"][:, :4].contiguous()
    inputs = tmp_path / "in.safetensors"
    save_file({**ids, "decoder_input_ids": start}, inputs)
    experts = {"a": tmp_path / "expert", "b": tmp_path / "expert"}
    found = Zoo(tmp_path, family, tmp_path / "base", experts, dict.fromkeys("ab", inputs))
    plan = plan_of(found)
    assert plan.forward is not None
    assert plan.forward.mode == "replay"
    with pytest.raises(UnsupportedModelError, match="cannot be streamed in chain mode") as error:
        plan_of(found, run={"forward": "chain", "memory": "4GiB"})
    assert plan.forward.why in str(error.value)


def test_fewer_samples_run_together_where_the_memory_does_not_allow_more(
    zoo: MakeZoo, tmp_path: Path
) -> None:
    found = zoo("llama").copy(tmp_path / "zoo")
    save_tokenizer(found.base)
    write_texts(tmp_path / "texts.jsonl", 20, seed=5)
    settings = {"data": str(tmp_path / "texts.jsonl"), "samples": 20, "max_length": 32}
    experts = [{"name": name, "model": str(path)} for name, path in found.experts.items()]

    def planned(memory: int) -> Plan:
        document = found.document(
            tmp_path / "merged", calibration=settings, experts=experts, run={"memory": memory}
        )
        path = write_manifest(tmp_path / "merged.toml", document)
        return make_plan(load_manifest(path), check_memory=False)

    roomy = planned(4 << 30)
    assert roomy.forward is not None
    assert roomy.forward.micro_batch_tokens == MICRO_BATCH_TOKENS
    largest = max(task.peak_bytes for task in roomy.of_stage("forward"))
    tight = planned(largest - 1)
    assert tight.forward is not None
    assert 32 <= tight.forward.micro_batch_tokens < MICRO_BATCH_TOKENS
    assert max(task.peak_bytes for task in tight.of_stage("forward")) < largest
    assert tight.tasks["inputs/expert0"].fingerprint != roomy.tasks["inputs/expert0"].fingerprint


@pytest.mark.parametrize(
    ("model", "config", "settings", "reason"),
    [
        (
            "RwkvForCausalLM",  # writes to its own weights while it runs
            "RwkvConfig",
            {
                "vocab_size": 60,
                "context_length": 16,
                "hidden_size": 16,
                "num_hidden_layers": 2,
            },
            "writes to its own parameter",
        ),
    ],
)
def test_models_that_cannot_be_streamed_are_refused_with_the_reason(
    model: str, config: str, settings: dict[str, Any], reason: str, tmp_path: Path, plan_of: PlanOf
) -> None:
    from models import Family, draw_inputs, save, tuned
    from safetensors.torch import save_file

    family = Family(model, config, settings, "", "tokens")
    base = build(family, 0)
    save(base, tmp_path / "base")
    save(tuned(base, 1, 0.02), tmp_path / "expert")
    save_file(draw_inputs(family, 2, 0, base.config), tmp_path / "inputs.safetensors")
    found = Zoo(
        tmp_path,
        family,
        tmp_path / "base",
        {"a": tmp_path / "expert", "b": tmp_path / "expert"},
        dict.fromkeys("ab", tmp_path / "inputs.safetensors"),
    )
    with pytest.raises(UnsupportedModelError, match=reason) as error:
        plan_of(found)
    assert str(tmp_path / "base") in str(error.value)
    assert "tsv_m" in str(error.value)  # says what works instead
    assert not (tmp_path / "merged.work").exists()


@pytest.mark.parametrize("name", FAMILIES)
def test_skeleton_holds_no_real_parameter_and_knows_every_tensor(name: str, zoo: MakeZoo) -> None:
    found = zoo(name)
    checkpoint = open_checkpoint(found.base)
    stored = {name: info.shape for name, info in checkpoint.tensors.items()}
    skeleton = build_skeleton(found.base, stored, torch.float32)
    assert {value.device.type for value in skeleton.model.parameters()} == {"meta"}
    assert set(skeleton.stored.values()) == set(checkpoint.tensors)
    assert not skeleton.converted
    shapes = {n: v.shape for n, v in skeleton.model.state_dict().items()}
    for parameter, tensor in skeleton.stored.items():
        assert shapes[parameter] == checkpoint.tensors[tensor].shape


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_every_merged_matrix_of_every_expert_is_read_once(
    name: str, zoo: MakeZoo, plan_of: PlanOf
) -> None:
    found = zoo(name)
    plan = plan_of(found)
    stream(plan)
    base = open_checkpoint(found.base).tensors
    merged = {part.tensor for matrix in plan.matrices.values() for part in matrix.parts}
    inside = {name for task in plan.of_stage("forward") for name in task.reads}
    assert merged <= inside

    def read(stage: str) -> int:
        return sum(plan.directory.results(t.key)["bytes_read"] for t in plan.of_stage(stage))

    def size(names: set[str]) -> int:
        return sum(base[name].nbytes for name in names)

    experts = len(found.experts)
    assert read("stem") == 0  # looks up rows
    assert read("forward") == experts * (size(inside) + size(merged))
    assert read("merge") == 0
    # Merged matrices come from the store; only what is averaged is read from the experts.
    assert read("write") == size(set(base)) + experts * size(set(base) - merged)
    for task in plan.of_stage("forward") + plan.of_stage("write"):
        assert plan.directory.results(task.key)["bytes_read"] == task.read_bytes, task.key


def test_samples_much_larger_than_the_plans_example_are_refused_with_the_numbers(
    zoo: MakeZoo, plan_of: PlanOf
) -> None:
    """The first sample stands for all until they are drawn: sounds and pictures differ in size."""
    plan = plan_of(zoo("vit"), run={"memory": "1GiB"})
    assert plan.forward is not None
    usual = [plan.forward.tokens_per_sample] * 3
    proxies = Proxies([], "image", [4, 0, 7], 9, [0, 0, 0], usual, [])
    require_room(plan, "expert0", proxies)
    with pytest.raises(BudgetError, match=r'"expert0", sample 7: .* about 9000000 positions'):
        require_room(plan, "expert0", replace(proxies, sizes=[*usual[:2], 9_000_000]))
