"""Scans as they come to MONAI Label: laid otherwise in the scanner, as atlases, and such as no server can use."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from scipy.ndimage import zoom

SHAPE = (20, 24, 18)  # of an atlas


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


def write_dicom(scan: Path, folder: Path) -> list[Path]:
    """A scan as a series of one file a slice."""
    image = sitk.Cast(sitk.RescaleIntensity(sitk.ReadImage(str(scan)), 0, 4000), sitk.sitkUInt16)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    paths = []
    for index in range(image.GetDepth()):
        plane = image[:, :, index]
        place = image.TransformIndexToPhysicalPoint((0, 0, index))
        tags = {
            "0008|0018": f"1.2.826.0.1.3680043.2.1125.3.{index}",
            "0008|0060": "MR",
            "0020|000d": "1.2.826.0.1.3680043.2.1125.1",
            "0020|000e": "1.2.826.0.1.3680043.2.1125.2",
            "0020|0013": str(index),
            "0020|0032": "\\".join(map(str, place)),
            "0020|0037": "\\".join(map(str, np.array(image.GetDirection()).reshape(3, 3)[:, :2].T.ravel())),
        }
        for tag, value in tags.items():
            plane.SetMetaData(tag, value)
        paths.append(folder / f"{index:03}.dcm")
        writer.SetFileName(str(paths[-1]))
        writer.Execute(plane)
    return paths


def write_atlas(folder: Path, values: tuple[int, ...] = (1, 2), name: str = "mine") -> list[str]:
    """Image, labels and names, as options of the command."""
    folder.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-1.2, 1.0, 0.9, 1.0])
    voxels = np.random.default_rng(0).random(SHAPE, np.float32)
    nib.save(nib.Nifti1Image(voxels, affine), folder / f"{name}.nii.gz")
    labels = np.zeros(SHAPE, np.int32)
    for index, value in enumerate(values):
        labels[4:16, 4 + 3 * index : 6 + 3 * index, 4:14] = value
    nib.save(nib.Nifti1Image(labels, affine), folder / f"{name}_labels.nii.gz")
    (folder / "names.json").write_text(json.dumps({str(value): f"part {value}" for value in values}))
    paths = [str(folder / file) for file in (f"{name}.nii.gz", f"{name}_labels.nii.gz", "names.json")]
    return ["--atlas", paths[0], "--atlas-labels", paths[1], "--label-names", paths[2]]
