"""OWL beside ESM: accuracy on glyphs, CPU and memory, more experts, one expert more.

    python tests/benchmarks/owl.py accuracy                 # needs the glyph benchmark
    python tests/benchmarks/owl.py cost [--rounds 3]        # CPU and peak beside ESM
    python tests/benchmarks/owl.py experts                  # peak at 2 and at 20 experts
    python tests/benchmarks/owl.py adding                   # a 9th expert to 8

Everything runs through the command line with one thread. Results are kept in a JSON file beside the
page, docs/benchmarks/owl.json, so that parts can be measured one at a time; the page is written
anew from all of them. Models are random Llamas (models.py) in --keep, made if missing.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from glyphs import GLYPHS
from measure import Measured, import_base, machine, measure
from models import make_llama

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "benchmarks" / "owl.md"
KEPT = PAGE.with_suffix(".json")
MIB = 1 << 20
MERGE = [sys.executable, "-c", "from esm_stream_cli.app import app; app()", "merge", "-q"]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SHAPE = {"layers": 2, "hidden": 768, "vocab": 2000}
EXPERTS = 20

NONE = {"method": "owl", "options": {"inputs": "none"}}
EXPERT = {"method": "owl", "options": {"inputs": "expert"}}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "esm": {"method": "esm"},
    "owl, expert": EXPERT,
    "owl, none": NONE,
}


def manifest(
    folder: Path, base: Path, experts: Mapping[str, tuple[Path, Path]], merge: Mapping[str, Any]
) -> Path:
    """A manifest of experts by name, each with its model and its samples."""
    lines = [f'[base]\nmodel = "{base}"']
    for name, (model, samples) in experts.items():
        lines.append(f'[[experts]]\nname = "{name}"\nmodel = "{model}"\ncalibration = "{samples}"')
    lines.append(f'[merge]\nmethod = "{merge["method"]}"\n[merge.options]')
    lines += [f"{key} = {json.dumps(value)}" for key, value in merge.get("options", {}).items()]
    lines.append('[output]\npath = "merged"\n[run]\nmemory = "8GiB"\nthreads = 1')
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "manifest.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def run(path: Path, *options: str) -> Measured:
    """One merge, from outside."""
    found = measure([*MERGE, str(path), *options], env=ONE_THREAD)
    assert found.exit_code == 0, path
    return found


def llama(keep: Path) -> dict[str, tuple[Path, Path]]:
    """The benchmark's models, made if missing: experts by name."""
    if not (keep / "manifest.toml").exists():
        keep.mkdir(parents=True, exist_ok=True)
        make_llama(keep, experts=EXPERTS, **SHAPE)
    return {f"e{i}": (keep / f"e{i}", keep / f"e{i}.safetensors") for i in range(EXPERTS)}


def first(experts: Mapping[str, Any], count: int) -> dict[str, Any]:
    return dict(list(experts.items())[:count])


# Parts ----------------------------------------------------------------------------------------


def accuracy() -> list[list[Any]]:
    """Test accuracy with every option at its default, alpha included."""
    score = [sys.executable, str(GLYPHS / "score.py")]
    tasks = json.loads((GLYPHS / "bench.json").read_text())["tasks"]
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([*score, "inputs", str(folder / "in")], check=True)
        experts = {
            task: (GLYPHS / "experts" / task, folder / "in" / f"{task}.safetensors")
            for task in tasks
        }
        for title in ("owl, expert", "owl, none"):
            for count in (8, 20):
                place = folder / f"{title}-{count}"
                chosen = first(experts, count)
                run(manifest(place, GLYPHS / "base", chosen, METHODS[title]))
                command = [*score, "model", str(place / "merged"), "--tasks", str(count)]
                shown = subprocess.run(command, check=True, capture_output=True, text=True)
                report = json.loads((place / "merged" / "report.json").read_text())
                alpha = next(iter(report["matrices"].values()))["alpha"]
                found.append([title, count, alpha, json.loads(shown.stdout)["accuracy"]])
                print(found[-1], flush=True)
    return found


def cost(keep: Path, rounds: int) -> dict[str, list[Any]]:
    """CPU seconds and peaks above the imports of every way, interleaved."""
    experts = first(llama(keep), 8)
    found: dict[str, list[Any]] = {"imports": []}
    for _ in range(rounds):
        base = import_base()
        found["imports"].append(_figures(base, 0))
        for title, merge in METHODS.items():
            with tempfile.TemporaryDirectory(dir=keep) as name:
                measured = run(manifest(Path(name), keep / "base", experts, merge))
                found.setdefault(title, []).append(_figures(measured, base.peak_anon))
            print(title, found[title][-1], flush=True)
    return found


def more_experts(keep: Path) -> dict[str, list[Any]]:
    """Peaks above the imports at several numbers of experts."""
    base, found = import_base(), {}
    for title in ("owl, expert", "owl, none"):
        for count in (2, 20):
            with tempfile.TemporaryDirectory(dir=keep) as name:
                folder = Path(name)
                chosen = first(llama(keep), count)
                measured = run(manifest(folder, keep / "base", chosen, METHODS[title]))
                work = sum(f.stat().st_size for f in (folder / "merged.work").rglob("*.*"))
            found[f"{title} / {count}"] = [*_figures(measured, base.peak_anon), work]
            print(title, count, found[f"{title} / {count}"], flush=True)
    return found


def adding(keep: Path) -> dict[str, list[Any]]:
    """Nine experts at once, beside a ninth that comes to eight."""
    experts, found = first(llama(keep), 9), {}
    base = import_base()
    for title in ("owl, expert", "owl, none"):
        with tempfile.TemporaryDirectory(dir=keep) as name:
            fresh, grown = Path(name) / "fresh", Path(name) / "grown"
            nine = run(manifest(fresh, keep / "base", experts, METHODS[title]))
            run(manifest(grown, keep / "base", first(experts, 8), METHODS[title]))
            ninth = run(manifest(grown, keep / "base", experts, METHODS[title]), "--restart")
            same = all(
                file.read_bytes() == (grown / "merged" / file.name).read_bytes()
                for file in (fresh / "merged").glob("*.safetensors")
            )
            read = [_bytes_read(place) for place in (fresh, grown)]
        found[title] = [_figures(nine, 0), _figures(ninth, 0), _figures(base, 0), same, read]
        print(title, found[title], flush=True)
    return found


def _figures(m: Measured, base: int) -> list[float]:
    return [m.cpu_seconds, m.peak_anon - base, m.wall_seconds]


def _bytes_read(folder: Path) -> int:
    """Bytes of experts' tensors that the tasks of the last run read, averages not counted."""
    keys = [p for p in (folder / "merged.work" / "done").rglob("*.json") if "write" not in p.parts]
    started = (folder / "manifest.toml").stat().st_mtime
    markers = [json.loads(p.read_text()) for p in keys if p.stat().st_mtime >= started]
    return sum(marker["results"].get("bytes_read_experts", 0) for marker in markers)


# Page -----------------------------------------------------------------------------------------


def write_page(kept: Mapping[str, Any]) -> None:
    """Everything measured so far."""
    parts = [
        "# OWL beside ESM",
        f"Measured on {datetime.now(UTC).date()}: {machine()}.",
        "Commands: `python tests/benchmarks/owl.py accuracy`, `cost`, `experts`, `adding`; one "
        "thread each, through the command line. Models, where they are not those of the glyph "
        f"benchmark, are random Llamas in bf16 of {SHAPE['layers']} blocks, {SHAPE['hidden']} "
        f"features and an MLP of {SHAPE['hidden'] * 11 // 4}, with 32 samples of 128 tokens per "
        "expert.",
    ]
    if "accuracy" in kept:
        parts += ["## Accuracy on glyphs", _accuracy_text(kept["accuracy"])]
    if "cost" in kept:
        parts += ["## CPU and memory, 8 experts", _cost_text(kept["cost"])]
    if "experts" in kept:
        parts += ["## More experts", _experts_text(kept["experts"])]
    if "adding" in kept:
        parts += ["## One expert more", _adding_text(kept["adding"])]
    PAGE.write_text("\n\n".join(parts) + "\n")


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _accuracy_text(rows: Sequence[Sequence[Any]]) -> str:
    found = _table(
        ["", "tasks", "alpha", "test accuracy %"],
        [[title, count, alpha, f"{value:.2f}"] for title, count, alpha, value in rows],
    )
    return (
        f"{found}\n\nEvery option at its default, alpha included; q, k and v as stored. "
        "Differences below 0.5 are noise. [All methods](glyphs-methods.md) are on a page of their "
        "own; ESM (`vit-official`) has 78.4, 70.5 and 63.6 at coefficients searched for it."
    )


def _cost_text(found: Mapping[str, Sequence[Sequence[float]]]) -> str:
    rows = []
    for title in METHODS:
        runs = found[title]
        cpu = [run[0] for run in runs]
        ratio = median(run[0] / esm[0] for run, esm in zip(runs, found["esm"], strict=True))
        peak = max(run[1] for run in runs)
        peaks = peak / max(run[1] for run in found["esm"])
        seconds = f"{median(cpu):.1f} ({min(cpu):.1f} to {max(cpu):.1f})"
        rows.append([title, seconds, f"{ratio:.2f}", f"{peak / MIB:.0f}", f"{peaks:.2f}"])
    head = ["", "CPU s", "of esm", "peak RssAnon above imports MiB", "of esm"]
    return (
        f"{_table(head, rows)}\n\n{len(found['esm'])} interleaved rounds; CPU seconds are those of "
        "the whole process, imports included; ratios are medians of the rounds' ratios. Imports "
        "are all of those that a forward needs; without samples most of them do not happen. The "
        "cores were shared with other work, which lengthens CPU seconds of all rows alike."
    )


def _experts_text(found: Mapping[str, Sequence[float]]) -> str:
    rows = [
        [*key.split(" / "), f"{peak / MIB:.0f}", f"{cpu:.1f}", f"{work / MIB:.0f}"]
        for key, (cpu, peak, _, work) in found.items()
    ]
    head = ["", "experts", "peak RssAnon above imports MiB", "CPU s", "work directory MiB"]
    return _table(head, rows)


def _adding_text(found: Mapping[str, Sequence[Any]]) -> str:
    rows = []
    for title, (nine, ninth, base, same, read) in found.items():
        own = (ninth[0] - base[0]) / (nine[0] - base[0])
        rows.append(
            [
                title,
                f"{nine[0]:.1f}",
                f"{ninth[0]:.1f}",
                f"{ninth[0] / nine[0]:.2f}",
                f"{own:.2f}",
                f"{read[1] / read[0]:.3f}",
                "yes" if same else "no",
            ]
        )
    head = [
        "",
        "9 at once, CPU s",
        "9th to 8, CPU s",
        "ratio",
        "ratio without imports",
        "bytes of experts read, ratio",
        "same bytes",
    ]
    return _table(head, rows)


def main() -> None:
    """Measure one part and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["accuracy", "cost", "experts", "adding", "page"])
    parser.add_argument("--keep", type=Path, help="directory of the models, made if missing")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    keep = args.keep or Path(tempfile.mkdtemp())
    if args.what == "accuracy":
        kept["accuracy"] = accuracy()
    elif args.what == "cost":
        kept["cost"] = cost(keep, args.rounds)
    elif args.what == "experts":
        kept["experts"] = more_experts(keep)
    elif args.what == "adding":
        kept["adding"] = adding(keep)
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    write_page(kept)
    if args.keep is None:
        shutil.rmtree(keep)


if __name__ == "__main__":
    main()
