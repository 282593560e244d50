"""RegMean: least squares in the inputs that each expert's layer sees (methods.md 3.1).

From:  the forward stage, one expert's update and moment at a time; later what it stored of each.
To:    the engine, the merged update.
Peak:  `combine`, float64: both sums, one expert's part, the Cholesky factor and the solution.
Disk:  (O + I) I float32 numbers per matrix and expert.

Letters: T experts, O output features, I input features.
"""

from collections.abc import Iterable
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat

from esm_stream.methods.contract import About, Factors, Merged, MethodOptions, Moment
from esm_stream.methods.profiles import Modality
from esm_stream.subspace.basis import frobenius_norm
from esm_stream.subspace.cholesky import lower_panels, solve_ridge


class RegMeanOptions(MethodOptions):
    """Options of RegMean."""

    rho: float = Field(
        0.9, ge=0, le=1, description="What is kept of the moments' off-diagonal elements."
    )
    ridge: NonNegativeFloat = Field(
        1e-6, description="Added to the diagonal of the sum of moments, relative to its mean."
    )


class RegMean:
    """W = W0 + alpha * (sum of D_t H_t) (sum of H_t)^-1, with H_t = rho G_t + (1 - rho) diag(G_t).

    G_t is the mean of x x^T over the inputs x of the layer in expert t's own forward, so that
    experts weigh equally however many tokens they have. With rho = 1 it minimises the sum of
    |(W - W_t) x|^2; equal moments give the average. What no moment is known of is averaged.
    """

    name: ClassVar[str] = "regmean"
    Options = RegMeanOptions
    about: ClassVar[About] = About(
        summary="Least squares fit of all experts in the inputs each of them sees.",
        source="Jin et al. 2023, arXiv 2212.09849",
        data="samples",
        passes="1, and a forward pass",
        memory="one matrix and squares of its inputs",
        when="samples at hand, outputs that should stay what they were",
    )
    uses_moments = True
    needs_inputs = True
    streams = True
    factors_by_svd = False
    forms_stacks = False

    def __init__(self, options: RegMeanOptions) -> None:
        self.options = options

    @classmethod
    def create(cls, options: MethodOptions, modality: Modality) -> Self:  # noqa: ARG003
        """RegMean, the same for every kind of model."""
        assert isinstance(options, RegMeanOptions)
        return cls(options)

    def rank(self, shape: tuple[int, int], num_experts: int) -> int:  # noqa: ARG002
        """All I input features."""
        return shape[1]

    def identity(self, step: Literal["factor", "combine"]) -> dict[str, object]:
        """Options that decide the numbers of one step."""
        return self.options.model_dump(include={"rho"} if step == "factor" else {"ridge"})

    def factor(self, update_OI: torch.Tensor, moment: Moment | None, num_experts: int) -> Factors:  # noqa: ARG002
        """D_t H_t in the place of the basis, H_t in that of the coordinates; float64."""
        assert moment is not None
        assert moment.kind == "input"
        moment_II = moment.matrix.double() * self.options.rho
        moment_II.diagonal().copy_(moment.matrix.diagonal())
        return Factors(
            update_OI.double() @ moment_II,
            moment_II,
            moment_II.new_zeros(0),
            frobenius_norm(update_OI),
        )

    def combine(self, factors: Iterable[Factors], shape: tuple[int, int]) -> Merged:
        """Sums over experts, one after the other, and one Cholesky solve, float64."""
        target_OI = moment_II = None
        for one in factors:
            if target_OI is None or moment_II is None:
                target_OI = one.coordinates_KI.new_zeros(shape, dtype=torch.float64)
                moment_II = torch.zeros_like(one.coordinates_KI, dtype=torch.float64)
            target_OI += one.basis_OK[:].to(target_OI.device)
            moment_II += one.coordinates_KI
        assert target_OI is not None
        assert moment_II is not None
        return Merged(solve_ridge(target_OI, lower_panels(moment_II), self.options.ridge))

    def combine_numbers(self, shape: tuple[int, int]) -> int:
        """Upper bound of the float64 numbers that `combine` holds."""
        return 5 * shape[0] * shape[1] + 4 * shape[1] ** 2
