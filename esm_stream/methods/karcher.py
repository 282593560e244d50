"""Karcher mean of the experts' weights on the sphere (methods.md 3.1)."""

import math
from typing import ClassVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from esm_stream.methods.contract import About, MethodOptions, Whole
from esm_stream.methods.gram import GramMethod, Span


class KarcherOptions(MethodOptions):
    """Options of the Karcher mean."""

    max_iter: PositiveInt = Field(10, description="Most iterations.")
    tolerance: PositiveFloat = Field(
        1e-5, description="Iterations end when the mean tangent is shorter; smaller angles are 0."
    )


class Karcher(GramMethod):
    """The point on the sphere with the least squared distances to the directions of all W_t.

    From the normalised mean of u_t = W_t / |W_t|, repeat u <- exp_u(sum of a_t log_u(u_t)), then
    W = (sum of a_t |W_t|) u. Weights are divided by their sum. For two experts it is SLERP of the
    directions at t = a_2.
    """

    name: ClassVar[str] = "karcher"
    Options = KarcherOptions
    about: ClassVar[About] = About(
        summary="Riemannian mean of the experts' directions, with their mean norm.",
        source="Karcher 1977; arXiv 2603.04972",
        data="none",
        passes="2",
        memory="panels",
        when="several models where SLERP would be used for two",
    )

    def coefficients(self, span: Span, whole: Whole) -> Tensor:
        """The iteration in coefficients of the span."""
        weights_T = torch.tensor(whole.weights, dtype=torch.float64)
        if abs(float(weights_T.sum())) >= 1e-8:
            weights_T /= weights_T.sum()
        norms_T = torch.tensor(span.norms, dtype=torch.float64)
        there_T = norms_T > self.options.tolerance
        if not bool(there_T.any()):
            return torch.zeros_like(weights_T)
        shares_T = torch.where(there_T, weights_T, 0.0)
        shares_T /= shares_T.sum()
        units_TT = torch.diag(torch.where(there_T, 1 / norms_T.clamp(min=1e-300), 0.0))
        mean_T = self._iterate(span, shares_T, units_TT[there_T], shares_T[there_T])
        return mean_T * float(weights_T @ norms_T)

    def _iterate(self, span: Span, shares_T: Tensor, units_VT: Tensor, weights_V: Tensor) -> Tensor:
        """Karcher mean of the V directions that exist, as coefficients."""
        mean_T = shares_T @ torch.diag(_inverse(torch.tensor(span.norms, dtype=torch.float64)))
        length = span.norm(mean_T)
        mean_T = units_VT[0] if length < self.options.tolerance else mean_T / length
        for _ in range(self.options.max_iter):
            tangent_T = torch.zeros_like(mean_T)
            for weight, unit_T in zip(weights_V.tolist(), units_VT, strict=True):
                cosine = max(-1.0, min(1.0, span.inner(mean_T, unit_T)))
                angle = math.acos(cosine)
                # Of opposite directions none is on the way from one to the other.
                if self.options.tolerance <= angle <= math.pi - self.options.tolerance:
                    away_T = unit_T - cosine * mean_T
                    tangent_T += weight * angle / math.sin(angle) * away_T
            length = span.norm(tangent_T)
            if length < self.options.tolerance:
                break
            mean_T = math.cos(length) * mean_T + math.sin(length) / length * tangent_T
            mean_T /= span.norm(mean_T)
        return mean_T


def _inverse(norms_T: Tensor) -> Tensor:
    """1 / norm, 0 for a zero."""
    return torch.where(norms_T > 0, 1 / norms_T.clamp(min=1e-300), 0.0)
