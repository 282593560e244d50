"""Essential basis of one expert's update of one matrix.

From:  an update D (base subtracted from expert) and a second moment of its layer.
To:    methods/esm.py, which weights and stacks the bases of all experts.
Peak:  float64 numbers, the caller's update and moment not counted. Wide D (O <= I): 6*O*O
       (eigenproblem with its workspace). Tall D (O > I): 9*I*I. Either way the result, K*(O + I),
       and two panels of 1024 rows.

Letters: O output features, I input features, K rank kept, N = min(O, I), T tokens.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from esm_stream.subspace.gram import fill_upper, gram, lower_tiles, row_panels
from esm_stream.subspace.sizes import PANEL_ROWS

_EPSILON = torch.finfo(torch.float64).eps
_PANEL_NUMBERS = 1 << 20
# From this fraction of the largest eigenvalue up, columns on the input side have all digits needed.
_WELL_CONDITIONED = 1e-6


class SecondMoment(Protocol):
    """What is read of a moment: methods.contract.Moment fits."""

    @property
    def kind(self) -> Literal["input", "shift"]:
        """Inputs x ("input", matrix I x I) or shifts x D^T ("shift", matrix O x O)."""

    @property
    def matrix(self) -> Tensor:
        """The uncentred second moment, float64, symmetric."""


@dataclass(frozen=True, slots=True)
class EssentialBasis:
    """Leading eigenvectors of S = D G D^T, largest eigenvalue first.

    Attributes:
        basis_OK: Orthonormal columns E, float64; the largest entry of each column is positive.
        coordinates_KI: E^T D (methods.md 1.1, step 2), float64.
        eigenvalues: Whole spectrum, descending, float64, shape (min(O, I),), never negative.
        rank: Number of eigenvalues that are not rounding; K = min(rank asked for, this rank).
        norm: Frobenius norm of D.
    """

    basis_OK: Tensor
    coordinates_KI: Tensor
    eigenvalues: Tensor
    rank: int
    norm: float


def essential_basis(
    update_OI: Tensor, moment: SecondMoment | None, rank: int, tolerance: float = 1e-10
) -> EssentialBasis:
    """Basis in which the activation shifts of an update have most energy (methods.md 1.1, step 1).

    Args:
        update_OI: Update D, any float dtype, shape (O, I).
        moment: Second moment of the layer's inputs or shifts; None means G = I, which gives the
            left singular vectors of D and its squared singular values.
        rank: Largest number of columns wanted, at least 1.
        tolerance: Eigenvalues up to this fraction of the largest count as zero. With 0 nothing
            does, the rank is O and S is O x O even for tall updates: columns without energy, also
            those past the end of `eigenvalues`, are then an arbitrary orthonormal completion.

    Returns:
        Basis, spectrum and numeric rank; no columns where D or the moment has no energy.

    Raises:
        ValueError: The update or the moment holds NaN or Inf, or `rank` is below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    moment_II = None
    if moment is not None:
        _finite(frobenius_norm(moment.matrix), "the moment")
        if moment.kind == "input":
            moment_II = moment.matrix.double()
    if (moment is None or moment.kind == "input") and _is_tall(update_OI) and tolerance:
        return _from_inputs(update_OI, moment_II, rank, tolerance)
    norm = _finite(frobenius_norm(update_OI), "the update")
    if moment is not None and moment.kind == "shift":
        shift_OO, floor = moment.matrix.double(), 0.0
    else:
        shift_OO = shift_moment(update_OI, moment_II)
        floor = _rounding_floor(norm, moment_II)
    values, vectors_OO = torch.linalg.eigh(shift_OO)
    del shift_OO
    # min(O, I) bounds how many eigenvalues are real.
    spectrum = _descending(values, min(update_OI.shape))
    numeric = _numeric_rank(spectrum, len(values), tolerance, floor)
    basis_OK = _last_columns(vectors_OO, min(rank, numeric))
    del vectors_OO
    basis_OK = basis_OK.mul_(_signs(basis_OK))
    return EssentialBasis(basis_OK, coordinates(basis_OK, update_OI), spectrum, numeric, norm)


def coordinates(basis_OK: Tensor, update_OI: Tensor) -> Tensor:
    """Coordinates C = E^T D of an update (methods.md 1.1, step 2), float64, shape (K, I)."""
    result_KI = basis_OK.new_zeros(basis_OK.shape[1], update_OI.shape[1])
    for basis_MK, update_MI in zip(row_panels(basis_OK), row_panels(update_OI), strict=True):
        result_KI.addmm_(basis_MK.T, update_MI)
    return result_KI


def frobenius_norm(update_OI: Tensor) -> float:
    """Frobenius norm, summed in float64; NaN or Inf exactly when an entry is.

    In panels, because torch makes a float64 copy of what it is asked to sum in float64.
    """
    panels = update_OI.flatten().split(_PANEL_NUMBERS)
    norms = [torch.linalg.vector_norm(panel, dtype=torch.float64) for panel in panels]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def shift_moment(update_OI: Tensor, moment_II: Tensor | None) -> Tensor:
    """Second moment of the shifts, S = D G D^T (G = I where None), float64, shape (O, O).

    Its lower half by panels, which is all that an eigendecomposition looks at.
    """
    num_outputs = update_OI.shape[0]
    result_OO = update_OI.new_zeros(num_outputs, num_outputs, dtype=torch.float64)
    starts = range(0, num_outputs, PANEL_ROWS)
    for start, panel_MI in zip(starts, row_panels(update_OI), strict=True):
        product_MI = panel_MI if moment_II is None else panel_MI @ moment_II
        rows_OO = result_OO[start : start + PANEL_ROWS]
        for first in starts[: start // PANEL_ROWS]:
            columns = slice(first, first + PANEL_ROWS)
            torch.mm(product_MI, update_OI[columns].double().T, out=rows_OO[:, columns])
        for first, last in lower_tiles(len(panel_MI)):
            columns = slice(start, start + last)
            torch.mm(product_MI[first:last], panel_MI[:last].T, out=rows_OO[first:last, columns])
    return result_OO


def _is_tall(update_OI: Tensor) -> bool:
    return update_OI.shape[0] > update_OI.shape[1]


def _from_inputs(
    update_OI: Tensor, moment_II: Tensor | None, rank: int, tolerance: float
) -> EssentialBasis:
    """Same eigenvectors from the input side: those of L^T (D^T D) L, G = L L^T (methods.md 1.5).

    An eigenvector v of eigenvalue w gives the column E = D B with B = L v / sqrt(w), and its
    coordinates B^T D^T D. Rounding leaves the columns of the smallest eigenvalues short of
    orthonormal; the Cholesky factor of their Gram matrix makes them so, and keeps their order.
    """
    inner_II = gram(row_panels(update_OI), update_OI.shape[1])
    assert inner_II is not None
    norm = _finite(math.sqrt(float(inner_II.trace())), "the update")
    floor = _rounding_floor(norm, moment_II)
    fill_upper(inner_II)
    root_II = None if moment_II is None else _root(moment_II)
    between_II = inner_II if root_II is None else _between(inner_II, root_II)
    values, vectors_II = torch.linalg.eigh(between_II)
    del between_II
    spectrum = _descending(values, update_OI.shape[1])
    numeric = _numeric_rank(spectrum, len(values), tolerance, floor)
    kept = min(rank, numeric)
    columns_IK = _last_columns(vectors_II, kept) / spectrum[:kept].sqrt()
    del vectors_II
    if root_II is not None:
        columns_IK = root_II @ columns_IK
    del root_II
    basis_OK = columns_IK.new_empty(update_OI.shape[0], kept)
    for basis_MK, update_MI in zip(basis_OK.split(PANEL_ROWS), row_panels(update_OI), strict=True):
        torch.mm(update_MI, columns_IK, out=basis_MK)
    if kept and float(spectrum[kept - 1]) >= _WELL_CONDITIONED * float(spectrum[0]):
        signs_1K = _signs(basis_OK)
        coordinates_KI = (columns_IK * signs_1K).T @ inner_II
        return EssentialBasis(basis_OK.mul_(signs_1K), coordinates_KI, spectrum, numeric, norm)
    del inner_II, columns_IK
    basis_OK = _orthonormal(basis_OK)
    basis_OK.mul_(_signs(basis_OK))
    return EssentialBasis(basis_OK, coordinates(basis_OK, update_OI), spectrum, numeric, norm)


def _between(inner_II: Tensor, root_II: Tensor) -> Tensor:
    """Lower tiles of L^T M L, of a lower triangle L and a symmetric M; nothing is made of zeros."""
    side = len(inner_II)
    product_II, result_II = torch.zeros_like(inner_II), torch.zeros_like(inner_II)
    for start, stop in lower_tiles(side):
        columns = product_II[start:, start:stop]
        torch.mm(inner_II[start:, start:], root_II[start:, start:stop], out=columns)
    for start, stop in lower_tiles(side):
        rows = result_II[start:stop, :stop]
        torch.mm(root_II[start:, start:stop].T, product_II[start:, :stop], out=rows)
    return result_II


def _orthonormal(basis_OK: Tensor) -> Tensor:
    """Nearly orthonormal columns made orthonormal, in order and in place."""
    gram_KK = gram(row_panels(basis_OK), basis_OK.shape[1])
    if gram_KK is None:
        return basis_OK
    root_KK = torch.linalg.cholesky(gram_KK.tril_())
    for basis_MK in basis_OK.split(PANEL_ROWS):
        basis_MK.copy_(torch.linalg.solve_triangular(root_KK.T, basis_MK, upper=True, left=False))
    return basis_OK


def _root(moment_II: Tensor) -> Tensor:
    """The lower triangle L with L L^T = G; by eigenvectors where G is not positive definite.

    Moments summed from float32 products with fewer tokens than features have eigenvalues of
    about -1e-8 of the largest, far more than the 4 eps trace(G) that keep Cholesky going.
    """
    shifted_II = moment_II.clone()
    shifted_II.diagonal().add_(4 * _EPSILON * moment_II.trace())
    root_II: Tensor
    root_II, failed = torch.linalg.cholesky_ex(shifted_II)
    if bool(failed):
        values, vectors_II = torch.linalg.eigh(moment_II)
        vectors_II *= values.clamp_(min=0).sqrt_()
        root_II = torch.linalg.qr(vectors_II.T, mode="r").R.T
    return root_II


def _rounding_floor(norm: float, moment_II: Tensor | None) -> float:
    """Eigenvalue that an update blind to all energy of G would still show, by rounding alone."""
    return 0.0 if moment_II is None else 16 * _EPSILON * float(moment_II.trace()) * norm**2


def _numeric_rank(spectrum: Tensor, vectors: int, tolerance: float, floor: float) -> int:
    """Number of eigenvalues above tolerance and floor; tolerance 0 counts every eigenvector."""
    largest = float(spectrum[0]) if len(spectrum) else 0.0
    if largest <= floor:
        return 0
    if tolerance == 0:
        return vectors
    return int((spectrum > max(tolerance * largest, floor)).sum())


def _descending(values: Tensor, count: int) -> Tensor:
    """The `count` largest of ascending eigenvalues, largest first, negatives set to 0."""
    return values.flip(0)[:count].clamp(min=0)


def _last_columns(vectors: Tensor, count: int) -> Tensor:
    """The last `count` columns in reverse order: eigenvectors, largest eigenvalue first."""
    return vectors[:, vectors.shape[1] - count :].flip(1)


def _signs(basis_OK: Tensor) -> Tensor:
    """The sign of the largest-magnitude entry of each column, (1, K)."""
    if basis_OK.shape[1] == 0:
        return basis_OK.new_ones(1, 0)
    return basis_OK.gather(0, basis_OK.abs().argmax(dim=0, keepdim=True)).sign_()


def _finite(norm: float, what: str) -> float:
    """A Frobenius norm, which is NaN or Inf exactly when an entry is."""
    if not math.isfinite(norm):
        raise ValueError(f"{what} holds NaN or Inf")
    return norm
