"""`esm-stream verify`: whether a work directory or a merged model still is what was written."""

import json
from pathlib import Path
from typing import Annotated

import typer

from esm_stream_cli.failing import clear_errors


def verify(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A work directory or a merged model.", show_default=False
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Read every file and compare it with the hash taken when it was written. Changes nothing."""
    with clear_errors():
        from esm_stream.budget import format_size
        from esm_stream.errors import DataError
        from esm_stream.verify import verify as verified

        found = verified(directory)
        if as_json:
            typer.echo(json.dumps(found.as_dict(), indent=1))
        elif not found.damages:
            left = f"; {found.tasks_left} tasks are still to be run" if found.tasks_left else ""
            typer.echo(f"{directory}: {found.files} files, {format_size(found.size)}, whole{left}")
        if found.damages:
            lines = [damage.problem for damage in found.damages]
            raise DataError("\n".join([*lines, f"To make again what is damaged: {found.repair}"]))
