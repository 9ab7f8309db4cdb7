"""Formats of published data sets: what is read, where it lies, and that reading runs no code."""

import os
import pickle
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from iregzoo.errors import InputError
from iregzoo.space.formats import DIRLAB_CASES, read_image, read_label_map, read_landmarks
from iregzoo.space.grid import network_grid
from iregzoo.space.points import map_points
from iregzoo.space.scan import read_labels, read_scan, resample_to
from layouts import volume, write_dirlab

SPACING = (1.0, 1.0, 1.0)
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def write_pickle(path: Path, content: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


# --- pickled pairs


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("order", ["C", "F"])
def test_pickled_pair_is_read_whatever_its_protocol(tmp_path: Path, protocol: int, order: Any) -> None:
    image, labels = volume(0)
    path = write_pickle(tmp_path / "s.pkl", (image.copy(order), labels.copy(order)), protocol)
    scan = read_image(path)
    np.testing.assert_array_equal(scan.data[0, 0], image)
    np.testing.assert_array_equal(read_label_map(path, scan).data[0, 0], labels)


def test_pickle_of_older_numpy_is_read(tmp_path: Path) -> None:
    content = pickle.dumps(volume(0), 2).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    (tmp_path / "s.pkl").write_bytes(content)
    assert b"numpy.core" in content
    assert read_image(tmp_path / "s.pkl").data.shape == (1, 1, 20, 22, 18)


def test_pickled_axes_run_left_inferior_anterior(tmp_path: Path) -> None:
    """The grid of the network runs right, anterior, superior: flips of axes and no interpolation."""
    image, labels = volume(1)
    scan = read_image(write_pickle(tmp_path / "s.pkl", (image, labels)))
    grid = network_grid(scan.grid, SPACING, stride=1)
    expected = image[::-1, ::-1, :].transpose(0, 2, 1)
    np.testing.assert_allclose(resample_to(scan, grid)[0, 0], expected, rtol=1e-5, atol=1e-3)
    ras = nib.Nifti1Image(image, np.array([[-1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]]))
    assert nib.aff2axcodes(ras.affine) == ("L", "I", "A")
    nib.save(ras, tmp_path / "s.nii.gz")
    assert read_scan(tmp_path / "s.nii.gz").grid.matches(scan.grid)


class Malicious:
    """Runs a command where it is unpickled carelessly."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("where", ["whole", "image", "within"])
def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path, protocol: int, where: str) -> None:
    trace = tmp_path / "was here"
    evil = Malicious(os.mkdir, str(trace))
    _, labels = volume(0)
    content = {"whole": evil, "image": (evil, labels), "within": (np.array([evil, 1], object), labels)}[where]
    path = write_pickle(tmp_path / "s.pkl", content, protocol)
    with pytest.raises(InputError, match=r"s\.pkl: was rejected \(it asks for (posix|nt)\.mkdir\); .* only numpy"):
        read_image(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())  # what a careless reader would have done
    assert trace.exists()


@pytest.mark.parametrize("call", [Malicious(eval, "1"), Malicious(getattr, "", "format"), Malicious(np.load, "x.npy")])
def test_other_calls_are_refused_by_name(tmp_path: Path, call: Malicious) -> None:
    with pytest.raises(InputError, match=r"was rejected \(it asks for (builtins|numpy[\w.]*)\.(eval|getattr|load)\)"):
        read_image(write_pickle(tmp_path / "s.pkl", call))


def test_encoding_through_a_pickle_is_latin1_alone(tmp_path: Path) -> None:
    import codecs

    with pytest.raises(InputError, match="asks for the encoding rot13"):
        read_image(write_pickle(tmp_path / "s.pkl", Malicious(codecs.encode, "text", "rot13"), 2))


@pytest.mark.parametrize(
    "content",
    [
        volume(0)[0],
        (volume(0)[0],),
        (volume(0)[0], "label"),
        (volume(0)[0][0], volume(0)[1][0]),
        (np.full((3, 3, 3), "a"), volume(0)[1]),
        {"image": 1},
    ],
)
def test_pickle_of_anything_else_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(InputError, match=r"s\.pkl: does not hold a pair of 3-D arrays of numbers"):
        read_image(write_pickle(tmp_path / "s.pkl", content))


def test_damaged_or_missing_pickle_is_refused(tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "s.pkl", volume(0))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"s\.pkl: was rejected"):
        read_image(path)
    with pytest.raises(InputError, match=r"t\.pkl: cannot be read \(No such file"):
        read_image(tmp_path / "t.pkl")


def test_pickled_values_get_the_checks_of_every_scan(tmp_path: Path) -> None:
    image, labels = volume(0)
    flat = write_pickle(tmp_path / "flat.pkl", (np.ones_like(image), labels))
    with pytest.raises(InputError, match="every voxel is 1"):
        read_image(flat)
    scan = read_image(write_pickle(tmp_path / "s.pkl", (image, labels)))
    with pytest.raises(InputError, match=r"holds the value 0\.5"):
        read_label_map(write_pickle(tmp_path / "half.pkl", (image, labels * 0.25)), scan)
    with pytest.raises(InputError, match=r"small\.pkl: its grid .* differs from that of s\.pkl"):
        read_label_map(write_pickle(tmp_path / "small.pkl", (image, labels[1:])), scan)


# --- FreeSurfer


def test_mgz_lies_where_its_nifti_lies(tmp_path: Path) -> None:
    image, labels = volume(2)
    affine = np.array([[-0.9, 0.1, 0, 12], [0, 0, 1.1, -3], [-0.1, -0.9, 0, 40], [0, 0, 0, 1]])
    for kind, end in ((nib.MGHImage, "mgz"), (nib.Nifti1Image, "nii.gz")):
        nib.save(kind(image, affine), tmp_path / f"norm.{end}")
        nib.save(kind(labels.astype(np.int32), affine), tmp_path / f"aseg.{end}")
    scan, expected = read_image(tmp_path / "norm.mgz"), read_scan(tmp_path / "norm.nii.gz")
    assert scan.grid.matches(expected.grid)
    assert torch.equal(scan.data, expected.data)
    found = read_label_map(tmp_path / "aseg.mgz", scan)
    assert torch.equal(found.data, read_labels(tmp_path / "aseg.nii.gz", expected).data)


def test_broken_or_many_volumed_mgz_is_refused(tmp_path: Path) -> None:
    (tmp_path / "norm.mgz").write_bytes(b"none")
    with pytest.raises(InputError, match=r"norm\.mgz: is not a readable volume"):
        read_image(tmp_path / "norm.mgz")
    nib.save(nib.MGHImage(np.ones((3, 3, 3, 2), np.float32), np.eye(4)), tmp_path / "four.mgz")
    with pytest.raises(InputError, match=r"four\.mgz: has size 3×3×3×2; expected one 3-D volume"):
        read_image(tmp_path / "four.mgz")


# --- DIR-Lab


def index(*rows: tuple[int, int, int]) -> NDArray[np.int64]:
    return np.array(rows)


def test_sizes_of_all_ten_cases_are_known() -> None:
    assert list(DIRLAB_CASES) == list(range(1, 11))
    assert all(shape[0] == shape[1] == (256 if case < 6 else 512) for case, (shape, _) in DIRLAB_CASES.items())


@pytest.mark.parametrize("offset", [0, 1024])
def test_raw_volume_is_read_in_hu_with_the_published_geometry(tmp_path: Path, offset: int) -> None:
    hu = write_dirlab(tmp_path, 3, {"T00": index((0, 0, 0))}, offset=offset)["T00"]
    scan = read_image(tmp_path / "Case3Pack/Images/case3_T00_s.img")
    assert scan.grid.shape == (256, 256, 104)
    np.testing.assert_allclose(scan.grid.affine, np.diag([1.15, 1.15, 2.5, 1]))
    np.testing.assert_array_equal(scan.data[0, 0], hu)


def test_filling_around_the_scanners_circle_does_not_count_as_air(tmp_path: Path) -> None:
    hu = write_dirlab(tmp_path, 1, {"T00": index((0, 0, 0))})["T00"]
    path = tmp_path / "Case1Pack/Images/case1_T00_s.img"
    stored = hu + np.int16(1024)
    stored[:, :60] = -2000
    stored.ravel(order="F").astype("<i2").tofile(path)
    found = read_image(path).data[0, 0]
    np.testing.assert_array_equal(found[:, 60:], hu[:, 60:])


def test_landmarks_are_voxel_indices_from_one(tmp_path: Path) -> None:
    places = index((0, 0, 0), (255, 255, 93), (100, 110, 40))
    write_dirlab(tmp_path, 1, {"T00": places})
    scan = read_image(tmp_path / "Case1Pack/Images/case1_T00_s.img")
    text = tmp_path / "Case1Pack/ExtremePhases/Case1_300_T00_xyz.txt"
    assert text.read_text("utf-8").splitlines()[0].split() == ["1", "1", "1"]
    points = read_landmarks(text, scan)
    np.testing.assert_allclose(points, places * [0.97, 0.97, 2.5])
    back = map_points(np.linalg.inv(scan.grid.affine), points)
    np.testing.assert_allclose(back, places, atol=1e-9)


def test_landmarks_of_other_files_are_in_mm(tmp_path: Path) -> None:
    write_dirlab(tmp_path, 1, {"T00": index((0, 0, 0))})
    scan = read_image(tmp_path / "Case1Pack/Images/case1_T00_s.img")
    (tmp_path / "p.csv").write_text("# CoordinateSystem = RAS\nx,y,z\n1,2,3\n")
    np.testing.assert_allclose(read_landmarks(tmp_path / "p.csv", scan), [[-1, -2, 3]])


@pytest.mark.parametrize(("text", "message"), [("1 2\n", "shape"), ("a b c\n", "cannot be read"), ("", "shape")])
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_landmarks_that_are_none_are_refused(tmp_path: Path, text: str, message: str) -> None:
    write_dirlab(tmp_path, 1, {"T00": index((0, 0, 0))})
    scan = read_image(tmp_path / "Case1Pack/Images/case1_T00_s.img")
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(InputError, match=rf"p\.txt: .*{message}"):
        read_landmarks(tmp_path / "p.txt", scan)


def test_raw_volume_of_another_size_or_case_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "case1_T00_s.img"
    with pytest.raises(InputError, match="no such file"):
        read_image(path)
    path.write_bytes(b"0" * 10)
    with pytest.raises(InputError, match=r"holds 10 bytes, expected 12320768: 256×256×94 voxels of int16"):
        read_image(path)
    (tmp_path / "case11_T00.img").write_bytes(b"0" * 10)
    with pytest.raises(InputError, match="has the cases 1 to 10, not 11"):
        read_image(tmp_path / "case11_T00.img")


def test_volume_with_a_header_beside_it_is_read_by_its_header(tmp_path: Path) -> None:
    image, _ = volume(3)
    nib.save(nib.Nifti1Pair(image, np.eye(4)), tmp_path / "case1_T00.img")
    assert read_image(tmp_path / "case1_T00.img").grid.shape == image.shape
