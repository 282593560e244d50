"""OWL on small matrices: worked example, invariants, limits that are other methods."""

from typing import ClassVar

import pytest
import torch
from merging import merge, merge_sums
from torch import Tensor

from esm_stream.methods import create
from esm_stream.methods.contract import Merged, Moment, SumMethod
from esm_stream.methods.owl import Owl

SHAPES = [(12, 12), (20, 8), (8, 20)]


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def updates(shape: tuple[int, int], count: int = 3) -> list[Tensor]:
    return [draw(*shape, seed=t) for t in range(count)]


def moments(inputs: int, count: int = 3) -> list[Moment]:
    rows = [draw(40, inputs, seed=100 + t) for t in range(count)]
    return [Moment("input", x.T @ x / 40, 40) for x in rows]


def owl(changes: list[Tensor], seen: list[Moment] | None = None, **options: object) -> Tensor:
    return merge("owl", changes, moments=seen, options={"m": 0.4, "p": 0.6, **options})


def near(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())


def rotation(side: int, seed: int) -> Tensor:
    return torch.linalg.qr(draw(side, side, seed=seed))[0]


class TestWorkedExample:
    """Two updates, identity moments: numbers worked out by hand of the definition."""

    CHANGES: ClassVar = [
        torch.tensor([[2.0, 0], [0, 1]]).double(),
        torch.tensor([[0.0, 1], [0, 3]]).double(),
    ]
    SEEN: ClassVar = [Moment("input", torch.eye(2, dtype=torch.float64), 5)] * 2

    def test_fit(self) -> None:
        found = owl(self.CHANGES, self.SEEN, p=0.0)
        wanted = torch.tensor([[1.177489, 0.802005], [0, 2.566416]]).double()
        torch.testing.assert_close(found, wanted, atol=5e-7, rtol=0)

    def test_whitened(self) -> None:
        found = owl(self.CHANGES, self.SEEN)
        wanted = torch.tensor([[1.399706, 0.424911], [-0.242456, 2.533313]]).double()
        torch.testing.assert_close(found, wanted, atol=5e-7, rtol=0)

    def test_without_data(self) -> None:
        found = owl(self.CHANGES, inputs="none")
        wanted = torch.tensor([[2.105166, 0.468622], [-0.364655, 2.599874]]).double()
        torch.testing.assert_close(found, wanted, atol=5e-7, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
class TestInvariants:
    def test_scale_of_the_updates(self, shape: tuple[int, int]) -> None:
        changes, seen = updates(shape), moments(shape[1])
        near(owl([3 * d for d in changes], seen), 3 * owl(changes, seen))

    def test_scale_of_a_moment(self, shape: tuple[int, int]) -> None:
        changes, seen = updates(shape), moments(shape[1])
        other = [Moment("input", seen[0].matrix * 77, 40), *seen[1:]]
        near(owl(changes, other), owl(changes, seen))

    def test_rotation_of_outputs(self, shape: tuple[int, int]) -> None:
        changes, seen = updates(shape), moments(shape[1])
        turn = rotation(shape[0], 5)
        near(owl([turn @ d for d in changes], seen), turn @ owl(changes, seen))

    def test_rotation_of_inputs(self, shape: tuple[int, int]) -> None:
        changes, seen = updates(shape), moments(shape[1])
        turn = rotation(shape[1], 6)
        turned = [Moment("input", turn.T @ g.matrix @ turn, 40) for g in seen]
        near(owl([d @ turn for d in changes], turned), owl(changes, seen) @ turn)

    def test_one_expert_without_ridge_and_whitening_is_itself(self, shape: tuple[int, int]) -> None:
        change = updates(shape)[:1]
        near(owl(change, moments(shape[1])[:1], p=0.0, mu=0.0), change[0], 1e-9)

    def test_the_norm_is_that_of_the_fit(self, shape: tuple[int, int]) -> None:
        changes, seen = updates(shape), moments(shape[1])
        assert float(owl(changes, seen).norm()) == pytest.approx(
            float(owl(changes, seen, p=0.0).norm())
        )

    def test_moments_alone_are_regmean(self, shape: tuple[int, int]) -> None:
        changes, seen = updates(shape), moments(shape[1])
        weights = [
            float(d.square().sum() / g.matrix.trace()) for d, g in zip(changes, seen, strict=True)
        ]
        weighed = [Moment("input", g.matrix * w, 40) for g, w in zip(seen, weights, strict=True)]
        wanted = merge("regmean", changes, moments=weighed, options={"rho": 1.0, "ridge": 0.05})
        near(owl(changes, seen, m=1.0, p=0.0), wanted)

    def test_updates_alone_are_closed_wudi_weighed_by_energy(self, shape: tuple[int, int]) -> None:
        changes = updates(shape)
        target = sum(d @ d.T @ d for d in changes)
        total = sum(d.T @ d for d in changes)
        assert isinstance(total, Tensor)
        total += 0.05 * total.trace() / len(total) * torch.eye(len(total), dtype=torch.float64)
        near(owl(changes, inputs="none", p=0.0), target @ torch.linalg.inv(total))

    def test_an_expert_without_update_adds_nothing(self, shape: tuple[int, int]) -> None:
        changes, seen = updates(shape), moments(shape[1])
        changes[1] = torch.zeros_like(changes[1])
        near(owl(changes, seen), owl([changes[0], changes[2]], [seen[0], seen[2]]))

    def test_a_layer_that_saw_nothing_has_no_share_of_inputs(self, shape: tuple[int, int]) -> None:
        changes = updates(shape)
        dark = [Moment("input", torch.zeros(shape[1], shape[1]).double(), 0)] * 3
        near(owl(changes, dark), owl(changes, inputs="none"))

    def test_rows_of_thin_updates_stay_in_their_joint_space(self, shape: tuple[int, int]) -> None:
        left, right = draw(shape[0], 1, seed=1), draw(1, shape[1], seed=2)
        changes = [left @ right, left @ draw(1, shape[1], seed=3)]
        found = owl(changes, moments(shape[1], 2))
        outside = torch.eye(shape[0], dtype=torch.float64) - left @ left.T / left.square().sum()
        assert float((outside @ found).norm()) <= 1e-9 * float(found.norm())
        across = torch.linalg.qr(torch.cat([d[:1] for d in changes]).T)[0]
        free = owl(changes, inputs="none")
        assert float((free - free @ across @ across.T).norm()) <= 1e-9 * float(free.norm())


def test_panels_are_those_of_the_whole_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 4 rows cut K, N and L of every shape several times."""
    for shape in SHAPES:
        changes, seen = updates(shape), moments(shape[1])
        for given in (seen, None):
            options = {} if given else {"inputs": "none"}
            wanted = merge("owl", changes, moments=given, options=options)
            with monkeypatch.context() as patch:
                patch.setattr("esm_stream.methods.owl.TILE", 4)
                patch.setattr("esm_stream.subspace.gram.TILE", 4)
                near(merge("owl", changes, moments=given, options=options), wanted)


def test_large_sides_are_whitened_by_the_banded_form(monkeypatch: pytest.MonkeyPatch) -> None:
    changes, seen = updates((40, 12)), moments(12)
    for power in (0.3, 0.6, 1.0):
        wanted = owl(changes, seen, p=power)
        with monkeypatch.context() as patch:
            patch.setattr("esm_stream.methods.owl.is_banded", lambda *_: True)
            near(owl(changes, seen, p=power), wanted, 3e-7)


def test_terms_come_in_the_places_that_the_method_names() -> None:
    method = create("owl", {}, "vision")
    assert isinstance(method, SumMethod)
    for shape in SHAPES:
        places = method.places(shape)
        panels = list(method.term(updates(shape)[0], moments(shape[1])[0]))
        assert [(p.stop - p.start, p.columns) for p in places] == [tuple(t.shape) for t in panels]


@pytest.mark.parametrize(
    ("inputs", "alphas"),
    [
        ("merged", [1.0, 1.67, 2.15, 2.38]),
        ("expert", [1.0, 1.54, 1.94, 2.13]),
        ("none", [1.6, 1.6, 1.6, 1.6]),
    ],
)
def test_default_alpha(inputs: str, alphas: list[float]) -> None:
    method = create("owl", {"inputs": inputs}, "vision")
    assert isinstance(method, Owl)
    for modality in ("vision", "language"):
        assert [method.alpha_for(modality, count) for count in (1, 2, 8, 20)] == alphas


@pytest.mark.parametrize("shape", SHAPES)
class TestPowerByConflict:
    """p = "auto" of the share of the responses that one matrix leaves unexplained."""

    def solved(self, changes: list[Tensor], seen: list[Moment] | None, **options: object) -> Merged:
        method = create("owl", options if seen else {**options, "inputs": "none"}, "vision")
        assert isinstance(method, SumMethod)
        return merge_sums(method, changes, seen or [None] * len(changes))

    def test_share_is_that_of_the_definition(self, shape: tuple[int, int]) -> None:
        changes, seen = updates(shape), moments(shape[1])
        for share, given in ((0.5, seen), (0.0, None)):
            fit = self.solved(changes, given, p=0, m=share).update_OI
            left = whole = 0.0
            for change, moment in zip(changes, seen, strict=True):
                scale = float(change.square().sum() / moment.matrix.trace())
                metric = (1 - share) * change.T @ change + share * scale * moment.matrix
                left += float(torch.trace((fit - change) @ metric @ (fit - change).T))
                whole += float(torch.trace(change @ metric @ change.T))
            found = self.solved(changes, given, p=0, m=share).diagnostics["unexplained"]
            assert found == pytest.approx(left / whole, rel=1e-9)

    def test_power_follows_the_share(self, shape: tuple[int, int]) -> None:
        changes, seen = updates(shape), moments(shape[1])
        found = self.solved(changes, seen)
        share, power = found.diagnostics["unexplained"], found.diagnostics["power"]
        assert power == pytest.approx(0.7 * share**0.25)
        near(found.update_OI, self.solved(changes, seen, p=power).update_OI)

    def test_equal_experts_are_not_whitened(self, shape: tuple[int, int]) -> None:
        change, moment = updates(shape)[0], moments(shape[1])[0]
        found = self.solved([change] * 3, [moment] * 3, mu=0.0)
        assert found.diagnostics["unexplained"] == pytest.approx(0, abs=1e-12)
        near(found.update_OI, change, 1e-3)

    def test_without_samples_it_is_a_constant(self, shape: tuple[int, int]) -> None:
        changes = updates(shape)
        near(self.solved(changes, None).update_OI, self.solved(changes, None, p=0.6).update_OI)
