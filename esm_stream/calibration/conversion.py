"""Parameters that transformers assembles at load, and which part of which stored tensor they hold.

From:  transformers' own rules for names and its converters; names and shapes of stored tensors.
To:    skeleton.py (values of a module's parameters), planning (which stored tensor is merged how).
Cost:  converters run on tensors without values, so nothing is read and nothing is large.

A converter is never looked into. It is run on tensors that only know where each of their elements
came from (`_Traced`): what the result says of itself holds for any order of stacking, joining,
cutting, transposing and permuting. A converter that computes new values cannot be traced: its
parameters load as ever, but no stored tensor is said to be a part of them.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter

from esm_stream.errors import UnsupportedModelError

Shape = tuple[int, ...]
# Numbers of stored tensors, and positions of elements in them, both of shape (n,), for positions of
# shape (n, number of dimensions) in the result.
Origin = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Place:
    """One matrix (or some output rows of it) of a parameter, as it lies in a stored tensor.

    `slice` is the index in the first dimension of a stored stack, None for a tensor that is one
    matrix. `start` and `stop` count outputs of that stored matrix. `transposed`: stored (I, O).
    """

    tensor: str
    slice: int | None
    start: int
    stop: int
    transposed: bool


@dataclass(frozen=True, slots=True)
class Conversion:
    """Stored tensors that become parameters together, by one of transformers' converters.

    `sources` are (pattern of the converter, stored tensor) in the order in which it takes them,
    `first` is the parameter that names the conversion, `targets` are all that it makes.
    """

    converter: WeightConverter
    first: str
    sources: tuple[tuple[str, str], ...]
    shapes: tuple[Shape, ...]
    targets: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the stored tensors."""
        return tuple(tensor for _, tensor in self.sources)

    @property
    def likeness(self) -> object:
        """Equal for conversions that do the same to tensors of other names."""
        return id(self.converter), tuple(pattern for pattern, _ in self.sources), self.shapes

    def run(self, model: PreTrainedModel, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters by name, from values of the stored tensors by name."""
        converter = copy.deepcopy(self.converter)
        for pattern, tensor in self.sources:
            converter.add_tensor(self.first, tensor, pattern, lambda t=tensor: values[t])  # type: ignore[arg-type]
        made = converter.convert(self.first, model=model, config=model.config)
        return {name: v[0] if isinstance(v, list) else v for name, v in made.items()}

    def trace(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """What `run` makes, without values; traced unless the converter computes new values.

        Raises:
            UnsupportedModelError: The converter cannot take these shapes.
        """
        metas = [torch.empty(shape, device="meta") for shape in self.shapes]
        traced = {
            name: _Traced(meta, _stored(number, tuple(meta.shape)))
            for number, (name, meta) in enumerate(zip(self.tensors, metas, strict=True))
        }
        try:
            return self.run(model, traced)
        except _OpaqueError:
            return self.run(model, dict(zip(self.tensors, metas, strict=True)))
        except (RuntimeError, ValueError, IndexError, AttributeError) as error:
            raise UnsupportedModelError(
                f"parameter '{self.first}' cannot be assembled from '{self.tensors[0]}' and "
                f"{len(self.tensors) - 1} more: {str(error).splitlines()[0]}"
            ) from error


def places_unchanged(
    tensor: str, shape: Shape, stack: int | None, *, transposed: bool
) -> tuple[tuple[Place, ...], ...]:
    """Where the matrices of a parameter lie that is stored as it is; see `places_of`."""
    matrices, rows, columns = _as_stack(shape, stack)
    outputs = columns if transposed else rows
    if stack is not None and len(shape) == 3:
        return tuple((Place(tensor, i, 0, outputs, transposed),) for i in range(matrices))
    return tuple(
        (Place(tensor, None, i * outputs, (i + 1) * outputs, transposed),) for i in range(matrices)
    )


def _as_stack(shape: Shape, stack: int | None) -> Shape:
    """A parameter's shape as (matrices, rows, columns)."""
    if stack is not None and len(shape) == 3:
        return shape
    matrices = stack or 1
    return matrices, shape[0] // matrices, math.prod(shape[1:])


def places_of(
    parameter: Tensor, sources: Sequence[tuple[str, Shape]], stack: int | None, *, transposed: bool
) -> tuple[tuple[Place, ...], ...] | None:
    """Where the matrices of a traced parameter lie in stored tensors.

    Args:
        parameter: Traced.
        sources: Names and shapes of the stored tensors, in the order of the conversion.
        stack: How many equal matrices the parameter is, one after the other; None if it is one.
        transposed: Whether they are (I, O).

    Returns:
        For each matrix of the parameter the parts of its outputs; None if the parameter is not
        traced or some part is not a range of whole outputs with all inputs in their order.
    """
    if not isinstance(parameter, _Traced):
        return None
    shape = _as_stack(tuple(parameter.shape), stack)
    outputs, inputs = (shape[2], shape[1]) if transposed else shape[1:]

    def origin(at_MOI: Tensor) -> tuple[Tensor, Tensor]:
        at = at_MOI[:, [0, 2, 1]] if transposed else at_MOI
        return parameter.origin(_unravel(_ravel(at, shape), tuple(parameter.shape)))

    result = []
    for matrix in range(shape[0]):
        # The first and the last input of every output, and all inputs of the first output.
        this, ends = torch.tensor([matrix]), torch.tensor([0, inputs - 1])
        edges = torch.cartesian_prod(this, torch.arange(outputs), ends)
        number, position = (found.view(outputs, 2) for found in origin(edges))
        along = torch.cartesian_prod(this, torch.zeros(1).long(), torch.arange(inputs))
        steps = origin(along)[1].diff()
        parts = _parts(number, position, sources, inputs)
        if not parts or bool((steps != steps[:1]).any()):
            return None
        result.append(parts)
    return tuple(result)


def _parts(
    number_O2: Tensor, position_O2: Tensor, sources: Sequence[tuple[str, Shape]], inputs: int
) -> tuple[Place, ...]:
    """Stored ranges of one matrix's outputs, from the origin of each output's two ends.

    Empty if some part is not a range of whole outputs.
    """
    result = []
    for one in number_O2[:, 0].unique().tolist():
        name, stored = sources[one]
        mine = number_O2[:, 0] == one
        first, last = position_O2[mine].T
        size = math.prod(stored[1:]) if len(stored) == 3 else math.prod(stored)
        stack = len(stored) == 3 and len(first) * inputs <= size
        size = size if stack else math.prod(stored)
        step = int(last[0] - first[0]) // max(inputs - 1, 1)
        transposed = inputs > 1 and step != 1
        outputs = first % size if transposed else first % size // inputs
        start, stop = int(outputs.min()), int(outputs.max()) + 1
        whole = (
            torch.equal(number_O2[mine, 0], number_O2[mine, 1])
            and bool((last - first == step * (inputs - 1)).all())
            and torch.equal(first // size, last // size)
            and len((first // size).unique()) == 1
            and stop - start == len(outputs.unique())
            and size % inputs == 0
            and (not transposed or step * inputs == size)
        )
        if not whole:
            return ()
        place = int(first[0]) // size if stack else None
        result.append(Place(name, place, start, stop, transposed))
    return tuple(result)


# Tensors without values that know where their elements come from ------------------------------


class _OpaqueError(Exception):
    """An operation made new values, or it is not known."""


class _Traced(Tensor):
    """A tensor without values; `origin` tells for each position the source and the place in it."""

    meta: Tensor
    origin: Origin

    @staticmethod
    def __new__(cls: type["_Traced"], meta: Tensor, origin: Origin) -> "_Traced":
        made: _Traced = Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=meta.device
        )
        made.meta, made.origin = meta, origin
        return made

    def __init__(self, meta: Tensor, origin: Origin) -> None:
        """Everything is set when it is made."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run an operation on the shapes, and follow its results' elements back."""
        rule = _RULES.get(func.overloadpacket)
        if rule is None:
            raise _OpaqueError(str(func))
        plain, options = tree_map_only(_Traced, lambda t: t.meta, (args, kwargs or {}))
        made = func(*plain, **options)
        if isinstance(made, Tensor):
            return _Traced(made, rule(made, 0, *args, **(kwargs or {})))
        return [_Traced(one, rule(one, i, *args, **(kwargs or {}))) for i, one in enumerate(made)]


def _stored(number: int, shape: Shape) -> Origin:
    return lambda at: (torch.full((len(at),), number), _ravel(at, shape))


def _ravel(at: Tensor, shape: Sequence[int]) -> Tensor:
    """Positions (n, dimensions) as flat positions (n,)."""
    flat = torch.zeros(len(at), dtype=torch.long)
    for dim, size in enumerate(shape):
        flat = flat * size + at[:, dim]
    return flat


def _unravel(flat: Tensor, shape: Sequence[int]) -> Tensor:
    """Flat positions (n,) as positions (n, dimensions)."""
    columns = []
    for size in reversed(shape):
        columns.append(flat % size)
        flat = flat // size
    return torch.stack(columns[::-1], 1)


def _same_order(made: Tensor, _: int, source: _Traced, *__: Any, **___: Any) -> Origin:  # noqa: ANN401
    return lambda at: source.origin(_unravel(_ravel(at, made.shape), source.shape))


def _permuted(source: _Traced, order: Sequence[int]) -> Origin:
    """Dimension i of the result is dimension order[i] of the source."""
    inverse = [list(order).index(dim) for dim in range(source.ndim)]
    return lambda at: source.origin(at[:, inverse])


def _transpose(_: Tensor, __: int, source: _Traced, dim0: int = 0, dim1: int = 1) -> Origin:
    order = list(range(source.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permuted(source, order)


def _permute(_: Tensor, __: int, source: _Traced, dims: Sequence[int]) -> Origin:
    return _permuted(source, [dim % source.ndim for dim in dims])


def _moved(source: _Traced, dim: int, start: int, step: int = 1) -> Origin:
    """A range of one dimension, beginning at `start`."""

    def origin(at: Tensor) -> tuple[Tensor, Tensor]:
        moved = at.clone()
        moved[:, dim] = moved[:, dim] * step + start
        return source.origin(moved)

    return origin


def _slice(
    _: Tensor,
    __: int,
    source: _Traced,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,  # noqa: ARG001
    step: int = 1,
) -> Origin:
    first = (start or 0) if (start or 0) >= 0 else source.shape[dim] + (start or 0)
    return _moved(source, dim, first, step)


def _split(
    _: Tensor, index: int, source: _Traced, sizes: int | Sequence[int], dim: int = 0
) -> Origin:
    start = index * sizes if isinstance(sizes, int) else sum(sizes[:index])
    return _moved(source, dim, start)


def _taken(source: _Traced, dim: int, index: int) -> Origin:
    """One index of a dimension, which is gone in the result."""

    def origin(at: Tensor) -> tuple[Tensor, Tensor]:
        fixed = torch.full((len(at), 1), index % source.shape[dim])
        place = dim % source.ndim
        return source.origin(torch.cat([at[:, :place], fixed, at[:, place:]], 1))

    return origin


def _select(_: Tensor, __: int, source: _Traced, dim: int, index: int) -> Origin:
    return _taken(source, dim, index)


def _unbind(_: Tensor, index: int, source: _Traced, dim: int = 0) -> Origin:
    return _taken(source, dim, index)


def _among(parts: Sequence[_Traced], which: Tensor, at: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Origins of positions that lie in one of several tensors each; `at` as seen by each part."""
    number, position = torch.zeros(len(which)).long(), torch.zeros(len(which)).long()
    order = which.argsort(stable=True)
    counts = which.bincount(minlength=len(parts)).tolist()
    for part, mine, seen in zip(parts, order.split(counts), at, strict=True):
        if len(mine):
            number[mine], position[mine] = part.origin(seen[mine])
    return number, position


def _cat(made: Tensor, _: int, parts: Sequence[_Traced], dim: int = 0) -> Origin:
    place = dim % made.ndim
    ends = torch.tensor([part.shape[place] for part in parts]).cumsum(0)

    def origin(at: Tensor) -> tuple[Tensor, Tensor]:
        which = torch.bucketize(at[:, place].contiguous(), ends, right=True)
        moved = at.clone()
        moved[:, place] -= torch.cat([torch.zeros(1).long(), ends])[which]
        return _among(parts, which, [moved] * len(parts))

    return origin


def _stack(made: Tensor, _: int, parts: Sequence[_Traced], dim: int = 0) -> Origin:
    place = dim % made.ndim

    def origin(at: Tensor) -> tuple[Tensor, Tensor]:
        inner = torch.cat([at[:, :place], at[:, place + 1 :]], 1)
        return _among(parts, at[:, place], [inner] * len(parts))

    return origin


_aten = torch.ops.aten
_RULES: Final[dict[Any, Callable[..., Origin]]] = {
    **dict.fromkeys(
        (
            *(_aten.view, _aten._unsafe_view, _aten.clone, _aten.detach, _aten.alias),
            *(_aten.squeeze, _aten.unsqueeze, _aten._to_copy, _aten.contiguous),
        ),
        _same_order,
    ),
    **dict.fromkeys((_aten.transpose, _aten.t), _transpose),
    _aten.permute: _permute,
    _aten.slice: _slice,
    _aten.split: _split,
    _aten.split_with_sizes: _split,
    _aten.select: _select,
    _aten.unbind: _unbind,
    _aten.cat: _cat,
    _aten.stack: _stack,
}
