"""A transformers model without weights: its blocks, and which checkpoint tensor is which parameter.

From:  config.json, names and shapes of a checkpoint's tensors (headers only, no tensor is read).
To:    trace.py (how can it be streamed?), planning/ (matrices), stages/ (a block to run).
Cost:  parameters live on the meta device, buffers are real: a 70B model takes about 0.2 s.

A *block* is one child of an outermost ModuleList; the *skeleton* is everything else.
"""

import copy
import re
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from esm_stream.calibration.conversion import (
    Conversion,
    Place,
    Shape,
    places_of,
    places_unchanged,
)
from esm_stream.errors import UnsupportedModelError

_BUILD_LOCK = threading.Lock()
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model on the meta device, and what each of its parameters is made of.

    `stored` maps the name of a parameter (or persistent buffer) to the checkpoint tensor that holds
    it unchanged, `converted` those that transformers assembles from other tensors at load. Tied
    names share an entry. `dtypes` has the dtype in which each is used. `misfits` says why a
    parameter cannot be made of the tensors that are there for it, `known_places` keeps `places`.
    """

    model: PreTrainedModel
    stored: Mapping[str, str] = field(default_factory=dict)
    converted: Mapping[str, Conversion] = field(default_factory=dict)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    misfits: Mapping[str, str] = field(default_factory=dict)
    known_places: dict[object, tuple[tuple[Place, ...], ...] | None] = field(default_factory=dict)

    def blocks(self) -> tuple[str, ...]:
        """Names of all blocks: children of outermost lists of modules that hold parameters.

        A child that is itself only a container is never called; its children are the blocks.
        """
        found: list[str] = []
        for name, module in self.model.named_modules():
            parent = self.model.get_submodule(name.rpartition(".")[0])
            listed = isinstance(parent, _CONTAINERS) and not isinstance(module, _CONTAINERS)
            nested = any(name.startswith(outer + ".") for outer in found)
            if listed and not nested and next(module.parameters(), None) is not None:
                found.append(name)
        return tuple(found)

    def tensors_of(self, module: str) -> tuple[str, ...]:
        """Checkpoint tensors that a module's parameters and persistent buffers are made of.

        Raises:
            UnsupportedModelError: A parameter has no tensor, or none of its shape.
        """
        return self.tensors_for(self._names(module))

    def tensors_for(self, names: Iterable[str]) -> tuple[str, ...]:
        """Checkpoint tensors that parameters and buffers, by full name, are made of.

        Raises:
            UnsupportedModelError: A parameter has no tensor, or none of its shape.
        """
        found: dict[str, None] = {}
        for name in names:
            if name in self.converted:
                found |= dict.fromkeys(self.converted[name].tensors)
            elif name in self.stored:
                found[self.stored[name]] = None
            else:
                self._require_buffer(name)
        return tuple(found)

    def load(self, module: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Parameters and persistent buffers of a module by local name, as `from_pretrained` does.

        Args:
            module: Full name of the module; "" for the model.
            read: Gives a checkpoint tensor; called once for each.

        Raises:
            UnsupportedModelError: A parameter has no tensor, or none of its shape.
        """
        prefix = f"{module}." if module else ""
        values = self.values(self._names(module), read)
        return {name.removeprefix(prefix): value for name, value in values.items()}

    def values(self, names: Iterable[str], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Parameters and buffers by full name; buffers that no tensor holds are left out.

        Tied names get one tensor. Values that need neither a conversion nor another dtype are the
        very tensors that `read` gives.

        Raises:
            UnsupportedModelError: A parameter has no tensor, or none of its shape.
        """
        wanted = tuple(names)
        made: dict[str, Tensor] = {}

        @cache
        def value(tensor: str, dtype: torch.dtype) -> Tensor:
            return read_once(tensor).to(dtype)

        read_once = cache(read)
        for name in wanted:
            conversion = self.converted.get(name)
            if conversion is not None and name not in made:
                dtype = self.dtypes[conversion.first]
                targets = conversion.run(
                    self.model, {tensor: value(tensor, dtype) for tensor in conversion.tensors}
                )
                together = [n for n in wanted if self.converted.get(n) is conversion]
                made |= {n: targets[self._target(n, conversion)] for n in together}
            elif conversion is None and name in self.stored:
                made[name] = value(self.stored[name], self.dtypes[name])
            elif conversion is None:
                self._require_buffer(name)
                derived = self._derived(name)
                if derived is not None:
                    made[name] = derived
        return {name: made[name] for name in wanted if name in made}

    def places(
        self, name: str, shapes: Mapping[str, Shape], *, stack: int | None, transposed: bool
    ) -> tuple[tuple[Place, ...], ...] | None:
        """Where the matrices of a parameter lie in the checkpoint, one entry for each matrix.

        Args:
            name: Full name of a parameter: a matrix, a convolution's kernels, or a stack.
            shapes: Shapes of the checkpoint's tensors.
            stack: How many equal matrices the parameter is, one after the other; None if one.
            transposed: Whether they are (I, O).

        Returns:
            The parts of each matrix's outputs; None if the values were computed anew or if a part
            is not a range of whole outputs of a stored matrix.
        """
        if name in self.stored:
            tensor = self.stored[name]
            return places_unchanged(tensor, shapes[tensor], stack, transposed=transposed)
        conversion = self.converted.get(name)
        if conversion is None:
            return None
        target = self._target(name, conversion)
        # Blocks are alike: where parts lie is found out once, with numbers for the tensors' names.
        likeness = conversion.likeness, conversion.targets.index(target), stack, transposed
        if likeness not in self.known_places:
            sources = tuple((str(number), shape) for number, shape in enumerate(conversion.shapes))
            parameter = conversion.trace(self.model)[target]
            found = places_of(parameter, sources, stack, transposed=transposed)
            self.known_places[likeness] = found
        return _with_names(self.known_places[likeness], conversion.tensors)

    def _names(self, module: str) -> list[str]:
        prefix = f"{module}." if module else ""
        return [prefix + local for local in self.model.get_submodule(module).state_dict()]

    def _target(self, name: str, conversion: Conversion) -> str:
        """The parameter among a conversion's targets that `name` is, or is tied to."""
        if name in conversion.targets:
            return name
        return next(n for n in _tied_names(self.model)[name] if n in conversion.targets)

    def _require_buffer(self, name: str) -> None:
        path, _, leaf = name.rpartition(".")
        if name in self.misfits:
            raise UnsupportedModelError(self.misfits[name])
        is_parameter = leaf in self.model.get_submodule(path)._parameters
        if is_parameter and self._derived(name) is None:
            raise UnsupportedModelError(
                f"the checkpoint has no tensor for parameter '{name}' of "
                f"{type(self.model).__name__}; is config.json the one of this checkpoint?"
            )

    def _derived(self, name: str) -> Tensor | None:
        """A parameter that checkpoints leave out because it follows from the configuration.

        Tables of sines, say: what the model itself makes of it, unless that is drawn at random.
        """
        ignored = self.model._keys_to_ignore_on_load_missing or ()
        path, _, leaf = name.rpartition(".")
        expected = self.model.get_submodule(path)._parameters.get(leaf)
        if expected is None or not any(re.search(pattern, name) for pattern in ignored):
            return None
        made = []
        for seed in range(2):
            owner = copy.deepcopy(self.model.get_submodule(path))
            put_tensor(owner, leaf, torch.zeros(expected.shape, dtype=expected.dtype))
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.model._init_weights(owner)
            made.append(owner._parameters[leaf])
        assert made[0] is not None
        assert made[1] is not None
        return made[0] if torch.equal(made[0], made[1]) else None

    def persistent_buffers(self) -> tuple[str, ...]:
        """Names of the buffers that checkpoints hold."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        return tuple(name for name in self.model.state_dict() if name not in parameters)

    def modality(self) -> str:
        """Whether the main input is pixels ("vision") or anything else ("language")."""
        return "vision" if self.model.main_input_name == "pixel_values" else "language"


def _with_names(
    places: tuple[tuple[Place, ...], ...] | None, names: Sequence[str]
) -> tuple[tuple[Place, ...], ...] | None:
    """Places in numbered tensors, with the tensors' names."""
    if places is None:
        return None
    return tuple(
        tuple(replace(place, tensor=names[int(place.tensor)]) for place in parts)
        for parts in places
    )


def load_config(root: Path) -> PretrainedConfig:
    """The configuration of a model directory; never runs code from it.

    Raises:
        UnsupportedModelError: transformers does not know the architecture.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            root, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(f"{root}/config.json: {reason}") from error
    return config


def build_skeleton(root: Path, shapes: Mapping[str, Shape], dtype: torch.dtype) -> Skeleton:
    """The model of a checkpoint directory on the meta device, joined with its tensors' names.

    Args:
        root: Directory with config.json.
        shapes: Shapes of all tensors of the checkpoint, by name.
        dtype: Default dtype while the model is built (buffers follow it as in `from_pretrained`).

    Raises:
        UnsupportedModelError: Unknown architecture, custom code would be needed, or the checkpoint
            is quantised.
    """
    stamp = (root / "config.json").stat() if (root / "config.json").is_file() else None
    key = (stamp.st_size, stamp.st_mtime_ns) if stamp else None
    return _build(root, key, tuple(shapes.items()), dtype)


@lru_cache(maxsize=4)
def _build(
    root: Path,
    stamp: tuple[int, int] | None,  # noqa: ARG001 - part of the cache's key
    shapes: tuple[tuple[str, Shape], ...],
    dtype: torch.dtype,
) -> Skeleton:
    config = load_config(root)
    if hasattr(config, "quantization_config"):
        raise UnsupportedModelError(
            f"{root}/config.json: the checkpoint is quantised (quantization_config); save a "
            "dequantised copy of it"
        )
    architecture = model_class(config)
    with _BUILD_LOCK, _on_meta():
        model = architecture._from_config(config, dtype=dtype)
    model.eval()
    stored, converted, misfits = _join(model, dict(shapes))
    return Skeleton(model, stored, converted, _dtypes(model, dtype), misfits)


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that the checkpoint was saved from, or AutoModel's choice."""
    import transformers

    for name in config.architectures or ():
        architecture = getattr(transformers, name, None)
        if isinstance(architecture, type) and issubclass(architecture, PreTrainedModel):
            return architecture
    mapping = AutoModel._model_mapping
    if type(config) in mapping:
        found = mapping[type(config)]
        chosen: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found  # type: ignore[assignment]
        return chosen
    raise UnsupportedModelError(
        f"transformers has no class for architectures {config.architectures} "
        f"of model type '{config.model_type}'"
    )


@contextmanager
def _on_meta() -> Generator[None]:
    """While active, parameters are moved to the meta device as they are registered."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # A parameter that is on meta already is a tied one: it stays the same object.
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _join(
    model: PreTrainedModel, shapes: Mapping[str, Shape]
) -> tuple[dict[str, str], dict[str, Conversion], dict[str, str]]:
    """Map parameters to checkpoint tensors with transformers' own rules for names.

    Returns `stored`, `converted` and `misfits` of the skeleton.
    """
    state: dict[str, Tensor] = model.state_dict()
    stored, conversions = _renamed(model, state, shapes)
    misfits = {}
    for target, name in list(stored.items()):
        if tuple(state[target].shape) != shapes[name]:
            misfits[target] = _misfit(model, target, shapes[name], stored.pop(target))
    converted: dict[str, Conversion] = {}
    for conversion in conversions:
        try:
            made = conversion.trace(model)
        except UnsupportedModelError as error:
            misfits[conversion.first] = str(error)
            continue
        whole = replace(conversion, targets=tuple(made))
        for target in made.keys() & state.keys():
            if state[target].shape == made[target].shape:
                converted[target] = whole
            else:
                misfits[target] = _misfit(model, target, made[target].shape, whole.tensors[0])
    for name, others in _tied_names(model).items():
        found = next((n for n in others if n in stored or n in converted), "")
        if name in stored or name in converted or not found:
            continue
        if found in stored:
            stored[name] = stored[found]
        else:
            converted[name] = converted[found]
    return stored, converted, misfits


def _renamed(
    model: PreTrainedModel, state: dict[str, Tensor], shapes: Mapping[str, Shape]
) -> tuple[dict[str, str], list[Conversion]]:
    """Tensors that are a parameter under another name or the same, and those to be converted."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: t for t in converters for pattern in t.source_patterns}
    prefix = model.base_model_prefix
    stored: dict[str, str] = {}
    waiting: dict[str, list[tuple[str, str]]] = {}
    # The order decides which slice of a stack a tensor becomes.
    for name in sorted(shapes, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target in state and pattern is not None:
            waiting.setdefault(target, []).append((pattern, name))
        elif target in state:
            stored.setdefault(target, name)
    return stored, [
        Conversion(
            by_pattern[sources[0][0]],
            first,
            tuple(sources),
            tuple(shapes[tensor] for _, tensor in sources),
        )
        for first, sources in waiting.items()
    ]


def _misfit(model: PreTrainedModel, target: str, shape: Sequence[int], tensor: str) -> str:
    expected = tuple(model.state_dict()[target].shape)
    return (
        f"tensor '{tensor}' gives parameter '{target}' the shape {tuple(shape)}, "
        f"{type(model).__name__} expects {expected}; is config.json the one of this checkpoint?"
    )


def _tied_names(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Other names of each parameter that has several: one object, or tied by the configuration."""
    groups: dict[str, dict[str, None]] = {}
    by_identity: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        first = by_identity.setdefault(id(value), name)
        groups.setdefault(first, {})[name] = None
        groups[name] = groups[first]
    for target, source in model.all_tied_weights_keys.items():
        if source in groups and target in groups and groups[source] is not groups[target]:
            groups[source] |= groups[target]
            for name in groups[target]:
                groups[name] = groups[source]
    return {
        name: tuple(other for other in group if other != name)
        for name, group in groups.items()
        if len(group) > 1
    }


def _dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of each parameter and buffer: its own, float32 where the model insists on it."""
    kept = [re.compile(pattern.replace("*", ".*")) for pattern in model._get_dtype_plan(dtype)]
    return {
        name: torch.float32 if any(p.search(name) for p in kept) else value.dtype
        for name, value in model.state_dict().items()
    }


def put_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace one parameter or buffer of a module in place.

    Whether a parameter requires a gradient stays as it is: no graph is ever built, but torch's
    matmul chooses its kernel by it, and results would differ from the plain model's in their bits.
    """
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        replaced = owner._parameters[leaf]
        assert replaced is not None
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=replaced.requires_grad)


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move all buffers of a module to a device (parameters are put there one by one)."""
    for owner in module.modules():
        buffers: dict[str, Any] = owner._buffers
        for name, value in buffers.items():
            if value is not None:
                buffers[name] = value.to(device)
