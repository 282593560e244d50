"""Sound files -> one channel of float32 at the rate that a feature extractor wants.

Uncompressed .wav needs nothing but Python; other formats need soundfile, and other sampling rates
SciPy (a polyphase filter): both come with `pip install "esm-stream[audio]"`.
"""

import math
import wave
from pathlib import Path

import numpy as np
import numpy.typing as npt

from esm_stream.errors import InputError

Samples = npt.NDArray[np.float32]
LEAST_SECONDS = 0.1
_INSTALL = 'pip install "esm-stream[audio]"'


def read_sound(path: Path, rate: int, most_seconds: float) -> tuple[Samples, bool]:
    """One sound, its channels averaged.

    Args:
        path: A sound file.
        rate: Sampling rate wanted, in Hz.
        most_seconds: Where longer sounds are cut.

    Returns:
        samples: In [-1, 1], shape (n,).
        cut: Whether the sound was longer than `most_seconds`.

    Raises:
        InputError: Not readable, too short, or a library is missing.
    """
    samples, own_rate, seconds = _read(path, most_seconds)
    if seconds < LEAST_SECONDS:
        raise InputError(
            [f"{path}: {seconds:.3f} seconds of sound; expected {LEAST_SECONDS} or more"]
        )
    if own_rate != rate:
        samples = _resampled(path, samples, own_rate, rate)
    return samples, seconds > most_seconds


def _read(path: Path, most_seconds: float) -> tuple[Samples, int, float]:
    """Samples up to `most_seconds`, their rate, and the seconds of the whole file."""
    if path.suffix.lower() == ".wav":
        try:
            return _read_wav(path, most_seconds)
        except (wave.Error, EOFError):
            pass  # Not plain PCM: soundfile knows more formats, or says what is wrong.
    return _read_any(path, most_seconds)


def _read_wav(path: Path, most_seconds: float) -> tuple[Samples, int, float]:
    with wave.open(str(path), "rb") as file:
        rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
        frames = file.getnframes()
        raw = np.frombuffer(file.readframes(_frames(rate, most_seconds)), np.uint8)
    bytes_NW = raw[: raw.size // (width * channels) * width * channels].reshape(-1, width)
    # Samples as the high bytes of int32, little-endian; 8-bit files alone are unsigned.
    wide = np.zeros((len(bytes_NW), 4), np.uint8)
    wide[:, 4 - width :] = bytes_NW ^ 0x80 if width == 1 else bytes_NW
    values = wide.view("<i4").reshape(-1, channels) / np.float32(2**31)
    return values.mean(axis=1, dtype=np.float32), rate, frames / rate


def _read_any(path: Path, most_seconds: float) -> tuple[Samples, int, float]:
    try:
        import soundfile
    except ImportError as error:
        raise InputError(
            [f"{path}: not an uncompressed .wav file; other formats need soundfile: {_INSTALL}"]
        ) from error
    try:
        with soundfile.SoundFile(path) as file:
            rate, frames = file.samplerate, file.frames
            values = file.read(_frames(rate, most_seconds), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise InputError([f"{path}: not a readable sound: {error}"]) from error
    return values.mean(axis=1, dtype=np.float32), rate, frames / rate


def _frames(rate: int, seconds: float) -> int:
    return math.ceil(rate * seconds)


def _resampled(path: Path, samples: Samples, own_rate: int, rate: int) -> Samples:
    try:
        from scipy.signal import resample_poly
    except ImportError as error:
        raise InputError(
            [
                f"{path}: has {own_rate} samples per second, the model's feature extractor wants "
                f"{rate}; convert it, or let SciPy do it: {_INSTALL}"
            ]
        ) from error
    common = math.gcd(own_rate, rate)
    found: Samples = resample_poly(samples, rate // common, own_rate // common).astype(np.float32)
    return found
