"""Laws that every registered method keeps, so that a new one is tested on arrival."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from esm_stream.methods import available, create, is_factor_method, options_model
from esm_stream.methods.contract import Moment

DOCS = Path(__file__).resolve().parents[2] / "docs" / "methods"
SHAPES = [(12, 12), (20, 8), (8, 20)]
EXPERTS = 3
FACTORED = [name for name in available() if is_factor_method(create(name, {}, "vision"))]
ELEMENTWISE = [name for name in available() if name not in FACTORED]


def updates(shape: tuple[int, int], seed: int = 0) -> list[Tensor]:
    """Float32 updates of all experts."""
    generator = torch.Generator().manual_seed(seed)
    return [0.1 * torch.randn(shape, generator=generator) for _ in range(EXPERTS)]


def moments(num_inputs: int) -> list[Moment]:
    """Second moments of every expert's inputs."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for _ in range(EXPERTS):
        x = torch.randn(40, num_inputs, generator=generator, dtype=torch.float64)
        found.append(Moment("input", x.T @ x / 40, 40))
    return found


def merge(name: str, experts: Sequence[Tensor], seen: Sequence[Moment]) -> Tensor:
    """Merged update of one matrix."""
    method = create(name, {}, "vision")
    if not is_factor_method(method):
        return method.merge(iter(experts))
    factors = [
        method.factor(d, m if method.uses_moments else None, len(experts))
        for d, m in zip(experts, seen, strict=True)
    ]
    return method.combine(factors, (experts[0].shape[0], experts[0].shape[1])).update_OI


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
        once = merge(name, updates(shape), moments(shape[1]))
        again = merge(name, updates(shape), moments(shape[1]))
        assert torch.equal(once, again)

    def test_does_not_depend_on_the_order_of_experts(
        self, name: str, shape: tuple[int, int]
    ) -> None:
        experts, seen = updates(shape), moments(shape[1])
        turned = merge(name, experts[::-1], seen[::-1])
        assert close(turned, merge(name, experts, seen), 1e-6)

    def test_scales_with_the_updates(self, name: str, shape: tuple[int, int]) -> None:
        experts, seen = updates(shape), moments(shape[1])
        doubled = merge(name, [4 * d for d in experts], seen)
        assert close(doubled, 4 * merge(name, experts, seen), 1e-6)

    def test_gives_no_update_where_no_expert_has_one(
        self, name: str, shape: tuple[int, int]
    ) -> None:
        zeros = [torch.zeros(shape) for _ in range(EXPERTS)]
        assert not merge(name, zeros, moments(shape[1])).any()

    def test_leaves_its_inputs_alone(self, name: str, shape: tuple[int, int]) -> None:
        experts, seen = updates(shape), moments(shape[1])
        before = [d.clone() for d in experts], [m.matrix.clone() for m in seen]
        merge(name, experts, seen)
        assert all(map(torch.equal, experts, before[0]))
        assert all(torch.equal(m.matrix, b) for m, b in zip(seen, before[1], strict=True))

    def test_is_finite_and_has_the_shape(self, name: str, shape: tuple[int, int]) -> None:
        merged = merge(name, updates(shape), moments(shape[1]))
        assert merged.shape == shape
        assert bool(torch.isfinite(merged).all())


@pytest.mark.parametrize("elementwise", ELEMENTWISE)
def test_elementwise_methods_do_not_depend_on_panels(elementwise: str) -> None:
    method = create(elementwise, {}, "vision")
    assert not is_factor_method(method)
    experts = updates((12, 5))
    whole = method.merge(iter(experts))
    panels = [method.merge(d[rows] for d in experts) for rows in (slice(0, 5), slice(5, 12))]
    assert torch.equal(torch.cat(panels), whole)


@pytest.mark.parametrize("factored", FACTORED)
def test_factor_methods_keep_their_rank_and_tell_what_decides_it(factored: str) -> None:
    method = create(factored, {}, "vision")
    assert is_factor_method(method)
    for shape in SHAPES:
        limit = method.rank(shape, EXPERTS)
        moment = moments(shape[1])[0] if method.uses_moments else None
        factors = method.factor(updates(shape)[0], moment, EXPERTS)
        assert factors.basis_OK.shape[1] == factors.coordinates_KI.shape[0] <= limit
        assert limit <= min(shape)
        gram = factors.basis_OK.T @ factors.basis_OK
        assert close(gram, torch.eye(len(gram), dtype=gram.dtype), 1e-10)
    assert json.dumps([method.identity("factor"), method.identity("combine")])


def test_every_method_has_a_page_with_all_its_options(name: str) -> None:
    page = (DOCS / f"{name}.md").read_text()
    for key, field in options_model(name).model_fields.items():
        assert field.description, key
        assert f"`{field.alias or key}`" in page, key
