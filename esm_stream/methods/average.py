"""Weight averaging: the mean of all experts' updates (methods.md 3.1).

From:  the engine, panels of base and experts.
To:    the engine, the merged panel.
Peak:  one panel.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from esm_stream.methods.contract import About, ElementwiseMethod, Panel
from esm_stream.methods.options import AverageOptions
from esm_stream.methods.signs import weighted_sum


class Average(ElementwiseMethod):
    """W = W0 + alpha * sum of a_t D_t / sum of a_t.

    With alpha = 1 it is the mean of the experts' weights. Experts without update count as zero.
    """

    name: ClassVar[str] = "average"
    Options = AverageOptions
    about: ClassVar[About] = About(
        summary="Mean of the experts' weights.",
        source="Wortsman et al. 2022, model soups, arXiv 2203.05482",
        data="none",
        passes="1",
        memory="panels",
        when="a baseline; what is not a matrix in a block, beside other methods",
    )

    def merge(self, panel: Panel, known: Sequence[Any]) -> Tensor:  # noqa: ARG002
        """Mean of the updates, weighted where the manifest gives weights."""
        return weighted_sum(panel.updates_TN, panel.weights, normalize=True)
