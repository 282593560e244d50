"""WUDI: least interference with every update in its own row space (methods.md 3.2).

From:  the engine, the experts' updates of one matrix.
To:    the engine, the merged update.
Peak:  float64: two sums, (I, I) and (O, I), and the state of the iteration or of the solve.

Letters: T experts, O output features, I input features.
"""

from typing import ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from esm_stream.methods.contract import About, Merged, MethodOptions, SpectralMethod, Updates, zeros
from esm_stream.subspace.cholesky import lower_panels, solve_ridge

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


class WudiOptions(MethodOptions):
    """Options of WUDI."""

    steps: PositiveInt = Field(300, description="Steps of Adam; results depend on the stop.")
    learning_rate: PositiveFloat = Field(1e-5, description="Learning rate of Adam.")


class WudiClosedOptions(MethodOptions):
    """Options of closed WUDI."""

    ridge: NonNegativeFloat = Field(
        1e-2, description="Added to the diagonal of K, relative to its mean."
    )


class WudiSums:
    """N = sum of D_t D_t^T D_t / |D_t|^2 and K = sum of D_t^T D_t / |D_t|^2, and sum of D_t."""

    def __init__(self, updates: Updates, shape: tuple[int, int]) -> None:
        self.total_OI = zeros(updates, *shape)
        self.target_OI = zeros(updates, *shape)
        self.moment_II = zeros(updates, shape[1], shape[1])
        for update_OI in updates:
            wide_OI = update_OI.double()
            energy = float(wide_OI.square().sum())
            self.total_OI += wide_OI
            if energy > 0:
                moment_II = (wide_OI.T @ wide_OI).div_(energy)
                self.target_OI += wide_OI @ moment_II
                self.moment_II += moment_II


class Wudi(SpectralMethod):
    """Minimise the sum of |(D - D_t) D_t^T|^2 / |D_t|^2 over D by Adam, from the sum of all D_t.

    The gradient is 2 (D K - N) with K = sum of D_t^T D_t / |D_t|^2 and N = sum of D_t D_t^T D_t /
    |D_t|^2, so the experts are read once and their number costs no memory. Published results are
    those of the early stop. Matrices of the blocks only; the rest is averaged.
    """

    name: ClassVar[str] = "wudi"
    Options = WudiOptions
    blocks_only: ClassVar[bool] = True
    about: ClassVar[About] = About(
        summary="Minimises the interference with every update, without data.",
        source="Cheng et al. 2025, arXiv 2503.08099",
        data="none",
        passes="1",
        memory="one matrix and squares of its inputs",
        when="distinct experts without samples, time for iterations",
    )

    def merge(self, updates: Updates, shape: tuple[int, int]) -> Merged:
        """Adam on the quadratic, float64."""
        sums = WudiSums(updates, shape)
        merged_OI = sums.total_OI
        first_OI, second_OI = torch.zeros_like(merged_OI), torch.zeros_like(merged_OI)
        for step in range(1, self.options.steps + 1):
            gradient_OI = (merged_OI @ sums.moment_II).sub_(sums.target_OI).mul_(2)
            first_OI.lerp_(gradient_OI, 1 - _BETAS[0])
            second_OI.mul_(_BETAS[1]).addcmul_(gradient_OI, gradient_OI, value=1 - _BETAS[1])
            rate = self.options.learning_rate / (1 - _BETAS[0] ** step)
            root_OI = (second_OI / (1 - _BETAS[1] ** step)).sqrt_().add_(_EPSILON)
            merged_OI.addcdiv_(first_OI, root_OI, value=-rate)
        return Merged(merged_OI)

    def peak_numbers(self, shape: tuple[int, int], num_experts: int) -> int:  # noqa: ARG002
        """Sums, gradient and moments of Adam."""
        return 8 * shape[0] * shape[1] + 3 * shape[1] ** 2

    def decompositions(self, num_experts: int) -> int:
        """Products of the iteration, in units of a decomposition."""
        return 1 + (num_experts + int(self.options.steps)) // 7


class WudiClosed(SpectralMethod):
    """The minimum that WUDI's iteration goes towards, with a ridge: D = N (K + r I)^-1.

    N and K as in WUDI, r = ridge tr(K) / I. It equals RegMean on D with D_t^T D_t / |D_t|^2 in the
    place of the inputs' moments.
    """

    name: ClassVar[str] = "wudi_closed"
    Options = WudiClosedOptions
    blocks_only: ClassVar[bool] = True
    about: ClassVar[About] = About(
        summary="WUDI's minimum by one solve.",
        source="closed form of Cheng et al. 2025, arXiv 2503.08099",
        data="none",
        passes="1",
        memory="one matrix and squares of its inputs",
        when="as WUDI, in a fraction of its time",
    )

    def merge(self, updates: Updates, shape: tuple[int, int]) -> Merged:
        """One Cholesky solve, float64."""
        sums = WudiSums(updates, shape)
        return Merged(solve_ridge(sums.target_OI, lower_panels(sums.moment_II), self.options.ridge))

    def peak_numbers(self, shape: tuple[int, int], num_experts: int) -> int:  # noqa: ARG002
        """Sums, Cholesky factor and solution."""
        return 6 * shape[0] * shape[1] + 4 * shape[1] ** 2
