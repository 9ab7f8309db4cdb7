"""Where a brain of one contrast lies in another is found, however it lies; what is none is left to the search."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch.nn.functional import pad

from geometry import apply_world, make_grid, world_points
from iregzoo.space import brains
from iregzoo.space.brains import brain_start, skew
from iregzoo.space.grid import Grid, Matrix
from iregzoo.space.scan import Scan

# Brightness, middle and half axes in mm, those on top last; right is left in a mirror, as in a brain.
PARTS = (
    (0.45, (0, 0, 0), (65, 85, 60)),
    (1.00, (0, 2, 0), (56, 75, 50)),
    (0.10, (0, 5, 8), (8, 30, 12)),
    (0.70, (14, 8, 0), (9, 14, 9)),
    (0.70, (-14, 8, 0), (9, 14, 9)),
    (0.40, (0, 55, -45), (45, 30, 24)),
    (0.90, (0, 55, -45), (36, 22, 15)),
    (0.75, (0, 20, -50), (12, 12, 40)),
)
HERE = make_grid((88, 104, 88), (2.0, 2.0, 2.0), centre=(3, -5, 8))
THERE = make_grid((124, 128, 120), (2.0, 2.0, 2.0), degrees=(6, -8, 4), centre=(-12, 15, -8))
PLACES = np.array([middle for _, middle, _ in PARTS], dtype=float)


def draw(grid: Grid, to_brain: Matrix) -> Scan:
    """A brain on a grid, of which an affine takes places to the brain's own."""
    places = apply_world(to_brain, world_points(grid).reshape(-1, 3))
    image = np.zeros(len(places), dtype=np.float32)
    for brightness, middle, half_axes in PARTS:
        image[np.linalg.norm((places - middle) / half_axes, axis=1) < 1] = brightness
    return Scan(torch.from_numpy(image.reshape(1, 1, *grid.shape)), grid, Path("brain"))


def moved(degrees: tuple[float, float, float], shift: tuple[float, float, float], factors: object = 1.0) -> Matrix:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() * np.array(factors)
    matrix[:3, 3] = shift
    return matrix


def error_mm(found: Matrix | None, true: Matrix) -> float:
    assert found is not None
    return float(np.linalg.norm(apply_world(found, PLACES) - apply_world(true, PLACES), axis=1).max())


@pytest.mark.parametrize(
    ("degrees", "shift"),
    [((0, 0, 0), (0, 0, 0)), ((8, -6, 10), (-25, 40, 5)), ((-28, 5, 0), (0, 10, -20)), ((4, 24, -20), (-15, 0, 9))],
)
def test_a_brain_is_found_however_it_lies(
    degrees: tuple[float, float, float], shift: tuple[float, float, float]
) -> None:
    true = moved(degrees, shift)
    moving = draw(THERE, np.linalg.inv(true))
    found = brain_start(draw(HERE, np.eye(4)), moving, rigid=True)
    assert error_mm(found, true) < 1.5
    assert found is not None
    np.testing.assert_allclose(found[:3, :3] @ found[:3, :3].T, np.eye(3), atol=1e-9)
    assert error_mm(brain_start(draw(HERE, np.eye(4)), moving, rigid=False), true) < 1.5


@pytest.mark.parametrize("factors", [(1.1, 0.94, 1.05), 1.3], ids=["another person", "a child"])
def test_an_affine_start_stretches_and_a_rigid_one_does_not(factors: object) -> None:
    true = moved((5, -4, 3), (8, -6, 4), factors)
    fixed, moving = draw(HERE, true), draw(HERE, np.eye(4))
    assert error_mm(brain_start(fixed, moving, rigid=False), true) < 3
    rigid = brain_start(fixed, moving, rigid=True)
    assert rigid is not None
    assert np.linalg.det(rigid[:3, :3]) == pytest.approx(1)


def test_where_a_scan_shows_no_brain_there_is_no_start() -> None:
    brain = draw(HERE, np.eye(4))
    black = replace(brain, data=torch.zeros_like(brain.data))
    small = draw(HERE, np.diag([3.0, 3.0, 3.0, 1.0]))
    thin = draw(make_grid((88, 104, 1), (2.0, 2.0, 2.0)), np.eye(4))
    assert small.data.any()
    for other in (black, small, thin):
        assert brain_start(brain, other, rigid=True) is None
        assert brain_start(other, brain, rigid=False) is None


def test_what_does_not_come_to_lie_on_it_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    brain = draw(HERE, np.eye(4))
    noise = pad(torch.rand(1, 1, *(size - 16 for size in HERE.shape), generator=torch.manual_seed(0)), [8] * 6)
    assert brain_start(brain, replace(brain, data=noise), rigid=True) is None
    monkeypatch.setattr(brains, "CORRELATED", -1.0)
    assert brain_start(brain, replace(brain, data=noise), rigid=True) is not None


@pytest.mark.parametrize("slices", [52, 53, 54, 55])
@pytest.mark.parametrize("side", [(0, 1), (0, -1), (1, 1), (1, -1), (2, 1), (2, -1)], ids="RLPASI")
def test_part_of_a_brain_is_left_to_the_search(side: tuple[int, int], slices: int) -> None:
    """Half of it and a little more, whatever of the last voxel of a coarser lattice lies outside."""
    axis, sign = side
    shape, centre = [96, 112, 96], [0.0, 0.0, 0.0]
    shape[axis], centre[axis] = slices, -sign * 40.0
    part = draw(make_grid(tuple(shape), (2.0, 2.0, 2.0), centre=tuple(centre)), np.eye(4))
    brain = draw(HERE, np.eye(4))
    assert brain_start(brain, part, rigid=True) is None
    assert brain_start(part, brain, rigid=True) is None


def test_a_field_of_view_that_just_touches_a_brain_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    brain = draw(HERE, np.eye(4))
    tight = draw(make_grid((66, 86, 88), (2.0, 2.0, 2.0)), np.eye(4))
    assert error_mm(brain_start(brain, tight, rigid=True), np.eye(4)) < 1.5
    part = draw(make_grid((88, 104, 54), (2.0, 2.0, 2.0), centre=(3, -5, -34)), np.eye(4))
    monkeypatch.setattr(brains, "CUT_MM2", np.inf)
    assert error_mm(brain_start(brain, part, rigid=True), np.eye(4)) > 1.5


def test_a_brain_is_not_stretched_more_than_people_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed, moving = draw(HERE, np.eye(4)), draw(HERE, np.diag([1.5, 1.0, 0.9, 1.0]))
    assert brain_start(fixed, moving, rigid=False) is None
    monkeypatch.setattr(brains, "SKEWED", 100.0)
    stretched = brain_start(fixed, moving, rigid=False)
    assert stretched is not None
    assert skew(stretched) > 0.1


def test_skew_is_what_an_even_stretch_does_not_do() -> None:
    assert skew(2.5 * np.eye(4)) == pytest.approx(0, abs=1e-12)
    assert skew(moved((20, -30, 10), (1, 2, 3))) == pytest.approx(0, abs=1e-12)
    assert skew(np.diag([np.e, 1 / np.e, 1, 1])) == pytest.approx(2)


def test_an_inference_mode_of_the_caller_changes_nothing() -> None:
    true = moved((5, 3, -4), (4, 9, -7))
    fixed, moving = draw(HERE, np.eye(4)), draw(THERE, np.linalg.inv(true))
    usual = brain_start(fixed, moving, rigid=True)
    with torch.inference_mode():
        inside = brain_start(draw(HERE, np.eye(4)), draw(THERE, np.linalg.inv(true)), rigid=True)
    assert usual is not None
    np.testing.assert_array_equal(usual, inside)
