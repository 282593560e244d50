"""Every kind of calibration data becomes the inputs that its model takes; mistakes are named."""

import json
import wave
from pathlib import Path
from typing import Any

import hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from esm_stream.calibration.proxies import (
    Planned,
    Proxies,
    example_inputs,
    most_tokens,
    no_generic_texts,
    read_proxies,
    routes_of,
)
from esm_stream.calibration.sources import first_records, kind_of_source, open_source
from esm_stream.errors import InputError
from esm_stream.manifest import Calibration

LINES = [f"w{n} w{n + 1} w{n + 2}" for n in range(3, 9)]


def lines(path: Path, *records: Any) -> Path:  # noqa: ANN401
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def read(path: Path, model: Path, **settings: Any) -> Proxies:  # noqa: ANN401
    return read_proxies(path, Calibration(min_samples=1, **settings), model, 17)


def ids(path: Path, model: Path, **settings: Any) -> list[list[int]]:  # noqa: ANN401
    """Token ids of all samples; they are drawn in order, and batches are sorted by length."""
    found = read(path, model, **settings)
    return [row.tolist() for batch in found.batches for row in batch["input_ids"]]


def refused(path: Path, model: Path, **settings: Any) -> str:  # noqa: ANN401
    with pytest.raises(InputError) as error:
        read(path, model, **settings)
    return str(error.value)


def picture(path: Path, height: int = 20, width: int = 24, seed: int = 0) -> Path:
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def sound(
    path: Path, seconds: float = 0.5, rate: int = 16_000, width: int = 2, channels: int = 1
) -> Path:
    """A sine of 440 Hz at half of the full scale, the same in every channel."""
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)
    values = np.round(tone * (2 ** (8 * width - 1) - 1)).astype("<i4")
    raw = values.view(np.uint8).reshape(-1, 4)[:, :width]
    if width == 1:
        raw = raw ^ 0x80
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.repeat(raw, channels, axis=0).tobytes())
    return path


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    model = hub.llama(tmp_path / "model")
    hub.tokenizer().save_pretrained(model)
    return model


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    model = hub.llama(tmp_path / "chat")
    hub.tokenizer(template=hub.TEMPLATE).save_pretrained(model)
    return model


# Texts ---------------------------------------------------------------------------------------


def test_lines_of_a_text_file_are_samples(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\ufeffw3 w4\r\n\n  \nw5 w6 w7\n", encoding="utf-8")
    assert ids(path, llama) == [[3, 4], [5, 6, 7]]


def test_line_separators_inside_a_json_text_do_not_end_the_line(
    llama: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w3\u2028w4"}\n', encoding="utf-8")
    assert ids(path, llama) == [[3, 4]]


def test_a_prompt_and_its_response_are_one_text_that_ends(llama: Path, tmp_path: Path) -> None:
    pair = {"prompt": "w3 w4", "response": " w5"}
    assert ids(lines(tmp_path / "a.jsonl", pair), llama) == [[3, 4, 5, 2]]
    other = lines(tmp_path / "b.jsonl", {"q": "w3 w4", "a": " w5"})
    keys = {"prompt_key": "q", "response_key": "a"}
    assert ids(other, llama, **keys) == [[3, 4, 5, 2]]
    alone = lines(tmp_path / "c.jsonl", {"prompt": "w3 w4"})
    assert ids(alone, llama) == [[3, 4]]
    found = read(lines(tmp_path / "d.jsonl", pair), llama, max_length=2)
    assert found.batches[0]["input_ids"].tolist() == [[3, 4]]
    assert (found.tokens, found.truncated) == ([2], [0])


def test_messages_go_through_the_chat_template(chat: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]
    path = lines(tmp_path / "a.jsonl", {"messages": turns})
    assert ids(path, chat) == [[10, 3, 11, 4]]
    renamed = lines(tmp_path / "b.jsonl", {"conversation": turns})
    assert ids(renamed, chat, messages_key="conversation") == [[10, 3, 11, 4]]
    split = lines(tmp_path / "c.jsonl", {"prompt": turns[:1], "response": turns[1:]})
    assert ids(split, chat) == [[10, 3, 11, 4]]
    assert ids(path, chat, max_length=3) == [[10, 3, 11]]


def test_messages_need_a_template_that_takes_them(llama: Path, chat: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "w3"}]})
    assert "a.jsonl:1: messages need a chat template" in refused(path, llama)
    lines(path, {"messages": [{"role": "system", "content": "w3"}]})
    assert "a.jsonl:1: the chat template refuses" in refused(path, chat)
    assert "only users and assistants" in refused(path, chat)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "one or more messages"),
        ("hello", "one or more messages"),
        (["hello"], "role and content"),
        ([{"role": "user"}], "role and content"),
        ([{"role": "user", "content": 3}], "neither a text nor a list of parts"),
        ([{"role": "user", "content": ["a"]}], "neither a text nor a list of parts"),
    ],
)
def test_messages_of_another_form_are_refused(
    messages: object, says: str, chat: Path, tmp_path: Path
) -> None:
    assert says in refused(lines(tmp_path / "a.jsonl", {"messages": messages}), chat)


@pytest.mark.parametrize(
    "record", [{"text": ""}, {"text": " "}, {"text": 3}, {"response": "w3"}, {}, {"body": "w3"}]
)
def test_lines_without_a_text_are_refused_by_number(
    record: dict[str, object], llama: Path, tmp_path: Path
) -> None:
    path = lines(tmp_path / "a.jsonl", {"text": "w3"}, record)
    assert "a.jsonl:2: no text under 'text'" in refused(path, llama)


def test_no_more_mistakes_are_told_than_can_be_read(llama: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *[{"text": ""}] * 50)
    assert len(refused(path, llama).splitlines()) == 20


def test_a_line_that_is_not_text_is_refused(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"w3\n\xff\xfe\n")
    assert "a.txt:2: not UTF-8" in refused(path, llama)


def test_texts_that_give_no_tokens_are_refused(tmp_path: Path) -> None:
    from tokenizers import normalizers

    model = hub.llama(tmp_path / "model")
    tokenizer = hub.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("#", "")
    tokenizer.save_pretrained(model)
    path = lines(tmp_path / "a.jsonl", {"text": "w3"}, {"text": "##"})
    assert "a.jsonl:2: the text has no tokens at all" in refused(path, model)


def test_texts_are_cut_at_the_limit_of_the_tokenizer_too(tmp_path: Path) -> None:
    model = hub.llama(tmp_path / "model")
    hub.tokenizer(model_max_length=2).save_pretrained(model)
    path = lines(tmp_path / "a.jsonl", {"text": "w3 w4"}, {"text": "w5 w6 w7"})
    found = read(path, model)
    assert (found.tokens, found.truncated) == ([2, 2], [1])


def test_texts_are_cut_at_the_positions_of_the_model_too(tmp_path: Path) -> None:
    model = hub.config(
        tmp_path / "model",
        "GPT2Config",
        "GPT2Model",
        **{"vocab_size": hub.WORDS, "n_positions": 3, "n_embd": 16, "n_layer": 1, "n_head": 2},
    )
    hub.tokenizer().save_pretrained(model)
    path = lines(tmp_path / "a.jsonl", {"text": "w3 w4 w5 w6"})
    assert ids(path, model) == [[3, 4, 5]]


def test_token_ids_beyond_the_embedding_are_refused(tmp_path: Path) -> None:
    model = hub.config(
        tmp_path / "model", "LlamaConfig", "LlamaForCausalLM", vocab_size=20, **hub.HEADS
    )
    hub.tokenizer().save_pretrained(model)
    path = lines(tmp_path / "a.jsonl", {"text": "w3 w20"})
    message = refused(path, model)
    assert "a.jsonl:1: has token id 20" in message
    assert "20 rows" in message


def test_too_few_samples_are_refused_with_both_numbers(llama: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *[{"text": "w3"}] * 3)
    with pytest.raises(InputError, match="holds 3 samples, expected 4 or more"):
        read_proxies(path, Calibration(), llama, 1)
    assert len(read_proxies(path, Calibration(samples=3), llama, 1).samples) == 3
    with pytest.raises(InputError, match="holds 3 samples, expected 20 or more"):
        read_proxies(path, Calibration(min_samples=20), llama, 1)


# Encoder and decoder ---------------------------------------------------------------------------


def test_the_decoder_gets_the_response_moved_by_the_models_own_shift(tmp_path: Path) -> None:
    model = hub.t5(tmp_path / "t5")
    path = lines(
        tmp_path / "a.jsonl",
        {"prompt": "w3 w4 w5", "response": "w6 w7"},
        {"text": "w8 w9"},
    )
    with_response, without = sorted(
        read(path, model).batches, key=lambda b: -b["input_ids"].numel()
    )
    assert with_response["input_ids"].tolist() == [[3, 4, 5]]
    assert with_response["decoder_input_ids"].tolist() == [[1, 6]]
    assert without["input_ids"].tolist() == [[8, 9]]
    assert without["decoder_input_ids"].tolist() == [[1]]


def test_a_shift_that_is_not_the_usual_one_is_the_models(tmp_path: Path) -> None:
    """mBART moves the last token, its language, to the front."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    model = hub.config(
        tmp_path / "mbart",
        "MBartConfig",
        "MBartForConditionalGeneration",
        **{"vocab_size": hub.WORDS, "pad_token_id": 1, **sizes, **heads},
    )
    hub.tokenizer().save_pretrained(model)
    path = lines(tmp_path / "a.jsonl", {"prompt": "w3", "response": "w6 w7 w8"})
    assert read(path, model).batches[0]["decoder_input_ids"].tolist() == [[8, 6, 7]]


def test_an_encoder_decoder_without_a_start_token_is_refused(tmp_path: Path) -> None:
    model = hub.t5(tmp_path / "t5")
    path = model / "config.json"
    config = json.loads(path.read_text())
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        config[name] = None
    path.write_text(json.dumps(config))
    samples = lines(tmp_path / "a.jsonl", {"text": "w8 w9"})
    assert "decoder_start_token_id" in refused(samples, model)


# Images ----------------------------------------------------------------------------------------


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    from transformers import ViTImageProcessor

    model = hub.config(tmp_path / "vit", "ViTConfig", "ViTModel", **hub.HEADS, image_size=16)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(model)
    return model


def test_images_of_odd_sizes_in_folders_and_formats(vit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    picture(folder / "a.png", 31, 7)
    picture(folder / "deeper" / "b.JPG", 9, 40)
    Image.fromarray(np.zeros((5, 6), np.uint8)).save(folder / "grey.gif")
    found = read(folder, vit)
    assert (found.kind, found.available, found.tokens) == ("images", 3, [0, 0, 0])
    assert [tuple(b["pixel_values"].shape) for b in found.batches] == [(3, 3, 16, 16)]


@pytest.mark.parametrize("channels", [(), (1,), (3,), (4,)])
def test_arrays_of_images(channels: tuple[int, ...], vit: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 9, 8, *channels), np.uint8))
    found = read(tmp_path / "a.npz", vit)
    assert [tuple(b["pixel_values"].shape) for b in found.batches] == [(4, 3, 16, 16)]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_read_image_by_image(save: Any, order: Any, tmp_path: Path) -> None:  # noqa: ANN401
    images = np.random.RandomState(0).randint(0, 256, (5, 7, 6, 3)).astype(np.uint8)
    save(tmp_path / "a.npz", other=np.zeros(3), images=np.asarray(images, order=order))
    source = open_source(tmp_path / "a.npz", Calibration())
    assert source.count == 5
    for i in (4, 0, 2):
        assert np.array_equal(source.read(i).images[0], images[i])


def test_an_array_that_is_damaged_is_named(vit: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, images=np.zeros((5, 20, 20, 3), np.uint8))
    content = bytearray(path.read_bytes())
    content[3000] ^= 0xFF
    path.write_bytes(content)
    assert "cannot be read: Bad CRC-32" in refused(path, vit)


@pytest.mark.parametrize(
    "array", [np.zeros((2, 3, 8, 8), np.uint8), np.zeros((2, 8, 8, 3)), np.zeros((2, 8), np.uint8)]
)
def test_arrays_of_another_form_are_refused(array: Any, vit: Path, tmp_path: Path) -> None:  # noqa: ANN401
    np.savez(tmp_path / "a.npz", x=array)
    assert "expected uint8 of shape (n, h, w)" in refused(tmp_path / "a.npz", vit)


def test_a_file_that_is_no_image_is_named(vit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no")
    assert "a.png: not a readable image" in refused(folder, vit)


def test_a_folder_of_images_and_sounds_is_refused(vit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    picture(folder / "a.png")
    sound(folder / "b.wav")
    assert "holds images (a.png) and sounds (b.wav)" in refused(folder, vit)


# Sounds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_width_of_wav_gives_the_same_tone(width: int, channels: int, tmp_path: Path) -> None:
    from esm_stream.calibration.sounds import read_sound

    path = sound(tmp_path / "a.wav", width=width, channels=channels)
    found, cut = read_sound(path, 16_000, 30)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16_000)
    assert found.dtype == np.float32
    assert not cut
    assert np.abs(found - expected).max() < 2.0 ** (2 - 8 * min(width, 3))


def test_sounds_are_resampled_to_the_rate_of_the_model(tmp_path: Path) -> None:
    from esm_stream.calibration.sounds import read_sound

    found, _ = read_sound(sound(tmp_path / "a.wav", rate=44_100), 16_000, 30)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16_000)
    assert found.shape == (8000,)
    assert np.abs(found - expected)[200:-200].max() < 0.01


def test_another_rate_without_scipy_is_refused_with_both_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from esm_stream.calibration.sounds import read_sound

    monkeypatch.setitem(__import__("sys").modules, "scipy.signal", None)
    with pytest.raises(InputError, match=r"44100 samples per second.* wants 16000"):
        read_sound(sound(tmp_path / "a.wav", rate=44_100), 16_000, 30)


def test_other_formats_are_read_by_soundfile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from esm_stream.calibration.sounds import read_sound

    soundfile = pytest.importorskip("soundfile")
    tone = np.full((8000, 2), 0.25, np.float32)
    soundfile.write(tmp_path / "a.flac", tone, 16_000)
    soundfile.write(tmp_path / "b.wav", tone, 16_000, subtype="FLOAT")
    for name in ("a.flac", "b.wav"):
        found, _ = read_sound(tmp_path / name, 16_000, 30)
        assert np.abs(found - 0.25).max() < 1e-4
    (tmp_path / "c.wav").write_bytes(b"no sound")
    with pytest.raises(InputError, match=r"c\.wav: not a readable sound"):
        read_sound(tmp_path / "c.wav", 16_000, 30)
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(InputError, match="need soundfile"):
        read_sound(tmp_path / "a.flac", 16_000, 30)


def test_sounds_of_their_own_lengths_stay_unpadded(tmp_path: Path) -> None:
    model = hub.wav2vec2(tmp_path / "model")
    folder = tmp_path / "sounds"
    folder.mkdir()
    for number, seconds in enumerate((0.5, 0.25, 0.5, 2.0)):
        sound(folder / f"{number}.wav", seconds)
    found = read(folder, model, max_seconds=1.0)
    shapes = sorted(tuple(b["input_values"].shape) for b in found.batches)
    assert shapes == [(1, 4000), (1, 16_000), (2, 8000)]
    assert found.truncated == [3]
    assert all(set(b) == {"input_values"} for b in found.batches)


def test_a_sound_too_short_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "sounds"
    folder.mkdir()
    sound(folder / "a.wav", 0.01)
    assert "0.010 seconds of sound" in refused(folder, hub.wav2vec2(tmp_path / "model"))


def test_a_transcript_is_what_the_decoder_continues(tmp_path: Path) -> None:
    model = hub.whisper(tmp_path / "model")
    sound(tmp_path / "a.wav")
    path = lines(tmp_path / "a.jsonl", {"audio": "a.wav", "text": "w3 w4"}, {"audio": "a.wav"})
    for batch in read(path, model).batches:
        assert batch["input_features"].shape == (1, 8, 3000)
        assert batch["decoder_input_ids"].tolist() in ([[5, 3]], [[5]])


# Pairs -----------------------------------------------------------------------------------------


def test_pairs_of_image_and_text_for_a_model_of_two_towers(tmp_path: Path) -> None:
    model = hub.clip(tmp_path / "clip")
    picture(tmp_path / "a.png", 33, 47)
    path = lines(
        tmp_path / "a.jsonl",
        {"image": "a.png", "text": "w3 w4"},
        {"image": "a.png", "text": " ".join(["w5"] * 9)},
    )
    found = read(path, model)
    assert found.truncated == [1]
    shapes = [{k: tuple(v.shape) for k, v in b.items()} for b in found.batches]
    assert shapes == [
        {"input_ids": (1, 2), "pixel_values": (1, 3, 16, 16)},
        {"input_ids": (1, 7), "pixel_values": (1, 3, 16, 16)},
    ]


def test_the_place_of_an_image_in_a_text(tmp_path: Path) -> None:
    """A 16 x 16 image of 4 x 4 patches: sixteen tokens, where the text says or before it."""
    picture(tmp_path / "a.png")
    image, places = {"image": "a.png"}, [hub.WORDS] * 16
    model = hub.llava(tmp_path / "plain")
    placed = lines(tmp_path / "a.jsonl", {**image, "text": "w3 <image> w4"})
    assert ids(placed, model) == [[3, *places, 4]]
    unplaced = lines(tmp_path / "b.jsonl", {**image, "text": "w3"})
    assert ids(unplaced, model) == [[*places, 3]]
    pair = lines(tmp_path / "c.jsonl", {**image, "prompt": "w3", "response": " w4"})
    assert ids(pair, model) == [[*places, 3, 4, 2]]
    chat = hub.llava(tmp_path / "chat", hub.TEMPLATE)
    assert ids(unplaced, chat) == [[10, *places, 3]]
    assert ids(pair, chat) == [[10, *places, 3, 11, 4]]


def test_messages_with_images(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    places = [hub.WORDS] * 16
    model = hub.llava(tmp_path / "chat", hub.TEMPLATE)
    parts = [{"type": "text", "text": "w3 "}, {"type": "image"}]
    answer = {"role": "assistant", "content": "w4"}
    turns = [{"role": "user", "content": parts}, answer]
    named = [{"type": "text", "text": "w3 "}, {"type": "image", "path": "a.png"}]
    path = lines(
        tmp_path / "a.jsonl",
        {"messages": turns, "image": "a.png"},
        {"messages": [{"role": "user", "content": named}, answer]},
    )
    assert ids(path, model) == [[10, 3, *places, 11, 4]] * 2
    plain = [{"role": "user", "content": "w3"}, answer]
    path = lines(tmp_path / "b.jsonl", {"messages": plain, "image": ["a.png"]})
    assert ids(path, model) == [[10, *places, 3, 11, 4]]


def test_two_images_of_one_sample_are_a_micro_batch_of_their_own(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    model = hub.llava(tmp_path / "llava")
    two = {"image": ["a.png", "a.png"], "text": "w3"}
    one = {"image": "a.png", "text": "w3"}
    found = read(lines(tmp_path / "a.jsonl", two, one, two, one), model)
    shapes = [tuple(b["pixel_values"].shape[:1]) + b["input_ids"].shape for b in found.batches]
    assert sorted(shapes) == [(2, 1, 33), (2, 1, 33), (2, 2, 17)]


def test_pairs_are_never_cut_but_refused_with_numbers(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    path = lines(tmp_path / "a.jsonl", {"image": "a.png", "text": "w3"})
    message = refused(path, hub.llava(tmp_path / "llava"), max_length=12)
    assert "a.jsonl:1: has 17 tokens" in message
    assert "max_length is 12" in message
    assert "raise max_length to 17" in message


def test_a_sound_with_a_text(tmp_path: Path) -> None:
    """Half a second is 50 frames of the features, 12 tokens, between a begin and an end."""
    sound(tmp_path / "a.wav")
    model = hub.qwen2_audio(tmp_path / "model")
    path = lines(tmp_path / "a.jsonl", {"audio": "a.wav", "text": "<|AUDIO|> w3"})
    found = read(path, model)
    batch = found.batches[0]
    assert batch["input_ids"].tolist() == [[*[hub.WORDS] * 12, 3]]
    assert batch["input_features"].shape == (1, 8, 3000)
    # It masks something: the padding that the feature extractor itself needs.
    assert int(batch["feature_attention_mask"].sum()) == 50
    assert "takes 'input_ids'" in refused(lines(path, {"audio": "a.wav"}), model)


def test_a_file_that_a_line_names_must_be_there(tmp_path: Path) -> None:
    model = hub.llava(tmp_path / "llava")
    for value in ("none.png", 3, "https://example.org/a.png"):
        path = lines(tmp_path / "a.jsonl", {"image": value, "text": "w3"})
        assert f"a.jsonl:1: {value!r} is no file" in refused(path, model)
    sound(tmp_path / "a.wav")
    path = lines(tmp_path / "b.jsonl", {"audio": ["a.wav", "a.wav"], "text": "w3"})
    assert "has 2 sounds" in refused(path, model)


def test_data_of_the_wrong_kind_are_told_what_the_model_takes(
    llama: Path, vit: Path, tmp_path: Path
) -> None:
    picture(tmp_path / "a.png")
    path = lines(tmp_path / "a.jsonl", {"image": "a.png"})
    model = hub.llava(tmp_path / "llava")
    assert "LlavaForConditionalGeneration takes 'input_ids'" in refused(path, model)
    assert "no image processor can be loaded" in refused(path, llama)
    hub.tokenizer().save_pretrained(vit)
    texts = lines(tmp_path / "b.jsonl", {"text": "w3"})
    assert "'input_ids' is no argument of the forward of ViTModel" in refused(texts, vit)


# Ready-made inputs -----------------------------------------------------------------------------


def test_ready_made_samples_of_their_own_shapes(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {f"{n}/input_ids": torch.full((1, 3 + n % 2), n + 3) for n in (0, 1, 2, 10)}
    save_file(tensors, path)
    found = read(path, llama)
    assert found.available == 4
    assert found.tokens == [3, 4, 3, 3]  # by number, not by name
    rows = sorted(tuple(row.tolist()) for b in found.batches for row in b["input_ids"])
    assert rows == [(3, 3, 3), (4, 4, 4, 4), (5, 5, 5), (13, 13, 13)]
    assert most_tokens(path, Calibration()) == 4


def test_ready_made_patches_of_all_images_stay_together(tmp_path: Path) -> None:
    """As Qwen2-VL takes them: patches of every image in one long row."""
    model = hub.config(tmp_path / "qwen", "Qwen2VLConfig", "Qwen2VLForConditionalGeneration")
    path = tmp_path / "a.safetensors"
    one = {
        "input_ids": torch.arange(6)[None],
        "pixel_values": torch.zeros(16, 24),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    save_file({f"{n}/{k}": v.clone() for n in range(2) for k, v in one.items()}, path)
    found = read(path, model)
    assert len(found.batches) == 2
    for batch in found.batches:
        assert {k: tuple(v.shape) for k, v in batch.items()} == {
            "input_ids": (1, 6),
            "pixel_values": (16, 24),
            "image_grid_thw": (1, 3),
        }


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"0/input_ids": torch.zeros(1, 3).long(), "mask": torch.zeros(1, 3)}, "'mask' has no num"),
        ({"0/input_ids": torch.zeros(3).long()}, "expected (1, tokens)"),
        ({"ids": torch.zeros(2, 3).long()}, "'ids' is no argument of the forward of Llama"),
        ({"attention_mask": torch.ones(2, 3)}, "takes 'input_ids', and the sample gives"),
        ({"input_ids": torch.full((2, 3), 60)}, "has token id 60"),
    ],
)
def test_ready_made_inputs_are_held_against_the_model(
    tensors: dict[str, torch.Tensor], says: str, llama: Path, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    assert says in refused(tmp_path / "a.safetensors", llama)


# Plans -----------------------------------------------------------------------------------------


def test_a_plan_needs_no_tokenizer_for_plain_texts(tmp_path: Path) -> None:
    model = hub.llama(tmp_path / "model")
    path = lines(tmp_path / "a.jsonl", {"text": "w3"})
    assert example_inputs(path, Calibration(), model, 8) is None
    assert most_tokens(path, Calibration(max_length=77)) == 77


def test_a_plan_sees_the_first_sample_of_other_kinds(llama: Path, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    path = lines(tmp_path / "a.jsonl", {"image": "a.png", "text": "w3"})
    found = example_inputs(path, Calibration(), hub.llava(tmp_path / "llava"), 8)
    assert found is not None
    assert {k: tuple(v.shape) for k, v in found.items()} == {
        "input_ids": (1, 17),
        "pixel_values": (1, 3, 16, 16),
    }
    ready = tmp_path / "a.safetensors"
    save_file({"input_ids": torch.zeros(4, 30).long()}, ready)
    cut = example_inputs(ready, Calibration(), llama, 8)
    assert cut is not None
    assert cut["input_ids"].shape == (1, 8)


def test_a_plan_reads_the_lines_that_can_be_used(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "w3"}\nnot json\n{"text": "w4"}\n')
    assert [record.text for record in first_records(path, Calibration())] == ["w3", "w4"]


def test_a_plan_is_made_with_the_most_telling_sample(llama: Path, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    pair = {"image": "a.png", "text": "w3"}
    path = lines(tmp_path / "a.jsonl", {"text": "w3"}, pair)
    found = example_inputs(path, Calibration(), hub.llava(tmp_path / "llava"), 8)
    assert found is not None
    assert set(found) == {"input_ids", "pixel_values"}
    assert routes_of(path, Calibration()) == {"text", "image"}
    ready = tmp_path / "a.safetensors"
    first = {"0/input_ids": torch.zeros(1, 3).long()}
    second = {"1/input_ids": torch.ones(1, 3).long(), "1/inputs_embeds": torch.zeros(1, 3, 16)}
    save_file(first, ready)
    assert routes_of(ready, Calibration()) == {"text"}
    save_file(first | second, ready)
    assert routes_of(ready, Calibration()) == {"text", "inputs_embeds"}
    found = example_inputs(ready, Calibration(), llama, 8)
    assert found is not None
    assert set(found) == {"input_ids", "inputs_embeds"}


def test_samples_that_the_plan_does_not_know_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    model = hub.llava(tmp_path / "llava")
    pair, plain = {"image": "a.png", "text": "w3"}, {"text": "w3"}
    both = lines(tmp_path / "a.jsonl", pair, plain, pair)
    settings = Calibration(min_samples=1)
    media = frozenset({"pixel_values"})
    strict, free = Planned(media, may_differ=False), Planned(media, may_differ=True)
    with pytest.raises(InputError, match=r"sample 1: gives a text alone; the forward is planned"):
        read_proxies(both, settings, model, 1, planned=strict)
    assert len(read_proxies(both, settings, model, 1, planned=free).samples) == 3
    with pytest.raises(InputError, match="none of the samples drawn gives pixel_values"):
        read_proxies(lines(tmp_path / "b.jsonl", plain), settings, model, 1, planned=free)


def test_generic_texts_are_for_models_of_texts_alone(
    llama: Path, vit: Path, tmp_path: Path
) -> None:
    assert no_generic_texts(llama) is None
    assert no_generic_texts(hub.t5(tmp_path / "t5")) is None
    assert no_generic_texts(vit) == "ViTModel takes pixel_values"
    assert "pixel_values" in str(no_generic_texts(hub.llava(tmp_path / "llava")))
    assert "input_features" in str(no_generic_texts(hub.whisper(tmp_path / "whisper")))


def test_generic_texts_are_many_and_short() -> None:
    from esm_stream.calibration.sources import GENERIC

    source = open_source(GENERIC, Calibration())
    texts = [source.read(i).text for i in range(source.count)]
    assert kind_of_source(GENERIC) == "text"
    assert len(texts) == len(set(texts)) >= 200
    assert all(40 <= len(text) <= 2000 for text in texts)
    # Several alphabets, not only languages.
    assert set("éßя語ह") <= set("".join(texts))
