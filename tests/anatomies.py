"""Label maps of three people that the tests make: balls at known places, seen from other grids."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np

HEADER = "label,name,evaluate,intensity_class,t1_mean,t1_mean_sd,t1_std,t1_std_sd"
STRUCTURES = {
    2: (0, 0, 0, 14),
    10: (-9, 3, 2, 5),
    49: (9, 3, 2, 5),
    16: (0, -10, -6, 4),
    17: (-6, -4, 8, 4),
    53: (6, -4, 8, 4),
}


def write_person(path: Path, affine: np.ndarray, turn: str) -> None:
    """Balls at known places in mm, seen from a grid that an affine (4, 4) of the person moves, in an axis order."""
    grid = np.diag([1.0, 1.0, 1.0, 1.0])
    grid[:3, 3] = -30
    index = np.indices((60, 60, 60)).reshape(3, -1)
    places = np.linalg.inv(affine)[:3] @ (grid @ np.vstack((index, np.ones(index.shape[1]))))[[0, 1, 2, 3]]
    labels = np.zeros(index.shape[1], dtype=np.int16)
    for label, (x, y, z, radius) in STRUCTURES.items():
        labels[((places - [[x], [y], [z]]) ** 2).sum(0) < radius**2] = label
    labels[(labels == 0) & ((places**2).sum(0) < 20**2)] = 502
    image = nib.Nifti1Image(labels.reshape(60, 60, 60), grid)
    orientation = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(turn)
    )
    nib.save(image.as_reoriented(orientation), path)


def write_anatomies(path: Path) -> Path:
    """Three people with labels.csv and splits.json, as ``iregzoo.anatomy`` reads them."""
    rows = ["0,background,0,0,5,1,2,1", "502,head,0,9,200,5,4,1"]
    rows += [f"{label},s{label},1,{kind},{40 * kind},3,3,1" for kind, label in enumerate(STRUCTURES, 1)]
    (path / "labels.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    larger = np.diag([1.15, 1.1, 1.2, 1.0])
    larger[:3, 3] = (4, -3, 2)
    for name, affine, turn in (("a", np.eye(4), "RAS"), ("b", larger, "LIA"), ("c", np.diag([0.9, 1, 1, 1]), "PSR")):
        write_person(path / f"{name}.nii.gz", affine, turn)
    splits = {"train": ["a", "b", "c"], "val": ["a", "b"], "one": ["a"], "gone": ["a", "lost"]}
    (path / "splits.json").write_text(json.dumps(splits))
    return path
