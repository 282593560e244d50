"""Sums of updates, and sums of those that agree with an elected sign.

From:  task arithmetic and the methods that make updates sparse before they add them.

Letters: T experts, N elements of a panel.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from esm_stream.methods.contract import MethodOptions


class SumOptions(MethodOptions):
    """How sparse updates are added: options of DARE, DELLA and breadcrumbs."""

    signs: Literal["all", "elected"] = Field(
        "all",
        description="Add all updates (as task arithmetic), or only those with the elected sign "
        "(as TIES).",
    )
    normalize: bool = Field(
        False, description="Divide by the sum of the weights of the updates that are added."
    )

    def total(self, updates_TN: Tensor, weights: Sequence[float]) -> Tensor:
        """Sum or mean of sparse updates, shape (N,); overwrites them."""
        add = weighted_sum if self.signs == "all" else elected_sum
        return add(updates_TN, weights, self.normalize)


def weigh(updates_TN: Tensor, weights: Sequence[float]) -> Tensor:
    """a_t D_t, in place."""
    if any(weight != 1.0 for weight in weights):
        updates_TN *= updates_TN.new_tensor(weights).unsqueeze(1)
    return updates_TN


def weighted_sum(updates_TN: Tensor, weights: Sequence[float], normalize: bool) -> Tensor:
    """Sum of a_t D_t, or the mean with these weights; overwrites the updates."""
    total_N = weigh(updates_TN, weights).sum(dim=0)
    if not normalize:
        return total_N
    divisor = sum(weights)
    # Weights that cancel have no mean: the sum stays as it is.
    return total_N.div_(divisor) if abs(divisor) >= 1e-8 else total_N


def elected_sum(
    updates_TN: Tensor, weights: Sequence[float], normalize: bool, zero_sign: float = 1.0
) -> Tensor:
    """Per element, the sum or mean of those a_t D_t that have the sign of their sum.

    Args:
        updates_TN: Sparse updates; overwritten.
        weights: One per expert.
        normalize: Divide by the sum of the weights of the updates that agree.
        zero_sign: The sign elected where the sum is 0.
    """
    signs_N = elected_signs(weigh(updates_TN, weights), zero_sign)
    # sign * x > 0 where x agrees: what is left after relu is |x| there and 0 elsewhere.
    updates_TN.mul_(signs_N).relu_()
    total_N = updates_TN.sum(dim=0).mul_(signs_N)
    if not normalize:
        return total_N
    divisor_N = weigh(updates_TN.sign_(), weights).sum(dim=0)
    divisor_N += divisor_N == 0
    return total_N.div_(divisor_N)


def elected_signs(updates_TN: Tensor, zero_sign: float = 1.0) -> Tensor:
    """The sign of the sum over experts, `zero_sign` where it is 0; shape (N,)."""
    # Adding 0 turns -0 into +0, so that zeros have one sign.
    total_N = updates_TN.sum(dim=0).mul_(zero_sign).add_(0.0)
    return torch.copysign(total_N.new_tensor(1.0), total_N).mul_(zero_sign)
