"""Markers, and the law by which a resumed run chooses its tasks."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esm_stream.completion import tasks_to_run
from esm_stream.errors import DataError
from esm_stream.store.files import sealed
from esm_stream.store.work import Marker, Output, WorkDirectory, file_name

KEYS = [
    "inputs/a",
    "forward/a/0001",
    "merge/model.layers.0.self_attn.{q_proj,k_proj,v_proj}.weight",
    "scale/model.layers.*.mlp.up_proj.weight@40x16",
    "write/model-00001-of-00002.safetensors/0000",
    "seal/model-00001-of-00002.safetensors",
    "finish",
]


@pytest.fixture
def directory(tmp_path: Path) -> WorkDirectory:
    found = WorkDirectory(tmp_path / "work", tmp_path / "out")
    found.root.mkdir()
    found.output.mkdir()
    return found


@pytest.mark.parametrize("key", KEYS)
def test_a_marker_reads_back_as_it_was_written(key: str, directory: WorkDirectory) -> None:
    outputs = (Output("work", "x/y.bin", 3, "ab"), Output("output", "z", 0, transient=True))
    directory.finish(key, "f" * 64, outputs, {"norm": 1.5, "scales": {"a": 2.0}}, 0.25)
    assert directory.read(key) == Marker(
        key, "f" * 64, outputs, {"norm": 1.5, "scales": {"a": 2.0}}, 0.25
    )
    assert directory.results(key)["norm"] == 1.5
    directory.forget([key])
    assert directory.read(key) is None
    directory.forget([key])


@pytest.mark.parametrize(
    "keys",
    [
        ("inputs/math.v1", "inputs/math.v2"),
        ("scale/layers.*.up.weight@40x16", "scale/layers.*.up.weight@16x40"),
        ("merge/visual.proj", "merge/visual.positional_embedding"),
    ],
)
def test_different_tasks_have_different_markers(
    keys: tuple[str, str], directory: WorkDirectory
) -> None:
    assert directory.marker(keys[0]) != directory.marker(keys[1])


def test_markers_lie_inside_the_work_directory(directory: WorkDirectory) -> None:
    for key in (*KEYS, "merge/a%2Fb", "merge/a b"):
        assert directory.marker(key).is_relative_to(directory.root / "done")


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30))
def test_a_name_is_one_path_component(name: str) -> None:
    assert "/" not in file_name(name)
    assert file_name(name) not in (".", "..")


def test_names_of_any_length_give_files_of_their_own() -> None:
    names = ["x" * 159, "x" * 160, *(f"{'x' * 200}{i}" for i in range(3)), "é" * 300, "..", "."]
    found = [file_name(name) for name in names]
    assert len(set(found)) == len(names)
    assert all(len(f"{name}.safetensors") < 255 for name in found)
    assert {"..", "."}.isdisjoint(found)


def reseal(document: dict[str, object]) -> str:
    """A marker of other contents, with the hash that belongs to them."""
    document.pop("xxh3_128")
    return sealed(json.dumps(document).encode()).decode()


def output(path: str) -> dict[str, object]:
    return {"root": "work", "path": path, "size": 1, "xxh3_128": "", "transient": False}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: "",
        lambda text: text[: len(text) // 2],
        lambda _: "[]",
        lambda _: "null",
        lambda _: '"text"',
        lambda text: reseal({**json.loads(text), "schema": 999}),
        lambda text: reseal({k: v for k, v in json.loads(text).items() if k != "outputs"}),
        lambda text: reseal({**json.loads(text), "outputs": [{"no": "output"}]}),
        lambda text: reseal({**json.loads(text), "outputs": [output("/etc/passwd")]}),
        lambda text: reseal({**json.loads(text), "outputs": [output("a/../../b")]}),
        lambda text: reseal({**json.loads(text), "outputs": [{**output("a"), "root": "home"}]}),
        lambda text: reseal({**json.loads(text), "surplus": 1}),
        lambda text: text.replace('"seconds": 0.0', '"seconds": 0.1'),
        lambda _: sealed(b'{"a":' + b"[" * 100_000).decode(),
        lambda _: "\xff",
    ],
)
def test_what_is_no_marker_reads_as_none(
    spoil: Callable[[str], str], directory: WorkDirectory
) -> None:
    directory.finish("finish", "f", [], {}, 0.0)
    path = directory.marker("finish")
    path.write_text(spoil(path.read_text()), encoding="latin-1")
    assert directory.read("finish") is None
    with pytest.raises(FileNotFoundError, match="finish"):
        directory.results("finish")


def test_any_flipped_bit_of_a_marker_is_found(directory: WorkDirectory) -> None:
    directory.finish("finish", "f", [Output("work", "x", 3, "ab")], {"norm": 1.5}, 0.25)
    path = directory.marker("finish")
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in range(8):
            flipped = bytes([content[place] ^ (1 << bit)])
            path.write_bytes(content[:place] + flipped + content[place + 1 :])
            assert directory.read("finish") is None
    path.write_bytes(content)
    assert directory.results("finish") == {"norm": 1.5}


def test_a_resealed_marker_is_read(directory: WorkDirectory) -> None:
    directory.finish("finish", "f", [], {}, 0.0)
    path = directory.marker("finish")
    path.write_text(reseal({**json.loads(path.read_text()), "outputs": [output("a/b")]}))
    assert directory.read("finish") is not None


def test_a_file_is_whole_only_as_its_task_left_it(directory: WorkDirectory) -> None:
    path = directory.root / "hidden/e/0001.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"1234")
    directory.finish("forward/e/0000", "f", [directory.record(path, transient=True)], {}, 0.0)
    assert directory.require_whole("forward/e/0000", path) == path
    for content, says in ((b"1235", "other bytes"), (b"123", "3 bytes, 4 were"), (None, "missing")):
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        with pytest.raises(DataError, match=f"0001.safetensors: .*{says}"):
            directory.require_whole("forward/e/0000", path)
    with pytest.raises(DataError, match="no marker"):
        directory.require_whole("forward/e/0001", path)


def test_outputs_exist_only_with_their_size(directory: WorkDirectory) -> None:
    (directory.root / "kept").write_bytes(b"1234")
    (directory.output / "passing").write_bytes(b"12")
    outputs = [
        directory.record(directory.root / "kept"),
        directory.record(directory.output / "passing", transient=True),
    ]
    assert [(o.root, o.size, o.transient) for o in outputs] == [
        ("work", 4, False),
        ("output", 2, True),
    ]
    marker = Marker("k", "f", tuple(outputs), {}, 0.0)
    assert directory.all_exist(marker.products)
    assert directory.all_exist(marker.transient)
    (directory.output / "passing").unlink()
    assert directory.all_exist(marker.products)
    assert not directory.all_exist(marker.transient)
    (directory.root / "kept").write_bytes(b"123")
    assert not directory.all_exist(marker.products)


def test_a_sweep_removes_unfinished_files_of_the_work_directory_only(
    directory: WorkDirectory,
) -> None:
    names = ("done/b/x.tmp", "factors.zarr/y.partial", "done/z.json", "mine/x.tmp", "mine.partial")
    for name in names:
        (directory.root / name).parent.mkdir(parents=True, exist_ok=True)
        (directory.root / name).write_bytes(b"")
    (directory.output / "shard.partial").write_bytes(b"")
    directory.sweep()
    left = {p.relative_to(directory.root).as_posix() for p in directory.root.rglob("*")}
    assert left >= {"done/z.json", "mine/x.tmp", "mine.partial"}
    assert not left & {"done/b/x.tmp", "factors.zarr/y.partial"}
    assert (directory.output / "shard.partial").exists()


@st.composite
def situations(
    draw: st.DrawFn,
) -> tuple[list[str], dict[str, list[str]], dict[str, list[str]], set[str], set[str]]:
    """A graph in order, its readers, which tasks are valid, which have their transients."""
    count = draw(st.integers(1, 9))
    order = [str(i) for i in range(count)]
    after = {
        key: draw(st.lists(st.sampled_from(order[:i]), unique=True)) if i else []
        for i, key in enumerate(order)
    }
    readers = {key: [k for k in order if key in after[k]] for key in order}
    valid = set(draw(st.lists(st.sampled_from(order), unique=True)))
    present = set(draw(st.lists(st.sampled_from(order), unique=True)))
    return order, after, readers, valid, present


@given(situations())
def test_nothing_needed_is_skipped_and_nothing_complete_is_run(
    situation: tuple[list[str], dict[str, list[str]], dict[str, list[str]], set[str], set[str]],
) -> None:
    order, after, readers, valid, present = situation
    chosen = tasks_to_run(order, valid.__contains__, [(readers, present.__contains__)])
    # Needed: whatever is not valid runs, and finds the outputs of all it depends on.
    assert {key for key in order if key not in valid} <= chosen
    for key in chosen:
        for parent in after[key]:
            assert parent in chosen or parent in present
    # Complete: a valid task runs only if it must give a chosen reader what is gone.
    for key in chosen & valid:
        assert key not in present
        assert any(reader in chosen for reader in readers[key])


def test_a_finished_graph_runs_nothing_though_its_transients_are_gone() -> None:
    order = ["stem", "forward", "merge"]
    readers = {"stem": ["forward"], "forward": ["merge"]}
    assert tasks_to_run(order, lambda _: True, [(readers, lambda _: False)]) == set()
