"""The affine start finds what was done to a phantom."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from geometry import ELLIPSOIDS, apply_world, draw_head, make_grid
from scipy.spatial.transform import Rotation

from iregzoo.errors import InputError
from iregzoo.space.grid import Grid, Matrix
from iregzoo.space.scan import Scan
from iregzoo.space.start import affine_start, mutual_information

# Around each tissue: centres, and the ends of the head's axes.
LANDMARKS = np.array([centre for _, centre, _ in ELLIPSOIDS] + [(55, 0, 0), (0, -70, 0), (0, 0, 48), (0, 60, -20)])
FIXED_GRID = make_grid((46, 56, 44), (3.0, 3.2, 3.0), centre=(4, -3, 2))


def placed(
    degrees: tuple[float, float, float],
    shift: tuple[float, float, float],
    scale: tuple[float, float, float] = (1, 1, 1),
) -> Matrix:
    world = np.eye(4)
    world[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() * scale
    world[:3, 3] = shift
    return world


def moving_scan(world: Matrix) -> Scan:
    """The head after an affine, in a field of view around it that has its own oblique grid."""
    grid = make_grid(
        (52, 42, 60), (3.0, 3.4, 2.9), degrees=(4, 6, -5), axes=(0, 2, 1), signs=(-1, 1, -1), centre=tuple(world[:3, 3])
    )
    return Scan(draw_head(grid, np.linalg.inv(world)), grid, Path("moving"))


@cache
def fixed_scan() -> Scan:
    return Scan(draw_head(FIXED_GRID), FIXED_GRID, Path("fixed"))


def error_mm(found: Matrix, world: Matrix) -> float:
    apart = apply_world(found, LANDMARKS) - apply_world(world, LANDMARKS)
    return float(np.linalg.norm(apart, axis=1).mean())


CASES = {
    "near": placed((3, -4, 5), (6, -5, 4)),
    "turned 20": placed((20, -5, 4), (12, 8, -10)),
    "150 mm away": placed((5, 12, -20), (150, -40, 30)),
}
SCALED = {
    "larger": placed((8, -3, 6), (5, 9, -7), (1.12, 0.94, 1.06)),
    "150 mm away, turned 20": placed((4, 7, 20), (-30, 20, 150), (0.93, 1.08, 1.0)),
}


@pytest.mark.parametrize("world", CASES.values(), ids=CASES)
def test_rigid_start_finds_a_rigid_motion(world: Matrix) -> None:
    found = affine_start(fixed_scan(), moving_scan(world), "rigid")
    assert error_mm(found, world) < 2.0
    np.testing.assert_allclose(found[:3, :3] @ found[:3, :3].T, np.eye(3), atol=1e-6)


@pytest.mark.parametrize("world", SCALED.values(), ids=SCALED)
def test_affine_start_finds_rotation_shift_and_scale(world: Matrix) -> None:
    assert error_mm(affine_start(fixed_scan(), moving_scan(world), "affine"), world) < 2.0


def test_affine_start_does_not_mind_another_contrast() -> None:
    world = placed((8, -12, 6), (14, 9, -11), (1.05, 0.95, 1.0))
    moving = moving_scan(world)
    inverted = replace(moving, data=(1000 - moving.data) * (moving.data > 60))
    assert error_mm(affine_start(fixed_scan(), inverted, "affine"), world) < 2.0


def test_start_is_the_same_each_time() -> None:
    moving = moving_scan(CASES["near"])
    first, again = (affine_start(fixed_scan(), moving, "rigid") for _ in range(2))
    assert np.array_equal(first, again)


def test_none_trusts_the_headers() -> None:
    assert np.array_equal(affine_start(fixed_scan(), moving_scan(CASES["150 mm away"]), "none"), np.eye(4))


def test_center_puts_one_middle_on_the_other() -> None:
    moving = moving_scan(CASES["150 mm away"])
    found = affine_start(fixed_scan(), moving, "center")
    assert np.array_equal(found[:3, :3], np.eye(3))

    def middle(grid: Grid) -> tuple[float, ...]:
        image = sitk.Image(list(grid.shape), sitk.sitkUInt8)
        image.CopyInformation(grid.to_sitk(np.zeros(grid.shape, np.uint8)))
        return image.TransformContinuousIndexToPhysicalPoint([(size - 1) / 2 for size in grid.shape])

    np.testing.assert_allclose(apply_world(found, np.array(middle(fixed_scan().grid))), middle(moving.grid), atol=1e-9)


@pytest.mark.parametrize("name", ["centre", "", "Affine", "auto"])
def test_unknown_start_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name!r} is unknown; choose .*none, center, rigid, affine"):
        affine_start(fixed_scan(), fixed_scan(), name)


@pytest.mark.parametrize("start", ["rigid", "affine"])
def test_image_is_found_in_its_place(start: str) -> None:
    assert error_mm(affine_start(fixed_scan(), fixed_scan(), start), np.eye(4)) < 0.1


def test_mutual_information_is_entropy_for_itself_and_nothing_for_chance() -> None:
    random = np.random.default_rng(0)
    levels = (random.integers(0, 4, (30, 30, 30)) / 4).astype(np.float32)
    other = (random.integers(0, 4, (30, 30, 30)) / 4).astype(np.float32)
    assert mutual_information(levels, levels) == pytest.approx(np.log(4), abs=1e-3)
    assert mutual_information(levels, 1 - levels) == pytest.approx(np.log(4), abs=1e-3)
    assert mutual_information(levels, other) < 1e-3
