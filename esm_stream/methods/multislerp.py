"""Multi-SLERP: weighted mean of updates on the sphere, by one tangent space (methods.md 3.2)."""

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from esm_stream.methods.contract import About, MethodOptions, Whole
from esm_stream.methods.gram import GramMethod, Span

_ZERO_NORM = 1e-8


class MultislerpOptions(MethodOptions):
    """Options of Multi-SLERP."""

    normalize: bool = Field(True, description="Divide the weights by their sum.")


class Multislerp(GramMethod):
    """Directions of the D_t averaged in the tangent space at their mean, mapped back, scaled.

    With u_t = D_t / |D_t| and m the unit vector of the sum of a_t u_t: v is the sum of
    a_t (u_t - <u_t, m> m), and D = (sum of a_t |D_t|) (cos|v| m + sin|v| v / |v|). Where the
    directions cancel, D is the sum of a_t D_t.
    """

    name: ClassVar[str] = "multislerp"
    Options = MultislerpOptions
    of_weights: ClassVar[bool] = False
    about: ClassVar[About] = About(
        summary="Mean of the updates' directions on the sphere, with their mean norm.",
        source="mergekit (Goddard et al. 2024, arXiv 2403.13257)",
        data="none",
        passes="2",
        memory="panels",
        when="several experts of one base, norms of updates kept",
    )

    def coefficients(self, span: Span, whole: Whole) -> Tensor:
        """Mean, tangent and exponential map in coefficients."""
        weights_T = torch.tensor(whole.weights, dtype=torch.float64)
        if self.options.normalize and abs(float(weights_T.sum())) >= 1e-8:
            weights_T /= weights_T.sum()
        norms_T = torch.tensor(span.norms, dtype=torch.float64)
        # Coefficients of sum of a_t u_t; a tensor without norm has no direction.
        sum_T = weights_T / (norms_T + _ZERO_NORM)
        length = span.norm(sum_T)
        if length < _ZERO_NORM:
            return weights_T
        mean_T = sum_T / length
        projected = span.inner(sum_T, mean_T)
        tangent_T = sum_T - projected * mean_T
        angle = span.norm(tangent_T) + _ZERO_NORM
        direction_T = mean_T * math.cos(angle) + tangent_T * (math.sin(angle) / angle)
        return direction_T * float(weights_T @ norms_T)
