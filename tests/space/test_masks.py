"""Masks: what counts is the same places in the scanner, whatever the grids; what is wrong with one is said."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch import Tensor

from geometry import AFFINE, GRIDS, apply_world, waves, world_points
from iregzoo.errors import InputError
from iregzoo.space.frame import Frame, affine_displacement
from iregzoo.space.grid import Grid, network_grid
from iregzoo.space.masks import Masks, fill_holes
from iregzoo.space.scan import Scan, mask_scan, read_mask

RADIUS_MM = 9.0
ASIDE = np.array([4, 0, 0])


def ball(grid: Grid, places: np.ndarray | None = None, centre: np.ndarray | None = None) -> np.ndarray:
    """Whether places, by default a grid's voxels, are near a centre: by default the grid's, so that all agree on it."""
    places = world_points(grid) if places is None else places
    return np.linalg.norm(places - (grid.centre if centre is None else centre), axis=-1) < RADIUS_MM


def scan_on(grid: Grid) -> Scan:
    return Scan(torch.rand(1, 1, *grid.shape), grid, Path("scan"))


def mask_on(grid: Grid, counted: np.ndarray) -> Scan:
    return mask_scan(0.25 * counted, grid, "mask", scan_on(grid))


def differing(found: Tensor, expected: np.ndarray) -> float:
    return float((found[0, 0].numpy() != expected).mean())


@pytest.mark.parametrize("name", GRIDS)
def test_what_counts_is_a_place_in_the_scanner(name: str) -> None:
    """The fixed mask by where a voxel is, the moving mask by where it goes: an affine, then a field."""
    fixed, moving = GRIDS[name], GRIDS["oblique"]
    start = AFFINE.copy()
    start[:3, 3] += moving.centre - apply_world(AFFINE, fixed.centre)
    network = network_grid(fixed, (1.5, 1.5, 1.5), stride=4)
    frame = Frame(fixed, moving, network, start)
    deformation = waves(network)
    masks = Masks(mask_on(fixed, ball(fixed)), mask_on(moving, ~ball(moving, centre=moving.centre + ASIDE)))
    found = masks.counted_in(frame, network.in_voxels(deformation))
    here = world_points(network)
    there = apply_world(start, here + deformation[0].movedim(0, -1).numpy())
    expected = ball(fixed, here) & ~ball(moving, there, moving.centre + ASIDE)
    assert 0.01 < expected.mean() < 0.5
    # Voxels at a mask's edge alone, where it is read from the nearest of its own voxels.
    assert differing(found, expected) < 0.35 * expected.mean()
    assert differing(masks.counted(fixed, affine_displacement(start, fixed)), np.zeros(fixed.shape, bool)) > 0.01
    itself = Masks(masks.fixed).counted(fixed, affine_displacement(start, fixed))
    assert differing(itself, ball(fixed)) == 0


def test_beyond_the_field_of_view_a_mask_goes_on_as_at_its_border() -> None:
    grid = GRIDS["flipped"]
    wide = network_grid(grid, (1.0, 1.0, 1.0), stride=16, minimum=(64, 64, 64))
    far = affine_displacement(np.array([[1, 0, 0, 500], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), wide)
    hole, core = ~ball(grid), ball(grid)
    for counted, beyond in ((hole, True), (core, False)):
        assert bool(Masks(mask_on(grid, counted)).counted(wide, far)[0, 0, 0, 0, 0]) == beyond
        assert bool(Masks(moving=mask_on(grid, counted)).counted(wide, far).all()) == beyond
        assert bool(Masks(moving=mask_on(grid, counted)).counted(wide, far).any()) == beyond
    assert Masks(mask_on(grid, np.ones(grid.shape)), mask_on(grid, np.ones(grid.shape))).counted(wide, far).all()


def test_holes_are_filled_from_around_them_and_nothing_else_is() -> None:
    grid = GRIDS["oblique"]
    scan, counted = scan_on(grid), ~ball(grid)
    counted[:, -3:] = False  # as outside a brain
    mask = mask_on(grid, counted)
    for inside in (np.nan, -7.0):
        given = replace(scan, data=scan.data.where(torch.from_numpy(~ball(grid)), inside))
        found = fill_holes(given, mask).data[0, 0].numpy()
        assert np.array_equal(found[~ball(grid)], scan.data[0, 0].numpy()[~ball(grid)])
        assert (np.abs(found[ball(grid)] - 0.5) < 0.5).all()
        assert found[ball(grid)].std() < 0.5 * found[~ball(grid)].std()
    assert fill_holes(scan, None) is scan
    assert fill_holes(scan, mask_on(grid, ball(grid))) is scan
    level = replace(scan, data=torch.full_like(scan.data, 3.7))
    assert torch.equal(fill_holes(level, mask).data, level.data)
    closed = Masks(mask, mask_on(grid, ball(grid))).closed()
    expected = np.ones(grid.shape, bool)
    expected[:, -3:] = False
    assert [differing(found.data, each) for found, each in zip(closed, (expected, ball(grid)), strict=True)] == [0, 0]
    assert not Masks().closed()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda mask: mask * 0, "is zero everywhere; set the voxels that count to 1"),
        (lambda mask: np.where(mask, np.nan, 0), "voxels are NaN or infinite"),
        (lambda mask: mask[1:], "differs from that of scan .*; resample the mask to the image"),
    ],
)
def test_a_mask_that_is_none_is_refused(tmp_path: Path, damage: object, said: str) -> None:
    grid, path = GRIDS["oblique"], tmp_path / "mask.nii.gz"
    assert callable(damage)
    array = damage(ball(grid).astype(np.float32))
    sitk.WriteImage(Grid(array.shape, grid.affine).to_sitk(array), str(path))
    with pytest.raises(InputError, match=f"^{path}: .*{said}"):
        read_mask(path, scan_on(grid))


def test_any_number_but_zero_counts(tmp_path: Path) -> None:
    grid, path = GRIDS["oblique"], tmp_path / "mask.nii.gz"
    sitk.WriteImage(grid.to_sitk(np.where(ball(grid), -0.5, 0).astype(np.float32)), str(path))
    found = read_mask(path, scan_on(grid))
    assert found.data.dtype == torch.uint8
    assert differing(found.data, ball(grid)) == 0
