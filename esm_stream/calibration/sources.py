"""What people keep calibration samples in -> records, one per sample, read when they are asked for.

From:  .jsonl and .txt lines, a folder of images or of sounds, an .npz of images.
To:    encoding.py, for the samples that were drawn.
Cost:  every line of a .jsonl is checked once, so that a mistake is found before it is drawn; what
       stays in memory is where each line starts. Images and sounds are opened when drawn.
"""

import json
import math
import zlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from zipfile import BadZipFile, ZipFile

import numpy as np

from esm_stream.errors import InputError

if TYPE_CHECKING:
    from esm_stream.manifest import Calibration

Kind = Literal["text", "images", "arrays", "audio", "inputs"]
GENERIC = Path(__file__).with_name("generic.jsonl")
"""Short texts in many languages, code and arithmetic: for experts that name no data."""
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".mp3")
TEXT_ENDINGS = (".jsonl", ".txt")
MOST_PROBLEMS = 20
FIRST_LINES = 1000


@dataclass(frozen=True, slots=True)
class Record:
    """One sample as it was found; `place` names it in messages: "math.jsonl:17".

    A `text` with a `response` is a prompt. `messages` are a conversation in the form of chat
    templates. Images are files or arrays.
    """

    place: str
    text: str = ""
    response: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    images: tuple[Any, ...] = ()
    audio: Path | None = None

    @property
    def route(self) -> str:
        """What it runs through a model, as far as that can be told: "text", "image" or "audio"."""
        return "image" if self.images else "audio" if self.audio else "text"


@dataclass(frozen=True, slots=True)
class Source:
    """Samples of one path by their number, 0 <= number < count."""

    count: int
    read: Callable[[int], Record]


def kind_of_source(path: Path) -> Kind:
    """What a calibration path holds.

    Raises:
        InputError: The path does not exist, or holds none of these.
    """
    if path.is_dir():
        return _kind_of_folder(path)
    if not path.is_file():
        raise InputError([f"{path}: there is no such calibration file or folder"])
    kinds: dict[str, Kind] = {".npz": "arrays", ".safetensors": "inputs"}
    kinds |= dict.fromkeys(TEXT_ENDINGS, "text")
    if path.suffix not in kinds:
        raise InputError(
            [
                f"{path}: calibration data of an unknown kind; expected .jsonl or .txt (texts), "
                "a folder of images or of sounds, .npz (images), or .safetensors (ready-made model "
                "inputs)"
            ]
        )
    return kinds[path.suffix]


def open_source(path: Path, settings: "Calibration") -> Source:
    """The samples of a path that does not hold ready-made inputs.

    Raises:
        InputError: Something in it cannot be used; all mistakes, by line.
    """
    kind = kind_of_source(path)
    if kind == "text":
        return _lines(path, settings)
    if kind == "arrays":
        return _arrays(path, settings)
    files = _files(path, IMAGE_ENDINGS if kind == "images" else AUDIO_ENDINGS)
    if kind == "images":
        return Source(len(files), lambda i: Record(str(files[i]), images=(files[i],)))
    return Source(len(files), lambda i: Record(str(files[i]), audio=files[i]))


def first_records(path: Path, settings: "Calibration") -> Iterator[Record]:
    """The first samples of a file of lines, without a look at the others.

    Lines that cannot be used are left out: `open_source` tells them with all others.
    """
    parse = _parser(path, settings)
    with path.open("rb") as file:
        for number, line in enumerate(islice(file, FIRST_LINES), 1):
            if line.strip():
                with suppress(InputError):
                    yield parse(line, f"{path}:{number}")


def draw(available: int, wanted: int, seed: int) -> list[int]:
    """Numbers of the samples drawn; all of them, in order, if there are not more than wanted.

    Without replacement, by numpy's RandomState: the papers' generator.
    """
    if available <= wanted:
        return list(range(available))
    chosen = np.random.RandomState(seed).choice(available, wanted, replace=False)
    return [int(i) for i in chosen]


# Folders ---------------------------------------------------------------------------------------


def _kind_of_folder(path: Path) -> Kind:
    """What the files of a folder are; an empty one counts as images.

    Raises:
        InputError: Some are images and some are sounds.
    """
    first: dict[Kind, Path] = {}
    for file in path.rglob("*"):
        ending = file.suffix.lower()
        if ending in IMAGE_ENDINGS:
            first.setdefault("images", file)
        elif ending in AUDIO_ENDINGS:
            first.setdefault("audio", file)
    if len(first) > 1:
        raise InputError(
            [
                f"{path}: holds images ({first['images'].name}) and sounds "
                f"({first['audio'].name}); give them folders of their own, or pairs in a .jsonl"
            ]
        )
    return next(iter(first), "images")


def _files(path: Path, endings: tuple[str, ...]) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.suffix.lower() in endings)


# Arrays ----------------------------------------------------------------------------------------


def _arrays(path: Path, settings: "Calibration") -> Source:
    """Images of an array of an .npz, read one by one where the file allows it."""
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
        shape, row_major, dtype, start = _array_header(path, key)
    except (OSError, ValueError, BadZipFile) as error:
        raise InputError([f"{path}: not a readable .npz file: {error}"]) from error
    colours = shape[3] if len(shape) == 4 else 1
    if len(shape) not in (3, 4) or dtype != np.uint8 or colours not in (1, 3, 4):
        raise InputError(
            [
                f"{path}: array '{key}' has shape {shape} and dtype {dtype}; expected uint8 of "
                "shape (n, h, w) or (n, h, w, c) with 1, 3 or 4 channels"
            ]
        )
    one = shape[1:3] if colours == 1 else shape[1:]

    def read(i: int) -> Record:
        size = math.prod(one)
        try:
            if not row_major:
                image = np.load(path)[key][i].reshape(one)
            else:
                with ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
                    file.seek(start + i * size)
                    image = np.frombuffer(file.read(size), np.uint8).reshape(one)
        except (OSError, ValueError, BadZipFile, zlib.error) as error:
            raise InputError([f"{path}, image {i}: cannot be read: {error}"]) from error
        return Record(f"{path}, image {i}", images=(image,))

    return Source(shape[0] if shape else 0, read)


def _array_header(path: Path, key: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether rows are stored one after the other, dtype, and where the first begins."""
    with ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
        version = np.lib.format.read_magic(file)
        old = version == (1, 0)
        header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape, columns_first, dtype = header(file)
        return shape, not columns_first, dtype, file.tell()


# Lines -----------------------------------------------------------------------------------------


def _lines(path: Path, settings: "Calibration") -> Source:
    """Lines that are not empty; each is parsed here once, and again when it is drawn."""
    parse = _parser(path, settings)
    numbers, starts = array("Q"), array("Q")
    problems: list[str] = []
    with path.open("rb") as file:
        offset = 0
        for number, line in enumerate(file, 1):
            if line.strip():
                numbers.append(number)
                starts.append(offset)
                try:
                    parse(line, f"{path}:{number}")
                except InputError as error:
                    problems += error.problems
            offset += len(line)
            if len(problems) >= MOST_PROBLEMS:
                break
    if problems:
        raise InputError(problems)

    def read(i: int) -> Record:
        with path.open("rb") as file:
            file.seek(starts[i])
            return parse(file.readline(), f"{path}:{numbers[i]}")

    return Source(len(starts), read)


def _parser(path: Path, settings: "Calibration") -> Callable[[bytes, str], Record]:
    return _plain if path.suffix == ".txt" else partial(_record, path, settings)


def _plain(line: bytes, place: str) -> Record:
    return Record(place, text=_decoded(line, place).strip())


def _decoded(line: bytes, place: str) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError([f"{place}: not UTF-8: {error}"]) from error


def _record(path: Path, settings: "Calibration", line: bytes, place: str) -> Record:
    """One line of a .jsonl.

    Raises:
        InputError: It is no JSON object, or holds nothing that can be used.
    """
    try:
        found = json.loads(_decoded(line, place))
    except ValueError as error:
        raise InputError([f"{place}: not JSON: {error}"]) from error
    if not isinstance(found, dict):
        raise InputError([_nothing_under(settings, place, type(found).__name__)])
    folder = path.parent
    images = tuple(_path(folder, p, place) for p in _listed(found.get(settings.image_path_key)))
    sounds = [_path(folder, p, place) for p in _listed(found.get(settings.audio_path_key))]
    if len(sounds) > 1:
        raise InputError([f"{place}: has {len(sounds)} sounds; one sample has one"])
    text, response = found.get(settings.text_key), ""
    messages = found.get(settings.messages_key)
    if text is None and messages is None:
        text, response = found.get(settings.prompt_key), found.get(settings.response_key) or ""
        if isinstance(text, list):
            messages, text = [*text, *(response or [])], None
            response = ""
    if messages is not None and text is None:
        turns = tuple(_turns(messages, place))
        pictures = [_path(folder, p, place) for p in _pictures(turns)]
        return Record(place, messages=turns, images=(*images, *pictures), audio=_first(sounds))
    usable = isinstance(text, str) and isinstance(response, str) and bool(text.strip())
    if not usable and (text is not None or not (images or sounds)):
        raise InputError([_nothing_under(settings, place, ", ".join(found))])
    return Record(place, text or "", response, (), images, _first(sounds))


def _first(sounds: list[Path]) -> Path | None:
    return sounds[0] if sounds else None


def _nothing_under(settings: "Calibration", place: str, found: str) -> str:
    return (
        f"{place}: no text under '{settings.text_key}', no '{settings.messages_key}', no "
        f"'{settings.prompt_key}', or an empty one (found: {found}); set [calibration] text_key, "
        "messages_key, or prompt_key and response_key, and remove empty samples"
    )


def _listed(value: object) -> list[object]:
    """One path, a list of them, or none."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _path(folder: Path, value: object, place: str) -> Path:
    """A file that a line names, relative to the folder of the .jsonl.

    Raises:
        InputError: It is not the path of a file that is there.
    """
    path = Path(folder, value) if isinstance(value, str) else None
    if path is None or not path.is_file():
        raise InputError(
            [f"{place}: {value!r} is no file; paths are relative to the folder of the .jsonl"]
        )
    return path


def _turns(messages: object, place: str) -> Iterator[dict[str, Any]]:
    """The messages of a conversation, checked.

    Raises:
        InputError: They are not a list of objects with role and content.
    """
    if not isinstance(messages, list) or not messages:
        raise InputError([f"{place}: messages: want a list of one or more messages"])
    for turn in messages:
        if not isinstance(turn, dict) or not {"role", "content"} <= set(turn):
            raise InputError([f"{place}: messages: want objects with role and content"])
        parts = turn["content"]
        named = isinstance(parts, list) and all(isinstance(p, dict) and "type" in p for p in parts)
        if not (isinstance(parts, str) or named):
            raise InputError(
                [f"{place}: messages: content is neither a text nor a list of parts with a type"]
            )
        yield turn


def _pictures(turns: tuple[dict[str, Any], ...]) -> Iterator[object]:
    """Image files that parts of the messages name themselves."""
    for turn in turns:
        for part in turn["content"] if isinstance(turn["content"], list) else ():
            if part["type"] == "image":
                yield from (part[key] for key in ("image", "path", "url") if key in part)
