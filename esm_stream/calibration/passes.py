"""One forward of a model in which somebody else answers for its blocks.

From:  a skeleton (its own parameters real or lazy) and the inputs of one micro-batch.
To:    trace.py (answers without weights), stages/ (recorded, replayed or real answers).

A pass ends where the model's head would compute logits, or with the model's own output. It never
keeps a key/value cache, and always draws the same random numbers.
"""

import copy
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from esm_stream.calibration.hooks import named, would_multiply
from esm_stream.calibration.lazy import constant

Answer = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
"""Gives a block's output from its number and its arguments."""

_PASS = threading.local()
SEED: Final = 0


class PassEndedError(Exception):
    """Raised by an answer: what follows in the forward is not needed."""


class _HeadReachedError(Exception):
    """Raised in place of the head's product: its input is the result."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


@contextmanager
def blocks_answered(model: PreTrainedModel, blocks: Sequence[str]) -> Generator[None]:
    """While active, calls of the blocks go to the answers of the pass that the thread runs."""

    def stub(number: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: _PASS.answer(number, args, kwargs)

    with ExitStack() as undo:
        for number, name in enumerate(blocks):
            _replace_forward(model.get_submodule(name), stub(number), undo)
        head = head_of(model)
        if head is not None:
            _replace_forward(head, _stop(model, head), undo)
        yield


def own_copy(block: nn.Module) -> nn.Module:
    """A copy of a block that answers for itself, and reports to nobody who watches the model."""
    twin = copy.deepcopy(block)
    vars(twin).pop("forward", None)
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return twin


def _replace_forward(module: nn.Module, forward: Callable[..., Any], undo: ExitStack) -> None:
    """Give a module another forward; its hooks still run."""
    module.forward = forward
    undo.callback(delattr, module, "forward")


def _stop(model: nn.Module, head: nn.Module) -> Callable[..., Any]:
    """A forward for the head that shows its input to those who watch, and ends the pass."""
    name = next(name for name, module in model.named_modules() if module is head)
    matrix = dict(head.named_parameters()).get("weight")

    def stop(hidden: Tensor, *_: object, **__: object) -> Any:  # noqa: ANN401
        if matrix is not None and matrix.ndim == 2:
            stand_in = constant(tuple(matrix.shape), hidden.dtype)
            would_multiply(hidden, named(stand_in, f"{name}.weight"))
        raise _HeadReachedError(hidden)

    return stop


def head_of(model: PreTrainedModel) -> nn.Module | None:
    """The module that turns hidden states into logits over a vocabulary, if the model has one."""
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    # Some models answer with a bare parameter, or with embeddings that they look tokens up in.
    if not isinstance(head, nn.Module) or isinstance(head, nn.Embedding):
        return None
    return head


def run_pass(model: PreTrainedModel, inputs: Mapping[str, Tensor], answer: Answer) -> Any:  # noqa: ANN401
    """Run a model's forward inside `blocks_answered`.

    Returns:
        The head's input for models with a head, the model's output for others, None if an answer
        raised PassEndedError.
    """
    _PASS.answer = answer
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return model(**inputs, **_forward_flags(model))
    except _HeadReachedError as reached:
        return reached.hidden
    except PassEndedError:
        return None
    finally:
        del _PASS.answer


def _forward_flags(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments that keep a forward plain: no key/value cache."""
    return {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}
