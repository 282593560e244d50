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


TITLES = {
    "base": "base model",
    "experts": "experts, each on its own task",
    "average": "plain average",
    "esm": "ESM",
}


def _show(result: "DemoResult", directory: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="test accuracy in %", title_justify="left")
    table.add_column("model")
    for task in (*result.tasks, "mean"):
        table.add_column(task, justify="right")
    for row in result.rows:
        cells = [f"{row.accuracy[task]:.1f}" for task in result.tasks]
        table.add_row(TITLES[row.name], *cells, f"[bold]{row.mean:.1f}[/]")
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(
        f"models, manifests and results are in {directory}; start with {directory}/esm.toml",
        highlight=False,
    )
