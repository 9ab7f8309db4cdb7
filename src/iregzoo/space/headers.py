"""What the header of a volume says of where it lies, and what ITK passes over in silence."""

import logging
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.openers import ImageOpener
from numpy.typing import NDArray

from iregzoo.errors import InputError
from iregzoo.space.grid import RAS_FROM_LPS, Grid, Matrix

logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # what matters of what it mends is told here

NIFTI = (".nii", ".nii.gz", ".hdr", ".img")
NRRD = (".nrrd", ".nhdr")
SHEAR = 1e-3  # between the cosines of axes
FLAT = 1e-6  # the volume that a voxel's axes span, of a box with their lengths
APART = 0.5  # voxels that a place may differ from what a NIfTI file's affines say
MILLIMETRES = {1: 1000.0, 3: 0.001}  # of NIfTI's codes for metres and micrometres; all others mean mm, as for ITK
PATIENT = {"right-anterior-superior", "left-anterior-superior", "left-posterior-superior", "ras", "las", "lps"}


def check_finite(array: NDArray[Any], path: Path) -> None:
    """Refuse NaN and infinite voxels.

    Raises:
        InputError: saying how many there are.
    """
    bad = int(array.size - np.isfinite(array).sum())
    if bad:
        raise InputError(f"{path}: {bad} voxels are NaN or infinite; replace them, for instance with 0")


def check_nifti(path: Path) -> None:
    """Refuse what ITK passes over in silence: voxels that a file lacks or that are NaN, and a missing affine.

    Raises:
        InputError: for these, and for what is no NIfTI file.
    """
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
            "set one, for instance with nibabel's set_qform"
        )
    with ImageOpener(image.file_map.get("header", image.file_map["image"]).filename) as stream:
        given = image.header_class.from_fileobj(stream, check=False)  # which nibabel would mend in silence
    sizes = [float(size) for size in given["pixdim"][1:4]]
    if min(sizes) <= 0 and (int(header["sform_code"]) == 0 or min(sizes) < 0):
        raise InputError(
            f"{path}: its header has the voxel size {' × '.join(f'{size:g}' for size in sizes)} mm (pixdim); set the "
            "true one, for instance with nibabel's set_zooms"
        )
    check_regular(header.get_best_affine(), path)


def check_regular(affine: NDArray[Any], path: Path) -> None:
    """Refuse an affine (4, 4) that is not finite, or brings voxels into a plane, however small they are.

    Raises:
        InputError: showing its linear part.
    """
    linear = np.asarray(affine, dtype=np.float64)[:3, :3]
    lengths = np.linalg.norm(linear, axis=0)
    if not np.isfinite(affine).all() or not lengths.all() or abs(np.linalg.det(linear / lengths)) < FLAT:
        raise InputError(f"{path}: its affine is singular ({linear.tolist()}); set a valid one")


def check_axes(affine: NDArray[Any], path: Path) -> None:
    """Refuse an affine (4, 4) that is sheared: the NIfTI files of a result cannot hold it.

    Raises:
        InputError: for such an affine, and as ``check_regular`` does.
    """
    check_regular(affine, path)
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if np.abs(axes.T @ axes - np.eye(3)).max() > SHEAR:
        raise sheared(path)


def sheared(path: Path) -> InputError:
    """The refusal of a file whose axes are not orthogonal."""
    return InputError(
        f"{path}: its affine is sheared, so its axes are not orthogonal; resample it to an orthogonal grid, for "
        "instance with nibabel.processing.resample_to_output"
    )


def in_millimetres(affine: NDArray[Any], header: Any) -> Matrix:
    """A NIfTI header's affine (4, 4) in mm, whatever its unit is."""
    unit = int(header["xyzt_units"]) & 7 if "xyzt_units" in header else 0
    scaled = np.array(affine, dtype=np.float64)
    scaled[:3] *= MILLIMETRES.get(unit, 1.0)
    return scaled


def header_doubt(grid: Grid, path: Path) -> str:
    """In words, why the place on which ITK read a file may not be where it lies; empty where nothing says so."""
    name = path.name.lower()
    if path.is_dir() or not name.endswith((*NIFTI, *NRRD)):
        return ""
    return _nrrd_doubt(path) if name.endswith(NRRD) else _nifti_doubt(grid, path)


def _nifti_doubt(grid: Grid, path: Path) -> str:
    """How far apart the affines of a NIfTI file place it, of which ITK took one, or a mixture with the voxel sizes."""
    header = nib.load(path).header
    if "sform_code" not in header:
        return (
            f"{path.name}: is an Analyze file, which does not say which way its axes run; they were taken to run to "
            "left, posterior and superior, so front and back or left and right may be swapped; convert it to NIfTI"
        )
    placed = {}
    for kind in ("sform", "qform"):
        try:
            if int(header[f"{kind}_code"]):
                placed[kind] = RAS_FROM_LPS @ in_millimetres(getattr(header, f"get_{kind}")(), header)
        except ValueError:  # a quaternion that is none, which ITK then does not use
            continue
    off = {kind: grid.farthest(grid.affine, affine) for kind, affine in placed.items()}
    most = APART * float(grid.spacing.min())
    if not off or max(off.values()) < most:
        return ""
    taken = min(off, key=lambda kind: (off[kind], kind))
    if off[taken] >= most:
        own, others = (" × ".join(f"{size:.3g}" for size in sizes) for sizes in (grid.spacing, _sizes(placed[taken])))
        return (
            f"{path.name}: its voxel size ({own} mm) and its {taken} ({others} mm) disagree and place it up to "
            f"{off[taken]:.1f} mm apart; its voxel size was used, as ITK does; other programs may take its {taken}"
        )
    apart = grid.farthest(*placed.values())
    return f"{path.name}: its sform and its qform place it up to {apart:.1f} mm apart; its {taken} was used"


def _sizes(affine: Matrix) -> Matrix:
    lengths: Matrix = np.linalg.norm(affine[:3, :3], axis=0)
    return lengths


def _nrrd_doubt(path: Path) -> str:
    """What an NRRD file leaves open about its axes."""
    fields = {}
    with path.open("rb") as stream:
        for line in iter(stream.readline, b""):
            if not line.strip():  # what follows are voxels
                break
            name, _, value = line.decode("latin-1").partition(":")
            fields[name.strip().lower()] = value.strip().lower()
    if "space directions" not in fields:
        return (
            f"{path.name}: does not say which way its axes run (no space directions); they were taken to run to left, "
            "posterior and superior"
        )
    space = fields.get("space", "").removesuffix("-time")
    if space in PATIENT or space.removesuffix("t") in PATIENT:
        return ""
    said = f"its space, {space!r}, is not a patient's" if space else "it names no space of a patient"
    return f"{path.name}: {said}; it was taken as left-posterior-superior"
