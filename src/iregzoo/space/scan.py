"""Reading scans and label maps, with every check that input needs, and their intensities."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from torch import Tensor

from iregzoo.errors import InputError, check_name
from iregzoo.space.grid import RAS_FROM_LPS, Grid, Matrix, pull, to_voxels
from iregzoo.space.separable import axis_order, resample_axes

NIFTI = (".nii", ".nii.gz", ".hdr", ".img")
FREESURFER = (".mgz", ".mgh")
NIFTI_2 = (nib.Nifti2Image, nib.Nifti2Pair)
SHEAR = 1e-3  # between the cosines of axes
PERCENTILES = (0.5, 99.5)
SMALLEST_MM = 1.0  # of a scan, along its longest axis
APART = 0.5  # voxels that the two affines of a NIfTI file may differ
SPARSE = 0.001  # of the voxels: no image shows so little
# Of the slices of a DICOM series. Places rounded to 0.1 mm are up to an eighth of a slice from those of an even stack;
# one slice missing among any others puts some half a slice away.
UNEVEN = 0.2  # of the usual distance between slices: how far from there one may lie
SAME_PLACE_MM = 1e-3  # between two slices: the same one again, or another volume's
ANOTHER_ANGLE = 1e-3  # between cosines
DICOM_PLACE = "0020|0032"
NO_BLUR = 0.25  # voxels: a narrower Gaussian changes nothing
Window = Sequence[float]  # the intensities that become 0 and 1


@dataclass(frozen=True)
class Scan:
    """An image in scanner space: ``data`` (1, 1, X, Y, Z) float32, or integer for a label map.

    ``doubt`` says in words what makes its place in the scanner doubtful.
    """

    data: Tensor
    grid: Grid
    path: Path
    doubt: str = ""

    @cached_property
    def outside(self) -> float:
        """What lies beyond the field of view: 0, or the lowest value where that is below 0 (air in CT)."""
        return min(0.0, float(self.data.min()))

    @cached_property
    def limits(self) -> tuple[float, float]:
        """The intensities that become 0 and 1: two percentiles, so that a few bright voxels change nothing."""
        low, high = (float(value) for value in np.percentile(self.data.numpy(), PERCENTILES))
        if high > low:
            return low, high
        return float(self.data.min()), float(self.data.max())  # nearly all voxels are one value: take the full range


def read_scan(path: str | Path) -> Scan:
    """Read a scan: NIfTI, NRRD, MetaImage and whatever else ITK reads, or a folder with one DICOM series.

    Raises:
        InputError: missing, unreadable, not 3-D, more than one channel, no or a singular affine, NaN or infinite
            voxels, or constant.
    """
    image, path = read_volume(path)
    grid = Grid.of(image)
    scan = image_scan(sitk.GetArrayFromImage(image).transpose(2, 1, 0), grid, path)
    return replace(scan, doubt=_doubt(grid, path)) if path.name.lower().endswith(NIFTI) else scan


def _doubt(grid: Grid, path: Path) -> str:
    """In words, how far apart a NIfTI file's two affines lie, of which ITK took one."""
    header = nib.load(path).header
    if "sform_code" not in header or 0 in (int(header["sform_code"]), int(header["qform_code"])):
        return ""
    sform, qform = (RAS_FROM_LPS @ affine for affine in (header.get_sform(), header.get_qform()))
    apart = grid.farthest(sform, qform)
    if apart < APART * float(grid.spacing.min()):
        return ""
    taken = "qform" if grid.farthest(grid.affine, qform) <= grid.farthest(grid.affine, sform) else "sform"
    return f"{path.name}: its sform and its qform place it up to {apart:.1f} mm apart; its {taken} was used"


def image_scan(array: NDArray[Any], grid: Grid, path: Path) -> Scan:
    """The scan of an image's voxels (X, Y, Z), with the checks of ``read_scan`` on their values."""
    check_finite(array, path)
    size = np.array(grid.shape) * grid.spacing
    if size.max() < SMALLEST_MM:
        shown = "×".join(f"{length:.3g}" for length in size)
        raise InputError(f"{path}: measures {shown} mm, too small for a scan; give its header the spacing in mm")
    single = as_float32(array, path)
    if single.min() == single.max() and array.min() != array.max():
        raise InputError(
            f"{path}: its voxel values, around {single.flat[0]:g}, differ by less than single precision resolves; "
            "subtract a constant or scale the values"
        )
    if single.min() == single.max():
        raise InputError(f"{path}: every voxel is {single.flat[0]:g}; an image without contrast cannot be registered")
    return Scan(_tensor(single), grid, path)


def read_labels(path: str | Path, scan: Scan) -> Scan:
    """Read a label map that lies on the grid of ``scan``.

    Raises:
        InputError: as for a scan, and for values that are no whole numbers or another grid. An empty map is allowed.
    """
    image, path = read_volume(path)
    return label_scan(sitk.GetArrayFromImage(image).transpose(2, 1, 0), Grid.of(image), path, scan)


def label_scan(array: NDArray[Any], grid: Grid, path: Path, scan: Scan) -> Scan:
    """The label map of voxels (X, Y, Z), with the checks of ``read_labels``."""
    if not np.isfinite(array).all() or (array != np.round(array)).any():
        odd = array[~np.isfinite(array) | (array != np.round(array))].flat[0]
        raise InputError(f"{path}: holds the value {odd:g}; a label map may hold only whole numbers")
    if np.abs(array.astype(np.float64)).max() >= 2**31:
        raise InputError(f"{path}: holds the label {array.max()}; use labels below 2147483648")
    if not grid.matches(scan.grid):
        raise InputError(
            f"{path}: its grid ({_describe(grid)}) differs from that of {scan.path.name} ({_describe(scan.grid)}); "
            "resample the labels to the image with nearest-neighbour interpolation"
        )
    return Scan(_tensor(array.astype(np.int32)), scan.grid, path)


def looks_like_labels(scan: Scan) -> bool:
    """Whether a scan is whole numbers in patches of one value or hardly anywhere, apart from its commonest value."""
    data = scan.data[0, 0]
    if bool((data != data.round()).any()):
        return False
    values, counts = np.unique(data.numpy(), return_counts=True)
    shown = data != float(values[counts.argmax()])
    if not shown.any():
        return False
    inside, alike = 0, 0  # pairs of neighbours along each axis
    for axis, size in enumerate(data.shape):
        (here, there), (value, other) = (
            (volume.narrow(axis, 0, size - 1), volume.narrow(axis, 1, size - 1)) for volume in (shown, data)
        )
        inside += int((here & there).sum())
        alike += int((here & there & (value == other)).sum())
    return 2 * alike > inside or float(shown.float().mean()) < SPARSE


def _tensor(array: NDArray[np.float32] | NDArray[np.int32]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))[None, None]


def _describe(grid: Grid) -> str:
    size = "×".join(map(str, grid.shape))
    return (
        f"{size}, spacing {'×'.join(f'{s:.3g}' for s in grid.spacing)} mm, centre {np.round(grid.centre, 1).tolist()}"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """ITK without its warnings, several lines each: what matters is said in one line of ours."""
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.GlobalWarningDisplayOff()
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def read_volume(path: str | Path, components: int = 1) -> tuple[sitk.Image, Path]:
    """One 3-D volume as ITK reads it, in its own type of voxel, and its path.

    Args:
        path: a file, or a folder with one DICOM series.
        components: numbers a voxel: 1, or 3 of a displacement field.

    Raises:
        InputError: missing, unreadable, not 3-D, of another number of components, no, a singular or a sheared affine,
            or, in NIfTI, NaN or infinite voxels.
    """
    if not str(path).strip():
        raise InputError("a path is empty; give a file or a DICOM folder")
    path = Path(path)
    check_name(str(path.absolute()))
    _check_there(path)
    if path.is_file() and path.name.lower().endswith(NIFTI):
        _check_nifti(path)
    try:
        with _quiet():
            image = _read_dicom(path) if path.is_dir() else _read_file(path)
    except RuntimeError as error:
        if "orthonormal direction cosines" in str(error):
            raise _sheared(path) from None
        raise InputError(
            f"{path}: cannot be read as an image ({itk_reason(error)}); check that it is complete, or "
            "convert it to NIfTI"
        ) from None
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[..., 0]
    if image.GetDimension() != 3 or min(image.GetSize()) < 2:
        raise InputError(
            f"{path}: has size {'×'.join(map(str, image.GetSize()))}; expected one 3-D volume of at least 2 voxels "
            "per axis; extract the volume first"
        )
    if "complex" in image.GetPixelIDTypeAsString():
        raise InputError(f"{path}: holds complex numbers; give its magnitude image")
    found = image.GetNumberOfComponentsPerPixel()
    if found != components:
        expected = "a grey-scale image" if components == 1 else "a displacement field, a vector image in LPS mm"
        raise InputError(f"{path}: has {found} value{'' if found == 1 else 's'} per voxel; expected {expected}")
    return image, path


def _read_file(path: Path) -> sitk.Image:
    """An image by ITK, or by nibabel where ITK cannot read it: FreeSurfer's volumes and NIfTI-2."""
    name = path.name.lower()
    if not (name.endswith(FREESURFER) or (name.endswith(NIFTI) and isinstance(nib.load(path), NIFTI_2))):
        return sitk.ReadImage(str(path))
    try:
        image = nib.load(path)
        array = np.asanyarray(image.dataobj)
    except Exception as error:  # nibabel raises many kinds for a file that it cannot read
        raise InputError(f"{path}: is not a readable FreeSurfer volume ({error}); check or export it again") from None
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim != 3:
        raise InputError(f"{path}: has shape {array.shape}; expected one 3-D volume: extract the volume first")
    grid = Grid(array.shape, RAS_FROM_LPS @ image.affine)
    axes = grid.affine[:3, :3] / grid.spacing
    if np.abs(axes.T @ axes - np.eye(3)).max() > SHEAR:
        raise _sheared(path)
    return grid.to_sitk(array.astype(array.dtype.newbyteorder("=")))


def _sheared(path: Path) -> InputError:
    return InputError(
        f"{path}: its affine is sheared, so its axes are not orthogonal; resample it to an orthogonal grid, for "
        "instance with nibabel.processing.resample_to_output"
    )


def _check_there(path: Path) -> None:
    """Refuse what is missing, and what may not be read, which libraries take for a damaged file."""
    try:
        if path.is_dir():
            next(path.iterdir(), None)
        else:
            path.open("rb").close()
    except PermissionError:
        raise InputError(f"{path}: permission denied; check the file's permissions") from None
    except OSError:
        raise InputError(f"{path}: no such file or folder; check the path") from None


def itk_reason(error: RuntimeError) -> str:
    """The telling line of an ITK error, without its source file and pointers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Reason:")]
    return lines[-1].split("): ")[-1][:160] if lines else "unknown reason"


def as_float32(array: NDArray[Any], path: Path) -> NDArray[np.float32]:
    """Finite values in the precision in which everything is computed.

    Raises:
        InputError: where they are too large for it.
    """
    most = np.finfo(np.float32).max
    least, largest = array.min(), array.max()
    if least < -most or largest > most:
        raise InputError(
            f"{path}: holds the value {max(least, largest, key=abs):g}, beyond the range of single precision "
            f"({most:.1e}); divide the image by a constant"
        )
    return array.astype(np.float32)


def check_finite(array: NDArray[Any], path: Path) -> None:
    """Refuse NaN and infinite voxels.

    Raises:
        InputError: saying how many there are.
    """
    bad = int(array.size - np.isfinite(array).sum())
    if bad:
        raise InputError(f"{path}: {bad} voxels are NaN or infinite; replace them, for instance with 0")


def _check_nifti(path: Path) -> None:
    """What ITK passes over in silence: voxels that a truncated file lacks or that are NaN, and a missing affine."""
    try:
        image = nib.load(path)
        voxels = np.asanyarray(image.dataobj.get_unscaled())
    except Exception as error:  # nibabel raises many kinds for a file that is no NIfTI; each means the same here
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: is not a readable NIfTI file ({reason}); check or export it again") from None
    if voxels.dtype.kind == "f":
        check_finite(voxels, path)
    header = image.header
    if "sform_code" not in header:
        return
    if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
        raise InputError(
            f"{path}: has no affine (sform and qform codes are 0), so its position in scanner space is unknown; "
            "set one, for instance with nibabel's set_sform"
        )
    affine = header.get_best_affine()
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise InputError(f"{path}: its affine is singular ({affine[:3, :3].tolist()}); set a valid sform or qform")


def _read_dicom(folder: Path) -> sitk.Image:
    for path in folder.iterdir():
        check_name(str(path))
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        found = "no DICOM series" if not series else f"{len(series)} DICOM series"
        raise InputError(f"{folder}: holds {found}; give a folder with exactly one")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(_in_order(reader.GetGDCMSeriesFileNames(str(folder), series[0]), folder))
    return reader.Execute()


def _in_order(files: Sequence[str], folder: Path) -> Sequence[str]:
    """The files of a series from the first slice to the last.

    Raises:
        InputError: for what ITK would lay out evenly although it is not: slices without a place or at different angles,
            and one that is missing, there twice, or shifted.
    """
    if len(files) < 2:
        return files
    reader, corners, turns = sitk.ImageFileReader(), [], []
    for file in files:
        reader.SetFileName(file)
        reader.ReadImageInformation()
        if not reader.HasMetaDataKey(DICOM_PLACE):
            raise InputError(
                f"{folder}: {Path(file).name} does not give the position of its slice; export the series again"
            )
        corners.append(reader.GetOrigin())
        turns.append(reader.GetDirection())
    turned = np.abs(np.array(turns) - turns[0]).max(axis=1)
    if turned.max() > ANOTHER_ANGLE:
        names = f"{Path(files[0]).name} and {Path(files[turned.argmax()]).name}"
        raise InputError(f"{folder}: {names} have different orientations; give a folder with only one volume")
    normal = np.array(turns[0]).reshape(3, 3)[:, 2]
    order = np.argsort(np.array(corners) @ normal, kind="stable")
    places, files = np.array(corners)[order], [files[number] for number in order]
    along = places @ normal
    steps = np.diff(along)
    usual, twice = float(np.median(steps)), steps.min() < SAME_PLACE_MM
    worst = int(steps.argmin() if twice else np.abs(steps - usual).argmax())
    names = " and ".join(Path(file).name for file in files[worst : worst + 2])
    if twice:
        raise InputError(f"{folder}: {names} are slices at the same position; give a folder with only one volume")
    if np.abs(along - np.linspace(along[0], along[-1], len(along))).max() > UNEVEN * usual:
        raise InputError(
            f"{folder}: its slices are {usual:.3g} mm apart, but {names} are {steps[worst]:.3g} mm; export the "
            "complete series again as one volume"
        )
    shift = float(np.linalg.norm(places - places[0] - np.outer(along - along[0], normal), axis=1).max())
    if shift > max(reader.GetSpacing()[:2]):
        raise InputError(
            f"{folder}: its slices are shifted by {shift:.3g} mm from the first to the last (a tilted gantry); "
            "resample it to a volume without tilt"
        )
    return files


def scale(data: Tensor, limits: tuple[float, float]) -> Tensor:
    """Intensities from ``limits`` to [0, 1], clipped."""
    low, high = limits
    return (data - low).div_(high - low).clamp_(0, 1)


def normalise(scan: Scan, window: Window | None = None) -> Scan:
    """The scan with its intensities in [0, 1], clipped.

    Args:
        scan: of any intensities.
        window: those that become 0 and 1, such as (-1000, -200) HU; two percentiles of the scan if None.

    Raises:
        InputError: where the window is empty, or the scan has next to nothing in it.
    """
    if window is None:
        return replace(scan, data=scale(scan.data, scan.limits))
    low, high = window
    if not low < high:
        raise InputError(f"intensity window {low:g} to {high:g}: is empty; give the lower value first")
    least, most = float(scan.data.min()), float(scan.data.max())
    if most <= low or least >= high:
        raise InputError(
            f"{scan.path}: its values, {least:g} to {most:g}, lie outside the intensity window {low:g} to {high:g}; "
            "give a scan in the units of that window (HU for CT)"
        )
    return replace(scan, data=scale(scan.data, (low, high)))


def resample_to(scan: Scan, grid: Grid, world: Matrix | None = None, *, mode: str = "linear") -> Tensor:
    """A scan's voxels on another grid: (1, 1, *grid.shape); ``world`` takes grid positions to the scan's, LPS mm.

    Where the grid is coarser than the scan, a Gaussian takes out first what it cannot hold.
    """
    matrix = to_voxels(grid, world, scan.grid)
    data = scan.data
    if mode == "linear":
        # Voxels of the scan per voxel of the grid, along each axis of the scan.
        coarser = np.linalg.norm(matrix[:3, :3], axis=1)
        sigma = 0.5 * np.sqrt(np.maximum(coarser**2 - 1, 0))
        sigma = np.where(sigma < NO_BLUR, 0.0, sigma)
        order = axis_order(matrix, grid.shape)
        if order is not None and data.is_floating_point():
            return resample_axes(data, matrix, grid.shape, order, sigma=sigma.tolist(), outside=scan.outside)
        data = _smooth(data, sigma)
        return pull(data, matrix, grid.shape, outside=scan.outside)
    return pull(data, matrix, grid.shape, mode=mode)


def _smooth(data: Tensor, sigma: Matrix) -> Tensor:
    """Gaussian smoothing, standard deviations in voxels."""
    if not sigma.any():
        return data
    from scipy.ndimage import gaussian_filter

    return torch.from_numpy(gaussian_filter(data[0, 0].numpy(), sigma, truncate=3.0))[None, None]
