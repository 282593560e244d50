"""A transformers model without weights: its blocks, and which checkpoint tensor is which parameter.

From:  config.json and the names of a checkpoint's tensors (headers only, no tensor is read).
To:    chain.py (may it be streamed?), plan.py (matrices), stages/ (a block to run).
Cost:  parameters live on the meta device, buffers are real: a 70B model takes about 0.2 s.

A *block* is one child of an outermost ModuleList; the *skeleton* is everything else.
"""

import copy
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from esm_stream.errors import UnsupportedModelError

_BUILD_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class BlockList:
    """One outermost ModuleList of a model: `prefix` is its module name, "model.layers"."""

    prefix: str
    blocks: tuple[nn.Module, ...]

    def name(self, index: int) -> str:
        """Module name of one block."""
        return f"{self.prefix}.{index}"


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model on the meta device, and the checkpoint tensor of each of its parameters.

    `stored` maps the name of a parameter (or persistent buffer) to the checkpoint tensor that holds
    it unchanged; `converted` maps those that transformers assembles from other tensors at load to
    one of the tensors it is made from.
    """

    model: PreTrainedModel
    stored: Mapping[str, str]
    converted: Mapping[str, str]

    def lists(self) -> tuple[BlockList, ...]:
        """Outermost ModuleLists whose children hold parameters."""
        found: list[BlockList] = []
        for name, module in self.model.named_modules():
            nested = any(name.startswith(outer.prefix + ".") for outer in found)
            if isinstance(module, nn.ModuleList) and not nested and _holds_parameters(module):
                found.append(BlockList(name, tuple(module)))
        return tuple(found)

    def tensors_of(self, module: str) -> dict[str, str]:
        """Checkpoint tensors of one module: local parameter or buffer name -> tensor name.

        Raises:
            UnsupportedModelError: A parameter has no tensor of its own in the checkpoint.
        """
        target, result = self.model.get_submodule(module), {}
        for local in target.state_dict():
            name = f"{module}.{local}"
            if name in self.converted:
                raise UnsupportedModelError(
                    f"parameter '{name}' is assembled by transformers from several tensors (one of "
                    f"them '{self.converted[name]}'); such models cannot be streamed yet"
                )
            if name in self.stored:
                result[local] = self.stored[name]
            elif local in dict(target.named_parameters()):
                raise UnsupportedModelError(
                    f"the checkpoint has no tensor for parameter '{name}' of "
                    f"{type(self.model).__name__}; is config.json the one of this checkpoint?"
                )
        return result

    def modality(self) -> str:
        """Whether the main input is pixels ("vision") or anything else ("language")."""
        return "vision" if self.model.main_input_name == "pixel_values" else "language"


def _holds_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


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


def build_skeleton(root: Path, tensor_names: tuple[str, ...], dtype: torch.dtype) -> Skeleton:
    """The model of a checkpoint directory on the meta device, joined with its tensors' names.

    Args:
        root: Directory with config.json.
        tensor_names: Names of all tensors of the checkpoint.
        dtype: Default dtype while the model is built (buffers follow it as in `from_pretrained`).

    Raises:
        UnsupportedModelError: Unknown architecture, or custom code would be needed.
    """
    stamp = (root / "config.json").stat() if (root / "config.json").is_file() else None
    key = (stamp.st_size, stamp.st_mtime_ns) if stamp else None
    return _build(root, key, tensor_names, dtype)


@lru_cache(maxsize=4)
def _build(
    root: Path,
    stamp: tuple[int, int] | None,  # noqa: ARG001 - part of the cache's key
    tensor_names: tuple[str, ...],
    dtype: torch.dtype,
) -> Skeleton:
    config = load_config(root)
    architecture = _model_class(config)
    with _BUILD_LOCK, _on_meta():
        model = architecture._from_config(config, dtype=dtype)
    model.eval()
    return Skeleton(model, *_join(model, tensor_names))


def _model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
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
        if param is not None:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _join(
    model: PreTrainedModel, tensor_names: tuple[str, ...]
) -> tuple[dict[str, str], dict[str, str]]:
    """Map parameters to checkpoint tensors with transformers' own rules for names."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state: dict[str, Tensor] = model.state_dict()
    stored: dict[str, str] = {}
    converted: dict[str, str] = {}
    prefix = model.base_model_prefix
    for name in sorted(tensor_names):
        target, source = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, source = rename_source_key(name, [], [], prefix, state)
        if target in state:
            (stored if source is None else converted).setdefault(target, name)
    return stored, converted


def with_tensors(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a meta module that holds the given tensors as parameters and buffers, zero-copy.

    The module itself is not changed, so that threads may share it.
    """
    twin = copy.deepcopy(module)
    for name, value in values.items():
        put_tensor(twin, name, value)
    return twin


def put_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace one parameter or buffer of a module in place."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move all buffers of a module to a device (parameters are put there one by one)."""
    for owner in module.modules():
        buffers: dict[str, Any] = owner._buffers
        for name, value in buffers.items():
            if value is not None:
                buffers[name] = value.to(device)
