"""Peak memory of the numeric steps of one matrix, each in a process of its own.

    python tests/benchmarks/peaks.py factor|combine OUTPUTS INPUTS RANK [--singular]
    python tests/benchmarks/peaks.py METHOD OUTPUTS INPUTS EXPERTS

METHOD merges from updates alone: iso_c, iso_cts, cart, dc_merge, knots, core_space, wudi.

Prints one line of JSON: the peak of RssAnon above what the process held before the step, and what
the plan projects for it. Factors are read from a store, as in a merge; `--singular` makes two
experts equal, so that the stack of bases lacks directions.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from esm_stream import budget
from esm_stream.allocation import return_freed_memory
from esm_stream.methods import create, is_factor_method
from esm_stream.methods.contract import FactorMethod, Factors, Moment, SpectralMethod
from esm_stream.store.factors import FactorStore

EXPERTS = 8


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon:")).split()[1]) * 1024


class Watch:
    """Peak of RssAnon while a block runs, sampled every few milliseconds by a thread."""

    def __enter__(self) -> "Watch":
        self._stop, self._before = threading.Event(), anonymous_bytes()
        self.above = 0
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.is_set():
            self.above = max(self.above, anonymous_bytes() - self._before)
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def method_of(rank: int) -> FactorMethod:
    """ESM with all levels."""
    method = create("esm", {"profile": "vit-official", "rank": rank}, "vision")
    assert is_factor_method(method)
    return method


def factor(outputs: int, inputs: int, rank: int) -> tuple[int, int]:
    """Measured and projected bytes of one expert's basis and coordinates."""
    random = torch.Generator().manual_seed(0)
    kind = "shift" if inputs > outputs else "input"
    side = outputs if kind == "shift" else inputs
    rows = torch.randn(side // 4, side, generator=random, dtype=torch.float64)
    moment = Moment(kind, rows.T @ rows, len(rows))
    moment.matrix.diagonal().add_(1)
    del rows
    with Watch() as watch:
        update = torch.empty(outputs, inputs).normal_(generator=random)
        method_of(rank).factor(update, moment, EXPERTS)
    return watch.above, budget.basis_bytes(outputs, inputs, rank)


def combine(outputs: int, inputs: int, rank: int, *, singular: bool) -> tuple[int, int]:
    """Measured and projected bytes of combining all experts' stored factors."""
    with tempfile.TemporaryDirectory() as folder:
        store = FactorStore(Path(folder))
        store.create("m", EXPERTS, outputs, inputs, rank)
        for expert in range(EXPERTS):
            seed = max(1, expert) if singular else expert
            store.write_factors("m", expert, random_factors(outputs, inputs, rank, seed))
        with Watch() as watch:
            factors = [store.read_factors("m", t, rank, 1.0) for t in range(EXPERTS)]
            merged = method_of(rank).combine(factors, (outputs, inputs))
    print(dict(merged.diagnostics), file=sys.stderr)
    return watch.above, budget.combine_bytes(outputs, inputs, EXPERTS * rank, forms_stacks=False)


class RandomUpdates:
    """Updates that are made when they are asked for."""

    def __init__(self, outputs: int, inputs: int, experts: int) -> None:
        self.shape, self.experts, self.device = (outputs, inputs), experts, torch.device("cpu")

    def __iter__(self) -> Iterator[torch.Tensor]:
        for number in range(self.experts):
            random = torch.Generator().manual_seed(number)
            yield torch.empty(self.shape).normal_(generator=random)

    def __len__(self) -> int:
        return self.experts


def spectral(name: str, outputs: int, inputs: int, experts: int) -> tuple[int, int]:
    """Measured and projected bytes of a method that merges from updates alone."""
    method = create(name, {}, "vision")
    assert isinstance(method, SpectralMethod)
    with Watch() as watch:
        method.merge(RandomUpdates(outputs, inputs, experts), (outputs, inputs))
    return watch.above, method.peak_numbers((outputs, inputs), experts) * budget.F64


def random_factors(outputs: int, inputs: int, rank: int, seed: int) -> Factors:
    """Factors of one expert with columns that are nearly orthonormal."""
    random = torch.Generator().manual_seed(seed)
    basis = torch.randn(outputs, rank, generator=random) / outputs**0.5
    coordinates = torch.randn(rank, inputs, generator=random)
    spectrum = torch.linspace(2, 1, min(outputs, inputs), dtype=torch.float64)
    return Factors(basis, coordinates, spectrum, 1.0)


def main() -> None:
    """Measure one step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", help="factor, combine, or a method")
    parser.add_argument("outputs", type=int)
    parser.add_argument("inputs", type=int)
    parser.add_argument("count", type=int, help="rank, or experts")
    parser.add_argument("--singular", action="store_true")
    args = parser.parse_args()
    sizes = args.outputs, args.inputs, args.count
    return_freed_memory()
    started = time.process_time()
    if args.step == "factor":
        measured, projected = factor(*sizes)
    elif args.step == "combine":
        measured, projected = combine(*sizes, singular=args.singular)
    else:
        measured, projected = spectral(args.step, *sizes)
    seconds = time.process_time() - started
    matrices = round(measured / (args.outputs * args.inputs * budget.F32), 1)
    line = {"measured": measured, "projected": projected, "matrices": matrices}
    line["cpu_seconds"] = round(seconds, 1)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
