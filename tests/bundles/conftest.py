"""Small generated scans, and a process that bundles leave as they found it."""

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from iregzoo import zoo

OBLIQUE = np.array([[-0.96, 0.28, 0.0, 40.0], [-0.28, -0.96, 0.0, 12.0], [0.0, 0.0, 1.0, -30.0], [0.0, 0.0, 0.0, 1.0]])
SPACING_MM = np.diag([1.0, 0.9, 1.2, 1.0])
SPLITS = {"train": ["a", "b", "c"], "val": ["d", "e"], "test": ["e", "f"]}


@dataclass(frozen=True)
class Pair:
    """Paths of two scans and their label maps."""

    fixed: Path
    moving: Path
    fixed_labels: Path
    moving_labels: Path


def blob(shape: tuple[int, int, int], centre: tuple[float, ...], radius: float) -> NDArray[np.int16]:
    """A ball in two halves, labelled 1 and 2."""
    places = np.indices(shape) - np.array(centre)[:, None, None, None]
    inside = (places**2).sum(0) < radius**2
    return np.where(inside, np.where(places[1] < 0, 1, 2), 0).astype(np.int16)


def write_scan(image: Path, label: Path, shape: tuple[int, int, int], seed: int) -> None:
    """A ball with texture, somewhere near the middle, and its labels, oblique in the scanner."""
    random = np.random.default_rng(seed)
    labels = blob(shape, tuple(np.array(shape) / 2 + random.uniform(-2, 2, 3)), min(shape) / 3)
    texture = gaussian_filter(random.standard_normal(shape), 1.5)
    intensity = gaussian_filter(np.array([20.0, 100.0, 60.0])[labels] + 40 * texture, 0.7)
    affine = OBLIQUE @ SPACING_MM
    for path, array in ((image, intensity.astype(np.float32)), (label, labels)):
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, affine), path)


def some_weights(folder: Path, scratch: Path) -> str:
    """The name of a bundle's first weights; of a bundle without any, a file of random ones."""
    bundle = zoo.read_bundle(folder)
    if bundle.weights:
        return next(iter(bundle.weights))
    torch.manual_seed(0)
    network = zoo.untrained(bundle)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    torch.save(network.state_dict(), scratch / "random.pt")
    return str(scratch / "random.pt")


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A fixed and a moving scan of different shapes."""
    folder = tmp_path_factory.mktemp("pair")
    names = ("fixed", "moving", "fixed_labels", "moving_labels")
    found = Pair(*(folder / f"{name}.nii.gz" for name in names))
    write_scan(found.fixed, found.fixed_labels, (30, 40, 30), seed=1)
    write_scan(found.moving, found.moving_labels, (32, 38, 28), seed=2)
    return found


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set as training reads it: six scans with labels in three splits."""
    folder = tmp_path_factory.mktemp("dataset")
    for seed, name in enumerate("abcdef"):
        write_scan(folder / f"images/{name}.nii.gz", folder / f"labels/{name}.nii.gz", (18, 16, 15), seed)
    (folder / "splits.json").write_text(json.dumps(SPLITS))
    return folder


@pytest.fixture(autouse=True)
def _process_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Running a bundle sets up logging and sys.path; and no bundle of the user's own home is in the way."""
    monkeypatch.setenv("IREGZOO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
