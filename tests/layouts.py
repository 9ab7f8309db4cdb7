"""The papers' data sets as their folders look after download, small and made up."""

import pickle
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from iregzoo.space.formats import DIRLAB_CASES

Array = NDArray[Any]

GROUPS = ("NKI-RS-22", "NKI-TRT-20", "OASIS-TRT-20", "MMRR-21")
# For each layout the paths of some scans, in the order of names: image, label map, landmarks.
PATHS: dict[str, list[tuple[str, str, str]]] = {
    "ixi": [
        (path := f"{folder}/subject_{number}.pkl", path, "")
        for folder, numbers in (("Test", (9, 10)), ("Train", (2, 11, 100)), ("Val", (3, 30)))
        for number in numbers
    ],
    "freesurfer": [(f"IXI{n:03d}/mri/norm.mgz", f"IXI{n:03d}/mri/aseg.mgz", "") for n in (2, 12, 13)],
    "oasis": [
        (f"OASIS_OAS1_{n:04d}_MR1/aligned_norm.nii.gz", f"OASIS_OAS1_{n:04d}_MR1/aligned_seg35.nii.gz", "")
        for n in (1, 2, 3)
    ],
    "oasis_native": [
        (f"OASIS_OAS1_{n:04d}_MR1/norm.nii.gz", f"OASIS_OAS1_{n:04d}_MR1/seg35.nii.gz", "") for n in (1, 2, 3)
    ],
    "lpba40": [
        (
            f"S{n:02d}/S{n:02d}.delineation.skullstripped.nii.gz",
            f"S{n:02d}/S{n:02d}.delineation.structure.label.nii.gz",
            "",
        )
        for n in (1, 2, 3)
    ],
    "mindboggle": [
        (f"{folder}/t1weighted_brain.MNI152.nii.gz", f"{folder}/labels.DKT31.manual+aseg.MNI152.nii.gz", "")
        for folder in (f"{group}_volumes/{group}-{n}" for group in sorted(GROUPS) for n in (1, 2, 10))
    ],
    "flare21": [
        (f"TrainingImg/train_{n:03d}_0000.nii.gz", f"TrainingMask/train_{n:03d}.nii.gz", "") for n in (0, 1, 2)
    ],
    "flare22": [
        (f"imagesTr/FLARE22_Tr_{n:04d}_0000.nii.gz", f"labelsTr/FLARE22_Tr_{n:04d}.nii.gz", "") for n in (1, 2, 3)
    ],
    "abdomen_mr": [
        (f"imagesTr/AbdomenMRCT_{n:04d}_0000.nii.gz", f"labelsTr/AbdomenMRCT_{n:04d}_0000.nii.gz", "")
        for n in (1, 2, 9)
    ],
    "dirlab": [
        (f"Case{n}Pack/Images/case{n}_{phase}_s.img", "", f"Case{n}Pack/ExtremePhases/Case{n}_300_{phase}_xyz.txt")
        if n < 6
        else (
            f"Case{n}{'Deploy' if n == 8 else 'Pack'}/Images/case{n}_{phase}.img",
            "",
            f"Case{n}{'Deploy' if n == 8 else 'Pack'}/extremePhases/case{n}_dirLab300_{phase}_xyz.txt",
        )
        for n in range(1, 11)
        for phase in ("T00", "T50")
    ],
}
# What else lies there, and is no scan of the data set.
OTHERS = {
    "ixi": ["atlas.pkl"],
    "oasis": ["subjects.txt", "seg35_labels.txt", "OASIS_OAS1_0001_MR1/norm.nii.gz"],
    "abdomen_mr": ["imagesTr/AbdomenMRCT_0001_0001.nii.gz", "labelsTr/AbdomenMRCT_0001_0001.nii.gz"],
    "dirlab": ["Case1Pack/Images/case1_T10_s.img", "Case1Pack/Sampled4D/case1_4D-75_T00.txt"],
    "mindboggle": ["MMRR-21_volumes/MMRR-21-1/t1weighted_brain.nii.gz"],
}


def touch(folder: Path, layout: str) -> Path:
    """A data set of files without content: what ``find_scans`` looks at are names."""
    for path in [*(path for scan in PATHS[layout] for path in scan if path), *OTHERS.get(layout, [])]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    return folder


def volume(seed: int, shape: tuple[int, int, int] = (20, 22, 18)) -> tuple[Array, Array]:
    """An image and its label map: a box in two halves, 1 and 2, in noise, of a place that depends on the seed."""
    random = np.random.default_rng(seed)
    labels = np.zeros(shape, np.int16)
    x, y, z = random.integers(2, 6, 3)
    labels[x : x + 10, y : y + 12, z : z + 10] = 1
    labels[x : x + 10, y : y + 6, z : z + 10] = 2
    return (labels * 100 + random.uniform(1, 20, shape)).astype(np.float32), labels


def write(folder: Path, layout: str, labels: tuple[int, int] = (1, 2)) -> Path:
    """A data set with volumes in its files; ``labels`` are the numbers of the two structures."""
    for seed, (image, label, _) in enumerate(PATHS[layout]):
        intensity, halves = volume(seed)
        numbered = np.array([0, *labels], np.int32)[halves]
        for path in (folder / image, folder / label):
            path.parent.mkdir(parents=True, exist_ok=True)
        if image.endswith(".pkl"):
            (folder / image).write_bytes(pickle.dumps((intensity, numbered.astype(np.int16))))
            continue
        kind = nib.MGHImage if image.endswith(".mgz") else nib.Nifti1Image
        nib.save(kind(intensity, np.eye(4)), folder / image)
        nib.save(kind(numbered, np.eye(4)), folder / label)
    return folder


def write_dirlab(folder: Path, case: int, landmarks: dict[str, Array], *, offset: int = 0) -> dict[str, Array]:
    """One DIR-Lab case with the published size: its volumes in HU, of which the files hold HU + ``offset``.

    Landmarks (K, 3), by phase, are voxel indices from 0 up.
    """
    shape, _ = DIRLAB_CASES[case]
    volumes = {}
    for phase, points in landmarks.items():
        image = folder / f"Case{case}Pack/Images/case{case}_{phase}_s.img"
        table = folder / f"Case{case}Pack/ExtremePhases/Case{case}_300_{phase}_xyz.txt"
        hu = np.full(shape, -1000, np.int16)
        hu[60:200, 60:180, 20:70] = -800
        hu[90:120, 100:120, 30:50] = 40
        hu[10:30] = 30
        for path in (image, table):
            path.parent.mkdir(parents=True, exist_ok=True)
        (hu + np.int16(offset)).astype("<i2").ravel(order="F").tofile(image)
        np.savetxt(table, points + 1, fmt="%d", delimiter="\t")
        volumes[phase] = hu
    return volumes
