"""Consensus task arithmetic: only what matters to several experts (methods.md 3.1).

From:  the engine, panels of base and experts.
To:    the engine, the merged panel.
Peak:  one panel.

Letters: T experts, N elements of a panel.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, NonNegativeInt
from torch import Tensor

from esm_stream.methods.contract import About, ElementwiseMethod, MethodOptions, Panel, each
from esm_stream.methods.signs import weigh

_Threshold = Annotated[float, Field(ge=0)]


class ConsensusTaOptions(MethodOptions):
    """Options of consensus task arithmetic."""

    threshold: _Threshold | dict[str, _Threshold] = Field(
        0.4,
        description="An element matters to expert t where |D_t| is larger than this times what "
        "the other experts change it by; chosen from 0.2 to 0.6 with validation data.",
    )
    agreement: NonNegativeInt = Field(
        2, description="Experts to which an element has to matter; 0 keeps all elements."
    )


class ConsensusTa(ElementwiseMethod):
    """Add the updates, and keep the elements that matter to at least `agreement` experts.

    With S the sum of all a_t D_t, an element matters to t where |D_t| > threshold_t |S - D_t|.
    agreement = 0 is task arithmetic, 1 removes what matters to nobody, more than T gives the base.
    """

    name: ClassVar[str] = "consensus_ta"
    Options = ConsensusTaOptions
    default_alpha: ClassVar[float] = 0.4
    about: ClassVar[About] = About(
        summary="Adds the updates, keeps elements that matter to several experts.",
        source="Wang et al. 2024 (TALL masks), arXiv 2405.07813",
        data="none",
        passes="1",
        memory="panels",
        when="many experts, better than task arithmetic at the same cost",
    )

    def merge(self, panel: Panel, known: Sequence[Any]) -> Tensor:  # noqa: ARG002
        """Sum of the updates where enough experts agree that it matters."""
        updates_TN = weigh(panel.updates_TN, panel.weights)
        total_N = updates_TN.sum(dim=0)
        thresholds = each(self.options.threshold, panel.experts)
        others_TN = weigh(updates_TN.sub(total_N).abs_(), thresholds)
        count_N = (updates_TN.abs_() > others_TN).sum(dim=0)
        return total_N.mul_(count_N >= self.options.agreement)
