"""Grids against the geometry they stand for, and resampling against ITK's."""

from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.transforms import CenterSpatialCrop

from geometry import GRIDS, apply_world, from_image, make_grid, noise_image, to_image, world_points
from iregzoo.fields import identity
from iregzoo.space.grid import (
    RAS_FROM_LPS,
    Grid,
    apply_matrix,
    bounding_grid,
    canonical_axes,
    halved,
    middle,
    network_grid,
    pull,
    read_at,
    to_voxels,
)

EACH_GRID = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
ORIENTATIONS = list(product(permutations(range(3)), product((-1, 1), repeat=3)))
ITK_MODES = {"linear": sitk.sitkLinear, "nearest": sitk.sitkNearestNeighbor}


@EACH_GRID
def test_grid_of_an_itk_image_is_the_grid_it_was_made_from(grid: Grid) -> None:
    image = grid.to_sitk(np.zeros(grid.shape, np.float32))
    again = Grid.of(image)
    assert again.shape == grid.shape
    np.testing.assert_allclose(again.affine, grid.affine, atol=1e-10)
    np.testing.assert_allclose(again.spacing, image.GetSpacing())
    for index in ((0, 0, 0), (5, 0, 0), (3, 7, 11)):
        place = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(world_points(grid)[index], place, atol=1e-9)
    middle = image.TransformContinuousIndexToPhysicalPoint([(size - 1) / 2 for size in grid.shape])
    np.testing.assert_allclose(grid.centre, middle, atol=1e-9)


def test_itk_image_holds_each_voxel_at_its_index() -> None:
    grid = GRIDS["everything"]
    array = np.arange(np.prod(grid.shape), dtype=np.float32).reshape(grid.shape)
    vectors = np.stack([array, array + 0.25, array + 0.5], axis=-1)
    image, field = grid.to_sitk(array), grid.to_sitk(vectors, vector=True)
    for index in ((0, 0, 0), (1, 2, 3), (15, 0, 24)):
        assert image[index] == array[index]
        assert field[index] == tuple(vectors[index])


@EACH_GRID
def test_grid_matches_itself_within_a_thousandth_of_a_voxel(grid: Grid) -> None:
    def moved(by: float) -> Grid:
        affine = grid.affine.copy()
        affine[0, 3] += by * grid.spacing.min()
        return replace(grid, affine=affine)

    assert grid.matches(moved(0.0009))
    assert not grid.matches(moved(0.0011))
    assert not grid.matches(replace(grid, shape=(grid.shape[0], grid.shape[1], grid.shape[2] + 1)))
    turned = grid.affine.copy()
    turned[:3, 0] *= 1 + 0.0015 / (grid.shape[0] - 1)  # agrees at the origin, not at the far corner
    assert not grid.matches(replace(grid, affine=turned))


@pytest.mark.parametrize(("axes", "signs"), ORIENTATIONS)
def test_network_axes_run_right_anterior_superior(axes: tuple[int, int, int], signs: tuple[int, int, int]) -> None:
    grid = make_grid((9, 10, 11), (1.0, 1.5, 2.0), degrees=(10, -8, 12), axes=axes, signs=signs)
    network = network_grid(grid, (1.2, 1.2, 1.2), stride=4)
    unit = (RAS_FROM_LPS @ network.affine)[:3, :3] / network.spacing
    assert (np.argmax(np.abs(unit), axis=0) == [0, 1, 2]).all()
    assert (np.diag(unit) > 0.9).all()
    # Oblique axes stay as they are: the same lines, in another order and direction.
    order, flips = canonical_axes(grid)
    np.testing.assert_allclose(
        network.affine[:3, :3] / 1.2, (grid.affine[:3, :3] / grid.spacing)[:, order] * flips, atol=1e-9
    )


@EACH_GRID
@pytest.mark.parametrize("stride", [1, 8])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 1.9, 2.5)])
@pytest.mark.parametrize("minimum", [(1, 1, 1), (48, 20, 33)])
def test_network_grid_covers_every_voxel_of_the_image(
    grid: Grid, stride: int, spacing: tuple[float, float, float], minimum: tuple[int, int, int]
) -> None:
    network = network_grid(grid, spacing, stride=stride, minimum=minimum)
    np.testing.assert_allclose(network.spacing, spacing)
    assert all(size % stride == 0 and size >= least for size, least in zip(network.shape, minimum, strict=True))
    corners = torch.tensor(list(product(*((-0.5, size - 0.5) for size in grid.shape))), dtype=torch.float64)
    placed = apply_matrix(to_voxels(grid, None, network), corners.T.reshape(1, 3, -1, 1, 1)).reshape(3, -1)
    for axis, size in enumerate(network.shape):
        assert placed[axis].min() > -0.502
        assert placed[axis].max() < size - 0.498
        # and no more of the world than it has to: padding is even, and less than a stride beyond the minimum
        before, after = float(placed[axis].min()) + 0.5, size - 0.5 - float(placed[axis].max())
        assert abs(before - after) < 2.01
        assert before + after < max(stride, minimum[axis] - (size - before - after) + stride) + 1.01


@pytest.mark.parametrize("degrees", [(0, 0, 0), (14, -11, 22)])
@pytest.mark.parametrize(("axes", "signs"), [((0, 1, 2), (-1, -1, 1)), ((2, 0, 1), (-1, 1, -1))])
def test_image_of_the_networks_spacing_is_not_interpolated(
    degrees: tuple[float, float, float], axes: tuple[int, int, int], signs: tuple[int, int, int]
) -> None:
    grid = make_grid((13, 18, 11), degrees=degrees, axes=axes, signs=signs, centre=(7.3, -4.1, 2.9))
    image = noise_image(grid.shape)
    network = network_grid(grid, (1, 1, 1), stride=8)
    seen = pull(image, to_voxels(network, None, grid), network.shape)
    kept = seen[seen > 0].sort().values
    assert kept.numel() == image.numel()
    torch.testing.assert_close(kept, image.flatten().sort().values, rtol=1e-5, atol=0)
    # and each value is where it was
    back = pull(seen, to_voxels(grid, None, network), grid.shape)
    torch.testing.assert_close(back, image, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("mode", ITK_MODES)
@pytest.mark.parametrize("source", ["oblique", "everything"])
@pytest.mark.parametrize("target", ["plain", "oblique", "anisotropic", "flipped", "everything"])
def test_pull_is_itks_resampler(mode: str, source: str, target: str) -> None:
    affine = GRIDS[target].affine.copy()
    affine[:3, 3] += GRIDS[source].centre - GRIDS[target].centre + (1.23, 4.56, -3.21)
    grid, onto = GRIDS[source], replace(GRIDS[target], affine=affine)
    image = noise_image(grid.shape)
    expected = from_image(
        sitk.Resample(to_image(image, grid), onto.to_sitk(np.zeros(onto.shape)), sitk.Transform(), ITK_MODES[mode], -7)
    ).double()
    found = pull(image.double(), to_voxels(onto, None, grid), onto.shape, mode=mode, outside=-7)
    # Float32 coordinates: a point on the very edge between two voxels, or of the field of view, may go either way.
    apart = (found - expected).abs() > 0.05
    assert 0.1 < (expected > 0).double().mean() < 1
    assert apart.double().mean() < (1e-3 if mode == "nearest" else 1e-4)


@pytest.mark.parametrize("mode", ITK_MODES)
def test_voxel_reaches_half_a_voxel_beyond_the_faces(mode: str) -> None:
    grid = make_grid((5, 6, 7), (1.5, 1.0, 2.0))
    image = noise_image(grid.shape).double()
    steps = [-0.75, -0.51, -0.5, -0.49, 0.0, 0.3]
    for axis, size in enumerate(grid.shape):
        along = torch.tensor(steps + [size - 1 - step for step in steps], dtype=torch.float64)
        points = torch.full((1, 3, len(along), 1, 1), 2.0, dtype=torch.float64)
        points[0, axis, :, 0, 0] = along
        found = read_at(image, points, mode=mode, outside=-7)
        line = np.eye(4)
        line[:3, 3] = [2.0] * 3
        expected = []
        for place in along.tolist():
            line[axis, 3] = place
            one = Grid((1, 1, 1), grid.affine @ line)
            reference = sitk.Image([1, 1, 1], sitk.sitkFloat64)
            reference.SetOrigin(one.affine[:3, 3].tolist())
            expected.append(
                sitk.Resample(to_image(image, grid), reference, sitk.Transform(), ITK_MODES[mode], -7)[0, 0, 0]
            )
        np.testing.assert_allclose(found.flatten(), expected, rtol=1e-9)
        assert found.flatten()[1] == -7
        assert found.flatten()[3] > 0


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("aslant", [0.0, 0.01])
def test_the_last_digit_of_a_header_moves_no_face(mode: str, aslant: float) -> None:
    """Centre on centre, grids of even and odd size meet half a voxel beyond a face, where rounding must not decide."""
    grid, onto = make_grid((12, 16, 20)), make_grid((13, 17, 21))
    turned = np.eye(4)
    turned[0, 1] = aslant / 16 if aslant else 0.0  # so that its axes run aslant, and each place is read by itself
    image = torch.rand(1, 1, *grid.shape) + 1
    found = []
    for digit in (-1e-7, 0.0, 1e-7):
        other = Grid(grid.shape, grid.affine * np.array([1 + digit] * 3 + [1.0]))
        other = Grid(grid.shape, other.affine + np.outer([*(onto.centre - other.centre), 0.0], [0, 0, 0, 1]))
        found.append(pull(image, to_voxels(onto, turned, other), onto.shape, mode=mode, outside=0.0) == 0)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[1])
    assert 0 < float(found[1].float().mean()) < 0.5


def test_matrices_chain_grids_and_an_affine_of_the_world() -> None:
    grid, target = GRIDS["everything"], GRIDS["oblique"]
    world = np.array([[0.9, 0.1, 0, 5], [-0.2, 1.1, 0.1, -3], [0, 0.1, 1, 8], [0, 0, 0, 1.0]])
    mapped = apply_matrix(to_voxels(grid, world, target), identity(grid.shape, dtype=torch.float64))
    place = apply_world(target.affine, np.moveaxis(mapped[0].numpy(), 0, -1))
    np.testing.assert_allclose(place, apply_world(world, world_points(grid)), atol=1e-9)


@EACH_GRID
@pytest.mark.parametrize("shape", [(7, 9, 4), (8, 8, 14), (1, 2, 3)])
def test_middle_of_a_grid_is_what_monai_crops(grid: Grid, shape: tuple[int, int, int]) -> None:
    found = middle(grid, shape)
    places = torch.from_numpy(world_points(grid)).movedim(-1, 0)
    np.testing.assert_allclose(world_points(found), CenterSpatialCrop(shape)(places).movedim(0, -1), atol=1e-9)


@EACH_GRID
@pytest.mark.parametrize("margin_mm", [0.0, 2.5, 1000.0])
def test_bounding_grid_holds_the_mask_and_its_margin(grid: Grid, margin_mm: float) -> None:
    mask = torch.zeros(grid.shape, dtype=torch.bool)
    mask[5, 8, 3] = mask[7, 8, 9] = True
    margin = np.ceil(margin_mm / grid.spacing).astype(int)
    low = np.maximum(np.array([5, 8, 3]) - margin, 0)
    high = np.minimum(np.array([8, 9, 10]) + margin, grid.shape)
    expected = world_points(grid)[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    np.testing.assert_allclose(world_points(bounding_grid(mask, grid, margin_mm)), expected, atol=1e-9)


@EACH_GRID
def test_half_the_spacing_keeps_the_voxels_and_covers_as_much(grid: Grid) -> None:
    finer = halved(grid)
    assert finer.shape == tuple(2 * size + 1 for size in grid.shape)
    np.testing.assert_allclose(world_points(finer)[1::2, 1::2, 1::2], world_points(grid), atol=1e-9)
    np.testing.assert_allclose(finer.affine[:3, 3], apply_world(grid.affine, np.full(3, -0.5)), atol=1e-9)


@pytest.mark.parametrize("name", GRIDS)
def test_vectors_lead_from_voxel_to_voxel_in_mm_and_back(name: str) -> None:
    grid = GRIDS[name]
    start, step = torch.rand(2, 2, 3, 4, dtype=torch.float64, generator=torch.manual_seed(0))
    moved = apply_matrix(grid.affine, start + step) - apply_matrix(grid.affine, start)
    torch.testing.assert_close(grid.in_mm(step), moved)
    torch.testing.assert_close(grid.in_voxels(grid.in_mm(step)), step)
    assert grid.in_mm(step.float()).dtype == torch.float32
