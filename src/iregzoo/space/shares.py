"""Label maps between their voxels: each label has the share that linear interpolation gives it, the largest wins."""

from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray

from iregzoo.space.grid import CORNERS, Grid, inverse, positions, slabs
from iregzoo.space.points import map_points
from iregzoo.space.transforms import itk_move

TIE = 1e-6  # shares nearer to each other than this are equal, whatever rounding made of them
PLACES = 1 << 15  # read at a time


def resample_labels(image: sitk.Image, grid: Grid, transform: sitk.Transform) -> sitk.Image:
    """A label map on another grid, in its own type of voxel; 0 lies outside.

    Neither time nor memory depends on the number of labels.

    Args:
        image: of whole numbers.
        grid: of the result.
        transform: from places on the grid to places in the image, LPS mm.
    """
    labels = np.ascontiguousarray(sitk.GetArrayViewFromImage(image).transpose(2, 1, 0))
    to_voxel, found = inverse(Grid.of(image).affine), np.empty(grid.shape, labels.dtype)
    for part in slabs(grid.shape):
        places = positions(grid.affine, grid.shape, part)
        points = map_points(to_voxel, itk_move(transform, places.flatten(2)[0].T))
        pieces = [largest_share(labels, piece.numpy()) for piece in torch.split(points, PLACES)]
        found[part] = np.concatenate(pieces).reshape(places.shape[2:])
    return grid.to_sitk(found)


def largest_share(labels: NDArray[Any], points: NDArray[np.float64]) -> NDArray[Any]:
    """The label of the largest share at voxel coordinates (N, 3) of a label map (X, Y, Z): (N,).

    The lowest of those that share equally. A voxel reaches half a voxel beyond its centre, also at the faces; 0 lies
    further out.
    """
    last = np.array(labels.shape)[:, None] - 1
    inside = ((points.T >= -0.5) & (points.T - last < 0.5)).all(0)
    within = np.clip(points.T, 0, last)
    low = np.minimum(within.astype(int), last - 1)
    steps = np.array([labels.shape[1] * labels.shape[2], labels.shape[2], 1])
    around = labels.reshape(-1)[steps @ low + (CORNERS @ steps)[:, None]]  # (8, N)
    found = around[0].copy()
    mixed = (around != found).any(0)
    around, part = around[:, mixed], (within - low)[:, mixed]
    x, y, z = np.stack((1 - part, part), 1)  # how near the voxels on either side are, along each axis
    weights = (x[:, None, None] * y[:, None] * z).reshape(8, -1)
    shares = np.zeros_like(weights)  # of the label at each corner
    for label, weight in zip(around, weights, strict=True):
        shares += (around == label) * weight
    winning = shares > shares.max(0) - TIE
    found[mixed] = np.where(winning, around, around.max(0)).min(0)
    return np.where(inside, found, np.zeros(1, labels.dtype))
