"""Singular value calibration: directions that several experts have in common are scaled down.

Where experts agree on a direction, the merged update carries it once for each of them. How often is
seen in what the merged update has there, beside what each expert has (methods.md 3.1, SVC).

From:  the merged update of one matrix, and all experts' updates of it, one at a time.
To:    the same update with other singular values.
Peak:  float64: three matrices and the workspace of an eigenproblem of the smaller side.

Letters: O output features, I input features, R directions: the smaller side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

# Directions this much weaker than the first are rounding, and stay as they are.
_NOISE: Final = 1e-7
_SMALLEST_SQUARE: Final = 1e-12


def calibrated(update_OI: Tensor, updates: Iterable[Tensor], floor: float) -> tuple[Tensor, Tensor]:
    """Multiply each singular value by T / sum over experts of max(floor, s_r^t).

    With u_r a left singular vector, a_r = u_r^T D and a_r^t = u_r^T D_t, the projection is
    s_r^t = <a_r, a_r^t> / |a_r^t|^2: 1 where the merged update has what expert t has, T where it
    has it T times, 0 where the expert has nothing.

    Args:
        update_OI: Merged update D.
        updates: Updates D_t of all T experts, any float dtype.
        floor: Lower bound of the projections; with 1 or more nothing is scaled up.

    Returns:
        The update, float64, and the factor of every direction, strongest first, shape (R,).
    """
    update_OI = update_OI.double()
    if update_OI.shape[0] > update_OI.shape[1]:
        # Of D^T the right singular vectors are wanted, whose projections are those of D.
        turned_IO, factors_R = _calibrated(update_OI.T, updates, floor, turned=True)
        return turned_IO.T, factors_R
    return _calibrated(update_OI, updates, floor, turned=False)


def _calibrated(
    wide_RN: Tensor, updates: Iterable[Tensor], floor: float, *, turned: bool
) -> tuple[Tensor, Tensor]:
    """The same for a matrix that is at least as wide as high; D is its transpose if `turned`."""
    squares_R, basis_RR = torch.linalg.eigh(wide_RN @ wide_RN.T)
    squares_R, basis_RR = squares_R.flip(0), basis_RR.flip(1)
    real_R = squares_R > _NOISE**2 * squares_R[0]
    squares_R = squares_R.clamp(min=0)
    total_R, count = torch.zeros_like(squares_R), 0
    for one in updates:
        total_R += _projections(wide_RN, basis_RR, squares_R, one.double(), turned).clamp(min=floor)
        count += 1
    factors_R = torch.where(real_R, count / total_R, 1.0)
    return (basis_RR * factors_R) @ (basis_RR.T @ wide_RN), factors_R


def _projections(
    wide_RN: Tensor, basis_RR: Tensor, squares_R: Tensor, one: Tensor, turned: bool
) -> Tensor:
    """s_r^t of one expert, shape (R,)."""
    if turned:
        # u_r = D v_r / sigma_r, so that u_r^T D_t = v_r^T (D^T D_t) / sigma_r.
        found_RR = basis_RR.T @ (wide_RN @ one)
        lengths_R = found_RR.square().sum(1) / squares_R.clamp(min=torch.finfo().tiny)
        products_R = (found_RR * basis_RR.T).sum(1)
    else:
        found_RN = basis_RR.T @ one
        lengths_R = found_RN.square().sum(1)
        products_R = (found_RN * (basis_RR.T @ wide_RN)).sum(1)
    return products_R / lengths_R.clamp(min=_SMALLEST_SQUARE)


def calibration_numbers(shape: tuple[int, int]) -> int:
    """Upper bound of the float64 numbers that `calibrated` holds, one float32 update included."""
    return 5 * shape[0] * shape[1] + 7 * min(shape) ** 2
