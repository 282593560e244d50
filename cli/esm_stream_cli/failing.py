"""One way out for every command: an error that the user can act on, and its exit code."""

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager

import typer

from esm_stream.errors import EsmStreamError


@contextmanager
def clear_errors() -> Generator[None]:
    """Print the text of our own errors and exit with their code; others keep their traceback."""
    quiet_libraries()
    try:
        yield
    except EsmStreamError as error:
        for number, line in enumerate(str(error).splitlines()):
            typer.echo(f"error: {line}" if number == 0 else f"       {line}", err=True)
        raise typer.Exit(error.exit_code) from None
    except BrokenPipeError:
        # The reader of our output went away: nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None


def quiet_libraries() -> None:
    """No advertisements and progress bars of libraries between our lines; no network."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
