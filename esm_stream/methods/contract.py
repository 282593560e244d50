"""What the engine and a merging method promise each other.

The engine decides order, panels, files and devices; a method is pure functions over tensors.
Four kinds exist.

An *elementwise* method sees panels: the same elements of the base and of all experts' updates.
Before it merges it may sweep over the tensor, or over all tensors it merges, to sum statistics.
Panels hold a fixed number of numbers, so memory depends neither on tensors nor on experts.

A *spectral* method sees one matrix at a time and streams the experts' updates as often as it wants.

A *sum* method needs nothing of the experts but sums over them: each update is visited once, in any
order, and memory depends on no number of experts. The sums are kept, and experts added to them.

A *factor* method reduces each expert's update of one matrix to two thin factors on its own, which
is what the forward pass needs, and later combines the factors of all experts.

Letters: T experts, N elements of a panel, O output features, I input features, K rank of one
expert.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from esm_stream.methods.profiles import Modality
from esm_stream.subspace.product import Rows

Number = int | float
Diagnostics = Mapping[str, Number | str | Sequence[Number]]
Sums = dict[str, Tensor]
Share = Annotated[float, Field(gt=0, le=1)]
# One value for all experts, or one for each by name.
Shares = Share | dict[str, Share]


@dataclass(frozen=True, slots=True)
class About:
    """What `esm-stream methods` says of a method, one short line each.

    `data` is what it needs besides the models, `passes` how often it reads the experts, `memory`
    what it holds at a time.
    """

    summary: str
    source: str
    data: str
    passes: str
    memory: str
    when: str


class MethodOptions(BaseModel):
    """Base of all options: frozen, finite numbers, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False
    )


@dataclass(frozen=True, slots=True)
class Panel:
    """The same N elements of base and experts, float32 (float64 where one of the models is).

    Attributes:
        tensor: Name of the tensor.
        first: Index of the first element in the flattened tensor.
        columns: Length of a row, which is the whole tensor where it has fewer than 2 dimensions.
        experts: Names, in manifest order.
        weights: One per expert, as given in the manifest.
        base_N: Elements of the base.
        updates_TN: Expert minus base; made anew for every sweep, so a method may overwrite it.
        fisher_TN: Fisher information of the experts, 0 or above, for methods that need it.
    """

    tensor: str
    first: int
    columns: int
    experts: tuple[str, ...]
    weights: tuple[float, ...]
    base_N: Tensor
    updates_TN: Tensor
    fisher_TN: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Whole:
    """What a sweep went over: one tensor, or all tensors of one method and its options."""

    experts: tuple[str, ...]
    weights: tuple[float, ...]
    elements: int


def each(option: float | Mapping[str, float], experts: Sequence[str]) -> list[float]:
    """An option's value for every expert: one number for all, or one by name."""
    if isinstance(option, Mapping):
        return [option[name] for name in experts]
    return [option] * len(experts)


def add_to(sums: Sums, key: str, value: Tensor) -> None:
    """Add to a sum that may not have begun."""
    if key in sums:
        sums[key] += value
    else:
        sums[key] = value.clone()


class Method:
    """What every method has; `default_alpha` is `alpha_for` all models and numbers of experts."""

    name: ClassVar[str]
    Options: ClassVar[type[MethodOptions]]
    about: ClassVar[About]
    default_alpha: ClassVar[float] = 1.0
    max_experts: ClassVar[int | None] = None

    def __init__(self, options: Any) -> None:  # noqa: ANN401 - a model of the method's own
        self.options = options

    def alpha_for(self, modality: Modality, num_experts: int) -> float:  # noqa: ARG002
        """What stands where the manifest gives no alpha."""
        return self.default_alpha

    @classmethod
    def create(cls, options: MethodOptions, modality: Modality) -> Self:  # noqa: ARG003
        """A method for a model that reads what `modality` says."""
        return cls(options)


class ElementwiseMethod(Method):
    """Merges panels, after as many measuring sweeps as it needs.

    `scope` says over what a sweep sums: each tensor, or all tensors merged with the same options.
    `whole_rows`: panels begin and end with a row. `needs_fisher`: panels have Fisher information.
    """

    scope: Literal["tensor", "model"] = "tensor"
    sweeps: int = 0
    whole_rows: ClassVar[bool] = False
    needs_fisher: ClassVar[bool] = False

    def measure(self, panel: Panel, known: Sequence[Any], sums: Sums) -> None:
        """Add one panel to the sums of sweep number `len(known)` (float64 or int64 tensors)."""
        raise NotImplementedError

    def settle(self, sums: Sums, known: Sequence[Any], whole: Whole) -> Any:  # noqa: ANN401, ARG002
        """What later sweeps and the merge need to know of the sums of sweep `len(known)`."""
        return sums

    def merge(self, panel: Panel, known: Sequence[Any]) -> Tensor:
        """Merged update (N,) of one panel; `known` has one entry per sweep."""
        raise NotImplementedError


class Updates(Protocol):
    """The experts' updates of one matrix, weights applied; each iteration reads them anew."""

    @property
    def device(self) -> torch.device:
        """Where the updates are, and what is computed with them."""

    def __iter__(self) -> Iterator[Tensor]:
        """Updates (O, I), float32, in manifest order; the caller may overwrite them."""

    def __len__(self) -> int:
        """Number of experts."""

    def low_rank(self) -> list[tuple[Tensor, Tensor]] | None:
        """Factors (O, R) and (R, I) of every update, float64; None unless all come as such."""


def zeros(updates: Updates, *shape: int) -> Tensor:
    """Zeros in float64 where the updates are, for sums over them."""
    return torch.zeros(shape, dtype=torch.float64, device=updates.device)


class SpectralMethod(Method):
    """Merges one matrix at a time, from as many passes over the experts as it needs.

    `blocks_only`: matrices outside the blocks are averaged.
    """

    blocks_only: ClassVar[bool] = False

    def merge(self, updates: Updates, shape: tuple[int, int]) -> "Merged":
        """Merged update of a matrix of shape (O, I)."""
        raise NotImplementedError

    def peak_numbers(self, shape: tuple[int, int], num_experts: int) -> int:
        """Upper bound of the float64 numbers that `merge` holds, one float32 update included."""
        raise NotImplementedError

    def low_rank_numbers(
        self,
        shape: tuple[int, int],  # noqa: ARG002
        num_experts: int,  # noqa: ARG002
        rank: int,  # noqa: ARG002
    ) -> int | None:
        """The same bound for updates that come as factors of this rank together.

        None for methods that look at the updates themselves all the same.
        """
        return None

    def decompositions(self, num_experts: int) -> int:  # noqa: ARG002
        """Singular value decompositions, or as much work, that `merge` does of the matrix."""
        return 1


@dataclass(frozen=True, slots=True)
class Moment:
    """Uncentred second moment of what one expert's layer sees or changes; float32 for sums alone.

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
    columns kept; `norm` is the Frobenius norm of the whole update D. What `factor` makes is
    tensors; for `combine` the rows of a basis may be read from disk each time they are asked for.
    """

    basis_OK: Rows
    coordinates_KI: Tensor
    spectrum: Tensor
    norm: float


@dataclass(frozen=True, slots=True)
class Merged:
    """The merged update of one matrix before layer scaling and alpha, with figures for reports."""

    update_OI: Tensor
    diagnostics: Diagnostics = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a panel lies in a sum: rows start..stop and the first `columns` of the sum `name`."""

    name: str
    start: int
    stop: int
    columns: int


SumReader = Callable[[Place], Tensor]


class SumMethod(Method):
    """Merges one matrix at a time from sums over the experts.

    `blocks_only`: matrices outside the blocks are averaged. `uses_moments`: terms are made of the
    moments of inputs besides the updates; `inputs_of_merged`: of inputs in the merged model, whose
    blocks are then merged one after the other.
    """

    blocks_only: ClassVar[bool] = True
    uses_moments: bool = False
    inputs_of_merged: bool = False

    def identity(self, step: Literal["term", "solve"]) -> Mapping[str, object]:
        """Options that decide the numbers of one expert's terms, or those of the result."""
        raise NotImplementedError

    def places(self, shape: tuple[int, int]) -> tuple[Place, ...]:
        """The panels that the sums of a matrix of shape (O, I) consist of."""
        raise NotImplementedError

    def sum_numbers(self, shape: tuple[int, int]) -> int:
        """Numbers of the sums of a matrix of shape (O, I)."""
        return sum((p.stop - p.start) * p.columns for p in self.places(shape))

    def term(self, update_OI: Tensor, moment: Moment | None) -> Iterator[Tensor]:
        """What one expert adds to the sums, one panel for each place; none for a zero update."""
        raise NotImplementedError

    def solve(self, sums: SumReader, shape: tuple[int, int]) -> Merged:
        """Merged update from the sums, whose panels are read in float64 when asked for."""
        raise NotImplementedError

    def term_numbers(self, shape: tuple[int, int]) -> int:
        """Upper bound of the float64 numbers that `term` holds beside the moment."""
        raise NotImplementedError

    def solve_numbers(self, shape: tuple[int, int]) -> int:
        """Upper bound of the float64 numbers that `solve` holds, its result included."""
        raise NotImplementedError


class FactorMethod(Protocol):
    """Merges one matrix at a time from thin factors of every expert's update.

    `factors_by_svd`: `factor` holds the singular value decomposition of a whole update;
    `forms_stacks`: `combine` holds the bases of all experts and their singular vectors at once.
    `needs_inputs`: moments are of inputs, never of shifts. `streams`: `combine` takes the factors
    one after the other and says by `combine_numbers(shape)` what it holds.
    """

    name: ClassVar[str]
    uses_moments: bool
    about: ClassVar[About]
    factors_by_svd: bool
    forms_stacks: bool
    needs_inputs: bool
    streams: bool

    def rank(self, shape: tuple[int, int], num_experts: int) -> int:
        """Largest number of columns K that `factor` keeps of an update of `shape` (O, I)."""

    def identity(self, step: Literal["factor", "combine"]) -> Mapping[str, object]:
        """Options that decide the numbers of `factor`, or those of `combine` given factors."""

    def factor(self, update_OI: Tensor, moment: Moment | None, num_experts: int) -> Factors:
        """Reduce one expert's update; deterministic, rank at most `rank(...)`."""

    def combine(self, factors: Any, shape: tuple[int, int]) -> Merged:  # noqa: ANN401
        """Merge the factors of all experts (manifest order) into one update (O, I).

        Computed in float64, in the dtype of the coordinates.
        """


AnyMethod = ElementwiseMethod | SpectralMethod | SumMethod | FactorMethod
