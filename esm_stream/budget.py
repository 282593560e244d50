"""Sizes as people write them, and what the tasks of each stage need in memory.

The projections are upper bounds of anonymous memory above the import base, in bytes. They are used
by the plan (a task over the budget is refused before the first one starts) and by the scheduler
(a task starts when its bytes are free). tests/integration/test_memory.py holds them to it.

Letters: T experts, O output features, I input features, K rank of one expert.
"""

import math
import re
from typing import Final

from esm_stream.errors import ManifestError
from esm_stream.subspace.sizes import (
    PANEL_ROWS,
    TYPICAL_SHIFTS,
    block_of_band,
    block_of_bidiagonal,
    is_banded,
    is_reduced,
    root_numbers,
)

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
ACTIVATION_BUFFERS: Final = 8
PANEL_BYTES: Final = 16 * MIB
# Sums of matrices with one input take at most the budget divided by this, where several can wait.
SUMS_SHARE: Final = 4
# Pinned memory through which weights go to a GPU, twice (stages/transfer.py).
STAGING_BYTES: Final = 32 * MIB
# Numbers that a panel of all experts holds: float64 temporaries of it stay below LARGE_BYTES of
# allocation.py, so that they are reused and stay in the processor's cache.
STACK_NUMBERS: Final = 1 << 17
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
    number = float(match[1]) * unit if match and unit else 0.0
    size = int(number) if math.isfinite(number) else 0
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


def activation_bytes(tokens: int, widest: int) -> int:
    """What a block holds of a micro-batch while it computes; `widest` is its largest dimension."""
    return tokens * widest * F32 * ACTIVATION_BUFFERS


def eigh_bytes(side: int) -> int:
    """Peak of a symmetric eigenproblem: matrix, vectors and the divide-and-conquer workspace."""
    return 5 * side * side * F64


def eigh_flops(side: int) -> float:
    """Operations of a symmetric eigendecomposition: reduction, divide and conquer, vectors."""
    return 9.0 * side**3


def svd_flops(outputs: int, inputs: int) -> float:
    """Operations of a thin singular value decomposition with both sides' vectors."""
    return 14.0 * outputs * inputs * min(outputs, inputs)


def moment_bytes(kind: str, outputs: int, inputs: int, number: int = F64) -> int:
    """One running second moment with its rows in flight; of shifts with the update.

    As many rows as there are inputs are kept in float32 before a moment of inputs is begun, whose
    numbers have `number` bytes.
    """
    if kind == "input":
        return inputs**2 * (number + F32) + PANEL_ROWS * inputs * number
    rows = PANEL_ROWS * (inputs * F32 + outputs * (F32 + F64))
    return outputs**2 * F64 + rows + outputs * inputs * F32


def basis_bytes(outputs: int, inputs: int, rank: int, *, by_svd: bool = False) -> int:
    """Peak of one expert's basis and coordinates, moment excluded.

    The update in float32; the eigenproblem on the smaller side (on the input side with the root of
    the moment and two products); panels; basis and coordinates in float64, and once more as they
    are stored. `by_svd`: the singular value decomposition of the whole update in float64.
    """
    side = min(outputs, inputs)
    square = side * side * F64
    if by_svd:
        return eigh_bytes(side) + 4 * square + 4 * outputs * inputs * F64
    squares = eigh_bytes(side) + (4 if outputs > inputs else 1) * square
    panels = 3 * PANEL_ROWS * inputs * F64
    results = rank * (outputs + inputs) * (F64 + F32) + rank**2 * 2 * F64
    return outputs * inputs * F32 + squares + panels + results


def basis_flops(outputs: int, inputs: int, rank: int) -> float:
    """Operations of one expert's basis and coordinates by the smaller side (methods.md 1.5)."""
    side = min(outputs, inputs)
    if outputs > inputs:
        products = 1.0 * outputs * inputs**2 + 1.0 * inputs**3 + 2.0 * outputs * inputs * rank
        return products + eigh_flops(side) + 2.0 * inputs**2 * rank
    products = 2.0 * outputs * inputs**2 + 1.0 * outputs**2 * inputs
    return products + eigh_flops(side) + 2.0 * outputs * inputs * rank


def combine_bytes(outputs: int, inputs: int, columns: int, *, forms_stacks: bool) -> int:
    """Peak of combining all experts' factors; `columns` is the sum of their ranks.

    The coordinates as read, in float32; the largest of: the root of the bases beside the stacked
    coordinates, that of the coordinates, and the product; the update in float32. `forms_stacks`:
    the same with both stacks and their singular vectors at hand.
    """
    left, right = min(outputs, columns), min(inputs, columns)
    bases, coordinates = outputs * columns, columns * inputs
    if forms_stacks:
        numbers = max(
            4 * bases + 6 * left**2,
            bases + 4 * coordinates + 6 * right**2,
            bases + coordinates + 2 * outputs * inputs,
        )
        return (bases + coordinates) * F32 + numbers * F64
    panel = PANEL_ROWS * max(columns, inputs) + outputs * columns * (outputs < columns) // 2
    left_work, left_kept = root_numbers(left, right)
    right_work, right_kept = root_numbers(right, columns)
    inner = columns * right if columns <= inputs else coordinates
    spread = outputs * right if outputs < columns else 0
    product = left_kept + right_kept + coordinates + 2 * inner + spread + 4 * PANEL_ROWS * left
    numbers = max(coordinates + left_work, coordinates + left_kept + right_work, product)
    return (coordinates + outputs * inputs) * F32 + (numbers + 3 * panel) * F64


def combine_flops(outputs: int, inputs: int, columns: int) -> float:
    """Operations of both roots of Gram matrices and the product."""
    left, right = min(outputs, columns), min(inputs, columns)
    grams = inputs * columns * right
    roots = root_flops(right, columns)
    if columns <= outputs and is_reduced(outputs, columns, right):
        sweeps = 8.0 * TYPICAL_SHIFTS * block_of_bidiagonal(columns) * columns * right
        roots += (
            4.0 * columns**2 * (outputs - columns / 3) + 4.0 * outputs * columns * right + sweeps
        )
    else:
        grams += outputs * columns * left
        roots += root_flops(left, right)
    return grams + roots + 2.0 * outputs * columns * min(right + inputs, 2 * inputs)


def root_flops(side: int, columns: int) -> float:
    """Operations of K^(-1/2) applied to columns: eigenvectors, or reduction, sweeps, rotations."""
    if not is_banded(side, columns):
        return eigh_flops(side) + 2.0 * side**3 + 2.0 * side**2 * columns
    sweeps = 8.0 * TYPICAL_SHIFTS * block_of_band(side) * side * columns
    return 4.0 / 3.0 * side**3 + 4.0 * side**2 * columns + sweeps
