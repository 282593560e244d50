"""Speed and memory beside mergekit 0.1.5, on a Llama of 0.25 B parameters in bf16.

    python -m venv mk && mk/bin/pip install mergekit==0.1.5 -c constraints.txt
    python tests/benchmarks/beside_mergekit.py --interpreter mk/bin/python [--keep DIR] [--rounds 2]

One thread each, ours and theirs in turn; the least CPU time of the rounds counts, because whatever
else runs on the machine only adds to it. Peaks are anonymous memory above that of the imports.
"""

import argparse
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import yaml
from measure import Measured, machine, measure
from models import make_llama

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "benchmarks" / "mergekit.md"
MIB = 1 << 20
LARGEST_BYTES = 32000 * 1024 * 2
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
CASES = (
    ("linear", 4, {"weight": 0.25}, "linear", ""),
    ("task_arithmetic", 4, {"weight": 0.4}, "task_arithmetic", ""),
    ("task_arithmetic", 8, {"weight": 0.4}, "task_arithmetic", ""),
    ("ties", 4, {"weight": 1.0, "density": 0.2}, "ties", 'density = 0.2\ntrim = "tensor"'),
)
OURS_IMPORTS = "import torch; from esm_stream import engine; import esm_stream.stages.write"


def their_config(folder: Path, method: str, experts: int, parameters: dict) -> Path:
    """A configuration of mergekit."""
    config = {
        "merge_method": method,
        "models": [
            {"model": str(folder / f"e{i}"), "parameters": parameters} for i in range(experts)
        ],
        "dtype": "bfloat16",
    }
    if method != "linear":
        config["base_model"] = str(folder / "base")
    path = folder / f"{method}-{experts}.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def our_manifest(folder: Path, method: str, experts: int, options: str) -> Path:
    """The same merge as a manifest."""
    lines = [f'[base]\nmodel = "{folder / "base"}"']
    lines += [f'[[experts]]\nname = "e{i}"\nmodel = "{folder / f"e{i}"}"' for i in range(experts)]
    lines.append(f'[merge]\nmethod = "{method}"\nalpha = 0.4\n[merge.options]\n{options}')
    lines.append(f'[output]\npath = "{folder / "ours"}"')
    path = folder / f"{method}-{experts}.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def clean(folder: Path) -> None:
    """Remove outputs."""
    for name in ("ours", "ours.work", "theirs"):
        shutil.rmtree(folder / name, ignore_errors=True)


def best(runs: list[Measured]) -> Measured:
    """The round with the least CPU time."""
    assert all(run.exit_code == 0 for run in runs)
    return min(runs, key=lambda run: run.cpu_seconds)


def main() -> None:
    """Run all cases and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interpreter", type=Path, required=True)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp())
    if not (folder / "e7").exists():
        make_llama(folder, experts=8)
    cli = "import sys; from esm_stream_cli.app import app; sys.argv[0] = 'esm-stream'; app()"
    ours = [sys.executable, "-c", cli, "merge", "-q"]
    theirs = [str(args.interpreter.parent / "mergekit-yaml")]
    our_base = measure([sys.executable, "-c", OURS_IMPORTS], env=ONE_THREAD)
    imports = "import mergekit.merge, mergekit.scripts.run_yaml"
    their_base = measure([str(args.interpreter), "-c", imports], env=ONE_THREAD)
    rows = []
    for method, experts, parameters, our_method, options in CASES:
        config = their_config(folder, method, experts, parameters)
        manifest = our_manifest(folder, our_method, experts, options)
        found: tuple[list[Measured], list[Measured]] = ([], [])
        for _ in range(args.rounds):
            clean(folder)
            found[0].append(measure([*ours, str(manifest)], env=ONE_THREAD))
            clean(folder)
            found[1].append(measure([*theirs, str(config), str(folder / "theirs")], env=ONE_THREAD))
        clean(folder)
        mine, other = best(found[0]), best(found[1])
        rows.append(
            f"| {method} | {experts} | {mine.cpu_seconds:.1f} | {other.cpu_seconds:.1f} | "
            f"{other.cpu_seconds / mine.cpu_seconds:.1f} | {_peak(mine, our_base)} | "
            f"{_peak(other, their_base)} | {mine.wall_seconds:.0f} | {other.wall_seconds:.0f} |"
        )
        print(rows[-1], flush=True)
    write_page(rows, args.rounds, our_base, their_base)


def _peak(run: Measured, base: Measured) -> str:
    above = run.peak_anon - base.peak_anon
    return f"{above / MIB:.0f} ({above / LARGEST_BYTES:.1f} T)"


def write_page(rows: list[str], rounds: int, ours: Measured, theirs: Measured) -> None:
    """The table and what it means."""
    text = f"""# Beside mergekit

Measured on {datetime.now(UTC).date()}: {machine()}; mergekit 0.1.5.

Command: `python tests/benchmarks/beside_mergekit.py --interpreter mk/bin/python`

A Llama of 0.25 billion parameters in bfloat16, one thread each, ours and theirs in turn, rounds:
{rounds}; the least CPU time counts. Peaks are anonymous memory above that of the imports, in MiB
and in units of the largest tensor T. Imports alone take {ours.cpu_seconds:.1f} s of CPU here and
{theirs.cpu_seconds:.1f} s there; they are included below. Other work ran on the machine meanwhile,
so wall seconds say little, and all times are larger than on a quiet one.

| method | experts | CPU s | mergekit | ratio | peak | mergekit | wall s | mergekit |
|---|---|---|---|---|---|---|---|---|
"""
    PAGE.write_text(text + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
