"""`esm-stream schema`: the manifest's JSON schema, for editors."""

import json

import typer

from esm_stream_cli.failing import clear_errors


def schema() -> None:
    """Print the JSON schema of the manifest, so that editors complete and check it."""
    with clear_errors():
        from esm_stream.manifest import manifest_schema

        typer.echo(json.dumps(manifest_schema(), indent=2))
