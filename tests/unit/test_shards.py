"""Output shards: the bytes transformers would write, in any order, or nothing."""

import errno
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Generator, Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch
import xxhash
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from esm_stream.checkpoints.checkpoint import INDEX_NAME, Checkpoint, open_checkpoint
from esm_stream.checkpoints.header import DTYPES, read_header
from esm_stream.checkpoints.layout import ShardLayout, TensorSpec, lay_out
from esm_stream.checkpoints.reader import TensorReader
from esm_stream.errors import BudgetError, TaskError
from esm_stream.store.files import write_atomically
from esm_stream.write import shards
from esm_stream.write.shards import (
    ShardWriter,
    hash_tensor,
    plan_shards,
    reserve,
    seal,
    write_index,
)

ODD_NAMES = [
    'quote"',
    "back\\slash",
    "line\nfeed",
    "tab\t",
    "bell\x07",
    "del\x7f",
    "é",
    "\u2028",
    "😀",
]


def mixed_tensors() -> dict[str, Tensor]:
    """Every type torch can hold, sizes that end at odd bytes, names that need escapes."""
    values = {
        f"type.{number}": torch.arange(3, dtype=torch.uint8)
        .repeat(8)
        .view(getattr(torch, name))[:3]
        for number, name in enumerate(d.torch_name for d in DTYPES.values() if d.torch_name)
        if name != "bool"
    }
    values["bool"] = torch.tensor([True, False, True])
    values["f8"] = torch.arange(5, dtype=torch.uint8).view(torch.float8_e5m2)
    values |= {name: torch.randn(2, 2) for name in ODD_NAMES}
    return values | {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4)}


def tiny_llama(directory: Path, shard_size: str) -> Checkpoint:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size=shard_size)
    return open_checkpoint(directory)


def save_single(root: Path, tensors: Mapping[str, Tensor]) -> Checkpoint:
    root.mkdir()
    safetensors.torch.save_file(dict(tensors), root / "model.safetensors", {"format": "pt"})
    return open_checkpoint(root)


def load_all(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    return found


def write_all(
    directory: Path, layouts: tuple[ShardLayout, ...], tensors: dict[str, Tensor]
) -> None:
    directory.mkdir(exist_ok=True)
    for layout in layouts:
        reserve(directory, layout)
        with ShardWriter(directory, layout) as writer:
            for name, info in layout.tensors.items():
                if info.kind.torch_name is None:
                    writer.write_bytes(name, 0, tensors[name].view(torch.uint8))
                else:
                    dtype = getattr(torch, info.kind.torch_name)
                    writer.write_rows(name, 0, tensors[name].to(dtype))
            writer.sync()
        seal(directory, layout)
    write_index(directory, layouts)


def small_layout() -> ShardLayout:
    specs = [TensorSpec("w", "F32", (4, 2), 32), TensorSpec("s", "BF16", (), 2)]
    return lay_out("model.safetensors", specs)


def test_a_model_in_shards_is_written_byte_for_byte_as_transformers_does(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", "4KB")
    assert len(base.headers) == 5
    write_all(tmp_path / "out", plan_shards(base, "base", "base"), load_all(base.root))
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == sorted([INDEX_NAME, *(header.path.name for header in base.headers)])
    for name in written:
        assert (tmp_path / "out" / name).read_bytes() == (base.root / name).read_bytes(), name


def test_every_type_and_name_is_written_byte_for_byte_as_save_file_does(tmp_path: Path) -> None:
    tensors = mixed_tensors()
    base = save_single(tmp_path / "base", tensors)
    expected = (tmp_path / "base" / "model.safetensors").read_bytes()
    for size in ("base", 10**9):
        out = tmp_path / f"out-{size}"
        write_all(out, plan_shards(base, "base", size), tensors)  # type: ignore[arg-type]
        assert [path.name for path in out.iterdir()] == ["model.safetensors"]
        assert (out / "model.safetensors").read_bytes() == expected


def test_write_order_of_types_is_the_one_of_the_format(tmp_path: Path) -> None:
    # Names in the opposite order, so that only the types can explain the result.
    names = [dtype.torch_name for dtype in DTYPES.values() if dtype.torch_name]
    tensors = {f"{i:02}": torch.zeros(2, dtype=getattr(torch, n)) for i, n in enumerate(names)}
    base = save_single(tmp_path / "base", tensors)
    (layout,) = plan_shards(base, "base", 10**9)
    assert list(layout.tensors) == list(base.tensors) == sorted(tensors, reverse=True)


def test_only_float_tensors_are_converted(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, dtype=torch.float64),
        "b": torch.randn(3).bfloat16(),
        "ids": torch.arange(3),
        "f8": torch.arange(3, dtype=torch.uint8).view(torch.float8_e5m2),
    }
    base = save_single(tmp_path / "base", tensors)
    for dtype, code in [("float32", "F32"), ("bfloat16", "BF16"), ("float16", "F16")]:
        (layout,) = plan_shards(base, dtype, "base")  # type: ignore[arg-type]
        found = {name: info.dtype for name, info in layout.tensors.items()}
        assert found == {"a": code, "b": code, "ids": "I64", "f8": "F8_E5M2"}
        write_all(tmp_path / dtype, (layout,), tensors)
        kept = {"ids", "f8"}
        cast = {n: t if n in kept else t.to(getattr(torch, dtype)) for n, t in tensors.items()}
        expected = safetensors.torch.save(cast, {"format": "pt"})
        assert (tmp_path / dtype / "model.safetensors").read_bytes() == expected


def test_base_files_keep_their_names_order_and_metadata(tmp_path: Path) -> None:
    specs = [TensorSpec("z", "U8", (3,), 3), TensorSpec("a", "F32", (2,), 8)]
    odd = lay_out("weights.safetensors", specs, {"zeta": "1", "format": "pt", "alpha": "2"})
    odd_bytes = odd.header + bytes(11)
    (tmp_path / odd.file_name).write_bytes(odd_bytes)
    index = {"weight_map": dict.fromkeys(("z", "a"), odd.file_name)}
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    (layout,) = plan_shards(open_checkpoint(tmp_path), "base", "base")
    assert layout == odd
    assert list(layout.metadata) == ["zeta", "format", "alpha"]
    # Converted, they are laid out anew: "a" would otherwise start at an odd byte for ever.
    (layout,) = plan_shards(open_checkpoint(tmp_path), "bfloat16", "base")
    assert list(layout.tensors) == ["a", "z"]


def test_files_without_metadata_get_the_one_transformers_asks_for(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    (layout,) = plan_shards(open_checkpoint(tmp_path), "base", "base")
    assert layout.metadata == {"format": "pt"}


@pytest.mark.parametrize("size", [1, 1000, 2000, 2048, 4000, 10_000, 10**9])
def test_a_shard_size_splits_as_transformers_does(tmp_path: Path, size: int) -> None:
    base = tiny_llama(tmp_path / "base", "1GB")
    tensors = load_all(base.root)
    in_stored_order = {name: tensors[name] for name in base.tensors}
    expected = split_torch_state_dict_into_shards(in_stored_order, max_shard_size=size)
    layouts = plan_shards(base, "base", size)
    found = {layout.file_name: set(layout.tensors) for layout in layouts}
    assert found == {file: set(names) for file, names in expected.filename_to_tensors.items()}
    assert layouts[0].file_name == (
        "model.safetensors"
        if len(layouts) == 1
        else f"model-00001-of-{len(layouts):05d}.safetensors"
    )


def test_a_resharded_model_loads_with_transformers(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", "1GB")
    layouts = plan_shards(base, "float32", 10_000)
    assert len(layouts) > 1
    write_all(tmp_path / "out", layouts, load_all(base.root))
    shutil.copy(base.root / "config.json", tmp_path / "out")
    assert list(open_checkpoint(tmp_path / "out").tensors)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    for name, tensor in load_all(base.root).items():
        assert torch.equal(loaded[name], tensor.float())


def test_a_layout_is_read_back_as_it_was_planned(tmp_path: Path) -> None:
    layout = small_layout()
    header = read_header(reserve(tmp_path, layout))
    assert header.tensors == layout.tensors
    assert header.file_size == layout.file_size
    assert header.data_start == len(layout.header)
    assert len(layout.header) % 8 == 0


@pytest.mark.parametrize("seed", range(5))
def test_panels_in_any_order_give_the_same_bytes(tmp_path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {"w": torch.randn(37, 5), "v": torch.randn(11).bfloat16(), "s": torch.tensor(2.0)}
    base = save_single(tmp_path / "base", tensors)
    (layout,) = plan_shards(base, "base", "base")
    cuts = {
        name: sorted(
            {0, info.num_rows, *torch.randint(info.num_rows, (4,), generator=generator).tolist()}
        )
        for name, info in layout.tensors.items()
    }
    panels = [(name, *pair) for name, rows in cuts.items() for pair in pairwise(rows)]
    reserve(tmp_path, layout)
    with ShardWriter(tmp_path, layout) as first, ShardWriter(tmp_path, layout) as second:
        for place in torch.randperm(len(panels), generator=generator).tolist():
            name, start, stop = panels[place]
            writer = first if place % 2 else second
            rows = tensors[name].reshape(-1, *tensors[name].shape[1:])[start:stop]
            writer.write_rows(name, start, rows)
    seal(tmp_path, layout)
    written = (tmp_path / "model.safetensors").read_bytes()
    assert written == (base.root / "model.safetensors").read_bytes()


def test_reader_panels_are_written_without_conversion(tmp_path: Path) -> None:
    base = save_single(tmp_path / "base", mixed_tensors())
    (layout,) = plan_shards(base, "base", "base")
    reserve(tmp_path, layout)
    with TensorReader(base) as reader, ShardWriter(tmp_path, layout) as writer:
        for name in layout.tensors:
            writer.write_bytes(name, 0, reader.raw_bytes(name))
    seal(tmp_path, layout)
    written = (tmp_path / "model.safetensors").read_bytes()
    assert written == (base.root / "model.safetensors").read_bytes()


BAD_PANELS: dict[str, tuple[str, int, Tensor, str]] = {
    "type": ("w", 0, torch.zeros(4, 2).half(), "w: panel is torch.float16, the shard has F32"),
    "columns": ("w", 0, torch.zeros(2, 3), r"w: panel has shape \(2, 3\), of \(4, 2\)"),
    "dimensions": ("w", 0, torch.zeros(8), r"w: panel has shape \(8,\), of \(4, 2\)"),
    "scalar": ("w", 0, torch.zeros(()), r"w: panel has shape \(\), of \(4, 2\)"),
    "past the end": ("w", 3, torch.zeros(2, 2), r"w: rows 3..5 are outside 0..4"),
    "before the start": ("w", -1, torch.zeros(2, 2), r"w: rows -1..1 are outside 0..4"),
    "two scalars": ("s", 0, torch.zeros(2).bfloat16(), r"s: rows 0..2 are outside 0..1"),
    "strided": ("w", 0, torch.zeros(2, 4).T, "w: want a contiguous CPU tensor"),
    "meta": ("w", 0, torch.zeros(4, 2, device="meta"), "w: want a contiguous CPU tensor, got meta"),
}


@pytest.mark.parametrize("flaw", BAD_PANELS)
def test_a_panel_that_does_not_fit_is_refused_and_not_written(tmp_path: Path, flaw: str) -> None:
    name, first_row, rows, message = BAD_PANELS[flaw]
    layout = small_layout()
    before = reserve(tmp_path, layout).read_bytes()
    with ShardWriter(tmp_path, layout) as writer, pytest.raises(ValueError, match=message):
        writer.write_rows(name, first_row, rows)
    assert (tmp_path / "model.safetensors.partial").read_bytes() == before


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, torch.zeros(33, dtype=torch.uint8), r"w: bytes 0..33 are outside 0..32"),
        (-1, torch.zeros(2, dtype=torch.uint8), r"w: bytes -1..1 are outside 0..32"),
        (0, torch.zeros(8), "w: want a vector of uint8, got torch.float32 1-d"),
    ],
)
def test_bytes_that_do_not_fit_are_refused(
    tmp_path: Path, offset: int, data: Tensor, message: str
) -> None:
    layout = small_layout()
    reserve(tmp_path, layout)
    with ShardWriter(tmp_path, layout) as writer, pytest.raises(ValueError, match=message):
        writer.write_bytes("w", offset, data)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole_write(fd, data[:5], at))
    tensors = {"w": torch.randn(4, 2), "s": torch.tensor(1.0).bfloat16()}
    write_all(tmp_path / "out", (small_layout(),), tensors)
    assert torch.equal(load_all(tmp_path / "out")["w"], tensors["w"])


def test_a_reserved_shard_is_partial_has_its_disk_space_and_its_header(tmp_path: Path) -> None:
    layout = lay_out("model.safetensors", [TensorSpec("w", "F32", (2**18,), 2**20)])
    path = reserve(tmp_path, layout)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors.partial"]
    assert path.stat().st_blocks * 512 >= path.stat().st_size == layout.file_size
    assert path.read_bytes().startswith(layout.header)


def test_a_matching_reservation_is_kept_and_another_is_made_anew(tmp_path: Path) -> None:
    layout = small_layout()
    path = reserve(tmp_path, layout)
    with ShardWriter(tmp_path, layout) as writer:
        writer.write_rows("w", 0, torch.ones(4, 2))
    held = path.read_bytes()
    assert reserve(tmp_path, layout).read_bytes() == held
    same_size = lay_out("model.safetensors", [*layout.tensors.values()], {"format": "np"})
    assert same_size.file_size == layout.file_size
    assert reserve(tmp_path, same_size).read_bytes() == same_size.header + bytes(34)
    path.write_bytes(held[:-1])
    assert reserve(tmp_path, layout).read_bytes() == layout.header + bytes(34)


def test_a_sealed_shard_is_not_reserved_again(tmp_path: Path) -> None:
    layout = small_layout()
    reserve(tmp_path, layout)
    seal(tmp_path, layout)
    assert reserve(tmp_path, layout) == tmp_path / "model.safetensors"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_full_disk_is_a_budget_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int, _offset: int, _length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    layout = small_layout()
    free = rf"model.safetensors.partial: needs {layout.file_size} bytes of disk, \d+ bytes are free"
    with pytest.raises(BudgetError, match=free):
        reserve(tmp_path, layout)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_the_disk_are_not_called_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_descriptor: int, _offset: int, _length: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "posix_fallocate", broken)
    with pytest.raises(OSError, match="Input/output error"):
        reserve(tmp_path, small_layout())
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path]:
    """A file system of 1 MiB, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    command = [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_really_full_disk_is_a_budget_error_and_leaves_its_space_free(small_disk: Path) -> None:
    half = lay_out("half.safetensors", [TensorSpec("w", "F32", (2**17,), 2**19)])
    large = lay_out("large.safetensors", [TensorSpec("w", "F32", (2**18,), 2**20)])
    with pytest.raises(BudgetError, match=rf"needs {large.file_size} bytes of disk, 1048576 bytes"):
        reserve(small_disk, large)
    assert list(small_disk.iterdir()) == []
    assert reserve(small_disk, half).exists()


def test_seal_names_the_file_and_changes_no_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "HASH_BYTES", 16)
    layout = small_layout()
    tensors = {"w": torch.randn(4, 2), "s": torch.tensor(1.0).bfloat16()}
    reserve(tmp_path, layout)
    with ShardWriter(tmp_path, layout) as writer:
        for name, tensor in tensors.items():
            writer.write_rows(name, 0, tensor)
    assert seal(tmp_path, layout) == tmp_path / "model.safetensors"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]
    assert seal(tmp_path, layout) == tmp_path / "model.safetensors"
    for name, tensor in tensors.items():
        wanted = xxhash.xxh3_128_hexdigest(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        assert hash_tensor(tmp_path / "model.safetensors", layout, name) == wanted


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 3, 0, 1], [0, 1, 2], [0, 0, 1, 2, 3], []])
def test_a_writer_knows_the_hash_of_what_lies_in_the_file(order: list[int], tmp_path: Path) -> None:
    """Written in order, it is hashed on its way; otherwise, or not all of it, it is read back."""
    layout = lay_out(
        "x.safetensors", [TensorSpec("w", "F32", (4, 2), 32), TensorSpec("e", "F32", (0,), 0)]
    )
    reserve(tmp_path, layout)
    rows = torch.randn(4, 2)
    with ShardWriter(tmp_path, layout) as writer:
        for row in order:
            writer.write_rows("w", row, rows[row : row + 1])
        found = writer.hashes(["w", "e"])
    path = tmp_path / "x.safetensors.partial"
    assert found == {name: hash_tensor(path, layout, name) for name in ("w", "e")}
    content = path.read_bytes()[len(layout.header) :]
    assert found["w"] == xxhash.xxh3_128_hexdigest(content)


def test_seal_refuses_what_was_not_reserved(tmp_path: Path) -> None:
    layout = small_layout()
    with pytest.raises(TaskError, match="not the shard that was reserved"):
        seal(tmp_path, layout)
    with reserve(tmp_path, layout).open("ab") as file:
        file.write(b"x")
    with pytest.raises(TaskError, match=r"model.safetensors.partial: not the shard"):
        seal(tmp_path, layout)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors.partial"]


def test_files_have_the_rights_the_user_asks_for(tmp_path: Path) -> None:
    layout = small_layout()
    before = os.umask(0o027)
    try:
        reserve(tmp_path, layout)
        seal(tmp_path, layout)
        write_atomically(tmp_path / "file.json", b"{}")
    finally:
        os.umask(before)
    for name in ("model.safetensors", "file.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    write_index(tmp_path, [small_layout()])
    assert list(tmp_path.iterdir()) == []


def test_atomic_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "marker.json"
    for content in (b"first, longer", b"second"):
        write_atomically(path, content)
        assert path.read_bytes() == content
        assert list(tmp_path.iterdir()) == [path]


def test_a_failed_atomic_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "marker.json"
    write_atomically(path, b"old")

    def fail(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_flushes_the_content_before_the_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    path = tmp_path / "marker.json"

    def fsync(descriptor: int) -> None:
        kind = "directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "content"
        steps.append(f"{kind}, named: {path.exists()}, size: {os.fstat(descriptor).st_size == 3}")

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(path, b"new")
    assert steps[0] == "content, named: False, size: True"
    assert steps[1].startswith("directory, named: True")
    assert len(steps) == 2
