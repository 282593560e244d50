"""`esm-stream demo`: a small real merge from nothing, shown in one table."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from esm_stream_cli.failing import clear_errors

if TYPE_CHECKING:
    from esm_stream.demo import DemoResult


def demo(
    directory: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Where the example's files go.")
    ] = Path("esm-demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Train a tiny vision transformer and experts on scanned digits, merge them, compare.

    Needs no download and about two minutes; leaves models, manifests and results to look at.
    """
    with clear_errors():
        from esm_stream.demo import run

        from esm_stream_cli.merge import merge_quietly

        result = run(directory, merge_quietly, report=lambda line: typer.echo(line, err=True))
        if as_json:
            typer.echo(result.to_json())
        else:
            _show(result, directory)


def _show(result: "DemoResult", directory: Path) -> None:
    del result, directory
