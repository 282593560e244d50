"""Laws that every registered method keeps, so that a new one is tested on arrival."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from merging import merge
from torch import Tensor

from esm_stream.methods import METHODS, available, create, is_factor_method, options_model
from esm_stream.methods.contract import ElementwiseMethod, Moment

DOCS = Path(__file__).resolve().parents[2] / "docs" / "methods"
SHAPES = [(12, 12), (20, 8), (8, 20)]
FACTORED = [name for name in available() if is_factor_method(create(name, {}, "vision"))]
ELEMENTWISE = [name for name in available() if issubclass(METHODS[name], ElementwiseMethod)]
# The order of experts is part of the definition.
ORDERED = {"slerp"}
# A constant of the definition is compared with the updates, or the base's weights count too.
NOT_HOMOGENEOUS = {"karcher", "ram", "slerp", "wudi"}


def num_experts(name: str) -> int:
    """Three, or as many as the method takes."""
    return min(3, getattr(METHODS[name], "max_experts", None) or 3)


def updates(name: str, shape: tuple[int, int], seed: int = 0) -> list[Tensor]:
    """Float32 updates of all experts."""
    generator = torch.Generator().manual_seed(seed)
    return [0.1 * torch.randn(shape, generator=generator) for _ in range(num_experts(name))]


def base_of(shape: tuple[int, ...]) -> Tensor:
    """Weights of the base."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(99))


def moments(name: str, num_inputs: int) -> list[Moment]:
    """Second moments of every expert's inputs."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for _ in range(num_experts(name)):
        x = torch.randn(40, num_inputs, generator=generator, dtype=torch.float64)
        found.append(Moment("input", x.T @ x / 40, 40))
    return found


def merged(
    name: str,
    changes: Sequence[Tensor],
    seen: Sequence[Moment],
    experts: Sequence[str] | None = None,
) -> Tensor:
    """Merged update of one matrix with the default options."""
    base = base_of(tuple(changes[0].shape))
    return merge(name, changes, base=base, moments=seen, experts=experts)


def close(left: Tensor, right: Tensor, tolerance: float) -> bool:
    """Whether two results agree relative to their norm."""
    scale = float(right.double().norm())
    return float((left.double() - right.double()).norm()) <= tolerance * max(scale, 1e-30)


@pytest.fixture(params=available())
def name(request: pytest.FixtureRequest) -> str:
    """Every registered method."""
    return str(request.param)


@pytest.mark.parametrize("shape", SHAPES)
class TestEveryMethod:
    def test_is_deterministic(self, name: str, shape: tuple[int, int]) -> None:
        once = merged(name, updates(name, shape), moments(name, shape[1]))
        again = merged(name, updates(name, shape), moments(name, shape[1]))
        assert torch.equal(once, again)

    def test_does_not_depend_on_the_order_of_experts(
        self, name: str, shape: tuple[int, int]
    ) -> None:
        if name in ORDERED:
            pytest.skip("the order is part of the definition")
        experts, seen = updates(name, shape), moments(name, shape[1])
        names = [f"e{i}" for i in range(len(experts))]
        turned = merged(name, experts[::-1], seen[::-1], names[::-1])
        assert close(turned, merged(name, experts, seen, names), 1e-6)

    def test_scales_with_the_updates(self, name: str, shape: tuple[int, int]) -> None:
        if name in NOT_HOMOGENEOUS:
            pytest.skip("the definition is not homogeneous")
        experts, seen = updates(name, shape), moments(name, shape[1])
        grown = merged(name, [4 * d for d in experts], seen)
        assert close(grown, 4 * merged(name, experts, seen), 1e-6)

    def test_gives_no_update_where_no_expert_has_one(
        self, name: str, shape: tuple[int, int]
    ) -> None:
        zeros = [torch.zeros(shape) for _ in range(num_experts(name))]
        found = merged(name, zeros, moments(name, shape[1]))
        assert float(found.abs().max()) <= 1e-6 * float(base_of(shape).abs().max())

    def test_leaves_its_inputs_alone(self, name: str, shape: tuple[int, int]) -> None:
        experts, seen = updates(name, shape), moments(name, shape[1])
        before = [d.clone() for d in experts], [m.matrix.clone() for m in seen]
        merged(name, experts, seen)
        assert all(map(torch.equal, experts, before[0]))
        assert all(torch.equal(m.matrix, b) for m, b in zip(seen, before[1], strict=True))

    def test_is_finite_and_has_the_shape(self, name: str, shape: tuple[int, int]) -> None:
        found = merged(name, updates(name, shape), moments(name, shape[1]))
        assert found.shape == shape
        assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("elementwise", ELEMENTWISE)
class TestElementwiseMethods:
    @pytest.mark.parametrize("length", [7, 20, 33])
    def test_do_not_depend_on_panels(self, elementwise: str, length: int) -> None:
        experts = updates(elementwise, (12, 20))
        whole = merge(elementwise, experts, base=base_of((12, 20)))
        found = merge(elementwise, experts, base=base_of((12, 20)), length=length)
        # Sums over panels are kept in float64; what no such sum decides is equal bit by bit.
        if create(elementwise, {}, "vision").sweeps:  # type: ignore[union-attr]
            assert close(found, whole, 1e-6)
        else:
            assert torch.equal(found, whole)

    @pytest.mark.parametrize("shape", [(17,), (), (3, 4, 5), (2, 3, 2, 2)])
    def test_take_tensors_of_any_shape(self, elementwise: str, shape: tuple[int, ...]) -> None:
        experts = [torch.randn(shape) for _ in range(num_experts(elementwise))]
        found = merge(elementwise, experts, base=base_of(shape))
        assert found.shape == shape
        assert bool(torch.isfinite(found).all())

    def test_keep_float64(self, elementwise: str) -> None:
        experts = [d.double() for d in updates(elementwise, (8, 20))]
        base = base_of((8, 20)).double()
        found = merge(elementwise, experts, base=base)
        narrow = merge(elementwise, [d.float() for d in experts], base=base.float())
        assert found.dtype == torch.float64
        assert close(found, narrow, 1e-4)


@pytest.mark.parametrize("factored", FACTORED)
def test_factor_methods_keep_their_rank_and_tell_what_decides_it(factored: str) -> None:
    method = create(factored, {}, "vision")
    assert is_factor_method(method)
    assert json.dumps([method.identity("factor"), method.identity("combine")])
    if method.streams:
        pytest.skip("its factors are summands")
    for shape in SHAPES:
        limit = method.rank(shape, num_experts(factored))
        moment = moments(factored, shape[1])[0] if method.uses_moments else None
        factors = method.factor(updates(factored, shape)[0], moment, num_experts(factored))
        assert factors.basis_OK.shape[1] == factors.coordinates_KI.shape[0] <= limit
        assert limit <= min(shape)
        gram = factors.basis_OK.T @ factors.basis_OK
        assert close(gram, torch.eye(len(gram), dtype=gram.dtype), 1e-10)


def test_every_method_says_what_it_is(name: str) -> None:
    about = METHODS[name].about
    for field in about.__dataclass_fields__:
        text = getattr(about, field)
        assert text, field
        assert "\n" not in text, field
    assert METHODS[name].__doc__


def test_every_method_has_a_page_with_all_its_options(name: str) -> None:
    page = (DOCS / f"{name}.md").read_text()
    for key, field in options_model(name).model_fields.items():
        assert field.description, key
        assert f"`{field.alias or key}`" in page, key


def test_the_overview_lists_every_method_with_what_it_says_of_itself() -> None:
    rows = [line for line in (DOCS / "index.md").read_text().splitlines() if line[:3] == "| ["]
    expected = []
    for method in available():
        about = METHODS[method].about
        facts = (about.summary, about.data, about.passes, about.memory, about.when)
        expected.append(f"| [`{method}`]({method}.md) | {' | '.join(facts)} |")
    assert rows == expected
