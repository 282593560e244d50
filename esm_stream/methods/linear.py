"""Linear combination of the experts' weights (methods.md 3.1).

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


class LinearOptions(MethodOptions):
    """Options of the linear combination."""

    normalize: bool = Field(
        True, description="Divide by the sum of the weights, so that the result is a mean."
    )


class Linear(ElementwiseMethod):
    """W = sum of a_t W_t, divided by the sum of a_t if `normalize`.

    The base has no part in it, except that alpha multiplies what differs from the base: with
    alpha = 1 the result does not depend on it.
    """

    name: ClassVar[str] = "linear"
    Options = LinearOptions
    about: ClassVar[About] = About(
        summary="Weighted mean, or weighted sum, of the experts' weights.",
        source="Wortsman et al. 2022, model soups, arXiv 2203.05482",
        data="none",
        passes="1",
        memory="panels",
        when="checkpoints of one training run; a mix whose shares you know",
    )

    def merge(self, panel: Panel, known: Sequence[Any]) -> Tensor:  # noqa: ARG002
        """Sum of a_t D_t, and what the base lacks where the weights do not sum to 1."""
        update_N = weighted_sum(panel.updates_TN, panel.weights, self.options.normalize)
        if not self.options.normalize:
            update_N.add_(panel.base_N, alpha=sum(panel.weights) - 1.0)
        return update_N
