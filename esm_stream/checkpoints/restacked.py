"""A model with its blocks in another order: some left out, some more than once.

From:  a checkpoint, and for every block of the model to be made the block it is made of.
To:    the same questions answered as by a checkpoint with these blocks; bytes stay where they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

from esm_stream.checkpoints.checkpoint import Checkpoint
from esm_stream.checkpoints.header import Header, TensorInfo
from esm_stream.checkpoints.names import block_of, in_block, stack_of
from esm_stream.errors import ManifestError

DEPTH_KEYS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_BY_NUMBER: Final = ("first_k_dense_replace", "decoder_sparse_step", "num_kv_shared_layers")


@dataclass(frozen=True, eq=False)
class Restacked(Checkpoint):
    """Block number i is block `order[i]` of `whole`; what is outside the blocks stays."""

    whole: Checkpoint
    order: tuple[int, ...]

    @cached_property
    def _stored(self) -> Mapping[str, str]:
        """Stored name of every tensor, in order: what precedes the blocks, blocks, the rest."""
        names = list(self.whole.tensors)
        inside = [name for name in names if block_of(name) is not None]
        first = names.index(inside[0])
        outside = {name: name for name in names if block_of(name) is None}
        blocks = {
            in_block(name, number): name
            for number, source in enumerate(self.order)
            for name in inside
            if block_of(name) == source
        }
        before = {name: name for name in names[:first]}
        return {**before, **blocks, **outside}

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Tensors by the names they have in the new order."""
        stored = self.whole.tensors
        return {name: replace(stored[own], name=name) for name, own in self._stored.items()}

    def file_of(self, name: str) -> Header:
        """The header of the file that holds the tensor."""
        return self.whole.file_of(self._stored[name])

    def identity(self, name: str) -> str:
        """That of the stored tensor."""
        return self.whole.identity(self._stored[name])


def restacked(checkpoint: Checkpoint, order: tuple[int, ...] | None) -> Checkpoint:
    """The checkpoint with its blocks in this order; as it is where there is none."""
    if order is None:
        return checkpoint
    return Restacked(checkpoint.root, checkpoint.headers, checkpoint, order)


def block_order(base: Checkpoint, ranges: Sequence[tuple[int, int]]) -> tuple[int, ...] | None:
    """For every block of the output the block it is made of; None where all stay as they are.

    Raises:
        ManifestError: The ranges, or the architecture, do not allow it.
    """
    stacks = sorted({stack_of(name) for name in base.tensors if block_of(name) is not None})
    if len(stacks) != 1:
        found = ", ".join(stack.rstrip(".") for stack in stacks) or "none"
        raise ManifestError(f"output.layers: wants a model with one stack of blocks, found {found}")
    count = 1 + max(block_of(name) or 0 for name in base.tensors)
    wrong = [f"[{a}, {b}]" for a, b in ranges if not 0 <= a < b <= count]
    if wrong:
        raise ManifestError(
            f"output.layers: {', '.join(wrong)} outside the model's layers; want [first, end] with "
            f"0 <= first < end <= {count}"
        )
    order = tuple(number for start, stop in ranges for number in range(start, stop))
    if order == tuple(range(count)):
        return None
    restacked_config(base.config, order)
    return order


def restacked_config(config: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """A configuration for blocks in another order: their number, and lists with an entry for each.

    Raises:
        ManifestError: It gives no number of layers, or names single layers in a way of its own.
    """
    changed, found = _changed(config, order)
    if not found:
        raise ManifestError(
            f"output.layers: config.json has none of {', '.join(DEPTH_KEYS)}, so the number of "
            "layers cannot be changed"
        )
    return changed


def _changed(config: Mapping[str, Any], order: Sequence[int]) -> tuple[dict[str, Any], bool]:
    depths = [key for key in DEPTH_KEYS if isinstance(config.get(key), int)]
    single = list(_of_single_layers(config, config[depths[0]])) if depths else []
    if single:
        raise ManifestError(
            f"output.layers: {', '.join(single)} in config.json are about single layers by their "
            "number; the order of layers cannot be changed"
        )
    changed, found = dict(config), bool(depths)
    for key, value in config.items():
        if key in depths:
            changed[key] = len(order)
        elif depths and isinstance(value, list) and len(value) == config[depths[0]]:
            changed[key] = [value[number] for number in order]
        elif isinstance(value, dict):
            changed[key], inside = _changed(value, order)
            found = found or inside
    return changed, found


def _of_single_layers(config: Mapping[str, Any], count: int) -> Iterator[str]:
    """Keys whose values are numbers of layers, which mean others in another order."""
    for key, value in config.items():
        listed = isinstance(value, list) and value and len(value) != count
        if (listed and "layer" in key) or (key in _BY_NUMBER and value not in (0, 1, None)):
            yield key
