"""Blocks that are copied to the device while another computes: here the device is the processor."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import MakeZoo, PlanOf, merge_here
from models import Zoo

from esm_stream.checkpoints.reader import TensorReader
from esm_stream.errors import InputError
from esm_stream.stages import transfer
from esm_stream.stages.context import forget_checkpoints, stored_at
from esm_stream.stages.transfer import BlockBuffers, Wanted

CPU = torch.device("cpu")


@pytest.fixture
def fills(monkeypatch: pytest.MonkeyPatch) -> list[Wanted]:
    """Copies that were made; a merge in this test makes them though its device is the processor."""
    made: list[Wanted] = []
    fill = BlockBuffers._fill

    def counted(self: BlockBuffers, wanted: Wanted, *rest: object) -> transfer.Loaded:
        made.append(wanted)
        return fill(self, wanted, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(transfer, "in_place", lambda _: False)
    monkeypatch.setattr(BlockBuffers, "_fill", counted)
    return made


@pytest.fixture
def buffers() -> Iterator[BlockBuffers]:
    """Buffers on the processor."""
    made = BlockBuffers(CPU)
    yield made
    made.close()


def _of(zoo: Zoo, names: tuple[str, ...]) -> Wanted:
    return {("", zoo.base): names}


@pytest.mark.parametrize("mode", ["chain", "replay", "resident"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_copied_blocks_merge_to_the_bytes_of_those_read_in_place(
    name: str, mode: str, zoo: MakeZoo, plan_of: PlanOf, request: pytest.FixtureRequest
) -> None:
    run = {"forward": mode, "memory": "4GiB"}
    wanted = merge_here(plan_of(zoo(name), "in_place", run=run)).output
    fills: list[Wanted] = request.getfixturevalue("fills")
    plan = plan_of(zoo(name), "copied", run=run)
    found = merge_here(plan).output
    for path in sorted(wanted.glob("*.safetensors")):
        assert (found / path.name).read_bytes() == path.read_bytes()
    assert plan.forward is not None
    assert len(fills) == len(plan.forward.steps) * len(plan.experts), "each block once"
    assert not transfer._BUFFERS, "given back when no block follows"


def test_what_was_taken_stays_while_the_next_is_filled(zoo: MakeZoo, buffers: BlockBuffers) -> None:
    small, large = ("model.norm.weight",), ("model.embed_tokens.weight", "model.norm.weight")
    source = zoo("llama")
    with TensorReader(stored_at(source.base, source.base)) as reader:
        for names, following in ((small, large), (large, small), (small, small)):
            loaded = buffers.take(_of(source, names))
            buffers.begin(_of(source, following))
            buffers._settle()
            for name in names:
                tensor = reader.tensor(name)
                assert torch.equal(loaded["", name], tensor)
                assert loaded["", name].dtype == tensor.dtype


def test_tensors_larger_than_the_staging_buffers_are_copied_in_pieces(
    zoo: MakeZoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "STAGING_BYTES", 1000)
    buffers = BlockBuffers(CPU)
    name = "model.embed_tokens.weight"
    with TensorReader(stored_at(zoo("llama").base, zoo("llama").base)) as reader:
        found = buffers.take(_of(zoo("llama"), (name,)))["", name]
        assert found.nbytes > 3000
        assert torch.equal(found, reader.tensor(name))
    buffers.close()


def test_a_file_that_changes_on_the_way_is_an_error_where_the_block_is_taken(
    zoo: MakeZoo, buffers: BlockBuffers, tmp_path: Path
) -> None:
    source = zoo("llama").copy(tmp_path / "zoo")
    wanted = _of(source, ("model.norm.weight",))
    stored_at(source.base, source.base)
    for path in source.base.glob("*.safetensors"):
        path.write_bytes(path.read_bytes() + b"\0")
    buffers.begin(wanted)
    with pytest.raises(InputError, match="changed since its header was read"):
        buffers.take(wanted)
    forget_checkpoints()
