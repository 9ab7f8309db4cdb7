"""Grids as scanners make them, and images and fields drawn in scanner space."""

import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor

from iregzoo.space.grid import Grid, Matrix

Array = NDArray[np.float64]


def make_grid(
    shape: tuple[int, int, int] = (24, 32, 28),
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    *,
    degrees: tuple[float, float, float] = (0.0, 0.0, 0.0),
    axes: tuple[int, int, int] = (0, 1, 2),
    signs: tuple[int, int, int] = (1, 1, 1),
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> Grid:
    """A grid around a place: voxel axis i runs along world axis ``axes[i]``, or against it, and all are then turned."""
    direction = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() @ (np.eye(3)[:, axes] * signs)
    affine = np.eye(4)
    affine[:3, :3] = direction * spacing
    affine[:3, 3] = np.array(centre) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid(shape, affine)


GRIDS = {
    "plain": make_grid(),
    "oblique": make_grid(degrees=(14, -11, 22), centre=(12.5, -30.2, 41.7)),
    "anisotropic": make_grid((30, 20, 14), (0.9, 1.3, 2.2), centre=(3.3, 2.2, 1.1)),
    "flipped": make_grid(axes=(2, 0, 1), signs=(-1, 1, -1), centre=(-5.5, 60.1, -7.9)),
    "everything": make_grid((16, 28, 25), (2.1, 1.1, 0.8), degrees=(-17, 9, -25), axes=(1, 2, 0), signs=(-1, -1, 1)),
}


def world_points(grid: Grid) -> Array:
    """World position of every voxel: (*shape, 3)."""
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1)
    points: Array = index @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    return points


def apply_world(matrix: Matrix, points: Array) -> Array:
    moved: Array = points @ matrix[:3, :3].T + matrix[:3, 3]
    return moved


def noise_image(shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Independent at every voxel, 100 to 1100: (1, 1, *shape)."""
    return 100 + 1000 * torch.rand(1, 1, *shape, generator=torch.manual_seed(seed))


def waves(grid: Grid, reach_mm: float = 3.0, seed: int = 0, length_mm: float = 40.0) -> Tensor:
    """A smooth displacement, in LPS mm, one wave per component: (1, 3, *shape)."""
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(3, 3))
    vectors *= 2 * np.pi / length_mm / np.linalg.norm(vectors, axis=1, keepdims=True)
    phases = world_points(grid) @ vectors.T + random.uniform(0, 2 * np.pi, 3)
    return torch.from_numpy(np.moveaxis(reach_mm * np.sin(phases), -1, 0).copy())[None]


# Semi-axes, centre (mm) and intensity of ellipsoids, the later drawn over the earlier; nothing is symmetric.
ELLIPSOIDS = (
    ((62, 78, 56), (0, 0, 0), 500.0),
    ((50, 64, 44), (0, 2, 2), 850.0),
    ((9, 24, 11), (13, 8, 6), 200.0),
    ((11, 20, 9), (-14, 2, 10), 150.0),
    ((12, 16, 10), (28, -20, -12), 650.0),
    ((18, 12, 12), (-22, -30, -8), 400.0),
    ((10, 14, 16), (8, 40, -14), 300.0),
    ((22, 16, 12), (-4, 48, 22), 620.0),
)


def draw_head(grid: Grid, to_head: Matrix | None = None, *, size: float = 1.0) -> Tensor:
    """A brain-like image, (1, 1, *shape), with soft edges; ``to_head`` takes the grid's world to the phantom's."""
    points = apply_world(np.eye(4) if to_head is None else to_head, world_points(grid)) / size
    image = np.zeros(grid.shape)
    for half_axes, centre, value in ELLIPSOIDS:
        offset = (points - centre) / half_axes
        depth_mm = (1 - np.linalg.norm(offset, axis=-1)) * min(half_axes)
        image += (value - image) / (1 + np.exp(-np.clip(2 * depth_mm, -30, 30)))
    return torch.from_numpy(image.astype(np.float32))[None, None]


def to_image(data: Tensor, grid: Grid) -> sitk.Image:
    return grid.to_sitk(data[0, 0].numpy())


def from_image(image: sitk.Image) -> Tensor:
    """(1, 1, X, Y, Z) of an ITK image."""
    return torch.from_numpy(sitk.GetArrayFromImage(image).transpose(2, 1, 0).copy())[None, None]


def field_transform(displacement: Tensor, grid: Grid) -> sitk.DisplacementFieldTransform:
    vectors = displacement[0].movedim(0, -1).double().numpy()
    return sitk.DisplacementFieldTransform(grid.to_sitk(vectors, vector=True))


# A linear transform that turns, shears and scales a little.
AFFINE = np.array([[1.04, 0.1, 0, 2], [-0.08, 0.97, 0.05, -1.5], [0.02, 0, 1.03, 1], [0, 0, 0, 1.0]])


def wavy_transform(fixed: Grid) -> sitk.Transform:
    """ITK's own form of ``waves`` on a grid and then ``AFFINE``."""
    linear = sitk.AffineTransform(AFFINE[:3, :3].ravel().tolist(), AFFINE[:3, 3].tolist())
    return sitk.CompositeTransform([linear, field_transform(waves(fixed), fixed)])


def move_all(transform: sitk.Transform, points: Array) -> Array:
    """ITK's own answer at each of (N, 3) places."""
    return np.array([transform.TransformPoint(point.tolist()) for point in points])
