"""Samples of one expert's task -> model inputs, in micro-batches without padding.

From:  sources.py and encoding.py (texts, conversations, images, sounds, pairs), ready.py.
To:    the work directory (arguments.save_batches), once per expert.

Samples of equal shapes form one micro-batch, as far as its tokens allow. One whose tensors do not
all begin with its batch dimension of one is a micro-batch by itself: the patches of all images in
one long row, or two images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from esm_stream.calibration.encoding import Encoder, Sample
from esm_stream.calibration.ready import open_ready
from esm_stream.calibration.sources import (
    MOST_PROBLEMS,
    draw,
    first_records,
    kind_of_source,
    open_source,
)
from esm_stream.calibration.steps import MICRO_BATCH_TOKENS
from esm_stream.errors import InputError
from esm_stream.manifest import Calibration


@dataclass(frozen=True, slots=True)
class Planned:
    """Arguments for images and sounds that a plan was made with; whether samples may differ.

    `elements` are those of the example's images and sounds.
    """

    media: frozenset[str]
    may_differ: bool
    elements: int = 0


@dataclass(frozen=True, slots=True)
class Proxies:
    """Model inputs of one expert, and how they were drawn.

    `samples` are the numbers of the samples drawn, from 0, and `truncated` those of them that were
    cut; `tokens` has the token ids of each, in the same order (0 for pictures and sounds), `sizes`
    about as many positions as the model makes of each.
    """

    batches: list[dict[str, Tensor]]
    kind: str
    samples: list[int]
    available: int
    tokens: list[int]
    sizes: list[int]
    truncated: list[int]


def read_proxies(
    path: Path,
    settings: Calibration,
    model: Path,
    tokens_per_sample: int,
    micro_batch_tokens: int = MICRO_BATCH_TOKENS,
    planned: Planned | None = None,
) -> Proxies:
    """Draw samples and turn them into model inputs.

    Args:
        path: Calibration data of one expert.
        settings: Number of samples, seed, length and keys.
        model: Directory whose tokenizer and processors are used.
        tokens_per_sample: Tokens that the model makes of a sample that is not token ids.
        micro_batch_tokens: Most tokens of a micro-batch of several samples.
        planned: What the samples have to give, if the plan depends on it.

    Raises:
        InputError: The data are missing, too few, empty or damaged, or a processor cannot be
            loaded; up to MOST_PROBLEMS mistakes.
    """
    count, read = _samples_of(path, settings, model)
    least = min(settings.min_samples, settings.samples)
    if count < least:
        raise InputError(
            [
                f"{path}: holds {count or 'no'} samples, expected {least} or more; give more, or "
                "lower [calibration] min_samples"
            ]
        )
    drawn = draw(count, settings.samples, settings.seed)
    samples: list[Sample] = []
    problems: list[str] = []
    for number in drawn:
        try:
            samples.append(read(number))
        except InputError as error:
            problems += [p for p in error.problems if p not in problems]
            if len(problems) >= MOST_PROBLEMS:
                break
    if planned is not None and not problems:
        problems = _unplanned(path, drawn, samples, planned)
    if problems:
        raise InputError(problems)
    elements = planned.elements if planned else 0
    tensors = [sample.tensors for sample in samples]
    return Proxies(
        micro_batches(tensors, tokens_per_sample, micro_batch_tokens, elements),
        kind_of_source(path),
        drawn,
        count,
        [sample.tokens for sample in samples],
        [size_of(each, tokens_per_sample, elements) for each in tensors],
        [number for number, s in zip(drawn, samples, strict=True) if s.truncated],
    )


def _unplanned(
    path: Path, drawn: Sequence[int], samples: Sequence[Sample], planned: Planned
) -> list[str]:
    """Samples that take another way through the model than the plan knows."""
    if planned.may_differ:
        missing = sorted(planned.media - {name for sample in samples for name in sample.media})
        if not missing:
            return []
        return [
            f"{path}: none of the samples drawn gives {', '.join(missing)}, which samples of other "
            "experts do; matrices are merged from the inputs that all experts see: give every "
            "expert samples of each kind"
        ]
    wanted = ", ".join(sorted(planned.media)) or "texts alone"
    return [
        f"{path}, sample {number}: gives {', '.join(sorted(sample.media)) or 'a text alone'}; the "
        f"forward is planned for {wanted}. Give samples of one kind, or use --forward resident"
        for number, sample in zip(drawn, samples, strict=True)
        if sample.media != planned.media
    ][:MOST_PROBLEMS]


def example_inputs(
    path: Path, settings: Calibration, model: Path, few_tokens: int | None
) -> dict[str, Tensor] | None:
    """Model inputs to find out with how a forward runs: those of one of the first samples.

    It is the first that has images or sounds, if any has. Few tokens show the same structure as
    many: plain texts need no tokenizer for that (None), and ready-made token ids are cut to
    `few_tokens`. What goes with images or sounds stays whole.

    Raises:
        InputError: See `read_proxies`.
    """
    kind = kind_of_source(path)
    if kind == "text":
        telling = (record for record in first_records(path, settings) if record.route != "text")
        record = next(telling, None)
        return None if record is None else Encoder(model, settings).encode(record).tensors
    count, read = _samples_of(path, settings, model)
    if not count:
        raise InputError([f"{path}: holds no samples"])
    if kind != "inputs":
        return read(0).tensors
    tensors = read(open_ready(path).fullest).tensors
    ids = tensors.get("input_ids")
    if ids is None or any(v.shape[:2] != ids.shape for v in tensors.values()):
        return tensors
    return {name: value[:, :few_tokens] for name, value in tensors.items()}


def routes_of(path: Path, settings: Calibration) -> set[str]:
    """Ways that the first samples of a path take through a model, as far as they can be told."""
    kind = kind_of_source(path)
    if kind == "text":
        return {record.route for record in first_records(path, settings)}
    if kind == "inputs":
        known = {"": "text", "pixel_values": "image"}
        found = {", ".join(sorted(names)) for names in open_ready(path).media}
        return {known.get(names, names) for names in found}
    return {"audio" if kind == "audio" else "image"}


def no_generic_texts(model: Path) -> str | None:
    """Why the texts that come with esm-stream are no data for a model; None if they are."""
    return Encoder(model, Calibration()).needs_more_than_texts()


def most_tokens(path: Path, settings: Calibration) -> int:
    """Most token ids that a sample of a path can have; 0 for pictures and sounds alone."""
    kind = kind_of_source(path)
    if kind == "inputs":
        return open_ready(path).longest
    return settings.max_length if kind == "text" else 0


def _samples_of(
    path: Path, settings: Calibration, model: Path
) -> tuple[int, Callable[[int], Sample]]:
    """How many samples a path holds, and how to get one of them."""
    encoder = cache(lambda: Encoder(model, settings))
    if kind_of_source(path) != "inputs":
        source = open_source(path, settings)
        return source.count, lambda i: encoder().encode(source.read(i))
    ready = open_ready(path)

    def read(i: int) -> Sample:
        sample = ready.read(i)
        encoder().check(sample.tensors, f"{path}, sample {i}")
        return sample

    return ready.count, read


def micro_batches(
    samples: Sequence[dict[str, Tensor]],
    tokens_per_sample: int,
    micro_batch_tokens: int = MICRO_BATCH_TOKENS,
    elements: int = 0,
) -> list[dict[str, Tensor]]:
    """Join samples of equal shapes, at most `micro_batch_tokens` tokens at a time.

    Args:
        samples: Inputs by argument of the forward, each with a batch dimension of one.
        tokens_per_sample: Tokens of the example that the plan was made with.
        micro_batch_tokens: A single sample may have more.
        elements: Of the example's images and sounds.
    """

    def signature(sample: dict[str, Tensor]) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return tuple((name, tuple(value.shape)) for name, value in sorted(sample.items()))

    batches = []
    for _, group in groupby(sorted(samples, key=signature), key=signature):
        alike = list(group)
        tokens = size_of(alike[0], tokens_per_sample, elements)
        joins = all(value.shape[:1] == (1,) for value in alike[0].values())
        size = max(1, micro_batch_tokens // max(1, tokens)) if joins else 1
        for start in range(0, len(alike), size):
            part = alike[start : start + size]
            batches.append({name: torch.cat([s[name] for s in part]) for name in part[0]})
    return batches


def size_of(sample: dict[str, Tensor], tokens_per_sample: int, elements: int) -> int:
    """About as many positions as a model makes of a sample.

    Of images and sounds it makes as many more than of the example's as they are larger.
    """
    media = sum(value.numel() for value in sample.values() if value.is_floating_point())
    ids = sample.get("input_ids")
    if media and elements:
        seen = -(-tokens_per_sample * media // elements)
        return max(seen, 0 if ids is None else ids.numel())
    return tokens_per_sample if ids is None else ids.numel()
