"""What happens during a run, as one stream: for progress bars, log lines, and events.jsonl."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

EventKind = Literal["run_started", "task_finished", "task_failed", "run_finished", "note"]


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened; `time` in seconds since the epoch."""

    kind: EventKind
    task: str = ""
    stage: str = ""
    read_bytes: int = 0
    write_bytes: int = 0
    seconds: float = 0.0
    message: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    time: float = field(default_factory=time.time)

    def as_json(self) -> str:
        """One line of JSON; empty fields are left out."""
        return json.dumps({k: v for k, v in asdict(self).items() if v not in ("", 0, {})})


Listener = Callable[[Event], None]


def log_to(path: Path) -> Listener:
    """A listener that appends each event as a line to a file."""

    def listen(event: Event) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(event.as_json() + "\n")

    return listen


def broadcast(*listeners: Listener) -> Listener:
    """One listener that hands every event to several."""

    def listen(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return listen
