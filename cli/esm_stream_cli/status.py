"""`esm-stream status`: how far a work directory is, and how to go on."""

import json
from pathlib import Path
from typing import Annotated

import typer

from esm_stream_cli.failing import clear_errors


def status(
    work: Annotated[
        Path, typer.Argument(metavar="WORK", help="A work directory.", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show what is done, what remains and how to go on. Changes nothing."""
    with clear_errors():
        from esm_stream.engine import progress_of

        found = progress_of(work)
        if as_json:
            typer.echo(json.dumps(found.as_dict(), indent=1))
            return
        from rich.console import Console
        from rich.table import Table

        console = Console(soft_wrap=True)
        table = Table("stage", "done", "tasks", "bytes left to read and write")
        from esm_stream.budget import format_size

        for stage in found.stages:
            left = format_size(stage.bytes_left) if stage.bytes_left else "-"
            table.add_row(stage.name, str(stage.done), str(stage.tasks), left)
        console.print(table)
        typer.echo(f"output: {found.output}")
        if found.holder:
            typer.echo(f"running: {found.holder}")
        elif found.complete:
            typer.echo("complete; nothing remains to be done")
        elif found.calibrated and not found.begun:
            typer.echo(
                f"calibrated, nothing merged yet; to merge: esm-stream merge {found.manifest}"
            )
        else:
            typer.echo(f"not running; to go on: esm-stream merge {found.manifest}")
