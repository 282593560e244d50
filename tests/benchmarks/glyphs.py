"""Accuracy of every method on the glyph benchmark, alpha searched on validation data.

    python tests/benchmarks/glyphs.py [--tasks 8,14,20] [--methods "ties;iso_c"]

Each method merges once per set of tasks, through the engine; alpha scales what the method has
merged, so that the search only writes W0 + alpha * update into a model in memory and scores it.
Rows with coefficients given in the benchmark's README are scored at those, and compared.
The directory of the benchmark is ESM_GLYPHS, by default ../shared/glyphs.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine
from safetensors.torch import load_file
from torch import Tensor

from esm_stream import engine
from esm_stream.manifest import load_manifest
from esm_stream.planning.make import make_plan
from esm_stream.planning.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
GLYPHS = Path(os.environ.get("ESM_GLYPHS", ROOT.parent / "shared" / "glyphs"))
PAGE = ROOT / "docs" / "benchmarks" / "glyphs-methods.md"
SETS = (8, 14, 20)
GRID = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.1, 1.3, 1.6, 2.0, 2.5, 3.0)
SAMPLES = 32
VALIDATION_IMAGES = 100


@dataclass(frozen=True)
class Row:
    """One line of the table: a merge, and what the reference says at a given alpha."""

    title: str
    merge: Mapping[str, Any]
    alphas: Mapping[int, float] = field(default_factory=dict)
    reference: Mapping[int, float] = field(default_factory=dict)
    search: bool = True


def _sums(values: tuple[float, float, float]) -> dict[int, float]:
    return dict(zip(SETS, values, strict=True))


OFFICIAL = {"profile": "vit-official"}
ROWS = (
    Row("average", {"method": "average"}, _sums((1, 1, 1)), _sums((67.95, 60.90, 55.53)), False),
    Row(
        "task_arithmetic",
        {"method": "task_arithmetic"},
        _sums((0.1875, 0.1071, 0.075)),
        _sums((69.35, 61.40, 56.21)),
    ),
    Row(
        "ties",
        {"method": "ties"},
        _sums((0.6, 0.6, 0.6)),
        _sums((69.97, 60.47, 54.94)),
    ),
    Row("ties, trim per tensor", {"method": "ties", "options": {"trim": "tensor"}}),
    Row("dare", {"method": "dare"}),
    Row(
        "dare, elected signs",
        {"method": "dare", "options": {"signs": "elected", "normalize": True}},
    ),
    Row("della", {"method": "della"}),
    Row("breadcrumbs", {"method": "breadcrumbs"}),
    Row("consensus_ta", {"method": "consensus_ta"}),
    Row("sce", {"method": "sce"}),
    Row("ram", {"method": "ram"}),
    Row("emr", {"method": "emr"}),
    Row("karcher", {"method": "karcher"}),
    Row("multislerp", {"method": "multislerp"}),
    Row("model_stock", {"method": "model_stock"}),
    Row(
        "tsv_m",
        {"method": "tsv_m"},
        _sums((0.8, 0.8, 0.8)),
        _sums((76.83, 69.70, 63.06)),
    ),
    Row(
        "iso_c",
        {"method": "iso_c"},
        _sums((0.6, 0.6, 0.6)),
        _sums((73.08, 67.47, 60.87)),
    ),
    Row("iso_cts", {"method": "iso_cts"}),
    Row("cart", {"method": "cart"}),
    Row("knots", {"method": "knots"}),
    Row("core_space", {"method": "core_space"}),
    Row("dc_merge", {"method": "dc_merge"}),
    Row("wudi", {"method": "wudi"}),
    Row("wudi_closed", {"method": "wudi_closed"}),
    Row("regmean", {"method": "regmean"}),
    Row(
        "esm, vit-official",
        {"method": "esm", "options": OFFICIAL},
        _sums((0.9, 0.75, 0.63)),
        _sums((78.43, 70.53, 63.60)),
    ),
    Row("esm, journal", {"method": "esm"}),
    Row("owl", {"method": "owl"}),
    Row("task_arithmetic, svc = 1", {"method": "task_arithmetic", "post": {"svc": 1.0}}),
    Row("task_arithmetic, svc = 0.1", {"method": "task_arithmetic", "post": {"svc": 0.1}}),
    Row("iso_cts, svc = 1", {"method": "iso_cts", "post": {"svc": 1.0}}),
    Row("tsv_m, layers = 2", {"method": "tsv_m", "post": {"layers": 2.0}}),
)


@cache
def bench() -> Any:  # noqa: ANN401
    """The benchmark's own script as a module."""
    spec = importlib.util.spec_from_file_location("glyph_score", GLYPHS / "score.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Scorer:
    """A model in memory whose weights are replaced, and the labelled images of all tasks."""

    def __init__(self) -> None:
        from transformers import AutoModel

        self.model = AutoModel.from_pretrained(GLYPHS / "base", dtype=torch.float32).eval()
        self.heads = load_file(GLYPHS / "heads.safetensors")
        self.base = load_file(GLYPHS / "base" / "model.safetensors")
        self.names = self._names()
        self.parts: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def _names(self) -> dict[str, Tensor]:
        """Parameters of the model by the names of the file."""
        from esm_stream.calibration.skeleton import build_skeleton

        shapes = {name: tuple(value.shape) for name, value in self.base.items()}
        stored = build_skeleton(GLYPHS / "base", shapes, torch.float32).stored
        parameters = dict(self.model.named_parameters())
        return {tensor: parameters[name] for name, tensor in stored.items() if name in parameters}

    def images(self, task: str, part: str) -> tuple[Tensor, Tensor]:
        if (task, part) not in self.parts:
            with np.load(GLYPHS / "data" / f"{task}.npz") as data:
                images = VALIDATION_IMAGES if part == "val" else None
                x = bench().pixels(data[f"{part}_x"][:images])
                self.parts[task, part] = x, torch.from_numpy(data[f"{part}_y"][:images])
        return self.parts[task, part]

    @torch.inference_mode()
    def accuracy(self, weights: Mapping[str, Tensor], tasks: list[str], part: str) -> float:
        """Mean accuracy over tasks, in percent."""
        for name, parameter in self.names.items():
            parameter.copy_(weights[name])
        found = []
        for task in tasks:
            x, y = self.images(task, part)
            features = self.model(pixel_values=x).last_hidden_state[:, 0]
            scores = torch.nn.functional.normalize(features, dim=-1) @ self.heads[task].float().T
            found.append(100 * scores.argmax(1).eq(y).float().mean().item())
        return sum(found) / len(found)


def merged_at_one(folder: Path, tasks: list[str], merge: Mapping[str, Any]) -> tuple[Plan, Any]:
    """Merge with alpha = 1; the plan, and the merged tensors."""
    lines = [f'[base]\nmodel = "{GLYPHS / "base"}"']
    for task in tasks:
        lines.append(f'[[experts]]\nname = "{task}"\nmodel = "{GLYPHS / "experts" / task}"')
        lines.append(f'calibration = "{folder.parent / "in" / task}.safetensors"')
    lines.append(f'[calibration]\nsamples = {SAMPLES}\n[output]\npath = "merged"')
    lines.append(f'[merge]\nmethod = "{merge["method"]}"\nalpha = 1.0\n[merge.options]')
    lines += [f"{key} = {json.dumps(value)}" for key, value in merge.get("options", {}).items()]
    if "post" in merge:
        lines.append("[merge.post]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in merge["post"].items()]
    folder.mkdir(parents=True)
    (folder / "manifest.toml").write_text("\n".join(lines) + "\n")
    plan = make_plan(load_manifest(folder / "manifest.toml"))
    engine.merge(plan, scheduler="sync")
    return plan, load_file(folder / "merged" / "model.safetensors")


def at_alpha(
    scorer: Scorer, plan: Plan, merged: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """The merged model with another alpha, where alpha applies."""
    method = plan.method.name
    found = {}
    for name, base in scorer.base.items():
        own = plan.tensors[name].method
        scaled = own is not None and own.name == method and own.options == plan.method.options
        found[name] = base + alpha * (merged[name] - base) if scaled else merged[name]
    return found


def best_of(count: int, value: Callable[[int], float]) -> int:
    """Index of the largest of `count` values that rise and then fall, with few of them computed."""
    known: dict[int, float] = {}

    def at(index: int) -> float:
        if index not in known:
            known[index] = value(index)
        return known[index]

    low, high = 0, count - 1
    while high - low > 2:
        left, right = low + (high - low) * 2 // 5, low + (high - low) * 3 // 5
        right = max(right, left + 1)
        low, high = (low, right) if at(left) >= at(right) else (left, high)
    return max(range(low, high + 1), key=at)


def score_row(scorer: Scorer, row: Row, tasks: list[str], folder: Path, search: bool) -> list[str]:
    """Cells of one method and one set of tasks."""
    count, started = len(tasks), time.process_time()
    plan, merged = merged_at_one(folder, tasks, row.merge)
    seconds = time.process_time() - started
    cells = [row.title, str(count)]
    if row.alphas:
        given = scorer.accuracy(at_alpha(scorer, plan, merged, row.alphas[count]), tasks, "test")
        cells += [f"{row.alphas[count]:g}", f"{given:.2f}", f"{row.reference[count]:.2f}"]
    else:
        cells += ["", "", ""]
    if search:

        def on_validation(alpha: float) -> float:
            return scorer.accuracy(at_alpha(scorer, plan, merged, alpha), tasks, "val")

        best = GRID[best_of(len(GRID), lambda i: on_validation(GRID[i]))]
        test = scorer.accuracy(at_alpha(scorer, plan, merged, best), tasks, "test")
        cells += [f"{best:g}", f"{test:.2f}"]
    else:
        cells += ["", ""]
    return [*cells, f"{seconds:.1f}"]


def main() -> None:
    """Score the chosen rows and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default=",".join(map(str, SETS)))
    parser.add_argument(
        "--methods", default="", help="titles of rows with ; between, all by default"
    )
    parser.add_argument("--given", action="store_true", help="score given coefficients only")
    parser.add_argument("--lines", type=Path, help="keep finished lines here and go on from them")
    args = parser.parse_args()
    tasks = json.loads((GLYPHS / "bench.json").read_text())["tasks"]
    wanted = [name for name in args.methods.split(";") if name]
    scorer = Scorer()
    kept = json.loads(args.lines.read_text()) if args.lines and args.lines.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sys.argv = ["score.py", "inputs", str(folder / "in")]
        bench().main()
        for row in ROWS:
            if wanted and row.title not in wanted:
                continue
            for count in map(int, args.tasks.split(",")):
                key = f"{row.title} / {count}"
                if key not in kept:
                    place = folder / key.replace("/", "-")
                    search = row.search and not args.given
                    kept[key] = score_row(scorer, row, tasks[:count], place, search)
                    if args.lines:
                        args.lines.write_text(json.dumps(kept))
                print("|", " | ".join(kept[key]), "|", flush=True)
    write_page(kept)


def write_page(lines: Mapping[str, list[str]]) -> None:
    """The table, in the order of the rows."""
    order = [f"{row.title} / {count}" for row in ROWS for count in SETS]
    body = [f"| {' | '.join(lines[key])} |" for key in order if key in lines]
    grid = ", ".join(f"{a:g}" for a in GRID)
    text = f"""# All methods on the glyph benchmark

Measured on {datetime.now(UTC).date()}: {machine()}.

Command: `python tests/benchmarks/glyphs.py`

Test accuracy in percent, mean over the tasks of each set. *Given* is the coefficient for which the
benchmark's README has a reference number. *Searched* is the alpha of the grid
{grid}
with the best accuracy on validation data ({VALIDATION_IMAGES} labelled images per task), found as
the top of a curve with one peak. Alpha multiplies what the
method itself merges, everything else is averaged as in any merge. Options are the defaults.
Differences below 0.5 are noise. *CPU s* is that of planning and merging, in a process that has
imported everything.

| method | tasks | alpha given | accuracy | reference | alpha searched | accuracy | CPU s |
|---|---|---|---|---|---|---|---|
"""
    PAGE.write_text(text + "\n".join(body) + "\n")


if __name__ == "__main__":
    main()
