"""``iregzoo apply`` on series, several numbers a voxel, with each interpolation: each volume as ITK has it."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import map_coordinates

import shell
from geometry import (
    AFFINE,
    GRIDS,
    Array,
    apply_world,
    draw_head,
    move_all,
    waves,
    wavy_transform,
    world_points,
)
from iregzoo.apply import memory
from iregzoo.errors import InputError
from iregzoo.space.files import write_transform
from iregzoo.space.grid import RAS_FROM_LPS, Grid
from iregzoo.space.scan import read_scan

PAIRS = [("plain", "everything"), ("oblique", "anisotropic"), ("everything", "flipped")]
EACH_PAIR = pytest.mark.parametrize("way", PAIRS, ids=[" to ".join(pair) for pair in PAIRS], indirect=True)
TR = 2.5
MODES = {"linear": sitk.sitkLinear, "nearest": sitk.sitkNearestNeighbor, "cubic": sitk.sitkBSpline}
Run = Callable[..., str]


def at_origin(name: str) -> Grid:
    affine = GRIDS[name].affine.copy()
    affine[:3, 3] -= GRIDS[name].centre
    return Grid(GRIDS[name].shape, affine)


@dataclass(frozen=True)
class Way:
    """A folder with a reference and a transform from it to a moving grid, and the same without this package."""

    folder: Path
    fixed: Grid
    moving: Grid

    def __getitem__(self, name: str) -> str:
        return str(self.folder / name)

    @property
    def transform(self) -> sitk.Transform:
        return wavy_transform(self.fixed)

    def volumes(self, number: int, kind: str = "float32") -> list[sitk.Image]:
        """Heads of different brightness, with noise, on the moving grid."""
        head, random = draw_head(self.moving, size=0.16)[0, 0].numpy(), np.random.default_rng(0)
        drawn = (head * (1 + index) + random.uniform(0, 200, head.shape) for index in range(number))
        return [self.moving.to_sitk(array.astype(kind)) for array in drawn]

    def labels(self, *values: int, kind: str = "int32") -> sitk.Image:
        head = draw_head(self.moving, size=0.16)[0, 0].numpy()
        array = np.zeros(head.shape, kind)
        for limit, value in zip((300, 550, 800), values, strict=False):
            array[head > limit] = value
        return self.moving.to_sitk(array)

    def resampled(self, volume: sitk.Image, mode: int = sitk.sitkLinear, outside: float = 0) -> Array:
        reference = sitk.ReadImage(self["fixed.nii.gz"])
        return sitk.GetArrayFromImage(sitk.Resample(volume, reference, self.transform, mode, outside))


@pytest.fixture
def way(request: pytest.FixtureRequest, tmp_path: Path) -> Way:
    names = getattr(request, "param", ("oblique", "everything"))
    found = Way(tmp_path, at_origin(names[0]), at_origin(names[1]))
    sitk.WriteImage(found.fixed.to_sitk(np.zeros(found.fixed.shape, np.uint8)), found["fixed.nii.gz"])
    write_transform(tmp_path / "transform.h5", waves(found.fixed), found.fixed, AFFINE)
    return found


@pytest.fixture
def apply(way: Way, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``iregzoo apply`` of an input to an output, with more options as keywords; gives back what it printed."""

    def run(source: str, output: str, **options: str) -> str:
        given = {"transform": "transform.h5", "input": source, "reference": "fixed.nii.gz", "output": output} | options
        monkeypatch.chdir(way.folder)
        arguments = [text for name, value in given.items() for text in (f"--{name}", value)]
        assert shell.run(monkeypatch, "apply", *arguments) == 0
        return capsys.readouterr().out

    return run


def write_series(path: str, volumes: list[sitk.Image], start: float = 0.0) -> None:
    sitk.WriteImage(sitk.JoinSeries(volumes, start, TR), path)


def array_of(path: str) -> Array:
    found: Array = sitk.GetArrayFromImage(sitk.ReadImage(path))
    return found


# --- 4-D series


@EACH_PAIR
@pytest.mark.parametrize("interpolation", MODES)
def test_each_volume_of_a_series_is_what_itk_resamples(way: Way, apply: Run, interpolation: str) -> None:
    volumes = way.volumes(3)
    write_series(way["bold.nii.gz"], volumes, start=0.75)
    apply("bold.nii.gz", "out.nii.gz", interpolation=interpolation)
    found = sitk.ReadImage(way["out.nii.gz"])
    assert found.GetSize() == (*way.fixed.shape, 3)
    assert found.GetPixelID() == sitk.sitkFloat32
    assert found.GetSpacing()[3] == pytest.approx(TR)
    assert found.GetOrigin()[3] == pytest.approx(0.75)
    assert Grid.of(found[..., 1]).matches(way.fixed)
    for volume, ours in zip(volumes, sitk.GetArrayFromImage(found), strict=True):
        theirs = way.resampled(volume, MODES[interpolation])
        assert ours.std() > 100
        apart = np.abs(ours - theirs) > 1e-4 * theirs.max()
        assert apart.mean() <= (1e-3 if interpolation == "nearest" else 0)


def test_a_series_larger_than_the_memory_is_refused_before_any_work(
    way: Way, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_series(way["bold.nii.gz"], way.volumes(3))
    monkeypatch.chdir(way.folder)
    options = ["--transform", "transform.h5", "--input", "bold.nii.gz", "--reference", "fixed.nii.gz"]
    needed = 3 * int(np.prod(way.fixed.shape) + np.prod(way.moving.shape)) * 4
    for held, code in ((needed - 1, 2), (needed, 0), (None, 0)):  # None where the system does not say
        monkeypatch.setattr("iregzoo.apply.memory", lambda held=held: held)
        assert shell.run(monkeypatch, "apply", *options, "--output", f"{held}.nii.gz") == code
        refused = "bold.nii.gz: it and 3 volumes on the reference's grid take" in capsys.readouterr().err
        assert refused == (code == 2) == (not Path(f"{held}.nii.gz").exists())


def test_the_memory_of_this_machine_is_known_or_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "linux":
        assert memory() is not None
    assert (memory() or 2**30) > 2**28
    monkeypatch.setattr("os.sysconf", lambda name: -1 if "PHYS" in name else 4096)
    assert memory() is None
    monkeypatch.delattr("os.sysconf", raising=False)
    assert memory() is None


@pytest.mark.parametrize("inverse", ["false", "true"])
@pytest.mark.parametrize("kind", ["int16", "float32", "float64"])
def test_a_series_equals_its_single_volumes(way: Way, apply: Run, kind: str, inverse: str) -> None:
    volumes = [sitk.Cast(volume - 1000, volume.GetPixelID()) for volume in way.volumes(3, kind)]
    write_series(way["ct.nrrd"], volumes)
    said = apply("ct.nrrd", "out.nrrd", inverse=inverse)
    assert "interpolation: linear, because ct.nrrd looks like an image" in said
    assert ("inverse: remaining error" in said) == (inverse == "true")
    found = array_of(way["out.nrrd"])
    assert found.dtype == kind
    for index, volume in enumerate(volumes):
        sitk.WriteImage(volume, way["one.nrrd"])
        apply("one.nrrd", "one_out.nrrd", inverse=inverse, overwrite="true")
        one = array_of(way["one_out.nrrd"])
        assert one.min() < -900  # air, also outside
        apart = np.abs(found[index].astype(np.float64) - one)
        assert apart.max() <= (1 if kind == "int16" else 1e-3)
        assert (apart < 1e-6).mean() > 0.999


@pytest.mark.parametrize(("unit", "factor"), [("sec", 1.0), ("msec", 1e3), ("usec", 1e6)])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_the_repetition_time_is_kept_in_seconds(way: Way, apply: Run, unit: str, factor: float, ending: str) -> None:
    array = np.random.default_rng(0).uniform(0, 100, (*way.moving.shape, 4)).astype(np.float32)
    image = nib.Nifti1Image(array, RAS_FROM_LPS @ way.moving.affine)
    image.header.set_zooms((*image.header.get_zooms()[:3], TR * factor))
    image.header.set_xyzt_units("mm", unit)
    nib.save(image, way["bold.nii.gz"])
    apply("bold.nii.gz", f"out{ending}")
    found = nib.load(way[f"out{ending}"])
    assert found.shape == (*way.fixed.shape, 4)
    assert found.header.get_zooms()[3] == pytest.approx(TR)
    assert found.header.get_xyzt_units() == ("mm", "sec")
    np.testing.assert_allclose(found.affine, RAS_FROM_LPS @ way.fixed.affine, atol=1e-4)


@pytest.mark.parametrize("kind", [nib.Nifti2Image, nib.MGHImage])
def test_series_in_nifti_2_and_of_freesurfer(way: Way, apply: Run, kind: type[nib.spatialimages.SpatialImage]) -> None:
    volumes = way.volumes(3)
    write_series(way["bold.nii.gz"], volumes)
    plain = nib.load(way["bold.nii.gz"])
    image = kind(np.asarray(plain.dataobj), plain.affine)
    image.header.set_zooms((*plain.header.get_zooms()[:3], 1e3 * TR))  # ms
    if kind is nib.Nifti2Image:
        image.header.set_xyzt_units("mm", "msec")
    name = "bold.mgz" if kind is nib.MGHImage else "bold2.nii.gz"
    nib.save(image, way[name])
    apply("bold.nii.gz", "plain.nii.gz")
    apply(name, "out.nii.gz")
    found, expected = (sitk.ReadImage(way[path]) for path in ("out.nii.gz", "plain.nii.gz"))
    assert found.GetSpacing() == pytest.approx(expected.GetSpacing())
    np.testing.assert_allclose(sitk.GetArrayFromImage(found), sitk.GetArrayFromImage(expected), atol=0.05)


@pytest.mark.parametrize(
    ("interpolation", "theirs"), [("linear", "linear"), ("cubic", "bSpline"), ("smooth-labels", "genericLabel")]
)
def test_ants_gets_the_same_series(way: Way, apply: Run, interpolation: str, theirs: str) -> None:
    ants = pytest.importorskip("ants", reason="needs antspyx, of the extra peers")
    smooth = interpolation == "smooth-labels"
    volumes = [way.labels(1, 2, 3, kind="float32"), way.labels(4, kind="float32")] if smooth else way.volumes(2)
    write_series(way["bold.nii.gz"], volumes)
    apply("bold.nii.gz", "out.nii.gz", interpolation=interpolation)
    fixed, moving = (ants.image_read(way[name]) for name in ("fixed.nii.gz", "bold.nii.gz"))
    expected = ants.apply_transforms(fixed, moving, [way["transform.h5"]], theirs, imagetype=3).numpy()
    ours = array_of(way["out.nii.gz"]).transpose(3, 2, 1, 0)
    assert ours.shape == expected.shape
    assert (np.abs(ours - expected) > 1e-4 * expected.max()).mean() < (1e-3 if smooth else 1e-5)


def test_a_series_of_label_maps_is_read_from_the_nearest_voxel(way: Way, apply: Run) -> None:
    """Also where one of them is empty; a single grey volume makes all of it an image."""
    maps = [way.labels(1, 2, 2**31 - 1), way.labels(), way.labels(4, 5)]
    write_series(way["labels.nii.gz"], maps)
    assert "nearest, because labels.nii.gz looks like a label map" in apply("labels.nii.gz", "out.nii.gz")
    found = array_of(way["out.nii.gz"])
    assert found.dtype == np.int32
    assert [set(np.unique(volume).tolist()) for volume in found] == [{0, 1, 2, 2**31 - 1}, {0}, {0, 4, 5}]
    write_series(way["mixed.nii.gz"], [*maps, *way.volumes(1, "int32")])
    assert "linear, because mixed.nii.gz looks like an image" in apply("mixed.nii.gz", "mixed_out.nii.gz")


def test_a_series_of_one_volume_is_a_volume(way: Way, apply: Run) -> None:
    volumes = way.volumes(1)
    write_series(way["one.nii.gz"], volumes)
    apply("one.nii.gz", "out.nii.gz")
    assert sitk.ReadImage(way["out.nii.gz"]).GetSize() == way.fixed.shape


# --- several numbers a voxel


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("number", [2, 3, 5])
def test_numbers_of_a_voxel_are_resampled_one_by_one(way: Way, apply: Run, ending: str, number: int) -> None:
    volumes = [volume - 300 for volume in way.volumes(number)]
    sitk.WriteImage(sitk.Compose(volumes), way[f"parts{ending}"])
    said = apply(f"parts{ending}", f"out{ending}")
    assert ("warning: 3 values per voxel were resampled one by one; directions" in said) == (number == 3)
    found = sitk.ReadImage(way[f"out{ending}"])
    assert found.GetPixelID() == sitk.sitkVectorFloat32
    assert Grid.of(found).matches(way.fixed)
    for index, volume in enumerate(volumes):  # 0 lies outside, as with ITK
        ours = sitk.GetArrayFromImage(sitk.VectorIndexSelectionCast(found, index))
        theirs = way.resampled(volume)
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_the_value_outside_is_that_of_every_volume(way: Way, apply: Run) -> None:
    volumes = way.volumes(2)
    write_series(way["bold.nrrd"], volumes)
    sitk.WriteImage(sitk.Compose(volumes), way["parts.nrrd"])
    for name in ("bold", "parts"):
        apply(f"{name}.nrrd", f"{name}_out.nrrd", outside="-1000")
        found = array_of(way[f"{name}_out.nrrd"])
        for index, volume in enumerate(volumes):
            expected = way.resampled(volume, sitk.sitkLinear, -1000)
            ours = found[index] if name == "bold" else found[..., index]
            assert (ours == -1000).sum() == (expected == -1000).sum() > 100
            np.testing.assert_allclose(ours, expected, atol=1e-4 * expected.max())


# --- interpolation


@EACH_PAIR
def test_cubic_is_the_cubic_spline_of_scipy(way: Way, apply: Run) -> None:
    volume = way.volumes(1)[0]
    sitk.WriteImage(volume, way["scan.nii.gz"])
    apply("scan.nii.gz", "out.nii.gz", interpolation="cubic")
    places = move_all(way.transform, world_points(way.fixed).reshape(-1, 3))
    index = apply_world(np.linalg.inv(way.moving.affine), places)
    inside = ((index > 0) & (index < np.array(way.moving.shape) - 1)).all(1)
    assert inside.mean() > 0.3
    voxels = sitk.GetArrayFromImage(volume).transpose(2, 1, 0).astype(np.float64)
    expected = map_coordinates(voxels, index[inside].T, order=3, mode="mirror")
    found = array_of(way["out.nii.gz"]).transpose(2, 1, 0).reshape(-1)[inside]
    np.testing.assert_allclose(found, expected, atol=1e-3 * voxels.max())
    assert found.max() > array_of(way["scan.nii.gz"]).max() or found.min() < 0  # overshoot, left as it is


@pytest.mark.parametrize("kind", ["uint8", "int16"])
def test_cubic_rounds_whole_numbers_and_stops_at_the_ends_of_their_type(way: Way, apply: Run, kind: str) -> None:
    ends = np.iinfo(kind)
    steps = np.random.default_rng(0).choice([ends.min, ends.max], way.moving.shape)
    volume = way.moving.to_sitk(steps.astype(kind))
    sitk.WriteImage(volume, way["scan.nrrd"])
    apply("scan.nrrd", "out.nrrd", interpolation="cubic")
    found = array_of(way["out.nrrd"])
    assert found.dtype == kind
    exact = way.resampled(sitk.Cast(volume, sitk.sitkFloat64), sitk.sitkBSpline)
    assert exact.max() > ends.max + 10
    inside = np.abs(way.resampled(volume * 0 + 1)) == 1
    assert np.abs(found - exact.clip(ends.min, ends.max))[inside].max() < 0.51


@EACH_PAIR
@pytest.mark.parametrize("kind", ["uint8", "int32", "float32"])
def test_smooth_labels_are_those_of_itk(way: Way, apply: Run, kind: str) -> None:
    values = (1, 2, 3) if kind == "uint8" else (7, 2**24 - 1, 5) if kind == "float32" else (7, 2**31 - 1, 70000)
    volume = way.labels(*values, kind=kind)
    sitk.WriteImage(volume, way["labels.nii.gz"])
    said = apply("labels.nii.gz", "smooth.nii.gz", interpolation="smooth-labels")
    assert "interpolation:" not in said
    apply("labels.nii.gz", "near.nii.gz", interpolation="nearest")
    found = array_of(way["smooth.nii.gz"])
    assert found.dtype == kind
    assert set(np.unique(found).tolist()) == {0, *values}
    expected = way.resampled(sitk.Cast(volume, sitk.sitkInt32), sitk.sitkLabelLinear)
    assert (found != expected).mean() < 1e-4
    assert (found != array_of(way["near.nii.gz"])).mean() > 1e-3


def test_smooth_labels_of_a_series_and_backwards(way: Way, apply: Run) -> None:
    maps = [way.labels(1, 2, 3), way.labels(), way.labels(9)]
    write_series(way["labels.nii.gz"], maps)
    apply("labels.nii.gz", "out.nii.gz", interpolation="smooth-labels")
    for volume, ours in zip(maps, array_of(way["out.nii.gz"]), strict=True):
        assert (ours != way.resampled(volume, sitk.sitkLabelLinear)).mean() < 1e-4
    fixed = draw_head(way.fixed, size=0.16)[0, 0].numpy()
    sitk.WriteImage(way.fixed.to_sitk((fixed > 300).astype(np.uint8)), way["mask.nii.gz"])
    back = {"reference": "labels3.nii.gz", "inverse": "true", "interpolation": "smooth-labels"}
    sitk.WriteImage(maps[0], way["labels3.nii.gz"])
    said = apply("mask.nii.gz", "back.nii.gz", **back)
    assert "inverse: remaining error over the voxels" in said
    apply("back.nii.gz", "again.nii.gz", interpolation="smooth-labels")
    again, mask = array_of(way["again.nii.gz"]) > 0, array_of(way["mask.nii.gz"]) > 0
    assert 2 * (again & mask).sum() / (again.sum() + mask.sum()) > 0.9


# --- what is refused

SHAPE = (5, 6, 7)
COLOUR = np.zeros(SHAPE, dtype=[(name, "u1") for name in "RGB"])
BAD: list[tuple[str, dict[str, str], str]] = [
    ("colour.nii.gz", {}, "colour.nii.gz: has 3 values of 8 bits per voxel, as colours have; convert it"),
    ("colour.nrrd", {}, "colour.nrrd: has 4 values of 8 bits per voxel, as colours have"),
    ("complex.nii.gz", {}, "complex.nii.gz: holds complex numbers; give its magnitude image"),
    ("five.nii.gz", {}, "five.nii.gz: has size 5×6×7×3×2; expected a 3-D volume or a 4-D series"),
    ("five2.nii.gz", {}, "five2.nii.gz: has shape (5, 6, 7, 3, 2); expected a 3-D volume or a 4-D series"),
    (
        "vectors.nii.gz",
        {},
        "vectors.nii.gz: is a 4-D series (5×6×7×3) of 2 values per voxel; give each",
    ),
    ("flat.nii.gz", {}, "flat.nii.gz: has size 1×6×7×3; expected a 3-D volume or a 4-D series, of at least 2"),
    ("hole.nrrd", {}, "hole.nrrd: 1 voxels are NaN or infinite"),
    ("series.nii.gz", {"interpolation": "smooth-labels"}, "series.nii.gz: does not look like a label map"),
    ("half.nii.gz", {"interpolation": "smooth-labels"}, "half.nii.gz: does not look like a label map"),
    ("fixed.nii.gz", {"reference": "series.nii.gz"}, "has size 5×6×7×3; expected one 3-D volume"),
    ("fixed.nii.gz", {"transform": "series.nii.gz"}, "has size 5×6×7×3; expected one 3-D volume"),
]


@pytest.mark.parametrize(("source", "change", "words"), BAD, ids=[" ".join((s, *c.values())) for s, c, _ in BAD])
def test_what_is_no_volume_or_series_of_them_ends_with_a_line(
    way: Way,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    source: str,
    change: dict[str, str],
    words: str,
) -> None:
    monkeypatch.chdir(way.folder)
    random = np.random.default_rng(0)
    series = random.integers(0, 1000, (*SHAPE, 3)).astype(np.int16)
    half = np.zeros(SHAPE, np.float32)
    half[2:4, 2:4, 2:4] = 0.5
    for name, array in (
        ("colour", COLOUR),
        ("complex", np.ones((*SHAPE, 3), np.complex64)),
        ("five", np.zeros((*SHAPE, 3, 2), np.float32)),
        ("series", series),
        ("flat", series[:1]),
        ("half", half),
    ):
        nib.save(nib.Nifti1Image(array, np.eye(4)), f"{name}.nii.gz")
    nib.save(nib.Nifti2Image(np.zeros((*SHAPE, 3, 2), np.float32), np.eye(4)), "five2.nii.gz")
    vectors = nib.Nifti1Image(np.zeros((*SHAPE, 3, 2), np.float32), np.eye(4))
    vectors.header.set_intent("vector")
    nib.save(vectors, "vectors.nii.gz")
    grid = Grid(SHAPE, np.eye(4))
    sitk.WriteImage(grid.to_sitk(np.zeros((*SHAPE, 4), np.uint8), vector=True), "colour.nrrd")
    volumes = [grid.to_sitk(random.uniform(size=SHAPE)) for _ in range(3)]
    volumes[2][1, 2, 3] = float("nan")
    write_series("hole.nrrd", volumes)
    before = {path: path.stat().st_mtime_ns for path in way.folder.iterdir()}
    given = {"transform": "transform.h5", "input": source, "reference": "fixed.nii.gz", "output": "new.nii.gz"} | change
    arguments = [text for name, value in given.items() for text in (f"--{name}", value)]
    assert shell.run(monkeypatch, "apply", *arguments) == 2
    out, error = capfd.readouterr()
    assert out == ""
    assert error.startswith("iregzoo: ")
    assert len(error.strip().splitlines()) == 1, error
    assert words in error
    assert {path: path.stat().st_mtime_ns for path in way.folder.iterdir()} == before


def test_a_registration_still_wants_one_volume(way: Way) -> None:
    write_series(way["bold.nii.gz"], way.volumes(3))
    with pytest.raises(InputError, match=r"has size .*×3; expected one 3-D volume .* extract the volume first"):
        read_scan(way["bold.nii.gz"])
