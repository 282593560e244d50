"""Tiny random models of every architecture that the streamed forward is proved on.

A row is the class in transformers, the settings of its configuration, and what its forward takes.
Settings of parts (`text_config`, ...) are nested. Sizes differ from each other where they may, so
that a transposed or swapped matrix does not fit by chance.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

VOCABULARY = 96
IMAGE, START, END, VIDEO = 90, 91, 92, 93


@dataclass(frozen=True, slots=True)
class Ids:
    """Token ids below 90; `images` of them, from the second on, are the image's."""

    length: int = 11
    images: int = 0


@dataclass(frozen=True, slots=True)
class Real:
    """Normally distributed numbers of one shape: pixels, features, a waveform."""

    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Whole:
    """The same whole numbers for every sample."""

    values: Any


@dataclass(frozen=True, slots=True)
class Lengths:
    """An attention mask that cuts samples to these lengths before the model sees them."""

    lengths: tuple[int, ...] = (11, 7, 7, 5)


Inputs = Mapping[str, Ids | Real | Whole | Lengths]
TOKENS: Inputs = {"input_ids": Ids(), "attention_mask": Lengths()}
PICTURE: Inputs = {"pixel_values": Real((3, 16, 16))}
SEQ2SEQ: Inputs = {**TOKENS, "decoder_input_ids": Ids(6)}
WAVE: Inputs = {"input_values": Real((421,))}


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row: `model` is a class of transformers, `settings` those of its configuration.

    `shared`: blocks share weights, so that moments are summed in another order than in the plain
    model, and are not compared bit for bit.
    """

    model: str
    settings: dict[str, Any]
    inputs: Inputs = field(default_factory=lambda: TOKENS)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    fast: bool = False
    shared: bool = False


TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA: dict[str, Any] = {**TEXT, "num_key_value_heads": 2}
HEADS = {"head_dim": 12}
LAYERS3 = {"num_hidden_layers": 3}
LAYERS4 = {"num_hidden_layers": 4}
MIXED = ["linear_attention", "full_attention", "linear_attention"]
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
PAIRS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    **PAIRS,
}
BERT: dict[str, Any] = {**TEXT, "type_vocab_size": 2}
VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 3,
}
SWIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
}
PYRAMID: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": (2, 2),
    "hidden_sizes": (16, 32),
    "num_attention_heads": (1, 2),
    "mlp_ratios": (2, 2),
    "patch_sizes": (7, 3),
    "strides": (4, 2),
}
SPEECH: dict[str, Any] = {
    **{k: TEXT[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads")},
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    **{"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
}
BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    **PAIRS,
}
MAMBA2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 8,
    "n_groups": 2,
    "chunk_size": 4,
}
# The associative scan is compiled by torch, for fixed or for any lengths, depending on what was run
# before: the plain model differs from itself in the last bits.
SCAN: dict[str, Any] = {"state_size": 8, "use_associative_scan": False}
QWEN_VISION: dict[str, Any] = {
    "depth": 3,
    "num_heads": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "video_token_id": VIDEO,
}
M_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def _qwen_inputs(patch: int) -> Inputs:
    """One image of 4 x 6 patches, 6 tokens after merging."""
    return {
        "input_ids": Ids(13, images=6),
        "attention_mask": Lengths((13, 9, 9, 11)),
        "pixel_values": Real((24, 3 * 2 * patch * patch)),
        "image_grid_thw": Whole([1, 4, 6]),
        "mm_token_type_ids": Whole([0, *[1] * 6, *[0] * 6]),
    }


def _with_picture(images: int, *, size: int = 16) -> Inputs:
    """A text that holds one picture."""
    return {
        "input_ids": Ids(images + 9, images=images),
        "attention_mask": Lengths(tuple(images + n for n in (9, 4, 4, 6))),
        "pixel_values": Real((3, size, size)),
    }


DECODERS = {
    "llama": Architecture("LlamaForCausalLM", LLAMA, dtype="bfloat16", fast=True),
    "llama-tied": Architecture(
        "LlamaForCausalLM", {**LLAMA, **LAYERS3, "tie_word_embeddings": True}
    ),
    "llama4": Architecture(
        "Llama4ForCausalLM",
        {
            **LLAMA,
            **LAYERS4,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8,
        },
    ),
    "mistral": Architecture("MistralForCausalLM", {**LLAMA, **HEADS, "sliding_window": 6}),
    "ministral": Architecture(
        "MinistralForCausalLM",
        {**LLAMA, **LAYERS3, **HEADS, "sliding_window": 6, "layer_types": SLIDING},
    ),
    "mixtral": Architecture(
        "MixtralForCausalLM",
        {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
        fast=True,
    ),
    "qwen2": Architecture("Qwen2ForCausalLM", LLAMA, dtype="float16"),
    "qwen2-moe": Architecture(
        "Qwen2MoeForCausalLM",
        {
            **LLAMA,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 28,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3": Architecture("Qwen3ForCausalLM", {**LLAMA, **HEADS}, dtype="bfloat16"),
    "qwen3-moe": Architecture(
        "Qwen3MoeForCausalLM",
        {
            **LLAMA,
            **HEADS,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        dtype="bfloat16",
    ),
    "qwen3-next": Architecture(
        "Qwen3NextForCausalLM",
        {
            **LLAMA,
            **LAYERS3,
            **HEADS,
            "layer_types": MIXED,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 28,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        fast=True,
    ),
    "gemma": Architecture("GemmaForCausalLM", {**LLAMA, **HEADS}),
    "gemma2": Architecture("Gemma2ForCausalLM", {**LLAMA, **LAYERS3, **HEADS, "sliding_window": 6}),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        {**LLAMA, **LAYERS3, **HEADS, "sliding_window": 6, "layer_types": SLIDING},
    ),
    "gemma3n": Architecture(
        "Gemma3nForCausalLM",
        {
            **LLAMA,
            **LAYERS4,
            "head_dim": 8,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "altup_num_inputs": 2,
            "laurel_rank": 6,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        },
        fast=True,
    ),
    "gemma4": Architecture(
        "Gemma4ForCausalLM",
        {
            **LLAMA,
            **LAYERS4,
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
        },
    ),
    "gemma4-moe": Architecture(
        "Gemma4ForCausalLM",
        {
            **LLAMA,
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
        },
    ),
    "phi": Architecture("PhiForCausalLM", {**TEXT, "partial_rotary_factor": 0.5}),
    "phi3": Architecture("Phi3ForCausalLM", LLAMA),
    "phimoe": Architecture(
        "PhimoeForCausalLM",
        {**LLAMA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "olmo": Architecture("OlmoForCausalLM", LLAMA),
    "olmo2": Architecture("Olmo2ForCausalLM", LLAMA),
    "olmo3": Architecture(
        "Olmo3ForCausalLM", {**LLAMA, **LAYERS3, "sliding_window": 6, "layer_types": SLIDING}
    ),
    "olmoe": Architecture(
        "OlmoeForCausalLM", {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2}
    ),
    "deepseek-v2": Architecture(
        "DeepseekV2ForCausalLM",
        {
            **LLAMA,
            "num_key_value_heads": 4,
            "head_dim": 4,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "kv_lora_rank": 12,
            "q_lora_rank": 14,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
        },
    ),
    "deepseek-v3": Architecture(
        "DeepseekV3ForCausalLM",
        {
            **LLAMA,
            **LAYERS3,
            "num_key_value_heads": 4,
            "head_dim": 4,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "kv_lora_rank": 12,
            "q_lora_rank": 14,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
        },
    ),
    "gpt-oss": Architecture(
        "GptOssForCausalLM",
        {
            **LLAMA,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
        },
        fast=True,
    ),
    "granite": Architecture("GraniteForCausalLM", {**LLAMA, "residual_multiplier": 0.5}),
    "granite-moe": Architecture(
        "GraniteMoeForCausalLM", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "granite-moe-hybrid": Architecture(
        "GraniteMoeHybridForCausalLM",
        {
            **LLAMA,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 4,
        },
    ),
    "smollm3": Architecture("SmolLM3ForCausalLM", {**LLAMA, **LAYERS4}),
    "cohere": Architecture("CohereForCausalLM", LLAMA),
    "cohere2": Architecture("Cohere2ForCausalLM", {**LLAMA, **LAYERS4, "sliding_window": 6}),
    "falcon": Architecture(
        "FalconForCausalLM",
        {
            **{k: v for k, v in TEXT.items() if k != "intermediate_size"},
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
        },
    ),
    "falcon-alibi": Architecture(
        "FalconForCausalLM",
        {
            **{k: v for k, v in TEXT.items() if k != "intermediate_size"},
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
        },
    ),
    "bloom": Architecture(
        "BloomForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, **PAIRS},
    ),
    "gpt2": Architecture("GPT2LMHeadModel", GPT, fast=True),
    "gptj": Architecture("GPTJForCausalLM", {**GPT, "rotary_dim": 4}),
    "gpt-neo": Architecture(
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "max_position_embeddings": 64,
            **PAIRS,
        },
    ),
    "gpt-neox": Architecture("GPTNeoXForCausalLM", TEXT),
    "gpt-bigcode": Architecture("GPTBigCodeForCausalLM", GPT),
    "codegen": Architecture("CodeGenForCausalLM", {**GPT, "rotary_dim": 4}),
    "opt": Architecture(
        "OPTForCausalLM",
        {
            **{k: v for k, v in TEXT.items() if k != "intermediate_size"},
            "ffn_dim": 40,
            "word_embed_proj_dim": 24,
        },
    ),
    "mpt": Architecture(
        "MptForCausalLM",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    ),
    "glm": Architecture("GlmForCausalLM", {**LLAMA, "head_dim": 8}),
    "glm4": Architecture("Glm4ForCausalLM", {**LLAMA, "head_dim": 8}),
    "glm4-moe": Architecture(
        "Glm4MoeForCausalLM",
        {
            **LLAMA,
            "head_dim": 8,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "dbrx": Architecture(
        "DbrxForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {
                "hidden_size": 32,
                "ffn_hidden_size": 24,
                "moe_num_experts": 4,
                "moe_top_k": 2,
                "ffn_act_fn": {"name": "silu"},
            },
            **PAIRS,
        },
    ),
    "persimmon": Architecture("PersimmonForCausalLM", TEXT),
    "starcoder2": Architecture("Starcoder2ForCausalLM", LLAMA),
    "stablelm": Architecture("StableLmForCausalLM", LLAMA),
    "nemotron": Architecture("NemotronForCausalLM", LLAMA),
    "exaone4": Architecture(
        "Exaone4ForCausalLM", {**LLAMA, **LAYERS3, "sliding_window": 6, "layer_types": SLIDING}
    ),
    "ernie4.5": Architecture("Ernie4_5ForCausalLM", LLAMA),
    "seed-oss": Architecture("SeedOssForCausalLM", {**LLAMA, "head_dim": 8}),
    "hunyuan": Architecture("HunYuanDenseV1ForCausalLM", {**LLAMA, "head_dim": 8}),
    "minimax": Architecture(
        "MiniMaxForCausalLM",
        {
            **LLAMA,
            "num_local_experts": 4,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 4,
        },
    ),
}

STATES = {
    "mamba": Architecture(
        "MambaForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, **SCAN},
        fast=True,
    ),
    "mamba2": Architecture("Mamba2ForCausalLM", MAMBA2),
    "falcon-mamba": Architecture(
        "FalconMambaForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, **SCAN},
    ),
    "jamba": Architecture(
        "JambaForCausalLM",
        {
            **LLAMA,
            **LAYERS4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
            "use_associative_scan": False,
        },
    ),
    "zamba2": Architecture(
        "Zamba2ForCausalLM",
        {
            **LLAMA,
            **LAYERS4,
            "num_key_value_heads": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "chunk_size": 4,
            "use_mamba_kernels": False,
            "use_shared_attention_adapter": True,
            "adapter_rank": 6,
        },
        shared=True,
    ),
    "lfm2": Architecture(
        "Lfm2ForCausalLM",
        {**LLAMA, **LAYERS3, "layer_types": ["conv", "full_attention", "conv"]},
    ),
    "falcon-h1": Architecture(
        "FalconH1ForCausalLM",
        {
            **LLAMA,
            "head_dim": 8,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 4,
        },
    ),
    "recurrent-gemma": Architecture(
        "RecurrentGemmaForCausalLM",
        {
            **{k: v for k, v in LLAMA.items() if k != "max_position_embeddings"},
            **LAYERS3,
            "lru_width": 32,
            "attention_window_size": 6,
        },
    ),
    "rwkv": Architecture(
        "RwkvForCausalLM",
        # It would divide weights of later blocks in place; such models are refused.
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "rescale_every": 0,
        },
    ),
}

ENCODERS = {
    "bert": Architecture("BertModel", BERT, fast=True),
    "bert-masked": Architecture("BertForMaskedLM", BERT),
    "roberta": Architecture("RobertaModel", {**BERT, "pad_token_id": 1, "bos_token_id": 0}),
    "xlm-roberta-classifier": Architecture(
        "XLMRobertaForSequenceClassification", {**BERT, "pad_token_id": 1, "bos_token_id": 0}
    ),
    "distilbert": Architecture(
        "DistilBertModel",
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 40,
            "max_position_embeddings": 64,
        },
    ),
    "albert": Architecture("AlbertModel", {**BERT, **LAYERS3, "embedding_size": 12}, fast=True),
    "electra": Architecture("ElectraModel", {**BERT, "embedding_size": 12}),
    "deberta-v2": Architecture(
        "DebertaV2Model",
        {
            **BERT,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "conv_kernel_size": 3,
            "conv_act": "gelu",
        },
    ),
    "modernbert": Architecture(
        "ModernBertModel",
        {
            **TEXT,
            **LAYERS3,
            "local_attention": 6,
            "layer_types": SLIDING,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
    "xlnet": Architecture(
        "XLNetModel",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 40},
    ),
    "bigbird": Architecture(
        "BigBirdModel",
        {**BERT, "attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1},
    ),
    "mpnet": Architecture("MPNetModel", TEXT),
    "longformer": Architecture("LongformerModel", {**BERT, "attention_window": 4}),
    "nystromformer": Architecture(
        "NystromformerModel",
        {**BERT, "num_landmarks": 4, "segment_means_seq_len": 12, "conv_kernel_size": 3},
        {"input_ids": Ids(12)},
    ),
    "funnel": Architecture(
        "FunnelModel",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 40,
            "block_sizes": [1, 2],
            "num_decoder_layers": 1,
        },
    ),
    "fnet": Architecture("FNetModel", {**BERT, "use_tpu_fourier_optimizations": False}),
    "roformer": Architecture("RoFormerModel", BERT),
    "mobilebert": Architecture(
        "MobileBertModel",
        {**BERT, "embedding_size": 12, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    ),
    "nomic-bert": Architecture("NomicBertModel", BERT),
    "esm": Architecture(
        "EsmModel", {**TEXT, "position_embedding_type": "rotary", "mask_token_id": 3}
    ),
}

VISION = {
    "vit": Architecture("ViTModel", VIT, PICTURE, fast=True),
    "vit-classifier": Architecture("ViTForImageClassification", VIT, PICTURE, dtype="bfloat16"),
    "deit": Architecture("DeiTModel", VIT, PICTURE),
    "beit": Architecture(
        "BeitModel",
        {**VIT, "use_relative_position_bias": True, "layer_scale_init_value": 0.1},
        PICTURE,
    ),
    "dinov2": Architecture("Dinov2Model", VIT, {"pixel_values": Real((3, 20, 12))}),
    "dinov2-registers": Architecture("Dinov2WithRegistersModel", VIT, PICTURE),
    "dinov3": Architecture(
        "DINOv3ViTModel",
        {**VIT, "num_register_tokens": 2},
        {"pixel_values": Real((3, 20, 12))},
        fast=True,
    ),
    "dinov3-convnext": Architecture(
        "DINOv3ConvNextModel",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "image_size": 64},
        {"pixel_values": Real((3, 67, 45))},
    ),
    "swin": Architecture("SwinModel", SWIN, {"pixel_values": Real((3, 32, 32))}, fast=True),
    "swinv2": Architecture("Swinv2Model", SWIN, {"pixel_values": Real((3, 32, 32))}),
    "convnext": Architecture(
        "ConvNextModel",
        {"hidden_sizes": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "image_size": 64},
        {"pixel_values": Real((3, 67, 45))},
    ),
    "convnextv2": Architecture(
        "ConvNextV2Model",
        {"hidden_sizes": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "image_size": 64},
        {"pixel_values": Real((3, 67, 45))},
    ),
    "segformer": Architecture(
        "SegformerForSemanticSegmentation",
        {**PYRAMID, "sr_ratios": (2, 1), "decoder_hidden_size": 24},
        {"pixel_values": Real((3, 37, 45))},
    ),
    "vit-mae": Architecture(
        "ViTMAEModel",
        {
            **VIT,
            "decoder_hidden_size": 24,
            "decoder_num_hidden_layers": 2,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 28,
        },
        PICTURE,
    ),
    "dpt": Architecture(
        "DPTForDepthEstimation",
        {
            **VIT,
            **LAYERS4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 12, 16, 20],
            "fusion_hidden_size": 12,
        },
        PICTURE,
    ),
    "pvt": Architecture(
        "PvtModel",
        {
            **PYRAMID,
            "image_size": 32,
            "num_encoder_blocks": 4,
            "depths": (1, 1, 2, 1),
            "hidden_sizes": (8, 16, 24, 32),
            "num_attention_heads": (1, 2, 2, 4),
            "mlp_ratios": (2, 2, 2, 2),
            "patch_sizes": (4, 2, 2, 2),
            "strides": (4, 2, 2, 2),
            "sequence_reduction_ratios": (2, 2, 1, 1),
        },
        {"pixel_values": Real((3, 32, 32))},
    ),
    "levit": Architecture(
        "LevitModel",
        {
            "image_size": 64,
            "hidden_sizes": (16, 24, 32),
            "num_attention_heads": (2, 2, 4),
            "depths": (1, 1, 2),
            "key_dim": (4, 4, 4),
        },
        {"pixel_values": Real((3, 64, 64))},
    ),
    "mobilevit": Architecture(
        "MobileViTModel",
        {
            "image_size": 32,
            "hidden_sizes": (16, 20, 24),
            "neck_hidden_sizes": (4, 8, 12, 16, 20, 24, 32),
            "num_attention_heads": 4,
            "expand_ratio": 2.0,
        },
        {"pixel_values": Real((3, 64, 64))},
    ),
    "cvt": Architecture(
        "CvtModel",
        {"embed_dim": (8, 16, 24), "num_heads": (1, 2, 3), "depth": (1, 2, 3)},
        {"pixel_values": Real((3, 37, 45))},
    ),
    "yolos": Architecture(
        "YolosForObjectDetection",
        {**VIT, "image_size": (16, 16), "num_detection_tokens": 3},
        PICTURE,
    ),
    "vitdet": Architecture("VitDetModel", {**VIT, "num_hidden_layers": 3}, PICTURE),
    "ijepa": Architecture("IJepaModel", VIT, PICTURE),
    "hiera": Architecture(
        "HieraModel",
        {
            "image_size": (32, 32),
            "embed_dim": 8,
            "depths": (1, 1, 2),
            "num_heads": (1, 2, 4),
            "masked_unit_size": (4, 4),
            "query_stride": (2, 2),
            "num_query_pool": 2,
        },
        {"pixel_values": Real((3, 32, 32))},
    ),
    "detr": Architecture(
        "DetrForObjectDetection",
        {
            "use_timm_backbone": False,
            "backbone": None,
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "layer_type": "basic",
                "out_features": ["stage2"],
            },
            "d_model": 32,
            "num_queries": 5,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 40,
        },
        {"pixel_values": Real((3, 37, 45))},
    ),
    "mask2former": Architecture(
        "Mask2FormerForUniversalSegmentation",
        {
            "backbone_config": {
                "model_type": "swin",
                **SWIN,
                "depths": (1, 1, 1, 1),
                "num_heads": (2, 2, 4, 4),
                "out_features": ["stage1", "stage2", "stage3", "stage4"],
            },
            "feature_size": 32,
            "mask_feature_size": 32,
            "hidden_dim": 32,
            "encoder_feedforward_dim": 40,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "num_attention_heads": 4,
            "dim_feedforward": 40,
            "num_queries": 5,
        },
        {"pixel_values": Real((3, 64, 64))},
    ),
    "depth-anything": Architecture(
        "DepthAnythingForDepthEstimation",
        {
            "backbone_config": {
                "model_type": "dinov2",
                **VIT,
                **LAYERS4,
                "out_features": ["stage1", "stage2", "stage3", "stage4"],
                "apply_layernorm": True,
                "reshape_hidden_states": False,
            },
            "patch_size": 4,
            "reassemble_hidden_size": 32,
            "neck_hidden_sizes": [8, 12, 16, 20],
            "fusion_hidden_size": 12,
            "head_hidden_size": 8,
        },
        PICTURE,
    ),
    "sam": Architecture(
        "SamModel",
        {
            "vision_config": {
                **{k: v for k, v in VIT.items() if k != "intermediate_size"},
                "mlp_dim": 40,
                "output_channels": 16,
                "window_size": 2,
                "global_attn_indexes": [1],
                "num_pos_feats": 8,
            },
            "prompt_encoder_config": {"hidden_size": 16, "image_size": 16, "patch_size": 4},
            "mask_decoder_config": {
                "hidden_size": 16,
                "mlp_dim": 24,
                "num_attention_heads": 2,
                "iou_head_hidden_dim": 16,
            },
        },
        {"pixel_values": Real((3, 16, 16)), "input_points": Real((1, 2, 2))},
    ),
    "videomae": Architecture(
        "VideoMAEModel",
        {**VIT, "num_frames": 4, "tubelet_size": 2},
        {"pixel_values": Real((4, 3, 16, 16))},
    ),
}

PAIRED = {
    "clip": Architecture(
        "CLIPModel",
        {
            "text_config": {**TEXT, "projection_dim": 24},
            "vision_config": {**VIT, "hidden_size": 24, "projection_dim": 24},
            "projection_dim": 24,
        },
        {**TOKENS, **PICTURE},
        fast=True,
    ),
    "clip-vision": Architecture("CLIPVisionModelWithProjection", VIT, PICTURE),
    "siglip": Architecture(
        "SiglipModel",
        {"text_config": TEXT, "vision_config": VIT},
        {**TOKENS, **PICTURE},
    ),
    "siglip2": Architecture(
        "Siglip2VisionModel",
        {**VIT, "num_patches": 16},
        {
            "pixel_values": Real((12, 48)),
            "pixel_attention_mask": Whole([1] * 12),
            "spatial_shapes": Whole([3, 4]),
        },
    ),
    "blip": Architecture(
        "BlipForConditionalGeneration",
        {
            "text_config": {**TEXT, "encoder_hidden_size": 24, "projection_dim": 24},
            "vision_config": {**VIT, "hidden_size": 24, "projection_dim": 24},
            "projection_dim": 24,
            "image_text_hidden_size": 24,
        },
        {**TOKENS, **PICTURE},
    ),
    "blip2": Architecture(
        "Blip2ForConditionalGeneration",
        {
            "vision_config": {**VIT, "hidden_size": 24},
            "qformer_config": {
                **{k: v for k, v in TEXT.items() if "bos" not in k and "eos" not in k},
                "encoder_hidden_size": 24,
            },
            "text_config": {
                "model_type": "opt",
                **{k: v for k, v in TEXT.items() if k != "intermediate_size"},
                "ffn_dim": 40,
                "word_embed_proj_dim": 32,
            },
            "num_query_tokens": 3,
            "image_token_index": IMAGE,
        },
        _with_picture(3),
    ),
    "instructblip": Architecture(
        "InstructBlipForConditionalGeneration",
        {
            "vision_config": {**VIT, "hidden_size": 24},
            "qformer_config": {
                **{k: v for k, v in TEXT.items() if "bos" not in k and "eos" not in k},
                "encoder_hidden_size": 24,
            },
            "text_config": {"model_type": "llama", **LLAMA},
            "num_query_tokens": 3,
            "image_token_index": IMAGE,
        },
        {**_with_picture(3), "qformer_input_ids": Ids(6)},
    ),
    "llava": Architecture(
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **LLAMA},
            "vision_config": {
                "model_type": "clip_vision_model",
                **VIT,
                "hidden_size": 24,
                "num_hidden_layers": 3,
            },
            "image_token_index": IMAGE,
        },
        _with_picture(16),
        fast=True,
    ),
    "paligemma": Architecture(
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": {"model_type": "gemma", **LLAMA, "head_dim": 8},
            "vision_config": {"model_type": "siglip_vision_model", **VIT, "hidden_size": 24},
            "projection_dim": 32,
            "image_token_index": IMAGE,
        },
        _with_picture(16),
    ),
    "gemma3-vision": Architecture(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {
                **LLAMA,
                "head_dim": 8,
                "sliding_window": 6,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "vision_config": {"model_type": "siglip_vision_model", **VIT, "hidden_size": 24},
            "image_token_index": IMAGE,
            "mm_tokens_per_image": 4,
        },
        _with_picture(4),
    ),
    "idefics3": Architecture(
        "Idefics3ForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **LLAMA},
            "vision_config": {**VIT, "hidden_size": 24},
            "image_token_id": IMAGE,
        },
        {**_with_picture(4), "pixel_values": Real((1, 3, 16, 16))},
    ),
    "smolvlm": Architecture(
        "SmolVLMForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **LLAMA},
            "vision_config": {**VIT, "hidden_size": 24},
            "image_token_id": IMAGE,
        },
        {**_with_picture(4), "pixel_values": Real((1, 3, 16, 16))},
    ),
    "internvl": Architecture(
        "InternVLForConditionalGeneration",
        {
            "text_config": {"model_type": "qwen2", **LLAMA},
            "vision_config": {
                **VIT,
                "hidden_size": 24,
                "image_size": (16, 16),
                "patch_size": (4, 4),
            },
            "image_token_id": IMAGE,
        },
        _with_picture(4),
    ),
    "mistral3": Architecture(
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {"model_type": "mistral", **LLAMA, "head_dim": 8},
            "vision_config": {"model_type": "pixtral", **VIT, "hidden_size": 24},
            "image_token_index": IMAGE,
        },
        {**_with_picture(4), "image_sizes": Whole([16, 16])},
    ),
    "qwen2-vl": Architecture(
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {**LLAMA, "rope_parameters": M_ROPE},
            "vision_config": {**QWEN_VISION, "embed_dim": 24, "hidden_size": 32},
            **QWEN_TOKENS,
        },
        _qwen_inputs(4),
    ),
    "qwen2.5-vl": Architecture(
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {**LLAMA, "rope_parameters": M_ROPE},
            "vision_config": {
                **QWEN_VISION,
                "hidden_size": 24,
                "intermediate_size": 40,
                "out_hidden_size": 32,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            **QWEN_TOKENS,
        },
        _qwen_inputs(4),
    ),
    "qwen3-vl": Architecture(
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": {**LLAMA, "head_dim": 8, "rope_parameters": M_ROPE},
            "vision_config": {
                **QWEN_VISION,
                "hidden_size": 24,
                "intermediate_size": 40,
                "out_hidden_size": 32,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 1],
            },
            **QWEN_TOKENS,
        },
        _qwen_inputs(4),
    ),
    "qwen3.5": Architecture(
        "Qwen3_5ForCausalLM",
        {
            **LLAMA,
            **LAYERS3,
            "head_dim": 16,
            "layer_types": MIXED,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "florence2": Architecture(
        "Florence2ForConditionalGeneration",
        {
            "text_config": {"model_type": "bart", **BART},
            "vision_config": {
                "depths": (1, 1),
                "patch_size": (7, 3),
                "patch_stride": (4, 2),
                "patch_padding": (3, 1),
                "patch_prenorm": (False, True),
                "embed_dim": (8, 16),
                "num_heads": (2, 2),
                "num_groups": (2, 2),
                "window_size": 4,
                "projection_dim": 32,
            },
            "image_token_id": IMAGE,
        },
        {**_with_picture(17, size=32), "decoder_input_ids": Ids(6)},
    ),
    "vilt": Architecture("ViltModel", {**BERT, **VIT}, {**TOKENS, **PICTURE}),
    "git": Architecture(
        "GitForCausalLM",
        {**TEXT, "vision_config": {**VIT, "hidden_size": 24}},
        {**TOKENS, **PICTURE},
    ),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        {
            **{k: v for k, v in BART.items() if k != "max_position_embeddings"},
            "num_mel_bins": 8,
            "max_source_positions": 15,
            "max_target_positions": 16,
        },
        {"input_features": Real((8, 30)), "decoder_input_ids": Ids(7)},
        fast=True,
    ),
    "wav2vec2": Architecture("Wav2Vec2Model", SPEECH, WAVE),
    "wav2vec2-ctc": Architecture(
        "Wav2Vec2ForCTC",
        {**SPEECH, "do_stable_layer_norm": True, "feat_extract_norm": "layer"},
        WAVE,
    ),
    "hubert": Architecture("HubertModel", SPEECH, WAVE),
    "wavlm": Architecture("WavLMModel", {**SPEECH, "num_buckets": 8}, WAVE),
    "data2vec-audio": Architecture(
        "Data2VecAudioModel",
        {**SPEECH, "conv_pos_kernel_size": 5, "num_conv_pos_embeddings": 2},
        WAVE,
    ),
    "wav2vec2-conformer": Architecture(
        "Wav2Vec2ConformerModel", {**SPEECH, "conv_depthwise_kernel_size": 3}, WAVE
    ),
    "ast": Architecture(
        "ASTModel",
        {
            **{k: v for k, v in VIT.items() if k not in ("image_size", "num_channels")},
            "max_length": 21,
            "num_mel_bins": 12,
            "frequency_stride": 3,
            "time_stride": 3,
        },
        {"input_values": Real((21, 12))},
    ),
    "clap": Architecture(
        "ClapAudioModelWithProjection",
        {
            "spec_size": 32,
            "num_mel_bins": 8,
            "patch_embeds_hidden_size": 16,
            "depths": (2, 2),
            "num_attention_heads": (2, 4),
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "window_size": 4,
            "projection_dim": 24,
            "projection_hidden_act": "relu",
        },
        {"input_features": Real((1, 64, 8))},
    ),
    "qwen2-audio": Architecture(
        "Qwen2AudioForConditionalGeneration",
        {
            "text_config": {"model_type": "qwen2", **LLAMA},
            "audio_config": {
                "model_type": "qwen2_audio_encoder",
                "num_mel_bins": 8,
                "encoder_layers": 2,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 40,
                "d_model": 24,
                "max_source_positions": 12,
            },
            "audio_token_index": IMAGE,
        },
        {
            "input_ids": Ids(15, images=6),
            "attention_mask": Lengths((15, 10, 10, 12)),
            "input_features": Real((8, 24)),
            "feature_attention_mask": Whole([1] * 24),
        },
    ),
}

SEQUENCES = {
    "t5": Architecture("T5ForConditionalGeneration", T5, SEQ2SEQ, fast=True),
    "t5-gated": Architecture(
        "T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}, SEQ2SEQ
    ),
    "longt5": Architecture(
        "LongT5ForConditionalGeneration",
        {**T5, "local_radius": 3, "global_block_size": 4},
        SEQ2SEQ,
    ),
    "longt5-global": Architecture(
        "LongT5ForConditionalGeneration",
        {
            **T5,
            "local_radius": 3,
            "global_block_size": 4,
            "encoder_attention_type": "transient-global",
        },
        SEQ2SEQ,
    ),
    "umt5": Architecture("UMT5ForConditionalGeneration", T5, SEQ2SEQ),
    "switch": Architecture(
        "SwitchTransformersForConditionalGeneration",
        {
            **T5,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_experts": 4,
            "expert_capacity": 16,
        },
        SEQ2SEQ,
    ),
    "t5-gemma": Architecture(
        "T5GemmaForConditionalGeneration",
        {
            "encoder": {**LLAMA, "head_dim": 8, "sliding_window": 6},
            "decoder": {**LLAMA, **LAYERS3, "head_dim": 8, "sliding_window": 6},
            "vocab_size": VOCABULARY,
        },
        SEQ2SEQ,
    ),
    "bart": Architecture("BartForConditionalGeneration", BART, SEQ2SEQ),
    "mbart": Architecture("MBartForConditionalGeneration", BART, SEQ2SEQ),
    "pegasus": Architecture("PegasusForConditionalGeneration", BART, SEQ2SEQ),
    "marian": Architecture("MarianMTModel", {**BART, "decoder_vocab_size": VOCABULARY}, SEQ2SEQ),
    "m2m100": Architecture("M2M100ForConditionalGeneration", BART, SEQ2SEQ),
    "blenderbot": Architecture("BlenderbotForConditionalGeneration", BART, SEQ2SEQ),
    "bigbird-pegasus": Architecture(
        "BigBirdPegasusForConditionalGeneration",
        {**BART, "attention_type": "original_full"},
        SEQ2SEQ,
    ),
    "led": Architecture(
        "LEDForConditionalGeneration",
        {
            **{k: v for k, v in BART.items() if k != "max_position_embeddings"},
            "attention_window": 4,
            "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64,
        },
        SEQ2SEQ,
    ),
    "prophetnet": Architecture(
        "ProphetNetForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 40,
            "max_position_embeddings": 64,
            "ngram": 2,
            **PAIRS,
        },
        SEQ2SEQ,
    ),
    "fsmt": Architecture(
        "FSMTForConditionalGeneration",
        {
            **{k: v for k, v in BART.items() if k != "vocab_size"},
            "langs": ["en", "de"],
            "src_vocab_size": VOCABULARY,
            "tgt_vocab_size": VOCABULARY,
        },
        SEQ2SEQ,
    ),
}

GROUPS: dict[str, dict[str, Architecture]] = {
    "Decoders": DECODERS,
    "State spaces and hybrids": STATES,
    "Encoders": ENCODERS,
    "Vision": VISION,
    "Pairs and sound": PAIRED,
    "Sequence to sequence": SEQUENCES,
}
ARCHITECTURES = {name: row for group in GROUPS.values() for name, row in group.items()}
