"""Polarised scaling: factors (value / mean)^q at the level of experts, input features and layers.

A mean of 0 leaves everything unscaled; a zero among others gets the factor 0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence


Variant = Literal["both", "reverse", "noise", "signal"]


def relative_powers(
    values: Sequence[float], exponent: float, variant: Variant = "both"
) -> list[float]:
    """(value / mean)^q of each value, zeros counted in the mean; all 1.0 where the mean is 0.

    The sum is exact, so the order of the values changes nothing.

    Args:
        values: Norms, 0 or above.
        exponent: Power q.
        variant: What becomes of a factor f (methods.md 1.4): itself, 1 / f ("reverse"; 0 stays 0),
            min(f, 1) ("noise"), max(f, 1) ("signal").
    """
    mean = math.fsum(values) / max(len(values), 1)
    return [_varied((value / mean) ** exponent, variant) if mean else 1.0 for value in values]


def _varied(factor: float, variant: Variant) -> float:
    if variant == "reverse":
        return 1 / factor if factor else 0.0
    if variant == "noise":
        return min(factor, 1.0)
    return max(factor, 1.0) if variant == "signal" else factor
