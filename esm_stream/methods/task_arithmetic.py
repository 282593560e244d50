"""Task arithmetic: the sum of the experts' updates (methods.md 3.1).

From:  the engine, panels of base and experts.
To:    the engine, the merged panel.
Peak:  one panel.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from esm_stream.methods.contract import About, ElementwiseMethod, MethodOptions, Panel
from esm_stream.methods.signs import weighted_sum


class TaskArithmeticOptions(MethodOptions):
    """Options of task arithmetic."""

    normalize: bool = Field(False, description="Divide by the sum of the weights.")


class TaskArithmetic(ElementwiseMethod):
    """W = W0 + alpha * sum of a_t D_t.

    alpha = 1 / T makes it the average, alpha = 0 gives the base; negative weights remove skills.
    """

    name: ClassVar[str] = "task_arithmetic"
    Options = TaskArithmeticOptions
    default_alpha: ClassVar[float] = 0.3
    about: ClassVar[About] = About(
        summary="Sum of the experts' updates, times alpha.",
        source="Ilharco et al. 2023, arXiv 2212.04089",
        data="none",
        passes="1",
        memory="panels",
        when="the safe default for experts found in the wild; search alpha",
    )

    def merge(self, panel: Panel, known: Sequence[Any]) -> Tensor:  # noqa: ARG002
        """Sum of the updates, weighted where the manifest gives weights."""
        return weighted_sum(panel.updates_TN, panel.weights, self.options.normalize)
