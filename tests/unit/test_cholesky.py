"""The blocked Cholesky solution against a dense one, for sides around multiples of a tile."""

import pytest
import torch
from torch import Tensor

from esm_stream.subspace.cholesky import factor_in_place, lower_panels, solve_ridge

TILE = 4


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esm_stream.subspace.gram.TILE", TILE)


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("side", [1, 3, 4, 5, 8, 11, 17])
@pytest.mark.parametrize("rows", [1, 6])
def test_solution_is_that_of_the_dense_matrix(side: int, rows: int) -> None:
    root, target = draw(side, side, seed=side), draw(rows, side, seed=rows)
    gram = root @ root.T
    ridged = gram + 0.3 * gram.trace() / side * torch.eye(side, dtype=torch.float64)
    wanted = target @ torch.linalg.inv(ridged)
    found = solve_ridge(target.clone(), [p.clone() for p in lower_panels(gram)], 0.3)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    # In place, the upper half is never looked at.
    spoilt = gram.tril() + torch.full_like(gram, float("nan")).triu_(TILE).nan_to_num_(nan=7e9)
    torch.testing.assert_close(solve_ridge(target, lower_panels(spoilt), 0.3), wanted)


def test_a_zero_gives_zero() -> None:
    found = solve_ridge(draw(3, 6, seed=0), lower_panels(torch.zeros(6, 6).double()), 0.1)
    assert not found.any()


def test_a_matrix_without_some_directions_is_solved_with_rounding_for_a_ridge() -> None:
    thin = draw(9, 2, seed=1)
    gram, update = thin @ thin.T, draw(3, 9, seed=2)
    found = solve_ridge(update @ gram, lower_panels(gram.clone()), 0.0)
    torch.testing.assert_close(found @ gram, update @ gram, rtol=1e-6, atol=1e-8)


def test_a_matrix_that_is_not_positive_is_refused() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        factor_in_place(lower_panels(-torch.eye(6).double()))
