"""Parameters get the values of `from_pretrained`, from the right places of the checkpoint."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from conftest import MakeZoo
from models import FAMILIES, FUSED, change_tensors, load, tensors_of
from torch import Tensor

from esm_stream.calibration.conversion import Place
from esm_stream.calibration.skeleton import Skeleton, build_skeleton
from esm_stream.errors import UnsupportedModelError

EVERY_FAMILY = [*FAMILIES, *FUSED]


def skeleton_of(path: Path, dtype: torch.dtype = torch.float32) -> Skeleton:
    return build_skeleton(path, shapes_of(tensors_of(path)), dtype)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def reader(tensors: Mapping[str, Tensor], seen: list[str]) -> Callable[[str], Tensor]:
    def read(name: str) -> Tensor:
        seen.append(name)
        return tensors[name]

    return read


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_every_parameter_has_the_value_of_from_pretrained(
    name: str, dtype: torch.dtype, zoo: MakeZoo
) -> None:
    found = zoo(name, dtype=torch.bfloat16)
    seen: list[str] = []
    tensors = tensors_of(found.base)
    skeleton = skeleton_of(found.base, dtype)
    values = skeleton.load("", reader(tensors, seen))
    plain = load(found.family, found.base, dtype).state_dict()
    assert values.keys() == plain.keys()
    for parameter, value in plain.items():
        assert values[parameter].dtype == value.dtype
        assert torch.equal(values[parameter], value), parameter
    assert sorted(seen) == sorted(tensors)  # each is read, and once
    assert set(skeleton.tensors_of("")) == set(tensors)


@pytest.mark.parametrize("name", FUSED)
def test_a_block_needs_its_own_tensors_only(name: str, zoo: MakeZoo) -> None:
    found = zoo(name)
    tensors, block = tensors_of(found.base), f"{found.family.blocks}.1"
    skeleton, seen = skeleton_of(found.base), []
    values = skeleton.load(block, reader(tensors, seen))
    plain = load(found.family, found.base, torch.float32).get_submodule(block).state_dict()
    assert values.keys() == plain.keys()
    assert all(torch.equal(values[n], plain[n]) for n in plain)
    assert set(seen) == set(skeleton.tensors_of(block)) == {n for n in tensors if f"{block}." in n}


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_places_rebuild_every_matrix_up_to_the_order_of_its_outputs(
    name: str, zoo: MakeZoo
) -> None:
    found = zoo(name)
    tensors = tensors_of(found.base)
    shapes, skeleton = shapes_of(tensors), skeleton_of(found.base)
    names_of_stacks = re.compile(r".*experts\.(gate_up|down)_proj")
    for parameter, value in load(found.family, found.base, torch.float32).state_dict().items():
        if value.ndim < 2:
            continue
        stacked = bool(names_of_stacks.fullmatch(parameter))
        stack = value if stacked else value.flatten(1)[None]
        flip = name == "gpt-oss" and stacked
        places = skeleton.places(
            parameter, shapes, stack=len(stack) if stacked else None, transposed=flip
        )
        assert places is not None
        assert len(places) == len(stack)
        for matrix, parts in zip(stack, places, strict=True):
            rows = torch.cat([stored_rows(tensors, place) for place in parts])
            assert sorted(rows.tolist()) == sorted((matrix.T if flip else matrix).tolist())


def stored_rows(tensors: Mapping[str, Tensor], place: Place) -> Tensor:
    """Outputs of a place, (O, I)."""
    stored = tensors[place.tensor]
    matrix = stored.flatten(1) if place.slice is None else stored[place.slice]
    return (matrix.T if place.transposed else matrix)[place.start : place.stop]


def test_experts_are_parts_of_a_stack_in_the_order_of_their_numbers(zoo: MakeZoo) -> None:
    found = zoo("qwen2-moe")  # eleven experts: 10 follows 9, not 1
    skeleton, shapes = skeleton_of(found.base), shapes_of(tensors_of(found.base))
    name = "model.layers.0.mlp.experts"
    places = skeleton.places(f"{name}.gate_up_proj", shapes, stack=11, transposed=False)
    assert places is not None
    assert places[10] == (
        Place(f"{name}.10.gate_proj.weight", None, 0, 12, transposed=False),
        Place(f"{name}.10.up_proj.weight", None, 0, 12, transposed=False),
    )


def test_a_matrix_with_the_wrong_orientation_has_no_place(zoo: MakeZoo) -> None:
    found = zoo("mixtral")
    skeleton, shapes = skeleton_of(found.base), shapes_of(tensors_of(found.base))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert skeleton.places(name, shapes, stack=3, transposed=True) is None


def test_tied_parameters_share_one_tensor(zoo: MakeZoo) -> None:
    found = zoo("qwen2")
    seen: list[str] = []
    names = ("lm_head.weight", "model.embed_tokens.weight")
    values = skeleton_of(found.base).values(names, reader(tensors_of(found.base), seen))
    assert values[names[0]] is values[names[1]]
    assert seen == ["model.embed_tokens.weight"]


def test_a_head_that_the_checkpoint_lacks_is_missed_only_when_it_is_asked_for(
    zoo: MakeZoo, tmp_path: Path
) -> None:
    found = zoo("bert-classifier").copy(tmp_path)
    change_tensors(found.base, {"classifier.weight": None})
    skeleton = skeleton_of(found.base)
    assert skeleton.tensors_of("bert")
    with pytest.raises(UnsupportedModelError, match=r"no tensor .* 'classifier\.weight'"):
        skeleton.tensors_of("classifier")


def test_a_tensor_of_another_shape_is_refused_by_name(zoo: MakeZoo, tmp_path: Path) -> None:
    found = zoo("mixtral").copy(tmp_path)
    name = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
    change_tensors(found.base, {name.format(i): lambda value: value[:8] for i in range(3)})
    with pytest.raises(UnsupportedModelError, match=r"\.0\.w1.*\(3, 20, 16\).*\(3, 24, 16\)"):
        skeleton_of(found.base).tensors_of("model.layers.0")


def test_experts_that_do_not_fit_together_are_refused_by_name(zoo: MakeZoo, tmp_path: Path) -> None:
    found = zoo("mixtral").copy(tmp_path)
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    change_tensors(found.base, {name: lambda value: value[:8]})
    with pytest.raises(UnsupportedModelError, match="cannot be assembled") as error:
        skeleton_of(found.base).tensors_of("model.layers.0")
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in str(error.value)
