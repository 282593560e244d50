"""Benchmarks of the main job; each writes its result as Markdown into docs/benchmarks.

    python tests/benchmarks/run.py plan                    # 70B x 8, header-only files
    python tests/benchmarks/run.py memory [--keep DIR]     # 0.3B Llama, 4 experts, 2 GiB
    python tests/benchmarks/run.py forward [--keep DIR] [--device cuda]   # 0.8B Llama, streamed
    python tests/benchmarks/run.py glyphs                  # accuracy, needs the glyph benchmark

The glyph benchmark's directory is ESM_GLYPHS, by default ../shared/glyphs.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from measure import Measured, import_base, machine, measure
from models import make_llama, make_sparse_70b

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "benchmarks"
GLYPHS = Path(os.environ.get("ESM_GLYPHS", ROOT.parent / "shared" / "glyphs"))
MIB = 1 << 20
CLI = str(Path(sys.executable).with_name("esm-stream"))


def write_result(name: str, title: str, lines: list[str], command: str = "") -> None:
    """One page: title, date, machine, command, then the lines."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    command = command or f"python tests/benchmarks/run.py {name}"
    head = [
        f"# {title}",
        "",
        f"Measured on {datetime.now(UTC).date()}: {machine()}.",
        "",
        f"Command: `{command}`",
        "",
    ]
    (RESULTS / f"{name}.md").write_text("\n".join(head + lines) + "\n")
    print("\n".join(lines))


def row(name: str, m: Measured) -> str:
    """A table row of one measured command."""
    return (
        f"| {name} | {m.cpu_seconds:.1f} | {m.wall_seconds:.1f} | {m.peak_anon / MIB:.0f} | "
        f"{m.peak_rss / MIB:.0f} |"
    )


HEAD = ["| | CPU s | wall s | peak RssAnon MiB | peak RSS MiB |", "|---|---|---|---|---|"]


def bench_plan() -> None:
    """`--help`, and `plan` on the headers of a 70B Llama with 8 experts."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = make_sparse_70b(Path(folder), experts=8)
        rows = [
            row("`esm-stream --help`", measure([CLI, "--help"])),
            row("imports of a merge alone", import_base()),
            row("`esm-stream plan`, 70B x 8", measure([CLI, "plan", str(manifest)])),
        ]
    write_result("plan", "Planning a 70B merge of 8 experts from headers", [*HEAD, *rows])


def bench_memory(keep: Path | None) -> None:
    """Merge a 0.3B Llama in bf16 with 4 experts under a budget of 2 GiB."""
    folder = keep or Path(tempfile.mkdtemp())
    manifest = folder / "manifest.toml"
    if not manifest.exists():
        folder.mkdir(parents=True, exist_ok=True)
        make_llama(folder, experts=4, memory="2GiB")
    for path in (folder / "merged", folder / "merged.work"):
        shutil.rmtree(path, ignore_errors=True)
    base = import_base()
    merged = measure([CLI, "merge", str(manifest)])
    lines = [*HEAD, row("imports alone", base), row("merge", merged), ""]
    lines += memory_lines(folder, base, merged)
    write_result("memory", "Memory of a merge: 0.3B Llama, bf16, 4 experts, 2 GiB", lines)
    if keep is None:
        shutil.rmtree(folder)


def memory_lines(folder: Path, base: Measured, merged: Measured) -> list[str]:
    """Peak above the imports against plan and budget, and bytes read against the files."""
    report = json.loads((folder / "merged" / "report.json").read_text())
    planned = json.loads(
        subprocess.run(
            [CLI, "plan", "--json", str(folder / "manifest.toml")],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    projected = max(task["peak_bytes"] for task in planned["tasks"].values())
    above = merged.peak_anon - base.peak_anon
    experts = sum(f.stat().st_size for d in folder.glob("e?") for f in d.glob("*.safetensors"))
    read = report["bytes_read"]
    seconds = ", ".join(f"{stage} {s:.0f}" for stage, s in stage_seconds(folder).items())
    return [
        f"- exit code {merged.exit_code}",
        f"- peak above the import base: {above / MIB:.0f} MiB; largest task as planned: "
        f"{projected / MIB:.0f} MiB; budget: 2048 MiB",
        f"- the experts' files hold {experts} bytes, {read['experts']} were read of them; of the "
        f"base {read['base']} bytes were read (headers are not counted; norms are read to run "
        "their block and once more to average them)",
        f"- work directory: {_size(folder / 'merged.work') / MIB:.0f} MiB; output "
        f"{_size(folder / 'merged') / MIB:.0f} MiB",
        f"- seconds of task time by stage: {seconds}",
    ]


def stage_seconds(folder: Path) -> dict[str, float]:
    """Seconds that the tasks of each stage took, from the markers of the work directory."""
    totals: dict[str, float] = {}
    for path in (folder / "merged.work" / "done").rglob("*.json"):
        marker = json.loads(path.read_text())
        stage = marker["key"].partition("/")[0]
        totals[stage] = totals.get(stage, 0.0) + marker["seconds"]
    return totals


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def reset(folder: Path) -> None:
    """Remove output and work directory."""
    for path in (folder / "merged", folder / "merged.work"):
        shutil.rmtree(path, ignore_errors=True)


FORWARDS = ("plain nothing", "streamed nothing", "plain moments", "streamed moments")
FORWARD = Path(__file__).with_name("forward.py")


def bench_forward(keep: Path | None, rounds: int, with_moments: int, device: str) -> None:
    """One expert's forward of a 0.8B Llama in bf16: 32 samples of 128 tokens, one thread."""
    folder = keep or Path(tempfile.mkdtemp())
    if not (folder / "manifest.toml").exists():
        folder.mkdir(parents=True, exist_ok=True)
        make_llama(folder, experts=2, memory="8GiB", layers=26, hidden=1536)
    found: dict[str, list[dict]] = {name: [] for name in FORWARDS}
    # Every other round goes backwards, so that drift falls on both; moments take minutes.
    for number, names in enumerate([FORWARDS[:2]] * rounds + [FORWARDS[2:]] * with_moments):
        for name in names if number % 2 == 0 else names[::-1]:
            found[name].append(run_forward(folder, name, device))
            print(name, found[name][-1], flush=True)
    title = "Forward of one expert: 0.8B Llama, bf16, 32 x 128 tokens"
    name = "forward" if device == "cpu" else "forward-gpu"
    write_result(name, title if device == "cpu" else f"{title}, GPU", forward_lines(found))
    if keep is None:
        shutil.rmtree(folder)


def run_forward(folder: Path, name: str, device: str) -> dict:
    """One forward in a fresh process; what it measured, and its peaks from outside."""
    shutil.rmtree(folder / "merged.work", ignore_errors=True)
    result = folder / "result.json"
    command = [sys.executable, "-W", "ignore", str(FORWARD), *name.split(), str(folder)]
    outside = measure([*command, str(result), device], env={"OMP_NUM_THREADS": "1"})
    if outside.exit_code:
        raise SystemExit(f"{name} failed")
    inside = json.loads(result.read_text())
    return {
        **inside,
        "above": outside.peak_anon - inside["base"],
        "rss": outside.peak_rss,
        "wall": outside.wall_seconds,
    }


def forward_lines(found: dict[str, list[dict]]) -> list[str]:
    """A row for each way of running, and what the streamed one's peak is made of."""
    lines = [
        "| | CPU s | of plain | peak RssAnon above imports MiB | peak RSS MiB | read MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in ((name, runs) for name, runs in found.items() if runs):
        how, observed = name.split()
        beside = found[f"plain {observed}"]
        ratios = [r["cpu_seconds"] / p["cpu_seconds"] for r, p in zip(runs, beside, strict=True)]
        seconds = [r["cpu_seconds"] for r in runs]
        with_moments = " with moments" if observed == "moments" else ""
        lines.append(
            f"| {how}{with_moments} | {median(seconds):.1f} ({min(seconds):.1f} to "
            f"{max(seconds):.1f}) | {median(ratios):.2f} | "
            f"{max(r['above'] for r in runs) / MIB:.0f} | {max(r['rss'] for r in runs) / MIB:.0f} "
            f"| {runs[0]['bytes_read'] / MIB:.0f} |"
        )
    lines += [
        f"- {name}: the GPU computes {runs[0]['computing']:.0%} of the time; its peak is "
        f"{runs[0]['device_peak'] / MIB:.0f} MiB"
        for name, runs in found.items()
        if runs and "computing" in runs[0]
    ]
    one = found["streamed nothing"][0]
    parts = {key: one[key] for key in ("block", "hidden", "activations")}
    above = max(run["above"] for run in found["streamed nothing"])
    whole = sum(parts.values())
    return [
        *lines,
        "",
        f"{len(found['streamed nothing'])} interleaved rounds and {len(found['streamed moments'])} "
        "with moments, each run in a process of its own with one thread. CPU seconds are the "
        "median (least to most) of loading and running, without imports and planning; ratios are "
        "medians of the rounds' ratios. Both map the weights from their files: they count in RSS, "
        "of which the streamed forward lets go after each block, and not in RssAnon.",
        "",
        f"- mode: {one['mode']}; the expert's files hold {one['stored'] / MIB:.0f} MiB; the head "
        "is never read, the embedding only where it is looked up",
        f"- largest block {parts['block'] / MIB:.0f} MiB + hidden states "
        f"{parts['hidden'] / MIB:.0f} MiB + activations of one micro-batch "
        f"{parts['activations'] / MIB:.0f} MiB = {whole / MIB:.0f} MiB; the streamed forward's "
        f"peak is {above / whole:.2f} of it",
    ]


SEPARATE = 'targets = ["q", "k", "v", "o", "up", "down"]\nfuse_qkv = false\n'
GLYPH_ROWS = (
    ("`vit-official`", "", {8: 78.43, 14: 70.53, 20: 63.60}),
    ("q, k, v, o, up, down separately", SEPARATE, {8: 76.95, 14: 69.76, 20: 61.62}),
)
ALPHAS = {8: 0.9, 14: 0.75, 20: 0.63}


def bench_glyphs() -> None:
    """Accuracy of ESM at 8, 14 and 20 tasks against the reference numbers."""
    score = [sys.executable, str(GLYPHS / "score.py")]
    tasks = json.loads((GLYPHS / "bench.json").read_text())["tasks"]
    lines = ["| ESM | tasks | alpha | accuracy % | reference % |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([*score, "inputs", str(folder / "in")], check=True)
        for title, options, reference in GLYPH_ROWS:
            for count, alpha in ALPHAS.items():
                reset(folder)
                manifest = glyph_manifest(folder, tasks[:count], alpha, options)
                subprocess.run([CLI, "merge", "-q", str(manifest)], check=True)
                found = subprocess.run(
                    [*score, "model", str(folder / "merged"), "--tasks", str(count)],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                accuracy = json.loads(found.stdout)["accuracy"]
                lines.append(
                    f"| {title} | {count} | {alpha} | {accuracy:.2f} | {reference[count]:.2f} |"
                )
                print(lines[-1], flush=True)
    write_result("glyphs", "Accuracy on the glyph benchmark", lines)


def glyph_manifest(folder: Path, tasks: list[str], alpha: float, options: str) -> Path:
    """A manifest over the first tasks of the benchmark."""
    text = f'[base]\nmodel = "{GLYPHS / "base"}"\n'
    for task in tasks:
        model = GLYPHS / "experts" / task
        text += f'[[experts]]\nname = "{task}"\nmodel = "{model}"\n'
        text += f'calibration = "in/{task}.safetensors"\n'
    text += f'[merge]\nmethod = "esm"\nalpha = {alpha}\n[merge.options]\nprofile = "vit-official"\n'
    path = folder / "manifest.toml"
    path.write_text(text + options + '[output]\npath = "merged"\n')
    return path


def main() -> None:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["plan", "memory", "forward", "glyphs"])
    parser.add_argument("--keep", type=Path, help="directory of the models, made if missing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--moments", type=int, default=1, help="rounds with moments")
    parser.add_argument("--device", default="cpu", help="of the forward: cpu or cuda")
    args = parser.parse_args()
    if args.what == "plan":
        bench_plan()
    elif args.what == "memory":
        bench_memory(args.keep)
    elif args.what == "forward":
        bench_forward(args.keep, args.rounds, args.moments, args.device)
    else:
        bench_glyphs()


if __name__ == "__main__":
    main()
