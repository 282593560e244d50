"""`esm-stream import`: a manifest from a configuration of mergekit."""

from pathlib import Path
from typing import Annotated

import typer

from esm_stream_cli.failing import clear_errors


def imported(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A mergekit YAML file.", show_default=False)
    ],
    output: Annotated[
        str, typer.Option(help="Directory of the merged model, written into the manifest.")
    ] = "merged",
) -> None:
    """Turn a mergekit configuration into a manifest on standard output.

    What a manifest cannot express is listed, and nothing is written.
    """
    with clear_errors():
        import yaml

        from esm_stream.errors import ManifestError
        from esm_stream.mergekit import manifest_of

        try:
            document = yaml.safe_load(config.read_text(encoding="utf-8"))
        except OSError as error:
            raise ManifestError(f"{config}: cannot be read: {error}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ManifestError(f"{config}: not valid YAML: {error}") from error
        try:
            typer.echo(manifest_of(document, output), nl=False)
        except ManifestError as error:
            raise ManifestError(f"{config}: {error}") from error
