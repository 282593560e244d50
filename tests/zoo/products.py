"""What a plain model's parameters are multiplied with, seen from below: at torch's kernels.

A parameter is recognised by the memory that a kernel's operand lies in, so nothing here knows of
modules, names or hooks. Rows of inputs are reported in the order in which the kernel takes them.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.utils._python_dispatch import TorchDispatchMode

Report = Callable[[str, Tensor], None]
aten = torch.ops.aten


class Products(TorchDispatchMode):
    """While active, `report(key, x)` is called for each product of x, (N, I), with a parameter.

    Keys are names without ".weight", with "#3" for the fourth of equal matrices in one parameter.
    To be used under `no_grad`: in inference mode torch does not take composite operations apart.
    """

    def __init__(self, model: nn.Module, report: Report) -> None:
        super().__init__()
        self._report = report
        named = dict(model.named_parameters(remove_duplicate=False))
        spans: dict[int, tuple[str, Tensor]] = {}
        for name, value in named.items():
            spans.setdefault(value.data_ptr(), (name, value))
        self._spans = sorted(spans.items())
        self._starts = [start for start, _ in self._spans]

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        rule = RULES.get(func.overloadpacket)
        if rule is not None:
            for key, x in rule(self, *args, **(kwargs or {})):
                self._report(key, x)
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Self:
        self._einsum = torch.einsum
        torch.einsum = self._seen_einsum
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:  # noqa: ANN401
        super().__exit__(*error)
        torch.einsum = self._einsum

    def _seen_einsum(self, equation: str, *operands: Tensor) -> Tensor:
        """A sum over several last letters of both: its kernel gets a copy of the parameter."""
        names, _, out = equation.partition("->")
        of_x, _, of_matrix = names.partition(",")
        summed = of_matrix.lstrip(out)
        if len(summed) > 1 and of_x.endswith(summed):
            key = self.key(operands[1], operands[1].numel())
            if key is not None:
                self._report(key, operands[0].flatten(-len(summed)).flatten(0, -2))
        return self._einsum(equation, *operands)

    def key(self, operand: Tensor, size: int) -> str | None:
        """The parameter that a matrix of `size` numbers lies in."""
        place = bisect_right(self._starts, operand.data_ptr()) - 1
        if place < 0:
            return None
        start, (name, value) = self._spans[place]
        offset = (operand.data_ptr() - start) // value.element_size()
        if offset >= value.numel() or value.numel() % size or offset % size:
            return None
        base = name.removesuffix(".weight")
        return base if size == value.numel() else f"{base}#{offset // size}"


Uses = Iterator[tuple[str, Tensor]]


def _mm(see: Products, left: Tensor, right: Tensor) -> Uses:
    key = see.key(right, right.numel())
    if key is not None:
        yield key, left
    else:
        key = see.key(left, left.numel())
        if key is not None:
            yield key, right.T


def _addmm(see: Products, bias: Tensor, left: Tensor, right: Tensor, **_: Any) -> Uses:  # noqa: ANN401, ARG001
    yield from _mm(see, left, right)


def _bmm(see: Products, left: Tensor, right: Tensor) -> Uses:
    """Batches of one matrix, or as many matrices as there are in a parameter."""
    for matrix, x in ((right, left), (left, right.mT)):
        size = prod(matrix.shape[1:])
        if matrix.stride(0) == 0 or matrix.shape[0] == 1:
            key = see.key(matrix, size)
            if key is not None:
                yield key, x.flatten(0, 1)
                return
        elif see.key(matrix, size) is not None:
            for one, rows in zip(matrix, x, strict=True):
                yield str(see.key(one, size)), rows[rows.any(-1)]
            return


def _baddbmm(see: Products, bias: Tensor, left: Tensor, right: Tensor, **_: Any) -> Uses:  # noqa: ANN401, ARG001
    yield from _bmm(see, left, right)


def _grouped(see: Products, x: Tensor, stack: Tensor, offs: Tensor, *_: Any, **__: Any) -> Uses:  # noqa: ANN401
    """Rows sorted by group."""
    start = 0
    for one, stop in zip(stack, offs.tolist(), strict=True):
        key = see.key(one, one.numel())
        if key is not None and stop > start:
            yield key, x[start:stop]
        start = stop


def _convolution(
    see: Products,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,  # noqa: ARG001
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],  # noqa: ARG001
    groups: int,
) -> Uses:
    """Patches as rows, sample by sample."""
    key = see.key(weight, weight.numel())
    if key is None or transposed or groups != 1:
        return
    dims = weight.ndim - 2
    margins = [margin for one in reversed(padding) for margin in (one, one)]
    for sample in F.pad(x, margins):
        patches = sample[None]
        if dims == 3:
            for dim in range(3):
                reach = dilation[dim] * (weight.shape[2 + dim] - 1) + 1
                patches = patches.unfold(2 + dim, reach, stride[dim])[..., :: dilation[dim]]
            rows = patches[0].movedim(0, 3).reshape(-1, prod(weight.shape[1:]))
        else:
            flat = patches if dims == 2 else patches.unsqueeze(2)
            lead = [] if dims == 2 else [1]
            kernel = (*lead, *weight.shape[2:])
            options = {"dilation": (*lead, *dilation), "stride": (*lead, *stride)}
            rows = F.unfold(flat, kernel, **options)[0].T
        yield key, rows


RULES: dict[Any, Callable[..., Uses]] = {
    aten.mm: _mm,
    aten.addmm: _addmm,
    aten.bmm: _bmm,
    aten.baddbmm: _baddbmm,
    aten._grouped_mm: _grouped,
    aten.convolution: _convolution,
}
