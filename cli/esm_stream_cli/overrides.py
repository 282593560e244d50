"""Options that several commands share; some stand over keys of the manifest's [run] section."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from esm_stream.manifest import Manifest

ManifestPath = Annotated[
    Path, typer.Argument(metavar="MANIFEST", help="The manifest, a TOML file.", show_default=False)
]
Memory = Annotated[
    str | None,
    typer.Option(help='Memory of all tasks in flight, such as "8GiB".', show_default="manifest"),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.", show_default="manifest")]
Work = Annotated[Path | None, typer.Option(help="Work directory.", show_default="manifest")]
Parallel = Annotated[
    int | None,
    typer.Option(min=1, help="Tasks at once in this process.", show_default="manifest"),
]
Forward = Annotated[
    str | None,
    typer.Option(
        help="How the forward is streamed: auto, chain, replay or resident.",
        show_default="manifest",
    ),
]

Scheduler = Annotated[
    str,
    typer.Option(help="local (this process), sync, threads, tcp://HOST:PORT, or a file."),
]
Restart = Annotated[
    bool,
    typer.Option(
        "--restart",
        help="Accept options other than the work directory was made with; what they do not "
        "touch is kept.",
    ),
]
Verify = Annotated[
    bool,
    typer.Option("--verify", help="Read all finished work first; what is damaged is made again."),
]
VerifyInputs = Annotated[
    bool,
    typer.Option(
        "--verify-inputs",
        help="Read all inputs first; refuse contents that changed since the last such run.",
    ),
]
KeepGoing = Annotated[
    bool,
    typer.Option(
        "--keep-going",
        help="When a task fails, run all that does not need its result before giving up.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
JsonEvents = Annotated[
    bool, typer.Option("--json", help="Print events as JSON lines on standard output.")
]


def read_manifest(
    path: Path,
    memory: str | None = None,
    device: str | None = None,
    work: Path | None = None,
    parallel: int | None = None,
    forward: str | None = None,
) -> "Manifest":
    """The manifest with the command line's values in its [run] section.

    Raises:
        ManifestError: The manifest or one of the values is wrong.
    """
    from pydantic import ValidationError

    from esm_stream.errors import ManifestError
    from esm_stream.manifest import Run, load_manifest

    manifest = load_manifest(path)
    given = {
        "memory": memory,
        "device": device,
        "work": work.absolute() if work else None,
        "parallel": parallel,
        "forward": forward,
    }
    values = {**manifest.run.model_dump(), **{k: v for k, v in given.items() if v is not None}}
    try:
        run = Run.model_validate(values)
    except ValidationError as error:
        lines = [
            f"--{detail['loc'][0]}: {detail['msg'].removeprefix('Value error, ')}"
            for detail in error.errors()
        ]
        raise ManifestError("\n".join(lines)) from error
    return manifest.model_copy(update={"run": run})


def require_device(device: str) -> None:
    """Refuse a GPU that is not there, before any work.

    Raises:
        ManifestError: There is no such CUDA device.
    """
    if device == "cpu":
        return
    import torch

    from esm_stream.errors import ManifestError

    number = int(device.partition(":")[2] or 0)
    if not torch.cuda.is_available() or number >= torch.cuda.device_count():
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise ManifestError(
            f"device '{device}': this machine has {found} usable CUDA devices; use --device cpu"
        )
