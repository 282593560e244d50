"""Sizes that decide how a matrix is worked on, for the numerics and the plan. Imports no torch.

They are constants, not shares of the memory budget: a panel's size decides the last bits of a
product, and those shall be the same whatever the budget.
"""

# Rows of a panel of a stack, of an update, of a basis as stored.
PANEL_ROWS = 1024
# Of a symmetric matrix the lower triangle is computed, by tiles; those on the diagonal are whole.
TILE = 256
# Columns that are solved for together.
TILE_COLUMNS = 1024
# Shifts of an inverse root for singular values over five decades.
TYPICAL_SHIFTS = 25


def block_of_band(side: int) -> int:
    """Side of a block of the banded form; divides TILE."""
    return 32 if side < 2048 else 64


def block_of_bidiagonal(side: int) -> int:
    """Side of a block of the bidiagonal form."""
    return 32 if side < 6144 else 64


def is_reduced(rows: int, side: int, columns: int) -> bool:
    """Whether the polar factor of such a tall matrix is first tried by its bidiagonal form.

    With more rows the Gram matrix is the smaller thing to reduce.
    """
    return is_banded(side, columns) and 2 * rows <= 3 * side


def is_banded(side: int, columns: int) -> bool:
    """Whether K^(-1/2) of this side is applied to columns by the banded form, not eigenvectors."""
    return side >= (1024 if 2 * columns <= side else 2048)


def polar_numbers(rows: int, columns: int) -> int:
    """Float64 numbers while a polar factor is found, the matrix itself not counted."""
    work, kept = root_numbers(min(rows, columns), min(rows, columns))
    return max(work, kept + min(rows, columns) ** 2 + rows * columns)


def root_numbers(side: int, columns: int) -> tuple[int, int]:
    """Float64 numbers while the root of a Gram matrix is found, and that it then consists of.

    The root of a nearly singular matrix consists of two banded forms (subspace/polar.py).
    """
    banded = 2 * side**2 + 8 * PANEL_ROWS * side
    work = banded if is_banded(side, columns) else max(6 * side**2, banded)
    return work, 2 * side**2
