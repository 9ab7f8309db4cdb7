"""From the network's grid to the fixed scan's, in millimetres, against numpy and SimpleITK."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from geometry import (
    GRIDS,
    apply_world,
    draw_head,
    field_transform,
    from_image,
    make_grid,
    move_all,
    noise_image,
    to_image,
    waves,
    world_points,
)
from iregzoo.fields import inverse_error, invert
from iregzoo.jacobian import jacobian_determinant
from iregzoo.space import frame as frame_module
from iregzoo.space.frame import Frame, affine_displacement, make_frame, network_input, warp_scan
from iregzoo.space.grid import Grid, Matrix, network_grid, pull, slabs, to_voxels
from iregzoo.space.scan import Scan, normalise

EACH_GRID = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
LINEAR = Rotation.from_euler("xyz", (7, -4, 10), degrees=True).as_matrix() * (1.05, 0.97, 1.1)
START: Matrix = np.block([[LINEAR, np.array([[4.0], [-7.5], [11.0]])], [np.zeros((1, 3)), np.ones((1, 1))]])


def frame_of(fixed: Grid, moving: Grid | None = None, start: Matrix | None = None, spacing: float = 1.3) -> Frame:
    network = network_grid(fixed, (spacing,) * 3, stride=8)
    return Frame(fixed, moving or fixed, network, np.eye(4) if start is None else start)


def network_field(frame: Frame, mm: Tensor) -> Tensor:
    """A displacement in mm on the network's grid in its own voxels, as a network gives it."""
    linear = torch.from_numpy(np.linalg.inv(frame.network.affine[:3, :3]))
    return torch.einsum("ij,bj...->bi...", linear, mm).float()


def scan_of(data: Tensor, grid: Grid) -> Scan:
    return Scan(data, grid, Path("scan.nii.gz"))


def at_points(displacement: Tensor) -> np.ndarray:
    return np.moveaxis(displacement[0].numpy(), 0, -1)


@EACH_GRID
def test_shift_arrives_as_the_same_millimetres_everywhere(grid: Grid) -> None:
    frame = frame_of(grid)
    shift = np.array([3.0, -5.0, 1.5])
    mm = torch.from_numpy(shift).view(1, 3, 1, 1, 1).expand(1, 3, *frame.network.shape)
    found = at_points(frame.deform(network_field(frame, mm)))
    np.testing.assert_allclose(found, np.broadcast_to(shift, found.shape), atol=1e-5)


@EACH_GRID
def test_one_voxel_along_a_network_axis_is_one_step_of_that_axis(grid: Grid) -> None:
    frame = frame_of(grid)
    for axis in range(3):
        field = torch.zeros(1, 3, *frame.network.shape, dtype=torch.float64)
        field[:, axis] = 1
        found = at_points(frame.deform(field))
        np.testing.assert_allclose(found, np.broadcast_to(frame.network.affine[:3, axis], found.shape), atol=1e-9)


@EACH_GRID
def test_linear_displacement_arrives_exactly(grid: Grid) -> None:
    frame = frame_of(grid)
    matrix = 0.05 * np.array([[1.0, -0.7, 0.3], [0.4, -0.8, 0.5], [-0.2, 0.6, 0.7]])
    mm = torch.from_numpy(np.moveaxis(world_points(frame.network) @ matrix.T, -1, 0).copy())[None]
    found = at_points(frame.deform(network_field(frame, mm)))
    expected = world_points(grid) @ matrix.T
    # The outermost half voxel of the image may lie beyond the centres of the network's outermost voxels.
    inside = (slice(2, -2),) * 3
    np.testing.assert_allclose(found[inside], expected[inside], atol=1e-4)


def test_border_displacement_goes_on_beyond_the_network_grid() -> None:
    fixed = make_grid((40, 40, 40))
    network = make_grid((16, 16, 16))
    frame = Frame(fixed, fixed, network, np.eye(4))
    field = waves(network).float()
    found = frame.deform(field)[0]
    for side, edge in ((0, 0), (39, 15)):
        torch.testing.assert_close(found[:, side, 12:28, 12:28].float(), field[0, :, edge], rtol=0, atol=1e-5)


@EACH_GRID
def test_total_is_the_deformation_and_then_the_affine(grid: Grid) -> None:
    frame = frame_of(grid, start=START)
    deformation = waves(grid)
    expected = apply_world(START, world_points(grid) + at_points(deformation)) - world_points(grid)
    np.testing.assert_allclose(at_points(frame.total(deformation)), expected, atol=1e-9)
    np.testing.assert_allclose(
        at_points(affine_displacement(START, grid)),
        apply_world(START, world_points(grid)) - world_points(grid),
        atol=1e-9,
    )


@pytest.mark.parametrize(("fixed", "moving"), [("oblique", "everything"), ("everything", "flipped")])
def test_backward_undoes_total(fixed: str, moving: str) -> None:
    fixed_grid = GRIDS[fixed]
    # The moving grid lies where the start takes the fixed image.
    centre = apply_world(START, fixed_grid.centre)
    affine = GRIDS[moving].affine.copy()
    affine[:3, 3] += centre - GRIDS[moving].centre
    frame = frame_of(fixed_grid, Grid(GRIDS[moving].shape, affine), START, spacing=1.0)
    field = network_field(frame, waves(frame.network, 2.0))
    inverted = invert(field, tolerance=1e-4)
    assert float(inverse_error(field, inverted)[0, 6:-6, 6:-6, 6:-6].max()) < 0.02
    places = world_points(frame.moving)
    back = places + at_points(frame.backward(inverted))
    # Forward from there by ITK's own reading of the forward displacement, where that is defined.
    total = field_transform(frame.total(frame.deform(field)), fixed_grid)
    image = fixed_grid.to_sitk(np.zeros(fixed_grid.shape))
    index = np.array([image.TransformPhysicalPointToContinuousIndex(p.tolist()) for p in back.reshape(-1, 3)])
    inside = ((index > 3) & (index < np.array(fixed_grid.shape) - 4)).all(1)
    assert inside.sum() > 1000
    error = np.linalg.norm(move_all(total, back.reshape(-1, 3)[inside]) - places.reshape(-1, 3)[inside], axis=1)
    print(f"backward then forward: at most {error.max():.4f} mm")
    assert error.max() < 0.05


@pytest.mark.parametrize(
    ("fixed", "moving"), [("oblique", "everything"), ("everything", "flipped"), ("plain", "plain")]
)
@pytest.mark.parametrize("offset", [0.0, 400.0])
def test_warp_is_itks_resampler_everywhere(fixed: str, moving: str, offset: float) -> None:
    grid, onto = GRIDS[moving], GRIDS[fixed]
    data = noise_image(grid.shape) - offset  # below 0: as in CT, what lies outside is the lowest value
    scan = scan_of(data, grid)
    displacement = waves(onto, 6.0) + torch.from_numpy(grid.centre - onto.centre).view(1, 3, 1, 1, 1)
    expected = from_image(
        sitk.Resample(
            to_image(data, grid),
            onto.to_sitk(np.zeros(onto.shape)),
            field_transform(displacement, onto),
            sitk.sitkLinear,
            scan.outside,
            sitk.sitkFloat32,
        )
    )
    found = warp_scan(scan, displacement, onto)
    assert scan.outside <= 0
    assert float((expected != scan.outside).float().mean()) > 0.1
    difference = float((found - expected).abs().max()) / float(data.max() - data.min())
    print(f"warp against ITK: at most {difference:.1e} of the range")
    assert difference < 1e-4


@pytest.mark.parametrize(("fixed", "moving"), [("oblique", "everything"), ("everything", "flipped")])
def test_labels_are_warped_as_itk_warps_them(fixed: str, moving: str) -> None:
    grid, onto = GRIDS[moving], GRIDS[fixed]
    labels = torch.randint(0, 5, (1, 1, *grid.shape), generator=torch.manual_seed(0), dtype=torch.int32)
    displacement = waves(onto, 6.0) + torch.from_numpy(grid.centre - onto.centre).view(1, 3, 1, 1, 1)
    reference, transform = onto.to_sitk(np.zeros(onto.shape)), field_transform(displacement, onto)
    expected = from_image(sitk.Resample(to_image(labels, grid), reference, transform, sitk.sitkNearestNeighbor))
    found = warp_scan(scan_of(labels, grid), displacement, onto, mode="nearest")
    assert found.dtype == torch.int32
    assert torch.equal(found, expected)


def test_large_grids_are_read_in_slabs_as_in_one() -> None:
    grid, onto = GRIDS["everything"], make_grid((130, 50, 60), degrees=(5, -8, 3))
    shape = onto.shape
    assert len(list(slabs(shape))) > 1
    data = noise_image(grid.shape)
    scan = scan_of(data, grid)
    displacement = waves(onto, 6.0) + torch.from_numpy(grid.centre - onto.centre).view(1, 3, 1, 1, 1)
    reference, transform = onto.to_sitk(np.zeros(shape)), field_transform(displacement, onto)
    expected = from_image(sitk.Resample(to_image(data, grid), reference, transform, sitk.sitkLinear))
    assert float((expected > 0).float().mean()) > 0.01
    apart = (warp_scan(scan, displacement, onto) - expected).abs() > 1e-4 * float(data.max())
    assert int(apart.sum()) <= 2  # within a ten-thousandth of a voxel from the border of what the scan shows
    still = affine_displacement(START, onto)
    turned = warp_scan(scan, still, onto)
    assert float((pull(data, to_voxels(onto, START, grid), shape) - turned).abs().max()) < 1e-4 * float(data.max())
    assert torch.equal(frame_of(onto, start=START).total(torch.zeros_like(still)), still)


@EACH_GRID
def test_jacobian_is_itks(grid: Grid) -> None:
    deformation = waves(grid, 3.0, length_mm=25.0)
    found = jacobian_determinant(frame_of(grid).in_voxels(deformation))[0].numpy()
    # ITK's filter differentiates along the image's axes and takes the vectors to have the same, so both are given so.
    direction = grid.affine[:3, :3] / grid.spacing
    vectors = np.moveaxis(np.einsum("ji,j...->i...", direction, deformation[0].numpy()), 0, -1)
    upright = Grid(grid.shape, np.diag([*grid.spacing, 1.0]))
    determinant = sitk.DisplacementFieldJacobianDeterminantFilter()
    determinant.SetUseImageSpacing(True)
    expected = from_image(determinant.Execute(upright.to_sitk(vectors, vector=True)))[0, 0].numpy()
    inside = (slice(1, -1),) * 3
    assert expected[inside].std() > 0.1
    np.testing.assert_allclose(found[inside], expected[inside], atol=1e-5)


def test_network_sees_what_the_start_brings_together() -> None:
    fixed_grid = make_grid((40, 48, 38), (3, 3, 3))
    moving_grid = make_grid(
        (50, 40, 46), (3, 3.5, 3), axes=(2, 0, 1), signs=(-1, 1, 1), degrees=(5, 5, 5), centre=tuple(START[:3, 3])
    )
    fixed = scan_of(draw_head(fixed_grid), fixed_grid)
    moving = scan_of(draw_head(moving_grid, np.linalg.inv(START)) * 3 + 20, moving_grid)
    frame = make_frame(fixed, moving, START, spacing=(3, 3, 3), stride=8, minimum=(1, 1, 1))
    seen = network_input(frame, fixed, moving)
    assert seen.shape == (1, 2, *frame.network.shape)
    assert float(seen.min()) >= 0
    assert float(seen.max()) < 1 + 1e-6
    started = float((seen[:, 0] - seen[:, 1]).abs().mean())
    unmoved = network_input(Frame(fixed.grid, moving.grid, frame.network, np.eye(4)), fixed, moving)
    assert started < 0.02
    assert float((unmoved[:, 0] - unmoved[:, 1]).abs().mean()) > 5 * started


def test_large_images_get_a_coarser_network_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = make_grid((40, 60, 50))
    scan = scan_of(noise_image(grid.shape), grid)
    whole = make_frame(scan, scan, np.eye(4), spacing=(1, 1, 2), stride=1, minimum=(1, 1, 1)).network
    assert whole.shape == (40, 60, 25)
    monkeypatch.setattr(frame_module, "MAX_VOXELS", 40 * 60 * 25)
    assert make_frame(scan, scan, np.eye(4), spacing=(1, 1, 2), stride=1, minimum=(1, 1, 1)).network.matches(whole)
    monkeypatch.setattr(frame_module, "MAX_VOXELS", 20_000)
    coarser = make_frame(scan, scan, np.eye(4), spacing=(1, 1, 2), stride=1, minimum=(1, 1, 1)).network
    np.testing.assert_allclose(coarser.spacing, np.array([1, 1, 2]) * 3 ** (1 / 3))
    assert (np.array(coarser.shape) * coarser.spacing >= np.array(grid.shape) - 0.01).all()
    assert np.prod(coarser.shape) < 1.15 * 20_000  # whole voxels


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1)])
def test_network_grid_leaves_out_an_empty_background_but_a_margin(signs: tuple[int, int, int]) -> None:
    grid = make_grid((80, 70, 30), (1.0, 1.0, 4.0), signs=signs, degrees=(0, 0, 10))
    data = torch.zeros(1, 1, *grid.shape)
    low, high = np.array([25, 5, 12]), np.array([45, 30, 15])
    data[0, 0, low[0] : high[0], low[1] : high[1], low[2] : high[2]] = noise_image((20, 25, 3))
    scan = scan_of(data, grid)
    network = make_frame(scan, scan, np.eye(4), spacing=(1, 1, 1), stride=1, minimum=(1, 1, 1)).network
    # Shown and 10 mm around it, where the image goes so far: 40 × (5 + 25 + 10) × (3 + 3 + 3) 4-mm slices.
    assert network.shape == (40, 40, 36)
    middle = grid.affine[:3, :3] @ ((np.array([15, 0, 9]) + np.array([54, 39, 17])) / 2) + grid.affine[:3, 3]
    np.testing.assert_allclose(network.centre, middle, atol=1e-6)


def test_crop_loses_nothing_that_the_image_shows() -> None:
    grid = make_grid((60, 60, 60), degrees=(3, 4, 5))
    data = torch.zeros(1, 1, *grid.shape)
    data[0, 0, 20:40, 25:35, 22:41] = noise_image((20, 10, 19))
    scan = scan_of(data, grid)
    frame = make_frame(scan, scan, np.eye(4), spacing=(1, 1, 1), stride=8, minimum=(1, 1, 1))
    assert np.prod(frame.network.shape) < 0.6 * 60**3
    seen = network_input(frame, scan, scan)[0, 1]
    torch.testing.assert_close(
        seen[seen > 0].sort().values, normalise(scan).data[data > 0].sort().values, rtol=0, atol=1e-3
    )


@pytest.mark.parametrize(("fixed", "moving"), [("oblique", "everything"), ("anisotropic", "flipped")])
@pytest.mark.parametrize("own", [False, True])
def test_a_deformation_is_undone_at_every_voxel_of_any_grid(fixed: str, moving: str, own: bool) -> None:
    start = START.copy()
    start[:3, 3] += GRIDS[moving].centre - apply_world(START, GRIDS[fixed].centre)
    frame = frame_of(GRIDS[fixed], GRIDS[moving], start)
    deformation = waves(frame.fixed).float()
    rough = torch.zeros(1, 3, *frame.network.shape) if own else None
    undone = frame.undo(deformation, frame.moving, rough)
    places = world_points(frame.moving)
    back = apply_world(np.linalg.inv(start), places + at_points(undone))
    np.testing.assert_allclose(places + at_points(frame.total_back(undone)), back, atol=1e-6)
    there = field_transform(deformation, frame.fixed)
    index = apply_world(np.linalg.inv(frame.fixed.affine), back.reshape(-1, 3))
    inside = ((index > 0) & (index < np.array(frame.fixed.shape) - 1)).all(1)
    assert inside.mean() > 0.3
    again = apply_world(start, move_all(there, back.reshape(-1, 3)[inside]))
    assert np.linalg.norm(again - places.reshape(-1, 3)[inside], axis=1).max() < 2e-3
    assert np.abs(at_points(undone)).max() > 2
