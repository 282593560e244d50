"""`esm-stream plan`: what a merge will do and cost, without reading a tensor."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from esm_stream_cli.failing import clear_errors
from esm_stream_cli.overrides import (
    Device,
    Forward,
    ManifestPath,
    Memory,
    Work,
    read_manifest,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from esm_stream.planning.plan import ForwardPlan, Matrix, Plan


def plan(
    manifest: ManifestPath,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole plan, with every task, as JSON.")
    ] = False,
    memory: Memory = None,
    device: Device = None,
    work: Work = None,
    forward: Forward = None,
) -> None:
    """Show what a merge will do and cost: matrices, methods, memory, disk, bytes, operations.

    Reads headers and configurations only. A plan over the memory budget is shown with a warning;
    merge refuses it.
    """
    with clear_errors():
        from esm_stream.errors import BudgetError
        from esm_stream.planning.make import make_plan
        from esm_stream.planning.tasks import check_budget

        loaded = read_manifest(manifest, memory, device, work, forward=forward)
        made = make_plan(loaded, check_memory=False)
        if as_json:
            typer.echo(made.dump().decode())
        else:
            show(made, console())
        try:
            check_budget(made.tasks, made.memory)
        except BudgetError as error:
            typer.echo(f"warning: merge will be refused: {error}", err=True)


def _blocks(forward: "ForwardPlan") -> str:
    """Number and place of the blocks: "12 blocks of 'model.layers'"."""
    lists = list(dict.fromkeys(step.block.rpartition(".")[0] for step in forward.steps))
    named = ", ".join(f"'{name}'" for name in lists[:4]) + (", ..." if len(lists) > 4 else "")
    return f"{len(forward.steps)} blocks of {named}" if lists else "no blocks"


def console() -> "Console":
    """The terminal; wide enough for whole tensor names when the output goes to a file or pipe."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160)


def show(made: "Plan", console: "Console") -> None:
    """Print a plan for people."""
    from rich.markup import escape

    from esm_stream.budget import format_flops, format_size

    merge = made.manifest["merge"]
    console.print(
        f"[bold]{merge['method']}[/] of {len(made.experts)} experts "
        f"({', '.join(made.experts)}) -> {escape(str(made.output))}"
    )
    if made.forward is not None:
        forward = made.forward
        console.print(
            f"forward: {forward.mode}, {_blocks(forward)} in {forward.dtype}, "
            f"{made.manifest['calibration']['samples']} samples of up to "
            f"{forward.tokens_per_sample} tokens per expert"
        )
        if forward.why:
            console.print(f"         ({escape(forward.why)})")
    if made.matrices:
        console.print(_roles(made))
    console.print(_others(made))
    stages = {stage: made.of_stage(stage) for stage in ("forward", "merge", "walk", "write")}
    tasks = ", ".join(f"{len(found)} {stage}" for stage, found in stages.items() if found)
    largest = max(made.tasks.values(), key=lambda task: task.peak_bytes)
    console.print(
        f"tasks         {len(made.tasks)} ({tasks}, ...)\n"
        f"read          {format_size(made.read_bytes)} of tensors\n"
        f"write         {format_size(made.output_bytes)} in {escape(str(made.output))}\n"
        f"work          up to {format_size(made.work_bytes)} in {escape(str(made.work))}\n"
        f"peak memory   {format_size(made.peak_bytes)} (task '{largest.key}'), "
        f"budget {format_size(made.memory)}\n"
        f"operations    {format_flops(made.flops)}",
        highlight=False,
    )
    for note in made.notes:
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False)


def _roles(made: "Plan") -> "Table":
    from rich.markup import escape
    from rich.table import Table

    from esm_stream.budget import format_size
    from esm_stream.planning.plan import update_key

    groups: dict[tuple[object, ...], list[Matrix]] = {}
    for m in made.matrices.values():
        groups.setdefault((m.group, m.method.name, m.alpha), []).append(m)
    table = Table(title="merged as matrices", title_justify="left", expand=False)
    for title in ("role", "matrices", "shape", "method", "rank", "moment", "alpha", "memory"):
        left = title in ("role", "method")
        table.add_column(title, justify="left" if left else "right", no_wrap=not left)
    for (_, method, alpha), found in groups.items():
        first = found[0]
        keys = [update_key(made, m) for m in found]
        peak = max(made.tasks[key].peak_bytes for key in keys)
        table.add_row(
            escape(_short(first.role)),
            str(len(found)),
            f"{first.outputs} x {first.inputs}",
            str(method),
            str(first.rank or "-"),
            "merged input" if first.walked else first.moment or "-",
            f"{alpha:g}",
            format_size(peak),
        )
    return table


def _short(role: str) -> str:
    """A role without the prefix that all roles of a model share: from its "*" on."""
    return role[role.find("*") :] if "*" in role else role


def _others(made: "Plan") -> "Table":
    from rich.markup import escape
    from rich.table import Table

    counts: dict[tuple[str, str, str], int] = {}
    for t in made.tensors.values():
        if t.treatment == "factors":
            continue
        method = t.method.name if t.method else "base"
        key = (method, t.why, "-" if t.treatment == "copy" else f"{t.alpha:g}")
        counts[key] = counts.get(key, 0) + 1
    table = Table(title="all other tensors", title_justify="left", expand=False)
    for title in ("method", "why", "alpha", "tensors"):
        table.add_column(title, justify="right" if title in ("tensors", "alpha") else "left")
    for (method, why, alpha), count in counts.items():
        table.add_row(method, escape(why), alpha, str(count))
    return table
