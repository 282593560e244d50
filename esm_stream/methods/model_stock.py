"""Model Stock: between the base and the mean, by the angle between updates (methods.md 3.1)."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from esm_stream.methods.contract import About, MethodOptions, Panel, Whole
from esm_stream.methods.gram import GramMethod, Span

_SMALLEST_PRODUCT = 1e-12
_SINGULAR = 1e-6


class ModelStockOptions(MethodOptions):
    """Options of Model Stock."""

    filter_wise: bool = Field(
        False, description="An angle for every row instead of one for the tensor; saves a sweep."
    )


class ModelStock(GramMethod):
    """W = t mean(W_t) + (1 - t) W0 with t = T c / (1 + (T - 1) c).

    c is the mean cosine between two updates, of a tensor or of a row. Equal updates give their
    mean, orthogonal ones the base.
    """

    name: ClassVar[str] = "model_stock"
    Options = ModelStockOptions
    of_weights: ClassVar[bool] = False
    whole_rows: ClassVar[bool] = True
    about: ClassVar[About] = About(
        summary="Goes from the base towards the mean as far as the updates agree.",
        source="Jang et al. 2024, arXiv 2403.19522",
        data="none",
        passes="2; 1 with filter_wise",
        memory="panels of whole rows",
        when="fine-tunings of one task with different seeds",
    )

    def __init__(self, options: ModelStockOptions) -> None:
        super().__init__(options)
        self.sweeps = 0 if options.filter_wise else 1

    def coefficients(self, span: Span, whole: Whole) -> Tensor:  # noqa: ARG002
        """The same t / T for every expert."""
        ratio = interpolation(span.gram_TT.unsqueeze(2))
        return ratio.expand(len(span.gram_TT)) / len(span.gram_TT)

    def merge(self, panel: Panel, known: Sequence[Any]) -> Tensor:
        """The mean update, times t of the tensor or of each row."""
        if known:
            return super().merge(panel, known)
        updates_TRC = panel.updates_TN.view(len(panel.experts), -1, panel.columns)
        wide_TRC = updates_TRC.double()
        ratio_R = interpolation(torch.einsum("src,trc->str", wide_TRC, wide_TRC))
        mean_RC = updates_TRC.mean(dim=0)
        return mean_RC.mul_(ratio_R.unsqueeze(1)).view(-1)


def interpolation(gram_TTR: Tensor) -> Tensor:
    """T of Model Stock for each of R Gram matrices, shape (R,); 0 where it is singular."""
    count = len(gram_TTR)
    norms_TR = torch.diagonal(gram_TTR).T.clamp(min=0).sqrt()
    products_TTR = norms_TR.unsqueeze(0) * norms_TR.unsqueeze(1)
    cosines_TTR = (gram_TTR / products_TTR.clamp(min=_SMALLEST_PRODUCT)).clamp(-1, 1)
    above = torch.ones(count, count).triu(1).bool()
    cosine_R = cosines_TTR[above].mean(dim=0)
    divisor_R = 1 + (count - 1) * cosine_R
    singular_R = divisor_R.abs() < _SINGULAR
    return torch.where(singular_R, 0.0, count * cosine_R / torch.where(singular_R, 1.0, divisor_R))
