"""What every matrix of a module is multiplied with: seen where torch multiplies, always let go.

From:  a running module, whoever wrote it.
To:    trace.py (which matrices there are, which share an input), stages/ (sums of moments).
Cost:  a few microseconds for each call of a torch function; nothing is kept.

A matrix is a parameter, or a slice of a parameter that is a stack (the experts of a mixture). It is
recognised by identity when it is an operand of a product, so it does not matter whose module owns
it: linear layers and their subclasses, routers that call `linear` on a bare parameter, tied heads,
stacks of experts in any of transformers' implementations and in those models' own. Casts, slices
and transposed views of a parameter are recognised as well; a parameter that enters a computation in
another way (scaled, added to) is not seen. The products themselves are not touched.

A *key* names a matrix: the parameter's name without ".weight", and "#3" for slice 3 of a stack.
"""

import copy
import math
import threading
import weakref
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

Observer = Callable[[str, Tensor], None]
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a matrix is kept in its parameter: O outputs, I inputs; `transposed` as (I, O)."""

    outputs: int
    inputs: int
    transposed: bool


@dataclass(frozen=True, slots=True)
class ObservedMatrix:
    """A matrix whose input is seen.

    `parameter` is the name of the parameter, which is a stack of `stack` matrices (None: it is one)
    of which this is number `slice`. `leader` is the key of the first matrix that is multiplied with
    the same input: those with one leader share their input. `rows`: how many there were.
    """

    key: str
    parameter: str
    layout: Layout
    leader: str
    stack: int | None = None
    slice: int | None = None
    rows: int = 0

    @property
    def routed(self) -> bool:
        """Whether it gets the tokens that are routed to it, which may be few or none."""
        return self.stack is not None and not self.parameter.endswith("in_proj_weight")

    def within(self, prefix: str) -> "ObservedMatrix":
        """The same matrix, named from the module that has the observed one at `prefix`."""
        return replace(
            self,
            key=f"{prefix}.{self.key}",
            parameter=f"{prefix}.{self.parameter}",
            leader=f"{prefix}.{self.leader}",
        )


@contextmanager
def observe_inputs(
    root: nn.Module, observer: Observer, keys: Collection[str], prefix: str = ""
) -> Generator[None]:
    """Call `observer(key, x)` with what matrices of a module are multiplied with, shape (..., I).

    In whatever thread the module's forward is called, as long as the block lasts; what is observed
    inside of it by somebody else goes to them alone. A matrix that is
    used several times is reported each time; a convolution's input comes unfolded, sample by
    sample; an expert's input has the tokens that are routed to it.

    Args:
        root: Its forward is watched. Parameters may be replaced while it runs: those that are its
            own are found again, others are known if they have passed through `named`.
        observer: Called before the product; must not change x.
        keys: The matrices to report.
        prefix: Name of `root`, put before the names of its parameters.
    """
    wanted = frozenset(keys)
    parameters = {key.partition("#")[0] for key in wanted}

    def report(use: "_Use") -> None:
        if use.key in wanted:
            observer(use.key, use.x)

    with _watching(root, report, prefix, lambda name: _matrix_name(name) in parameters):
        yield


@contextmanager
def trace_inputs(root: nn.Module, prefix: str = "") -> Generator[dict[str, ObservedMatrix]]:
    """Collect, by key, the matrices that a module's forward multiplies something with.

    The module may be on the meta device; where tokens would be routed to experts, all experts are
    listed then.
    """
    matrices: dict[str, ObservedMatrix] = {}
    leaders: dict[tuple[int, int | None], str] = {}
    alive = []

    def remember(use: "_Use") -> None:
        rows = use.x.numel() // use.layout.inputs
        if use.key in matrices:
            known = matrices[use.key]
            matrices[use.key] = replace(known, rows=known.rows + rows)
            return
        alive.append(use.source)  # identities are compared
        part = None if use.x is use.source else use.slice
        leader = leaders.setdefault((id(use.source), part), use.key)
        matrices[use.key] = ObservedMatrix(
            use.key, use.parameter, use.layout, leader, use.stack, use.slice, rows
        )

    with _watching(root, remember, prefix, lambda _: True), _traceable_experts(root):
        yield matrices


def named(value: Tensor, parameter: str) -> Tensor:
    """Let a tensor be recognised as a parameter, by the parameter's full name."""
    value.esm_stream_parameter = parameter  # type: ignore[attr-defined]
    return value


def would_multiply(x: Tensor, matrix: Tensor) -> None:
    """Let those who watch see the input (..., I) of a matrix (O, I) that is not multiplied."""
    if has_torch_function((x, matrix)):
        handle_torch_function(would_multiply, (x, matrix), x, matrix)


@contextmanager
def _traceable_experts(root: nn.Module) -> Generator[None]:
    """On meta, experts run in the implementation whose shapes do not depend on values."""
    on_meta = any(p.device.type == "meta" for p in root.parameters())
    configs: dict[int, Any] = {
        id(m.config): m.config
        for m in root.modules()
        if on_meta and hasattr(m, "_is_expert_parallel")
    }
    before = {name: config._experts_implementation for name, config in configs.items()}
    for config in configs.values():
        config._experts_implementation_internal = "batched_mm"
    try:
        yield
    finally:
        for name, config in configs.items():
            config._experts_implementation_internal = before[name]


@contextmanager
def _watching(
    root: nn.Module, report: Callable[["_Use"], None], prefix: str, watched: Callable[[str], bool]
) -> Generator[None]:
    """Report every use of a module's parameters whose name is `watched`, until the block ends."""
    watch = _Watch(root, report, prefix, watched)
    with ExitStack() as undo:
        for name, module in root.named_modules(prefix=prefix):
            if isinstance(module, nn.MultiheadAttention) and any(
                watched(f"{name}.{leaf}" if name else leaf) for leaf, _ in module.named_parameters()
            ):
                undo.enter_context(_attention(module, name, report))
        forward = root.forward

        @wraps(forward)
        def watched_forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            with watch, _innermost(watch):
                return forward(*args, **kwargs)

        undo.enter_context(_replaced(root, watched_forward))
        yield


_INNERMOST = threading.local()


@contextmanager
def _innermost(watch: "_Watch") -> Generator[None]:
    """Of several that watch one thread only the one entered last looks."""
    before = getattr(_INNERMOST, "watch", None)
    _INNERMOST.watch = watch
    try:
        yield
    finally:
        _INNERMOST.watch = before


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Generator[None]:
    """Give a module another forward until the block ends."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _matrix_name(parameter: str) -> str:
    return parameter.removesuffix(".weight")


# What is reported --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Use:
    """One product: of matrix `key` with x, (..., I), which is `source` or was made from it."""

    parameter: str
    layout: Layout
    x: Tensor
    source: Tensor
    stack: int | None = None
    slice: int | None = None

    @property
    def key(self) -> str:
        name = _matrix_name(self.parameter)
        return name if self.slice is None else f"{name}#{self.slice}"


@dataclass(frozen=True, slots=True)
class _Weight:
    """An operand that is a parameter or was made from one without computing.

    `stack`: how many matrices the parameter is a stack of, None until that is known. `index`: the
    slice that this is, or a tensor of slices; None for all. `flipped`: an odd number of transposes.
    """

    parameter: str
    stack: int | None = None
    index: int | Tensor | None = None
    flipped: bool = False


class _Watch(TorchFunctionMode):
    """Sees each call of a torch function and looks for parameters among the operands."""

    def __init__(
        self,
        root: nn.Module,
        report: Callable[[_Use], None],
        prefix: str,
        watched: Callable[[str], bool],
    ) -> None:
        super().__init__()
        self._modules = list(root.named_modules())
        self._report = report
        self._watched = watched
        self._prefix = f"{prefix}." if prefix else ""
        self._known: dict[int, tuple[weakref.ref[Tensor], _Weight | None]] = {}
        self._scan()

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if _INNERMOST.watch is not self:
            return func(*args, **kwargs)
        product, passing = _PRODUCTS.get(func), _PASSING.get(func)
        if product is not None:
            for use in product(self.weight, *args, **kwargs):
                self._report(use)
        result = func(*args, **kwargs)
        if passing is not None and args and (weight := self.weight(args[0])) is not None:
            self._pass_on(passing(weight, result, *args, **kwargs), result)
        return result

    def weight(self, value: Any) -> _Weight | None:  # noqa: ANN401
        """The parameter that an operand is, or is a plain view or cast of."""
        known = self._known.get(id(value))
        if known is not None:
            return known[1]
        name = getattr(value, "esm_stream_parameter", None)
        if name is not None:
            return _Weight(name) if self._watched(name) else None
        if isinstance(value, nn.Parameter) and value.ndim > 1:
            self._scan()  # parameters may be loaded while the module runs
            if id(value) not in self._known:
                self._learn(value, None)
            return self._known[id(value)][1]
        return None

    def _pass_on(self, weights: "_Weight | Sequence[_Weight | None] | None", result: Any) -> None:  # noqa: ANN401
        if isinstance(weights, _Weight):
            self._learn(result, weights)
        elif weights is not None:
            for weight, one in zip(weights, result, strict=True):
                self._learn(one, weight)

    def _scan(self) -> None:
        """Learn the parameters that are there, each by the first of its names."""
        for name, module in self._modules:
            for leaf, value in list(dict.items(module._parameters)):
                if value is not None and value.ndim > 1 and id(value) not in self._known:
                    path = self._prefix + (f"{name}.{leaf}" if name else leaf)
                    self._learn(value, _Weight(path) if self._watched(path) else None)

    def _learn(self, value: Tensor, weight: _Weight | None) -> None:
        place, known = id(value), self._known
        # An identity may be given again once its tensor is gone.
        self._known[place] = weakref.ref(value, lambda _: known.pop(place, None)), weight


# Ways in which a parameter is passed on without computing ----------------------------------------


def _same(weight: _Weight, result: Tensor, source: Tensor, *_: Any, **__: Any) -> _Weight | None:  # noqa: ANN401
    return weight if result.shape == source.shape and result.is_floating_point() else None


def _flip(weight: _Weight, result: Tensor, source: Tensor, *dims: int, **_: Any) -> _Weight | None:  # noqa: ANN401
    last = {dim % source.ndim for dim in dims} if dims else {source.ndim - 2, source.ndim - 1}
    turned = last == {source.ndim - 2, source.ndim - 1} and result.ndim in (2, 3)
    return replace(weight, flipped=not weight.flipped) if turned else None


def _permute(weight: _Weight, result: Tensor, source: Tensor, *dims: Any) -> _Weight | None:  # noqa: ANN401
    order = list(dims[0] if len(dims) == 1 else dims)
    turned = order in ([1, 0], [0, 2, 1], [0, -1, -2])
    return _flip(weight, result, source) if turned else None


def _get(weight: _Weight, result: Tensor, source: Tensor, index: Any, *_: Any) -> _Weight | None:  # noqa: ANN401
    """`stack[i]` with a number, or a tensor of numbers."""
    if source.ndim != 3 or weight.index is not None:
        return None
    if isinstance(index, Tensor) and index.ndim == 0 and index.device.type != "meta":
        index = int(index)
    if isinstance(index, int):
        return replace(weight, stack=source.shape[0], index=index % source.shape[0])
    by_numbers = isinstance(index, Tensor) and not index.is_floating_point() and index.ndim <= 1
    if by_numbers and index.dtype != torch.bool and result.shape[-2:] == source.shape[-2:]:
        return replace(weight, stack=source.shape[0], index=index.reshape(-1))
    return None


def _select(
    weight: _Weight,
    result: Tensor,
    source: Tensor,
    dim: int,
    index: Any,  # noqa: ANN401
) -> _Weight | None:
    return _get(weight, result, source, index) if dim == 0 else None


def _unbind(
    weight: _Weight,
    result: Sequence[Tensor],
    source: Tensor,
    dim: int = 0,
) -> list[_Weight | None] | None:
    if dim != 0:
        return None
    return [_get(weight, one, source, i) for i, one in enumerate(result)]


def _view(weight: _Weight, result: Tensor, source: Tensor, *_: Any, **__: Any) -> _Weight | None:  # noqa: ANN401
    """The same matrix flattened, or one tall parameter seen as the stack that it is."""
    if weight.flipped or weight.index is not None:
        return None
    if result.ndim == source.ndim and result.shape == source.shape:
        return weight
    if result.ndim == 2 and result.shape[0] == source.shape[0]:
        return weight
    if source.ndim == 2 and result.ndim == 3 and result.shape[2] == source.shape[1]:
        return replace(weight, stack=result.shape[0])
    return None


_T = torch.Tensor
_PASSING: Final[dict[Any, Callable[..., Any]]] = {
    **dict.fromkeys(
        (
            *(_T.to, _T.type, _T.type_as, _T.float, _T.half, _T.bfloat16, _T.double, _T.cpu),
            *(_T.contiguous, _T.clone, _T.detach, _T.data.__get__, _T.cuda),  # type: ignore[attr-defined]
        ),
        _same,
    ),
    **dict.fromkeys(
        (_T.t, torch.t, _T.T.__get__, _T.mT.__get__, _T.transpose, torch.transpose),  # type: ignore[attr-defined]
        _flip,
    ),
    **dict.fromkeys((_T.permute, torch.permute), _permute),
    _T.__getitem__: _get,
    **dict.fromkeys((_T.select, torch.select), _select),
    **dict.fromkeys((_T.index_select, torch.index_select), _select),
    **dict.fromkeys((_T.unbind, torch.unbind), _unbind),
    **dict.fromkeys((_T.view, _T.reshape, torch.reshape, _T.flatten, torch.flatten), _view),
}


# Products ----------------------------------------------------------------------------------------

Find = Callable[[Any], _Weight | None]
Uses = Sequence[_Use]


def _linear(find: Find, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Uses:  # noqa: ANN401
    found = find(weight)
    return [] if found is None else _times(found, weight, input, transposed=found.flipped)


def _matmul(find: Find, *operands: Tensor, **rest: Any) -> Uses:  # noqa: ANN401
    pair: list[Tensor] = [
        *operands,
        *(v for k, v in rest.items() if k in ("input", "other", "mat2")),
    ]
    left, right = pair
    weight = find(right)
    if weight is not None and right.ndim > 1:
        return _times(weight, right.mT, left, transposed=not weight.flipped)
    weight = find(left)
    if weight is not None and left.ndim > 1 and right.ndim > 1:
        return _times(weight, left, right.mT, transposed=weight.flipped, source=right)
    return []


def _added(find: Find, _: Tensor, *operands: Tensor, **__: Any) -> Uses:  # noqa: ANN401
    return _matmul(find, *operands) if len(operands) == 2 else []


def _times(
    weight: _Weight, matrix: Tensor, x: Tensor, *, transposed: bool, source: Tensor | None = None
) -> Uses:
    """X times a matrix (O, I), or a stack of them times as many x."""
    outputs, inputs = matrix.shape[-2:]
    use = _Use(
        weight.parameter, Layout(outputs, inputs, transposed), x, x if source is None else source
    )
    if matrix.ndim == 2 and weight.stack is None:
        return [use]
    if matrix.ndim == 2 and isinstance(weight.index, int):
        return [replace(use, stack=weight.stack, slice=weight.index)]
    if matrix.ndim != 3 or x.ndim != 3:
        return []
    stack = weight.stack or matrix.shape[0]
    if x.device.type == "meta" or matrix.device.type == "meta":
        # Who gets which rows depends on values: each may get all.
        return [replace(use, x=x.flatten(0, 1), stack=stack, slice=i) for i in range(stack)]
    if isinstance(weight.index, Tensor):
        numbers = weight.index.to(x.device)
        rows = {int(i): x[numbers == i].flatten(0, 1) for i in numbers.unique()}
    else:
        # Tokens that are not routed to an expert come as zeros.
        rows = {i: one[one.any(dim=-1)] for i, one in enumerate(x)}
    return [replace(use, x=one, stack=stack, slice=i) for i, one in rows.items() if one.numel() > 0]


def _grouped(
    find: Find,
    x_NI: Tensor,
    stack_EIO: Tensor,
    offs: Tensor | None = None,
    **_: Any,  # noqa: ANN401
) -> Uses:
    """Rows sorted by expert, times each expert's matrix; `offs` are the ends of the groups."""
    weight = find(stack_EIO)
    if weight is None or offs is None or x_NI.ndim != 2 or stack_EIO.ndim != 3:
        return []
    experts, inputs, outputs = stack_EIO.shape
    layout = Layout(outputs, inputs, not weight.flipped)
    ends = [0, *offs.tolist()]
    return [
        _Use(weight.parameter, layout, x_NI[ends[i] : ends[i + 1]], x_NI, experts, i)
        for i in range(experts)
        if ends[i + 1] > ends[i]
    ]


def _einsum(find: Find, equation: str, *operands: Any) -> Uses:  # noqa: ANN401
    """Products over all letters that the output lacks, if they are neighbours in the weight."""
    given: list[Any] = list(operands[0] if len(operands) == 1 else operands)
    terms, _, out = equation.replace(" ", "").partition("->")
    names = terms.split(",")
    if len(names) != 2 or len(given) != 2 or "." in equation or not out:
        return []
    for place in (0, 1):
        x, matrix = given[place], given[1 - place]
        of_x, of_matrix = names[place], names[1 - place]
        weight = find(matrix)
        if weight is None or weight.flipped or weight.index is not None:
            continue
        summed = "".join(c for c in of_matrix if c not in out)
        free = "".join(c for c in of_matrix if c in out)
        plain = set(summed) <= set(of_x) and not set(free) & set(of_x)
        if not plain or of_matrix not in (summed + free, free + summed):
            continue
        sizes = dict(zip(of_matrix, matrix.shape, strict=True))
        order = [of_x.index(c) for c in of_x if c not in summed] + [of_x.index(c) for c in summed]
        layout = Layout(
            math.prod(sizes[c] for c in free),
            math.prod(sizes[c] for c in summed),
            of_matrix == summed + free,
        )
        return [_Use(weight.parameter, layout, x.permute(order).flatten(-len(summed)), x)]
    return []


def _convolution(
    find: Find,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,  # noqa: ARG001
    stride: Any = 1,  # noqa: ANN401
    padding: Any = 0,  # noqa: ANN401
    dilation: Any = 1,  # noqa: ANN401
    groups: int = 1,
) -> Uses:
    """A convolution over all channels is a matrix times patches; one by groups is many."""
    found = find(weight)
    if found is None or groups != 1 or found.index is not None:
        return []
    dims = weight.ndim - 2
    stride, dilation = _each(stride, dims), _each(dilation, dims)
    size = tuple(weight.shape[2:])
    layout = Layout(weight.shape[0], math.prod(weight.shape[1:]), transposed=False)
    samples = input if input.ndim == weight.ndim else input[None]
    padded = F.pad(samples, _margins(padding, size, dilation))
    for dim in range(dims):
        reach = dilation[dim] * (size[dim] - 1) + 1
        padded = padded.unfold(2 + dim, reach, stride[dim])[..., :: dilation[dim]]
    # (N, C, places..., kernel...) -> rows of (C, kernel...); sample by sample: patches may overlap.
    patches = padded.movedim(1, 1 + dims)
    return [
        _Use(found.parameter, layout, one.flatten(dims).reshape(-1, layout.inputs), input)
        for one in patches
    ]


def _each(value: Any, dims: int) -> tuple[int, ...]:  # noqa: ANN401
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims // len(value))


def _margins(padding: Any, size: Sequence[int], dilation: Sequence[int]) -> list[int]:  # noqa: ANN401
    """What `pad` takes: before and after, last dimension first."""
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(size, dilation, strict=True)]
        pairs = [(t // 2, t - t // 2) for t in total]
    elif padding == "valid":
        pairs = [(0, 0)] * len(size)
    else:
        pairs = [(p, p) for p in _each(padding, len(size))]
    return [margin for pair in reversed(pairs) for margin in pair]


_PRODUCTS: Final[dict[Any, Callable[..., Uses]]] = {
    F.linear: _linear,
    would_multiply: _linear,
    **dict.fromkeys(
        (
            *(torch.matmul, torch.mm, torch.bmm, _T.matmul, _T.mm, _T.bmm),
            *(_T.__matmul__, torch.Tensor.__rmatmul__),
        ),
        _matmul,
    ),
    **dict.fromkeys((torch.addmm, torch.baddbmm, _T.addmm, _T.baddbmm), _added),
    **dict.fromkeys((F.grouped_mm, torch._grouped_mm), _grouped),
    torch.einsum: _einsum,
    **dict.fromkeys(
        (*(F.conv1d, F.conv2d, F.conv3d), *(torch.conv1d, torch.conv2d, torch.conv3d)),
        _convolution,
    ),
}


# Attention of torch's own -------------------------------------------------------------------------


@contextmanager
def _attention(
    module: nn.MultiheadAttention, name: str, report: Callable[[_Use], None]
) -> Generator[None]:
    """Report what the projections of torch's attention are multiplied with.

    The module has a fast path that it leaves when it is watched, so it runs unwatched; what its
    output projection sees is found by a second run with an identity in its place.
    """
    forward = module.forward

    def watched(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        with torch._C.DisableTorchFunction():
            for use in _attention_inputs(module, name, *args, **kwargs):
                report(use)
            return forward(*args, **kwargs)

    with _replaced(module, watched):
        yield


def _attention_inputs(
    module: nn.MultiheadAttention,
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,  # noqa: ANN401
    **kwargs: Any,  # noqa: ANN401
) -> Uses:
    width, path = module.embed_dim, f"{name}." if name else ""
    uses = []
    for number, (letter, x) in enumerate(zip("qkv", (query, key, value), strict=True)):
        layout = Layout(width, x.shape[-1], transposed=False)
        if module.in_proj_weight is not None:
            uses.append(_Use(f"{path}in_proj_weight", layout, x, x, 3, number))
        else:
            uses.append(_Use(f"{path}{letter}_proj_weight", layout, x, x))
    mixed = _without_projection(module)(query, key, value, *args, **kwargs)[0]
    layout = Layout(width, width, transposed=False)
    return [*uses, _Use(f"{path}out_proj.weight", layout, mixed, mixed)]


def _without_projection(module: nn.MultiheadAttention) -> nn.MultiheadAttention:
    """The same attention whose output projection is an identity; parameters are shared."""
    twin = copy.copy(module)
    weight = module.out_proj.weight
    identity = nn.Linear(1, 1)
    identity.weight = nn.Parameter(torch.eye(len(weight)).to(weight), requires_grad=False)
    identity.bias = nn.Parameter(torch.zeros(len(weight)).to(weight), requires_grad=False)
    twin._modules = {"out_proj": identity}
    twin.__dict__.pop("forward", None)
    return twin
