"""OWL: output-whitened least squares, from sums over the experts (docs/methods/owl.md).

From:  the engine, one expert's update and second moment of inputs at a time; later the sums.
To:    the engine, the summands by panels of rows; later the merged update.
Peak:  `term`: a square of the inputs, the update, some panels. `solve`: the update in float64 and
       the larger of half a square of the inputs and what the whitening needs: one square of the
       outputs where they are many, six where they are few.

Letters: O output features, I input features, M rows of a panel.
"""

import math
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from esm_stream.methods.contract import (
    About,
    Merged,
    MethodOptions,
    Moment,
    Place,
    SumMethod,
    SumReader,
)
from esm_stream.methods.profiles import Modality
from esm_stream.subspace.band import Band
from esm_stream.subspace.basis import frobenius_norm
from esm_stream.subspace.cholesky import fit_ridge, lower_panels
from esm_stream.subspace.gram import add_gram, fill_upper, lower_tiles
from esm_stream.subspace.sizes import PANEL_ROWS, TILE, is_banded

# Below this norm of an update its products are float64.
_SMALL_NORM = 1e-8
# Columns that are whitened together.
_COLUMNS = 256


class OwlOptions(MethodOptions):
    """Options of OWL."""

    inputs: Literal["merged", "expert", "none"] = Field(
        "expert",
        description="Whose inputs show what a layer sees: those in each expert's own forward "
        '("expert"), those in the model merged so far, block by block ("merged"), or nobody\'s '
        '("none": no samples, m counts as 0).',
    )
    m: float = Field(
        0.5, ge=0, le=1, description="Share of the inputs in the metric; the rest is D_t^T D_t."
    )
    mu: NonNegativeFloat = Field(
        0.05, description="Ridge of the least squares fit, relative to the mean diagonal of K."
    )
    p: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = Field(
        "auto",
        description='Power of the output whitening; 0 switches it off. "auto": matrix by matrix, '
        "0.7 r^(1/4), where r is the share of the updates' responses that one matrix cannot give; "
        "without samples 0.6.",
    )
    eps: PositiveFloat = Field(
        1e-3, description="Added to the spectrum of L, relative to its mean, before whitening."
    )


class Owl(SumMethod):
    """W = W0 + alpha * M, from sums over the experts.

    With e_t = |D_t|^2 and G_t the mean of x x^T over the inputs x that the layer sees:
    B_t = (1 - m) D_t^T D_t + m (e_t / tr G_t) G_t,
    N = sum of D_t B_t, K = sum of B_t, L = sum of D_t D_t^T / e_t,
    R = N (K + mu tr(K) / I)^-1, the least squares fit of all updates in the inputs of each,
    M = (L O / tr L + eps)^-p R, rescaled to |R|: output directions that experts share go down,
    those of single experts up; by p = 0.7 r^(1/4), where r is the share of the responses
    W = sum of tr D_t B_t D_t^T that R leaves unexplained.

    Experts without an update contribute nothing; for those that a layer saw no input of, m is 0.
    Matrices of the blocks only; the rest is averaged.
    """

    name: ClassVar[str] = "owl"
    Options = OwlOptions
    about: ClassVar[About] = About(
        summary="Least squares fit of all updates, with shared output directions turned down.",
        source="esm-stream; relatives are named on its page",
        data='samples (none with inputs = "none")',
        passes='1, and a forward pass (none with inputs = "none")',
        memory="one matrix and squares of its sides, whatever the number of experts",
        when="the quality option; experts that come and go",
    )

    def __init__(self, options: OwlOptions) -> None:
        super().__init__(options)
        self.uses_moments = options.inputs != "none"
        self.inputs_of_merged = options.inputs == "merged"

    def alpha_for(self, modality: Modality, num_experts: int) -> float:  # noqa: ARG002
        """1 for one expert, slowly more for more, as measured (docs/methods/owl.md)."""
        if not self.uses_moments:
            return 1.6
        rise = 0.8 if self.inputs_of_merged else 0.65
        return round(1 + rise * math.sqrt(math.log(num_experts)), 2)

    def identity(self, step: Literal["term", "solve"]) -> dict[str, object]:
        """Options that decide the numbers of one step."""
        if step == "solve":
            return self.options.model_dump(include={"mu", "p", "eps"})  # type: ignore[no-any-return]
        return {"rows": TILE, **({"m": self.options.m} if self.uses_moments else {})}

    def places(self, shape: tuple[int, int]) -> tuple[Place, ...]:
        """Of the symmetric sums the lower half, by panels that end at the diagonal."""
        outputs, inputs = shape
        return (
            *(Place("K", start, stop, stop) for start, stop in lower_tiles(inputs)),
            *(Place("N", start, stop, inputs) for start, stop in lower_tiles(outputs)),
            *(Place("L", start, stop, stop) for start, stop in lower_tiles(outputs)),
            Place("W", 0, 1, 1),
        )

    def term(self, update_OI: Tensor, moment: Moment | None) -> Iterator[Tensor]:
        """B_t, D_t B_t, D_t D_t^T / e_t and tr D_t B_t D_t^T of one expert, panel by panel."""
        share = self.options.m if moment is not None else 0.0
        return owl_term(update_OI, moment.matrix if moment and share else None, share)

    def solve(self, sums: SumReader, shape: tuple[int, int]) -> Merged:
        """Steps 3 and 4 of the definition, float64."""
        fit_OI, explained = self._fit(sums, shape)
        response = float(sums(Place("W", 0, 1, 1)))
        unexplained = max(0.0, 1 - explained / response) if response else 0.0
        diagnostics = {"unexplained": unexplained}
        power = self._power(unexplained)
        if not power:
            return Merged(fit_OI, diagnostics)
        sharing_OO = torch.zeros(shape[0], shape[0], dtype=fit_OI.dtype, device=fit_OI.device)
        for whole_MN, place in zip(lower_panels(sharing_OO), self._places("L", shape), strict=True):
            whole_MN.copy_(sums(place))
        diagnostics |= {"power": power, "effective_outputs": _effective_rank(sharing_OO)}
        return Merged(whitened(fit_OI, sharing_OO, power, self.options.eps), diagnostics)

    def _fit(self, sums: SumReader, shape: tuple[int, int]) -> tuple[Tensor, float]:
        """R = N (K + r I)^-1, and how much of the experts' responses it gives."""
        panels = [sums(place) for place in self._places("K", shape)]
        target_OI = panels[0].new_empty(shape)
        for place in self._places("N", shape):
            target_OI[place.start : place.stop] = sums(place)
        return fit_ridge(target_OI, panels, self.options.mu)

    def _power(self, unexplained: float) -> float:
        """p; with "auto" more of it the more the experts conflict in this matrix."""
        if self.options.p != "auto":
            return float(self.options.p)
        return 0.7 * unexplained**0.25 if self.uses_moments else 0.6

    def _places(self, name: str, shape: tuple[int, int]) -> list[Place]:
        """The panels of one sum."""
        return [place for place in self.places(shape) if place.name == name]

    def term_numbers(self, shape: tuple[int, int]) -> int:
        """Upper bound of the float64 numbers that `term` holds beside the moment."""
        outputs, inputs = shape
        squares = inputs**2 + outputs**2 * (outputs < inputs)
        return (outputs * inputs + squares) // 2 + 2 * PANEL_ROWS * max(outputs, inputs)

    def solve_numbers(self, shape: tuple[int, int]) -> int:
        """Upper bound of the float64 numbers that `solve` holds, the result in float32 included."""
        outputs, inputs = shape
        reading = 4 * TILE * max(outputs, inputs)
        fitting = inputs * (inputs + TILE) // 2 + reading
        tiles = 8 * outputs * _COLUMNS
        banded = outputs**2 + 1024 * outputs
        whitening = (banded if is_banded(outputs, inputs) else 6 * outputs**2) + tiles
        return outputs * inputs * 3 // 2 + max(fitting, whitening, reading)


def owl_term(update_OI: Tensor, moment_II: Tensor | None, share: float) -> Iterator[Tensor]:
    """Panels of B_t, D_t B_t, D_t D_t^T / e_t and tr D_t B_t D_t^T, as in `Owl.places`.

    Products are formed in the precision of the update, float32 at least: what it was rounded to
    when it was stored is coarser. Of updates so small that their cubes are not float32 numbers, in
    float64.

    Args:
        update_OI: Update D_t, any float dtype.
        moment_II: Uncentred second moment G_t of the layer's inputs in any unit; None for m = 0.
        share: m, the share of the inputs in the metric.

    Returns:
        Panels of at most TILE rows, of K and L the lower half; nothing for a zero update.
    """
    outputs, inputs = update_OI.shape
    norm = frobenius_norm(update_OI)
    energy, trace = norm**2, 0.0 if moment_II is None else float(moment_II.trace())
    if energy == 0:
        return
    wide = update_OI.dtype == torch.float64 or norm < _SMALL_NORM
    update_OI = update_OI.to(torch.float64 if wide else torch.float32)
    metric_II = update_OI.new_zeros(inputs, inputs)
    for rows_MI in update_OI.split(PANEL_ROWS):
        add_gram(metric_II, rows_MI)
    # D B = (D D^T) D where that is the shorter way.
    product_OO = None
    if moment_II is not None and trace > 0:
        for start, stop in lower_tiles(inputs):
            part_MN = metric_II[start:stop, :stop].mul_(1 - share)
            part_MN.add_(moment_II[start:stop, :stop], alpha=share * energy / trace)
    elif outputs < inputs:
        product_OO = update_OI @ update_OI.T
    yield from lower_panels(metric_II)
    if product_OO is None:
        fill_upper(metric_II)
    responses = []
    for start, stop in lower_tiles(outputs):
        rows_MI = update_OI[start:stop]
        target_MI = (
            rows_MI @ metric_II if product_OO is None else product_OO[start:stop] @ update_OI
        )
        responses.append(float((target_MI * rows_MI).sum(dtype=torch.float64)))
        yield target_MI
    del metric_II, target_MI
    for start, stop in lower_tiles(outputs):
        if product_OO is None:
            yield (update_OI[start:stop] @ update_OI[:stop].T).div_(energy)
        else:
            yield product_OO[start:stop, :stop] / energy
    yield torch.tensor([[math.fsum(responses)]], dtype=torch.float64, device=update_OI.device)


def whitened(fit_OI: Tensor, sharing_OO: Tensor, power: float, eps: float) -> Tensor:
    """(L O / tr L + eps)^-p R with the norm of R, float64; overwrites both.

    Large L by its banded form, which needs no room for eigenvectors.

    Args:
        fit_OI: R.
        sharing_OO: L, its lower half at least.
        power: p.
        eps: Floor of the spectrum relative to its mean.
    """
    norm, trace = frobenius_norm(fit_OI), float(sharing_OO.trace())
    if norm == 0 or trace == 0:
        return fit_OI
    side = len(sharing_OO)
    sharing_OO *= side / trace
    if is_banded(side, fit_OI.shape[1]):
        sharing_OO.diagonal().add_(eps)
        band = Band(sharing_OO)
        for tile_OM in fit_OI.split(_COLUMNS, dim=1):
            band.inverse_power(tile_OM, power, eps)
    else:
        values_O, vectors_OO = torch.linalg.eigh(sharing_OO)
        factors_O1 = values_O.clamp_(min=0).add_(eps).pow_(-power).unsqueeze(1)
        for tile_OM in fit_OI.split(_COLUMNS, dim=1):
            tile_OM.copy_(vectors_OO @ (factors_O1 * (vectors_OO.T @ tile_OM)))
    return fit_OI.mul_(norm / frobenius_norm(fit_OI))


def _effective_rank(sharing_OO: Tensor) -> float:
    """tr(L)^2 / |L|^2: over how many output directions the updates spread; lower half given."""
    trace = float(sharing_OO.trace())
    if trace == 0:
        return 0.0
    lower = frobenius_norm(sharing_OO.tril(-1))
    diagonal = frobenius_norm(sharing_OO.diagonal())
    return trace**2 / math.fsum([2 * lower**2, diagonal**2])
