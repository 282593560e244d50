"""Time of the linear algebra of ESM against width, experts and tokens, beside its operations.

    OMP_NUM_THREADS=1 python tests/benchmarks/scaling.py measure > lines.jsonl
    OMP_NUM_THREADS=1 python tests/benchmarks/scaling.py one OUTPUTSxINPUTS TOKENS EXPERTS
    python tests/benchmarks/scaling.py plot lines.jsonl docs/benchmarks/scaling.svg

`measure` sweeps up-projections of 4 D x D; `one` measures a single size. CPU seconds of one thread:
moment and basis of one expert, and the merge of all. Bases of the other experts are random, which
changes nothing of the operations. The operations are those that `esm-stream plan` counts.

Letters: O outputs, I inputs, D width, K rank, N tokens.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from blocks import expert, summed, timed

from esm_stream import budget
from esm_stream.allocation import return_freed_memory
from esm_stream.calibration.moments import InputMoment, ShiftMoment
from esm_stream.methods import create, is_factor_method
from esm_stream.methods.contract import Factors

# Operations per second that the model's lines are drawn with: about those of a float64 product.
RATE = 45e9
WIDTHS = (128, 256, 512, 1024, 1536)
EXPERTS = (2, 4, 8, 16, 32, 64)
TOKENS = (512, 1024, 2048, 4096, 8192, 16384, 32768)


def measured(outputs: int, inputs: int, tokens: int, experts: int) -> dict[str, Any]:
    """Seconds and operations of the three steps."""
    method = create("esm", {"profile": "vit-official", "levels": []}, "vision")
    assert is_factor_method(method)
    rank = min(max(1, outputs // experts), inputs)
    update_OI, rows_NI = expert(outputs, inputs, tokens, 0, "cpu")
    wide = inputs > outputs
    moment = ShiftMoment(update_OI) if wide else InputMoment(inputs, update_OI.device)
    result, moment_seconds = timed("cpu", partial(summed, moment, rows_NI))
    one, basis_seconds = timed("cpu", partial(method.factor, update_OI, result, experts))
    spectrum = one.spectrum[:rank]
    del update_OI, rows_NI, moment, result, one
    random = torch.Generator().manual_seed(0)
    factors = [random_factors(outputs, inputs, rank, spectrum, random) for _ in range(experts)]
    shape = outputs, inputs
    merged, merge_seconds = timed("cpu", partial(method.combine, factors, shape))
    side = outputs if wide else inputs
    shift = 2.0 * tokens * outputs * inputs if wide else 0.0
    return {
        "shape": list(shape),
        "tokens": tokens,
        "experts": experts,
        "condition": merged.diagnostics["condition_bases"],
        "seconds": {"moment": moment_seconds, "basis": basis_seconds, "merge": merge_seconds},
        "operations": {
            "moment": shift + 1.0 * tokens * side**2,
            "basis": budget.basis_flops(outputs, inputs, rank),
            "merge": budget.combine_flops(outputs, inputs, experts * rank),
        },
    }


def random_factors(
    outputs: int, inputs: int, rank: int, spectrum_K: torch.Tensor, random: torch.Generator
) -> Factors:
    """Nearly orthonormal columns, and coordinates of uneven size."""
    basis_OK = torch.randn(outputs, rank, generator=random) / outputs**0.5
    coordinates_KI = torch.randn(rank, inputs, generator=random)
    return Factors(basis_OK, coordinates_KI, spectrum_K, 1.0)


def sweep() -> None:
    """Print one line per size."""
    for width in WIDTHS:
        emit("width", width, measured(4 * width, width, 2 * width, 8))
    for experts in EXPERTS:
        emit("experts", experts, measured(2048, 512, 1024, experts))
    for tokens in TOKENS:
        emit("tokens", tokens, measured(1024, 1024, tokens, 8))


def emit(swept: str, value: int, line: dict[str, Any]) -> None:
    """One line of JSON."""
    print(json.dumps({"swept": swept, "value": value, **line}), flush=True)


def plot(lines_path: Path, image: Path) -> None:
    """Seconds against each of the three on logarithmic axes; dashed: operations / RATE."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "esm-stream"
    from matplotlib import pyplot as plt

    lines = [json.loads(text) for text in lines_path.read_text().splitlines()]
    titles = {
        "width": "width D: 4D x D, 8 experts, 2D tokens",
        "experts": "experts: 2048 x 512, 1024 tokens",
        "tokens": "tokens: 1024 x 1024, 8 experts",
    }
    steps = {
        "moment": "moment, one expert",
        "basis": "basis, one expert",
        "merge": "merge, all experts",
    }
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True)
    for axis, (swept, title) in zip(axes, titles.items(), strict=True):
        chosen = [line for line in lines if line["swept"] == swept]
        values = [line["value"] for line in chosen]
        for number, (step, label) in enumerate(steps.items()):
            color = f"C{number}"
            axis.loglog(
                values, [v["seconds"][step] for v in chosen], "o-", color=color, label=label
            )
            model = [v["operations"][step] / RATE for v in chosen]
            axis.loglog(values, model, "--", color=color, alpha=0.6)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(values, [str(value) for value in values])
        axis.minorticks_off()
        axis.grid(visible=True, alpha=0.3)
    axes[0].set_ylabel("CPU seconds, one thread")
    axes[0].legend(title=f"dashed: operations / {RATE / 1e9:.0f} GFLOP/s", fontsize=8)
    figure.tight_layout()
    figure.savefig(image, metadata={"Date": None})


def main() -> None:
    """Measure or plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["measure", "one", "plot"])
    parser.add_argument("arguments", nargs="*")
    args = parser.parse_args()
    return_freed_memory()
    if args.step == "measure":
        sweep()
    elif args.step == "one":
        size, tokens, experts = args.arguments
        outputs, inputs = map(int, size.split("x"))
        emit("size", outputs, measured(outputs, inputs, int(tokens), int(experts)))
    else:
        plot(*map(Path, args.arguments))


if __name__ == "__main__":
    sys.exit(main())
