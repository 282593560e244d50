"""Reading tensors: right values, no copies, no memory, nothing stale."""

import gc
import json
import os
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from esm_stream.checkpoints import reader as reader_module
from esm_stream.checkpoints.checkpoint import Checkpoint, open_checkpoint
from esm_stream.checkpoints.reader import TensorReader, equal_bytes
from esm_stream.errors import InputError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
]
SPARSE_ROWS = 10 * 2**20
SPARSE_COLUMNS = 1024  # with F32: 40 GiB, more than this machine's memory


def save(root: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    root.mkdir()
    safetensors.torch.save_file(tensors, root / "model.safetensors")
    return open_checkpoint(root)


def save_unaligned(root: Path, values: Tensor, shift: int) -> Checkpoint:
    """One tensor of interest that starts `shift` bytes off an 8-byte boundary."""
    data = values.reshape(-1).view(torch.uint8).numpy().tobytes()
    code = {torch.float64: "F64", torch.bfloat16: "BF16", torch.int32: "I32"}[values.dtype]
    entries = {
        "pad": {"dtype": "U8", "shape": [shift], "data_offsets": [0, shift]},
        "w": {
            "dtype": code,
            "shape": list(values.shape),
            "data_offsets": [shift, shift + len(data)],
        },
    }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    root.mkdir()
    content = len(text).to_bytes(8, "little") + text + bytes(shift) + data
    (root / "model.safetensors").write_bytes(content)
    return open_checkpoint(root)


def random_tensor(dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    values = torch.randint(0, 2 if dtype is torch.bool else 100, shape, generator=generator)
    return values.to(dtype)


def anonymous_kib() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_type_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"w": random_tensor(dtype, 5, 3), "scalar": random_tensor(dtype)}
    tensors["empty"] = torch.empty(0, 3, dtype=dtype)
    with TensorReader(save(tmp_path / "model", tensors)) as reader:
        for name, expected in tensors.items():
            found = reader.tensor(name)
            assert found.dtype == dtype
            assert found.shape == expected.shape
            assert torch.equal(found, expected)


def test_rows_are_a_panel_of_the_tensor(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(6, 2, 3), "scalar": torch.tensor(4.5), "empty": torch.empty(4, 0)}
    with TensorReader(save(tmp_path / "model", tensors)) as reader:
        for start, stop in [(0, 6), (1, 3), (5, 6), (2, 2), (6, 6)]:
            assert torch.equal(reader.rows("w", start, stop), tensors["w"][start:stop])
        assert reader.rows("w", 2, 2).shape == (0, 2, 3)
        assert torch.equal(reader.rows("scalar", 0, 1), torch.tensor([4.5]))
        assert reader.rows("empty", 1, 3).shape == (2, 0)
        for start, stop in [(0, 7), (-1, 2), (3, 2)]:
            with pytest.raises(ValueError, match=r"w: rows .* are outside 0..6"):
                reader.rows("w", start, stop)


def test_whole_tensors_and_rows_share_the_pages_of_the_file(tmp_path: Path) -> None:
    model = save(tmp_path / "model", {"w": torch.randn(6, 4)})
    with TensorReader(model) as reader:
        whole = reader.tensor("w")
        assert reader.rows("w", 2, 4).data_ptr() == whole.data_ptr() + 2 * 16
        maps = Path("/proc/self/maps").read_text().splitlines()
        (line,) = [line for line in maps if line.endswith(str(model.headers[0].path))]
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        assert start <= whole.data_ptr() < end
        assert line.split()[1] == "r--s"


@pytest.mark.parametrize("shift", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32], ids=str)
def test_unaligned_tensors_come_back(tmp_path: Path, dtype: torch.dtype, shift: int) -> None:
    expected = random_tensor(dtype, 4, 3)
    with TensorReader(save_unaligned(tmp_path / "model", expected, shift)) as reader:
        assert torch.equal(reader.tensor("w"), expected)
        assert torch.equal(reader.rows("w", 1, 3), expected[1:3])


def test_raw_bytes_serve_every_type(tmp_path: Path) -> None:
    values = torch.arange(12, dtype=torch.uint8).view(torch.float8_e4m3fn).view(4, 3)
    with TensorReader(save(tmp_path / "model", {"f8": values})) as reader:
        assert torch.equal(reader.raw_bytes("f8"), torch.arange(12, dtype=torch.uint8))
        assert reader.raw_bytes("f8", 3, 5).tolist() == [3, 4]
        with pytest.raises(ValueError, match="f8: F8_E4M3 is copied, not computed with"):
            reader.tensor("f8")
        with pytest.raises(ValueError, match=r"f8: bytes 3..13 are outside 0..12"):
            reader.raw_bytes("f8", 3, 13)


def test_bytes_handed_out_are_counted(tmp_path: Path) -> None:
    with TensorReader(save(tmp_path / "model", {"w": torch.zeros(6, 4)})) as reader:
        assert reader.bytes_read == 0
        reader.tensor("w")
        assert reader.bytes_read == 96
        reader.rows("w", 1, 3)
        assert reader.bytes_read == 96 + 32
        reader.raw_bytes("w", 0, 10)
        assert reader.bytes_read == 96 + 32 + 10


def test_a_tensor_outlives_its_reader_and_the_map_goes_with_it(tmp_path: Path) -> None:
    model = save(tmp_path / "model", {"w": torch.arange(5000.0)})
    path = str(model.headers[0].path)
    reader = TensorReader(model)
    panel = reader.rows("w", 100, 200)
    reader.close()
    del reader
    gc.collect()
    assert torch.equal(panel, torch.arange(100.0, 200.0))
    assert path in Path("/proc/self/maps").read_text()
    del panel
    assert path not in Path("/proc/self/maps").read_text()


def test_close_and_the_end_of_the_block_release_the_map(tmp_path: Path) -> None:
    model = save(tmp_path / "model", {"w": torch.zeros(4)})
    path = str(model.headers[0].path)
    with TensorReader(model) as reader:
        reader.tensor("w")
        assert path in Path("/proc/self/maps").read_text()
    assert path not in Path("/proc/self/maps").read_text()


def test_drop_returns_the_pages_and_keeps_the_tensors(tmp_path: Path) -> None:
    values = torch.randn(2**22)  # 16 MiB
    model = save(tmp_path / "model", {"w": values})

    def resident_kib() -> int:
        text = Path("/proc/self/smaps").read_text()
        return int(text.split(str(model.headers[0].path))[1].split("Rss:")[1].split()[0])

    with TensorReader(model) as reader:
        mapped = reader.tensor("w")
        assert torch.equal(mapped, values)
        assert resident_kib() > 15 * 1024
        reader.drop()
        assert resident_kib() < 1024
        assert torch.equal(mapped, values)


def test_files_are_mapped_when_first_needed(tmp_path: Path) -> None:
    model = save(tmp_path / "model", {"w": torch.zeros(4)})
    model.headers[0].path.unlink()
    with (
        TensorReader(model) as reader,
        pytest.raises(InputError, match=r"model.safetensors: cannot be opened \(No such file"),
    ):
        reader.tensor("w")


@pytest.mark.parametrize("change", ["size", "mtime"])
def test_a_file_changed_since_its_header_was_read_is_refused(tmp_path: Path, change: str) -> None:
    model = save(tmp_path / "model", {"w": torch.zeros(4)})
    path = model.headers[0].path
    if change == "size":
        with path.open("ab") as file:
            file.write(b"x")
        os.utime(path, ns=(0, model.headers[0].mtime_ns))
    else:
        os.utime(path, ns=(0, 5))
    for read in (
        lambda reader: reader.tensor("w"),
        lambda reader: reader.fill("w", 0, memoryview(bytearray(4))),
    ):
        with TensorReader(model) as reader, pytest.raises(InputError) as caught:
            read(reader)
        assert caught.value.problems[0].startswith(f"{path}: changed since its header was read")


@pytest.mark.parametrize("dtype", DTYPES)
def test_fill_copies_bytes_of_a_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.arange(60).to(dtype)
    model = save(tmp_path / "model", {"before": torch.zeros(3), "w": values})
    size = dtype.itemsize
    into = bytearray(10 * size)
    with TensorReader(model) as reader:
        for start in (0, 25, 50):
            reader.fill("w", start * size, memoryview(into))
            assert bytes(into) == values[start : start + 10].view(torch.uint8).numpy().tobytes()
        assert reader.bytes_read == 30 * size


def test_fill_leaves_no_open_file(tmp_path: Path) -> None:
    model = save(tmp_path / "model", {"w": torch.zeros(4)})
    before = len(list(Path("/proc/self/fd").iterdir()))
    with TensorReader(model) as reader:
        reader.fill("w", 0, memoryview(bytearray(16)))
        assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_file_cut_while_it_is_read_is_refused(tmp_path: Path) -> None:
    model = save(tmp_path / "model", {"w": torch.zeros(4)})
    with TensorReader(model) as reader:
        reader.fill("w", 0, memoryview(bytearray(4)))
        os.truncate(model.headers[0].path, 8)
        with pytest.raises(InputError, match="became shorter while it was read"):
            reader.fill("w", 0, memoryview(bytearray(4)))


def test_rows_of_a_file_larger_than_memory_take_no_anonymous_memory(tmp_path: Path) -> None:
    end = SPARSE_ROWS * SPARSE_COLUMNS * 4
    entry = {"dtype": "F32", "shape": [SPARSE_ROWS, SPARSE_COLUMNS], "data_offsets": [0, end]}
    text = json.dumps({"w": entry}).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        file.seek(-4, os.SEEK_END)
        file.write(torch.tensor(2.5).numpy().tobytes())
    with TensorReader(open_checkpoint(tmp_path)) as reader:
        reader.rows("w", 0, 1).sum()
        before = anonymous_kib()
        for start in range(0, SPARSE_ROWS, SPARSE_ROWS // 16):
            # 4096 rows are 16 MiB; copies of all panels would be 256 MiB.
            assert reader.rows("w", start, start + 4096).count_nonzero() == 0
        assert reader.tensor("w")[-1, -1] == 2.5
        assert anonymous_kib() - before < 4 * 1024
    path.unlink()


def test_equal_bytes_compares_type_shape_and_content(tmp_path: Path) -> None:
    values = torch.randn(300, 40)
    changed = values.clone()
    changed[-1, -1] += 1
    nan = torch.full((3,), float("nan"))
    models = {
        "a": {"same": values, "last": values, "type": values, "shape": values, "nan": nan},
        "b": {
            "same": values,
            "last": changed,
            "type": values.view(torch.int32),
            "shape": values.view(40, 300),
            "nan": nan,
        },
    }
    readers = []
    for name, tensors in models.items():
        tensors["empty"] = torch.empty(0, 2)
        # Clones, since the format's own writer refuses tensors that share memory.
        apart = {key: tensor.clone() for key, tensor in tensors.items()}
        readers.append(TensorReader(save(tmp_path / name, apart)))
    found = {name: equal_bytes(*readers, name) for name in models["a"]}
    assert found == {
        "same": True,
        "last": False,
        "type": False,
        "shape": False,
        "nan": True,
        "empty": True,
    }


@pytest.mark.parametrize("place", [0, 63, 64, 100, 199])
def test_equal_bytes_sees_a_difference_in_every_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setattr(reader_module, "COMPARE_BYTES", 64)
    values = torch.zeros(200, dtype=torch.uint8)
    a = save(tmp_path / "a", {"w": values})
    values[place] = 1
    b = save(tmp_path / "b", {"w": values})
    with TensorReader(a) as one, TensorReader(b) as other:
        assert not equal_bytes(one, other, "w")
        assert equal_bytes(one, one, "w")


def test_readers_of_one_file_do_not_share_state(tmp_path: Path) -> None:
    model = save(tmp_path / "model", {"w": torch.ones(4)})
    first, second = TensorReader(model), TensorReader(model)
    tensor = second.tensor("w")
    gone = weakref.ref(first)
    first.tensor("w")
    first.close()
    del first
    assert gone() is None
    assert torch.equal(tensor, torch.ones(4))
    assert second.bytes_read == 16
