"""Essential subspace merging of one matrix: methods.md 1.1, steps 1 to 7, in that order.

From:  the engine, one expert's update and moment at a time; later the factors of all experts.
To:    the engine, the merged update before layer scaling (scaling/layer.py) and alpha.
Peak:  subspace/product.py; the coordinates are stacked in float64, the bases read by panels.
       With `strict_official`, the stacks and their singular vectors.

Letters: T experts, O output features, I input features, K rank of one expert, R sum of all K.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from esm_stream.methods.contract import About, Diagnostics, Factors, Merged, MethodOptions, Moment
from esm_stream.methods.options import EsmOptions
from esm_stream.methods.profiles import Modality, Profile
from esm_stream.scaling.dimension import column_factors
from esm_stream.scaling.task import task_factors
from esm_stream.subspace.basis import essential_basis, frobenius_norm
from esm_stream.subspace.polar import Polar, PolarRoot, polar
from esm_stream.subspace.product import PolarProduct, Stack

_FACTOR_OPTIONS = {
    *("rank", "rank_factor", "rank_budget", "rank_tolerance", "strict_official", "decomposition")
}


class Esm:
    """ESM with the options of one manifest and the profile they resolve to."""

    name: ClassVar[str] = "esm"
    Options = EsmOptions
    needs_inputs = False
    streams = False
    about: ClassVar[About] = About(
        summary="Keeps the output directions that matter for real inputs, made orthogonal.",
        source="arXiv 2602.20208 (CVPR 2026) and 2606.19164 (journal)",
        data="samples (none with decomposition = svd)",
        passes="1, and a forward pass",
        memory="factors of one matrix",
        when="distinct experts, unlabelled samples at hand: the quality option",
    )

    @classmethod
    def create(cls, options: MethodOptions, modality: Modality) -> Self:
        """ESM for a model that reads what `modality` says."""
        assert isinstance(options, EsmOptions)
        return cls(options, options.resolve(modality))

    def __init__(self, options: EsmOptions, profile: Profile) -> None:
        self.options = options
        self.profile = profile
        self.uses_moments = options.decomposition == "esd"
        self.factors_by_svd = False
        self.forms_stacks = options.strict_official

    def rank(self, shape: tuple[int, int], num_experts: int) -> int:
        """K = max(1, floor(rank_factor * O / T)) or the rank asked for, at most min(O, I).

        With `rank_budget = "min_side"`, min(O, I) stands for O.

        An update has no more than min(O, I) directions; `strict_official` goes up to O all the
        same, because the authors' mean of the weights counts those without energy.
        """
        shared = shape[0] if self.options.rank_budget == "output" else min(shape)
        share = Fraction(str(self.options.rank_factor)) * shared / num_experts
        limit = shape[0] if self.options.strict_official else min(shape)
        return min(self.options.rank or max(1, int(share)), limit)

    def identity(self, step: Literal["factor", "combine"]) -> dict[str, object]:
        """Options that decide the numbers of one step; layer scaling belongs to neither."""
        options, profile = self.options, self.profile
        if step == "factor":
            return options.model_dump(include=_FACTOR_OPTIONS)
        levels = [level for level in ("dimension", "task") if level in profile.levels]
        return {
            "levels": levels,
            "exponents": [profile.exponent_of(level) for level in levels],
            "variant": profile.variant if levels else None,
            "task_norm": profile.task_norm if "task" in levels else None,
            "eigenvalue_exponent": profile.eigenvalue_exponent,
            "factor": profile.factor,
            **options.model_dump(include={"drop_tolerance", "strict_official"}),
        }

    def factor(self, update_OI: Tensor, moment: Moment | None, num_experts: int) -> Factors:
        """Steps 1 and 2: essential basis and coordinates, float64.

        Args:
            update_OI: One expert's update, any float dtype.
            moment: Second moment of the layer; None takes the basis from the update alone.
            num_experts: Number T of experts in the manifest, those without update included.

        Raises:
            ValueError: The update or the moment holds NaN or Inf.
        """
        essential = essential_basis(
            update_OI,
            moment if self.uses_moments else None,
            self.rank((update_OI.shape[0], update_OI.shape[1]), num_experts),
            0.0 if self.options.strict_official else self.options.rank_tolerance,
        )
        return Factors(
            essential.basis_OK,
            essential.coordinates_KI,
            essential.eigenvalues,
            essential.norm,
        )

    def combine(self, factors: Sequence[Factors], shape: tuple[int, int]) -> Merged:
        """Steps 3 to 7: weights, task scaling, concatenation, dimension scaling, polar factors.

        Args:
            factors: What `factor` made of every expert, any float dtype, T of them.
            shape: (O, I) of the matrix.

        Returns:
            Merged update, computed in float64, in the dtype of the coordinates; zero where no
            expert has an update.
        """
        weights = [
            eigenvalue_weights(kept_spectrum(one), self.profile.eigenvalue_exponent)
            for one in factors
        ]
        stack = Stack([one.basis_OK for one in factors], weights)
        stacked_RI = stack_coordinates(factors, weights, self._task_factors(factors), shape[1])
        if "dimension" in self.profile.levels:
            exponent = self.profile.exponent_of("dimension")
            stacked_RI *= column_factors(stacked_RI, exponent, self.profile.variant)
        dtype = factors[0].coordinates_KI.dtype
        if self.options.strict_official:
            return self._combine_completely(factors, stack, stacked_RI, dtype)
        product = PolarProduct(stack, stacked_RI, self.options.drop_tolerance)
        del stacked_RI
        factor = self._factor(product.left, product.right)
        middle_R = torch.full_like(torch.cat(weights), factor)
        return Merged(
            product.update(middle_R, dtype),
            _diagnostics(factors, product.left, product.right, factor),
        )

    def _combine_completely(
        self, factors: Sequence[Factors], stack: Stack, stacked_RI: Tensor, dtype: torch.dtype
    ) -> Merged:
        """Step 7 with every direction, also those that only rounding chooses."""
        left = polar(torch.cat(list(stack.panels())), complete=True)
        right = polar(stacked_RI, complete=True)
        factor = self._factor(left, right)
        update_OI = (left.factor @ right.factor).mul_(factor)
        return Merged(update_OI.to(dtype), _diagnostics(factors, left, right, factor))

    def _factor(self, left: Polar | PolarRoot, right: Polar | PolarRoot) -> float:
        return self.profile.factor * left.mean_singular_value * right.mean_singular_value

    def _task_factors(self, factors: Sequence[Factors]) -> list[float]:
        """Step 4, gamma of each expert; 1.0 for all where the task level is off."""
        profile = self.profile
        if "task" not in profile.levels:
            return [1.0] * len(factors)
        norms = [one.norm for one in factors]
        if profile.task_norm == "truncated":
            norms = [frobenius_norm(one.coordinates_KI) for one in factors]
        return task_factors(norms, profile.exponent_of("task"), profile.variant)


def kept_spectrum(one: Factors) -> Tensor:
    """Eigenvalues of the K columns kept, float64, shape (K,); 0 past the end of the spectrum."""
    num_columns = one.basis_OK.shape[1]
    eigenvalues = one.spectrum[:num_columns].double()
    return pad(eigenvalues, (0, num_columns - len(eigenvalues)))


def eigenvalue_weights(eigenvalues_K: Tensor, exponent: float) -> Tensor:
    """Step 3: w = (eigenvalue / mean)^p over the K kept, then w / mean(w); empty stays empty."""
    weights_K = (eigenvalues_K / eigenvalues_K.mean()) ** exponent
    return weights_K / weights_K.mean()


def stack_coordinates(
    factors: Sequence[Factors],
    weights: Sequence[Tensor],
    gammas: Sequence[float],
    num_inputs: int,
) -> Tensor:
    """Step 5, right: C_cat = [gamma_1 diag(w_1) C_1; ...], float64, shape (R, I)."""
    num_rows = sum(len(weights_K) for weights_K in weights)
    stacked_RI = weights[0].new_empty(num_rows, num_inputs, dtype=torch.float64)
    start = 0
    for one, weights_K, gamma in zip(factors, weights, gammas, strict=True):
        stop = start + len(weights_K)
        row_factors_K1 = (gamma * weights_K).unsqueeze(1)
        torch.mul(one.coordinates_KI, row_factors_K1, out=stacked_RI[start:stop])
        start = stop
    return stacked_RI


def energy_kept(one: Factors) -> float:
    """Share of the eigenvalues that the K kept columns carry (methods.md 1.4); 1.0 for a zero."""
    total = float(one.spectrum.sum())
    return float(kept_spectrum(one).sum()) / total if total else 1.0


def _diagnostics(
    factors: Sequence[Factors],
    left: Polar | PolarRoot,
    right: Polar | PolarRoot,
    factor: float,
) -> Diagnostics:
    """What the report tells of one matrix (methods.md 1.3, rule 4, and 1.4)."""
    return {
        "ranks": [one.basis_OK.shape[1] for one in factors],
        "energy_kept": [energy_kept(one) for one in factors],
        "condition_bases": left.condition,
        "condition_coordinates": right.condition,
        "dropped_bases": left.dropped,
        "dropped_coordinates": right.dropped,
        "mean_singular_bases": left.mean_singular_value,
        "mean_singular_coordinates": right.mean_singular_value,
        "factor": factor,
    }
