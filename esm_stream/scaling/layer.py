"""Scaling between layers of one role: a second pass over norms alone, no tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esm_stream.scaling import Variant, relative_powers

if TYPE_CHECKING:
    from collections.abc import Mapping


def layer_scales(
    norms: Mapping[str, float], exponent: float = 2.0, variant: Variant = "both"
) -> dict[str, float]:
    """Scale of each layer of one group, (norm / mean norm)^q (ESM eq. 16; methods.md 1.1, step 8).

    Args:
        norms: Frobenius norm of each layer's merged update before scaling, zeros included.
        exponent: Power q.
        variant: See `relative_powers`.

    Returns:
        One scale per layer; all 1.0 where the group has no update at all.
    """
    return dict(zip(norms, relative_powers(list(norms.values()), exponent, variant), strict=True))
