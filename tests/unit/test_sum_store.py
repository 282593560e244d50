"""Sums on disk: bytes that depend on their members alone, files that tell when they are damaged."""

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from esm_stream.errors import DataError
from esm_stream.methods.contract import Place
from esm_stream.store.sums import SumStore

PLACES = (Place("K", 0, 4, 4), Place("K", 4, 6, 6), Place("N", 0, 3, 6))
NAMES = [f"expert {i}" for i in range(6)]


def term(name: str) -> list[Tensor]:
    """One expert's panels; experts differ by some orders of magnitude, one has no update."""
    if name == NAMES[2]:
        return []
    seed = NAMES.index(name)
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(p.stop - p.start, p.columns, generator=generator, dtype=torch.float64)
        * 10.0 ** (seed % 4)
        for p in PLACES
    ]


def add(store: SumStore, name: str, wanted: list[str] = NAMES) -> None:
    store.add("w", PLACES, name, {"expert": name}, term(name), wanted)


def filled(root: Path, names: list[str]) -> Path:
    """The file of the sum over some experts, added in this order."""
    store = SumStore(root)
    for name in names:
        add(store, name)
    assert store.whole("w", names) is not None
    (path,) = root.rglob("*.sums")
    return path


def read_all(store: SumStore) -> list[Tensor]:
    """All panels of the sum over all experts."""
    sums = store.whole("w", NAMES)
    assert sums is not None
    return [sums(place) for place in PLACES]


def test_order_moves_no_byte(tmp_path: Path) -> None:
    wanted = filled(tmp_path / "0", NAMES).read_bytes()
    for turn in range(1, 5):
        names = random.Random(turn).sample(NAMES, len(NAMES))
        assert filled(tmp_path / str(turn), names).read_bytes() == wanted


def test_partition_moves_no_byte(tmp_path: Path) -> None:
    """Workers that add at the same time fill files of their own, which are then added up."""
    store = SumStore(tmp_path / "many")
    inside = threading.Barrier(3)

    def slowly(name: str) -> Iterator[Tensor]:
        inside.wait(timeout=30)
        yield from term(name)

    for group in (NAMES[:3], NAMES[3:]):
        workers = [
            threading.Thread(
                target=store.add, args=("w", PLACES, name, {"expert": name}, slowly(name), NAMES)
            )
            for name in group
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert len(list(tmp_path.rglob("*.sums"))) == 3
    assert set(store.members("w", NAMES)) == set(NAMES)
    store.whole("w", NAMES)
    (found,) = (tmp_path / "many").rglob("*.sums")
    assert found.read_bytes() == filled(tmp_path / "one", NAMES).read_bytes()


def test_an_expert_that_is_taken_out_leaves_no_byte(tmp_path: Path) -> None:
    path = filled(tmp_path / "a", NAMES)
    for name in (NAMES[0], NAMES[2], NAMES[3]):
        assert SumStore(tmp_path / "a").remove("w", name, term(name))
    rest = [NAMES[1], NAMES[4], NAMES[5]]
    assert path.read_bytes() == filled(tmp_path / "b", rest).read_bytes()


def test_another_term_is_not_taken_out(tmp_path: Path) -> None:
    path = filled(tmp_path, NAMES)
    before = path.read_bytes()
    assert not SumStore(tmp_path).remove("w", NAMES[0], [8 * t for t in term(NAMES[0])])
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.glob("*.tmp")] == []


def test_values_are_those_of_the_sum(tmp_path: Path) -> None:
    filled(tmp_path, NAMES)
    sums = SumStore(tmp_path).whole("w", NAMES)
    assert sums is not None
    for number, place in enumerate(PLACES):
        wanted = sum(t[number] for t in map(term, NAMES) if t)
        torch.testing.assert_close(sums(place), wanted, rtol=1e-13, atol=0)


def test_a_term_is_added_once(tmp_path: Path) -> None:
    path = filled(tmp_path, NAMES)
    before = path.read_bytes()
    add(SumStore(tmp_path), NAMES[1])
    assert path.read_bytes() == before


def test_sums_with_an_expert_that_is_not_wanted_count_as_absent(tmp_path: Path) -> None:
    filled(tmp_path / "a", NAMES)
    store = SumStore(tmp_path / "a")
    assert store.members("w", NAMES[:5]) == {}
    for name in NAMES[:5]:
        add(store, name, NAMES[:5])
    store.whole("w", NAMES[:5])
    (found,) = (tmp_path / "a").rglob("*.sums")
    assert found.read_bytes() == filled(tmp_path / "b", NAMES[:5]).read_bytes()


def test_missing_experts_are_reported(tmp_path: Path) -> None:
    filled(tmp_path, NAMES[:4])
    with pytest.raises(DataError, match="2 of 6 experts are missing"):
        SumStore(tmp_path).whole("w", NAMES)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9, 0.99])
def test_a_flipped_bit_is_found(tmp_path: Path, place: float) -> None:
    path = filled(tmp_path, NAMES)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"0\.sums: damaged"):
        read_all(SumStore(tmp_path))


def test_a_partial_that_was_added_up_counts_once(tmp_path: Path) -> None:
    """Killed between the sum over all partials and the removal of the partials."""
    path = filled(tmp_path / "a", NAMES)
    wanted = path.read_bytes()
    stray = filled(tmp_path / "b", NAMES[1:3])
    path.with_name("1.sums").write_bytes(stray.read_bytes())
    SumStore(tmp_path / "a").whole("w", NAMES)
    (found,) = (tmp_path / "a").rglob("*.sums")
    assert found.read_bytes() == wanted
