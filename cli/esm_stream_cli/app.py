"""The typer application: one file per command, heavy imports only inside the commands."""

from typing import Annotated

import typer

from esm_stream import __version__
from esm_stream_cli import (
    calibrate,
    clean,
    demo,
    imports,
    merge,
    methods,
    plan,
    schema,
    status,
    verify,
)

EPILOG = (
    "Exit codes: 0 done, 1 unexpected failure, 2 wrong usage, 3 manifest, 4 inputs, 5 model "
    "cannot be streamed, 6 memory or disk, 7 work directory in use, 8 options changed, 9 NaN or "
    "damaged data, 10 a task failed, 130 stopped on request."
)

app = typer.Typer(
    name="esm-stream",
    help="Merge many fine-tuned experts of one base model on a machine that cannot hold them.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("merge")(merge.merge)
app.command("calibrate")(calibrate.calibrate)
app.command("plan")(plan.plan)
app.command("status")(status.status)
app.command("clean")(clean.clean)
app.command("verify")(verify.verify)
app.command("demo")(demo.demo)
app.command("schema")(schema.schema)
app.command("methods")(methods.methods)
app.command("import")(imports.imported)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"esm-stream {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Merge many fine-tuned experts of one base model on a machine that cannot hold them."""
    del version
