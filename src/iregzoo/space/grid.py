"""Voxel grids in scanner space.

World coordinates are ITK's: millimetres, LPS. Arrays are indexed (i, j, k) as NIfTI and ITK index them, so tensor axis
0 is the image's first axis.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from torch import Tensor

from iregzoo.fields import sample
from iregzoo.space.separable import EDGE, axis_order, resample_axes

Matrix = NDArray[np.float64]

RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
CORNERS = np.array(list(product((0, 1), repeat=3)))  # of a box, the last axis first to change


@dataclass(frozen=True)
class Grid:
    """A regular grid: ``shape`` voxels, ``affine`` (4, 4) from voxel index to LPS millimetres."""

    shape: tuple[int, int, int]
    affine: Matrix

    @classmethod
    def of(cls, image: sitk.Image) -> "Grid":
        """The first three axes of an image."""
        x, y, z = image.GetSize()[:3]
        axes, affine = image.GetDimension(), np.eye(4)
        affine[:3, :3] = np.array(image.GetDirection()).reshape(axes, axes)[:3, :3] * image.GetSpacing()[:3]
        affine[:3, 3] = image.GetOrigin()[:3]
        return cls((x, y, z), affine)

    @property
    def spacing(self) -> Matrix:
        """Millimetres per voxel along each axis: (3,)."""
        lengths: Matrix = np.linalg.norm(self.affine[:3, :3], axis=0)
        return lengths

    @property
    def centre(self) -> Matrix:
        """World position of the middle of the grid: (3,)."""
        middle: Matrix = self.affine[:3, :3] @ ((np.array(self.shape) - 1) / 2) + self.affine[:3, 3]
        return middle

    def matches(self, other: "Grid", tolerance: float = 1e-3) -> bool:
        """Whether both are one grid: the same shape, and no voxel further apart than ``tolerance`` voxels."""
        if self.shape != other.shape:
            return False
        return self.farthest(self.affine, other.affine) <= tolerance * float(self.spacing.min())

    @property
    def diagonal(self) -> float:
        """Of the field of view, mm."""
        return float(np.linalg.norm(np.array(self.shape) * self.spacing))

    @property
    def volume(self) -> float:
        """Of the field of view, mm³."""
        return float(np.prod(np.array(self.shape) * self.spacing))

    def farthest(self, first: Matrix, second: Matrix) -> float:
        """How far apart two affines (4, 4) of voxel indices bring a corner at most: a distance in their world."""
        corners = np.insert(CORNERS * (np.array(self.shape) - 1), 3, 1, axis=1)
        return float(np.linalg.norm((corners @ (first - second).T)[:, :3], axis=1).max())

    def in_mm(self, vectors: Tensor) -> Tensor:
        """Vectors (B, 3, *any) in this grid's voxels, such as a network's displacement, in LPS mm."""
        return turn(self.affine, vectors)

    def in_voxels(self, vectors: Tensor) -> Tensor:
        """Vectors (B, 3, *any) in LPS mm, such as a result's displacement, in this grid's voxels."""
        return turn(inverse(self.affine), vectors)

    def to_sitk(self, array: NDArray[Any], *, vector: bool = False) -> sitk.Image:
        """An ITK image of this geometry from (X, Y, Z), or (X, Y, Z, C) of vectors."""
        axes = (2, 1, 0, 3) if vector else (2, 1, 0)
        turned = torch.from_numpy(array).permute(axes).contiguous().numpy()  # faster than NumPy at this
        image = sitk.GetImageFromArray(turned, isVector=vector)
        image.SetOrigin(self.affine[:3, 3].tolist())
        image.SetSpacing(self.spacing.tolist())
        image.SetDirection((self.affine[:3, :3] / self.spacing).ravel().tolist())
        return image


def inverse(matrix: Matrix) -> Matrix:
    """The inverse of an affine (4, 4)."""
    return np.asarray(np.linalg.inv(matrix), dtype=np.float64)


def to_voxels(grid: Grid, world: Matrix | None, target: Grid) -> Matrix:
    """Matrix (4, 4) from voxels of ``grid`` through an affine of the world to voxels of ``target``."""
    through = np.eye(4) if world is None else world
    matrix: Matrix = inverse(target.affine) @ through @ grid.affine
    return matrix


def apply_matrix(matrix: Matrix | Tensor, points: Tensor) -> Tensor:
    """Map points (B, 3, *shape) by an affine (4, 4)."""
    linear = torch.as_tensor(matrix[:3, :3], dtype=points.dtype, device=points.device)
    offset = torch.as_tensor(matrix[:3, 3], dtype=points.dtype, device=points.device)
    mapped = torch.einsum("ij,bj...->bi...", linear, points)
    return mapped + offset.view(1, 3, *[1] * (points.dim() - 2))


def turn(matrix: Matrix, vectors: Tensor) -> Tensor:
    """Turn vectors (B, 3, *shape) by the linear part of an affine (4, 4)."""
    linear = np.eye(4)
    linear[:3, :3] = matrix[:3, :3]
    return apply_matrix(linear, vectors)


def slabs(shape: Sequence[int], voxels: int = 1 << 18) -> Iterator[slice]:
    """Parts of a grid along its first axis, of about so many voxels: what is needed on the way stays small."""
    rows = max(1, voxels // (shape[1] * shape[2]))
    return (slice(first, min(first + rows, shape[0])) for first in range(0, shape[0], rows))


def positions(matrix: Matrix, shape: Sequence[int], part: slice, *, device: torch.device | str = "cpu") -> Tensor:
    """Where an affine (4, 4) takes the voxels of a slab of a grid: (1, 3, part, shape[1], shape[2]), float64."""
    first, second, third = (
        torch.arange(*axis.indices(size), device=device, dtype=torch.float64)
        for axis, size in zip((part, slice(None), slice(None)), shape, strict=True)
    )
    linear = torch.as_tensor(matrix, dtype=torch.float64, device=device)[:3, :, None]
    i, j, k = (linear[:, axis] * along for axis, along in enumerate((first, second, third)))
    return (i[:, :, None, None] + (j + linear[:, 3])[:, None, :, None] + k[:, None, None, :])[None]


def read_at(image: Tensor, points: Tensor, *, mode: str = "linear", outside: float | None = 0.0) -> Tensor:
    """Read an image (1, C, X, Y, Z) at voxel coordinates (1, 3, *shape) as ITK's resampler does.

    A voxel reaches half a voxel beyond its centre, also at the faces; points further out get ``outside``, or what the
    border holds where that is None.
    """
    values = _nearest(image, points) if mode == "nearest" else sample(image, points, mode=mode, padding="border")
    if outside is None:
        return values
    limits = torch.tensor(image.shape[2:], dtype=points.dtype, device=points.device).view(1, 3, *[1] * 3)
    inside = ((points >= -0.5 - EDGE) & (points < limits - 0.5 - EDGE)).all(1, keepdim=True)
    return torch.where(inside, values, torch.as_tensor(outside, dtype=values.dtype, device=values.device))


def _nearest(image: Tensor, points: Tensor) -> Tensor:
    """The voxels nearest to points, whole numbers of any size untouched."""
    x, y, z = ((along + 0.5).floor().clamp(0, n - 1) for along, n in zip(points[0], image.shape[2:], strict=True))
    index = ((x * image.shape[3] + y) * image.shape[4] + z).long()
    return image.flatten(2)[:, :, index]


def pull(
    image: Tensor, matrix: Matrix, shape: Sequence[int], *, mode: str = "linear", outside: float | None = 0.0
) -> Tensor:
    """Resample an image (1, C, X, Y, Z) to a grid of ``shape`` whose voxels ``matrix`` takes to voxels of the image.

    ``mode`` and ``outside`` are those of ``read_at``.
    """
    order = axis_order(matrix, shape)
    if order is not None and mode == "linear" and image.is_floating_point():
        return resample_axes(image, matrix, shape, order, outside=outside)
    pulled = image.new_empty(1, image.shape[1], *shape)
    for part in slabs(shape):
        points = positions(matrix, shape, part, device=image.device)
        pulled[:, :, part] = read_at(image, points, mode=mode, outside=outside)
    return pulled


def canonical_axes(grid: Grid, upright: Matrix | None = None) -> tuple[list[int], list[int]]:
    """Which axis of the grid runs nearest to right, anterior and superior, and its sign (+1 or −1) along it.

    Args:
        grid: whose axes they are.
        upright: a rotation (4, 4) of the world, after which the patient lies as its axes say; none if None.
    """
    world = grid.affine if upright is None else upright @ grid.affine
    orientation = nib.orientations.io_orientation(RAS_FROM_LPS @ world)
    order = [int(np.flatnonzero(orientation[:, 0] == axis)[0]) for axis in range(3)]
    return order, [int(orientation[axis, 1]) for axis in order]


def halved(grid: Grid) -> Grid:
    """A grid of half the spacing, whose voxels of odd index are those of the given one, and one more on either side."""
    affine = grid.affine.copy()
    affine[:3, :3] /= 2
    affine[:3, 3] -= affine[:3, :3].sum(axis=1)
    x, y, z = (2 * size + 1 for size in grid.shape)
    return Grid((x, y, z), affine)


def middle(grid: Grid, shape: Sequence[int]) -> Grid:
    """The voxels in the middle of a grid: ``shape`` of them, at most as many as the grid has."""
    start = [size // 2 - wanted // 2 for size, wanted in zip(grid.shape, shape, strict=True)]
    return _part(grid, start, [first + wanted for first, wanted in zip(start, shape, strict=True)])


def bounding_grid(mask: Tensor, grid: Grid, margin_mm: float = 0.0) -> Grid:
    """The part of a grid that holds a mask (X, Y, Z), which is not empty, and a margin around it within the grid."""
    margin = np.ceil(margin_mm / grid.spacing).astype(int)
    low, high = [], []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        seen = torch.where(mask.any(dim=others[1]).any(dim=others[0]))[0]
        low.append(max(int(seen[0]) - int(margin[axis]), 0))
        high.append(min(int(seen[-1]) + 1 + int(margin[axis]), grid.shape[axis]))
    return _part(grid, low, high)


def _part(grid: Grid, low: Sequence[int], high: Sequence[int]) -> Grid:
    """The voxels of a grid from ``low`` to before ``high``."""
    affine = grid.affine.copy()
    affine[:3, 3] = affine[:3, :3] @ np.array(low) + affine[:3, 3]
    return Grid((high[0] - low[0], high[1] - low[1], high[2] - low[2]), affine)


def network_grid(
    grid: Grid,
    spacing: Sequence[float],
    *,
    stride: int,
    minimum: Sequence[int] = (1, 1, 1),
    upright: Matrix | None = None,
) -> Grid:
    """The grid on which a network sees an image.

    Its axes are the image's own, reordered and flipped to run nearest to right, anterior, superior (oblique images are
    not rotated), where ``upright`` is as for ``canonical_axes``. It covers the image, has at least ``minimum`` voxels
    an axis, and a shape that ``stride`` divides. Padding goes evenly to both sides by whole voxels, so an image that
    already has the spacing is not interpolated.
    """
    order, signs = canonical_axes(grid, upright)
    step = np.asarray(spacing, dtype=float)
    size = np.array([grid.shape[axis] for axis in order])
    unit = np.stack([sign * grid.affine[:3, axis] for axis, sign in zip(order, signs, strict=True)], axis=1)
    own = np.linalg.norm(unit, axis=0)
    unit = unit / own
    covered = np.ceil(size * own / step - 1e-3).astype(int)
    shape = -(-np.maximum(np.maximum(covered, minimum), 2) // stride) * stride
    first = np.array([0.0] * 3)
    for axis, sign in zip(order, signs, strict=True):
        first[axis] = 0 if sign > 0 else grid.shape[axis] - 1
    origin = grid.affine[:3, :3] @ first + grid.affine[:3, 3]
    corner = origin + unit @ ((step - own) / 2 - ((shape - covered) // 2) * step)
    affine = np.eye(4)
    affine[:3, :3] = unit * step
    affine[:3, 3] = corner
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)
