"""Samples of one expert's task -> model inputs, in micro-batches without padding.

From:  .jsonl / .txt texts, .npz or a folder of images, or ready-made inputs in .safetensors.
To:    the work directory (arguments.save_batches), once per expert.

Samples are drawn without replacement by numpy's RandomState(seed), the papers' generator. Samples
of equal shape form one micro-batch, as far as MICRO_BATCH_TOKENS allows; nothing is ever padded,
and ready-made inputs lose the positions that their attention_mask marks as padding.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from esm_stream.errors import InputError

if TYPE_CHECKING:
    from esm_stream.manifest import Calibration

MICRO_BATCH_TOKENS = 1024
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
TEXT_ENDINGS = (".jsonl", ".txt")


@dataclass(frozen=True, slots=True)
class Proxies:
    """Model inputs of one expert, and how they were drawn."""

    batches: list[dict[str, Tensor]]
    samples: list[int]
    available: int
    truncated: int


def kind_of_source(path: Path) -> str:
    """What a calibration path holds: "text", "images", "arrays" or "inputs".

    Raises:
        InputError: The path does not exist, or its ending is none of those.
    """
    if path.is_dir():
        return "images"
    if not path.is_file():
        raise InputError([f"{path}: there is no such calibration file or folder"])
    kinds = {".npz": "arrays", ".safetensors": "inputs", **dict.fromkeys(TEXT_ENDINGS, "text")}
    if path.suffix not in kinds:
        raise InputError(
            [
                f"{path}: calibration data of an unknown kind; expected .jsonl or .txt (texts), "
                ".npz or a folder (images), or .safetensors (ready-made model inputs)"
            ]
        )
    return kinds[path.suffix]


def read_proxies(
    path: Path, settings: "Calibration", model: Path, tokens_per_sample: int
) -> Proxies:
    """Draw samples and turn them into model inputs.

    Args:
        path: Calibration data of one expert.
        settings: Number of samples, seed, length and keys.
        model: Directory whose tokenizer or image processor is used.
        tokens_per_sample: Tokens that the model makes of a sample that is not token ids.

    Raises:
        InputError: The data are missing, empty or damaged, or the processor cannot be loaded.
    """
    kind = kind_of_source(path)
    readers = {"text": _texts, "images": _folder, "arrays": _arrays, "inputs": _ready}
    items = readers[kind](path, settings)
    if not items:
        raise InputError([f"{path}: holds no samples"])
    drawn = draw(len(items), settings.samples, settings.seed)
    chosen = [items[i] for i in drawn]
    truncated = 0
    if kind == "text":
        samples, truncated = _tokenise(chosen, settings, model, path)
    elif kind == "inputs":
        samples = [_without_padding(sample, path) for sample in chosen]
    else:
        samples = _process_images(chosen, model, path)
    return Proxies(micro_batches(samples, tokens_per_sample), drawn, len(items), truncated)


def draw(available: int, wanted: int, seed: int) -> list[int]:
    """Numbers of the samples drawn; all of them, in order, if there are not more than wanted."""
    if available <= wanted:
        return list(range(available))
    chosen = np.random.RandomState(seed).choice(available, wanted, replace=False)
    return [int(i) for i in chosen]


def micro_batches(
    samples: Sequence[dict[str, Tensor]], tokens_per_sample: int
) -> list[dict[str, Tensor]]:
    """Stack samples of equal shapes, at most MICRO_BATCH_TOKENS tokens at a time."""

    def signature(sample: dict[str, Tensor]) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return tuple((name, tuple(value.shape)) for name, value in sorted(sample.items()))

    batches = []
    for _, group in groupby(sorted(samples, key=signature), key=signature):
        alike = list(group)
        ids = alike[0].get("input_ids")
        tokens = tokens_per_sample if ids is None else ids.numel()
        size = max(1, MICRO_BATCH_TOKENS // max(1, tokens))
        for start in range(0, len(alike), size):
            part = alike[start : start + size]
            batches.append({name: torch.stack([s[name] for s in part]) for name in part[0]})
    return batches


def _texts(path: Path, settings: "Calibration") -> list[Any]:
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".txt":
        return [line for line in lines if line.strip()]
    problems, texts = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            problems.append(f"{path}:{number}: not JSON: {error}")
            continue
        text = record.get(settings.text_key) if isinstance(record, dict) else None
        if isinstance(text, str) and text:
            texts.append(text)
        else:
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            problems.append(
                f"{path}:{number}: no text under '{settings.text_key}' (found: {keys}); set "
                "[calibration] text_key"
            )
    if problems:
        raise InputError(problems[:20])
    return texts


def _tokenise(
    texts: Sequence[str], settings: "Calibration", model: Path, path: Path
) -> tuple[list[dict[str, Tensor]], int]:
    """Token ids of each text, cut to max_length; also how many were cut."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            [
                f"{model}: no tokenizer can be loaded for the texts of {path.name}: "
                f"{str(error).strip().splitlines()[0]}"
            ]
        ) from error
    whole = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    cut = [
        tokenizer(text, truncation=True, max_length=settings.max_length)["input_ids"]
        for text in texts
    ]
    empty = [number for number, ids in enumerate(cut) if not ids]
    if empty:
        raise InputError([f"{path}: {len(empty)} of the texts drawn have no tokens at all"])
    truncated = sum(len(a) > len(b) for a, b in zip(whole, cut, strict=True))
    return [{"input_ids": torch.tensor(ids)} for ids in cut], truncated


def _folder(path: Path, settings: "Calibration") -> list[Any]:  # noqa: ARG001 - one signature
    return sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS)


def _arrays(path: Path, settings: "Calibration") -> list[Any]:
    try:
        with np.load(path, allow_pickle=False) as data:
            names = list(data)
            key = names[0] if len(names) == 1 else settings.image_key
            if key not in names:
                raise InputError(
                    [
                        f"{path}: no array '{key}' (found: {', '.join(names)}); set "
                        "[calibration] image_key"
                    ]
                )
            images = data[key]
    except (OSError, ValueError) as error:
        raise InputError([f"{path}: not a readable .npz file: {error}"]) from error
    if images.ndim not in (3, 4):
        raise InputError(
            [f"{path}: array '{key}' has shape {images.shape}; expected (n, h, w) or (n, h, w, c)"]
        )
    return list(images)


def _process_images(items: Iterable[Any], model: Path, path: Path) -> list[dict[str, Tensor]]:
    """Pixels of each image as the model's own processor makes them."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(
            model, trust_remote_code=False, local_files_only=True, backend="pil"
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            [
                f"{model}: no image processor can be loaded for {path}: "
                f"{str(error).strip().splitlines()[0]}"
            ]
        ) from error
    config = json.loads((model / "config.json").read_bytes())
    mode = "L" if config.get("num_channels") == 1 else "RGB"
    samples = []
    for item in items:
        try:
            pixels = processor(_as_image(item, mode), return_tensors="pt")["pixel_values"]
        except (ValueError, TypeError) as error:
            name = item if isinstance(item, Path) else path
            raise InputError(
                [f"{name}: the image processor of {model} refuses an image: {error}"]
            ) from error
        samples.append({"pixel_values": pixels[0]})
    return samples


def _as_image(item: Any, mode: str) -> Any:  # noqa: ANN401 - an array or a file, to a PIL image
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise InputError(
            ['images need Pillow; install it with: pip install "esm-stream[images]"']
        ) from error
    try:
        image = Image.open(item) if isinstance(item, Path) else Image.fromarray(item)
        return image.convert(mode)
    except (OSError, UnidentifiedImageError) as error:
        raise InputError([f"{item}: not a readable image: {error}"]) from error


def _ready(path: Path, settings: "Calibration") -> list[Any]:  # noqa: ARG001 - one signature
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError([f"{path}: not a readable safetensors file: {error}"]) from error
    counts = {name: value.shape[0] if value.ndim else 0 for name, value in tensors.items()}
    if not counts or len(set(counts.values())) > 1:
        raise InputError(
            [
                f"{path}: the first dimension of every tensor must be the samples; found "
                f"{counts or 'no tensors'}"
            ]
        )
    return [
        {name: value[i] for name, value in tensors.items()}
        for i in range(next(iter(counts.values())))
    ]


def _without_padding(sample: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Drop the positions that the sample's attention_mask marks as padding, and the mask."""
    if "attention_mask" not in sample or sample["attention_mask"].ndim != 1:
        return sample
    keep = sample["attention_mask"].bool()
    if not keep.any():
        raise InputError([f"{path}: a sample's attention_mask masks all of its tokens"])
    return {
        name: value[keep] if value.shape[:1] == keep.shape else value
        for name, value in sample.items()
        if name != "attention_mask"
    }
