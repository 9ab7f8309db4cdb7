"""Linear resampling between grids whose axes run along one another: three small matrix products instead of a search.

Trilinear interpolation and Gaussian smoothing are both one-dimensional along each axis, so along each axis they are one
matrix together. What has millions of voxels is read in order, and a coarse grid costs little after its first axis.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[np.float64]
DRIFT = 1e-5  # voxels that an axis may drift sideways over its whole length
# Voxels by which a header's seventh digit may move a place. Where centres are aligned, grids of even and odd size meet
# at half voxels: there the lower face belongs to an image and the upper one does not, as for ITK, whatever that digit.
EDGE = 1e-4


def axis_order(matrix: Matrix, shape: Sequence[int]) -> list[int] | None:
    """Along which axis of an image each axis of a grid runs, None where one runs aslant.

    Args:
        matrix: (4, 4) from voxels of the grid to voxels of the image.
        shape: of the grid.
    """
    lengths = np.abs(matrix[:3, :3])
    order = [int(axis) for axis in lengths.argmax(axis=0)]
    drift = (lengths.sum(axis=0) - lengths.max(axis=0)) * np.array(shape)
    return order if sorted(order) == [0, 1, 2] and drift.max() < DRIFT else None


def resample_axes(
    image: Tensor,
    matrix: Matrix,
    shape: Sequence[int],
    order: Sequence[int],
    *,
    sigma: Sequence[float] = (0.0, 0.0, 0.0),
    outside: float | None = None,
) -> Tensor:
    """Read a floating-point image (1, C, X, Y, Z) on a grid along its axes: (1, C, *shape), interpolated linearly.

    Args:
        image: the image.
        matrix, shape: as for ``axis_order``.
        order: from ``axis_order``.
        sigma: of a Gaussian that smooths the image before, voxels along X, Y and Z.
        outside: what lies further than half a voxel beyond the image; None goes on with its border.
    """
    given = image
    places: dict[int, Matrix] = {}
    for target, source in enumerate(order):
        along = matrix[source, target] * np.arange(shape[target]) + matrix[source, 3]
        places[source] = along.round(9)  # rounding errors are no distance: a voxel in its place is copied
    for source in sorted(places, key=lambda axis: len(places[axis]) / image.shape[2 + axis]):
        size = image.shape[2 + source]
        image = _read_axis(image, 2 + source, places[source], sigma[source])
        beyond = np.flatnonzero((places[source] < -0.5 - EDGE) | (places[source] >= size - 0.5 - EDGE))
        if outside is not None and len(beyond):
            image = image.index_fill(2 + source, torch.as_tensor(beyond, device=image.device), outside)
    turned = image.permute(0, 1, *(2 + axis for axis in order))
    # Its caller's own, also where every axis was left as it is.
    return turned.clone(memory_format=torch.contiguous_format) if image is given else turned.contiguous()


def _read_axis(image: Tensor, axis: int, places: Matrix, sigma: float) -> Tensor:
    """The image at places along an axis, its border going on; voxels that stay in their places are not computed."""
    size = image.shape[axis]
    index = places.clip(0, size - 1)
    if sigma == 0 and (index == index.round()).all():
        if np.array_equal(index, np.arange(size)):
            return image
        return image.index_select(axis, torch.as_tensor(index.astype(int), device=image.device))
    weights = torch.as_tensor(_weights(places, size, sigma), dtype=image.dtype, device=image.device)
    return _along(weights, image, axis)


def _weights(places: Matrix, size: int, sigma: float) -> Matrix:
    """What each voxel of an axis gives to each place on it: (places, size); its ends go on beyond it."""
    inside = places.clip(0, size - 1)
    low = np.minimum(inside.astype(int), max(size - 2, 0))
    high, rows = np.minimum(low + 1, size - 1), np.arange(len(places))
    weights = np.zeros((len(places), size))
    weights[rows, low] = 1 - (inside - low)
    weights[rows, high] += inside - low
    if sigma == 0:
        return weights
    from scipy.ndimage import gaussian_filter1d

    blurred: Matrix = weights @ gaussian_filter1d(np.eye(size), sigma, axis=0, truncate=3.0)
    return blurred


def _along(weights: Tensor, image: Tensor, axis: int) -> Tensor:
    """Turn one axis of an image by a matrix (new, old)."""
    if axis == image.dim() - 1:
        return image @ weights.mT
    turned = weights @ image.flatten(axis + 1)
    return turned.reshape(*image.shape[:axis], len(weights), *image.shape[axis + 1 :])
