"""The wish to stop: set by signal handlers, polled by tasks between panels and micro-batches."""

import threading

from esm_stream.errors import StopRequestedError

_stop = threading.Event()


def request() -> None:
    """Ask all tasks of this process to stop at the next opportunity."""
    _stop.set()


def clear() -> None:
    """Forget an earlier wish; a new run begins."""
    _stop.clear()


def requested() -> bool:
    """Whether a stop was asked for."""
    return _stop.is_set()


def check() -> None:
    """Give up the current task if a stop was asked for.

    Raises:
        StopRequestedError: A stop was asked for.
    """
    if _stop.is_set():
        raise StopRequestedError("stopped on request")
