"""RAM: keep what one expert changed, average what several changed (methods.md 3.1).

From:  the engine, panels of base and experts.
To:    the engine, the merged panel.
Peak:  one panel.

Letters: T experts, N elements of a panel.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from esm_stream.methods.contract import (
    About,
    ElementwiseMethod,
    MethodOptions,
    Panel,
    Sums,
    Whole,
    add_to,
)
from esm_stream.methods.signs import weigh


class RamOptions(MethodOptions):
    """Options of RAM."""

    epsilon: NonNegativeFloat = Field(
        1e-5, description="An element counts as changed where |D_t| is larger than this."
    )
    gain: NonNegativeFloat = Field(
        0.0,
        description="Strengthens what one expert alone changed by up to gain * gain_limit, more "
        "where it shares more elements with others than it has alone (RAM+); costs a sweep.",
    )
    gain_limit: NonNegativeFloat = Field(0.2, description="Limit of that ratio.")


class Ram(ElementwiseMethod):
    """Per element, the mean over those experts that changed it.

    With `gain`, the update of expert t is multiplied by 1 + gain * min(shared_t / alone_t,
    gain_limit) where it is alone, from counts of each tensor.
    """

    name: ClassVar[str] = "ram"
    Options = RamOptions
    about: ClassVar[About] = About(
        summary="Keeps what one expert changed, averages what several changed.",
        source="arXiv 2601.13572",
        data="none",
        passes="1; 2 with gain",
        memory="panels",
        when="sparse updates, as from reinforcement learning",
    )

    def __init__(self, options: RamOptions) -> None:
        super().__init__(options)
        self.sweeps = 1 if options.gain else 0

    def measure(self, panel: Panel, known: Sequence[Any], sums: Sums) -> None:  # noqa: ARG002
        """Elements that each expert changed alone, and with others."""
        changed_TN = panel.updates_TN.abs() > self.options.epsilon
        alone_N = changed_TN.sum(dim=0) == 1
        add_to(sums, "alone", (changed_TN & alone_N).sum(dim=1))
        add_to(sums, "shared", (changed_TN & ~alone_N).sum(dim=1))

    def settle(self, sums: Sums, known: Sequence[Any], whole: Whole) -> Any:  # noqa: ANN401, ARG002
        """Factor of what each expert alone changed."""
        floor = max(self.options.epsilon, 1e-12)
        ratios_T = sums["shared"].double() / sums["alone"].double().clamp(min=floor)
        return (1 + self.options.gain * ratios_T.clamp(max=self.options.gain_limit)).tolist()

    def merge(self, panel: Panel, known: Sequence[Any]) -> Tensor:
        """Mean over the experts that changed an element."""
        changed_TN = (panel.updates_TN.abs() > self.options.epsilon).to(panel.updates_TN.dtype)
        count_N = changed_TN.sum(dim=0)
        changed_TN *= panel.updates_TN
        weigh(changed_TN, panel.weights)
        if known:
            factors_T1 = changed_TN.new_tensor(known[0]).unsqueeze(1)
            changed_TN *= torch.where(count_N == 1, factors_T1, 1.0)
        total_N: Tensor = changed_TN.sum(dim=0)
        return total_N.div_(count_N.clamp_(min=1))
