"""Several passes side by side, so that each block is loaded once for all micro-batches.

A model's forward cannot be left and entered again, so every pass has a thread of its own that waits
wherever a block is called. Only one thread runs at any moment, and blocks are computed by the
caller, so nothing here depends on how threads are scheduled.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Final

import torch

from esm_stream.calibration.passes import Answer


@dataclass(frozen=True, slots=True)
class Request:
    """A block that a pass waits for, with its arguments."""

    number: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _AbandonedError(BaseException):
    """Raised inside a waiting pass that is no longer wanted."""


_ABANDON: Final = object()


class SuspendedPass:
    """One pass that stops at every block; `request` is what it waits for, None when it is done."""

    def __init__(self, run: Callable[[Answer], Any]) -> None:
        self._run = run
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._requests: SimpleQueue[Request | None] = SimpleQueue()
        self._random = torch.get_rng_state()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="pass", daemon=True)
        self.request: Request | None = None
        self.result: Any = None

    def start(self) -> None:
        """Run up to the first block."""
        self._thread.start()
        self._wait()

    def proceed(self, compute: Callable[[Request], Any]) -> None:
        """Answer the request with what `compute` makes of it, and run up to the next block."""
        assert self.request is not None
        torch.set_rng_state(self._random)
        self._answers.put(compute(self.request))
        self._wait()

    def abandon(self) -> None:
        """End the pass where it waits."""
        if self._thread.is_alive():
            self._answers.put(_ABANDON)
            self._thread.join()

    def _wait(self) -> None:
        """Wait until the thread asks for a block or is done; raise what it raised."""
        self.request = self._requests.get()
        self._random = torch.get_rng_state()
        if self.request is None:
            self._thread.join()
            if self._error is not None:
                raise self._error

    def _work(self) -> None:
        try:
            self.result = self._run(self._ask)
        except _AbandonedError:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._error = error
        finally:
            self._requests.put(None)

    def _ask(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        self._requests.put(Request(number, args, kwargs))
        answer = self._answers.get()
        if answer is _ABANDON:
            raise _AbandonedError
        return answer
