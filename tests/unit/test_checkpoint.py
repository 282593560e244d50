"""Checkpoints: what counts as one, mistakes of an index, and experts against their base."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from esm_stream.checkpoints.checkpoint import INDEX_NAME, Checkpoint, compare, open_checkpoint
from esm_stream.errors import InputError

Shards = Mapping[str, Mapping[str, Tensor]]

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS: Shards = {
    ONE: {"embed.weight": torch.zeros(4, 2), "layer.weight": torch.zeros(2, 2)},
    TWO: {"ids": torch.zeros(3, dtype=torch.int64), "head.weight": torch.zeros(4, 2)},
}


def save(root: Path, shards: Shards, index: Mapping[str, object] | None = None) -> Path:
    root.mkdir()
    for file_name, tensors in shards.items():
        safetensors.torch.save_file(dict(tensors), root / file_name, {"format": "pt"})
    named = {name: file_name for file_name, tensors in shards.items() for name in tensors}
    weight_map = named if index is None else index
    (root / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return root


def save_single(root: Path, **tensors: Tensor) -> Checkpoint:
    root.mkdir()
    safetensors.torch.save_file(tensors, root / "model.safetensors")
    return open_checkpoint(root)


def named_right() -> dict[str, object]:
    return {name: file_name for file_name, tensors in SHARDS.items() for name in tensors}


def problems_of(root: Path) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        open_checkpoint(root)
    return caught.value.problems


def test_shards_are_read_in_their_order(tmp_path: Path) -> None:
    model = open_checkpoint(save(tmp_path / "model", SHARDS))
    assert [header.path.name for header in model.headers] == [ONE, TWO]
    # Within a file by offset: the format's writer puts larger types first, then sorts by name.
    assert list(model.tensors) == ["embed.weight", "layer.weight", "ids", "head.weight"]
    assert model.file_of("ids").path == tmp_path / "model" / TWO


def test_single_file_needs_no_index_and_goes_before_one(tmp_path: Path) -> None:
    root = save(tmp_path / "model", SHARDS)
    safetensors.torch.save_file({"only": torch.zeros(1)}, root / "model.safetensors")
    assert list(open_checkpoint(root).tensors) == ["only"]


def test_links_into_a_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs = save(tmp_path / "blobs", SHARDS)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in (ONE, TWO, INDEX_NAME):
        (snapshot / name).symlink_to(os.path.relpath(blobs / name, snapshot))
    assert list(open_checkpoint(snapshot).tensors) == list(open_checkpoint(blobs).tensors)


def test_config_is_read_when_asked_for(tmp_path: Path) -> None:
    root = save(tmp_path / "model", SHARDS)
    assert open_checkpoint(root).config == {}
    (root / "config.json").write_text('{"model_type": "llama"}')
    assert open_checkpoint(root).config == {"model_type": "llama"}
    (root / "config.json").write_text("[1]")
    with pytest.raises(InputError, match=r"config.json: not usable JSON .*expected an object"):
        _ = open_checkpoint(root).config


def test_identity_follows_the_file_and_not_its_path(tmp_path: Path) -> None:
    root = save(tmp_path / "model", SHARDS)
    model = open_checkpoint(root)
    before = {name: model.identity(name) for name in model.tensors}
    assert len(set(before.values())) == len(before)
    moved = root.rename(tmp_path / "moved")
    model = open_checkpoint(moved)
    assert {name: model.identity(name) for name in model.tensors} == before
    os.utime(moved / ONE, ns=(0, 1))
    touched = open_checkpoint(moved)
    changed = {name for name in before if touched.identity(name) != before[name]}
    assert changed == set(SHARDS[ONE])


def test_identity_follows_the_header(tmp_path: Path) -> None:
    a = save_single(tmp_path / "a", w=torch.zeros(2, 4))
    b = save_single(tmp_path / "b", w=torch.zeros(4, 2))
    for model in (a, b):
        os.utime(model.headers[0].path, ns=(0, 0))
    identities = [open_checkpoint(model.root).identity("w") for model in (a, b)]
    assert a.headers[0].file_size == b.headers[0].file_size
    assert identities[0] != identities[1]


OUTSIDE = ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b", "a\0b", 3]


@pytest.mark.parametrize("outside", OUTSIDE)
def test_index_cannot_leave_its_directory(tmp_path: Path, outside: object) -> None:
    root = save(tmp_path / "model", SHARDS, {**named_right(), "ids": outside})
    (problem,) = problems_of(root)
    assert f"{INDEX_NAME}: tensor 'ids' is said to be in " in problem
    assert "expected the plain name of a file in the same directory" in problem


def test_missing_shard_is_named_once(tmp_path: Path) -> None:
    root = save(tmp_path / "model", SHARDS)
    (root / TWO).unlink()
    assert problems_of(root) == (
        f"{root / TWO}: missing, {INDEX_NAME} names it. Download or copy this shard.",
    )


INDEX_MISTAKES: dict[str, tuple[dict[str, object], list[str]]] = {
    "names a tensor that is nowhere": (
        {**named_right(), "ghost": ONE},
        [f"{ONE}: tensor 'ghost' is missing, {INDEX_NAME} says it is there"],
    ),
    "lacks a tensor": (
        {name: place for name, place in named_right().items() if name != "ids"},
        [f"{TWO}: tensor 'ids' is here, but {INDEX_NAME} does not name it"],
    ),
    "names the wrong shard": (
        {**named_right(), "ids": ONE},
        [
            f"{ONE}: tensor 'ids' is missing, {INDEX_NAME} says it is there",
            f"{TWO}: tensor 'ids' is here, but {INDEX_NAME} says {ONE}",
        ],
    ),
}


@pytest.mark.parametrize("mistake", INDEX_MISTAKES)
def test_index_that_disagrees_with_the_headers_is_refused(tmp_path: Path, mistake: str) -> None:
    index, messages = INDEX_MISTAKES[mistake]
    problems = problems_of(save(tmp_path / "model", SHARDS, index))
    assert len(problems) == len(messages)
    for problem, message in zip(problems, messages, strict=True):
        assert message in problem


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    twice = {ONE: SHARDS[ONE], TWO: {**SHARDS[TWO], "layer.weight": torch.ones(2, 2)}}
    index = {**named_right(), "layer.weight": ONE}
    (problem,) = problems_of(save(tmp_path / "model", twice, index))
    assert f"{TWO}: tensor 'layer.weight' is here, but {INDEX_NAME} says {ONE}" in problem


def test_all_problems_of_a_checkpoint_are_reported_together(tmp_path: Path) -> None:
    three = "model-00003-of-00003.safetensors"
    root = save(tmp_path / "model", SHARDS, {**named_right(), "ghost": ONE, "lost": three})
    (root / TWO).write_bytes(b"rubbish")
    problems = problems_of(root)
    assert len(problems) == 3
    assert any(f"{TWO}: too short" in problem for problem in problems)
    assert any(f"{three}: missing" in problem for problem in problems)
    assert any("'ghost' is missing" in problem for problem in problems)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not usable JSON"),
        ("[]", "expected an object"),
        ("{}", "weight_map is None, expected tensor names with their files"),
        ('{"weight_map": []}', "weight_map is [], expected"),
        ('{"weight_map": {}}', "weight_map is {}, expected"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "key 'a' occurs twice in one object"),
    ],
)
def test_unusable_index_is_refused(tmp_path: Path, text: str, message: str) -> None:
    root = save(tmp_path / "model", SHARDS)
    (root / INDEX_NAME).write_text(text)
    (problem,) = problems_of(root)
    assert problem.startswith(str(root / INDEX_NAME))
    assert message in problem


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no model here, expected model.safetensors or"),
        (["pytorch_model.bin", "config.json"], "weights as pickle files (*.bin) only"),
        (["adapter_config.json", "adapter_model.safetensors"], "an expert but not the base"),
        (
            ["adapter_model.safetensors"],
            "without adapter_config.json",
        ),
        (["consolidated.safetensors"], "Rename a single file to model.safetensors"),
    ],
)
def test_directory_without_a_model_is_refused(
    tmp_path: Path, files: list[str], message: str
) -> None:
    for name in files:
        (tmp_path / name).touch()
    (problem,) = problems_of(tmp_path)
    assert problem.startswith(f"{tmp_path}: ")
    assert message in problem


def test_missing_directory_is_refused_by_name(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path / "nowhere")
    assert problem.startswith(f"{tmp_path / 'nowhere'}: no such directory.")


def never(_name: str) -> bool:
    return False


def test_float_types_may_differ_between_base_and_expert(tmp_path: Path) -> None:
    base = save_single(tmp_path / "base", w=torch.zeros(2, 2), n=torch.zeros(3, dtype=torch.int32))
    half = save_single(
        tmp_path / "half", w=torch.zeros(2, 2).half(), n=torch.zeros(3, dtype=torch.int32)
    )
    assert compare(base, {"half": half, "same": base}, never) == []


def test_every_misfit_of_every_expert_is_one_line(tmp_path: Path) -> None:
    base = save_single(
        tmp_path / "base",
        head=torch.zeros(4, 2),
        norm=torch.zeros(2),
        ids=torch.zeros(3, dtype=torch.int64),
        scale=torch.zeros(2),
    )
    math = save_single(
        tmp_path / "math",
        head=torch.zeros(5, 2),
        ids=torch.zeros(3, dtype=torch.int32),
        scale=torch.zeros(2, dtype=torch.int32),
        added=torch.zeros(1),
    )
    code = save_single(tmp_path / "code", head=torch.zeros(4, 2), norm=torch.zeros(2))
    problems = compare(base, {"math": math, "code": code}, never)
    file = tmp_path / "math" / "model.safetensors"
    expected = [
        f"{tmp_path / 'math'}: expert 'math': tensor 'norm' is missing, the base model has it with "
        "shape (2,), F32. Give a complete model, or add 'norm' to [base] skip.",
        f"{file}: expert 'math': tensor 'added' has shape (1,), the base model has no such tensor. "
        "Check that the expert was tuned from this base, or add 'added' to [base] skip.",
        f"{file}: expert 'math': tensor 'head' has shape (5, 2), the base model has (4, 2). "
        "If this expert extends the vocabulary, add 'head' to [base] skip.",
        f"{file}: expert 'math': tensor 'ids' is I32, the base model has I64. "
        "Save the expert in the base model's dtype, or add 'ids' to [base] skip.",
        f"{file}: expert 'math': tensor 'scale' is I32, the base model has F32. "
        "Save the expert in the base model's dtype, or add 'scale' to [base] skip.",
    ]
    assert problems[:5] == expected
    assert len(problems) == 7
    assert all("expert 'code': tensor" in problem for problem in problems[5:])


def test_skipped_tensors_may_differ_in_every_way(tmp_path: Path) -> None:
    base = save_single(tmp_path / "base", a=torch.zeros(2), b=torch.zeros(2), c=torch.zeros(2))
    other = save_single(
        tmp_path / "other", b=torch.zeros(3), c=torch.zeros(2).int(), d=torch.zeros(2)
    )
    assert len(compare(base, {"other": other}, never)) == 4
    assert compare(base, {"other": other}, lambda name: name in "abcd") == []


def test_long_lists_are_shortened_with_a_count(tmp_path: Path) -> None:
    base = save_single(tmp_path / "base", **{f"w{i}": torch.zeros(1) for i in range(50)})
    other = save_single(tmp_path / "other", **{f"w{i}": torch.zeros(2) for i in range(40)})
    problems = compare(base, {"other": other}, never)
    # 10 missing tensors in full, 20 of the 40 shapes and the count of the rest.
    assert len(problems) == 10 + 20 + 1
    assert problems[-1] == f"{tmp_path / 'other'}: expert 'other': and 20 more like these."
