"""Matrices as they are stored: whole tensors, slices of stacks, ranges of rows; what each sees.

From:  opening.py: which matrix of which parameter was multiplied with what, and where it is stored.
To:    treatments.py, which merges pieces, alone or several as one matrix.

A tensor with two dimensions is one piece, unless its rows see different inputs or the manifest
splits it. A stored stack of experts has a piece for each expert.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from esm_stream.calibration.steps import OUTSIDE
from esm_stream.checkpoints.header import TensorInfo
from esm_stream.checkpoints.names import compile_pattern
from esm_stream.errors import ManifestError
from esm_stream.manifest import Split
from esm_stream.planning.opening import Opened

if TYPE_CHECKING:
    # They import transformers, which merges without data have no use for.
    from esm_stream.calibration.conversion import Place
    from esm_stream.calibration.hooks import ObservedMatrix


@dataclass(frozen=True, slots=True)
class Seen:
    """An observed input: `leader` is the key of the matrix that is looked at for it.

    `block`: the block it belongs to, or OUTSIDE. `shared`: other pieces see it too. `routed`: of
    experts of a mixture, how many inputs they get together for one token of the sample; 0 if tokens
    are not routed. `also`: what else to look at, for a matrix that several blocks share.
    """

    leader: str
    block: str
    shared: bool
    routed: float
    also: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """Some outputs of one stored matrix: those in `ranges`, in that order.

    `slice` is the matrix's place in a stored stack, None for a tensor that is one matrix;
    `transposed`: stored as (I, O). `seen` is None if no hook sees the input. `part` is the piece's
    number among those the manifest splits the matrix into.
    """

    tensor: str
    slice: int | None
    ranges: tuple[tuple[int, int], ...]
    whole: int
    inputs: int
    transposed: bool = False
    seen: Seen | None = None
    part: int | None = None

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return sum(stop - start for start, stop in self.ranges)

    @property
    def name(self) -> str:
        """The tensor's name, and in brackets which part of it this is: "w", "w[3]", "w[0:16]"."""
        name = self.tensor if self.slice is None else f"{self.tensor}[{self.slice}]"
        if self.part is not None:
            return f"{name}[part {self.part}]"
        (start, stop) = self.ranges[0]
        return name if self.outputs == self.whole else f"{name}[{start}:{stop}]"


def whole_matrix(info: TensorInfo) -> Piece:
    """A tensor as one matrix of (outputs, everything else) that nobody has seen used."""
    return Piece(info.name, None, ((0, info.shape[0]),), info.shape[0], info.columns)


class Pieces:
    """Pieces of all tensors whose inputs are observed."""

    def __init__(self, opened: Opened) -> None:
        self._splits = opened.manifest.merge.split
        self._observed = _observed(opened)

    def __contains__(self, tensor: str) -> bool:
        """Whether the inputs of all of a tensor's matrices are observed."""
        return all(piece.seen for piece in self._observed.get(tensor, ())) and (
            tensor in self._observed
        )

    def in_block(self, tensor: str) -> bool:
        """Whether all of a tensor's inputs are observed in a block."""
        return tensor in self and all(
            piece.seen is not None and piece.seen.block != OUTSIDE
            for piece in self._observed[tensor]
        )

    def is_stack(self, tensor: str) -> bool:
        """Whether a tensor is known to be a stack of matrices."""
        return any(piece.slice is not None for piece in self._observed.get(tensor, ()))

    def of(self, info: TensorInfo) -> tuple[Piece, ...]:
        """The pieces of a tensor, split as the manifest says.

        Raises:
            ManifestError: A split does not fit the tensor.
        """
        pieces = self._observed.get(info.name, (whole_matrix(info),))
        split = next(
            (s for s in self._splits if compile_pattern(s.tensors).fullmatch(info.name)), None
        )
        if split is None:
            return pieces
        return tuple(part for piece in pieces for part in _split(piece, split))


def _split(piece: Piece, split: Split) -> Iterator[Piece]:
    unit, rest = divmod(piece.whole, sum(split.parts) * split.groups)
    if rest or piece.outputs != piece.whole:
        raise ManifestError(
            f"merge.split: '{piece.name}' has {piece.outputs} outputs, which are not "
            f"{split.groups} x {sum(split.parts)} equal shares; see [[merge.split]] in the manual"
        )
    seen = replace(piece.seen, shared=True) if piece.seen else None
    start = 0
    for number, share in enumerate(split.parts):
        starts = [group * sum(split.parts) * unit + start for group in range(split.groups)]
        ranges = tuple((first, first + share * unit) for first in starts)
        yield replace(piece, ranges=ranges, seen=seen, part=number)
        start += share * unit


def _observed(opened: Opened) -> dict[str, tuple[Piece, ...]]:
    """Pieces of every tensor of which some matrix is observed."""
    if opened.trace is None or opened.skeleton is None:
        return {}
    shapes = {name: info.shape for name, info in opened.base.tensors.items()}
    tokens = opened.trace.sample_tokens
    found: dict[str, dict[tuple[int | None, int], _Sight]] = {}
    for block, matrices in opened.trace.matrices.items():
        for parameter, used in _by_parameter(matrices).items():
            places = opened.skeleton.places(
                parameter, shapes, stack=used[0].stack, transposed=used[0].layout.transposed
            )
            for matrix in used if places else ():
                routed = matrix.rows / tokens if matrix.routed else 0.0
                seen = Seen(matrix.leader, block, shared=False, routed=routed)
                for place in (places or ())[matrix.slice or 0]:
                    sights = found.setdefault(place.tensor, {})
                    key = place.slice, place.start
                    sights[key] = _sight_of(place, seen, sights.get(key))
    joined = {
        name: tuple(_joined(opened.base.tensors[name], sights.values()))
        for name, sights in found.items()
    }
    users = Counter(p.seen.leader for pieces in joined.values() for p in pieces if p.seen)
    return {
        name: tuple(
            replace(p, seen=replace(p.seen, shared=users[p.seen.leader] > 1)) if p.seen else p
            for p in pieces
        )
        for name, pieces in joined.items()
    }


@dataclass(frozen=True, slots=True)
class _Sight:
    """A place and what is seen of its input."""

    place: "Place"
    seen: Seen


def _sight_of(place: "Place", seen: Seen, before: _Sight | None) -> _Sight:
    """What is seen of a place: the first input, and those of other blocks that share it."""
    if before is None:
        return _Sight(place, seen)
    if seen.leader in (before.seen.leader, *before.seen.also):
        return before
    return _Sight(place, replace(before.seen, also=(*before.seen.also, seen.leader)))


def _by_parameter(matrices: "Iterable[ObservedMatrix]") -> "dict[str, list[ObservedMatrix]]":
    found: dict[str, list[ObservedMatrix]] = {}
    for matrix in matrices:
        found.setdefault(matrix.parameter, []).append(matrix)
    return found


def _joined(info: TensorInfo, sights: Iterable[_Sight]) -> Iterator[Piece]:
    """Pieces of one tensor: neighbouring rows that see one input are one piece."""
    by_slice: dict[int | None, list[_Sight]] = {}
    for sight in sights:
        by_slice.setdefault(sight.place.slice, []).append(sight)
    stack = next(iter(by_slice)) is not None
    for number in range(info.shape[0]) if stack else (None,):
        rows, columns = info.shape[1:] if stack else (info.shape[0], math.prod(info.shape[1:]))
        mine = sorted(by_slice.get(number, []), key=lambda sight: sight.place.start)
        transposed = bool(mine) and mine[0].place.transposed
        whole, inputs = (columns, rows) if transposed else (rows, columns)
        blank = Piece(info.name, number, (), whole, inputs, transposed)
        yield from _filled(blank, mine)


def _filled(blank: Piece, sights: list[_Sight]) -> Iterator[Piece]:
    """Pieces of one stored matrix from first to last output, those that nobody sees included."""
    runs: list[tuple[int, int, Seen | None]] = []
    end = 0
    for sight in sights:
        place, seen = sight.place, sight.seen
        if place.start > end:
            runs.append((end, place.start, None))
        if runs and runs[-1][2] == seen:
            runs[-1] = (runs[-1][0], place.stop, seen)
        else:
            runs.append((place.start, place.stop, seen))
        end = place.stop
    if end < blank.whole:
        runs.append((end, blank.whole, None))
    for start, stop, known in runs:
        yield replace(blank, ranges=((start, stop),), seen=known)
