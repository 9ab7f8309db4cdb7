"""Render anatomical label maps as images, and write the table of pairs that ``iregzoo evaluate`` wants.

    python benchmarks/render_brains.py --dataset-dir DIR --output FOLDER [--stripped] [--choosing]

DIR holds the label maps, labels.csv and splits.json. The two people of the split val are paired with each other and
with the first two of the split train, both ways: t1.csv pairs T1 with T1, contrast.csv T1 with a random contrast. With
--choosing they are the next four of the split train instead: pairs to choose settings on. tissues.json says of each
image how far apart white matter and cortex are in it.
"""

import json
from itertools import chain
from pathlib import Path

import fire
import nibabel as nib
import numpy as np
import torch

from iregzoo.anatomy import read_splits, read_table

SEED = 7
WHITE, CORTEX = (2, 41), (3, 42)  # labels, left and right


def main(dataset_dir: str, output: str, stripped: bool = False, choosing: bool = False) -> None:
    """Render the maps at their own resolution, head and all or the brain alone."""
    source, target = Path(dataset_dir), Path(output)
    target.mkdir(parents=True, exist_ok=True)
    table, splits = read_table(source), read_splits(source)
    old, new = (splits["train"][2:4], splits["train"][4:6]) if choosing else (splits["val"][:2], splits["train"][:2])
    share = float(stripped)
    plain = {"stripped": share, "blur": 0.6, "bias": 0.2, "gamma": 0.1, "thick": 0.0}
    looks = {"t1": table.synthesis(t1=1.0, **plain), "contrast": table.synthesis(t1=0.0, **plain)}
    tissues = {}
    for number, name in enumerate([*old, *new]):
        image = nib.load(source / f"{name}.nii.gz")
        labels = np.asarray(image.dataobj).astype(np.int16)
        compared = np.where(np.isin(labels, table.compared), labels, 0).astype(np.int16)
        nib.save(nib.Nifti1Image(compared, image.affine), target / f"{name}_labels.nii.gz")
        for look, synthesis in looks.items():
            random = torch.Generator().manual_seed(SEED * 1000 + number)
            rendered = synthesis(torch.from_numpy(labels)[None], random)[0].numpy()
            voxels = np.round(1000 * rendered).astype(np.int16)
            nib.save(nib.Nifti1Image(voxels, image.affine), target / f"{name}_{look}.nii.gz")
            tissues[f"{name}_{look}"] = apart(voxels[np.isin(labels, WHITE)], voxels[np.isin(labels, CORTEX)])
    (target / "tissues.json").write_text(json.dumps(tissues, indent=2) + "\n", "utf-8")
    ways = [(old[0], old[1]), (old[0], new[0]), (old[1], new[1])]
    pairs = list(chain.from_iterable(((first, second), (second, first)) for first, second in ways))
    for look in looks:
        lines = [f"{f}_t1.nii.gz,{m}_{look}.nii.gz,{f}_labels.nii.gz,{m}_labels.nii.gz" for f, m in pairs]
        header = "fixed,moving,fixed_labels,moving_labels"
        (target / f"{look}.csv").write_text("\n".join([header, *lines]) + "\n", "utf-8")
    print(f"written to {target}: {len(pairs)} pairs each in {', '.join(f'{look}.csv' for look in looks)}")


def apart(first: np.ndarray, second: np.ndarray) -> float:
    """How far apart the means of two tissues' voxels are, in standard deviations within one of them."""
    within = np.sqrt((first.var() + second.var()) / 2)
    return round(float(abs(first.mean() - second.mean()) / max(within, 1e-6)), 2)


if __name__ == "__main__":
    fire.Fire(main)
