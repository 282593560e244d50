"""Iso-C: the sum of all updates with a flat spectrum (methods.md 3.1).

From:  the engine, the experts' updates of one matrix.
To:    the engine, the merged update.
Peak:  float64: the sum, and its polar factor (subspace/polar.py).

Letters: O output features, I input features.
"""

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from esm_stream.methods.contract import About, Merged, MethodOptions, SpectralMethod, Updates
from esm_stream.subspace.polar import Polar, polar
from esm_stream.subspace.sizes import polar_numbers


class IsoCOptions(MethodOptions):
    """Options of Iso-C."""

    compact: bool = Field(
        False,
        description="Take the mean over the directions that exist instead of over all; for "
        "updates of low rank, where the mean over all is small.",
    )


class IsoC(SpectralMethod):
    """With U S V^T the SVD of the sum of a_t D_t: D = mean(S) U V^T.

    Directions below 1e-7 of the largest singular value are dropped, but count in the mean.
    """

    name: ClassVar[str] = "iso_c"
    Options = IsoCOptions
    about: ClassVar[About] = About(
        summary="Sums the updates and makes all directions equally strong.",
        source="Marczak et al. 2025, arXiv 2502.04959",
        data="none",
        passes="1",
        memory="one matrix, whatever the number of experts",
        when="distinct experts without samples; the fastest of the SVD methods",
    )

    def merge(self, updates: Updates, shape: tuple[int, int]) -> Merged:
        """Polar factor of the sum, times the mean singular value."""
        flat = polar(sum_of(updates))
        level = flat.mean_singular_value
        if self.options.compact:
            level *= min(shape) / max(min(shape) - flat.dropped, 1)
        return Merged(flat.factor.mul_(level), spectrum_of(flat))

    def peak_numbers(self, shape: tuple[int, int], num_experts: int) -> int:  # noqa: ARG002
        """The sum, and an update or the polar factor."""
        return shape[0] * shape[1] + max(shape[0] * shape[1], polar_numbers(*shape))


def sum_of(updates: Updates) -> Tensor:
    """Sum of all updates, float64."""
    streamed = iter(updates)
    total_OI = next(streamed).double()
    for update_OI in streamed:
        total_OI += update_OI
    return total_OI


def spectrum_of(flat: Polar) -> dict[str, float]:
    """What the report tells of a flattened spectrum."""
    return {"condition": flat.condition, "dropped": flat.dropped}
