"""Transforms from files: chained as ITK chains them, and undone."""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from geometry import GRIDS, Array, apply_world, field_transform, make_grid, move_all, waves
from iregzoo.errors import InputError
from iregzoo.space.files import write_displacement, write_transform, write_voxel_displacement
from iregzoo.space.grid import Grid
from iregzoo.space.transforms import Chain, flatten, itk_move, links_of, move, read_chain, read_linear
from rights import without_rights

EACH_GRID = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
AFFINE = np.array([[1.05, 0.1, 0, 5], [-0.1, 0.95, 0.05, -3], [0.02, 0, 1.1, 2], [0, 0, 0, 1.0]])


def rigid(centre: tuple[float, ...] = (3.0, -4.0, 5.0)) -> sitk.Transform:
    return sitk.Euler3DTransform(centre, 0.3, -0.2, 0.4, (2.0, -1.0, 3.0))


def spline(grid: Grid) -> sitk.Transform:
    transform = sitk.BSplineTransformInitializer(grid.to_sitk(np.zeros(grid.shape)), [3, 3, 3])
    count = len(transform.GetParameters())
    transform.SetParameters(np.random.default_rng(0).uniform(-1, 1, count).tolist())
    return transform


def places(grid: Grid, number: int = 200, beyond: float = 0.0) -> torch.Tensor:
    """Points in the world within a grid, and by a part of its size beyond it."""
    size = np.array(grid.shape) - 1
    index = np.random.default_rng(0).uniform(-beyond * size, (1 + beyond) * size, (number, 3))
    return torch.from_numpy(apply_world(grid.affine, index))


def stored(transform: sitk.Transform, path: Path) -> Path:
    sitk.WriteTransform(transform, str(path))
    return path


# --- reading and chaining


@EACH_GRID
def test_transforms_are_applied_as_listed(tmp_path: Path, grid: Grid) -> None:
    write_transform(tmp_path / "first.h5", waves(grid), grid, AFFINE)
    stored(rigid(), tmp_path / "second.tfm")
    write_displacement(tmp_path / "third.nii.gz", waves(grid, seed=1), grid)
    paths = [tmp_path / name for name in ("first.h5", "second.tfm", "third.nii.gz")]
    field = sitk.ReadImage(str(paths[2]), sitk.sitkVectorFloat64)
    single = [sitk.ReadTransform(str(path)) for path in paths[:2]] + [sitk.DisplacementFieldTransform(field)]
    points = places(grid)
    expected = points.numpy()
    for transform in single:
        expected = move_all(transform, expected)
    together = sitk.CompositeTransform(3)
    for transform in reversed(single):
        together.AddTransform(transform)
    chain = read_chain(paths)
    for found in (move(chain, points).points.numpy(), move_all(chain.composite, points.numpy())):
        np.testing.assert_allclose(found, expected, atol=1e-9)
        np.testing.assert_allclose(found, move_all(together, points.numpy()), atol=1e-9)
    other = move(read_chain(paths[::-1]), points).points.numpy()
    assert np.linalg.norm(other - expected, axis=1).min() > 0.1


@pytest.mark.parametrize("name", ["a.tfm", "a.txt", "a.h5", "a.mat"])
def test_files_of_itk_are_read(tmp_path: Path, name: str) -> None:
    chain = read_chain([stored(rigid(), tmp_path / name)])
    points = places(GRIDS["plain"])
    np.testing.assert_allclose(move(chain, points).points, move_all(rigid(), points.numpy()), atol=1e-9)


@pytest.mark.parametrize("name", ["a.tfm", "a.txt", "a.h5", "a.mat"])
def test_the_affine_of_a_file_moves_points_as_its_transform(tmp_path: Path, name: str) -> None:
    points = places(GRIDS["plain"]).numpy()
    affine = sitk.AffineTransform(AFFINE[:3, :3].ravel().tolist(), (2.0, -1.0, 3.0), (9.0, 8.0, -7.0))
    both = sitk.CompositeTransform([sitk.TranslationTransform(3, (1.0, 2.0, 3.0)), rigid()])
    for transform in (rigid(), affine, *([] if name == "a.mat" else [both])):  # a .mat holds one transform
        found = read_linear(stored(transform, tmp_path / name))
        np.testing.assert_allclose(apply_world(found, points), move_all(transform, points), atol=1e-9)


def test_a_matrix_of_a_kind_that_simpleitk_does_not_know_is_read(tmp_path: Path) -> None:
    """As convert3d and ITK-SNAP write it."""
    path = tmp_path / "snap.txt"
    path.write_text(
        "#Insight Transform File V1.0\n#Transform 0\nTransform: MatrixOffsetTransformBase_double_3_3\n"
        "Parameters: 1 0.5 0 0 1 0 0 0 2 4 5 6\nFixedParameters: 0 0 0\n"
    )
    np.testing.assert_array_equal(read_linear(path), [[1, 0.5, 0, 4], [0, 1, 0, 5], [0, 0, 2, 6], [0, 0, 0, 1]])
    points, chain = places(GRIDS["plain"]), read_chain([path])
    np.testing.assert_allclose(move(chain.inverse(), move(chain, points).points).points, points)


def test_transforms_side_by_side_are_refused(tmp_path: Path) -> None:
    texts = [stored(rigid(), tmp_path / f"{number}.tfm").read_text().split("\n", 1) for number in range(2)]
    path = tmp_path / "two.tfm"
    path.write_text(texts[0][0] + "\n" + texts[0][1] + texts[1][1].replace("#Transform 0", "#Transform 1"))
    with pytest.raises(InputError, match=r"two.tfm: holds 2 transforms side by side"):
        read_chain([path])


@pytest.mark.parametrize("name", ["start.tfm", "start.h5"])
def test_a_transform_that_may_not_be_read_is_refused_in_a_line(tmp_path: Path, name: str) -> None:
    path = Path(stored(rigid(), tmp_path / name))
    path.chmod(0)
    try:
        with (
            pytest.raises(InputError, match=f"{name}: permission denied; check the file's permissions"),
            without_rights(),
        ):
            read_chain([path])
    finally:
        path.chmod(0o700)


def test_a_name_that_no_file_can_have_is_refused_in_a_line() -> None:
    name = "t" * 300
    assert links_of(f"{name},b.h5") == [name, "b.h5"]
    with pytest.raises(InputError, match="t: no such file or folder; check the path"):
        read_chain([name])


@pytest.mark.parametrize("name", ["flirt.mat", "greedy.txt"])
def test_a_plain_matrix_is_called_one(tmp_path: Path, name: str) -> None:
    np.savetxt(tmp_path / name, np.eye(4))
    with pytest.raises(InputError, match=f"{name}: is a plain matrix, as FSL and greedy write it; convert it"):
        read_chain([tmp_path / name])


def test_a_file_that_holds_no_affine_with_an_inverse_is_refused(tmp_path: Path) -> None:
    grid = GRIDS["plain"]
    write_transform(tmp_path / "bends.h5", waves(grid), grid, AFFINE)
    stored(sitk.ScaleTransform(3, (1.0, 0.0, 1.0)), tmp_path / "flattens.tfm")
    for name, words in (("bends.h5", "holds more than a rigid or affine"), ("flattens.tfm", "not an invertible")):
        with pytest.raises(InputError, match=f"{name}: .*{words}"):
            read_linear(tmp_path / name)


@pytest.mark.parametrize("ending", ["nii", "nii.gz", "nrrd", "mha"])
@EACH_GRID
def test_displacement_fields_are_read(tmp_path: Path, grid: Grid, ending: str) -> None:
    vectors = waves(grid)
    sitk.WriteImage(
        grid.to_sitk(vectors[0].movedim(0, -1).numpy(), vector=True), str(tmp_path / f"displacement.{ending}")
    )
    points = places(grid)
    found = move(read_chain([tmp_path / f"displacement.{ending}"]), points)
    # NIfTI holds its geometry in float32.
    np.testing.assert_allclose(found.points, move_all(field_transform(vectors, grid), points.numpy()), atol=1e-4)
    assert not found.outside.any()


def test_a_field_as_ants_writes_it_is_read(tmp_path: Path) -> None:
    grid = GRIDS["plain"]
    vectors = waves(grid)[0].movedim(0, -1).numpy()[:, :, :, None]
    image = nib.Nifti1Image(vectors, np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid.affine)
    image.header.set_intent("vector")
    nib.save(image, tmp_path / "1Warp.nii.gz")
    points = places(grid)
    found = move(read_chain([tmp_path / "1Warp.nii.gz"]), points).points
    np.testing.assert_allclose(found, move_all(field_transform(waves(grid), grid), points.numpy()), atol=1e-4)


def test_composites_in_composites_become_a_row(tmp_path: Path) -> None:
    inner = sitk.CompositeTransform([rigid(), sitk.TranslationTransform(3, (1.0, 2.0, 3.0))])
    outer = sitk.CompositeTransform([sitk.ScaleTransform(3, (1.1, 0.9, 1.2)), inner, rigid((0.0, 0.0, 9.0))])
    parts = list(flatten(outer))
    assert [part.GetName() for part in parts] == [
        *("Euler3DTransform", "TranslationTransform", "Euler3DTransform", "ScaleTransform")
    ]
    points = places(GRIDS["plain"])
    expected = move_all(outer, points.numpy())
    np.testing.assert_allclose(move(Chain(tuple(parts)), points).points, expected, atol=1e-9)


@EACH_GRID
def test_many_points_move_as_itk_moves_one(grid: Grid) -> None:
    points = places(grid, 1000, beyond=0.3)
    for transform in (rigid(), field_transform(waves(grid), grid), spline(grid)):
        expected = move_all(transform, points.numpy())
        np.testing.assert_allclose(itk_move(transform, points), expected, atol=1e-9)
        assert np.abs(expected - points.numpy()).max() > 0.3


# --- there and back


@EACH_GRID
def test_points_come_back(grid: Grid) -> None:
    field, deeper = waves(grid, seed=2), waves(grid, 1.5, seed=3, length_mm=25)
    chain = Chain((sitk.TranslationTransform(3, (0.4, 0.2, -0.3)), field_transform(field, grid), rigid()))
    for longer in (chain, Chain((*chain.parts, *flatten(rigid().GetInverse()), field_transform(deeper, grid)))):
        index = np.random.default_rng(1).uniform(6, np.array(grid.shape) - 7, (300, 3))
        points = torch.from_numpy(apply_world(grid.affine, index))
        there = move(longer, points)
        back = move(longer.inverse(), there.points)
        stayed = ~(there.outside | back.outside)
        assert stayed.float().mean() > 0.8
        assert back.error[stayed].max() < 4e-3
        np.testing.assert_allclose(
            move_all(longer.composite, back.points[stayed].numpy()), there.points[stayed], atol=4e-3
        )
        assert (back.points - points)[stayed].norm(dim=1).max() < 0.01
        assert (there.points - points).norm(dim=1).mean() > 1


def test_matrices_are_undone_exactly() -> None:
    chain = Chain((rigid(), sitk.AffineTransform(AFFINE[:3, :3].ravel().tolist(), AFFINE[:3, 3].tolist())))
    points = places(GRIDS["oblique"])
    back = move(chain.inverse(), move(chain, points).points)
    np.testing.assert_allclose(back.points, points, atol=1e-9)
    assert back.error.max() < 1e-9
    assert chain.linear
    assert not Chain((*chain.parts, field_transform(waves(GRIDS["plain"]), GRIDS["plain"]))).linear


def test_a_spline_is_undone() -> None:
    grid = GRIDS["oblique"]
    chain = Chain((spline(grid),))
    index = np.random.default_rng(1).uniform(5, np.array(grid.shape) - 6, (200, 3))
    points = torch.from_numpy(apply_world(grid.affine, index))
    back = move(chain.inverse(), move(chain, points).points)
    np.testing.assert_allclose(back.points, points, atol=5e-3)
    assert (move(chain, points).points - points).norm(dim=1).mean() > 0.3


def test_a_field_that_folds_is_undone_everywhere() -> None:
    grid = make_grid((24, 24, 24))
    chain = Chain((field_transform(waves(grid, 3.0, length_mm=20), grid),))
    back = move(chain.inverse(), places(grid, 2000))
    assert back.error[~back.outside].max() < 0.01
    assert (~back.outside).sum() > 800


def test_beyond_its_grid_a_field_moves_nothing_there_or_back() -> None:
    grid = GRIDS["oblique"]
    displacement = torch.full((1, 3, *grid.shape), 2.0, dtype=torch.float64)
    chain = Chain((field_transform(displacement, grid),))
    corner, shape = grid.affine @ [0, 0, 0, 1], np.array(grid.shape)
    far = torch.from_numpy(np.stack([corner[:3] - 100, corner[:3] + 200, apply_world(grid.affine, shape / 2)]))
    there, back = move(chain, far), move(chain.inverse(), far)
    assert there.outside.tolist() == back.outside.tolist() == [True, True, False]
    torch.testing.assert_close(there.points[:2], far[:2], rtol=0, atol=1e-9)
    torch.testing.assert_close(back.points[:2], far[:2])
    torch.testing.assert_close(there.points[2], far[2] + 2)
    torch.testing.assert_close(back.points[2], far[2] - 2, rtol=0, atol=1e-3)
    # ITK agrees: outermost half voxels belong to the grid, and what is beyond stays.
    edge = torch.from_numpy(apply_world(grid.affine, np.array([[-0.49, 3, 3], [-0.51, 3, 3], [shape[0] - 0.51, 3, 3]])))
    assert move(chain, edge).outside.tolist() == [False, True, False]
    np.testing.assert_allclose(move_all(chain.composite, edge.numpy()) - edge.numpy(), [[2] * 3, [0] * 3, [2] * 3])


def test_a_place_whose_origin_is_beyond_the_grid_says_how_far_off_it_is() -> None:
    grid = make_grid((10, 10, 10))
    chain = Chain((field_transform(torch.full((1, 3, 10, 10, 10), 2.0, dtype=torch.float64), grid),))
    back = move(
        chain.inverse(), torch.from_numpy(grid.affine[:3, 3] + 0.5)[None]
    )  # would come from 1.5 mm before its corner
    assert back.outside.tolist() == [True]
    assert float(back.error) == pytest.approx(2 * 3**0.5, abs=1e-6)


# --- what is refused


def nan_field(path: Path) -> Path:
    vectors = np.zeros((4, 5, 6, 3))
    vectors[1, 2, 3] = np.nan
    grid = make_grid((4, 5, 6))
    if path.suffix == ".h5":
        return stored(sitk.DisplacementFieldTransform(grid.to_sitk(vectors, vector=True)), path)
    sitk.WriteImage(grid.to_sitk(vectors, vector=True), str(path))
    return path


def nan_matrix(path: Path) -> Path:
    return stored(sitk.AffineTransform(np.full(9, np.nan).tolist(), (0.0, 0.0, 0.0)), path)


def scalar_image(path: Path) -> Path:
    sitk.WriteImage(make_grid((4, 5, 6)).to_sitk(np.zeros((4, 5, 6))), str(path))
    return path


def flat_field(path: Path) -> Path:
    sitk.WriteImage(sitk.Image([8, 9], sitk.sitkVectorFloat32, 2), str(path))
    return path


def learn2reg_field(path: Path) -> Path:
    grid = make_grid((8, 9, 7))
    write_voxel_displacement(path, waves(grid), grid, grid)
    return path


def half_of(path: Path) -> Path:
    write_transform(path, waves(GRIDS["plain"]), GRIDS["plain"], AFFINE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def noise(path: Path) -> Path:
    path.write_bytes(bytes(range(256)) * 8)
    return path


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "absent.h5": (lambda path: path, "no such file"),
    "absent.nii.gz": (lambda path: path, "no such file"),
    "noise.h5": (noise, "is not a transform that ITK can read"),
    "noise.tfm": (noise, "is not a transform that ITK can read"),
    "noise.mat": (noise, "is not a transform that ITK can read"),
    "noise.nii.gz": (noise, "is not a readable NIfTI file"),
    "noise.xyz": (noise, "cannot be read as an image"),
    "half.h5": (half_of, "is not a transform that ITK can read"),
    "nan.nii.gz": (nan_field, "NaN or infinite"),
    "nan.nrrd": (nan_field, "NaN or infinite"),
    "nan.h5": (nan_field, "its DisplacementFieldTransform holds NaN or infinite values"),
    "matrix.h5": (nan_matrix, "its AffineTransform holds NaN or infinite values"),
    "scalar.nii.gz": (scalar_image, "has 1 value per voxel; expected a displacement field"),
    "flat.nii.gz": (flat_field, "expected one 3-D volume"),
    "flat.tfm": (lambda path: stored(sitk.Euler2DTransform(), path), "is a transform for 2-D images"),
    "flat.h5": (lambda path: stored(sitk.CompositeTransform(2), path), "2-D images|holds no transform"),
    "learn2reg.nii.gz": (learn2reg_field, "expected one 3-D volume"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_transform_is_refused_in_a_line(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    make, words = BAD[name]
    path = make(tmp_path / name)
    capfd.readouterr()
    with pytest.raises(InputError, match=words) as error:
        read_chain([path])
    assert name in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert "".join(capfd.readouterr()) == ""  # HDF5 would say much more


def test_a_singular_matrix_is_applied_and_not_undone() -> None:
    flat: Array = np.diag([1.0, 0.0, 1.0])
    chain = Chain((rigid(), sitk.AffineTransform(flat.ravel().tolist(), (0.0, 0.0, 0.0))))
    points = places(GRIDS["plain"])
    assert move(chain, points).points[:, 1].abs().max() < 1e-9
    with pytest.raises(InputError, match=r"matrix \[\[1.0, 0.0, 0.0\], \[0.0, 0.0, 0.0\].* is singular"):
        move(chain.inverse(), points)
