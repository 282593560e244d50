"""`esm-stream merge`: run a manifest, or what is left of it."""

import os
import shlex
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import typer

from esm_stream_cli.failing import clear_errors
from esm_stream_cli.overrides import (
    Device,
    Forward,
    JsonEvents,
    KeepGoing,
    ManifestPath,
    Memory,
    Parallel,
    Quiet,
    Restart,
    Scheduler,
    Verify,
    VerifyInputs,
    Work,
    read_manifest,
    require_device,
)

if TYPE_CHECKING:
    from pathlib import Path

    from esm_stream.engine import Outcome
    from esm_stream.manifest import Manifest


def merge(
    manifest: ManifestPath,
    memory: Memory = None,
    device: Device = None,
    work: Work = None,
    parallel: Parallel = None,
    forward: Forward = None,
    scheduler: Scheduler = "local",
    restart: Restart = False,
    verify: Verify = False,
    verify_inputs: VerifyInputs = False,
    keep_going: KeepGoing = False,
    quiet: Quiet = False,
    as_json: JsonEvents = False,
) -> None:
    """Merge the experts of a manifest into one model.

    Killed or stopped at any moment, the same command goes on from there and ends in the same bytes.
    """
    with clear_errors():
        loaded = read_manifest(manifest, memory, device, work, parallel, forward)
        require_device(loaded.run.device)
        outcome = run(
            loaded,
            scheduler=scheduler,
            restart=restart,
            verify=verify,
            verify_inputs=verify_inputs,
            keep_going=keep_going,
            quiet=quiet,
            as_json=as_json,
        )
        if not quiet and not as_json:
            typer.echo(
                f"{outcome.output}: complete ({outcome.tasks_run} tasks run, "
                f"{outcome.tasks_reused} reused); figures in report.json"
            )


def run(
    loaded: "Manifest",
    *,
    calibration_only: bool = False,
    scheduler: str = "local",
    restart: bool = False,
    verify: bool = False,
    verify_inputs: bool = False,
    keep_going: bool = False,
    quiet: bool = False,
    as_json: bool = False,
) -> "Outcome":
    """Plan and run a loaded manifest, or its calibration, shown on the terminal."""
    from esm_stream import engine
    from esm_stream.planning.make import make_plan
    from esm_stream.planning.plan import CALIBRATION, STAGES
    from esm_stream_cli.progress import shown

    made = make_plan(loaded)
    action = engine.calibrate if calibration_only else engine.merge
    stages = CALIBRATION if calibration_only else STAGES
    with stop_on_signals(), shown(made, stages, quiet=quiet, as_json=as_json) as listener:
        return action(
            made,
            scheduler=scheduler,
            parallel=loaded.run.parallel,
            restart=restart,
            verify=verify,
            verify_inputs=verify_inputs,
            keep_going=keep_going,
            listener=listener,
        )


@contextmanager
def stop_on_signals() -> Generator[None]:
    """First Ctrl-C or SIGTERM: finish what is being written and exit 130; second: stop hard."""
    from esm_stream import stopping
    from esm_stream.errors import StopRequestedError

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a handler's signature
        if stopping.requested():
            os._exit(130)
        stopping.request()

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except StopRequestedError as error:
        command = shlex.join(["esm-stream", *sys.argv[1:]])
        raise StopRequestedError(
            f"stopped on request; finished work is kept. To go on: {command}"
        ) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def merge_quietly(path: "Path") -> "Path":
    """Merge a manifest without any output; used by the demo."""
    loaded = read_manifest(path)
    return run(loaded, quiet=True).output
