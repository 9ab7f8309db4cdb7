"""Inverses place by place: as exact as asked, also where Newton's method alone gets stuck."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from iregzoo.inversion import doubtful, invert_at


def line(low: float, high: float, count: int) -> Tensor:
    return torch.linspace(low, high, count, dtype=torch.float64)[:, None]


def solve(move: Callable[[Tensor], Tensor], targets: Tensor, nodes: Tensor | None = None) -> Tensor:
    return invert_at(
        move, targets, start=targets, nodes=None if nodes is None else lambda: nodes, step=1e-3, tolerance=1e-6
    )


@pytest.mark.parametrize("axes", [2, 3])
def test_an_affine_is_inverted_in_a_step(axes: int) -> None:
    matrix = (
        torch.eye(axes, dtype=torch.float64) + 0.4 * torch.rand(axes, axes, generator=torch.manual_seed(0)).double()
    )
    targets = 50 * torch.randn(100, axes, generator=torch.manual_seed(1)).double()
    places = solve(lambda at: at @ matrix.T + 7, targets)
    torch.testing.assert_close(places, torch.linalg.solve(matrix, (targets - 7).T).T, rtol=0, atol=1e-6)


def test_a_transform_that_nearly_folds_is_inverted_as_bisection_does() -> None:
    targets = line(-9, 9, 200)
    places = solve(lambda at: at + 0.99 * at.sin(), targets)
    expected = [brentq(lambda x, y=y: x + 0.99 * np.sin(x) - y, -12, 12, xtol=1e-12) for y in targets[:, 0].tolist()]
    # Where it hardly moves, many places are within the tolerance.
    moved = places + 0.99 * places.sin()
    assert (moved - targets).abs().max() <= 1e-6
    assert np.abs(places[:, 0].numpy() - expected).max() < 0.05
    assert np.median(np.abs(places[:, 0].numpy() - expected)) < 1e-6


def test_where_it_folds_nodes_help_to_reach_every_place() -> None:
    def folded(at: Tensor) -> Tensor:
        return at + 3 * at.sin()

    targets = line(-20, 20, 1000)
    alone = (folded(solve(folded, targets)) - targets).abs()
    helped = (folded(solve(folded, targets, line(-30, 30, 400))) - targets).abs()
    assert alone.max() > 0.1
    assert helped.max() <= 1e-6


def test_a_plateau_is_left_by_the_way_that_is_missing() -> None:
    """There the Jacobian is zero and says nothing."""

    def step(at: Tensor) -> Tensor:
        return torch.where(at < 0, at, (at - 1).clamp(min=0))

    start = torch.full((2, 1), 0.5, dtype=torch.float64)
    targets = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    places = invert_at(step, targets, start=start, step=1e-3, tolerance=1e-6)
    torch.testing.assert_close(places, torch.tensor([[2.0], [-2.0]], dtype=torch.float64), rtol=0, atol=1e-6)


def test_what_cannot_be_reached_comes_as_near_as_it_gets() -> None:
    targets = torch.tensor([[5.0], [0.5]], dtype=torch.float64)
    places = solve(torch.tanh, targets, line(-3, 3, 50))
    left = (places.tanh() - targets).abs()
    assert 4.0 <= left[0] < 4.01
    assert left[1] <= 1e-6


def test_what_is_near_enough_stays() -> None:
    targets = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    places = invert_at(lambda at: at + 0.009, targets, start=targets, step=0.1, tolerance=0.02)
    assert torch.equal(places, targets)


def test_each_place_is_found_by_itself() -> None:
    def swirl(at: Tensor) -> Tensor:
        return at + 1.5 * torch.stack((at[:, 1].sin(), at[:, 0].cos()), dim=1)

    targets = 6 * torch.randn(40, 2, generator=torch.manual_seed(0)).double()
    nodes = 10 * torch.randn(300, 2, generator=torch.manual_seed(1)).double()
    singles = torch.cat([solve(swirl, target, nodes) for target in targets.split(1)])
    torch.testing.assert_close(solve(swirl, targets, nodes), singles, rtol=0, atol=1e-9)


def test_places_that_are_folded_or_squeezed_are_doubtful_and_no_others() -> None:
    """x + a sin x leaves 1 + a cos x of every length."""
    places = line(-9, 9, 1000)
    for strength in (0.5, 0.99, 3.0):
        left = 1 + strength * places[:, 0].cos()
        found = doubtful(lambda at, a=strength: at + a * at.sin(), places, 1e-6)
        assert torch.equal(found, left <= 0.1)


def test_a_turn_is_not_doubtful_and_a_mirror_and_a_plane_are() -> None:
    places = torch.randn(10, 3, dtype=torch.float64)
    for diagonal, expected in (((1, -1, -1), False), ((1, 1, -1), True), ((1, 1, 0), True)):
        matrix = torch.tensor(diagonal, dtype=torch.float64)
        found = doubtful(lambda at, m=matrix: at * m, places, 1e-3)
        assert found.tolist() == [expected] * 10
