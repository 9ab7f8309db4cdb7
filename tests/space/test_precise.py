"""A start made precise lies within a tenth of a voxel of what was done to a phantom."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch.nn.functional import avg_pool3d, pad

from geometry import ELLIPSOIDS, apply_world, draw_head, make_grid, world_points
from iregzoo.space import precise
from iregzoo.space.grid import Matrix
from iregzoo.space.masks import Masks
from iregzoo.space.precise import precise_start
from iregzoo.space.scan import Scan

SIZE = 0.7
LANDMARKS = SIZE * np.array([centre for _, centre, _ in ELLIPSOIDS])
FIXED_GRID = make_grid((46, 56, 44), (2.1, 2.2, 2.1), centre=(4, -3, 2))
MOVING_GRID = make_grid((60, 52, 54), (2.0, 2.4, 2.1), degrees=(4, 6, -5), axes=(0, 2, 1), signs=(-1, 1, -1))


def world(degrees: float, shift: float, stretch: float = 0.0) -> Matrix:
    matrix = np.eye(4)
    turned = Rotation.from_euler("xyz", degrees * np.array([1, -0.6, 0.8]), degrees=True).as_matrix()
    matrix[:3, :3] = turned * (1 + stretch * np.array([1, -1, 0.5]))
    matrix[:3, 3] = shift * np.array([1, -0.5, 0.7])
    return matrix


RIGID, STRETCHED = world(9, 5), world(9, 5, 0.06)
NEAR = world(0.4, 0.5, 0.004)  # as far as a search may be off


@cache
def fixed_scan() -> Scan:
    return Scan(draw_head(FIXED_GRID, size=SIZE), FIXED_GRID, Path("fixed"))


@cache
def moving_scan(stretched: bool) -> Scan:
    moved = STRETCHED if stretched else RIGID
    return Scan(draw_head(MOVING_GRID, np.linalg.inv(moved), size=SIZE), MOVING_GRID, Path("moving"))


def error_mm(found: Matrix, true: Matrix) -> float:
    return float(np.linalg.norm(apply_world(found, LANDMARKS) - apply_world(true, LANDMARKS), axis=1).mean())


def unlike(scan: Scan) -> Scan:
    """Another contrast, with a bias field and noise, as of another day and sequence."""
    along = torch.from_numpy(world_points(scan.grid)[..., 0] / 100)[None, None].float()
    noise = 3 * torch.randn(scan.data.shape, generator=torch.manual_seed(0))
    return replace(scan, data=(scan.data * (1000 - scan.data) / 250 + noise) * torch.exp(0.3 * along))


@pytest.mark.parametrize(("stretched", "rigid"), [(False, True), (False, False), (True, False)])
@pytest.mark.parametrize(("look", "most"), [(lambda scan: scan, 0.08), (unlike, 0.25)], ids=["alike", "unlike"])
def test_a_start_near_the_result_becomes_precise(
    stretched: bool, rigid: bool, look: Callable[[Scan], Scan], most: float
) -> None:
    true = STRETCHED if stretched else RIGID
    begun = true @ world(0.4, 0.5, 0 if rigid else 0.004)
    assert error_mm(begun, true) > 0.5
    assert error_mm(precise_start(fixed_scan(), look(moving_scan(stretched)), begun, rigid=rigid).start, true) < most


def test_a_rigid_start_stays_rigid_and_an_affine_one_keeps_its_stretch() -> None:
    found = precise_start(fixed_scan(), moving_scan(False), RIGID @ world(0.4, 0.5), rigid=True).start
    np.testing.assert_allclose(found[:3, :3] @ found[:3, :3].T, np.eye(3), atol=1e-9)
    assert np.linalg.det(found[:3, :3]) > 0
    kept = precise_start(fixed_scan(), moving_scan(True), STRETCHED @ world(0.4, 0.5), rigid=True).start
    np.testing.assert_allclose(kept[:3, :3].T @ kept[:3, :3], (STRETCHED.T @ STRETCHED)[:3, :3], atol=1e-2)
    np.testing.assert_array_equal(found[3], (0, 0, 0, 1))


def test_a_scan_with_itself_keeps_its_start_exactly() -> None:
    for rigid in (True, False):
        found = precise_start(fixed_scan(), fixed_scan(), np.eye(4), rigid=rigid)
        np.testing.assert_array_equal(found.start, np.eye(4))
        assert found.shared == pytest.approx(1, abs=1e-3)


def test_where_nothing_is_told_the_start_stays() -> None:
    flat = replace(moving_scan(False), data=torch.full_like(moving_scan(False).data, 7.0))
    found = precise_start(fixed_scan(), flat, NEAR, rigid=False)
    np.testing.assert_array_equal(found.start, NEAR)
    assert not found.one_person


def person(seed: int, half_axes: tuple[int, int, int]) -> Scan:
    """An ellipsoid of a texture of its own."""
    texture = torch.rand(1, 1, *FIXED_GRID.shape, generator=torch.manual_seed(seed))
    for _ in range(2):
        texture = avg_pool3d(pad(texture, [2] * 6, mode="reflect"), 5, 1)
    inside = np.linalg.norm((world_points(FIXED_GRID) - FIXED_GRID.centre) / half_axes, axis=-1) < 1
    return Scan(torch.where(torch.from_numpy(inside)[None, None], 1000 * texture, 0), FIXED_GRID, Path("person"))


def test_people_who_share_too_little_are_not_led_astray(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = person(2, (35, 45, 35)), person(3, (42, 50, 30))
    kept = precise_start(one, other, np.eye(4), rigid=True)
    np.testing.assert_array_equal(kept.start, np.eye(4))
    assert 0 < kept.shared < precise.SHARED
    assert not kept.one_person
    monkeypatch.setattr(precise, "SHARED", 0.0)
    astray = precise_start(one, other, np.eye(4), rigid=True).start
    assert FIXED_GRID.farthest(astray @ FIXED_GRID.affine, FIXED_GRID.affine) > 20


def test_what_a_mask_leaves_out_draws_nothing() -> None:
    """A large implant that is a voxel farther on the second day."""
    there = np.linalg.norm((world_points(FIXED_GRID) - (0, -35, 10)) / (24, 16, 20), axis=-1) < 1
    before = np.linalg.norm((world_points(FIXED_GRID) - (0, -32.8, 10)) / (24, 16, 20), axis=-1) < 1
    textured = 2000 + 1500 * torch.rand(1, 1, *FIXED_GRID.shape, generator=torch.manual_seed(1))
    coarse = avg_pool3d(textured, 5, 1, 2)
    shift = torch.from_numpy(there)[None, None], torch.from_numpy(before)[None, None]
    head = fixed_scan().data
    fixed = replace(fixed_scan(), data=torch.where(shift[0], coarse, head))
    moving = replace(fixed_scan(), data=torch.where(shift[1], coarse.roll(1, 3), head))
    mask = replace(fixed_scan(), data=(~(shift[0] | shift[1])).to(torch.uint8))
    begun = world(0.4, 0.5)
    with_mask = precise_start(fixed, moving, begun, rigid=True, masks=Masks(mask)).start
    assert error_mm(with_mask, np.eye(4)) < 0.05
    assert error_mm(precise_start(fixed, moving, begun, rigid=True).start, np.eye(4)) > 2 * error_mm(
        with_mask, np.eye(4)
    )


def test_lattices_are_no_finer_than_the_coarser_scan_and_no_larger_than_they_may_be() -> None:
    thin = make_grid((160, 160, 4), (1.0, 1.0, 1.0))
    assert precise.lattice_spacing(thin, thin) == pytest.approx(1)
    assert precise.lattice_spacing(thin, make_grid((20, 20, 20), (2.0, 2.0, 2.0))) == pytest.approx(2)
    wide = make_grid((400, 400, 400), (1.0, 1.0, 1.0))
    assert (400 / precise.lattice_spacing(wide, wide)) ** 3 == pytest.approx(precise.VOXELS)
