"""Tiny random models as people have them on disk: base, tuned experts, samples, manifests.

Nothing is downloaded; everything follows from a seed. A `Zoo` is one base with its experts.
"""

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

transformers.utils.logging.disable_progress_bar()

VOCABULARY = 60
TOKENS = 12
BLOCKS = 2
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
}
PICTURES = {**SIZES, "image_size": 16, "patch_size": 4, "num_channels": 3}
TEXTS = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "initializer_range": 0.2}
GROUPED = {**TEXTS, "num_key_value_heads": 2}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "n_embd": 16,
    "n_layer": BLOCKS,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture: its classes in transformers, a tiny configuration, where its blocks are."""

    model: str
    config: str
    settings: dict[str, Any]
    blocks: str
    takes: Literal["pixels", "tokens"]


FAMILIES = {
    "vit": Family("ViTModel", "ViTConfig", PICTURES, "layers", "pixels"),
    "vit-classifier": Family(
        "ViTForImageClassification", "ViTConfig", PICTURES, "vit.layers", "pixels"
    ),
    "clip": Family("CLIPVisionModel", "CLIPVisionConfig", PICTURES, "encoder.layers", "pixels"),
    "bert": Family("BertModel", "BertConfig", TEXTS, "encoder.layer", "tokens"),
    "bert-classifier": Family(
        "BertForSequenceClassification", "BertConfig", TEXTS, "bert.encoder.layer", "tokens"
    ),
    "roberta": Family("RobertaModel", "RobertaConfig", TEXTS, "encoder.layer", "tokens"),
    "llama": Family("LlamaForCausalLM", "LlamaConfig", GROUPED, "model.layers", "tokens"),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**GROUPED, "tie_word_embeddings": True},
        "model.layers",
        "tokens",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}, "model.layers", "tokens"
    ),
    "mistral": Family(
        "MistralForCausalLM",
        "MistralConfig",
        {**GROUPED, "sliding_window": 6},
        "model.layers",
        "tokens",
    ),
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", GPT2, "transformer.h", "tokens"),
}

ROUTED = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
# Models whose matrices are stacked or fused, in the file, in the model, or in both.
FUSED = {
    "mixtral": Family(
        "MixtralForCausalLM",
        "MixtralConfig",
        {**ROUTED, "intermediate_size": 12, "num_local_experts": 3},
        "model.layers",
        "tokens",
    ),
    "qwen2-moe": Family(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**ROUTED, "num_experts": 11, "shared_expert_intermediate_size": 20},
        "model.layers",
        "tokens",
    ),
    "deepseek-v3": Family(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **ROUTED,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 4,
            "first_k_dense_replace": 1,
        },
        "model.layers",
        "tokens",
    ),
    "gpt-oss": Family(
        "GptOssForCausalLM",
        "GptOssConfig",
        {**ROUTED, "num_local_experts": 4, "head_dim": 8, "intermediate_size": 12},
        "model.layers",
        "tokens",
    ),
    "llama4": Family(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **ROUTED,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size": 12,
            "intermediate_size_mlp": 20,
            "interleave_moe_layer_step": 1,
            "head_dim": 8,
        },
        "model.layers",
        "tokens",
    ),
    "phi3": Family(
        "Phi3ForCausalLM", "Phi3Config", {**GROUPED, "pad_token_id": 0}, "model.layers", "tokens"
    ),
    "gpt-neox": Family("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXTS, "gpt_neox.layers", "tokens"),
}


@dataclass(frozen=True, slots=True)
class Zoo:
    """A base, its experts by name, and ready-made samples of each."""

    root: Path
    family: Family
    base: Path
    experts: dict[str, Path]
    inputs: dict[str, Path]

    def copy(self, root: Path) -> "Zoo":
        """The same files in another place, to be spoilt."""
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        return replace(
            self,
            root=root,
            base=root / self.base.name,
            experts={name: root / path.name for name, path in self.experts.items()},
            inputs={name: root / path.name for name, path in self.inputs.items()},
        )

    def document(self, path: Path, /, **sections: Any) -> dict[str, Any]:  # noqa: ANN401
        """A manifest of this zoo; keyword arguments replace keys of sections."""
        document: dict[str, Any] = {
            "base": {"model": str(self.base)},
            "experts": [
                {"name": name, "model": str(path), "calibration": str(self.inputs[name])}
                for name, path in self.experts.items()
            ],
            "output": {"path": str(path)},
            "run": {"memory": "1GiB"},
        }
        for name, values in sections.items():
            if isinstance(values, dict):
                document[name] = {**document.get(name, {}), **values}
            else:
                document[name] = values
        return document


def make_zoo(
    root: Path,
    name: str,
    *,
    experts: int = 2,
    dtype: torch.dtype = torch.float32,
    shard: str = "1GB",
    samples: int = 16,
    noise: float = 0.02,
    seed: int = 0,
    **settings: Any,  # noqa: ANN401
) -> Zoo:
    """Save a random base, experts that differ from it everywhere, and samples for each."""
    family = {**FAMILIES, **FUSED}[name]
    base = build(family, seed, **settings).to(dtype)
    save(base, root / "base", shard)
    paths, inputs = {}, {}
    for number in range(experts):
        label = f"expert{number}"
        paths[label] = root / label
        save(tuned(base, seed + 100 + number, noise), paths[label], shard)
        inputs[label] = root / f"{label}.safetensors"
        save_file(draw_inputs(family, samples, seed + 200 + number, base.config), inputs[label])
    return Zoo(root, family, root / "base", paths, inputs)


def build(family: Family, seed: int, **settings: Any) -> PreTrainedModel:  # noqa: ANN401
    """A model with random numbers in every parameter, biases and norms included."""
    torch.manual_seed(seed)
    config: PretrainedConfig = getattr(transformers, family.config)(
        **{**family.settings, **settings}
    )
    model: PreTrainedModel = getattr(transformers, family.model)(config).eval()
    return tuned(model, seed + 1, 0.05)


def tuned(model: PreTrainedModel, seed: int, noise: float) -> PreTrainedModel:
    """A copy of a model whose every parameter has moved."""
    import copy

    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in twin.parameters():
            step = torch.randn(value.shape, generator=generator)
            value.copy_((value.float() + noise * step).to(value.dtype))
    return twin


def save(model: PreTrainedModel, path: Path, shard: str = "1GB") -> None:
    """Save a model as `save_pretrained` does."""
    model.save_pretrained(path, max_shard_size=shard)


def draw_inputs(
    family: Family, samples: int, seed: int, config: PretrainedConfig
) -> dict[str, Tensor]:
    """Ready-made model inputs, first dimension = samples."""
    generator = torch.Generator().manual_seed(seed)
    if family.takes == "pixels":
        shape = (samples, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    ids = torch.randint(3, config.vocab_size, (samples, TOKENS), generator=generator)
    return {"input_ids": ids}


def load(family: Family, path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The plain model, as `from_pretrained` gives it."""
    model: PreTrainedModel = getattr(transformers, family.model).from_pretrained(path, dtype=dtype)
    return model.eval()


def tensors_of(path: Path) -> dict[str, Tensor]:
    """All tensors of a model directory by name."""
    files = sorted(path.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def change_tensors(path: Path, change: dict[str, Any]) -> None:
    """Rewrite tensors of a directory: name -> function of the old value, or None to drop it."""
    for file in sorted(path.glob("*.safetensors")):
        tensors = load_file(file)
        wanted = [name for name in tensors if name in change]
        for name in wanted:
            if change[name] is None:
                del tensors[name]
            else:
                tensors[name] = change[name](tensors[name]).contiguous()
        if wanted:
            save_file(tensors, file, {"format": "pt"})


def write_manifest(path: Path, document: dict[str, Any]) -> Path:
    """A manifest file of nested dictionaries."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(toml(document), encoding="utf-8")
    return path


def toml(document: dict[str, Any]) -> str:
    """A document of sections and lists of sections as TOML, which leaves out what is None."""
    lines = []
    for name, section in document.items():
        for table in section if isinstance(section, list) else [section]:
            lines.append(f"[[{name}]]" if isinstance(section, list) else f"[{name}]")
            lines += [
                f"{key} = {_value(value)}" for key, value in table.items() if value is not None
            ]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:  # noqa: ANN401
    if isinstance(value, dict):
        inner = ", ".join(
            f"{json.dumps(k)} = {_value(v)}" for k, v in value.items() if v is not None
        )
        return "{ " + inner + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value)


def save_tokenizer(path: Path) -> None:
    """A tokenizer of whole words "w3" ... "w59" into a model directory."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 0, "[PAD]": 1, "[EOS]": 2}
    words |= {f"w{number}": number for number in range(3, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]"
    ).save_pretrained(path)


def write_texts(path: Path, count: int, seed: int, key: str = "text") -> list[str]:
    """A .jsonl of texts of 3 to 20 words; returns the texts."""
    random = np.random.RandomState(seed)
    texts = [
        " ".join(f"w{n}" for n in random.randint(3, VOCABULARY, random.randint(3, 21)))
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return texts


def save_image_processor(path: Path) -> None:
    """The processor of the tiny vision models."""
    from transformers import ViTImageProcessor

    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(path)


def write_images(path: Path, count: int, seed: int) -> np.ndarray:
    """An .npz of random colour images, larger than the models take."""
    random = np.random.RandomState(seed)
    images = random.randint(0, 256, (count, 20, 24, 3)).astype(np.uint8)
    np.savez(path, images=images)
    return images
