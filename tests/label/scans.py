"""Scans as they come to MONAI Label: laid otherwise in the scanner, and such as no server can use."""

from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import zoom


def turned(image: nib.Nifti1Image) -> nib.Nifti1Image:
    """The same voxels at the same places under other axes: anterior, inferior, left for right, anterior, superior."""
    return image.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))


def thick(image: nib.Nifti1Image, *, labels: bool = False) -> nib.Nifti1Image:
    """The same scan with voxels of 0.8×1×2 mm, oblique in the scanner."""
    voxels = np.asarray(image.dataobj, np.float32)
    voxels = zoom(voxels, (1 / 0.8, 1, 0.5), order=0 if labels else 1, grid_mode=True, mode="nearest")
    scaling = np.array(image.shape) / np.array(voxels.shape)
    to_old, tilt = np.diag([*scaling, 1.0]), np.eye(4)
    to_old[:3, 3] = (scaling - 1) / 2
    angle = np.deg2rad(12)
    tilt[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return nib.Nifti1Image(voxels.astype(np.uint8 if labels else np.float32), tilt @ image.affine @ to_old)


def mirrored(image: nib.Nifti1Image) -> nib.Nifti1Image:
    """The other side: what lay to the left lies to the right."""
    return nib.Nifti1Image(np.asarray(image.dataobj)[::-1], image.affine)


# Scans that cannot be used, and words of the reason.
USELESS = {"corrupt": "not a readable NIfTI", "empty": "every voxel is 0", "flat": "one 3-D volume"}


def write_useless(folder: Path) -> None:
    """Write the scans of ``USELESS``."""
    (folder / "corrupt.nii.gz").write_bytes(bytes(range(256)) * 20)
    nib.save(nib.Nifti1Image(np.zeros((30, 40, 30), np.float32), np.eye(4)), folder / "empty.nii.gz")
    slice_alone = np.random.default_rng(0).random((30, 40, 1), np.float32)
    nib.save(nib.Nifti1Image(slice_alone, np.eye(4)), folder / "flat.nii.gz")
