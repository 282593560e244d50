"""Methods whose result is a combination of base and experts with one coefficient each per tensor.

Angles and means on spheres look at whole tensors, but what they compute lies in the span of the
tensors they start from. So one sweep sums the Gram matrix of that span, everything else happens
with T x T numbers, and the merge is a sum.

From:  the engine, panels of base and experts; one sweep before.
To:    slerp.py, nuslerp.py, multislerp.py, karcher.py, model_stock.py.
Peak:  one panel in float64.

Letters: T experts, N elements of a panel.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from esm_stream.methods.contract import ElementwiseMethod, Panel, Sums, Whole, add_to
from esm_stream.methods.signs import weighted_sum


@dataclass(frozen=True, slots=True)
class Span:
    """Inner products of T tensors; vectors of their span are T coefficients, float64."""

    gram_TT: Tensor

    def inner(self, first_T: Tensor, second_T: Tensor) -> float:
        """Inner product of two vectors of the span."""
        return float(first_T @ self.gram_TT @ second_T)

    def norm(self, vector_T: Tensor) -> float:
        """Norm of a vector of the span."""
        return math.sqrt(max(self.inner(vector_T, vector_T), 0.0))

    @property
    def norms(self) -> list[float]:
        """Norms of the tensors themselves."""
        return self.gram_TT.diagonal().clamp(min=0).sqrt().tolist()


class GramMethod(ElementwiseMethod):
    """Sum of c_t V_t with V_t = W_t or D_t, and coefficients from the inner products of the V_t."""

    sweeps = 1
    of_weights: ClassVar[bool] = True

    def coefficients(self, span: Span, whole: Whole) -> Tensor:
        """Coefficient of every tensor, float64, shape (T,)."""
        raise NotImplementedError

    def measure(self, panel: Panel, known: Sequence[Any], sums: Sums) -> None:  # noqa: ARG002
        """Inner products, in float64."""
        vectors_TN = panel.updates_TN.double()
        if self.of_weights:
            vectors_TN += panel.base_N
        add_to(sums, "gram", vectors_TN @ vectors_TN.T)

    def settle(self, sums: Sums, known: Sequence[Any], whole: Whole) -> Any:  # noqa: ANN401, ARG002
        """Coefficients of the tensor."""
        return self.coefficients(Span(sums["gram"]), whole).tolist()

    def merge(self, panel: Panel, known: Sequence[Any]) -> Tensor:
        """What the combination differs from the base."""
        total_N = weighted_sum(panel.updates_TN, known[0], normalize=False)
        if self.of_weights:
            total_N.add_(panel.base_N, alpha=sum(known[0]) - 1.0)
        return total_N


def arc(span: Span, share: float, limit: float, floor: float) -> Tensor:
    """Coefficients of the point at `share` of the arc from the first of two tensors to the second.

    Args:
        span: Two tensors.
        share: 0 at the first, 1 at the second.
        limit: Tensors with |cos| above this are interpolated linearly.
        floor: Norms up to this count as zero, and such a tensor as orthogonal to the other.
    """
    norms = [norm if norm > floor else 1.0 for norm in span.norms]
    cosine = max(-1.0, min(1.0, float(span.gram_TT[0, 1]) / (norms[0] * norms[1])))
    if abs(cosine) > limit:
        return torch.tensor([1 - share, share], dtype=torch.float64)
    angle = torch.acos(torch.tensor(cosine, dtype=torch.float64))
    shares = torch.tensor([1 - share, share], dtype=torch.float64)
    return torch.sin(shares * angle) / torch.sin(angle)
