"""Parameters that are there when the forward asks for them, and not before.

A model built on the meta device must never compute with meta tensors: some models answer wrongly
instead of failing (they follow the device of an embedding, or read a weight from its parent).
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from esm_stream.calibration.hooks import named

Load = Callable[[str], Tensor]


def load_when_used(model: nn.Module, load: Load, name: str = "") -> None:
    """Make every parameter of a model come from `load(full name)` each time it is used.

    Args:
        model: Changed in place.
        load: Gives a parameter's contents.
        name: Of the model itself, put before the names of its parameters.
    """
    for prefix, module in model.named_modules(prefix=name):
        if module._parameters:
            module.__dict__["_parameters"] = _LazyParameters(module._parameters, prefix, load)


class _LazyParameters(dict[str, Any]):
    """A module's own parameters; looping over them loads nothing."""

    def __init__(self, parameters: dict[str, Any], prefix: str, load: Load) -> None:
        super().__init__(parameters)
        self._prefix = f"{prefix}." if prefix else ""
        self._load = load

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 - None for parameters switched off
        parameter = super().__getitem__(name)
        if parameter is None:
            return None
        found = nn.Parameter(self._load(self._prefix + name), parameter.requires_grad)
        return named(found, self._prefix + name)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        """The parameters as they were before, without contents."""
        return {name: copy.deepcopy(value, memo) for name, value in super().items()}

    def get(self, name: str, default: Any = None) -> Any:  # noqa: ANN401
        return self[name] if name in self else default  # noqa: SIM401 - get must load too

    def values(self) -> Any:  # noqa: ANN401 - a view in dict, an iterator here
        return (value for _, value in self.items())

    def items(self) -> Iterator[tuple[str, Any]]:  # type: ignore[override]
        """Names and stand-ins of the right shape, dtype and device, which hold no memory.

        This is what `model.device` and `model.dtype` look at.
        """
        for name, value in super().items():
            yield name, None if value is None else constant(tuple(value.shape), value.dtype)


def constant(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One small value everywhere, expanded without memory."""
    return torch.full((), 0.02, dtype=dtype).expand(shape)


def uneven(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Small values that differ along every dimension, as a view of a short buffer.

    Equal ones would hide what goes through them: in a linear layer a norm's output sums to zero.
    """
    size = max(1, sum(n - 1 for n in shape) + 1)
    values = torch.frac(torch.arange(size, dtype=torch.float64) * 0.6180339887) * 0.02 + 0.01
    return values.to(dtype).as_strided(shape, (1,) * len(shape))
