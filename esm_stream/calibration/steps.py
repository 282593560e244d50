"""The blocks of a forward in order, and the modes in which it can be streamed; no torch here.

From:  trace.py, which finds them out.
To:    planning/ and stages/.
"""

from dataclasses import dataclass
from typing import Final, Literal

Mode = Literal["chain", "replay", "resident"]
MODES: Final[tuple[Mode, ...]] = ("chain", "replay", "resident")
OUTSIDE: Final = "outside"
"""In place of a block's name: what runs before, between and after the blocks."""
MICRO_BATCH_TOKENS: Final = 1024
"""Most tokens of several samples that run together, where the memory allows."""


@dataclass(frozen=True, slots=True)
class Step:
    """One block in the order of the forward.

    `calls` counts how often a pass calls it. `handed_on`: its output goes to the next block as it
    is, and nowhere else; `extra` then counts what follows the hidden state in its output (all of it
    None; -1 if the output is the hidden state itself). `place` is the argument in which it takes
    the hidden state. `state_bytes` is the size of its output, of the dummy sample in a trace and of
    all samples in a plan.
    """

    block: str
    calls: int = 1
    handed_on: bool = False
    extra: int = -1
    place: int | str = 0
    state_bytes: int = 0
