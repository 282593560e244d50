"""Calibration data become micro-batches: drawn, cut, never padded; mistakes are named."""

import json
from pathlib import Path

import hub
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from esm_stream.calibration.proxies import micro_batches, read_proxies, size_of
from esm_stream.calibration.sources import draw, kind_of_source
from esm_stream.calibration.steps import MICRO_BATCH_TOKENS
from esm_stream.errors import InputError
from esm_stream.manifest import Calibration


@given(available=st.integers(1, 200), wanted=st.integers(1, 60), seed=st.integers(0, 99))
def test_samples_are_drawn_without_repetition_and_the_same_each_time(
    available: int, wanted: int, seed: int
) -> None:
    drawn = draw(available, wanted, seed)
    assert drawn == draw(available, wanted, seed)
    assert len(drawn) == len(set(drawn)) == min(available, wanted)
    assert all(0 <= i < available for i in drawn)
    if available <= wanted:
        assert drawn == list(range(available))


def test_samples_are_the_papers_draw() -> None:
    assert draw(100, 5, 7) == np.random.RandomState(7).choice(100, 5, replace=False).tolist()
    assert draw(100, 5, 7) != draw(100, 5, 8)


@given(lengths=st.lists(st.integers(1, 700), min_size=1, max_size=30))
def test_micro_batches_hold_every_sample_once_unpadded_and_within_the_limit(
    lengths: list[int],
) -> None:
    samples = [{"input_ids": torch.full((1, n), i)} for i, n in enumerate(lengths)]
    batches = micro_batches(samples, 1)
    seen = [row for batch in batches for row in batch["input_ids"]]
    assert sorted(int(row[0]) for row in seen) == list(range(len(lengths)))
    assert all(len(row) == lengths[int(row[0])] for row in seen)
    for batch in batches:
        count, length = batch["input_ids"].shape
        assert count == 1 or count * length <= MICRO_BATCH_TOKENS
    numbers = [int(row[0]) for row in seen]
    for length in set(lengths):
        alike = [i for i in numbers if lengths[i] == length]
        assert alike == sorted(alike)  # stable


def test_samples_with_other_names_or_shapes_are_never_in_one_batch() -> None:
    pixels, ids = torch.zeros(1, 3, 8, 8), torch.zeros(1, 4).long()
    batches = micro_batches(
        [{"pixel_values": pixels}, {"input_ids": ids}, {"pixel_values": torch.zeros(1, 3, 8, 16)}],
        4,
    )
    assert len(batches) == 3


@pytest.mark.parametrize(("tokens", "sizes"), [(1, [5]), (500, [2, 2, 1]), (5000, [1] * 5)])
def test_pictures_share_a_batch_as_far_as_their_tokens_allow(tokens: int, sizes: list[int]) -> None:
    batches = micro_batches([{"pixel_values": torch.zeros(1, 3, 8, 8)}] * 5, tokens)
    assert [len(batch["pixel_values"]) for batch in batches] == sizes


def test_larger_sounds_than_the_example_run_with_fewer_others() -> None:
    """An example of 100 elements makes 200 positions: those of 500 make 1000."""
    small, large = {"input_values": torch.zeros(1, 100)}, {"input_values": torch.zeros(1, 500)}
    assert size_of(large, 200, 100) == 1000
    assert size_of({**large, "input_ids": torch.zeros(1, 3000).long()}, 200, 100) == 3000
    batches = micro_batches([small] * 4 + [large] * 4, 200, 1024, 100)
    assert [len(batch["input_values"]) for batch in batches] == [4, 1, 1, 1, 1]


def test_ready_made_inputs_lose_their_padding_and_their_mask(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    ids = torch.arange(12).view(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]])
    types = ids + 100
    save_file({"input_ids": ids, "attention_mask": mask, "token_type_ids": types}, path)
    model = hub.config(
        tmp_path / "model", "BertConfig", "BertModel", vocab_size=hub.WORDS, **hub.HEADS
    )
    found = read_proxies(path, Calibration(min_samples=3), model, 1)
    assert (found.samples, found.available, found.truncated) == ([0, 1, 2], 3, [])
    assert found.tokens == [4, 2, 2]
    rows = {tuple(row.tolist()) for batch in found.batches for row in batch["input_ids"]}
    assert rows == {(0, 1, 2, 3), (4, 5), (10, 11)}
    for batch in found.batches:
        assert set(batch) == {"input_ids", "token_type_ids"}
        assert torch.equal(batch["token_type_ids"], batch["input_ids"] + 100)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", "text"),
        ("a.txt", "text"),
        ("a.npz", "arrays"),
        ("a.safetensors", "inputs"),
    ],
)
def test_the_ending_says_what_a_file_holds(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    assert kind_of_source(tmp_path / name) == kind
    assert kind_of_source(tmp_path) == "images"


def refusal(path: Path, **settings: str) -> str:
    model = hub.llama(path.parent / "model")
    with pytest.raises(InputError) as error:
        read_proxies(path, Calibration.model_validate({"min_samples": 1, **settings}), model, 1)
    assert path.name in str(error.value)
    return str(error.value)


def test_sources_that_hold_nothing_usable_are_refused(tmp_path: Path) -> None:
    assert "no such calibration" in refusal(tmp_path / "none.jsonl")
    (tmp_path / "x.csv").touch()
    assert "unknown kind" in refusal(tmp_path / "x.csv")
    (tmp_path / "e.jsonl").write_text("\n")
    assert "no samples" in refusal(tmp_path / "e.jsonl")
    (tmp_path / "folder").mkdir()
    assert "no samples" in refusal(tmp_path / "folder")
    (tmp_path / "b.npz").write_bytes(b"PK no")
    assert "not a readable .npz" in refusal(tmp_path / "b.npz")
    (tmp_path / "b.safetensors").write_bytes(b"no")
    assert "not a readable safetensors" in refusal(tmp_path / "b.safetensors")


def test_texts_that_are_no_json_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\nnot json\n\n" + json.dumps(["a"]) + "\n")
    message = refusal(path)
    assert "t.jsonl:2: not JSON" in message
    assert "t.jsonl:4: no text under 'text'" in message
    assert "(found: list)" in message


def test_arrays_are_found_by_their_key_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    images = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(path, first=images, second=images)
    assert "no array 'images' (found: first, second)" in refusal(path)
    np.savez(path, only=np.zeros((2, 4)))
    assert "has shape (2, 4)" in refusal(path)


def test_inputs_must_agree_on_the_number_of_samples(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(3, 3)}, path)
    assert "first dimension" in refusal(path)
    save_file({"input_ids": torch.zeros(1, 2).long(), "attention_mask": torch.zeros(1, 2)}, path)
    assert "masks all" in refusal(path)


@pytest.mark.parametrize("name", ["x.jsonl", "x.npz"])
def test_a_model_without_tokenizer_or_processor_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith("npz"):
        np.savez(path, images=np.zeros((1, 4, 4, 3), np.uint8))
    else:
        path.write_text('{"text": "a"}\n')
    model = hub.llama(tmp_path / "model")
    with pytest.raises(InputError, match=r"no .* can be loaded for the") as error:
        read_proxies(path, Calibration(min_samples=1), model, 1)
    assert str(model) in str(error.value)
