"""`esm-stream calibrate`: the samples through every expert, so that many merges can start there."""

import typer

from esm_stream_cli.failing import clear_errors
from esm_stream_cli.merge import run
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


def calibrate(
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
    """Run the samples of a manifest through its experts, and merge nothing yet.

    Fills the work directory with the factors of every expert. Merges with another alpha, other
    scaling levels or another output then start from there; so does merge of the same manifest.
    """
    with clear_errors():
        loaded = read_manifest(manifest, memory, device, work, parallel, forward)
        require_device(loaded.run.device)
        outcome = run(
            loaded,
            calibration_only=True,
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
                f"{outcome.output}: calibrated ({outcome.tasks_run} tasks run, "
                f"{outcome.tasks_reused} reused); to merge: esm-stream merge {manifest}"
            )
