"""The store of factors: round trips, and damage that is found instead of read."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from esm_stream.errors import DataError
from esm_stream.methods.contract import Factors
from esm_stream.store.factors import FactorStore, _chunks

NAME = "model.layers.0.self_attn.{q_proj,k_proj}.weight"


def factors(rank: int, seed: int = 0, outputs: int = 6, inputs: int = 5) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(outputs, rank, generator=generator, dtype=torch.float64),
        torch.randn(rank, inputs, generator=generator, dtype=torch.float64),
        torch.rand(min(outputs, inputs), generator=generator, dtype=torch.float64),
        1.25,
    )


@pytest.fixture
def store(tmp_path: Path) -> FactorStore:
    found = FactorStore(tmp_path / "factors.zarr")
    found.create(NAME, experts=3, outputs=6, inputs=5, rank=4)
    found.create_update("w", (6, 5))
    return found


def whole(store: FactorStore, expert: int, rank: int) -> Factors:
    """Factors with the whole basis."""
    found = store.read_factors(NAME, expert, rank, 1.25)
    return replace(found, basis_OK=found.basis_OK[:])


def test_factors_read_back_as_float32_with_a_whole_float64_spectrum(store: FactorStore) -> None:
    for expert in range(3):
        store.write_factors(NAME, expert, factors(4, expert))
    for expert in range(3):
        written, found = factors(4, expert), whole(store, expert, 4)
        assert torch.equal(found.basis_OK, written.basis_OK.float())
        assert torch.equal(found.coordinates_KI, written.coordinates_KI.float())
        assert torch.equal(found.spectrum, written.spectrum)
        assert found.norm == 1.25


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_columns_past_an_experts_rank_are_zeros_on_disk_and_not_read(
    rank: int, store: FactorStore
) -> None:
    import zarr

    store.write_factors(NAME, 1, factors(rank))
    found = whole(store, 1, rank)
    assert found.basis_OK.shape == (6, rank)
    assert found.coordinates_KI.shape == (rank, 5)
    directory = next(p for p in store.root.iterdir() if "q_proj" in p.name)
    basis = zarr.open_array(directory / "basis", mode="r")
    assert not basis[1][:, rank:].any()
    assert basis[0].size == 24


def test_a_basis_is_read_by_rows_when_they_are_asked_for(tmp_path: Path) -> None:
    store = FactorStore(tmp_path / "factors.zarr")
    store.create("tall", experts=2, outputs=2500, inputs=3, rank=3)
    made = torch.randn(2500, 3)
    written = store.write_factors("tall", 1, Factors(made, torch.ones(3, 3), torch.ones(3), 1.0))
    found = store.read_factors("tall", 1, 2, 1.0).basis_OK
    assert found.shape == (2500, 2)
    assert torch.equal(found[1000:2400], made[1000:2400, :2])
    # Rows of other chunks are not looked at.
    written[0].unlink()
    assert torch.equal(found[2048:], made[2048:, :2])
    with pytest.raises(DataError, match="missing"):
        found[1000:1100]


def test_updates_read_back_by_rows(store: FactorStore) -> None:
    update = torch.arange(30.0).view(6, 5).double()
    written = store.write_update("w", update)
    assert all(path.is_file() for path in written)
    assert torch.equal(store.read_update("w", 2, 5), update[2:5].float())


def test_a_transposed_update_is_stored_as_it_reads(store: FactorStore) -> None:
    update = torch.arange(30.0).view(5, 6).T
    store.write_update("w", update)
    assert torch.equal(store.read_update("w", 0, 6), update)


@pytest.mark.parametrize("read", ["factors", "update"])
def test_what_was_never_written_is_missing_and_not_zero(read: str, store: FactorStore) -> None:
    reads = {
        "factors": lambda: whole(store, 2, 4),
        "update": lambda: store.read_update("w", 0, 1),
    }
    with pytest.raises(DataError, match="missing"):
        reads[read]()


def test_a_removed_chunk_is_an_error(store: FactorStore) -> None:
    written = store.write_factors(NAME, 0, factors(4))
    assert len(written) == 3
    for path in written:
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(DataError, match="missing"):
            whole(store, 0, 4)
        path.write_bytes(content)
    whole(store, 0, 4)


def read_all(store: FactorStore) -> None:
    whole(store, 0, 4)
    store.read_update("w", 0, 6)


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: flip(c, 0),
        lambda c: flip(c, len(c) // 2),
        lambda c: flip(c, len(c) - 1),
        lambda c: c[:-1],
        lambda c: c + b"\0",
        lambda _: b"",
    ],
    ids=["first", "middle", "checksum", "shorter", "longer", "empty"],
)
def test_a_damaged_chunk_is_an_error_and_never_other_numbers(
    spoil: Callable[[bytes], bytes], store: FactorStore
) -> None:
    written = [*store.write_factors(NAME, 0, factors(4))]
    written += store.write_update("w", torch.ones(6, 5))
    for path in written:
        content = path.read_bytes()
        path.write_bytes(spoil(content))
        with pytest.raises(DataError, match="cannot be read") as error:
            read_all(store)
        assert str(store.root) in str(error.value)
        path.write_bytes(content)


def test_a_flipped_bit_in_what_an_array_says_of_itself_changes_no_number(
    store: FactorStore,
) -> None:
    store.write_factors(NAME, 0, factors(4))
    store.write_update("w", torch.ones(6, 5))
    wanted = whole(store, 0, 4), store.read_update("w", 0, 6)
    for name in store.names():
        path = store.root / name / "zarr.json"
        content = path.read_bytes()
        found_damage = 0
        for place in range(0, len(content), 3):
            path.write_bytes(flip(content, place))
            damage = store.damage(name)
            found_damage += damage is not None
            try:
                found = whole(store, 0, 4), store.read_update("w", 0, 6)
            except DataError:
                continue
            assert torch.equal(found[0].basis_OK, wanted[0].basis_OK)
            assert torch.equal(found[0].coordinates_KI, wanted[0].coordinates_KI)
            assert torch.equal(found[0].spectrum, wanted[0].spectrum)
            assert torch.equal(found[1], wanted[1])
        assert found_damage > 20
        path.write_bytes(content)
        assert store.damage(name) is None


def test_laying_out_again_keeps_what_fits_and_replaces_what_does_not(store: FactorStore) -> None:
    store.write_factors(NAME, 0, factors(4))
    assert not store.create(NAME, experts=3, outputs=6, inputs=5, rank=4)
    assert whole(store, 0, 4).basis_OK.shape == (6, 4)
    assert store.create(NAME, experts=3, outputs=6, inputs=5, rank=2)
    with pytest.raises(DataError, match="missing"):
        whole(store, 0, 2)


def test_experts_never_share_a_file(store: FactorStore) -> None:
    files = [set(store.write_factors(NAME, expert, factors(4))) for expert in range(3)]
    assert not files[0] & files[1]
    assert not files[1] & files[2]
    assert all(path.is_file() for paths in files for path in paths)


@pytest.mark.parametrize(
    ("shape", "leading", "chunks"),
    [
        ((3, 10, 4), True, (1, 10, 4)),
        ((3, 1 << 20, 16), True, (1, 1 << 19, 16)),
        ((1 << 20, 64), False, (1 << 17, 64)),
        ((2, 1, 1 << 30), True, (1, 1, 1 << 30)),
        ((5,), False, (5,)),
    ],
)
def test_chunks_are_whole_rows_of_at_most_32_MiB(  # noqa: N802
    shape: tuple[int, ...], leading: bool, chunks: tuple[int, ...]
) -> None:
    assert _chunks(shape, 4, leading=leading) == chunks


def test_large_updates_in_several_chunks_are_all_listed(tmp_path: Path) -> None:
    store = FactorStore(tmp_path)
    update = torch.arange(9 << 20, dtype=torch.float32).view(-1, 1 << 10)
    store.create_update("big", tuple(update.shape))
    written = store.write_update("big", update)
    assert len(written) == 2
    assert all(path.is_file() for path in written)
    assert sum(path.stat().st_size for path in written) >= update.nbytes
    assert torch.equal(store.read_update("big", 8100, 8300), update[8100:8300])
