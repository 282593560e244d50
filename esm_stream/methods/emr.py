"""EMR's unified update: elected signs, largest magnitudes (methods.md 3.2).

From:  the engine, panels of base and experts.
To:    the engine, the merged panel.
Peak:  one panel.

Letters: T experts, N elements of a panel.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from esm_stream.methods.contract import About, ElementwiseMethod, MethodOptions, Panel
from esm_stream.methods.signs import elected_signs, weigh


class EmrOptions(MethodOptions):
    """The unified update has nothing to choose."""


class Emr(ElementwiseMethod):
    """Per element, the sign of the sum of all D_t, and the largest |D_t| among those that have it.

    This is the shared part of EMR-merging. Its masks and scalars, with which one expert is restored
    from it at inference, are not written.
    """

    name: ClassVar[str] = "emr"
    Options = EmrOptions
    default_alpha: ClassVar[float] = 0.3
    about: ClassVar[About] = About(
        summary="Elects signs and takes the largest change that has them.",
        source="Huang et al. 2024, arXiv 2405.17461 (the unified model)",
        data="none",
        passes="1",
        memory="panels",
        when="as a start for masks of your own; too large for a merge without a small alpha",
    )

    def merge(self, panel: Panel, known: Sequence[Any]) -> Tensor:  # noqa: ARG002
        """Largest update that agrees with the elected sign."""
        updates_TN = weigh(panel.updates_TN, panel.weights)
        signs_N = elected_signs(updates_TN)
        return updates_TN.mul_(signs_N).relu_().amax(dim=0).mul_(signs_N)
