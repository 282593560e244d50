"""Sizes as people write them, and what the tasks of each stage need in memory.

The projections are upper bounds of anonymous memory above the import base, in bytes. They are used
by the plan (a task over the budget is refused before the first one starts) and by the scheduler
(a task starts when its bytes are free). tests/integration/test_memory.py holds them to it.

Letters: T experts, O output features, I input features, K rank of one expert.
"""

import re
from typing import Final

from esm_stream.errors import ManifestError

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
UNITS: Final = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": KIB,
    "MIB": MIB,
    "GIB": GIB,
    "TIB": 1 << 40,
}
F32: Final = 4
F64: Final = 8
# Interpreter-side buffers of a task: Zarr chunks being encoded, JSON, allocator slack.
TASK_OVERHEAD: Final = 32 * MIB
PANEL_BYTES: Final = 16 * MIB
# Numbers that a panel of all experts holds: float64 temporaries of it stay below LARGE_BYTES of
# allocation.py, so that they are reused and stay in the processor's cache.
STACK_NUMBERS: Final = 1 << 16
FEWEST_ELEMENTS: Final = 1 << 10
# The largest statistic of an expert: a histogram of methods/thresholds.py.
HISTOGRAM_BYTES: Final = 2 * MIB


def parse_size(text: str | int) -> int:
    """Bytes of a size such as "8GiB", "500 MB" or 1048576.

    Raises:
        ManifestError: The text is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = UNITS.get((match[2] or "B").upper()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size <= 0:
        raise ManifestError(f'\'{text}\' is not a size; write for example "8GiB" or "500MB"')
    return size


def format_size(size: float) -> str:
    """A size for people: 3 significant digits in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1000 or unit == "GiB":
            break
        size /= 1024
    if abs(size) >= 1000 and unit == "GiB":
        size, unit = size / 1024, "TiB"
    if unit == "B":
        return f"{size:.0f} B"
    return f"{size:.{max(0, 2 - len(str(int(abs(size)))) + 1)}f} {unit}"


def format_flops(flops: float) -> str:
    """A number of floating-point operations for people."""
    for unit in ("", "k", "M", "G", "T"):
        if flops < 1000:
            return f"{flops:.3g} {unit}FLOP"
        flops /= 1000
    return f"{flops:,.4g} PFLOP"


def panel_elements(num_experts: int, columns: int = 1) -> int:
    """Elements of one panel of an elementwise method: a multiple of `columns`, at least one."""
    fitting = max(FEWEST_ELEMENTS, STACK_NUMBERS // num_experts)
    return max(1, fitting // columns) * columns


def eigh_bytes(side: int) -> int:
    """Peak of a symmetric eigenproblem: matrix, vectors and the divide-and-conquer workspace."""
    return 5 * side * side * F64


def eigh_flops(side: int) -> float:
    """Operations of a symmetric eigendecomposition: reduction, divide and conquer, vectors."""
    return 9.0 * side**3


def svd_flops(outputs: int, inputs: int) -> float:
    """Operations of a thin singular value decomposition with both sides' vectors."""
    return 14.0 * outputs * inputs * min(outputs, inputs)


def moment_bytes(kind: str, outputs: int, inputs: int) -> int:
    """One running second moment, float64, with one float32 product in flight."""
    side = inputs if kind == "input" else outputs
    return side * side * (F64 + F32)


def basis_bytes(outputs: int, inputs: int) -> int:
    """Peak of one expert's basis and coordinates, moment excluded: float64 update and products.

    Tall matrices also hold the Cholesky factor of the moment and two products with it.
    """
    side = min(outputs, inputs)
    cholesky = 3 * side * side * F64 if outputs > inputs else 0
    return 4 * outputs * inputs * F64 + eigh_bytes(side) + cholesky


def basis_flops(outputs: int, inputs: int, rank: int) -> float:
    """Operations of one expert's basis and coordinates by the smaller side (methods.md 1.5)."""
    side = min(outputs, inputs)
    products = 2.0 * outputs * inputs * side + 2.0 * inputs * inputs * side
    return products + eigh_flops(side) + 4.0 * outputs * inputs * rank


def combine_bytes(outputs: int, inputs: int, columns: int) -> int:
    """Peak of combining all experts' factors; `columns` is the sum of their ranks.

    The stored factors in float32, and the larger of: polar factor of the stacked bases, of the
    stacked coordinates beside it, and their product; each by the SVD that a nearly singular stack
    needs (a copy, both singular bases and the workspace).
    """
    left, right = min(outputs, columns), min(inputs, columns)
    bases, coordinates = outputs * columns, columns * inputs
    numbers = max(
        4 * bases + 6 * left**2,
        bases + 4 * coordinates + 6 * right**2,
        bases + coordinates + 2 * outputs * inputs,
    )
    return (bases + coordinates) * F32 + numbers * F64


def combine_flops(outputs: int, inputs: int, columns: int) -> float:
    """Operations of both polar factors and their product."""
    left, right = min(outputs, columns), min(inputs, columns)
    polar = 4.0 * outputs * columns * left + eigh_flops(left)
    return (
        polar
        + 4.0 * inputs * columns * right
        + eigh_flops(right)
        + 2.0 * outputs * columns * inputs
    )
