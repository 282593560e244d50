"""NuSLERP: spherical interpolation between the updates of two experts (methods.md 3.2)."""

from typing import ClassVar

from torch import Tensor

from esm_stream.methods.contract import About, MethodOptions, Whole
from esm_stream.methods.gram import GramMethod, Span, arc

_NEARLY_PARALLEL = 1 - 1e-12
_ZERO_NORM = 1e-7


class NuslerpOptions(MethodOptions):
    """Weights come from the manifest; there is nothing else to choose."""


class Nuslerp(GramMethod):
    """SLERP of D_1 and D_2 at t = a_2 / (a_1 + a_2), added to the base."""

    name: ClassVar[str] = "nuslerp"
    Options = NuslerpOptions
    max_experts: ClassVar[int | None] = 2
    of_weights: ClassVar[bool] = False
    about: ClassVar[About] = About(
        summary="Spherical interpolation between the updates of two experts.",
        source="mergekit (Goddard et al. 2024, arXiv 2403.13257)",
        data="none",
        passes="2",
        memory="panels",
        when="two experts of one base",
    )

    def coefficients(self, span: Span, whole: Whole) -> Tensor:
        """Sines of the shares of the angle between the updates."""
        first, second = whole.weights
        share = second / (first + second) if abs(first + second) >= 1e-6 else 0.5
        return arc(span, share, _NEARLY_PARALLEL, _ZERO_NORM)
