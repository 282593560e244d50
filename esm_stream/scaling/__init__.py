"""Polarised scaling: factors (value / mean)^q at the level of experts, input features and layers.

A mean of 0 leaves everything unscaled; a zero among others gets the factor 0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def relative_powers(values: Sequence[float], exponent: float) -> list[float]:
    """(value / mean)^q of each value, zeros counted in the mean; all 1.0 where the mean is 0.

    The sum is exact, so the order of the values changes nothing.
    """
    mean = math.fsum(values) / max(len(values), 1)
    return [(value / mean) ** exponent if mean else 1.0 for value in values]
