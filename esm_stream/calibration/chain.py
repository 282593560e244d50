"""May the blocks of a model run one after the other, each from its predecessor's output alone?

From:  a skeleton (no weights) and one dummy sample.
To:    plan.py: a `Chain` (which blocks, in what form they return, which matrices see which inputs),
       or the reason why this model cannot be streamed.

The model's own forward is run with every block replaced by a stub. The skeleton's parameters are
filled with one constant each, expanded without memory, so nothing is read and nothing is large.
Twice, with different stub outputs: what a block is handed besides the hidden state must not change.
The matrices are then observed on the meta device, one block of each distinct shape.
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from esm_stream.calibration.arguments import HIDDEN, unsupported_value
from esm_stream.calibration.hooks import Layout, layout_of, observe_inputs
from esm_stream.calibration.skeleton import BlockList, Skeleton, put_tensor
from esm_stream.errors import UnsupportedModelError

Wrap = Literal["tensor", "tuple"]
DUMMY_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Call:
    """What one block was handed: arguments with the hidden state replaced by HIDDEN."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Recording:
    """One pass over the skeleton: the first block's hidden state, and every block's call."""

    hidden: Tensor
    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class ObservedMatrix:
    """A matrix in a block whose input a hook sees.

    `leader` is the module that is observed for it: matrices with one leader share their input.
    """

    module: str
    layout: Layout
    leader: str


@dataclass(frozen=True, slots=True)
class Chain:
    """A model that can be streamed: its blocks run in order, each from the last one's output.

    `width` is the hidden state's number of features, `tokens` its length for the dummy sample.
    """

    prefix: str
    num_blocks: int
    wrap: Wrap
    width: int
    tokens: int
    matrices: tuple[tuple[ObservedMatrix, ...], ...]
    silent: tuple[str, ...] = field(default=())


class _FinishedError(Exception):
    """Raised by what follows the last block: the rest (norm, head, logits) is not run."""


def plan_chain(skeleton: Skeleton, inputs: Mapping[str, Tensor] | None) -> Chain:
    """Check that the model can be streamed in chain mode, and observe its blocks' matrices.

    Args:
        skeleton: A model on the meta device.
        inputs: One sample as the forward takes it, values irrelevant; None makes a dummy.

    Raises:
        UnsupportedModelError: With the reason; nothing was read.
    """
    dummy = dict(inputs) if inputs is not None else dummy_inputs(skeleton.model)
    model = copy.deepcopy(skeleton.model)
    _fill_with_constants(model, skeleton.lists())
    blocks = _only_list(model)
    for index in range(len(blocks.blocks)):
        skeleton.tensors_of(blocks.name(index))
    wrap, recording = _recording_in_some_form(model, blocks, dummy)
    noisy = record_calls(model, blocks, dummy, wrap, perturb=True)
    for index, (call, other) in enumerate(zip(recording.calls, noisy.calls, strict=True)):
        _require_chain(blocks.name(index), call, other)
    matrices, silent = _observe_all(blocks, recording, wrap)
    tokens, width = recording.hidden.shape[-2:]
    return Chain(blocks.prefix, len(blocks.blocks), wrap, width, tokens, matrices, silent)


def dummy_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """A tiny sample of the right kind for a model, from its configuration.

    Raises:
        UnsupportedModelError: The main input is neither token ids nor pixels.
    """
    config = model.config
    if model.main_input_name == "input_ids":
        ids = torch.arange(3, 3 + DUMMY_TOKENS) % config.get_text_config().vocab_size
        return {"input_ids": ids[None]}
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {"pixel_values": torch.zeros(1, config.num_channels, height, width)}
    raise UnsupportedModelError(
        f"{type(model).__name__} takes '{model.main_input_name}', not token ids or pixels; give "
        "ready-made inputs as a safetensors file named as the forward's arguments"
    )


def _fill_with_constants(model: nn.Module, lists: Sequence[BlockList]) -> None:
    """Give every parameter outside the blocks a constant value, expanded without memory."""
    inside = tuple(f"{blocks.prefix}." for blocks in lists)
    for name, value in list(model.named_parameters()):
        if not name.startswith(inside):
            put_tensor(model, name, torch.full((), 0.02, dtype=value.dtype).expand(value.shape))


def _only_list(model: PreTrainedModel) -> BlockList:
    """The one block list of a model.

    Raises:
        UnsupportedModelError: None, or several.
    """
    lists = Skeleton(model, {}, {}).lists()
    if not lists:
        raise UnsupportedModelError(f"{type(model).__name__} has no list of blocks to stream")
    if len(lists) > 1:
        names = ", ".join(f"'{blocks.prefix}'" for blocks in lists)
        raise UnsupportedModelError(
            f"{type(model).__name__} has several lists of blocks ({names}); only models with one "
            "can be streamed in chain mode"
        )
    return lists[0]


def _recording_in_some_form(
    model: PreTrainedModel, blocks: BlockList, inputs: Mapping[str, Tensor]
) -> tuple[Wrap, Recording]:
    """Find out whether blocks return the hidden state itself or a tuple that starts with it."""
    reasons = []
    wraps: tuple[Wrap, ...] = ("tensor", "tuple")
    for wrap in wraps:
        try:
            return wrap, record_calls(model, blocks, inputs, wrap)
        except UnsupportedModelError as error:
            reasons.append(str(error))
        except Exception as error:  # noqa: BLE001 - a model's forward may raise anything on a stub
            reasons.append(f"the forward fails on a block that returns a {wrap}: {error}")
    raise UnsupportedModelError(reasons[0])


def record_calls(
    model: PreTrainedModel,
    blocks: BlockList,
    inputs: Mapping[str, Tensor],
    wrap: Wrap,
    *,
    perturb: bool = False,
) -> Recording:
    """Run a model's forward with stubs for its blocks; the model's stubs are removed again.

    Args:
        model: Holds real tensors outside the blocks. Not shared with another thread.
        blocks: The list to replace.
        inputs: Arguments of the forward.
        wrap: What the stubs return.
        perturb: Return something else than the hidden state received.

    Raises:
        UnsupportedModelError: A block is not handed its predecessor's output, or not in order.
    """
    seen: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[Tensor] = []

    def stub(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - a block takes anything
            seen.append((index, args, kwargs))
            outputs.append(_stub_output(args, kwargs, outputs, perturb=perturb))
            return outputs[-1] if wrap == "tensor" else (outputs[-1],)

        return forward

    def stop_after_blocks(*_: object) -> None:
        if len(seen) >= len(blocks.blocks):
            raise _FinishedError

    outside = _modules_with_parameters_outside(model, blocks)
    with ExitStack() as undo:
        for index, block in enumerate(blocks.blocks):
            block.forward = stub(index)
            undo.callback(delattr, block, "forward")
        for module in outside:
            undo.callback(module.register_forward_pre_hook(stop_after_blocks).remove)
        undo.enter_context(suppress(_FinishedError))
        undo.enter_context(torch.inference_mode())
        undo.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(0)
        model(**inputs, **_forward_flags(model))
    return _recording(blocks, seen, outputs)


def _modules_with_parameters_outside(model: nn.Module, blocks: BlockList) -> list[nn.Module]:
    """Modules that own parameters and are not part of a block: norms, embeddings, heads."""
    return [
        module
        for name, module in model.named_modules()
        if module._parameters and not f"{name}.".startswith(f"{blocks.prefix}.")
    ]


def _forward_flags(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments that keep a forward plain: no key/value cache."""
    return {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}


def _stub_output(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], earlier: Sequence[Tensor], *, perturb: bool
) -> Tensor:
    """A fresh tensor shaped as the hidden state (the predecessor's output, else the first tensor)."""
    values = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    if not values:
        raise UnsupportedModelError("a block is called without any tensor")
    hidden = next((v for v in values if earlier and v is earlier[-1]), values[0])
    return hidden + 1.0 + torch.arange(hidden.shape[-1]) * 0.125 if perturb else hidden.clone()


def _recording(
    blocks: BlockList,
    seen: Sequence[tuple[int, tuple[Any, ...], dict[str, Any]]],
    outputs: Sequence[Tensor],
) -> Recording:
    """Replace the hidden state in what was seen by HIDDEN.

    Raises:
        UnsupportedModelError: The order or the hand-over is not a chain's.
    """
    order = [index for index, _, _ in seen]
    if order != list(range(len(blocks.blocks))):
        raise UnsupportedModelError(
            f"the forward calls the blocks of '{blocks.prefix}' in the order {order[:12]}, not once "
            "each from first to last"
        )
    place = _hidden_place(blocks, seen, outputs)
    hidden, calls = None, []
    for _, args, kwargs in seen:
        bound: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
        hidden = bound[place] if hidden is None else hidden
        positional = tuple(HIDDEN if i == place else value for i, value in enumerate(args))
        named = {k: HIDDEN if k == place else value for k, value in kwargs.items()}
        calls.append(Call(positional, named))
    assert isinstance(hidden, Tensor)
    return Recording(hidden, tuple(calls))


def _hidden_place(
    blocks: BlockList,
    seen: Sequence[tuple[int, tuple[Any, ...], dict[str, Any]]],
    outputs: Sequence[Tensor],
) -> int | str:
    """Where blocks take the hidden state: a position or a keyword, the same in every block."""
    places: set[int | str] = set()
    for (index, args, kwargs), output in zip(seen[1:], outputs, strict=False):
        bound: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
        found = [place for place, value in bound.items() if value is output]
        if not found:
            raise UnsupportedModelError(
                f"'{blocks.name(index)}' is not handed the output of '{blocks.name(index - 1)}' as it "
                "is; the model does something to it in between"
            )
        places.add(found[0])
    if len(places) > 1:
        raise UnsupportedModelError(f"the blocks of '{blocks.prefix}' take their input differently")
    if places:
        return places.pop()
    return 0 if seen[0][1] else "hidden_states"


def _require_chain(name: str, call: Call, other: Call) -> None:
    """Arguments besides the hidden state must be plain values that do not depend on other blocks.

    Raises:
        UnsupportedModelError: Otherwise, naming the argument.
    """
    values = itertools.chain(enumerate(call.args), call.kwargs.items())
    others = itertools.chain(other.args, other.kwargs.values())
    for (place, value), varied in zip(values, others, strict=True):
        found = unsupported_value(value)
        if found is not None:
            raise UnsupportedModelError(
                f"'{name}' is handed a {found} as argument {place!r}, which other blocks may change"
            )
        if not _equal(value, varied):
            raise UnsupportedModelError(
                f"argument {place!r} of '{name}' depends on the output of an earlier block"
            )


def _equal(left: Any, right: Any) -> bool:  # noqa: ANN401 - recorded values are any type
    if isinstance(left, Tensor):
        same_kind = isinstance(right, Tensor) and left.dtype == right.dtype
        return same_kind and left.shape == right.shape and bool(torch.equal(left, right))
    if isinstance(left, tuple):
        same = isinstance(right, tuple) and len(left) == len(right)
        return same and all(_equal(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def _observe_all(
    blocks: BlockList, recording: Recording, wrap: Wrap
) -> tuple[tuple[tuple[ObservedMatrix, ...], ...], tuple[str, ...]]:
    """Matrices of every block with their inputs' sharing; blocks of one shape are traced once."""
    traces: dict[object, tuple[tuple[ObservedMatrix, ...], tuple[str, ...]]] = {}
    result, silent = [], []
    for index, block in enumerate(blocks.blocks):
        signature = (type(block), tuple((n, v.shape) for n, v in block.state_dict().items()))
        if signature not in traces:
            traces[signature] = _observe(block, recording.hidden, recording.calls[index], wrap)
        observed, unseen = traces[signature]
        result.append(observed)
        silent += [f"{blocks.name(index)}.{module}" for module in unseen]
    return tuple(result), tuple(silent)


def _observe(
    block: nn.Module, hidden: Tensor, call: Call, wrap: Wrap
) -> tuple[tuple[ObservedMatrix, ...], tuple[str, ...]]:
    """Trace one block on the meta device: which matrices are used, and which share an input."""
    twin = copy.deepcopy(block).to("meta")
    layouts = {n: layout for n, m in twin.named_modules() if (layout := layout_of(m)) is not None}
    inputs: dict[str, Tensor] = {}
    try:
        with observe_inputs({n: twin.get_submodule(n) for n in layouts}, inputs.setdefault):
            output = run_call(twin, call, hidden.to("meta"), torch.device("meta"))
    except (RuntimeError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"{type(block).__name__} cannot be traced without data: {str(error).splitlines()[0]}"
        ) from error
    if isinstance(output, tuple) != (wrap == "tuple"):
        raise UnsupportedModelError(
            f"{type(block).__name__} returns a {type(output).__name__}, but the model reads a {wrap}"
        )
    leaders: dict[int, str] = {}
    observed = tuple(
        ObservedMatrix(name, layouts[name], leaders.setdefault(id(value), name))
        for name, value in inputs.items()
    )
    return observed, tuple(name for name in layouts if name not in inputs)


def run_call(block: nn.Module, call: Call, hidden: Tensor, device: torch.device) -> Any:  # noqa: ANN401
    """Call a block with recorded arguments, the hidden state in its place, all on one device."""

    def place(value: Any) -> Any:  # noqa: ANN401
        if value is HIDDEN:
            return hidden
        if isinstance(value, Tensor):
            return value.to(device)
        return tuple(place(item) for item in value) if isinstance(value, tuple) else value

    with torch.inference_mode():
        return block(*map(place, call.args), **{k: place(v) for k, v in call.kwargs.items()})
