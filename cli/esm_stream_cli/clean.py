"""`esm-stream clean`: what of a work directory can go, and removing it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from esm_stream_cli.failing import clear_errors


def clean(
    work: Annotated[
        Path, typer.Argument(metavar="WORK", help="A work directory.", show_default=False)
    ],
    kinds: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KIND]...",
            help="What to remove: temporary, states, factors, statistics, updates; the first two "
            "if none are named.",
            show_default=False,
        ),
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Remove it; else it is shown.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show what of a work directory can go and what that costs, or remove it."""
    with clear_errors():
        from esm_stream.budget import format_size
        from esm_stream.clean import FREE, shares_of
        from esm_stream.clean import clean as cleaned

        shares = cleaned(work, kinds or FREE) if apply else shares_of(work)
        if as_json:
            typer.echo(json.dumps([share.as_dict() for share in shares], indent=1))
            return
        if apply:
            size = sum(share.size for share in shares)
            typer.echo(
                f"{work}: {sum(s.files for s in shares)} files, {format_size(size)}, removed"
            )
            return
        from rich.console import Console
        from rich.table import Table

        table = Table("kind", "files", "size", "needed by", "what its loss costs")
        for share in shares:
            needed = f"{share.needed_by} tasks" if share.needed_by else "-"
            size_text = format_size(share.size) if share.size else "-"
            table.add_row(share.kind, str(share.files), size_text, needed, share.costs)
        Console(soft_wrap=True).print(table)
        typer.echo(f"to remove: esm-stream clean {work} KIND... --apply")
