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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from esm_stream.calibration.arguments import HIDDEN, Call, unsupported_value
from esm_stream.calibration.hooks import ObservedMatrix, trace_inputs
from esm_stream.calibration.skeleton import BlockList, Skeleton, put_tensor
from esm_stream.errors import UnsupportedModelError

Wrap = Literal["tensor", "tuple"]
DUMMY_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Recording:
    """One pass over the skeleton: the first block's hidden state, and every block's call.

    `modules` are those with parameters of their own that ran before the last block did.
    """

    hidden: Tensor
    calls: tuple[Call, ...]
    modules: tuple[nn.Module, ...]


@dataclass(frozen=True, slots=True)
class Chain:
    """A model that can be streamed: its blocks run in order, each from the last one's output.

    `width` is the hidden state's number of features, `tokens` its length for the dummy sample;
    `stem` names the parameters and buffers of the modules that run before the last block.
    """

    prefix: str
    num_blocks: int
    wrap: Wrap
    width: int
    tokens: int
    stem: tuple[str, ...]
    matrices: tuple[tuple[ObservedMatrix, ...], ...]


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
    matrices = _observe_all(blocks, recording, wrap)
    tokens, width = recording.hidden.shape[-2:]
    stem = tuple(_tensors_outside(model, blocks, recording.modules))
    return Chain(blocks.prefix, len(blocks.blocks), wrap, width, tokens, stem, matrices)


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
            put_tensor(model, name, _constant(tuple(value.shape), value.dtype))
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.forward = _lookup_of_constant(module)  # type: ignore[method-assign, assignment]


def _constant(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full((), 0.02, dtype=dtype).expand(shape)


def _lookup_of_constant(module: nn.Embedding) -> Callable[[Tensor], Tensor]:
    """A lookup that gives what the table would; torch would first copy the whole table."""
    width, dtype = module.embedding_dim, module.weight.dtype
    return lambda ids: _constant((*ids.shape, width), dtype).clone()


def _only_list(model: PreTrainedModel) -> BlockList:
    """The one block list of a model.

    Raises:
        UnsupportedModelError: None, or several.
    """
    lists = Skeleton(model).lists()
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
    recorder = _Recorder(blocks, wrap, perturb=perturb)
    with ExitStack() as undo:
        for index, block in enumerate(blocks.blocks):
            block.forward = partial(recorder.stub, index)
            undo.callback(delattr, block, "forward")
        for module in _modules_with_parameters_outside(model, blocks):
            undo.callback(module.register_forward_pre_hook(recorder.before_module).remove)
        undo.enter_context(suppress(_FinishedError))
        undo.enter_context(torch.inference_mode())
        undo.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(0)
        model(**inputs, **_forward_flags(model))
    return recorder.recording()


def _tensors_outside(
    model: nn.Module, blocks: BlockList, used: Sequence[nn.Module]
) -> Iterator[str]:
    """Names of parameters of the used modules, and of all persistent buffers outside the blocks."""
    owners = {id(module) for module in used}
    kept = set(model.state_dict())
    for name, module in model.named_modules():
        if f"{name}.".startswith(f"{blocks.prefix}."):
            continue
        prefix = f"{name}." if name else ""
        names = [*(module._parameters if id(module) in owners else ()), *module._buffers]
        yield from (prefix + n for n in names if prefix + n in kept)


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


def _by_place(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int | str, Any]:
    """Arguments by position and keyword."""
    given: dict[int | str, Any] = dict(enumerate(args))
    given.update(kwargs)
    return given


class _Recorder:
    """Stands in for all blocks of one forward; keeps one hidden state, however many blocks."""

    def __init__(self, blocks: BlockList, wrap: Wrap, *, perturb: bool) -> None:
        self._blocks = blocks
        self._wrap = wrap
        self._perturb = perturb
        self._order: list[int] = []
        self._calls: list[Call] = []
        self._places: set[int | str] = set()
        self._first: dict[int | str, Any] = {}
        self._last: Tensor | None = None
        self._modules: dict[int, nn.Module] = {}

    def stub(self, index: int, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any block's forward
        """Record one call and return a fresh tensor in the shape of the hidden state."""
        given = _by_place(args, kwargs)
        place = next((p for p, v in given.items() if v is self._last and v is not None), None)
        if self._last is None:
            self._first = given
            place = next((p for p, v in given.items() if isinstance(v, Tensor)), None)
        elif place is not None:
            self._places.add(place)
        if place is None:
            raise UnsupportedModelError(self._no_chain(index))
        self._order.append(index)
        self._calls.append(
            Call(
                tuple(HIDDEN if i == place else value for i, value in enumerate(args)),
                {k: HIDDEN if k == place else value for k, value in kwargs.items()},
            )
        )
        hidden = given[place]
        noise = 1.0 + torch.arange(hidden.shape[-1]) * 0.125
        # A view is a new object too: its identity shows whether the model hands it on as it is.
        self._last = (hidden + noise).to(hidden.dtype) if self._perturb else hidden.detach()
        return self._last if self._wrap == "tensor" else (self._last,)

    def before_module(self, module: nn.Module, _: object) -> None:
        """Hook of everything outside the blocks: after the last block nothing else is run."""
        if len(self._order) >= len(self._blocks.blocks):
            raise _FinishedError
        self._modules[id(module)] = module

    def recording(self) -> Recording:
        """What was recorded.

        Raises:
            UnsupportedModelError: The blocks were not called in order, or not in one way.
        """
        if self._order != list(range(len(self._blocks.blocks))):
            raise UnsupportedModelError(
                f"the forward calls the blocks of '{self._blocks.prefix}' in the order "
                f"{self._order[:12]}, not once each from first to last"
            )
        first_place = self._place_of_first()
        if len(self._places | {first_place}) > 1:
            raise UnsupportedModelError(
                f"the blocks of '{self._blocks.prefix}' take their input differently"
            )
        hidden = self._first[first_place].clone()
        return Recording(hidden, tuple(self._calls), tuple(self._modules.values()))

    def _place_of_first(self) -> int | str:
        """Where the first block takes the hidden state."""
        call = self._calls[0]
        given = _by_place(call.args, call.kwargs)
        return next(place for place, value in given.items() if value is HIDDEN)

    def _no_chain(self, index: int) -> str:
        if self._last is None:
            return "a block is called without any tensor"
        return (
            f"'{self._blocks.name(index)}' is not handed the output of the block before it as it "
            "is; the model does something to it in between"
        )


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
) -> tuple[tuple[ObservedMatrix, ...], ...]:
    """Matrices of every block with their inputs' sharing; blocks of one shape are traced once."""
    traces: dict[object, tuple[ObservedMatrix, ...]] = {}
    result = []
    for index, block in enumerate(blocks.blocks):
        signature = (type(block), tuple((n, v.shape) for n, v in block.state_dict().items()))
        if signature not in traces:
            traces[signature] = _observe(block, recording.hidden, recording.calls[index], wrap)
        result.append(tuple(matrix.within(blocks.name(index)) for matrix in traces[signature]))
    return tuple(result)


def _observe(
    block: nn.Module, hidden: Tensor, call: Call, wrap: Wrap
) -> tuple[ObservedMatrix, ...]:
    """Trace one block on the meta device: which matrices are used, and which share an input."""
    twin = copy.deepcopy(block).to("meta")
    try:
        with trace_inputs(twin) as observed:
            output = run_call(twin, call, hidden.to("meta"), torch.device("meta"))
    except (RuntimeError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"{type(block).__name__} cannot be traced without data: {str(error).splitlines()[0]}"
        ) from error
    if isinstance(output, tuple) != (wrap == "tuple"):
        raise UnsupportedModelError(
            f"{type(block).__name__} returns a {type(output).__name__}, the model reads a {wrap}"
        )
    return tuple(observed.values())


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
