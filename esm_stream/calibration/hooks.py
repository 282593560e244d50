"""Which modules are observed, and the hooks that do it: registered in one place, always removed."""

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True, slots=True)
class Layout:
    """How a module stores its matrix: O outputs, I inputs; `transposed` as (I, O)."""

    outputs: int
    inputs: int
    transposed: bool


def layout_of(module: nn.Module) -> Layout | None:
    """The matrix of a module whose input can be observed (Linear, Conv1D, subclasses), or None."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    if isinstance(module, Conv1D):
        return Layout(weight.shape[1], weight.shape[0], transposed=True)
    if isinstance(module, nn.Linear):
        return Layout(weight.shape[0], weight.shape[1], transposed=False)
    return None


@contextmanager
def observe_inputs(
    modules: Mapping[str, nn.Module], observer: Callable[[str, Tensor], None]
) -> Generator[None]:
    """Call `observer(name, input)` before each forward of `modules`, until the block ends."""

    def hook_for(name: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[object, ...]) -> None:  # noqa: ARG001
            if isinstance(inputs[0], Tensor):
                observer(name, inputs[0])

        return hook

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(module.register_forward_pre_hook(hook_for(name)).remove)
        yield
