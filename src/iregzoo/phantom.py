"""A phantom pair with a known deformation: what the demo registers."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from iregzoo.fields import warp
from iregzoo.register import Result
from iregzoo.space.files import write_image
from iregzoo.space.grid import Grid

SHAPE = (72, 88, 72)
SPACING_MM = 1.0
DEFORMATION_MM, SMOOTHNESS_VOXELS = 3.0, 14.0
TEXTURE, TEXTURE_VOXELS = 0.06, 2.5
INTENSITIES = np.array([0.02, 0.50, 0.85, 0.20, 0.66])  # outside, cortex, white matter, ventricles, deep nuclei
FILES = ("fixed.nii.gz", "moving.nii.gz", "fixed_labels.nii.gz", "moving_labels.nii.gz")
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Phantom:
    """Paths of a pair that has been written, and the displacement (1, 3, *SHAPE), voxels (1 mm), that relates it:
    fixed(x) = moving(x + u(x)), anatomically exact; contrast, shading and noise are each image's own."""

    fixed: Path
    moving: Path
    fixed_labels: Path
    moving_labels: Path
    displacement: torch.Tensor


def make_phantom(folder: str | Path, seed: int = 0) -> Phantom:
    """Write a brain-like pair of T1-like images and their label maps into a folder, which is made if need be."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    anatomy = _anatomy(random)
    displacement = _smooth_displacement(random)
    tissue = torch.from_numpy(TEXTURE * _noise(random, TEXTURE_VOXELS).astype(np.float32))[None, None]
    labels = {"moving": anatomy, "fixed": warp(anatomy, displacement, mode="nearest")}
    textures = {"moving": tissue, "fixed": warp(tissue, displacement, padding="border")}
    affine = np.diag([-SPACING_MM, -SPACING_MM, SPACING_MM, 1.0])  # axes run right, anterior, superior; LPS
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(SHAPE) - 1) / 2)
    grid = Grid(SHAPE, affine)
    paths = {}
    for name, label_map in labels.items():
        rendered = _render(label_map[0, 0].numpy(), textures[name][0, 0].numpy(), random)
        image = torch.from_numpy(rendered.astype(np.float32))[None, None]
        paths[name] = folder / f"{name}.nii.gz"
        paths[f"{name}_labels"] = folder / f"{name}_labels.nii.gz"
        write_image(paths[name], image, grid)
        write_image(paths[f"{name}_labels"], label_map, grid)
    return Phantom(**paths, displacement=displacement)


def recovered(phantom: Phantom, result: Result) -> dict[str, float]:
    """How much of the known deformation a registration found, inside the anatomy.

    Returns:
        ``known_mm`` and ``left_mm``, mean lengths of the known deformation and of what is left of it, and
        ``recovered_percent``.
    """
    assert result.scans.fixed_labels is not None
    inside = result.scans.fixed_labels.data[0, 0] > 0
    # The phantom's axes run right, anterior, superior; world axes left, posterior, superior.
    known = phantom.displacement * SPACING_MM * torch.tensor([-1.0, -1.0, 1.0]).view(1, 3, 1, 1, 1)
    known_mm = float(known.norm(dim=1)[0][inside].mean())
    left_mm = float((known - result.displacement).norm(dim=1)[0][inside].mean())
    return {"known_mm": known_mm, "left_mm": left_mm, "recovered_percent": 100 * (1 - left_mm / known_mm)}


def _noise(random: np.random.Generator, sigma: float) -> Array:
    """Smooth noise of unit standard deviation."""
    smooth: Array = gaussian_filter(random.standard_normal(SHAPE), sigma, mode="wrap")
    smooth /= smooth.std()
    return smooth


def _anatomy(random: np.random.Generator) -> torch.Tensor:
    """Folded cortex around white matter, ventricles and nuclei: int32 (1, 1, *SHAPE)."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, size) for size in SHAPE), indexing="ij")
    radius = np.sqrt(x**2 + y**2 + z**2) + 0.03 * _noise(random, 6.0)
    labels = np.zeros(SHAPE, np.int32)
    labels[radius < 0.86] = 1
    labels[radius + 0.06 * _noise(random, 2.2) < 0.66] = 2
    for side in (-1, 1):
        ventricle = ((x - side * 0.14) / 0.10) ** 2 + ((y + 0.05) / 0.36) ** 2 + ((z - 0.12) / 0.16) ** 2
        nucleus = ((x - side * 0.30) / 0.13) ** 2 + ((y - 0.08) / 0.26) ** 2 + ((z + 0.10) / 0.20) ** 2
        labels[ventricle + 0.15 * _noise(random, 4.0) < 1] = 3
        labels[(nucleus + 0.15 * _noise(random, 4.0) < 1) & (labels == 2)] = 4
    return torch.from_numpy(labels)[None, None]


def _smooth_displacement(random: np.random.Generator) -> torch.Tensor:
    field = np.stack([_noise(random, SMOOTHNESS_VOXELS) for _ in range(3)])
    field *= DEFORMATION_MM / SPACING_MM / np.sqrt(3)
    return torch.from_numpy(field.astype(np.float32))[None]


def _render(labels: NDArray[np.int32], texture: NDArray[np.float32], random: np.random.Generator) -> Array:
    """A T1-like image: intensity and texture of the tissue, partial volume, shading of the coil, noise."""
    sharp = INTENSITIES[labels] + texture * (labels > 0)
    shaded = gaussian_filter(sharp, 0.6) * (1 + 0.06 * _noise(random, 24.0))
    image: Array = np.abs(shaded + 0.015 * random.standard_normal(SHAPE)) * 1000
    return image
