"""One block's ESM against the authors' route, one CPU thread, both in one interleaved run.

    OMP_NUM_THREADS=1 python tests/benchmarks/blocks.py s|b32|l14|OUTPUTSxINPUTS [--timed N]
        [--experts T] [--tokens N] [--exact] [--twin SIZE] [--device cuda]

The authors' route: singular value decomposition of the shifts X D^T in float32, of every expert;
two singular value decompositions in float32 to orthogonalise. Ours: moments, bases and the merge
as the package runs them. `--timed` experts are decomposed by the authors' route and their time is
multiplied (all by default; with 0 the authors' route is left out). `--exact` also computes
everything by float64 decompositions and prints the errors of both. `--twin` makes the second expert
the first one and SIZE of noise, so that the stacks are nearly singular.

Letters: N tokens, O outputs, I inputs, K rank, R columns of all experts.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from esm_stream.allocation import return_freed_memory
from esm_stream.calibration.moments import InputMoment, ShiftMoment
from esm_stream.methods import create, is_factor_method
from esm_stream.methods.contract import Factors, Moment

# Tokens of 32 images, width.
BLOCKS = {"s": (32 * 50, 384), "b32": (32 * 50, 768), "l14": (32 * 257, 1024)}
# Of one block: fused query, key and value; output; up and down of the perceptron.
MATRICES = {"qkv": (3, 1), "o": (1, 1), "up": (4, 1), "down": (1, 4)}
# The definition's exponent, the profile's constant.
WEIGHT_POWER, CONSTANT = 0.15, 2.0
# Directions that the definition drops (methods.md 1.3, rule 4); in float64 alone it can be told.
DROP = 1e-7

Line = dict[str, Any]


def clock(device: str) -> float:
    """CPU seconds, or wall seconds of a finished GPU."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def timed(device: str, run: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and its seconds."""
    before = clock(device)
    result = run()
    return result, clock(device) - before


def expert(
    outputs: int, inputs: int, tokens: int, seed: int, device: str, twin: float | None = None
) -> tuple[Tensor, Tensor]:
    """An update and inputs whose spectra decay, as those of fine-tuned models do."""
    if seed == 1 and twin is not None:
        first_OI, rows_NI = expert(outputs, inputs, tokens, 0, device)
        noise_OI = torch.randn(first_OI.shape, generator=torch.Generator().manual_seed(1))
        return first_OI + twin * first_OI.std() * noise_OI.to(device), rows_NI
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(outputs, inputs, generator=random)
    strong = torch.randn(outputs, 64, generator=random) @ torch.randn(64, inputs, generator=random)
    mixing = torch.linalg.qr(torch.randn(inputs, inputs, generator=random))[0]
    scales = torch.linspace(0, -3, inputs).exp()
    rows_NI = torch.randn(tokens, inputs, generator=random) * scales @ mixing
    rows_NI += 0.3 * torch.randn(inputs, generator=random)
    return (1e-3 * (noise + 0.5 * strong)).to(device), rows_NI.to(device)


def authors_basis(update_OI: Tensor, rows_NI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Basis, coordinates and eigenvalues from the shifts' singular value decomposition."""
    _, values, right_KO = torch.linalg.svd(rows_NI @ update_OI.T, full_matrices=False)
    basis_OK = right_KO[:rank].T.clone()
    return basis_OK, basis_OK.T @ update_OI, values[:rank] ** 2


def authors_merge(found: list[tuple[Tensor, Tensor, Tensor]], drop: float = 0.0) -> Tensor:
    """Weighted stacks, orthogonalised by two singular value decompositions."""
    weights = [(values / values.mean()) ** WEIGHT_POWER for _, _, values in found]
    weights = [w / w.mean() for w in weights]
    parts = list(zip(found, weights, strict=True))
    left, first = orthogonal(torch.cat([basis * w for (basis, _, _), w in parts], dim=1), drop)
    right, second = orthogonal(torch.cat([w[:, None] * rows for (_, rows, _), w in parts]), drop)
    return CONSTANT * first * second * (left @ right)


def orthogonal(matrix: Tensor, drop: float) -> tuple[Tensor, Tensor]:
    """U V^T and the mean singular value; directions up to `drop` of the largest are left out."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left * (values > drop * values[0]) @ right, values.mean()


def relative(found: Tensor, wanted: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((found.double() - wanted).norm() / wanted.norm())


def summed(moment: InputMoment | ShiftMoment, rows_NI: Tensor) -> Moment:
    """The moment of all rows, in batches as a forward brings them."""
    for batch_NI in rows_NI.split(1000):
        moment.add(batch_NI)
    return moment.result()


def measure(name: str, shape: tuple[int, int], tokens: int, args: argparse.Namespace) -> Line:
    """Seconds and errors of one matrix."""
    (outputs, inputs), experts, device = shape, args.experts, args.device
    timed_experts = experts if args.timed is None else args.timed
    rank = min(outputs // experts, inputs)
    method = create("esm", {"profile": "vit-official", "levels": []}, "vision")
    assert is_factor_method(method)
    factors, theirs, exact = [], [], []
    seconds = {"ours_basis": 0.0, "ours_moment": 0.0, "authors_basis": 0.0}
    for number in range(experts):
        update_OI, rows_NI = expert(outputs, inputs, tokens, number, device, args.twin)
        wide = inputs > outputs
        moment = ShiftMoment(update_OI) if wide else InputMoment(inputs, update_OI.device)
        result, spent = timed(device, partial(summed, moment, rows_NI))
        seconds["ours_moment"] += spent
        one, spent = timed(device, partial(method.factor, update_OI, result, experts))
        seconds["ours_basis"] += spent
        basis, rows = one.basis_OK[:].float(), one.coordinates_KI.float()
        factors.append(Factors(basis, rows, one.spectrum, one.norm))
        if number < timed_experts:
            found, spent = timed(device, partial(authors_basis, update_OI, rows_NI, rank))
            seconds["authors_basis"] += spent * experts / timed_experts
            theirs.append(found)
        else:
            theirs.append((basis, rows, one.spectrum[:rank].float()))
        if args.exact:
            exact.append(authors_basis(update_OI.double(), rows_NI.double(), rank))
    merged, seconds["ours_merge"] = timed(device, partial(method.combine, factors, shape))
    line: Line = {"matrix": name, "shape": list(shape), "experts": experts, "tokens": tokens}
    line |= merged.diagnostics
    del line["energy_kept"], line["ranks"]
    if timed_experts:
        theirs_OI, seconds["authors_merge"] = timed(device, partial(authors_merge, theirs))
    if args.exact:
        wanted = authors_merge(exact, DROP)
        line["error"] = relative(merged.update_OI, wanted)
        line["authors_error"] = relative(theirs_OI, wanted) if timed_experts else None
    return line | seconds


def table(lines: list[Line]) -> list[str]:
    """Markdown rows, one per matrix and one for the block."""
    lines = [{"authors_merge": 0.0, **line} for line in lines]
    keys = ["authors_basis", "authors_merge", "ours_moment", "ours_basis", "ours_merge"]
    total = {key: sum(line[key] for line in lines) for key in keys}
    rows = ["| matrix | " + " | ".join(keys) + " | ratio |", "|---" * (len(keys) + 2) + "|"]
    for line in [*lines, {"matrix": "block", **total}]:
        authors = line["authors_basis"] + line["authors_merge"]
        ours = line["ours_moment"] + line["ours_basis"] + line["ours_merge"]
        cells = " | ".join(f"{line[key]:.2f}" for key in keys)
        shape = " x ".join(map(str, line.get("shape", [])))
        rows.append(f"| {line['matrix']} {shape} | {cells} | {authors / ours:.1f} |")
    return rows


def main() -> None:
    """Measure all matrices of one block."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("block", help="s, b32, l14 or OUTPUTSxINPUTS")
    parser.add_argument("--timed", type=int)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--twin", type=float)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    # As a run does: large temporaries cost fresh pages.
    return_freed_memory()
    if args.block in BLOCKS:
        tokens, width = BLOCKS[args.block]
        shapes = {name: (width * out, width * in_) for name, (out, in_) in MATRICES.items()}
    else:
        outputs, inputs = map(int, args.block.split("x"))
        tokens, shapes = 2 * inputs, {"matrix": (outputs, inputs)}
    lines = []
    for name, shape in shapes.items():
        lines.append(measure(name, shape, args.tokens or tokens, args))
        print(json.dumps(lines[-1]), flush=True)
    print("\n".join(table(lines)))


if __name__ == "__main__":
    main()
