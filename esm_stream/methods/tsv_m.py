"""TSV-M: singular triples of every expert, decorrelated (methods.md 3.1).

From:  the engine, one expert's update at a time; later the factors of all experts.
To:    the engine, the merged update.
Peak:  subspace/product.py; `factor` holds the update and its SVD in float64.

Letters: T experts, O output features, I input features, K rank of one expert, R sum of all K.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from esm_stream.methods.contract import About, Factors, Merged, MethodOptions, Moment
from esm_stream.methods.options import TsvMOptions
from esm_stream.methods.profiles import Modality
from esm_stream.subspace.basis import frobenius_norm
from esm_stream.subspace.product import PolarProduct, Stack


class TsvM:
    """Task singular vectors, merged."""

    name: ClassVar[str] = "tsv_m"
    Options = TsvMOptions
    uses_moments = False
    needs_inputs = False
    streams = False
    about: ClassVar[About] = About(
        summary="Leading singular vectors of every update, decorrelated.",
        source="Gargiulo et al. 2025, arXiv 2412.00081",
        data="none",
        passes="1",
        memory="factors of one matrix",
        when="distinct experts without samples",
    )
    factors_by_svd = True
    forms_stacks = False

    def __init__(self, options: TsvMOptions) -> None:
        self.options = options

    @classmethod
    def create(cls, options: MethodOptions, modality: Modality) -> Self:  # noqa: ARG003
        """TSV-M, the same for every kind of model."""
        assert isinstance(options, TsvMOptions)
        return cls(options)

    def rank(self, shape: tuple[int, int], num_experts: int) -> int:
        """K = max(1, floor(rank_factor * min(O, I) / T)) or the rank asked for."""
        share = Fraction(str(self.options.rank_factor)) * min(shape) / num_experts
        return min(self.options.rank or max(1, int(share)), *shape)

    def identity(self, step: Literal["factor", "combine"]) -> dict[str, object]:
        """Options that decide the numbers of one step."""
        if step == "factor":
            return self.options.model_dump(include={"rank", "rank_factor", "rank_tolerance"})
        return self.options.model_dump(include={"mean_singular_factor"})

    def factor(self, update_OI: Tensor, moment: Moment | None, num_experts: int) -> Factors:  # noqa: ARG002
        """Leading singular triples U, s V^T of one update that are not rounding, float64."""
        left_ON, values, right_NI = torch.linalg.svd(update_OI.double(), full_matrices=False)
        wanted = self.rank((update_OI.shape[0], update_OI.shape[1]), num_experts)
        real = int((values > self.options.rank_tolerance * values[0]).sum())
        kept = min(wanted, real)
        # Copies, so that the thin factors do not keep the whole SVD alive.
        basis_OK = left_ON[:, :kept].clone()
        coordinates_KI = right_NI[:kept] * values[:kept, None]
        return Factors(basis_OK, coordinates_KI, values, frobenius_norm(update_OI))

    def combine(self, factors: Sequence[Factors], shape: tuple[int, int]) -> Merged:  # noqa: ARG002
        """polar(U_cat) diag(s_cat) polar(V_cat); zero where no expert has an update."""
        values_R = torch.cat([one.spectrum[: one.basis_OK.shape[1]].double() for one in factors])
        ones = [torch.ones_like(one.spectrum[: one.basis_OK.shape[1]]).double() for one in factors]
        rows_RI = torch.cat([one.coordinates_KI.double() for one in factors])
        rows_RI /= values_R.unsqueeze(1)
        product = PolarProduct(Stack([one.basis_OK for one in factors], ones), rows_RI)
        del rows_RI
        left, right, middle_R = product.left, product.right, values_R
        if self.options.mean_singular_factor:
            middle_R = values_R * (left.mean_singular_value * right.mean_singular_value)
        return Merged(
            product.update(middle_R, factors[0].coordinates_KI.dtype),
            {
                "ranks": [one.basis_OK.shape[1] for one in factors],
                "condition_bases": left.condition,
                "condition_coordinates": right.condition,
                "dropped_bases": left.dropped,
                "dropped_coordinates": right.dropped,
            },
        )
