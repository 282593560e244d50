"""Essential basis of one expert's update of one matrix.

From:  an update D (base subtracted from expert) and a second moment of its layer.
To:    methods/esm.py, which weights and stacks the bases of all experts.
Peak:  float64 numbers, the caller's update and moment not counted. Wide D (O <= I): 6*O*O
       (eigenproblem with its workspace). Tall D (O > I): 8*I*I. Either way the result, K*(O + I),
       and two panels of 1024 rows.

Letters: O output features, I input features, K rank kept, N = min(O, I), T tokens.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from esm_stream.subspace.gram import fill_upper, gram, row_panels
from esm_stream.subspace.sizes import PANEL_ROWS

_EPSILON = torch.finfo(torch.float64).eps
_PANEL_NUMBERS = 1 << 20


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
        basis_OK: Orthonormal columns, float64; the largest entry of each column is positive.
        eigenvalues: Whole spectrum, descending, float64, shape (min(O, I),), never negative.
        rank: Number of eigenvalues that are not rounding; K = min(rank asked for, this rank).
    """

    basis_OK: Tensor
    eigenvalues: Tensor
    rank: int


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
    norm = _finite_norm(update_OI, "the update")
    if moment is not None:
        _finite_norm(moment.matrix, "the moment")
    if moment is not None and moment.kind == "shift":
        return _from_outputs(moment.matrix.double(), min(update_OI.shape), rank, tolerance, 0.0)
    moment_II = None if moment is None else moment.matrix.double()
    floor = _rounding_floor(norm, moment_II)
    if update_OI.shape[0] <= update_OI.shape[1] or tolerance == 0:
        shift_OO = shift_moment(update_OI, moment_II)
        return _from_outputs(shift_OO, min(update_OI.shape), rank, tolerance, floor)
    return _from_inputs(update_OI, moment_II, rank, tolerance, floor)


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
    for start, panel_MI in zip(
        range(0, num_outputs, PANEL_ROWS), row_panels(update_OI), strict=True
    ):
        columns = slice(start, start + PANEL_ROWS)
        product_MI = panel_MI if moment_II is None else panel_MI @ moment_II
        for first, below_MI in zip(
            range(start, num_outputs, PANEL_ROWS), row_panels(update_OI[start:]), strict=True
        ):
            torch.mm(below_MI, product_MI.T, out=result_OO[first : first + PANEL_ROWS, columns])
    return result_OO


def _from_outputs(
    shift_OO: Tensor, side: int, rank: int, tolerance: float, floor: float
) -> EssentialBasis:
    """Eigenvectors of S itself; `side` = min(O, I) bounds how many eigenvalues are real."""
    values, vectors_OO = torch.linalg.eigh(shift_OO)
    spectrum = _descending(values, side)
    numeric = _numeric_rank(spectrum, len(values), tolerance, floor)
    basis_OK = _last_columns(vectors_OO, min(rank, numeric))
    return EssentialBasis(_signed(basis_OK), spectrum, numeric)


def _from_inputs(
    update_OI: Tensor, moment_II: Tensor | None, rank: int, tolerance: float, floor: float
) -> EssentialBasis:
    """Same eigenvectors from the input side: those of L^T (D^T D) L, G = L L^T (methods.md 1.5).

    An eigenvector v of eigenvalue w gives the column D L v / sqrt(w). Rounding leaves the columns
    of the smallest eigenvalues a little short of orthonormal; the Cholesky factor of their Gram
    matrix makes them so, and keeps their order.
    """
    inner_II = gram(row_panels(update_OI), update_OI.shape[1])
    assert inner_II is not None
    root_II = None if moment_II is None else _root(moment_II)
    if root_II is not None:
        inner_II = root_II.T @ (fill_upper(inner_II) @ root_II)
    values, vectors_II = torch.linalg.eigh(inner_II)
    del inner_II
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
    return EssentialBasis(_signed(_orthonormal(basis_OK)), spectrum, numeric)


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
    """Some L with L L^T = G: Cholesky, or eigenvectors where G is not positive definite.

    Moments summed from float32 products with fewer tokens than features have eigenvalues of
    about -1e-8 of the largest, far more than the 4 eps trace(G) that keep Cholesky going.
    """
    shifted_II = moment_II.clone()
    shifted_II.diagonal().add_(4 * _EPSILON * moment_II.trace())
    root_II: Tensor
    root_II, failed = torch.linalg.cholesky_ex(shifted_II)
    if bool(failed):
        values, root_II = torch.linalg.eigh(moment_II)
        root_II *= values.clamp_(min=0).sqrt_()
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


def _signed(basis_OK: Tensor) -> Tensor:
    """Columns with the sign that makes their largest-magnitude entry positive, in place."""
    if basis_OK.shape[1] == 0:
        return basis_OK
    largest_1K = basis_OK.gather(0, basis_OK.abs().argmax(dim=0, keepdim=True))
    return basis_OK.mul_(largest_1K.sign())


def _finite_norm(matrix: Tensor, what: str) -> float:
    """Frobenius norm, which is NaN or Inf exactly when an entry is."""
    norm = frobenius_norm(matrix)
    if not math.isfinite(norm):
        raise ValueError(f"{what} holds NaN or Inf")
    return norm
