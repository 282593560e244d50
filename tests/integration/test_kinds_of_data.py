"""Every kind of calibration data, from the files of people to a merged model."""

import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub
import numpy as np
import pytest
import torch
import transformers
from conftest import merge_here
from models import save, tuned, write_manifest
from PIL import Image
from transformers import AutoConfig

from esm_stream.calibration.arguments import load_batches
from esm_stream.errors import InputError
from esm_stream.manifest import load_manifest
from esm_stream.planning.make import make_plan

WORDS = [f"w{n}" for n in range(3, hub.WORDS)]


def words(random: np.random.RandomState, most: int = 9) -> str:
    return " ".join(random.choice(WORDS, random.randint(2, most)))


def image(folder: Path, name: str, random: np.random.RandomState) -> str:
    height, width = random.randint(9, 50, 2)
    pixels = random.randint(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / name)
    return name


def sound(folder: Path, name: str, random: np.random.RandomState) -> str:
    with wave.open(str(folder / name), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        size = random.randint(2000, 6000)
        file.writeframes(random.randint(-9999, 9999, size).astype("<i2").tobytes())
    return name


def texts(folder: Path, random: np.random.RandomState, number: int) -> dict[str, Any]:
    del folder, number
    return {"text": words(random)}


def chats(folder: Path, random: np.random.RandomState, number: int) -> dict[str, Any]:
    del folder, number
    turns = [{"role": r, "content": words(random)} for r in ("user", "assistant")]
    return {"messages": turns}


def answers(folder: Path, random: np.random.RandomState, number: int) -> dict[str, Any]:
    del folder, number
    return {"prompt": words(random), "response": " " + words(random)}


def pairs(folder: Path, random: np.random.RandomState, number: int) -> dict[str, Any]:
    return {"image": image(folder, f"{number}.png", random), "text": words(random, 5)}


def several(folder: Path, random: np.random.RandomState, number: int) -> dict[str, Any]:
    """Two images for every other sample."""
    names = [image(folder, f"{number}-{i}.png", random) for i in range(1 + number % 2)]
    return {"image": names, "prompt": words(random), "response": " " + words(random)}


def sounds(folder: Path, random: np.random.RandomState, number: int) -> dict[str, Any]:
    return {"audio": sound(folder, f"{number}.wav", random)}


def transcripts(folder: Path, random: np.random.RandomState, number: int) -> dict[str, Any]:
    return {**sounds(folder, random, number), "text": words(random)}


def mixed(folder: Path, random: np.random.RandomState, number: int) -> dict[str, Any]:
    """Every third sample has an image, the first has none."""
    return (pairs if number % 3 == 1 else texts)(folder, random, number)


def chat_llama(path: Path) -> Path:
    hub.llama(path)
    hub.tokenizer(template=hub.TEMPLATE).save_pretrained(path)
    return path


CASES: dict[str, tuple[Callable[[Path], Path], Callable[..., dict[str, Any]], set[str]]] = {
    "conversations of a Llama": (chat_llama, chats, {"input_ids"}),
    "answers of a Llama": (chat_llama, answers, {"input_ids"}),
    "texts of a T5": (hub.t5, texts, {"input_ids", "decoder_input_ids"}),
    "answers of a T5": (hub.t5, answers, {"input_ids", "decoder_input_ids"}),
    "pairs of a CLIP": (hub.clip, pairs, {"input_ids", "pixel_values"}),
    "pairs of a LLaVA": (hub.llava, pairs, {"input_ids", "pixel_values"}),
    "several images of a LLaVA": (hub.llava, several, {"input_ids", "pixel_values"}),
    "images for some texts of a LLaVA": (hub.llava, mixed, {"input_ids", "pixel_values"}),
    "texts of a LLaVA": (hub.llava, texts, {"input_ids"}),
    "sounds of a wav2vec2": (hub.wav2vec2, sounds, {"input_values"}),
    "transcripts of a Whisper": (hub.whisper, transcripts, {"input_features", "decoder_input_ids"}),
}


def manifest_of(
    tmp_path: Path,
    make: Callable[[Path], Path],
    samples: dict[str, Callable[..., dict[str, Any]]],
    **sections: Any,  # noqa: ANN401
) -> Path:
    """A base, an expert for every entry of `samples` with nine of them, and their manifest."""
    base = make(tmp_path / "base")
    config = AutoConfig.from_pretrained(base)
    torch.manual_seed(0)
    model = getattr(transformers, config.architectures[0])(config).eval()
    save(model, base)
    experts = []
    for number, (name, sample) in enumerate(samples.items()):
        save(tuned(model, number, 0.05), tmp_path / name)
        folder = tmp_path / f"{name}-data"
        folder.mkdir()
        random = np.random.RandomState(number)
        data = folder / "samples.jsonl"
        data.write_text("".join(json.dumps(sample(folder, random, n)) + "\n" for n in range(9)))
        experts.append({"name": name, "model": str(tmp_path / name), "calibration": str(data)})
    document = {
        "base": {"model": str(base)},
        "experts": experts,
        "calibration": {"samples": 6, "max_length": 64},
        "output": {"path": str(tmp_path / "merged")},
        **sections,
    }
    return write_manifest(tmp_path / "m.toml", document)


@pytest.mark.parametrize("case", CASES)
def test_data_of_every_kind_merge(case: str, tmp_path: Path) -> None:
    make, sample, names = CASES[case]
    path = manifest_of(tmp_path, make, {"one": sample, "two": sample})
    plan = make_plan(load_manifest(path))
    merge_here(plan)
    report = json.loads((plan.output / "report.json").read_text())
    for expert in ("one", "two"):
        told = report["calibration"][expert]
        assert len(set(told["samples"])) == 6
        assert told["tokens"] > 0
        batches = load_batches(plan.directory.inputs(expert))
        assert set().union(*batches) == names
        if "input_ids" in names:
            counts = [sum(v.numel() for k, v in b.items() if k.endswith("_ids")) for b in batches]
            assert sum(counts) == sum(told["tokens_per_sample"])
    assert any(matrix.moment for matrix in plan.matrices.values())
    config = AutoConfig.from_pretrained(plan.output)
    merged = getattr(transformers, config.architectures[0]).from_pretrained(plan.output)
    assert all(bool(value.isfinite().all()) for value in merged.state_dict().values())


def test_experts_with_data_of_different_kinds_are_refused(tmp_path: Path) -> None:
    path = manifest_of(tmp_path, hub.llava, {"one": pairs, "two": texts})
    plan = make_plan(load_manifest(path))
    assert plan.forward is not None
    assert plan.forward.mode == "resident"
    with pytest.raises(InputError, match=r'expert "two": .*gives pixel_values'):
        merge_here(plan)
    chained = manifest_of(
        tmp_path / "again", hub.llava, {"one": mixed, "two": mixed}, run={"forward": "replay"}
    )
    with pytest.raises(InputError, match=r"gives a text alone; the forward is planned for pixel"):
        merge_here(make_plan(load_manifest(chained)))
