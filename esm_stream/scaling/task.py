"""Scaling between experts: one factor for all coordinates of an expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esm_stream.scaling import Variant, relative_powers

if TYPE_CHECKING:
    from collections.abc import Sequence


def task_factors(norms: Sequence[float], exponent: float, variant: Variant = "both") -> list[float]:
    """Factor gamma_t of each expert, (norm / mean norm)^q (ESM eq. 14; methods.md 1.1, step 4).

    Args:
        norms: Frobenius norm of each expert's coordinates, zeros for experts without update.
        exponent: Power q.
        variant: See `relative_powers`.
    """
    return relative_powers(norms, exponent, variant)
