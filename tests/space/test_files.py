"""Written files, read back by SimpleITK alone."""

import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.ndimage import map_coordinates

from geometry import GRIDS, Array, apply_world, field_transform, from_image, make_grid, move_all, noise_image, waves
from iregzoo.errors import InputError
from iregzoo.space.files import write_displacement, write_image, write_transform, write_voxel_displacement
from iregzoo.space.grid import RAS_FROM_LPS, Grid

EACH_GRID = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
AFFINE = np.array([[1.05, 0.1, 0, 5], [-0.1, 0.95, 0.05, -30], [0.02, 0, 1.1, 8], [0, 0, 0, 1.0]])


def inside(grid: Grid, number: int = 200) -> Array:
    """Places in the world within a grid, between its voxels."""
    index = np.random.default_rng(0).uniform(0, np.array(grid.shape) - 1, (number, 3))
    return apply_world(grid.affine, index)


@EACH_GRID
def test_image_is_what_itk_reads(tmp_path: Path, grid: Grid) -> None:
    data = noise_image(grid.shape)
    write_image(tmp_path / "image.nii.gz", data, grid)
    image = sitk.ReadImage(str(tmp_path / "image.nii.gz"))
    assert torch.equal(from_image(image), data)
    np.testing.assert_allclose(Grid.of(image).affine, grid.affine, atol=2e-5)


@pytest.mark.parametrize(
    ("low", "high", "pixel"),
    [
        (0, 255, sitk.sitkUInt8),
        (0, 256, sitk.sitkInt16),
        (-1, 3, sitk.sitkInt16),
        (0, 32_767, sitk.sitkInt16),
        (0, 32_768, sitk.sitkInt32),
        (-40_000, 2**31 - 1, sitk.sitkInt32),
    ],
)
def test_labels_take_the_smallest_integer_type_that_holds_them(tmp_path: Path, low: int, high: int, pixel: int) -> None:
    data = torch.full((1, 1, 4, 5, 6), low, dtype=torch.int32)
    data[..., 3] = high
    write_image(tmp_path / "labels.nii.gz", data, make_grid((4, 5, 6)))
    image = sitk.ReadImage(str(tmp_path / "labels.nii.gz"))
    assert image.GetPixelID() == pixel
    assert torch.equal(from_image(image).long(), data.long())


def test_labels_beyond_32_bits_are_refused(tmp_path: Path) -> None:
    data = torch.full((1, 1, 4, 5, 6), 2**31)
    with pytest.raises(ValueError, match="labels from 2147483648 to 2147483648; expected at most 32 bits"):
        write_image(tmp_path / "labels.nii.gz", data, make_grid((4, 5, 6)))
    assert not list(tmp_path.iterdir())


@EACH_GRID
def test_displacement_moves_points_as_given(tmp_path: Path, grid: Grid) -> None:
    displacement = waves(grid)
    write_displacement(tmp_path / "displacement.nii.gz", displacement, grid)
    image = sitk.ReadImage(str(tmp_path / "displacement.nii.gz"))
    assert image.GetPixelID() == sitk.sitkVectorFloat32
    points = inside(grid)
    found = move_all(sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64)), points)
    # NIfTI holds float32, vectors and geometry.
    np.testing.assert_allclose(found, move_all(field_transform(displacement, grid), points), atol=2e-5)


@EACH_GRID
@pytest.mark.parametrize("affine", [None, AFFINE], ids=["deformation", "and affine"])
def test_transform_deforms_and_then_moves_by_the_affine(tmp_path: Path, grid: Grid, affine: Array | None) -> None:
    deformation = waves(grid)
    write_transform(tmp_path / "transform.h5", deformation, grid, affine)
    points = inside(grid)
    deformed = move_all(field_transform(deformation, grid), points)
    expected = deformed if affine is None else apply_world(affine, deformed)
    np.testing.assert_allclose(
        move_all(sitk.ReadTransform(str(tmp_path / "transform.h5")), points), expected, atol=1e-9
    )
    assert np.abs(deformed - points).max() > 1


def test_the_same_transform_gives_the_same_file_a_second_later(tmp_path: Path) -> None:
    grid = GRIDS["everything"]
    write_transform(tmp_path / "first.h5", waves(grid), grid, AFFINE)
    time.sleep(1.1)  # HDF5 counts the time in seconds
    write_transform(tmp_path / "second.h5", waves(grid), grid, AFFINE)
    assert (tmp_path / "first.h5").read_bytes() == (tmp_path / "second.h5").read_bytes()


@EACH_GRID
def test_voxel_displacement_reads_the_moving_array_where_itk_reads_the_moving_image(tmp_path: Path, grid: Grid) -> None:
    """As Learn2Reg's evaluator does, between grids that differ in shape, spacing and orientation."""
    x, y, z = (float(middle) for middle in grid.centre)
    moving = make_grid((21, 26, 24), (1.1, 1.7, 1.4), degrees=(8, 0, 20), axes=(1, 0, 2), centre=(x + 1, y, z - 2))
    displacement = waves(grid)
    write_voxel_displacement(tmp_path / "disp.nii.gz", displacement, grid, moving)
    image = nib.load(tmp_path / "disp.nii.gz")
    field = np.asarray(image.dataobj)
    assert field.shape == (*grid.shape, 3)
    assert field.dtype == np.float32
    np.testing.assert_allclose(image.affine, RAS_FROM_LPS @ grid.affine, atol=1e-4)
    values = np.random.default_rng(0).random(moving.shape)
    read = field.astype(float).transpose(3, 0, 1, 2) + np.indices(grid.shape)
    within = ((read > 0) & (read < np.array(moving.shape).reshape(3, 1, 1, 1) - 1)).all(0)
    assert within.mean() > 0.1
    reference, transform = grid.to_sitk(np.zeros(grid.shape)), field_transform(displacement, grid)
    expected = from_image(sitk.Resample(moving.to_sitk(values), reference, transform, sitk.sitkLinear))[0, 0].numpy()
    np.testing.assert_allclose(map_coordinates(values, read, order=1)[within], expected[within], atol=2e-5)


def test_paths_may_be_text(tmp_path: Path) -> None:
    grid = GRIDS["plain"]
    field = waves(grid)
    write_image(str(tmp_path / "image.nii.gz"), noise_image(grid.shape), grid)
    write_displacement(str(tmp_path / "field.nii.gz"), field, grid)
    write_transform(str(tmp_path / "transform.h5"), field, grid)
    write_voxel_displacement(str(tmp_path / "voxels.nii.gz"), field, grid, grid)
    assert len(list(tmp_path.iterdir())) == 4


def test_what_does_not_lie_on_the_grid_is_refused(tmp_path: Path) -> None:
    grid = GRIDS["plain"]
    image, field = noise_image(grid.shape), waves(grid)
    for wrong in (image[0, 0], image[..., 1:], image.expand(2, -1, -1, -1, -1), field):
        with pytest.raises(ValueError, match=r"shape \(.*\); expected \(1, 1, 24, 32, 28\)"):
            write_image(tmp_path / "image.nii.gz", wrong, grid)
    for wrong in (field[0], field[..., 1:], field.movedim(1, -1), image):
        for write in (write_displacement, write_transform):
            with pytest.raises(ValueError, match=r"shape \(.*\); expected \(1, 3, 24, 32, 28\)"):
                write(tmp_path / "field.nii.gz", wrong, grid)
        with pytest.raises(ValueError, match=r"expected \(1, 3, 24, 32, 28\)"):
            write_voxel_displacement(tmp_path / "voxels.nii.gz", wrong, grid, grid)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["nowhere/image.nii.gz", "image.what", "image"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, path: str) -> None:
    grid = GRIDS["plain"]
    with pytest.raises(InputError, match=r"image.*: cannot be written \(.*\); check its folder, its ending and"):
        write_image(tmp_path / path, noise_image(grid.shape), grid)
