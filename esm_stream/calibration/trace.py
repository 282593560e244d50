"""How can this model's forward be streamed, and which matrices does it use? Found out by trying.

From:  a skeleton (no weights) and one dummy sample.
To:    planning/: a `Trace` (mode, blocks in order, which matrices see which inputs).

The model's own forward is run twice, outside its blocks with small values for every parameter, so
that nothing is read and nothing is large. A block answers with what its twin on the meta device
says of the shapes. In the second pass every output that is handed on to the next block as it is
has other contents. What may then change decides the mode:

    chain      nothing but the hidden state: a block needs its predecessor's output alone
    replay     other arguments: the forward is run again for every block, with stored outputs
    resident   blocks are called repeatedly, or change what they are handed: one pass per expert

No model is known by its name here.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain as chained
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from esm_stream.calibration.arguments import (
    HIDDEN,
    Call,
    equal_values,
    map_tensors,
    tensors_in,
    unsupported_value,
)
from esm_stream.calibration.hooks import ObservedMatrix, trace_inputs
from esm_stream.calibration.lazy import constant, load_when_used, uneven
from esm_stream.calibration.passes import blocks_answered, own_copy, run_pass
from esm_stream.calibration.skeleton import Skeleton
from esm_stream.calibration.steps import MODES, OUTSIDE, Mode, Step
from esm_stream.errors import UnsupportedModelError

DUMMY_TOKENS = 8
# The name of a block while it runs alone: no module is called so.
_BLOCK = "<block>"


@dataclass(frozen=True, slots=True)
class Trace:
    """What one pass over a model without weights has shown.

    `why` says what rules out the modes before `mode` ("" for chain). `sample_tokens` is the number
    of positions that the first block sees of the dummy sample. `outside` names the parameters that
    the forward uses outside the blocks, `stem` those of them that it uses before the last block.
    `matrices` are those seen in each block, and OUTSIDE.
    """

    mode: Mode
    why: str
    steps: tuple[Step, ...]
    sample_tokens: int
    stem: tuple[str, ...]
    outside: tuple[str, ...]
    matrices: Mapping[str, tuple[ObservedMatrix, ...]]


def trace_model(skeleton: Skeleton, inputs: Mapping[str, Tensor] | None) -> Trace:
    """Find out how a model's forward can be streamed.

    Args:
        skeleton: A model on the meta device.
        inputs: One sample as the forward takes it, values irrelevant; None makes a dummy.

    Raises:
        UnsupportedModelError: The forward fails, or takes inputs of an unknown kind.
    """
    dummy = dict(inputs) if inputs is not None else dummy_inputs(skeleton.model)
    first = _Observer(skeleton, dummy)
    first.run()
    why_not_replay = first.why_not_replay()
    handed_on = first.handed_on()
    why_not_chain = ""
    if why_not_replay:
        handed_on = {}
    else:
        varied = _Observer(skeleton, dummy, like=first, varied=frozenset(handed_on))
        varied.run()
        difference = first.difference(varied, handed_on)
        if difference:
            handed_on, why_not_chain = {}, difference
        else:
            why_not_chain = first.why_not_chain(handed_on)
    mode: Mode = "resident" if why_not_replay else "replay" if why_not_chain else "chain"
    return Trace(
        mode,
        why_not_replay or why_not_chain,
        first.steps(handed_on),
        first.sample_tokens(),
        tuple(sorted(first.used_before_last)),
        tuple(sorted(first.used_outside)),
        first.matrices(),
    )


def force_mode(trace: Trace, mode: Mode) -> Trace:
    """The same trace in a mode that the user asks for.

    Raises:
        UnsupportedModelError: The checks rule that mode out.
    """
    if MODES.index(mode) < MODES.index(trace.mode):
        raise UnsupportedModelError(
            f"the forward cannot be streamed in {mode} mode: {trace.why}; the mode that fits is "
            f"'{trace.mode}'"
        )
    if mode == trace.mode:
        return trace
    return replace(trace, mode=mode, why="asked for")


def dummy_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """A tiny sample of the right kind for a model, from its configuration.

    Raises:
        UnsupportedModelError: The main input is neither token ids nor pixels nor sound.
    """
    config, name = model.config, model.main_input_name
    if name == "input_ids":
        ids = torch.arange(3, 3 + DUMMY_TOKENS) % config.get_text_config().vocab_size
        inputs = {"input_ids": ids[None]}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids[None, : DUMMY_TOKENS // 2]
        return inputs
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or 64
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {"pixel_values": torch.zeros(1, getattr(vision, "num_channels", 3), height, width)}
    if name == "input_values":
        return {"input_values": torch.zeros(1, 16_000)}
    raise UnsupportedModelError(
        f"{type(model).__name__} takes '{name}', not token ids or pixels; give ready-made inputs "
        "as a safetensors file named as the forward's arguments"
    )


@dataclass(frozen=True, slots=True)
class _Seen:
    """One call of a block, and what was answered."""

    number: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str | None
    extra: int
    answer: Any
    changed: str


class _Observer:
    """One pass in which twins on the meta device answer for the blocks."""

    def __init__(
        self,
        skeleton: Skeleton,
        dummy: Mapping[str, Tensor],
        like: "_Observer | None" = None,
        varied: frozenset[int] = frozenset(),
    ) -> None:
        self._skeleton = skeleton
        self._pristine = skeleton.model
        self.blocks = skeleton.blocks()
        self._dummy = dummy
        self._like = like
        self._varied = varied
        self._twins: dict[object, _Twin] = like._twins if like else {}
        self._outside: dict[str, ObservedMatrix] = {}
        self.calls: list[_Seen] = []
        self.result: Any = None
        self.used_outside: set[str] = set()
        self.used_before_last: set[str] = set()
        self._touched = ""

    def run(self) -> None:
        """Run the pass.

        Raises:
            UnsupportedModelError: The forward fails on the dummy sample.
        """
        self._model = model = copy.deepcopy(self._pristine)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:
                module.forward = _lookup_of_constant(module)  # type: ignore[method-assign, assignment]
        value_of = _values_of(model)
        values: dict[str, Tensor] = {}

        def load(name: str) -> Tensor:
            self.used_outside.add(name)
            if name not in values:
                values[name] = value_of(name)
            return values[name]

        load_when_used(model, load)
        name = type(model).__name__
        try:
            with trace_inputs(model) as self._outside, blocks_answered(model, self.blocks):
                self.result = run_pass(model, self._dummy, self._answer)
        except UnsupportedModelError:
            raise
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UnsupportedModelError(
                f"the forward of {name} fails on a dummy sample: {reason}"
            ) from error
        written = next((n for n, value in values.items() if value._version), None)
        if written is not None:
            # What is read in place must not be written to.
            raise UnsupportedModelError(
                f"the forward of {name} writes to its own parameter '{written}'"
            )
        self._touched = self._changed_block(model)

    def _answer(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        self.used_before_last = set(self.used_outside)
        given = by_place(args, kwargs)
        place = self._place(given)
        twin = self._twin(number, given)
        hidden = given[place] if place is not None else None
        index = len(self.calls)
        if self._like is not None and index < len(self._like.calls) and index not in self._varied:
            answer = self._like.calls[index].answer
        else:
            answer = twin.answer(hidden, varied=index in self._varied)
        self.calls.append(
            _Seen(number, args, kwargs, place, twin.extra(hidden), answer, twin.changed)
        )
        return answer

    def _place(self, given: Mapping[int | str, Any]) -> int | str | None:
        """Where the previous block's output is handed over; else the first tensor."""
        if self.calls:
            last = next(tensors_in(self.calls[-1].answer), None)
            found = next((p for p, v in given.items() if v is last and v is not None), None)
            if found is not None:
                return found
        return next((p for p, v in given.items() if isinstance(v, Tensor)), None)

    def _twin(self, number: int, given: Mapping[int | str, Any]) -> "_Twin":
        """What a block does to shapes; blocks of one kind are traced once."""
        block = self._model.get_submodule(self.blocks[number])
        kind = _kind_of_block(block, self.blocks[number])
        signature = (kind, _kind_of_value(tuple(given.items())))
        if signature not in self._twins:
            self._twins[signature] = _Twin(block, given)
        return self._twins[signature]

    def _changed_block(self, model: nn.Module) -> str:
        """A block that the pass has given other settings or parts; empty if there is none."""
        for name in dict.fromkeys(self.blocks[call.number] for call in self.calls):
            before, after = self._pristine.get_submodule(name), model.get_submodule(name)
            if _kind_of_block(before, name) != _kind_of_block(after, name):
                return name
        return ""

    # What it has shown ----------------------------------------------------------------------

    def handed_on(self) -> dict[int, None]:
        """Calls whose output goes to the next call as it is, in the same shape as its input."""
        found: dict[int, None] = {}
        for index, (call, after) in enumerate(zip(self.calls, self.calls[1:], strict=False)):
            hidden = next(tensors_in(call.answer), None)
            taken = (
                by_place(after.args, after.kwargs).get(after.place)
                if after.place is not None
                else None
            )
            if hidden is not None and taken is hidden and call.extra >= -1:
                found[index] = None
        return found

    def why_not_replay(self) -> str:
        """Why outputs of blocks cannot be stored and replayed; empty if they can."""
        numbers = [call.number for call in self.calls]
        if not numbers:
            return "the model has no list of blocks that its forward calls"
        if self._touched:
            return f"the forward changes settings of '{self._touched}'"
        repeated = next((n for i, n in enumerate(numbers) if n in numbers[:i]), None)
        if repeated is not None:
            return f"'{self.blocks[repeated]}' is called more than once in a forward"
        for call in self.calls:
            name = self.blocks[call.number]
            if call.changed:
                return f"'{name}' changes {call.changed}"
            kind = unsupported_value(call.answer)
            if kind is not None:
                return f"'{name}' returns a {kind}"
        return self._sharing_blocks()

    def _sharing_blocks(self) -> str:
        """Blocks that multiply with one stored matrix, whose inputs belong together; or empty."""
        users: dict[object, str] = {}
        for block, matrices in self.matrices().items():
            for matrix in matrices:
                stored: object = self._skeleton.stored.get(matrix.parameter)
                source = stored or self._skeleton.converted.get(matrix.parameter)
                first = users.setdefault(source, block) if source else block
                if first != block and OUTSIDE not in (first, block):
                    return f"'{first}' and '{block}' share weights"
        return ""

    def difference(self, other: "_Observer", handed_on: Mapping[int, None]) -> str:
        """What depends on outputs besides the hidden state handed on; empty if nothing does."""
        if [c.number for c in self.calls] != [c.number for c in other.calls]:
            return "which blocks are called depends on their outputs"
        for index, (call, varied) in enumerate(zip(self.calls, other.calls, strict=True)):
            values, others = by_place(call.args, call.kwargs), by_place(varied.args, varied.kwargs)
            for place, value in values.items():
                handed_over = place == call.place and index - 1 in handed_on
                if not handed_over and not equal_values(value, others[place]):
                    return (
                        f"argument {place!r} of '{self.blocks[call.number]}' depends on the output "
                        "of an earlier block"
                    )
        if not equal_values(self.result, other.result):
            return "what follows the last block reads outputs of earlier ones"
        return ""

    def why_not_chain(self, handed_on: Mapping[int, None]) -> str:
        """Why a block needs more than its predecessor's output; empty if it does not."""
        for index, call in enumerate(self.calls):
            name = self.blocks[call.number]
            if index and index - 1 not in handed_on:
                return (
                    f"'{name}' is not handed the output of the block before it as it is; the model "
                    "does something to it in between"
                )
            for place, value in by_place(call.args, call.kwargs).items():
                kind = unsupported_value(value)
                if kind is not None:
                    return f"'{name}' is handed a {kind} as argument {place!r}"
        if self.calls[0].place is None or self.calls[-1].extra < -1:
            return "a block takes or returns no hidden state alone"
        return ""

    def steps(self, handed_on: Mapping[int, None]) -> tuple[Step, ...]:
        """Blocks in order of their first call."""
        counts: dict[int, int] = {}
        firsts: dict[int, int] = {}
        for index, call in enumerate(self.calls):
            counts[call.number] = counts.get(call.number, 0) + 1
            firsts.setdefault(call.number, index)
        return tuple(
            Step(
                block=self.blocks[number],
                calls=counts[number],
                handed_on=index in handed_on,
                extra=self.calls[index].extra,
                place=self.calls[index].place or 0,
                state_bytes=sum(t.nbytes for t in tensors_in(self.calls[index].answer)),
            )
            for number, index in firsts.items()
        )

    def sample_tokens(self) -> int:
        """Positions of the first hidden state, or rows of the largest input seen."""
        for call in self.calls:
            if call.place is not None:
                hidden: Tensor = by_place(call.args, call.kwargs)[call.place]
                return max(1, hidden.numel() // hidden.shape[-1])
        return max((m.rows for m in self._outside.values()), default=1)

    def matrices(self) -> dict[str, tuple[ObservedMatrix, ...]]:
        """Every matrix whose input was seen, by block."""
        found: dict[str, dict[str, ObservedMatrix]] = {}
        for call in self.calls:
            name = self.blocks[call.number]
            known = found.setdefault(name, {})
            for matrix in self._twin(call.number, by_place(call.args, call.kwargs)).matrices:
                known.setdefault(matrix.key, matrix.within(name))
        found[OUTSIDE] = {k: m for k, m in self._outside.items() if not k.startswith(_BLOCK)}
        return {where: tuple(matrices.values()) for where, matrices in found.items()}


class _Twin:
    """A block on the meta device, run once: what it returns, changes and observes.

    Blocks whose shapes depend on values (routing of tokens) run on the CPU, with small values for
    every parameter.
    """

    def __init__(self, block: nn.Module, given: Mapping[int | str, Any]) -> None:
        try:
            self._run(own_copy(block).to("meta"), map_tensors(dict(given), _to_meta))
        except Exception:  # noqa: BLE001 - whatever an operator without values raises
            twin = own_copy(block)
            constants = _values_of(twin)
            load_when_used(twin, lambda name: constants(name.removeprefix(f"{_BLOCK}.")), _BLOCK)
            try:
                self._run(twin, map_tensors(dict(given), Tensor.clone))
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise UnsupportedModelError(
                    f"{type(block).__name__} cannot be traced without data: {reason}"
                ) from error

    def _run(self, twin: nn.Module, given: Mapping[int | str, Any]) -> None:
        args = tuple(value for place, value in given.items() if isinstance(place, int))
        kwargs = {place: value for place, value in given.items() if isinstance(place, str)}
        before = _fingerprint((args, kwargs)), _state_of(twin)
        with torch.no_grad(), trace_inputs(twin, _BLOCK) as matrices:
            self._output = twin(*args, **kwargs)
        after = _fingerprint((args, kwargs)), _state_of(twin)
        self.changed = (
            "what it is handed"
            if after[0] != before[0]
            else "its own state"
            if after[1] != before[1]
            else ""
        )
        self.matrices = tuple(_local(matrix) for matrix in matrices.values())

    def extra(self, hidden: Tensor | None) -> int:
        """See `Step.extra`; -2 if the output is no hidden state of the input's shape."""
        output = self._output
        first = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(first, Tensor) or hidden is None:
            return -2
        if (first.shape, first.dtype) != (hidden.shape, hidden.dtype):
            return -2
        if isinstance(output, Tensor):
            return -1
        rest = output[1:]
        return len(rest) if type(output) is tuple and all(v is None for v in rest) else -2

    def answer(self, hidden: Tensor | None, *, varied: bool) -> Any:  # noqa: ANN401
        """The output with contents: those of the input where it has the same shape."""

        def fill(value: Tensor) -> Tensor:
            alike = hidden is not None and value.shape == hidden.shape
            if alike and hidden is not None and value.dtype == hidden.dtype:
                # A view is a new object: its identity shows whether the model hands it on.
                found = hidden.detach()
            else:
                found = torch.ones(value.shape, dtype=value.dtype)
            if not varied or not found.is_floating_point() or found.ndim == 0:
                return found
            noise = 1.0 + torch.arange(found.shape[-1]) * 0.125
            return (found + noise).to(found.dtype)

        return map_tensors(self._output, fill)


def by_place(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int | str, Any]:
    """Arguments by position and keyword."""
    return dict(chained(enumerate(args), kwargs.items()))


def as_call(step: Step, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Call, Tensor]:
    """A block's arguments as they are kept, and the hidden state that was among them."""
    given = by_place(args, kwargs)
    call = Call(
        tuple(HIDDEN if i == step.place else value for i, value in enumerate(args)),
        {k: HIDDEN if k == step.place else value for k, value in kwargs.items()},
    )
    hidden: Tensor = given[step.place]
    return call, hidden


def stand_in(step: Step, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """An output whose contents nobody reads, for a block that hands on its hidden state."""
    hidden = by_place(args, kwargs)[step.place].detach()
    return hidden if step.extra < 0 else (hidden, *([None] * step.extra))


def _local(matrix: ObservedMatrix) -> ObservedMatrix:
    """A matrix as named from inside its block."""
    start = len(_BLOCK) + 1
    return replace(
        matrix,
        key=matrix.key[start:],
        parameter=matrix.parameter[start:],
        leader=matrix.leader[start:],
    )


def _all_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters by every name they have: tied ones appear several times."""
    yield from model.named_parameters(remove_duplicate=False)


def _lookup_of_constant(module: nn.Embedding) -> Callable[[Tensor], Tensor]:
    """A lookup that gives what the table would; torch would first copy the whole table."""

    def look_up(ids: Tensor) -> Tensor:
        table = module.weight  # notes that it is used
        return constant((*ids.shape, table.shape[1]), table.dtype).clone()

    return look_up


def _to_meta(value: Tensor) -> Tensor:
    return value.to("meta")


def _values_of(model: nn.Module) -> Callable[[str], Tensor]:
    """What `load_when_used` takes: small values for every parameter, without memory."""
    shapes = {name: (tuple(v.shape), v.dtype) for name, v in _all_parameters(model)}
    return lambda name: uneven(*shapes[name])


def _kind_of_block(block: nn.Module, name: str) -> object:
    """Equal for blocks that do the same to shapes: modules, their settings, their shapes.

    A setting that is the block's own number says nothing.
    """
    last = name.rpartition(".")[2]
    number = int(last) if last.isdigit() else None
    parts = []
    for path, module in block.named_modules():
        settings = tuple(
            (key, value)
            for key, value in vars(module).items()
            if isinstance(value, bool) or (isinstance(value, int | float | str) and value != number)
        )
        shapes = tuple((n, None if v is None else v.shape) for n, v in module._parameters.items())
        parts.append((path, type(module), settings, shapes))
    return tuple(parts)


def _kind_of_value(value: Any) -> object:  # noqa: ANN401
    """Shapes and dtypes of tensors, values of what is plain, types of the rest; hashable."""
    if isinstance(value, Tensor):
        return ("tensor", value.shape, value.dtype)
    if isinstance(value, tuple | list):
        return (type(value), tuple(map(_kind_of_value, value)))
    if isinstance(value, Mapping):
        return (type(value), tuple((k, _kind_of_value(v)) for k, v in value.items()))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return (type(value), id(value))


def _fingerprint(value: Any) -> object:  # noqa: ANN401
    """Changes when a tensor, list, mapping or other object is written to, as far as one can see."""
    if isinstance(value, Tensor):
        return (id(value), value._version)
    if isinstance(value, tuple | list):
        return tuple(map(_fingerprint, value))
    if isinstance(value, Mapping):
        return tuple((k, _fingerprint(v)) for k, v in value.items())
    if hasattr(value, "__dict__") and not callable(value):
        return (id(value), tuple((k, id(v)) for k, v in vars(value).items()))
    return id(value)


def _state_of(module: nn.Module) -> object:
    """What modules keep besides parameters: buffers and attributes."""
    return tuple(
        (name, key, id(value), value._version if isinstance(value, Tensor) else 0)
        for name, part in module.named_modules()
        for key, value in chained(vars(part).items(), part._buffers.items())
        if key not in ("_parameters", "_buffers", "_modules") and not key.startswith("_forward")
    )
