"""SLERP: spherical interpolation between the weights of two experts (methods.md 3.1)."""

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from esm_stream.methods.contract import About, MethodOptions, Whole
from esm_stream.methods.gram import GramMethod, Span, arc

_NEARLY_PARALLEL = 0.9995
_ZERO_NORM = 1e-8


class SlerpOptions(MethodOptions):
    """Options of SLERP."""

    t: float = Field(
        0.5, ge=0, le=1, description="Place on the arc: 0 is the first expert, 1 the second."
    )


class Slerp(GramMethod):
    """W = [sin((1-t) a) W_1 + sin(t a) W_2] / sin a, with a the angle between W_1 and W_2.

    Tensors with |cos a| above 0.9995 are interpolated linearly. The base has no part in it; give
    the first model as base too if there is no other.
    """

    name: ClassVar[str] = "slerp"
    Options = SlerpOptions
    max_experts: ClassVar[int | None] = 2
    about: ClassVar[About] = About(
        summary="Spherical interpolation between two models.",
        source="Shoemake 1985",
        data="none",
        passes="2",
        memory="panels",
        when="two models, a blend that keeps the norm of the weights",
    )

    def coefficients(self, span: Span, whole: Whole) -> Tensor:  # noqa: ARG002
        """Sines of the shares of the angle."""
        return arc(span, self.options.t, _NEARLY_PARALLEL, _ZERO_NORM)
