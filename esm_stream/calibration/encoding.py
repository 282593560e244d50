"""One record -> model inputs, with the tokenizer and processors of a model's own directory.

From:  sources.py (records); config.json and the processor files beside the weights.
To:    proxies.py.

What goes in is what the model's forward takes, by name, with its batch dimension of one. Nothing is
padded. Code from model directories is never run; chat templates run in transformers' sandbox.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from esm_stream.calibration.skeleton import load_config, model_class
from esm_stream.calibration.sounds import read_sound
from esm_stream.calibration.sources import Record
from esm_stream.errors import InputError

if TYPE_CHECKING:
    from esm_stream.manifest import Calibration

Loaded = TypeVar("Loaded")
# What transformers raises for files that are missing, damaged, or need a library that is missing.
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError)
# What processors and chat templates raise for samples that they cannot take.
SAMPLE_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError)
MASKS_OF_ONES = ("attention_mask", "pixel_mask", "pixel_attention_mask")


@dataclass(frozen=True, slots=True)
class Sample:
    """Inputs of one sample by argument of the forward, each with its batch dimension."""

    tensors: dict[str, Tensor]
    truncated: bool = False

    @property
    def tokens(self) -> int:
        """Token ids that it has, of encoder and decoder; 0 for pictures and sounds."""
        names = ("input_ids", "decoder_input_ids")
        return sum(self.tensors[name].numel() for name in names if name in self.tensors)

    @property
    def media(self) -> frozenset[str]:
        """Arguments that are no ids and masks: images and sounds."""
        return frozenset(name for name, v in self.tensors.items() if v.is_floating_point())


class Encoder:
    """Encodes records for one model; loads tokenizer and processors when they are needed."""

    def __init__(self, model: Path, settings: "Calibration") -> None:
        self._model = model
        self._settings = settings
        self._config = load_config(model)
        self._class = model_class(self._config)
        self._takes = dict(inspect.signature(self._class.forward).parameters)
        # Encoder-decoder models are given the start of the text that the decoder is to continue.
        self._decodes = bool(self._config.is_encoder_decoder) and "decoder_input_ids" in self._takes

    def encode(self, record: Record) -> Sample:
        """The model inputs of one record.

        Raises:
            InputError: The sample, the model's processor or a library does not allow it.
        """
        has_text = bool(record.text or record.messages)
        if not (record.images or record.audio):
            sample = self._tokens(record)
        elif has_text and "input_ids" in self._takes:
            sample = self._together(record)
        elif record.images:
            sample = Sample(self._taken(self._pixels(record)))
        else:
            features, cut = self._sound(record)
            sample = Sample(self._taken(features), cut)
        if self._decodes:
            sample.tensors["decoder_input_ids"] = self._decoder_ids(record)
        self.check(sample.tensors, record.place)
        return sample

    def check(self, tensors: Mapping[str, Tensor], place: str) -> None:
        """Hold a sample against the arguments of the forward and the embedding.

        Raises:
            InputError: An argument is unknown, the main one is missing, or an id has no row.
        """
        name, main = self._class.__name__, self._class.main_input_name
        unknown = sorted(set(tensors) - set(self._takes))
        if unknown:
            raise InputError(
                [
                    f"{place}: '{unknown[0]}' is no argument of the forward of {name}; it takes "
                    f"{', '.join(self._inputs_taken())}"
                ]
            )
        main = main if main in self._takes else ""
        if main and not {main, "inputs_embeds", "encoder_outputs"} & set(tensors):
            raise InputError(
                [
                    f"{place}: {name} takes '{main}', and the sample gives "
                    f"{', '.join(sorted(tensors)) or 'nothing'}; see the kinds of calibration data "
                    "in the documentation"
                ]
            )
        # Ids that stand for images may lie beyond the embedding; they never reach it.
        if not any(value.is_floating_point() for value in tensors.values()):
            self._require_rows(tensors, place)

    def needs_more_than_texts(self) -> str | None:
        """Arguments for images or sounds that the forward takes; None for texts alone."""
        endings = ("pixel_values", "_features", "input_values", "_patches")
        found = [name for name in self._takes if name.endswith(endings)]
        if "input_ids" in self._takes and not found:
            return None
        return f"{self._class.__name__} takes {', '.join(found) or self._class.main_input_name}"

    def _inputs_taken(self) -> list[str]:
        """Arguments of the forward that hold data."""
        endings = ("_ids", "_values", "_features", "_mask", "_thw", "_sizes", "_embeds", "bbox")
        return [name for name in self._takes if name.endswith(endings)]

    def _taken(self, found: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tensors that the forward needs: no labels, and no masks that mask nothing."""
        tensors = {}
        for name, value in found.items():
            if name not in self._takes or name == "labels" or not isinstance(value, Tensor):
                continue
            optional = self._takes[name].default is not inspect.Parameter.empty
            if name in MASKS_OF_ONES and optional and bool(value.all()):
                continue
            tensors[name] = value
        return tensors

    # Texts -----------------------------------------------------------------------------------

    @cached_property
    def _tokenizer(self) -> Any:  # noqa: ANN401 - any of transformers' tokenizers
        from transformers import AutoTokenizer

        return self._load("tokenizer", "texts", AutoTokenizer.from_pretrained)

    @property
    def _most_tokens(self) -> int:
        """Tokens kept of a text: as many as asked for, if tokenizer and positions have as many."""
        # Configurations name this differently; what one does not name does not limit it.
        config = self._config.get_text_config()
        names = ("max_position_embeddings", "max_target_positions")
        positions = [getattr(config, name, None) for name in names]
        limits = [n for n in positions if isinstance(n, int) and n > 0]
        return min(self._settings.max_length, int(self._tokenizer.model_max_length), *limits)

    def _tokens(self, record: Record) -> Sample:
        """Token ids of a text, a prompt with its response, or a conversation."""
        most = self._most_tokens
        text = record.text + ("" if self._decodes else record.response)
        if record.messages:
            whole = self._conversation(record)
        else:
            whole = self._ids(text)
            if record.response and not self._decodes:
                whole = self._ended(whole)
        ids = whole[:most]
        if len(whole) > most and not record.messages:
            # The tokenizer knows which end to cut, and what has to stand there.
            ids = self._tokenizer(text, truncation=True, max_length=most)["input_ids"]
        if not ids:
            raise InputError([f"{record.place}: the text has no tokens at all"])
        return Sample({"input_ids": torch.tensor([ids])}, len(whole) > most)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, verbose=False)["input_ids"]
        return ids

    def _ended(self, ids: list[int]) -> list[int]:
        """Token ids of a whole answer: with the token that ends it, as in fine-tuning."""
        end = self._tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def _conversation(self, record: Record) -> list[int]:
        self._require_template(self._tokenizer, record.place)
        try:
            ids: list[int] = self._tokenizer.apply_chat_template(
                list(record.messages), tokenize=True, return_dict=False
            )
        except _template_errors() as error:
            raise InputError(
                [f"{record.place}: the chat template refuses these messages: {_line(error)}"]
            ) from error
        return ids

    def _require_template(self, owner: Any, place: str) -> None:  # noqa: ANN401
        if not owner.chat_template:
            raise InputError(
                [
                    f"{place}: messages need a chat template, and {self._model} has none; copy "
                    "chat_template.jinja from a model tuned for chat, or give plain texts"
                ]
            )

    def _require_rows(self, tensors: Mapping[str, Tensor], place: str) -> None:
        """Every token id must have its row in the embedding.

        Raises:
            InputError: The tokenizer is of another model, or ready-made ids are wrong.
        """
        rows = self._config.get_text_config().to_dict().get("vocab_size")
        ids = tensors.get("input_ids")
        if rows is None or ids is None or ids.is_floating_point() or not ids.numel():
            return
        if int(ids.max()) >= rows or int(ids.min()) < 0:
            raise InputError(
                [
                    f"{place}: has token id {int(ids.max())}, and the embedding of {self._model} "
                    f"has {rows} rows; is the tokenizer the one of this model?"
                ]
            )

    def _decoder_ids(self, record: Record) -> Tensor:
        """What the decoder is given: the response moved by one, or its start token alone."""
        target = record.response
        if not target and "input_ids" not in self._takes:
            target = record.text
        start = self._start_token(record.place)
        if not target:
            return torch.tensor([[start]])
        ids = self._tokenizer(
            text_target=target, truncation=True, max_length=self._most_tokens, verbose=False
        )["input_ids"]
        if not ids:
            return torch.tensor([[start]])
        if not hasattr(self._class, "prepare_decoder_input_ids_from_labels"):
            return torch.tensor([[start, *ids[:-1]]])
        from esm_stream.calibration.skeleton import build_skeleton

        model: Any = build_skeleton(self._model, {}, torch.float32).model
        shifted: Tensor = model.prepare_decoder_input_ids_from_labels(torch.tensor([ids]))
        return shifted

    def _start_token(self, place: str) -> int:
        config = self._config.to_dict()
        inner = config.get("decoder") if isinstance(config.get("decoder"), dict) else {}
        named = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
        found = [part.get(name) for name in named for part in (config, inner or {})]
        start = next((token for token in found if isinstance(token, int)), None)
        if start is None:
            raise InputError(
                [
                    f"{place}: config.json of {self._model} has no decoder_start_token_id; set it, "
                    "or give ready-made inputs with decoder_input_ids"
                ]
            )
        return start

    # Images ----------------------------------------------------------------------------------

    @cached_property
    def _image_processor(self) -> Any:  # noqa: ANN401
        from transformers import AutoImageProcessor

        return self._load(
            "image processor", "images", AutoImageProcessor.from_pretrained, backend="pil"
        )

    def _pixels(self, record: Record) -> Mapping[str, Any]:
        return self._processed(record, self._image_processor, self._images(record))

    def _images(self, record: Record) -> list[Any]:
        """Pictures as PIL has them, in the colours that the model takes."""
        try:
            from PIL import Image, UnidentifiedImageError
        except ImportError as error:
            raise InputError(
                ['images need Pillow; install it with: pip install "esm-stream[images]"']
            ) from error
        config = self._config.to_dict()
        inner = config.get("vision_config") or {}
        grey = 1 in (config.get("num_channels"), inner.get("num_channels"))
        images = []
        for item in record.images:
            try:
                with Image.open(item) if isinstance(item, Path) else Image.fromarray(item) as image:
                    images.append(image.convert("L" if grey else "RGB"))
            except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
                raise InputError([f"{item}: not a readable image: {error}"]) from error
        return images

    # Sounds ----------------------------------------------------------------------------------

    @cached_property
    def _feature_extractor(self) -> Any:  # noqa: ANN401
        from transformers import AutoFeatureExtractor

        return self._load("feature extractor", "sounds", AutoFeatureExtractor.from_pretrained)

    def _sound(self, record: Record) -> tuple[Mapping[str, Any], bool]:
        assert record.audio is not None
        extractor = self._feature_extractor
        rate, most = int(extractor.sampling_rate), self._settings.max_seconds
        samples, cut = read_sound(record.audio, rate, most)
        return self._processed(record, extractor, samples, sampling_rate=rate), cut

    # Pairs -----------------------------------------------------------------------------------

    @cached_property
    def _processor(self) -> Any:  # noqa: ANN401
        from transformers import AutoProcessor

        return self._load("processor", "pairs", AutoProcessor.from_pretrained)

    def _together(self, record: Record) -> Sample:
        """A text with its images or its sound, through the model's one processor for both."""
        given: dict[str, Any] = {}
        cut = False
        if record.images:
            given["images"] = self._images(record)
        if record.audio:
            rate = int(self._feature_extractor.sampling_rate)
            given["audio"], cut = read_sound(record.audio, rate, self._settings.max_seconds)
            given["sampling_rate"] = rate
        placeholder = _placeholder(self._processor)
        most = self._most_tokens
        cuts = {"truncation": True, "max_length": most} if placeholder is None else {}
        problem: InputError | None = None
        for text in self._wordings(record, placeholder):
            begin = self._tokenizer.bos_token
            special = not (begin and text.startswith(begin))
            try:
                options = {"add_special_tokens": special, **cuts}
                found = self._processed(
                    record, self._processor, text=[text], text_kwargs=options, **given
                )
            except InputError as error:
                problem = error
                continue
            tensors = without_padding(self._taken(found), record.place)
            if placeholder is None:
                cut = cut or len(self._ids(text)) > most
            elif not (tensors["input_ids"] == placeholder[1]).any():
                continue
            self._require_length(tensors["input_ids"].numel(), record.place)
            return Sample(tensors, cut)
        raise problem or InputError(
            [
                f"{record.place}: the text has no place for the image or sound; write "
                f"'{placeholder[0] if placeholder else ''}' where it belongs, or give messages"
            ]
        )

    def _require_length(self, tokens: int, place: str) -> None:
        """A text with the places of an image cannot be cut.

        Raises:
            InputError: It is longer than the plan allows for.
        """
        most = self._settings.max_length
        if tokens > most:
            raise InputError(
                [
                    f"{place}: has {tokens} tokens, those of its images or sound included, and "
                    f"[calibration] max_length is {most}; such samples are not cut: raise "
                    f"max_length to {tokens} or more, or give smaller images and shorter texts"
                ]
            )

    def _wordings(self, record: Record, placeholder: tuple[str, int] | None) -> Iterator[str]:
        """The text as it is given; then with places for images, for processors that want them."""
        processor = self._processor
        kind, count = ("image", len(record.images)) if record.images else ("audio", 1)
        if record.messages:
            self._require_template(processor, record.place)
            yield self._templated(_with_parts(record.messages, kind, count), record.place)
            return
        end = self._tokenizer.eos_token if record.response and not self._decodes else None
        text = record.text + ("" if self._decodes else record.response) + (end or "")
        yield text
        if placeholder is None or placeholder[0] in text:
            return
        if processor.chat_template:
            turns = [{"role": "user", "content": [{"type": "text", "text": record.text}]}]
            if record.response:
                answer = [{"type": "text", "text": record.response}]
                turns.append({"role": "assistant", "content": answer})
            yield self._templated(_with_parts(turns, kind, count), record.place)
        else:
            yield placeholder[0] * count + "\n" + text

    def _templated(self, turns: list[dict[str, Any]], place: str) -> str:
        try:
            text: str = self._processor.apply_chat_template(turns, tokenize=False)
        except _template_errors() as error:
            raise InputError(
                [f"{place}: the chat template refuses these messages: {_line(error)}"]
            ) from error
        return text

    # Shared ----------------------------------------------------------------------------------

    def _load(self, what: str, of: str, load: Callable[..., Loaded], **options: str) -> Loaded:
        """A tokenizer or processor of the model's directory; never from the network.

        Raises:
            InputError: It cannot be loaded.
        """
        try:
            return load(self._model, trust_remote_code=False, local_files_only=True, **options)
        except LOADING_ERRORS as error:
            hint = " (torchvision is not installed; some processors need it)"
            needs = what == "processor" and not _is_installed("torchvision")
            raise InputError(
                [
                    f"{self._model}: no {what} can be loaded for the {of}: {_line(error)}"
                    f"{hint if needs else ''}"
                ]
            ) from error

    def _processed(
        self,
        record: Record,
        processor: Callable[..., Any],
        *arguments: Any,  # noqa: ANN401
        **options: Any,  # noqa: ANN401
    ) -> Mapping[str, Any]:
        try:
            found: Mapping[str, Any] = processor(*arguments, return_tensors="pt", **options)
        except SAMPLE_ERRORS as error:
            raise InputError(
                [
                    f"{record.place}: {type(processor).__name__} of {self._model} refuses the "
                    f"sample: {_line(error)}"
                ]
            ) from error
        return found


def without_padding(tensors: dict[str, Tensor], place: str) -> dict[str, Tensor]:
    """Drop the positions that an attention_mask marks as padding, and the mask.

    Raises:
        InputError: The mask masks everything.
    """
    mask = tensors.get("attention_mask")
    if mask is None or mask.ndim != 2 or len(mask) != 1 or "input_ids" not in tensors:
        return tensors
    keep = mask[0].bool()
    if not keep.any():
        raise InputError([f"{place}: the attention_mask masks all of its tokens"])
    return {
        name: value[:, keep] if value.shape[:2] == mask.shape else value
        for name, value in tensors.items()
        if name != "attention_mask"
    }


def _placeholder(processor: Any) -> tuple[str, int] | None:  # noqa: ANN401
    """Token that stands in a text for an image or a sound, if the processor has one."""
    for kind in ("image", "audio"):
        token = getattr(processor, f"{kind}_token", None)
        if isinstance(token, str):
            number = getattr(processor, f"{kind}_token_id", None)
            if number is None:
                number = processor.tokenizer.convert_tokens_to_ids(token)
            return token, int(number)
    return None


def _with_parts(turns: Any, kind: str, count: int) -> list[dict[str, Any]]:  # noqa: ANN401
    """Messages in parts, with a part for each image before the first question if none has one."""
    found = []
    for turn in turns:
        content = turn["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts = [{"type": kind} if part["type"] == kind else part for part in parts]
        found.append({**turn, "content": parts})
    if not any(part["type"] == kind for turn in found for part in turn["content"]):
        first = next((turn for turn in found if turn["role"] == "user"), found[0])
        first["content"] = [{"type": kind}] * count + first["content"]
    return found


def _template_errors() -> tuple[type[Exception], ...]:
    from jinja2 import TemplateError

    return (TemplateError, *SAMPLE_ERRORS, ImportError)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _is_installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None
