"""Configurations, tokenizers and processors of tiny models, saved in the layout of a hub."""

from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast

WORDS = 60
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
HEADS = {**SIZES, "num_attention_heads": 2}
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('only users and assistants') }}{% endif %}"
    "{{ 'w10 ' if m['role'] == 'user' else 'w11 ' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{{ '<image> ' if p['type'] == 'image' else p['text'] }}"
    "{% endfor %}{% endif %}{{ ' ' }}{% endfor %}"
)


def config(path: Path, name: str, architecture: str, **settings: Any) -> Path:  # noqa: ANN401
    """A config.json: all that a model directory needs for its inputs."""
    made = getattr(transformers, name)(**settings, architectures=[architecture])
    made.save_pretrained(path)
    return path


def llama(path: Path) -> Path:
    return config(path, "LlamaConfig", "LlamaForCausalLM", vocab_size=WORDS, **HEADS)


def tokenizer(
    *, special: tuple[str, ...] = (), template: str | None = None, **options: int
) -> PreTrainedTokenizerFast:
    """Whole words "w3" ... "w59", and [EOS]."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = {"[UNK]": 0, "[PAD]": 1, "[EOS]": 2} | {f"w{n}": n for n in range(3, WORDS)}
    made = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = WhitespaceSplit()
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]", **options
    )
    found.add_special_tokens({"additional_special_tokens": list(special)})
    found.chat_template = template
    return found


def clip_images() -> Any:  # noqa: ANN401
    from transformers import CLIPImageProcessor

    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    return CLIPImageProcessor(**sizes)


def clip(path: Path) -> Path:
    from transformers import CLIPProcessor

    text = {**HEADS, "vocab_size": WORDS}
    vision = {**HEADS, "image_size": 16, "patch_size": 4}
    config(path, "CLIPConfig", "CLIPModel", text_config=text, vision_config=vision)
    CLIPProcessor(clip_images(), tokenizer(model_max_length=7)).save_pretrained(path)
    return path


def llava(path: Path, template: str | None = None) -> Path:
    from transformers import LlavaProcessor

    text = {**HEADS, "model_type": "llama", "vocab_size": WORDS + 1}
    vision = {**HEADS, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 4}
    config(
        path,
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        text_config=text,
        vision_config=vision,
        image_token_index=WORDS,
    )
    LlavaProcessor(
        clip_images(),
        tokenizer(special=("<image>",), template=template),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(path)
    return path


def t5(path: Path) -> Path:
    config(
        path,
        "T5Config",
        "T5ForConditionalGeneration",
        **{"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1},
        **{"num_heads": 2, "decoder_start_token_id": 1, "pad_token_id": 1, "eos_token_id": 2},
    )
    tokenizer().save_pretrained(path)
    return path


def whisper(path: Path) -> Path:
    from transformers import WhisperFeatureExtractor

    config(
        path,
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        **{"vocab_size": WORDS, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8},
        **{"decoder_start_token_id": 5, "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 2},
    )
    WhisperFeatureExtractor(feature_size=8, sampling_rate=16_000).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def wav2vec2(path: Path) -> Path:
    from transformers import Wav2Vec2FeatureExtractor

    config(path, "Wav2Vec2Config", "Wav2Vec2Model", **HEADS)
    Wav2Vec2FeatureExtractor(sampling_rate=16_000).save_pretrained(path)
    return path


def qwen2_audio(path: Path) -> Path:
    from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

    text = {**HEADS, "model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": WORDS + 1}
    sound = {"model_type": "qwen2_audio_encoder", "d_model": 16, "num_mel_bins": 8}
    layers = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    config(
        path,
        "Qwen2AudioConfig",
        "Qwen2AudioForConditionalGeneration",
        text_config=text,
        audio_config={**sound, **layers},
        audio_token_index=WORDS,
    )
    words = tokenizer(special=("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"))
    Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=8), words).save_pretrained(path)
    return path
