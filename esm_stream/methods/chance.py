"""Random numbers that depend on what they are for, and on nothing else.

Philox is a counter-based generator: number i of a stream is a function of the stream's key and of
i. The key is made of seed, expert and tensor, and i is the index of the element, so neither the
order of tensors, nor panels, threads, or an interruption change which elements are kept.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_WORDS_PER_COUNT = 8  # 32-bit words that one step of Philox4x64 gives


def words(seed: int, expert: str, tensor: str, first: int, count: int) -> NDArray[np.uint32]:
    """Uniform 32-bit words number first .. first + count - 1 of one expert's tensor."""
    text = "\0".join((str(seed), expert, tensor))
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    start, skip = divmod(first, _WORDS_PER_COUNT)
    steps = -(-(skip + count) // _WORDS_PER_COUNT)
    raw = np.random.Philox(key=key, counter=start).random_raw(steps * _WORDS_PER_COUNT // 2)
    found: NDArray[np.uint32] = raw.astype("<u8", copy=False).view("<u4")[skip : skip + count]
    return found


def keeps(drawn: NDArray[np.uint32], share: "float | NDArray[np.float64]") -> NDArray[np.bool_]:
    """Whether each element is kept, with probability `share`."""
    return drawn < np.asarray(share * 2.0**32)
