"""``iregzoo apply``: images, labels and points go where SimpleITK and ANTs say, and come back."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

import shell
from geometry import (
    AFFINE,
    GRIDS,
    Array,
    apply_world,
    draw_head,
    from_image,
    move_all,
    to_image,
    waves,
    wavy_transform,
)
from iregzoo.apply import ITK
from iregzoo.errors import InputError
from iregzoo.space.files import write_displacement, write_transform
from iregzoo.space.grid import Grid
from iregzoo.space.points import read_points
from iregzoo.space.transforms import read_chain

SIZE = 0.16  # of the phantom's head, to fit 24×32×28 mm
PAIRS = [("plain", "plain"), ("oblique", "everything"), ("everything", "flipped"), ("anisotropic", "oblique")]
EACH_PAIR = pytest.mark.parametrize("pair", PAIRS, ids=[" to ".join(pair) for pair in PAIRS], indirect=True)
Run = Callable[..., str]


def around(name: str, place: tuple[float, float, float] = (0, 0, 0)) -> Grid:
    affine = GRIDS[name].affine.copy()
    affine[:3, 3] += np.array(place) - GRIDS[name].centre
    return Grid(GRIDS[name].shape, affine)


def labels_of(image: torch.Tensor) -> torch.Tensor:
    return (image > 300).short() + 4 * (image > 700).short()


@dataclass(frozen=True)
class Pair:
    """A folder with fixed and moving scans, labels, and the transform between them in both forms."""

    folder: Path
    fixed: Grid
    moving: Grid

    def __getitem__(self, name: str) -> str:
        return str(self.folder / name)

    @property
    def transform(self) -> sitk.Transform:
        """The same without this package: first the field on the fixed grid, then the affine."""
        return wavy_transform(self.fixed)

    def resampled(self, name: str, transform: sitk.Transform, mode: int = sitk.sitkLinear) -> sitk.Image:
        return sitk.Resample(sitk.ReadImage(self[name]), sitk.ReadImage(self["fixed.nii.gz"]), transform, mode)


@pytest.fixture
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    names = getattr(request, "param", ("oblique", "everything"))
    found = Pair(tmp_path, around(names[0]), around(names[1], (2, -1, 2)))
    for name, grid, world in (("fixed", found.fixed, None), ("moving", found.moving, np.linalg.inv(AFFINE))):
        image = draw_head(grid, world, size=SIZE)
        sitk.WriteImage(to_image(image, grid), found[f"{name}.nii.gz"])
        sitk.WriteImage(to_image(labels_of(image), grid), found[f"{name}_labels.nii.gz"])
    field = waves(found.fixed)
    write_transform(tmp_path / "transform.h5", field, found.fixed, AFFINE)
    places = torch.from_numpy(np.stack(np.meshgrid(*map(np.arange, found.fixed.shape), indexing="ij"), -1)).double()
    world = apply_world(found.fixed.affine, places.numpy())
    moved = apply_world(AFFINE, world + field[0].movedim(0, -1).numpy()) - world
    write_displacement(tmp_path / "displacement.nii.gz", torch.from_numpy(moved).movedim(-1, 0)[None], found.fixed)
    return found


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``iregzoo apply``, with options as keywords; gives back what it printed."""

    def apply(**options: str | Path | bool) -> str:
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        assert shell.run(monkeypatch, "apply", *arguments) == 0
        return capsys.readouterr().out

    return apply


def difference(found: sitk.Image | str, expected: sitk.Image) -> float:
    """The largest, as a part of the range."""
    found = sitk.ReadImage(found) if isinstance(found, str) else found
    one, other = from_image(found).double(), from_image(expected).double()
    return float((one - other).abs().max() / (other.max() - other.min()))


def points_csv(path: Path, points: Array, system: str = "LPS", extra: str = "") -> str:
    signs = (1, 1, 1) if system == "LPS" else (-1, -1, 1)
    rows = [",".join(map(repr, row)) + f',"p{n}"' for n, row in enumerate((points * signs).tolist())]
    path.write_text(
        "\n".join([f"# CoordinateSystem = {system}", "x,y,z,label", *rows]) + extra + "\n", encoding="utf-8"
    )
    return str(path)


def csv_points(path: str) -> Array:
    lines = Path(path).read_text("utf-8").splitlines()
    signs = (1, 1, 1) if "LPS" in lines[0] else (-1, -1, 1)
    return np.array([[float(row[axis]) for axis in "xyz"] for row in csv.DictReader(lines[1:])]) * signs


def within(grid: Grid, number: int = 300, margin: float = 0.0) -> Array:
    index = np.random.default_rng(0).uniform(margin, np.array(grid.shape) - 1 - margin, (number, 3))
    return apply_world(grid.affine, index)


# --- images and label maps


@EACH_PAIR
@pytest.mark.parametrize("file", ["transform.h5", "displacement.nii.gz"])
def test_image_and_labels_are_what_itk_resamples(pair: Pair, run: Run, file: str) -> None:
    for name, mode in (("moving", sitk.sitkLinear), ("moving_labels", sitk.sitkNearestNeighbor)):
        output = pair[f"out/{name}.nii.gz"]
        run(transform=pair[file], input=pair[f"{name}.nii.gz"], reference=pair["fixed.nii.gz"], output=output)
        expected = pair.resampled(f"{name}.nii.gz", pair.transform, mode)
        found = sitk.ReadImage(output)
        assert Grid.of(found).matches(pair.fixed)
        if mode == sitk.sitkLinear:
            assert difference(found, expected) < 1e-4
            assert difference(expected, pair.resampled(f"{name}.nii.gz", sitk.Transform())) > 0.2
        else:
            assert (from_image(found) != from_image(expected)).float().mean() < 1e-3
            assert from_image(found).unique().tolist() == [0, 1, 5]
        assert found.GetPixelID() == expected.GetPixelID()
    assert {path.name for path in (pair.folder / "out").iterdir()} == {"moving.nii.gz", "moving_labels.nii.gz"}


@EACH_PAIR
@pytest.mark.parametrize("file", ["transform.h5", "displacement.nii.gz"])
def test_ants_gets_the_same_image_and_points(pair: Pair, run: Run, file: str) -> None:
    ants = pytest.importorskip("ants", reason="needs antspyx, of the extra peers")
    from pandas import DataFrame  # ANTs has it

    output = pair["warped.nii.gz"]
    run(transform=pair[file], input=pair["moving.nii.gz"], reference=pair["fixed.nii.gz"], output=output)
    fixed, moving = (ants.image_read(pair[f"{name}.nii.gz"]) for name in ("fixed", "moving"))
    theirs = ants.apply_transforms(fixed, moving, [pair[file]]).numpy()
    ours = from_image(sitk.ReadImage(output))[0, 0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * float(theirs.max()))
    points = within(pair.fixed)
    run(transform=pair[file], input=points_csv(pair.folder / "p.csv", points), output=pair["moved.csv"])
    theirs = ants.apply_transforms_to_points(3, DataFrame(points, columns=list("xyz")), [pair[file]]).to_numpy()
    np.testing.assert_allclose(csv_points(pair["moved.csv"]), theirs, atol=1e-3)


def test_several_transforms_are_one_in_the_order_of_the_list(pair: Pair, run: Run) -> None:
    turn = sitk.Euler3DTransform((1.0, 2.0, 3.0), 0.2, -0.1, 0.3, (2.0, 1.0, -1.0))
    sitk.WriteTransform(turn, pair["turn.tfm"])
    listed = [sitk.ReadTransform(pair[name]) for name in ("turn.tfm", "transform.h5")]
    outputs = []
    for names, order in ((("turn.tfm", "transform.h5"), listed), (("transform.h5", "turn.tfm"), listed[::-1])):
        output = pair[f"{names[0]}.nii.gz"]
        given = ", ".join(pair[name] for name in names)
        run(transform=given, input=pair["moving.nii.gz"], reference=pair["fixed.nii.gz"], output=output)
        together = sitk.CompositeTransform(3)
        for transform in reversed(order):  # ITK applies what was added last first
            together.AddTransform(transform)
        assert difference(output, pair.resampled("moving.nii.gz", together)) < 1e-4
        outputs.append(sitk.ReadImage(output))
    assert difference(*outputs) > 0.05  # they do not commute


def test_ants_takes_several_transforms_in_the_same_order(pair: Pair, run: Run) -> None:
    ants = pytest.importorskip("ants", reason="needs antspyx, of the extra peers")
    from pandas import DataFrame

    sitk.WriteTransform(sitk.Euler3DTransform((1.0, 2.0, 3.0), 0.2, -0.1, 0.3, (2.0, 1.0, -1.0)), pair["turn.mat"])
    names = [pair["turn.mat"], pair["displacement.nii.gz"]]
    given, points = ",".join(names), within(pair.fixed)
    run(transform=given, input=pair["moving.nii.gz"], reference=pair["fixed.nii.gz"], output=pair["warped.nii.gz"])
    run(transform=given, input=points_csv(pair.folder / "p.csv", points), output=pair["moved.csv"])
    fixed, moving = (ants.image_read(pair[f"{name}.nii.gz"]) for name in ("fixed", "moving"))
    as_they_are = {"whichtoinvert": [False, False]}  # it would take a matrix before a field for one to invert
    theirs = ants.apply_transforms(fixed, moving, names, **as_they_are).numpy()
    ours = from_image(sitk.ReadImage(pair["warped.nii.gz"]))[0, 0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * float(theirs.max()))
    table = DataFrame(points, columns=list("xyz"))
    theirs = ants.apply_transforms_to_points(3, table, names, **as_they_are).to_numpy()
    np.testing.assert_allclose(csv_points(pair["moved.csv"]), theirs, atol=1e-3)


def test_a_chain_interpolates_once(pair: Pair, run: Run) -> None:
    """A turn and its inverse give the image back as it was, which two interpolations would not."""
    turn = sitk.Euler3DTransform((1.0, 2.0, 3.0), 0.2, -0.1, 0.3, (0.3, 0.4, -0.2))
    sitk.WriteTransform(turn, pair["turn.tfm"])
    sitk.WriteTransform(turn.GetInverse(), pair["back.tfm"])
    given = f"{pair['turn.tfm']},{pair['back.tfm']}"
    run(transform=given, input=pair["moving.nii.gz"], reference=pair["moving.nii.gz"], output=pair["same.nrrd"])
    assert difference(pair["same.nrrd"], sitk.ReadImage(pair["moving.nii.gz"])) < 1e-5


@pytest.mark.parametrize("mark", ["inverse:{}", "[{},1]", " [{},1]", "[{}, 1]"])
def test_one_transform_of_a_list_is_undone(pair: Pair, run: Run, mark: str) -> None:
    """From a fixed scan that was turned: through the turn's inverse, and on as registered; and back again."""
    turn = sitk.Euler3DTransform((1.0, 2.0, 3.0), 0.2, -0.1, 0.3, (2.0, 1.0, -1.0))
    sitk.WriteTransform(turn, pair["turn.tfm"])
    given = f"{mark.format(pair['turn.tfm'])}, {pair['transform.h5']}"
    points = within(pair.fixed, margin=4)
    turned = points_csv(pair.folder / "turned.csv", move_all(turn, points))
    run(transform=given, input=turned, output=pair["moving.csv"])
    expected = move_all(pair.transform, points)
    np.testing.assert_allclose(csv_points(pair["moving.csv"]), expected, atol=1e-3)
    given = f"{mark.format(pair['transform.h5'])},[{pair['turn.tfm']},0]"
    said = run(transform=given, input=points_csv(pair.folder / "p.csv", expected), output=pair["back.csv"])
    assert "inverse: remaining error over the points: 0.00" in said
    np.testing.assert_allclose(csv_points(pair["back.csv"]), csv_points(turned), atol=0.01)


def test_a_header_that_contradicts_itself_is_told_of(pair: Pair, run: Run) -> None:
    """Of the input and of the reference, whose places are used."""
    for name in ("moving", "fixed"):
        image = nib.load(pair[f"{name}.nii.gz"])
        other = image.affine.copy()
        other[0, 3] += 30
        image.set_qform(other, 1)
        image.set_sform(image.affine, 2)
        nib.save(image, pair[f"doubtful_{name}.nii.gz"])
    given = {"transform": pair["transform.h5"], "output": pair["out.nrrd"]}
    said = run(**given, input=pair["doubtful_moving.nii.gz"], reference=pair["doubtful_fixed.nii.gz"])
    for name in ("moving", "fixed"):
        assert f"warning: doubtful_{name}.nii.gz: its sform and its qform place it up to 30.0 mm apart" in said
    assert "warning" not in run(**given, input=pair["moving.nii.gz"], reference=pair["fixed.nii.gz"], overwrite=True)


def test_an_image_goes_through_a_list_with_an_undone_field_once(pair: Pair, run: Run) -> None:
    way = {"input": pair["fixed.nii.gz"], "reference": pair["moving.nii.gz"]}
    run(**way, transform=f"inverse:{pair['transform.h5']}", output=pair["one.nrrd"])
    run(**way, transform=pair["transform.h5"], output=pair["other.nrrd"], inverse=True)
    assert difference(pair["one.nrrd"], sitk.ReadImage(pair["other.nrrd"])) == 0
    same = f"{pair['transform.h5']},inverse:{pair['transform.h5']}"
    run(transform=same, input=pair["fixed.nii.gz"], reference=pair["fixed.nii.gz"], output=pair["same.nrrd"])
    inside = (..., slice(6, -6), slice(6, -6), slice(6, -6))
    found, given = (from_image(sitk.ReadImage(pair[name]))[inside] for name in ("same.nrrd", "fixed.nii.gz"))
    assert (found - given).abs().max() < 1e-3 * given.max()


def test_a_comma_may_stand_in_a_path(pair: Pair, run: Run) -> None:
    (pair.folder / "a,b").mkdir()
    shutil.copy(pair["transform.h5"], pair["a,b/transform.h5"])
    points = points_csv(pair.folder / "p.csv", within(pair.fixed))
    for number, file in enumerate(("transform.h5", "a,b/transform.h5")):
        run(transform=pair[file], input=points, output=pair[f"{number}.csv"])
    assert Path(pair["0.csv"]).read_text("utf-8") == Path(pair["1.csv"]).read_text("utf-8")


def test_sparse_and_thin_labels_are_labels(pair: Pair, run: Run) -> None:
    labels = np.zeros(pair.moving.shape, dtype=np.uint8)
    labels[tuple(np.random.default_rng(0).integers(4, np.array(labels.shape) - 4, (9, 3)).T)] = range(10, 100, 10)
    sitk.WriteImage(pair.moving.to_sitk(labels), pair["contacts.nrrd"])
    thin = np.zeros_like(labels)
    thin[labels.shape[0] // 2, 2:-2, 2:-2] = 7
    sitk.WriteImage(pair.moving.to_sitk(thin), pair["thin.nrrd"])
    way = {"transform": pair["transform.h5"], "reference": pair["fixed.nii.gz"]}
    for file, values in (("contacts.nrrd", {0, *range(10, 100, 10)}), ("thin.nrrd", {0, 7})):
        said = run(**way, input=pair[file], output=pair["out.nrrd"], overwrite=True)
        assert f"interpolation: nearest, because {file} looks like a label map" in said
        assert set(from_image(sitk.ReadImage(pair["out.nrrd"])).unique().tolist()) <= values
    said = run(**way, input=pair["moving.nii.gz"], output=pair["out.nrrd"], overwrite=True)
    assert "interpolation: linear, because moving.nii.gz looks like an image" in said


def test_labels_of_any_type_are_read_from_the_nearest_voxel_unless_told_otherwise(pair: Pair, run: Run) -> None:
    image = sitk.ReadImage(pair["moving_labels.nii.gz"])
    way = {"transform": pair["transform.h5"], "reference": pair["fixed.nii.gz"]}
    for kind in (sitk.sitkUInt8, sitk.sitkInt32, sitk.sitkFloat32):
        sitk.WriteImage(sitk.Cast(image, kind), pair["labels.nrrd"])
        run(**way, input=pair["labels.nrrd"], output=pair["out.nrrd"], overwrite=True)
        found = sitk.ReadImage(pair["out.nrrd"])
        assert found.GetPixelID() == kind
        assert set(from_image(found).unique().tolist()) == {0, 1, 5}
        run(**way, input=pair["labels.nrrd"], output=pair["out.nrrd"], overwrite=True, interpolation="linear")
        assert set(from_image(sitk.ReadImage(pair["out.nrrd"])).unique().tolist()) > {0, 1, 5}
    run(**way, input=pair["moving.nii.gz"], output=pair["near.nrrd"], interpolation="nearest")
    values = set(from_image(sitk.ReadImage(pair["near.nrrd"])).unique().tolist())
    assert values <= {0.0, *from_image(sitk.ReadImage(pair["moving.nii.gz"])).unique().tolist()}


def test_whole_numbers_are_rounded_and_air_lies_outside(pair: Pair, run: Run) -> None:
    image = sitk.Cast(sitk.ReadImage(pair["moving.nii.gz"]) * 2 - 1024, sitk.sitkInt16)
    noise = np.random.default_rng(0).integers(-20, 20, sitk.GetArrayViewFromImage(image).shape)
    textured = sitk.GetImageFromArray(np.maximum(sitk.GetArrayFromImage(image) + noise, -1024).astype(np.int16))
    textured.CopyInformation(image)
    sitk.WriteImage(textured, pair["ct.nii.gz"])
    way = {"transform": pair["transform.h5"], "reference": pair["fixed.nii.gz"]}
    run(**way, input=pair["ct.nii.gz"], output=pair["ct_warped.nii.gz"])
    found = sitk.ReadImage(pair["ct_warped.nii.gz"])
    assert found.GetPixelID() == sitk.sitkInt16
    reference = sitk.ReadImage(pair["fixed.nii.gz"])
    exact = sitk.Resample(textured, reference, pair.transform, sitk.sitkLinear, -1024, sitk.sitkFloat64)
    assert (from_image(found) - from_image(exact)).abs().max() <= 0.501
    assert (from_image(found) == -1024).any()
    run(**way, input=pair["ct.nii.gz"], output=pair["ct_near.nii.gz"], interpolation="nearest")
    near = from_image(sitk.ReadImage(pair["ct_near.nii.gz"]))
    inside = sitk.Resample(textured, reference, pair.transform, sitk.sitkNearestNeighbor, 9999)
    assert (near[from_image(inside) == 9999] == -1024).all()


@pytest.mark.parametrize("mode", ["linear", "nearest", "cubic"])
@pytest.mark.parametrize(
    ("kind", "outside"), [(sitk.sitkInt16, -1024), (sitk.sitkFloat32, 12.5)], ids=["int16", "float"]
)
def test_value_outside_is_what_itk_puts_there(pair: Pair, run: Run, mode: str, kind: int, outside: float) -> None:
    image = sitk.Cast(sitk.ReadImage(pair["moving.nii.gz"]), kind)
    sitk.WriteImage(image, pair["image.nrrd"])
    way = {"transform": pair["transform.h5"], "reference": pair["fixed.nii.gz"], "interpolation": mode}
    run(**way, input=pair["image.nrrd"], output=pair["out.nrrd"], outside=str(outside))
    reference = sitk.ReadImage(pair["fixed.nii.gz"])
    expected = sitk.Resample(image, reference, pair.transform, ITK[mode], outside, sitk.sitkFloat64)
    found = from_image(sitk.ReadImage(pair["out.nrrd"]))
    beyond = from_image(expected) == outside
    assert 100 < beyond.sum() < beyond.numel() / 2
    assert (found[beyond] == outside).all()
    assert (found - from_image(expected)).abs().median() <= (0.5 if kind == sitk.sitkInt16 else 1e-3)
    way["interpolation"] = "linear"
    run(**way, input=pair["moving_labels.nii.gz"], output=pair["mask.nrrd"], outside="7")  # an image, as it says
    assert (from_image(sitk.ReadImage(pair["mask.nrrd"])) == 7).any()


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha", ".NRRD"])
def test_formats_of_images(pair: Pair, run: Run, ending: str) -> None:
    output = pair[f"warped{ending}"]
    run(transform=pair["transform.h5"], input=pair["moving.nii.gz"], reference=pair["fixed.nii.gz"], output=output)
    expected = pair.resampled("moving.nii.gz", pair.transform)
    assert difference(output, expected) < 1e-4
    assert Grid.of(sitk.ReadImage(output)).matches(pair.fixed)


@EACH_PAIR
@pytest.mark.parametrize("file", ["transform.h5", "displacement.nii.gz"])
def test_inverse_of_an_image_reads_every_voxel_where_itk_takes_from(pair: Pair, run: Run, file: str) -> None:
    """Images of the coordinates say where a voxel was read; ITK's own transform brings that back to the voxel."""
    wide = around("plain")
    wide = Grid((24, 30, 26), np.diag([4.0, 4.0, 4.0, 1.0]) @ wide.affine)
    read = []
    for axis in range(3):
        index = np.stack(np.meshgrid(*map(np.arange, wide.shape), indexing="ij"), -1)
        sitk.WriteImage(wide.to_sitk(apply_world(wide.affine, index)[..., axis]), pair[f"{axis}.nrrd"])
        said = run(
            transform=pair[file],
            input=pair[f"{axis}.nrrd"],
            reference=pair["moving.nii.gz"],
            output=pair[f"back{axis}.nrrd"],
            interpolation="linear",
            inverse=True,
        )
        read.append(from_image(sitk.ReadImage(pair[f"back{axis}.nrrd"]))[0, 0].numpy())
        assert "remaining error over the voxels: 0.000" in said
    grid = pair.moving
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1)
    voxels, origins = apply_world(grid.affine, index.reshape(-1, 3)), np.stack(read, -1).reshape(-1, 3)
    inside = apply_world(np.linalg.inv(pair.fixed.affine), origins)
    inside = ((inside > 0) & (inside < np.array(pair.fixed.shape) - 1)).all(1)
    assert inside.mean() > 0.3
    again = move_all(read_chain([pair[file]]).composite, origins[inside])
    assert np.linalg.norm(again - voxels[inside], axis=1).max() < 0.01
    assert np.linalg.norm(origins - voxels, axis=1)[inside].mean() > 1


def test_inverse_of_matrices_alone_is_exact_and_silent(pair: Pair, run: Run) -> None:
    turn = sitk.Euler3DTransform((1.0, 2.0, 3.0), 0.2, -0.1, 0.3, (2.0, 1.0, -1.0))
    sitk.WriteTransform(turn, pair["turn.mat"])
    way = {"transform": pair["turn.mat"], "input": pair["moving.nii.gz"], "reference": pair["fixed.nii.gz"]}
    assert "there and back" not in run(**way, output=pair["out.nii.gz"], inverse=True)
    assert difference(pair["out.nii.gz"], pair.resampled("moving.nii.gz", turn.GetInverse())) < 1e-5


# --- points


@EACH_PAIR
@pytest.mark.parametrize("file", ["transform.h5", "displacement.nii.gz"])
@pytest.mark.parametrize("system", ["LPS", "RAS"])
def test_points_move_as_itk_moves_them_and_come_back(pair: Pair, run: Run, file: str, system: str) -> None:
    points = within(pair.fixed, margin=2)
    given = points_csv(pair.folder / "fixed.csv", points, system)
    said = run(transform=pair[file], input=given, output=pair["moving.csv"])
    assert "warning" not in said
    moved = csv_points(pair["moving.csv"])
    np.testing.assert_allclose(moved, move_all(pair.transform, points), atol=0.01)
    assert np.linalg.norm(moved - points, axis=1).mean() > 1
    said = run(transform=pair[file], input=pair["moving.csv"], output=pair["back.csv"], inverse=True)
    back = csv_points(pair["back.csv"])
    assert np.linalg.norm(back - points, axis=1).max() < 0.01
    assert "remaining error over the points: 0.000" in said
    assert "warning" not in said
    first, names, *rows = Path(pair["back.csv"]).read_text("utf-8").splitlines()
    assert first == f"# CoordinateSystem = {system}"
    assert names == "x,y,z,label"
    assert [row.rsplit(",", 1)[1] for row in rows[:2]] == ["p0", "p1"]


def test_markups_of_slicer_move_and_keep_their_labels(pair: Pair, run: Run) -> None:
    points = within(pair.fixed, 3)
    controls = [{"id": str(n), "label": f"é{n}", "position": (p * [-1, -1, 1]).tolist()} for n, p in enumerate(points)]
    markup = {"type": "Fiducial", "coordinateSystem": "RAS", "controlPoints": controls, "display": {"opacity": 0.5}}
    document = {"@schema": "markups-schema-v1.0.3", "markups": [markup]}
    Path(pair["f.mrk.json"]).write_text(json.dumps(document), encoding="utf-8")
    run(transform=pair["transform.h5"], input=pair["f.mrk.json"], output=pair["moved.mrk.json"])
    moved = json.loads(Path(pair["moved.mrk.json"]).read_text("utf-8"))
    expected = move_all(pair.transform, points) * [-1, -1, 1]
    found = [point.pop("position") for point in moved["markups"][0]["controlPoints"]]
    np.testing.assert_allclose(found, expected, atol=0.01)
    for point in controls:
        point.pop("position")
    assert moved == document


def test_points_without_a_position_stay_without(pair: Pair, run: Run) -> None:
    points = within(pair.fixed, 2).tolist()
    controls = [
        {"id": "1", "position": points[0], "positionStatus": "defined"},
        {"id": "2", "position": "", "positionStatus": "undefined"},
        {"id": "3", "position": points[1], "positionStatus": "defined"},
    ]
    document = {"markups": [{"type": "Fiducial", "coordinateSystem": "LPS", "controlPoints": controls}]}
    Path(pair["f.mrk.json"]).write_text(json.dumps(document), encoding="utf-8")
    said = run(transform=pair["transform.h5"], input=pair["f.mrk.json"], output=pair["moved.mrk.json"])
    assert "warning: 1 points without a position stay without" in said
    moved = json.loads(Path(pair["moved.mrk.json"]).read_text("utf-8"))["markups"][0]["controlPoints"]
    assert moved[1] == controls[1]
    found = [moved[n]["position"] for n in (0, 2)]
    np.testing.assert_allclose(found, move_all(pair.transform, np.array(points)), atol=0.01)
    with pytest.raises(InputError, match="1 of its points have no position; place them or remove them"):
        read_points(pair["f.mrk.json"])


def test_points_beyond_the_grid_are_counted(pair: Pair, run: Run) -> None:
    points = np.concatenate((within(pair.fixed, 5), within(pair.fixed, 2) + 500))
    given = points_csv(pair.folder / "p.csv", points)
    said = run(transform=pair["transform.h5"], input=given, output=pair["moved.csv"])
    assert "warning: 2 of 7 points lie outside the displacement field's grid" in said
    np.testing.assert_allclose(csv_points(pair["moved.csv"])[5:], apply_world(AFFINE, points[5:]), atol=1e-3)
    said = run(transform=pair["transform.h5"], input=pair["moved.csv"], output=pair["back.csv"], inverse=True)
    assert "warning: 2 of 7 points come from outside the displacement field's grid" in said
    np.testing.assert_allclose(csv_points(pair["back.csv"])[5:], points[5:], atol=1e-3)


def test_where_a_fold_is_not_undone_it_is_said(pair: Pair, run: Run) -> None:
    """In four voxels of ten this field folds, and far: more than the search for other beginnings makes good."""
    write_displacement(pair.folder / "wild.nrrd", waves(pair.fixed, 8.0), pair.fixed)
    given = points_csv(pair.folder / "p.csv", within(pair.fixed, 1000))
    said = run(transform=pair["wild.nrrd"], input=given, output=pair["back.csv"], inverse=True)
    assert re.search(r"warning: \d+ of \d+ points have no inverse within 0.5 mm; the transform folds there", said)


def test_where_a_transform_nearly_folds_it_is_said_that_places_are_less_sure(tmp_path: Path, run: Run) -> None:
    """From 10 mm to 20 mm along x this field leaves 0.003 mm of every millimetre."""
    grid = Grid((31, 8, 8), np.eye(4))
    field = torch.zeros(1, 3, *grid.shape)
    field[0, 0] = (-0.997 * (torch.arange(31.0) - 10).clamp(0, 10))[:, None, None]
    write_displacement(tmp_path / "squeeze.nrrd", field, grid)
    places = np.array([[x, 3.2, 4.1] for x in (2.5, 11.3, 14.7, 17.9, 28.6)])
    given, there, back = (str(tmp_path / f"{name}.csv") for name in ("given", "there", "back"))
    points_csv(Path(given), places)
    run(transform=str(tmp_path / "squeeze.nrrd"), input=given, output=there)
    said = run(transform=str(tmp_path / "squeeze.nrrd"), input=there, output=back, inverse=True)
    assert "remaining error over the points: 0.000" in said
    np.testing.assert_allclose(csv_points(back)[[0, 4]], places[[0, 4]], atol=0.002)
    assert "warning: 3 of 5 points come from places where the transform folds or nearly folds" in said


# --- what is refused


def refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], folder: Path, options: dict[str, str]
) -> str:
    """The one line that ``iregzoo apply`` ends with, with exit code 2 and nothing written."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    arguments = [text for name, value in options.items() if value for text in (f"--{name}", value)]
    assert shell.run(monkeypatch, "apply", *arguments) == 2
    out, error = capfd.readouterr()
    assert out == ""
    assert error.startswith("iregzoo: ")
    assert len(error.strip().splitlines()) == 1, error
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    return error


BAD: list[tuple[dict[str, str], str]] = [
    ({"transform": "absent.h5"}, "no such file"),
    ({"transform": "noise.h5"}, "noise.h5: is not a transform that ITK can read; export it again"),
    ({"transform": "fixed.nii.gz"}, "expected a displacement field"),
    ({"transform": "transform.h5,absent.h5"}, "absent.h5: no such file"),
    ({"transform": " , "}, "--transform is empty"),
    ({"transform": "transform.h5,"}, "transforms 'transform.h5,': one of them is empty; check the commas"),
    ({"transform": ",transform.h5"}, "one of them is empty; check the commas"),
    ({"transform": "transform.h5,,[transform.h5,1]"}, "one of them is empty; check the commas"),
    ({"transform": "[transform.h5,2]"}, "transform '[transform.h5,2]': give [FILE,1] for the inverse, or [FILE,0]"),
    ({"transform": "[transform.h5"}, "transform '[transform.h5': give [FILE,1] for the inverse, or [FILE,0]"),
    ({"transform": "flat.tfm", "inverse": "true"}, "is singular"),
    ({"transform": "flat.tfm", "inverse": "true", "input": "good.csv", "output": "new.csv"}, "is singular"),
    ({"input": "absent.nii.gz"}, "no such file"),
    ({"input": "nan.nrrd"}, "1 voxels are NaN"),
    ({"reference": "absent.nii.gz"}, "no such file"),
    ({"reference": ""}, "needs --reference"),
    ({"interpolation": "sinc"}, "'sinc' is unknown; choose auto, linear, nearest, cubic, smooth-labels"),
    ({"interpolation": "smooth-labels"}, "moving.nii.gz: does not look like a label map, which smooth-labels is for"),
    ({"interpolation": "cubic", "input": "thin.nrrd"}, "thin.nrrd: has an axis of 2 voxels, too few for cubic"),
    ({"interpolation": "cubic", "input": "good.csv", "output": "new.csv"}, "good.csv: points are not interpolated"),
    ({"outside": "air"}, "outside 'air': give a number"),
    ({"outside": "nan"}, "outside 'nan': give a number"),
    ({"outside": "-1e999"}, "outside -inf: give a number"),
    ({"outside": "true"}, "outside 'true': give a number"),
    ({"outside": "-1", "input": "good.csv", "output": "new.csv"}, "good.csv: points have no value outside an image"),
    ({"outside": "3", "input": "moving_labels.nii.gz"}, "looks like a label map, which has 0 outside; leave out"),
    ({"outside": "3", "input": "moving_labels.nii.gz", "interpolation": "nearest"}, "looks like a label map"),
    ({"outside": "3", "input": "moving_labels.nii.gz", "interpolation": "smooth-labels"}, "looks like a label map"),
    ({"outside": "-1", "input": "bytes.nrrd"}, "-1: the voxels of bytes.nrrd hold whole numbers from 0 to 255; give"),
    ({"outside": "0.5", "input": "bytes.nrrd"}, "bytes.nrrd hold whole numbers from 0 to 255; give one of these"),
    ({"outside": "1e300"}, "outside 1e+300: the voxels of moving.nii.gz hold numbers from -3.4"),
    ({"inverse": "perhaps"}, "inverse 'perhaps': give true or false"),
    ({"output": "new.png"}, "ends with .nii.gz or .nii or .nrrd or .mha"),
    ({"output": "new.csv"}, "ends with .nii.gz"),
    ({"output": "there.nii.gz"}, "already exists; choose another --output or add --overwrite"),
    ({"output": "moving.nii.gz", "overwrite": "true"}, "would be overwritten by the result"),
    ({"output": "transform.h5.nii.gz/x.nii.gz", "input": "absent.nii.gz"}, "no such file"),
    ({"input": "good.csv", "output": "new.nii.gz"}, "ends with .csv"),
    ({"input": "good.csv", "output": "new.mrk.json"}, "ends with .csv"),
    ({"input": "absent.csv", "output": "new.csv"}, "absent.csv: cannot be read"),
    ({"input": "homeless.csv", "output": "new.csv"}, "homeless.csv: is not a list of landmarks"),
    ({"input": "flat.csv", "output": "new.csv"}, "flat.csv: has columns 'x, y'; expected x, y, z"),
    ({"input": "empty.csv", "output": "new.csv"}, "empty.csv: holds no points"),
    ({"input": "box.mrk.json", "output": "new.mrk.json"}, "box.mrk.json: holds a markup of type ROI"),
    ({"input": "old.fcsv", "output": "new.fcsv"}, "iregzoo does not read .fcsv; save the points as .mrk.json"),
    ({"transform": "inverse:absent.h5"}, "absent.h5: no such file"),
    ({"transform": "[flat.tfm,1]"}, "is singular"),
    ({"input": "homeless.mrk.json", "output": "new.mrk.json"}, "homeless.mrk.json: is not a list of landmarks"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[" ".join(change.values()) for change, _ in BAD])
def test_bad_input_ends_with_a_line(
    pair: Pair,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    change: dict[str, str],
    words: str,
) -> None:
    monkeypatch.chdir(pair.folder)
    Path("noise.h5").write_bytes(bytes(range(256)) * 8)
    Path("there.nii.gz").write_text("mine", encoding="utf-8")
    Path("homeless.csv").write_text("x,y,z\n1,2,3\n", encoding="utf-8")
    Path("flat.csv").write_text("# CoordinateSystem = LPS\nx,y\n1,2\n", encoding="utf-8")
    Path("empty.csv").write_text("# CoordinateSystem = LPS\nx,y,z\n", encoding="utf-8")
    Path("homeless.mrk.json").write_text(
        json.dumps({"markups": [{"controlPoints": [{"position": [1, 2, 3]}]}]}), encoding="utf-8"
    )
    box = {"type": "ROI", "coordinateSystem": "LPS", "controlPoints": [{"position": [1, 2, 3]}]}
    Path("box.mrk.json").write_text(json.dumps({"markups": [box]}), encoding="utf-8")
    points_csv(Path("good.csv"), np.zeros((1, 3)))
    flat = sitk.AffineTransform(np.diag([1.0, 1.0, 0.0]).ravel().tolist(), (0.0, 0.0, 0.0))
    sitk.WriteTransform(flat, "flat.tfm")
    hole = np.ones((4, 5, 6))
    hole[1, 2, 3] = np.nan
    sitk.WriteImage(sitk.GetImageFromArray(hole), "nan.nrrd")
    noise = np.random.default_rng(0).integers(0, 256, (4, 5, 6), dtype=np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(noise), "bytes.nrrd")
    sitk.WriteImage(sitk.GetImageFromArray(noise[:2]), "thin.nrrd")
    options = {
        "transform": "transform.h5",
        "input": "moving.nii.gz",
        "reference": "fixed.nii.gz",
        "output": "new.nii.gz",
    }
    assert words in refused(monkeypatch, capfd, pair.folder, options | change)


def test_overwrite_replaces(pair: Pair, run: Run) -> None:
    Path(pair["out.nii.gz"]).write_text("mine", encoding="utf-8")
    way = {"transform": pair["transform.h5"], "input": pair["moving.nii.gz"], "reference": pair["fixed.nii.gz"]}
    run(**way, output=pair["out.nii.gz"], overwrite=True)
    assert difference(pair["out.nii.gz"], pair.resampled("moving.nii.gz", pair.transform)) < 1e-4
