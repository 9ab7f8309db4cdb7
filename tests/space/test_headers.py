"""What headers say of where a volume lies: doubts, refusals, and what ITK would read from another file."""

import gzip
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from geometry import GRIDS, noise_image
from iregzoo.errors import InputError
from iregzoo.space import volume
from iregzoo.space.grid import RAS_FROM_LPS
from iregzoo.space.headers import NRRD, header_doubt
from iregzoo.space.scan import read_labels, read_scan

GRID = GRIDS["everything"]
IMAGE = noise_image(GRID.shape)[0, 0].numpy()
RAS = RAS_FROM_LPS @ GRID.affine


def test_a_compressed_scan_has_its_own_voxels_beside_one_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ITK looks for the voxels of scan.nii.gz in scan.nii."""
    nib.save(nib.Nifti1Image(IMAGE, RAS), tmp_path / "scan.nii.gz")
    nib.save(nib.Nifti1Image(1 - IMAGE, RAS), tmp_path / "scan.nii")

    def no_links(self: Path, target: Path) -> None:
        raise OSError("not here")

    copied: list[str] = []
    copy = shutil.copyfile
    monkeypatch.setattr("shutil.copyfile", lambda *paths: copied.append(Path(paths[0]).name) or copy(*paths))
    for links in (True, False):
        assert copied == []  # as long as there are links
        if not links:
            monkeypatch.setattr(Path, "symlink_to", no_links)
        np.testing.assert_array_equal(read_scan(tmp_path / "scan.nii.gz").data[0, 0], IMAGE)
        np.testing.assert_array_equal(read_scan(tmp_path / "scan.nii").data[0, 0], 1 - IMAGE)
    assert copied == ["scan.nii.gz"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scan.nii", "scan.nii.gz"]


def test_a_voxel_size_that_the_affine_denies_is_told_of(tmp_path: Path) -> None:
    for code, doubled in ((0, False), (0, True), (1, True)):
        image = nib.Nifti1Image(IMAGE, np.diag([2.0, 2.0, 2.0, 1.0]))
        image.header["qform_code"] = 0
        if doubled:
            image.header["pixdim"][1:4] = 1
        image.header["sform_code"] = code or 2
        nib.save(image, tmp_path / "scan.nii.gz")
        scan = read_scan(tmp_path / "scan.nii.gz")
        assert bool(scan.doubt) == doubled
        if doubled:
            np.testing.assert_allclose(scan.grid.spacing, 1)
            assert "its voxel size (1 × 1 × 1 mm) and its sform (2 × 2 × 2 mm) disagree and place it" in scan.doubt


@pytest.mark.parametrize(("unit", "factor"), [("meter", 1000.0), ("micron", 0.001), ("mm", 1.0)])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_units_of_nifti_files_are_heeded(tmp_path: Path, kind: type, unit: str, factor: float) -> None:
    scaled = RAS.copy()
    scaled[:3] /= factor
    image = kind(IMAGE, scaled)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "scan.nii.gz")
    scan = read_scan(tmp_path / "scan.nii.gz")
    np.testing.assert_allclose(scan.grid.affine, GRID.affine, rtol=1e-4, atol=1e-3)
    assert scan.doubt == ""


def test_units_that_nifti_does_not_know_are_millimetres(tmp_path: Path) -> None:
    image = nib.Nifti1Image(IMAGE, RAS)
    for code in (0, 4, 7, 255):
        image.header["xyzt_units"] = code
        nib.save(image, tmp_path / "scan.nii.gz")
        scan = read_scan(tmp_path / "scan.nii.gz")
        np.testing.assert_allclose(scan.grid.affine, GRID.affine, atol=1e-4)
        assert scan.doubt == ""


@pytest.mark.parametrize(
    ("sizes", "said"), [((0, 0, 0), "0 × 0 × 0"), ((1, 0, 1), "1 × 0 × 1"), ((-1, 1, 1), "-1 × 1 × 1")]
)
def test_a_header_without_a_voxel_size_is_refused(
    tmp_path: Path, sizes: tuple[int, ...], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    image = nib.Nifti1Image(IMAGE, np.eye(4))
    image.set_qform(np.eye(4), 1)
    image.set_sform(None, 0)
    nib.save(image, tmp_path / "scan.nii")
    content = bytearray((tmp_path / "scan.nii").read_bytes())
    content[80:92] = np.array(sizes, "<f4").tobytes()  # which nibabel would not write
    (tmp_path / "scan.nii").write_bytes(content)
    with pytest.raises(InputError, match=rf"scan\.nii: its header has the voxel size {said}.* mm .pixdim.; set the"):
        read_scan(tmp_path / "scan.nii")
    assert capfd.readouterr().err == ""


def test_small_voxels_are_not_called_a_singular_affine(tmp_path: Path) -> None:
    """A header in metres that does not say so."""
    nib.save(nib.Nifti1Image(IMAGE, np.diag([9e-4, 9e-4, 9e-4, 1.0])), tmp_path / "scan.nii.gz")
    with pytest.raises(InputError, match=r"measures .* mm, too small for a scan; give its header the spacing in mm"):
        read_scan(tmp_path / "scan.nii.gz")


def test_an_analyze_file_does_not_say_which_way_its_axes_run(tmp_path: Path) -> None:
    nib.save(nib.AnalyzeImage(IMAGE, RAS), tmp_path / "scan.hdr")
    scan = read_scan(tmp_path / "scan.hdr")
    assert "scan.hdr: is an Analyze file, which does not say which way its axes run" in scan.doubt
    np.testing.assert_array_equal(scan.data[0, 0], IMAGE)


def write_nrrd(path: Path, *fields: str) -> Path:
    header = ["NRRD0005", "type: float", "dimension: 3", f"sizes: {' '.join(map(str, IMAGE.shape))}", *fields]
    header += ["endian: little", "encoding: gzip", "", ""]
    path.write_bytes("\n".join(header).encode() + gzip.compress(IMAGE.T.tobytes()))
    return path


DIRECTIONS = "space directions: (1,0,0) (0,1,0) (0,0,1)"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ((), "does not say which way its axes run (no space directions)"),
        (("space: scanner-xyz", DIRECTIONS), "its space, 'scanner-xyz', is not a patient's"),
        (("space dimension: 3", DIRECTIONS), "it names no space of a patient"),
        (("space: left-posterior-superior", DIRECTIONS), ""),
        (("space: RAS", DIRECTIONS), ""),
    ],
)
def test_an_nrrd_that_leaves_its_axes_open_is_told_of(tmp_path: Path, fields: tuple[str, ...], words: str) -> None:
    scan = read_scan(write_nrrd(tmp_path / "scan.nrrd", *fields))
    np.testing.assert_array_equal(scan.data[0, 0], IMAGE)
    assert words in scan.doubt
    assert bool(scan.doubt) == bool(words)


@pytest.mark.parametrize("ending", NRRD)
def test_an_nrrd_of_itk_leaves_nothing_open(tmp_path: Path, ending: str) -> None:
    sitk.WriteImage(GRID.to_sitk(IMAGE), str(tmp_path / f"scan{ending}"))
    assert read_scan(tmp_path / f"scan{ending}").doubt == ""
    assert header_doubt(GRID, tmp_path) == ""  # nor does a folder of DICOM


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_sheared_axes_are_refused_in_any_format(tmp_path: Path, ending: str) -> None:
    """A NIfTI file of the result could not have them."""
    image = GRID.to_sitk(IMAGE)
    image.SetDirection((1, 0.3, 0, 0, 0.954, 0, 0, 0, 1))
    sitk.WriteImage(image, str(tmp_path / f"scan{ending}"))
    for reader in (read_scan, read_labels):
        with pytest.raises(InputError, match=rf"scan\{ending}: its affine is sheared.*resample it to an orthogonal"):
            reader(tmp_path / f"scan{ending}")


COLOURS = np.dtype([(name, np.uint8) for name in "RGB"])


@pytest.mark.parametrize("dtype", [np.dtype(np.complex64), np.dtype(np.complex128), COLOURS], ids=str)
def test_voxels_that_cannot_be_computed_with_are_refused(tmp_path: Path, dtype: np.dtype) -> None:
    nib.save(nib.Nifti2Image(np.zeros(IMAGE.shape, dtype), RAS), tmp_path / "scan.nii")
    with pytest.raises(InputError, match=r"scan\.nii: has voxels of type .*; convert it to a grey-scale image"):
        read_scan(tmp_path / "scan.nii")


@pytest.mark.parametrize("flip", [np.diag([-1.0, 1, 1, 1]), np.diag([1.0, -1, 1, 1])])
def test_labels_stored_along_other_axes_are_told_apart_from_their_scan(tmp_path: Path, flip: np.ndarray) -> None:
    """Of one size, spacing and centre as the scan."""
    turned = flip.copy()
    turned[:3, 3] = (1 - flip.diagonal()[:3]) / 2 * (np.array(IMAGE.shape) - 1)
    nib.save(nib.Nifti1Image(IMAGE, np.eye(4)), tmp_path / "scan.nii.gz")
    nib.save(nib.Nifti1Image((IMAGE > 0.5).astype(np.uint8), turned), tmp_path / "labels.nii.gz")
    scan = read_scan(tmp_path / "scan.nii.gz")
    codes = "".join(nib.aff2axcodes(turned))
    with pytest.raises(InputError, match=rf"axes to {codes}.*axes to RAS.*, up to \d+ mm apart; resample the labels"):
        read_labels(tmp_path / "labels.nii.gz", scan)


def test_a_refused_label_map_says_what_is_doubtful_of_its_header(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(IMAGE, np.eye(4)), tmp_path / "scan.nii.gz")
    moved = np.eye(4)
    moved[0, 3] = 30
    labels = nib.Nifti1Image((IMAGE > 0.5).astype(np.uint8), np.eye(4))
    labels.set_sform(np.eye(4), 2)
    labels.set_qform(moved, 1)
    nib.save(labels, tmp_path / "labels.nii.gz")
    with pytest.raises(InputError, match=r"\(labels\.nii\.gz: its sform and its qform place it up to 30.0 mm apart"):
        read_labels(tmp_path / "labels.nii.gz", read_scan(tmp_path / "scan.nii.gz"))


def test_itks_warnings_are_back_when_the_last_of_several_readers_has_ended() -> None:
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.GlobalWarningDisplayOn()
    try:
        first, second = volume._quiet(), volume._quiet()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not sitk.ProcessObject.GetGlobalWarningDisplay()
        second.__exit__(None, None, None)
        assert sitk.ProcessObject.GetGlobalWarningDisplay()
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)
