"""Volumes from files: by ITK, or by nibabel where ITK cannot read them, and what both pass over in silence."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from iregzoo.errors import InputError, check_name
from iregzoo.process import shared
from iregzoo.space.dicom import read_dicom
from iregzoo.space.grid import RAS_FROM_LPS, Grid
from iregzoo.space.headers import NIFTI, check_axes, check_nifti, check_regular, in_millimetres, sheared

NIFTI_2 = (nib.Nifti2Image, nib.Nifti2Pair)
FREESURFER = (".mgz", ".mgh")
LARGEST = 8  # bytes of a number that torch knows


@shared
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
        InputError: as ``read_any`` does, and for an image that is not 3-D or has another number of components.
    """
    image, path = read_any(path)
    if image.GetDimension() != 3 or min(image.GetSize()) < 2:
        flat = image.GetDimension() < 4  # one slice, such as one file of a DICOM series
        mend = "give all slices, such as the folder with the DICOM series" if flat else "extract the volume first"
        raise InputError(
            f"{path}: has size {size_of(image)}; expected one 3-D volume of at least 2 voxels per axis; {mend}"
        )
    found = image.GetNumberOfComponentsPerPixel()
    if found != components:
        expected = "a grey-scale image" if components == 1 else "a displacement field, a vector image in LPS mm"
        raise InputError(f"{path}: has {found} value{'' if found == 1 else 's'} per voxel; expected {expected}")
    return image, path


def read_any(path: str | Path) -> tuple[sitk.Image, Path]:
    """An image of any size and number of components as ITK reads it, and its path; a 4th axis of 1 is left out.

    Raises:
        InputError: missing, unreadable, no, a singular or a sheared affine, complex numbers, or, in NIfTI, NaN or
            infinite voxels.
    """
    if not str(path).strip():
        raise InputError("a path is empty; give a file or a DICOM folder")
    path = Path(path)
    check_name(str(path.absolute()))
    check_there(path)
    if path.is_file() and path.name.lower().endswith(NIFTI):
        check_nifti(path)
    try:
        with _quiet():
            image = read_dicom(path) if path.is_dir() else _read_file(path)
    except RuntimeError as error:
        if "orthonormal direction cosines" in str(error):
            raise sheared(path) from None
        raise InputError(
            f"{path}: cannot be read as an image ({itk_reason(error)}); check that it is complete, or "
            "convert it to NIfTI"
        ) from None
    if image.GetDimension() > 2:
        check_axes(Grid.of(image).affine, path)
    if "complex" in image.GetPixelIDTypeAsString():
        raise InputError(f"{path}: holds complex numbers; give its magnitude image")
    return image[..., 0] if image.GetDimension() == 4 and image.GetSize()[3] == 1 else image, path


def size_of(image: sitk.Image) -> str:
    """An image's size in words, such as 64×64×30×200."""
    return "×".join(map(str, image.GetSize()))


def _read_file(path: Path) -> sitk.Image:
    """An image by ITK, or by nibabel where ITK cannot read it: FreeSurfer's volumes and NIfTI-2."""
    name = path.name.lower()
    if not (name.endswith(FREESURFER) or (name.endswith(NIFTI) and isinstance(nib.load(path), NIFTI_2))):
        return _by_itk(path)
    try:
        image = nib.load(path)
        array = np.asanyarray(image.dataobj)
    except Exception as error:  # nibabel raises many kinds for a file that it cannot read
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: is not a readable volume ({reason}); check or export it again") from None
    if array.ndim not in (3, 4):
        raise InputError(f"{path}: has shape {array.shape}; expected a 3-D volume or a 4-D series of them")
    if array.dtype.kind not in "iuf" or array.dtype.itemsize > LARGEST:
        raise InputError(f"{path}: has voxels of type {array.dtype}; convert it to a grey-scale image of float32")
    affine = in_millimetres(image.affine, image.header)
    check_regular(affine, path)
    grid = Grid(array.shape, RAS_FROM_LPS @ affine)
    array = array.astype(array.dtype.newbyteorder("="))
    if array.ndim == 3:
        return grid.to_sitk(array)
    return sitk.JoinSeries([grid.to_sitk(volume) for volume in np.moveaxis(array, 3, 0)], 0.0, _step(image.header))


def _by_itk(path: Path) -> sitk.Image:
    """An image by ITK, which would read the voxels of ``scan.nii`` for ``scan.nii.gz`` where both are in one folder."""
    if not (path.name.lower().endswith(".nii.gz") and path.with_name(path.name[:-3]).exists()):
        return sitk.ReadImage(str(path))
    with TemporaryDirectory() as folder:
        alone = Path(folder) / path.name
        try:
            alone.symlink_to(path.absolute())
        except OSError:  # a system that has no links, or gives no right to make them
            shutil.copyfile(path, alone)
        return sitk.ReadImage(str(alone))


def _step(header: Any) -> float:
    """What lies between two volumes of a series, in seconds where it is time, as ITK reads it from NIfTI-1."""
    step = float(header.get_zooms()[3])
    unit = header.get_xyzt_units()[1] if hasattr(header, "get_xyzt_units") else "msec"  # FreeSurfer's TR
    return step * {"msec": 1e-3, "usec": 1e-6}.get(unit, 1.0) or 1.0


def check_there(path: Path) -> None:
    """Refuse what is missing, and what may not be read, which libraries take for a damaged file.

    Raises:
        InputError: saying which of them it is.
    """
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
