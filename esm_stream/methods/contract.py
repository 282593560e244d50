"""What the engine and a merging method promise each other.

The engine decides order, panels, files and devices; a method is pure functions over tensors.
Two kinds exist. An *elementwise* method sees row panels of all experts' updates, one after the
other, and never keeps more than a sum. A *factor* method sees one matrix at a time: it reduces the
update of each expert to two thin factors on its own, and later combines the factors of all experts.

Letters: T experts, O output features, I input features, K rank of one expert.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

Number = int | float
Diagnostics = Mapping[str, Number | str | Sequence[Number]]


@dataclass(frozen=True, slots=True)
class Moment:
    """Uncentred second moment of what one expert's layer sees or changes, float64.

    kind "input": G = sum of x^T x over tokens / tokens, shape (I, I), of the layer's inputs x.
    kind "shift": S = sum of o^T o over tokens / tokens, shape (O, O), of the shifts o = x D^T.
    """

    kind: Literal["input", "shift"]
    matrix: Tensor
    tokens: int


@dataclass(frozen=True, slots=True)
class Factors:
    """One expert's update of one matrix, reduced: update ~ basis @ coordinates.

    basis_OK has orthonormal columns, coordinates_KI = basis^T D. `spectrum` is whole (all
    eigenvalues or singular values, descending, float64), of which the first K belong to the
    columns kept; `norm` is the Frobenius norm of the whole update D.
    """

    basis_OK: Tensor
    coordinates_KI: Tensor
    spectrum: Tensor
    norm: float


@dataclass(frozen=True, slots=True)
class Merged:
    """The merged update of one matrix before layer scaling and alpha, with figures for reports."""

    update_OI: Tensor
    diagnostics: Diagnostics = field(default_factory=dict)


class ElementwiseMethod(Protocol):
    """Merges row panels; memory independent of the number of experts."""

    name: str

    def merge(self, updates: Iterable[Tensor]) -> Tensor:
        """Merged update of one panel from the float32 updates of all experts, in manifest order."""


class FactorMethod(Protocol):
    """Merges one matrix at a time from thin factors of every expert's update."""

    name: str
    uses_moments: bool

    def rank(self, shape: tuple[int, int], num_experts: int) -> int:
        """Largest number of columns K that `factor` keeps of an update of `shape` (O, I)."""

    def identity(self, step: Literal["factor", "combine"]) -> Mapping[str, object]:
        """Options that decide the numbers of `factor`, or those of `combine` given factors."""

    def factor(self, update_OI: Tensor, moment: Moment | None, num_experts: int) -> Factors:
        """Reduce one expert's update; deterministic, rank at most `rank(...)`."""

    def combine(self, factors: Sequence[Factors], shape: tuple[int, int]) -> Merged:
        """Merge the factors of all experts (manifest order) into one update (O, I), float64."""
