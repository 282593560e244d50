"""Weight averaging: the mean of all experts' updates (methods.md 3.1).

From:  the engine, one row panel of every expert in turn.
To:    the engine, the merged panel.
Peak:  one float32 sum and the panel being added.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


class Average:
    """Mean of the updates; experts without update count as zero."""

    name = "average"

    def merge(self, updates: Iterable[Tensor]) -> Tensor:
        """Mean of float32 panels of one shape, summed in float32 in the order given.

        Raises:
            ValueError: There is no panel.
        """
        panels = iter(updates)
        first = next(panels, None)
        if first is None:
            raise ValueError("an average needs at least one expert")
        total, count = first.to(torch.float32, copy=True), 1
        for update in panels:
            total += update
            count += 1
        return total.div_(count)
