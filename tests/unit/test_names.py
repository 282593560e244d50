"""Names of tensors: kinds in the conventions of ten architectures, roles, blocks, patterns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esm_stream.checkpoints.names import (
    block_of,
    compile_pattern,
    fused_name,
    kind_of,
    matcher,
    role_of,
)
from esm_stream.errors import ManifestError

VIT = "vit.encoder.layer.3."
BERT = "bert.encoder.layer.11."
LLAMA = "model.layers.7."
GPT2 = "transformer.h.2."
CLIP = "vision_model.encoder.layers.5."
KINDS = {
    # ViT
    VIT + "attention.attention.query.weight": "q",
    VIT + "attention.attention.key.weight": "k",
    VIT + "attention.attention.value.weight": "v",
    VIT + "attention.output.dense.weight": "o",
    VIT + "intermediate.dense.weight": "up",
    VIT + "output.dense.weight": "down",
    VIT + "layernorm_before.weight": None,
    "vit.embeddings.patch_embeddings.projection.weight": None,
    # CLIP
    CLIP + "self_attn.q_proj.weight": "q",
    CLIP + "self_attn.k_proj.weight": "k",
    CLIP + "self_attn.v_proj.weight": "v",
    CLIP + "self_attn.out_proj.weight": "o",
    CLIP + "mlp.fc1.weight": "up",
    CLIP + "mlp.fc2.weight": "down",
    # OpenCLIP's names
    "visual.transformer.resblocks.0.attn.in_proj_weight": "qkv",
    "visual.transformer.resblocks.0.attn.out_proj.weight": "o",
    "visual.transformer.resblocks.0.mlp.c_fc.weight": "up",
    "visual.transformer.resblocks.0.mlp.c_proj.weight": "down",
    # BERT and RoBERTa
    BERT + "attention.self.query.weight": "q",
    BERT + "attention.self.key.weight": "k",
    BERT + "attention.self.value.weight": "v",
    BERT + "attention.output.dense.weight": "o",
    BERT + "intermediate.dense.weight": "up",
    BERT + "output.dense.weight": "down",
    BERT + "attention.output.LayerNorm.weight": None,
    "roberta.encoder.layer.0.attention.self.query.weight": "q",
    "roberta.encoder.layer.0.output.dense.weight": "down",
    "bert.pooler.dense.weight": None,
    "bert.embeddings.word_embeddings.weight": None,
    # Llama, Qwen2, Qwen3, Mistral
    LLAMA + "self_attn.q_proj.weight": "q",
    LLAMA + "self_attn.k_proj.weight": "k",
    LLAMA + "self_attn.v_proj.weight": "v",
    LLAMA + "self_attn.o_proj.weight": "o",
    LLAMA + "mlp.gate_proj.weight": "gate",
    LLAMA + "mlp.up_proj.weight": "up",
    LLAMA + "mlp.down_proj.weight": "down",
    LLAMA + "self_attn.q_norm.weight": None,
    LLAMA + "self_attn.q_proj.bias": None,
    LLAMA + "input_layernorm.weight": None,
    "model.embed_tokens.weight": None,
    "lm_head.weight": None,
    # Phi
    LLAMA + "self_attn.qkv_proj.weight": "qkv",
    LLAMA + "mlp.gate_up_proj.weight": "gate_up",
    # GPT-2
    GPT2 + "attn.c_attn.weight": "qkv",
    GPT2 + "attn.c_proj.weight": "o",
    GPT2 + "mlp.c_fc.weight": "up",
    GPT2 + "mlp.c_proj.weight": "down",
    GPT2 + "ln_1.weight": None,
    "transformer.wte.weight": None,
    # T5, Falcon, DistilBERT
    "encoder.block.0.layer.0.SelfAttention.q.weight": "q",
    "encoder.block.0.layer.0.SelfAttention.o.weight": "o",
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": "gate",
    "encoder.block.0.layer.1.DenseReluDense.wi_1.weight": "up",
    "encoder.block.0.layer.1.DenseReluDense.wo.weight": "down",
    "transformer.h.0.self_attention.query_key_value.weight": "qkv",
    "transformer.h.0.self_attention.dense.weight": "o",
    "transformer.h.0.mlp.dense_h_to_4h.weight": "up",
    "transformer.h.0.mlp.dense_4h_to_h.weight": "down",
    "distilbert.transformer.layer.0.attention.q_lin.weight": "q",
    "distilbert.transformer.layer.0.attention.out_lin.weight": "o",
    "distilbert.transformer.layer.0.ffn.lin1.weight": "up",
    "distilbert.transformer.layer.0.ffn.lin2.weight": "down",
}


@pytest.mark.parametrize("name", KINDS)
def test_kind_of_a_weight_follows_from_the_end_of_its_name(name: str) -> None:
    assert kind_of(name) == KINDS[name]


@pytest.mark.parametrize(
    ("name", "block", "role"),
    [
        (LLAMA + "mlp.up_proj.weight", 7, "model.layers.*.mlp.up_proj.weight"),
        (VIT + "output.dense.bias", 3, "vit.encoder.layer.*.output.dense.bias"),
        ("0.attn.weight", 0, "*.attn.weight"),
        ("lm_head.weight", None, "lm_head.weight"),
        ("model.embed_tokens2.weight", None, "model.embed_tokens2.weight"),
        ("encoder.block.4.layer.1.w.weight", 4, "encoder.block.*.layer.1.w.weight"),
        ("classifier.12", None, "classifier.12"),
    ],
)
def test_block_is_the_first_number_and_role_the_name_without_it(
    name: str, block: int | None, role: str
) -> None:
    assert block_of(name) == block
    assert role_of(name) == role


@given(
    first=st.integers(0, 999),
    second=st.integers(0, 999),
    tail=st.from_regex(r"[a-z_]{1,8}(\.[a-z]{1,5}){1,2}", fullmatch=True),
)
def test_layers_that_differ_in_their_number_alone_have_one_role(
    first: int, second: int, tail: str
) -> None:
    names = [f"model.layers.{number}.{tail}" for number in (first, second)]
    assert role_of(names[0]) == role_of(names[1])
    assert [block_of(name) for name in names] == [first, second]


@pytest.mark.parametrize(
    ("pattern", "matches", "leaves"),
    [
        ("*.bias", ["a.bias", "a.b.bias"], ["bias", "a.bias.c"]),
        ("model.norm.weight", ["model.norm.weight"], ["model.norm.weight2", "xmodel.norm.weight"]),
        ("layers.[01].*", ["layers.0.x", "layers.1.y"], ["layers.2.x"]),
        ("re:.*embed.*", ["model.embed_tokens.weight"], ["lm_head.weight"]),
        (r"re:layers\.\d", ["layers.1"], ["layers.12", "xlayers.1"]),
        ("a.b", ["a.b"], ["axb", "A.b"]),
    ],
)
def test_patterns_match_whole_names(pattern: str, matches: list[str], leaves: list[str]) -> None:
    test = matcher([pattern])
    assert all(map(test, matches))
    assert not any(map(test, leaves))


def test_several_patterns_match_what_any_of_them_does_and_none_match_nothing() -> None:
    test = matcher(["*.bias", "re:x+"])
    assert test("a.bias")
    assert test("xxx")
    assert not test("a.weight")
    assert not matcher([])("anything")


def test_a_broken_regular_expression_is_named() -> None:
    with pytest.raises(ManifestError, match=r"'re:\(' is not a regular expression"):
        compile_pattern("re:(")


def test_fused_name_shows_its_parts_where_they_differ() -> None:
    names = [f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qkv"]
    fused = fused_name(names)
    assert fused == "model.layers.0.self_attn.{q_proj,k_proj,v_proj}.weight"
    assert block_of(fused) == 0
    assert role_of(fused) == "model.layers.*.self_attn.{q_proj,k_proj,v_proj}.weight"
