"""A base, experts that differ from it everywhere, and their samples, for one architecture."""

import copy
from pathlib import Path

import torch
import transformers
from architectures import Architecture, Ids, Lengths, Real, Whole
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

NOISE = 0.05
SAMPLES = 4


def make_model(architecture: Architecture, seed: int) -> PreTrainedModel:
    """A model with random numbers in every parameter, biases and norms included."""
    torch.manual_seed(seed)
    kind = getattr(transformers, architecture.model)
    config = kind.config_class(**copy.deepcopy(architecture.settings))
    return moved(kind(config).eval(), seed + 1).to(getattr(torch, architecture.dtype))


def moved(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A copy of a model whose every parameter has moved; tied ones stay tied."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in twin.parameters():
            step = torch.randn(value.shape, generator=generator)
            value.copy_((value.float() + NOISE * step).to(value.dtype))
    return twin


def save(model: PreTrainedModel, path: Path) -> None:
    """Save a model as `save_pretrained` does, in several shards."""
    size = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    model.save_pretrained(path, max_shard_size=max(size // 3, 1))


def load(architecture: Architecture, path: Path) -> PreTrainedModel:
    """The plain model, as `from_pretrained` gives it."""
    kind = getattr(transformers, architecture.model)
    dtype = getattr(torch, architecture.dtype)
    model: PreTrainedModel = kind.from_pretrained(path, dtype=dtype)
    return model.eval()


def draw(architecture: Architecture, path: Path, seed: int) -> None:
    """Write ready-made inputs of SAMPLES samples, first dimension = samples."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: _drawn(how, generator) for name, how in architecture.inputs.items()}
    save_file(found, path)


def _drawn(how: Ids | Real | Whole | Lengths, generator: torch.Generator) -> Tensor:
    if isinstance(how, Ids):
        ids = torch.randint(4, 90, (SAMPLES, how.length), generator=generator)
        ids[:, 1 : 1 + how.images] = 90
        return ids
    if isinstance(how, Real):
        return torch.randn((SAMPLES, *how.shape), generator=generator)
    if isinstance(how, Whole):
        return torch.tensor([how.values] * SAMPLES)
    width = max(how.lengths)
    return (torch.arange(width)[None] < torch.tensor(how.lengths)[:, None]).long()
