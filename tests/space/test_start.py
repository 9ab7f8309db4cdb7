"""The affine start finds what was done to a phantom."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.spatial.transform import Rotation

from finders import Says
from geometry import ELLIPSOIDS, apply_world, draw_head, make_grid, noise_image, world_points
from iregzoo.errors import InputError
from iregzoo.space import start
from iregzoo.space.grid import Grid, Matrix
from iregzoo.space.scan import Scan, read_scan
from iregzoo.space.start import affine_start, mutual_information

SIZE = 0.7  # of the phantom: a small head is as hard to find, and sooner found
# The middle of each tissue, and places near the surface.
PLACES = [centre for _, centre, _ in ELLIPSOIDS] + [(55, 0, 0), (0, -70, 0), (0, 0, 48), (0, 60, -20)]
LANDMARKS = SIZE * np.array(PLACES)
FIXED_GRID = make_grid((46, 56, 44), (2.1, 2.2, 2.1), centre=(4, -3, 2))


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
        (52, 42, 60), (2.1, 2.4, 2.0), degrees=(4, 6, -5), axes=(0, 2, 1), signs=(-1, 1, -1), centre=tuple(world[:3, 3])
    )
    return Scan(draw_head(grid, np.linalg.inv(world), size=SIZE), grid, Path("moving"))


@cache
def fixed_scan() -> Scan:
    return Scan(draw_head(FIXED_GRID, size=SIZE), FIXED_GRID, Path("fixed"))


def error_mm(found: Matrix, world: Matrix) -> float:
    apart = apply_world(found, LANDMARKS) - apply_world(world, LANDMARKS)
    return float(np.linalg.norm(apart, axis=1).mean())


AWAY = placed((20, 5, -4), (150, -40, 30))
SCALED = {
    "near": placed((-8, 3, 20), (5, 9, -7), (1.12, 0.94, 1.06)),
    "150 mm away": placed((4, 20, 7), (-30, 20, 150), (0.93, 1.08, 1.0)),
}


def test_rigid_start_finds_a_rigid_motion_and_the_same_each_time() -> None:
    # The fields of view do not touch.
    first, again = (affine_start(fixed_scan(), moving_scan(AWAY), "rigid") for _ in range(2))
    assert error_mm(first, AWAY) < 2.0
    np.testing.assert_allclose(first[:3, :3] @ first[:3, :3].T, np.eye(3), atol=1e-6)
    np.testing.assert_array_equal(first, again)


@pytest.fixture
def itk_threads() -> Iterator[Callable[[int], None]]:
    usual = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    yield sitk.ProcessObject.SetGlobalDefaultNumberOfThreads
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(usual)


def test_affine_start_of_real_scans_is_the_same_whatever_the_threads(
    test_data: Path, itk_threads: Callable[[int], None]
) -> None:
    folder = test_data / "hippocampus" / "images"
    fixed, moving = (read_scan(folder / f"hippocampus_{number}.nii.gz") for number in ("087", "105"))
    found = []
    for threads in (1, 2, 4, 4):
        itk_threads(threads)
        found.append(affine_start(fixed, moving, "affine"))
        assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == threads
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


@pytest.mark.parametrize("world", SCALED.values(), ids=SCALED)
def test_affine_start_finds_rotation_shift_and_scale(world: Matrix) -> None:
    assert error_mm(affine_start(fixed_scan(), moving_scan(world), "affine"), world) < 2.0


def outline(size: float, seed: int) -> Scan:
    """An ellipsoid of noise of its own."""
    grid = make_grid((60, 72, 56), (2.6, 2.6, 2.6))
    inside = np.linalg.norm(world_points(grid) / (62 * size, 78 * size, 56 * size), axis=-1) < 1
    return Scan(torch.from_numpy(inside)[None, None] * noise_image(grid.shape, seed), grid, Path("outline"))


@pytest.mark.parametrize("size", [0.9, 1.1])
def test_people_of_other_sizes_are_stretched(size: float) -> None:
    found = affine_start(outline(1 / size, 0), outline(1, 1), "affine")
    assert np.linalg.det(found[:3, :3]) == pytest.approx(size**3, rel=0.05)


@pytest.mark.parametrize("size", [0.7, 1.4])
def test_a_brain_is_not_stretched_to_a_head(size: float) -> None:
    found = affine_start(outline(1 / size, 0), outline(1, 1), "affine")
    np.testing.assert_allclose(found[:3, :3] @ found[:3, :3].T, np.eye(3), atol=1e-6)


@pytest.mark.parametrize(("start", "asked"), [("affine", [False]), ("rigid", [True]), ("center", []), ("none", [])])
def test_what_finds_starts_is_asked_in_place_of_the_search(start: str, asked: list[bool]) -> None:
    seen: list[bool] = []

    def find(fixed: Scan, moving: Scan, *, rigid: bool) -> Matrix:
        assert (fixed.path, moving.path) == (fixed_scan().path, moving_scan(AWAY).path)
        seen.append(rigid)
        return AWAY

    found = affine_start(fixed_scan(), moving_scan(AWAY), start, find)
    assert seen == asked
    assert np.array_equal(found, AWAY) == bool(asked)
    given = np.diag([2.0, 1, 1, 1])
    assert np.array_equal(affine_start(fixed_scan(), moving_scan(AWAY), given, find), given)


def test_where_nothing_is_found_the_scans_are_searched() -> None:
    found = affine_start(fixed_scan(), moving_scan(AWAY), "rigid", Says(None))
    assert np.array_equal(found, affine_start(fixed_scan(), moving_scan(AWAY), "rigid"))


def test_affine_start_does_not_mind_another_contrast() -> None:
    world = placed((8, -12, 6), (14, 9, -11), (1.05, 0.95, 1.0))
    moving = moving_scan(world)
    inverted = replace(moving, data=(1000 - moving.data) * (moving.data > 60))
    assert error_mm(affine_start(fixed_scan(), inverted, "affine"), world) < 2.0


@pytest.mark.parametrize(
    ("shifts", "searches"),
    [
        ((0, 5, -10), 1),  # near each other: they would end in one place
        ((0, 10, 40), 2),
        ((0, 40, 80), 2),  # the first two end in one place, so the third is left out
        ((0, 1000, 40), 3),  # nothing is to be seen from the second, so it confirms nothing
    ],
)
def test_places_are_searched_from_as_long_as_that_may_find_another(
    shifts: tuple[int, ...], searches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = placed((0, 0, 5), (2, 1, 0))  # nearly where ITK leaves what it gives up
    begun: list[sitk.Transform] = []
    search = start._optimise

    def counted(scans: tuple[Scan, Scan], initial: sitk.Transform, *, steps: int) -> Matrix | None:
        begun.append(initial)
        return search(scans, initial, steps=steps)

    monkeypatch.setattr(start, "_optimise", counted)
    places = [placed((0, 0, 0), (x, 0, 0)) for x in shifts]
    found = start._rigid((fixed_scan(), moving_scan(world)), places, fixed_scan())
    assert len(begun) == searches
    assert len(found) == searches - (1000 in shifts)
    assert error_mm(found[0], world) < 2.0


def test_near_and_far_are_parts_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a crop of a few centimetres, places 10 mm apart are not near each other.
    small = replace(FIXED_GRID, affine=FIXED_GRID.affine @ np.diag([0.3, 0.3, 0.3, 1]))
    begun: list[sitk.Transform] = []
    monkeypatch.setattr(start, "_optimise", lambda scans, initial, *, steps: begun.append(initial))
    places = [placed((0, 0, 0), (x, 0, 0)) for x in (0, 10)]
    for grid, searches in ((FIXED_GRID, 1), (small, 2)):
        begun.clear()
        scan = replace(fixed_scan(), grid=grid)
        start._rigid((scan, scan), places, scan)
        assert len(begun) == searches


def test_none_trusts_the_headers() -> None:
    assert np.array_equal(affine_start(fixed_scan(), moving_scan(AWAY), "none"), np.eye(4))


def test_center_puts_one_middle_on_the_other() -> None:
    moving = moving_scan(AWAY)
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


def test_a_matrix_is_taken_as_it_is() -> None:
    assert np.array_equal(affine_start(fixed_scan(), moving_scan(AWAY), AWAY), AWAY)


@pytest.mark.parametrize(
    "matrix",
    [np.eye(3), np.diag([1.0, 0.0, 1.0, 1.0]), np.diag([1.0, np.nan, 1.0, 1.0]), np.diag([1.0, 1.0, 1.0, 2.0])],
    ids=["small", "singular", "nan", "projective"],
)
def test_a_matrix_that_is_no_affine_is_refused(matrix: Matrix) -> None:
    with pytest.raises(InputError, match=r"init: the matrix \[\[1.0, 0.0.* is not an invertible affine \(4, 4\)"):
        affine_start(fixed_scan(), fixed_scan(), matrix)


@pytest.mark.parametrize("start", ["none", "center", "rigid", "affine"])
def test_scans_larger_than_people_are_refused(start: str) -> None:
    grid = make_grid((64, 50, 64), (100.0, 100.0, 100.0))
    huge = Scan(torch.rand(1, 1, *grid.shape), grid, Path("huge.nii.gz"))
    for pair in ((huge, fixed_scan()), (fixed_scan(), huge)):
        with pytest.raises(InputError, match=r"huge.nii.gz: measures 6400×5000×6400 mm.* voxels of 100×100×100 mm"):
            affine_start(*pair, start)


def test_whole_people_are_not_too_large() -> None:
    for shape, spacing in (((512, 512, 1000), 1.5), ((350, 350, 1000), 2.0)):
        body = Scan(torch.zeros(1, 1, 1, 1, 1).expand(1, 1, *shape), make_grid(shape, (spacing,) * 3), Path("body.nii"))
        assert np.array_equal(affine_start(body, body, "none"), np.eye(4))


def test_image_is_found_in_its_place() -> None:
    assert error_mm(affine_start(fixed_scan(), fixed_scan(), "affine"), np.eye(4)) < 0.1


def test_mutual_information_is_entropy_for_itself_and_nothing_for_chance() -> None:
    random = np.random.default_rng(0)
    levels = (random.integers(0, 4, (30, 30, 30)) / 4).astype(np.float32)
    other = (random.integers(0, 4, (30, 30, 30)) / 4).astype(np.float32)
    assert mutual_information(levels, levels) == pytest.approx(np.log(4), abs=1e-3)
    assert mutual_information(levels, 1 - levels) == pytest.approx(np.log(4), abs=1e-3)
    assert mutual_information(levels, other) < 1e-3
    with np.errstate(all="raise"):
        assert mutual_information(levels + 2, other) == 0  # without a voxel in [0, 1]


def test_a_thin_and_wide_scan_is_not_blown_up() -> None:
    """Sixteen voxels on its short axis would make four thousand of the others."""
    grid = make_grid((512, 512, 2))
    small = start.isotropic(Scan(torch.zeros(1, 1, *grid.shape), grid, Path("thin")), 2.5)
    assert np.prod(small.grid.shape) < 2 * start.MOST_VOXELS
    head = start.isotropic(fixed_scan(), 2.5)
    np.testing.assert_allclose(head.grid.spacing, 2.5)
