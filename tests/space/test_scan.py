"""Reading scans of every format, each check of the input, and intensities."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from torch import Tensor

from geometry import GRIDS, draw_head, make_grid, noise_image, to_image
from iregzoo.errors import InputError
from iregzoo.space.grid import RAS_FROM_LPS, Grid
from iregzoo.space.scan import Scan, image_scan, label_scan, normalise, read_labels, read_scan, resample_to
from rights import without_rights

GRID = GRIDS["everything"]
EYE = np.eye(4)


def nifti(path: Path, array: np.ndarray, affine: np.ndarray = EYE) -> Path:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def scan_of(data: Tensor, grid: Grid) -> Scan:
    return Scan(data, grid, Path("scan.nii.gz"))


def write_series(
    folder: Path, array: np.ndarray, grid: Grid, uid: str = "1.2.826.0.1.3680043.2.1125.1", digits: int = 6
) -> None:
    """One CT series, a file a slice, written as scanners do: the files' order says nothing, and places are rounded."""
    folder.mkdir(exist_ok=True)
    image = grid.to_sitk(array.astype(np.int16))
    cosines = np.array(image.GetDirection()).reshape(3, 3)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number in range(grid.shape[2]):
        cut = image[:, :, number]
        tags = {
            "0008|0060": "CT",
            "0020|000d": "1.2.826.0.1.3680043.2.1125.9",
            "0020|000e": uid,
            "0008|0018": f"{uid}.{number + 1}",
            "0020|0013": str(number + 1),
            "0020|0032": "\\".join(f"{v:.{digits}f}" for v in image.TransformIndexToPhysicalPoint((0, 0, number))),
            "0020|0037": "\\".join(f"{v:.9g}" for v in (*cosines[:, 0], *cosines[:, 1])),
            "0018|0050": f"{grid.spacing[2]:.9g}",
        }
        for tag, value in tags.items():
            cut.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{uid[-1]}_{(number * 7) % grid.shape[2]:03d}.dcm"))
        writer.Execute(cut)


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "scan.nrrd", "scan.mha", "scan.mhd", "scan.hdr"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_file_gives_its_voxels_and_their_places(tmp_path: Path, name: str, grid: Grid) -> None:
    image = noise_image(grid.shape)
    sitk.WriteImage(to_image(image, grid), str(tmp_path / name))
    scan = read_scan(tmp_path / name)
    assert torch.equal(scan.data, image)
    assert scan.grid.shape == grid.shape
    np.testing.assert_allclose(scan.grid.affine, grid.affine, atol=1e-5)


def test_nifti_affine_is_read_as_nibabel_reads_it(tmp_path: Path) -> None:
    # Another writer than ITK, and RAS there against LPS here.
    ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ GRID.affine
    path = nifti(tmp_path / "scan.nii.gz", noise_image(GRID.shape)[0, 0].numpy(), ras)
    np.testing.assert_allclose(read_scan(path).grid.affine, GRID.affine, atol=1e-5)


@pytest.mark.parametrize(("kind", "name"), [(nib.MGHImage, "scan.mgz"), (nib.Nifti2Image, "scan.nii.gz")])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.int16])
def test_what_itk_cannot_read_is_read(tmp_path: Path, kind: type, name: str, dtype: type) -> None:
    image, ras = noise_image(GRID.shape)[0, 0].numpy().astype(dtype), np.diag([-1.0, -1.0, 1.0, 1.0]) @ GRID.affine
    nib.save(kind(image, ras.astype(np.float32)), tmp_path / name)
    scan = read_scan(tmp_path / name)
    assert np.array_equal(scan.data[0, 0].numpy(), image.astype(np.float32))
    np.testing.assert_allclose(scan.grid.affine, GRID.affine, atol=1e-4)
    sheared = ras + np.array([[0, 0.4, 0, 0]] + [[0] * 4] * 3)
    nib.save(kind(image, sheared.astype(np.float32)), tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: its affine is sheared"):
        read_scan(tmp_path / name)


def test_singular_affine_of_a_freesurfer_volume_is_refused(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    nib.save(nib.MGHImage(noise_image((4, 5, 6))[0, 0].numpy(), EYE), tmp_path / "scan.mgh")
    raw = bytearray((tmp_path / "scan.mgh").read_bytes())
    raw[38:42] = bytes(4)  # the spacing along the third axis
    (tmp_path / "scan.mgh").write_bytes(raw)
    with pytest.raises(InputError, match=r"scan.mgh: its affine is singular"):
        read_scan(tmp_path / "scan.mgh")
    assert not [warning for warning in recwarn if "divide" in str(warning.message)]


def test_two_affines_that_differ_are_told_of(tmp_path: Path) -> None:
    image = nib.Nifti1Image(noise_image((9, 8, 7))[0, 0].numpy(), EYE)
    for shift, said in ((0.1, ""), (30.0, "place it up to 30.0 mm apart; its")):
        moved = np.eye(4)
        moved[0, 3] = shift
        image.set_sform(EYE, 1)
        image.set_qform(moved, 1)
        nib.save(image, tmp_path / "scan.nii.gz")
        scan = read_scan(tmp_path / "scan.nii.gz")
        assert said in scan.doubt
        assert bool(scan.doubt) == bool(said)
    taken = {"qform": -30.0, "sform": 0.0}[scan.doubt.split()[-3]]
    assert float(scan.grid.affine[0, 3]) == pytest.approx(taken)


def test_a_quaternion_that_is_none_is_no_second_affine(tmp_path: Path) -> None:
    image = nib.Nifti1Image(noise_image((9, 8, 7))[0, 0].numpy(), EYE)
    image.set_sform(EYE, 1)
    image.set_qform(EYE, 1)
    for name in ("quatern_b", "quatern_c", "quatern_d"):
        image.header[name] = 0.6  # of squares that add up to more than 1
    nib.save(image, tmp_path / "scan.nii.gz")
    with pytest.raises(ValueError, match="w2 should be positive"):
        nib.load(tmp_path / "scan.nii.gz").header.get_qform()
    scan = read_scan(tmp_path / "scan.nii.gz")
    assert scan.doubt == ""
    np.testing.assert_allclose(scan.grid.affine, RAS_FROM_LPS @ EYE, atol=1e-6)


def test_scan_smaller_than_a_millimetre_is_refused(tmp_path: Path) -> None:
    path = nifti(tmp_path / "scan.nii.gz", noise_image((30, 40, 50))[0, 0].numpy(), np.diag([0.001, 0.001, 0.001, 1]))
    with pytest.raises(InputError, match=r"scan.nii.gz: measures 0.03×0.04×0.05 mm, too small .* spacing in mm"):
        read_scan(path)


def test_dicom_folder_gives_its_voxels_and_their_places(tmp_path: Path) -> None:
    grid = make_grid((12, 10, 9), (0.8, 0.9, 2.5), degrees=(5, -7, 11), centre=(10, -20, 300))
    array = np.random.default_rng(0).integers(-1000, 2000, grid.shape)
    write_series(tmp_path / "series", array, grid)
    scan = read_scan(tmp_path / "series")
    np.testing.assert_array_equal(scan.data[0, 0], array)
    np.testing.assert_allclose(scan.grid.affine, grid.affine, atol=1e-4)
    assert scan.outside == array.min()


SERIES = make_grid((6, 5, 12), (0.8, 0.9, 2.5), degrees=(5, -7, 11), centre=(10, -20, 300))


def series(
    folder: Path, slices: Sequence[int] = range(12), shift_mm: float = 0.0, tags: Mapping[str, str] | None = None
) -> Path:
    """Slices of a volume in a folder, which may be chosen more than once or be shifted sideways one by one.

    ``tags`` are the last slice's own.
    """
    array = np.arange(6 * 5 * 12).reshape(6, 5, 12)
    write_series(folder, array, SERIES)
    files = sorted(folder.iterdir(), key=lambda path: sitk.ReadImage(str(path)).GetOrigin()[2])
    for number, path in enumerate(files):
        cut = sitk.ReadImage(str(path))
        cut.SetOrigin(cut.TransformContinuousIndexToPhysicalPoint((number * shift_mm / 0.8, 0.0, 0.0)))
        path.unlink()
        for copy in range(list(slices).count(number)):
            cut.SetMetaData("0020|0032", "\\".join(f"{v:.9g}" for v in cut.GetOrigin()))
            cut.SetMetaData("0008|0018", f"1.2.826.0.1.3680043.2.1125.5.{number}.{copy}")
            for tag, value in (tags or {}).items() if number == max(slices) else ():
                cut.SetMetaData(tag, value)
            writer = sitk.ImageFileWriter()
            writer.KeepOriginalImageUIDOn()
            writer.SetFileName(str(folder / f"slice{number:02d}{'abc'[copy]}.dcm"))
            writer.Execute(cut)
    return folder


def test_a_whole_series_is_read_however_its_files_are_called(tmp_path: Path) -> None:
    scan = read_scan(series(tmp_path / "series", shift_mm=0.01))  # what rounded places come to
    assert scan.grid.shape == (6, 5, 12)
    np.testing.assert_allclose(scan.grid.spacing, (0.8, 0.9, 2.5), atol=1e-3)


@pytest.mark.parametrize(
    ("slices", "shift_mm", "words"),
    [
        ([0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11], 0, "2.5 mm apart, but slice03a.dcm and slice05a.dcm are 5 mm; export"),
        ([*range(12), 4], 0, "slice04a.dcm and slice04b.dcm are slices at the same position; give a folder with only"),
        ([*range(12), *range(12)], 0, "slice00a.dcm and slice00b.dcm are slices at the same position"),
        ([0, 0], 0, "slice00a.dcm and slice00b.dcm are slices at the same position"),
        (range(12), 0.5, "shifted by 5.5 mm from the first to the last .a tilted gantry.; resample"),
        ([0, 1], 2.0, "shifted by 2 mm from the first to the last"),
    ],
    ids=["gap", "twice", "two volumes", "two of one", "tilted", "two tilted"],
)
def test_a_series_that_itk_would_lay_out_wrongly_is_refused(
    tmp_path: Path, slices: Sequence[int], shift_mm: float, words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        read_scan(series(tmp_path / "series", slices, shift_mm))
    assert str(tmp_path / "series") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_slice_at_another_angle_is_refused(tmp_path: Path) -> None:
    flipped = "\\".join(f"{v:.9g}" for v in (*SERIES.affine[:3, 0] / 0.8, *-SERIES.affine[:3, 1] / 0.9))
    folder = series(tmp_path / "series", tags={"0020|0037": flipped})
    with pytest.raises(InputError, match=r"slice\d+a.dcm and slice\d+a.dcm have different orientations; give"):
        read_scan(folder)


def test_slices_without_a_place_are_refused(tmp_path: Path) -> None:
    """Which ITK would lay one millimetre apart."""
    for path in series(tmp_path / "series").iterdir():
        slice_ = pydicom.dcmread(path)
        del slice_.ImagePositionPatient
        slice_.save_as(path)
    with pytest.raises(InputError, match=r"slice\d+a.dcm does not give the position of its slice; export"):
        read_scan(tmp_path / "series")


@pytest.mark.parametrize("spacing", [0.625, 0.75, 1.25, 2.0])
def test_places_rounded_by_an_exporter_are_even_enough(tmp_path: Path, spacing: float) -> None:
    grid = make_grid((6, 5, 30), (1.0, 1.0, spacing))
    write_series(tmp_path, np.arange(900).reshape(6, 5, 30), grid, digits=1)
    scan = read_scan(tmp_path)
    assert scan.grid.spacing[2] == pytest.approx(spacing, abs=0.01)


def test_slices_with_slopes_of_their_own_keep_their_decimals(tmp_path: Path) -> None:
    """As of PET: the first slice's are whole numbers."""
    grid = make_grid((6, 5, 3), (1.0, 1.0, 2.0))
    array = np.arange(90).reshape(6, 5, 3)
    write_series(tmp_path, array, grid)
    files = {float(pydicom.dcmread(path).ImagePositionPatient[2]): path for path in tmp_path.iterdir()}
    slopes = (1.0, 0.5, 0.25)
    for (_, path), slope in zip(sorted(files.items()), slopes, strict=True):
        slice_ = pydicom.dcmread(path)
        slice_.RescaleSlope, slice_.RescaleIntercept = str(slope), "0"
        slice_.save_as(path)
    np.testing.assert_array_equal(read_scan(tmp_path).data[0, 0], array * slopes)


def test_a_dicom_file_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    folder = series(tmp_path / "series")
    (folder / "slice00a.dcm").rename(folder / "\udcff.dcm")
    with pytest.raises(InputError, match=r"\\xff.dcm: its name is not UTF-8 text"):
        read_scan(folder)


def test_single_volume_in_a_4d_file_is_read(tmp_path: Path) -> None:
    image = noise_image((7, 8, 9))
    path = nifti(tmp_path / "scan.nii.gz", image[0, 0].numpy()[..., None], np.diag([1.0, 2, 3, 1]))
    scan = read_scan(path)
    assert torch.equal(scan.data, image)
    np.testing.assert_allclose(scan.grid.spacing, (1, 2, 3))


def missing(folder: Path) -> Path:
    return folder / "scan.nii.gz"


def text(folder: Path) -> Path:
    (folder / "scan.nii.gz").write_text("this is no image")
    return folder / "scan.nii.gz"


def unknown_format(folder: Path) -> Path:
    (folder / "scan.foo").write_text("this is no image")
    return folder / "scan.foo"


def empty_file(folder: Path) -> Path:
    (folder / "scan.nii").touch()
    return folder / "scan.nii"


def two_dimensional(folder: Path) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(np.random.rand(8, 9)), str(folder / "scan.nii.gz"))
    return folder / "scan.nii.gz"


def four_dimensional(folder: Path) -> Path:
    return nifti(folder / "scan.nii.gz", np.random.rand(5, 6, 7, 3))


def one_slice(folder: Path) -> Path:
    return nifti(folder / "scan.nii.gz", np.random.rand(5, 6, 1))


def colours(folder: Path) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(np.random.rand(5, 6, 7, 3), isVector=True), str(folder / "scan.mha"))
    return folder / "scan.mha"


def with_value(value: float, folder: Path) -> Path:
    array = np.random.rand(5, 6, 7)
    array[1, 2, 3:5] = value
    return nifti(folder / "scan.nii.gz", array)


def not_a_number(folder: Path) -> Path:
    return with_value(np.nan, folder)


def not_a_number_in_nrrd(folder: Path) -> Path:
    array = np.random.rand(5, 6, 7)
    array[1, 2, 3:5] = np.nan
    sitk.WriteImage(sitk.GetImageFromArray(array), str(folder / "scan.nrrd"))
    return folder / "scan.nrrd"


def infinite(folder: Path) -> Path:
    return with_value(-np.inf, folder)


def too_large(folder: Path) -> Path:
    return nifti(folder / "scan.nii", np.linspace(0, 1e300, 60).reshape(3, 4, 5), np.eye(4))


def too_alike(folder: Path) -> Path:
    return nifti(folder / "scan.nii", 1e9 + np.linspace(0, 1, 60).reshape(3, 4, 5), np.eye(4))


def constant(folder: Path) -> Path:
    return nifti(folder / "scan.nii.gz", np.full((5, 6, 7), 4.5))


def without_affine(folder: Path) -> Path:
    image = nib.Nifti1Image(np.random.rand(5, 6, 7), None)
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nib.save(image, folder / "scan.nii.gz")
    return folder / "scan.nii.gz"


def singular_affine(folder: Path) -> Path:
    path = nifti(folder / "scan.nii", np.random.rand(5, 6, 7))
    content = bytearray(path.read_bytes())
    content[312:328] = bytes(16)  # the sform's third row
    path.write_bytes(content)
    return path


def sheared_affine(folder: Path) -> Path:
    sheared = np.eye(4)
    sheared[0, 1] = 0.3
    image = nib.Nifti1Image(np.random.rand(5, 6, 7), sheared)
    image.set_qform(None, 0)
    nib.save(image, folder / "scan.nii.gz")
    return folder / "scan.nii.gz"


def empty_folder(folder: Path) -> Path:
    return folder


def two_series(folder: Path) -> Path:
    grid = make_grid((8, 8, 4))
    for uid in ("1.2.826.0.1.3680043.2.1125.1", "1.2.826.0.1.3680043.2.1125.2"):
        write_series(folder / "study", np.random.default_rng(0).integers(0, 100, grid.shape), grid, uid)
    return folder / "study"


GUARDS: dict[Callable[[Path], Path], str] = {
    missing: "no such file.*check the path",
    text: "not a readable NIfTI file.*export it again",
    unknown_format: "cannot be read as an image.*convert it to NIfTI",
    empty_file: "not a readable NIfTI file.*export it again",
    two_dimensional: "size 9×8; expected one 3-D volume",
    four_dimensional: "size 5×6×7×3; expected one 3-D volume.*extract",
    one_slice: "size 5×6×1; expected one 3-D volume of at least 2 voxels.*folder with the DICOM series",
    colours: "has 3 values per voxel; expected a grey-scale image",
    not_a_number: "2 voxels are NaN or infinite; replace them",
    not_a_number_in_nrrd: "2 voxels are NaN or infinite; replace them",
    infinite: "2 voxels are NaN or infinite; replace them",
    constant: "every voxel is 4.5; an image without contrast",
    too_large: r"the value 1e\+300, beyond the range of single precision \(3.4e\+38\); divide",
    too_alike: r"around 1e\+09, differ by less than single precision resolves; subtract",
    without_affine: "sform and qform codes are 0.*set_qform",
    singular_affine: "affine is singular.*set a valid",
    sheared_affine: "its affine is sheared.*resample it to an orthogonal grid",
    empty_folder: "no DICOM series; give a folder with exactly one",
    two_series: "2 DICOM series; give a folder with exactly one",
}


@pytest.mark.parametrize("make", GUARDS, ids=lambda make: make.__name__)
def test_bad_scan_is_refused_with_the_reason_in_one_line(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    with pytest.raises(InputError, match=GUARDS[make]) as caught:
        read_scan(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_no_text_is_refused_before_itk_sees_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"bad\\xff.nii.gz: its name is not UTF-8 text; rename it"):
        read_scan(tmp_path / "bad\udcff.nii.gz")


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.nrrd", "series"])
def test_what_may_not_be_read_is_not_called_damaged(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.mkdir() if name == "series" else path.touch()
    path.chmod(0)
    try:
        with (
            pytest.raises(InputError, match=rf"{name}: permission denied; check") as caught,
            without_rights(),
        ):
            read_scan(path)
    finally:
        path.chmod(0o700)
    assert "again" not in str(caught.value)


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "scan.nrrd", "scan.mha"])
@pytest.mark.parametrize("kept", [0.5, 0.95, 0.999])
def test_truncated_file_is_refused(tmp_path: Path, name: str, kept: float) -> None:
    image = noise_image((20, 22, 24))
    sitk.WriteImage(to_image(image, make_grid((20, 22, 24))), str(tmp_path / name), useCompression=True)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(InputError, match=r"(again|complete)") as caught:
        read_scan(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_labels_are_integers_on_the_grid_of_their_scan(tmp_path: Path, dtype: type) -> None:
    labels = np.random.default_rng(0).integers(0, 120, GRID.shape)
    path = nifti(tmp_path / "labels.nii.gz", labels.astype(dtype), np.diag([-1.0, -1, 1, 1]) @ GRID.affine)
    scan = scan_of(noise_image(GRID.shape), GRID)
    found = read_labels(path, scan)
    assert not found.data.is_floating_point()
    np.testing.assert_array_equal(found.data[0, 0], labels)
    assert found.grid is scan.grid


def test_empty_label_map_is_allowed(tmp_path: Path) -> None:
    path = nifti(tmp_path / "labels.nii.gz", np.zeros((5, 6, 7), np.uint8))
    grid = read_scan(nifti(tmp_path / "scan.nii.gz", np.random.rand(5, 6, 7))).grid
    assert not read_labels(path, scan_of(noise_image(grid.shape), grid)).data.any()


def test_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    scan = read_scan(nifti(tmp_path / "scan.nii.gz", np.random.rand(5, 6, 7)))
    labels = np.arange(5 * 6 * 7).reshape(5, 6, 7).astype(np.float32)
    shifted = np.eye(4)
    shifted[0, 3] = 2.0
    for name, array, affine, message in (
        ("shape", labels[:, :, :6], EYE, r"5×6×6.*differs from that of scan.nii.gz.*5×6×7.*nearest-neighbour"),
        ("shifted", labels, shifted, r"centre \[-4.0.*differs from that of scan.nii.gz.*centre \[-2.0.*nearest"),
        ("spacing", labels, np.diag([1.0, 1, 2, 1]), r"1×1×2 mm.*differs from that of"),
        ("fraction", labels + 0.5, EYE, r"holds the value 0.5; a label map may hold only whole numbers"),
        ("nan", np.where(labels == 3, np.nan, labels), EYE, "1 voxels are NaN"),
    ):
        path = nifti(tmp_path / f"{name}.nii.gz", array, affine)
        with pytest.raises(InputError, match=message):
            read_labels(path, scan)


def test_intensities_are_scaled_to_the_unit_interval_whatever_their_unit() -> None:
    grid = make_grid((40, 40, 40), (4, 4, 4))
    head = draw_head(grid)
    found = normalise(scan_of(head, grid)).data
    assert float(found.min()) == 0
    assert float(found.max()) == 1
    for scale, offset in ((1e-4, 0.0), (250.0, -1024.0)):
        torch.testing.assert_close(normalise(scan_of(head * scale + offset, grid)).data, found, rtol=0, atol=1e-4)


def test_a_few_huge_voxels_change_little() -> None:
    grid = make_grid((40, 40, 40), (4, 4, 4))
    head = draw_head(grid)
    spoilt = head.clone()
    where = torch.randperm(head.numel(), generator=torch.manual_seed(0))[: head.numel() // 1000]
    spoilt.view(-1)[where] = 1e6
    before, after = normalise(scan_of(head, grid)).data, normalise(scan_of(spoilt, grid)).data
    others = torch.ones(head.numel(), dtype=torch.bool)
    others[where] = False
    assert float((before - after).view(-1)[others].abs().max()) < 0.02


def test_window_is_scaled_to_the_unit_interval_and_clipped() -> None:
    grid = make_grid((5, 2, 2))
    hu = torch.tensor([-2000.0, -1000.0, -600.0, -200.0, 40.0]).view(1, 1, 5, 1, 1).expand(1, 1, 5, 2, 2)
    found = normalise(scan_of(hu, grid), (-1000, -200)).data
    assert torch.equal(found[0, 0, :, 0, 0], torch.tensor([0, 0, 0.5, 1, 1]))


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ((-200, -1000), "window -200 to -1000: is empty"),
        ((5, 5), "is empty"),
        ((30, 50), r"its values, 10 to 30, lie outside the intensity window 30 to 50; give a scan in the units"),
        ((-1000, 10), "lie outside the intensity window -1000 to 10"),
    ],
)
def test_window_without_anything_in_it_is_refused(window: tuple[float, float], message: str) -> None:
    image = torch.linspace(10, 30, 8).view(1, 1, 2, 2, 2)
    with pytest.raises(InputError, match=message):
        normalise(scan_of(image, make_grid((2, 2, 2))), window)


def test_image_that_is_nearly_all_one_value_keeps_its_contrast() -> None:
    image = torch.zeros(1, 1, 20, 20, 20)
    image[0, 0, 3:5, 3:5, 3:5] = 7.0
    scan = scan_of(image, make_grid((20, 20, 20)))
    assert scan.limits == (0.0, 7.0)
    assert torch.equal(normalise(scan).data, image / 7)


def test_coarser_grid_sees_no_aliasing() -> None:
    fine = make_grid((48, 48, 48))
    board = (sum(torch.meshgrid(*[torch.arange(48)] * 3, indexing="ij")) % 2).float()[None, None]
    coarse = make_grid((12, 12, 12), (3.0, 3.0, 3.0))
    found = resample_to(scan_of(board, fine), coarse)[0, 0, 1:-1, 1:-1, 1:-1]
    assert float((found - 0.5).abs().max()) < 0.01
    # at its own spacing it stays a checkerboard
    torch.testing.assert_close(resample_to(scan_of(board, fine), fine), board, rtol=0, atol=1e-4)


def test_only_the_coarser_axis_is_smoothed() -> None:
    fine = make_grid((30, 30, 30))
    stripe = (torch.arange(30) % 2).float().expand(1, 1, 30, 30, 30).contiguous()
    thick = make_grid((30, 30, 10), (1.0, 1.0, 3.0))
    inside = (slice(None), slice(None), slice(None), slice(None), slice(1, -1))
    kept = resample_to(scan_of(stripe.transpose(2, 4).contiguous(), fine), thick)[inside]
    lost = resample_to(scan_of(stripe, fine), thick)[inside]
    assert float(kept.std()) == pytest.approx(0.5, abs=0.01)
    assert float(lost.std()) < 0.02


def test_coarser_grid_keeps_a_smooth_image() -> None:
    grid, coarse = make_grid((72, 84, 66), (2, 2, 2)), make_grid((36, 42, 33), (4, 4, 4), degrees=(10, 5, -8))
    found, expected = resample_to(scan_of(draw_head(grid), grid), coarse), draw_head(coarse)
    assert float((found - expected).abs().mean()) < 0.02 * float(expected.max())
    assert float((found.mean() / expected.mean()) - 1) == pytest.approx(0, abs=0.01)


def test_air_of_a_ct_goes_on_beyond_its_field_of_view() -> None:
    grid = make_grid((10, 10, 10))
    scan = scan_of(noise_image(grid.shape) - 1100, grid)
    wider = make_grid((20, 20, 20))
    found = resample_to(scan, wider)
    assert float(found[0, 0, 0, 0, 0]) == float(scan.data.min()) == scan.outside
    assert scan_of(noise_image(grid.shape), grid).outside == 0.0


def test_complex_images_huge_labels_and_empty_paths_are_refused(tmp_path: Path) -> None:
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    values = np.random.default_rng(0).random((4, 5, 6))
    nib.save(nib.Nifti1Image((values + 1j).astype(np.complex64), affine), tmp_path / "complex.nii.gz")
    with pytest.raises(InputError, match="complex"):
        read_scan(tmp_path / "complex.nii.gz")
    nib.save(nib.Nifti1Image(values.astype(np.float32), affine), tmp_path / "image.nii.gz")
    scan = read_scan(tmp_path / "image.nii.gz")
    labels = np.zeros((4, 5, 6), np.int64)
    labels[1, 1, 1] = 3_000_000_000
    nib.save(nib.Nifti1Image(labels, affine, dtype=np.int64), tmp_path / "labels.nii.gz")
    for sign in (1, -1):
        nib.save(nib.Nifti1Image(sign * labels, affine, dtype=np.int64), tmp_path / "labels.nii.gz")
        with pytest.raises(InputError, match=f"holds the label {3_000_000_000 * sign};"):
            read_labels(tmp_path / "labels.nii.gz", scan)
    with pytest.raises(InputError, match="path is empty"):
        read_scan("")


@pytest.mark.parametrize("name", GRIDS)
def test_an_array_makes_the_scan_of_its_file(tmp_path: Path, name: str) -> None:
    image = to_image(noise_image(GRIDS[name].shape), GRIDS[name])
    file = tmp_path / "image.nii.gz"
    sitk.WriteImage(image, str(file))
    expected, volume = read_scan(file), nib.load(file)
    ours = image_scan(sitk.GetArrayFromImage(image).transpose(2, 1, 0), Grid.of(image), "memory")
    theirs = image_scan(volume.get_fdata(), Grid(volume.shape, RAS_FROM_LPS @ volume.affine), Path("memory"))
    for scan in (ours, theirs):
        assert scan.path == Path("memory")
        assert scan.data.dtype == torch.float32
        torch.testing.assert_close(scan.data, expected.data, rtol=0, atol=0)
        assert scan.grid.matches(expected.grid)
    labels = label_scan((volume.get_fdata() > 500).astype(int), ours.grid, "labels", ours)
    assert torch.equal(labels.data, (expected.data > 500).int())


def test_an_array_whose_axes_are_not_its_grids_is_refused() -> None:
    image = to_image(noise_image((8, 9, 10)), make_grid((8, 9, 10)))
    reversed_axes, grid = sitk.GetArrayFromImage(image), Grid.of(image)
    with pytest.raises(InputError, match=r"memory: the array has shape \(10, 9, 8\), its grid \(8, 9, 10\)"):
        image_scan(reversed_axes, grid, "memory")
    scan = image_scan(reversed_axes.transpose(2, 1, 0), grid, "memory")
    with pytest.raises(InputError, match=r"labels: the array has shape \(10, 9, 8\)"):
        label_scan(reversed_axes.astype(int), grid, "labels", scan)
