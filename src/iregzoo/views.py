"""A result's volumes as a browser draws them: small, in bytes, axes to right, anterior and superior."""

import base64
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from iregzoo.planes import GRID_LINES, JACOBIAN_LIMITS, PLANES, Volume, canonical, canonical_vectors, middle
from iregzoo.quality import NEAR_SINGULAR, Comparison
from iregzoo.register import Result
from iregzoo.space.grid import Grid, canonical_axes, network_grid
from iregzoo.space.scan import Scan, resample_to

LARGEST_AXIS = 128  # voxels of what is shown
LARGEST_FIELD = 64  # samples an axis of the deformation
MOST_LABELS = 254
ANOTHER = 255  # the byte of labels beyond the first ``MOST_LABELS``
Bytes = NDArray[np.uint8]


def views(result: Result, images: Comparison) -> dict[str, Any]:
    """What the page's views need, ready for JSON.

    Returns:
        ``planes``, and of the volumes ``shape`` (X, Y, Z), ``spacing`` (mm), ``affine`` (voxels to LPS mm) and
        ``middle``; ``full_shape`` of the fixed scan along the same axes; ``oblique_degrees`` between them and the
        patient's; ``labels``, the values that bytes 1, 2, … of a label map mean, 255 being one beyond these; ``field``,
        see ``_field``; and ``volumes`` by name, see ``pack``: ``fixed``, ``moving`` (at the start) and ``warped``,
        intensities; ``jacobian``, see ``_jacobian``; ``fixed_labels`` and ``warped_labels``.
    """
    grid = view_grid(result.frame.fixed)
    shown = {"fixed": images.fixed, "moving": images.start, "warped": images.after}
    maps = _label_maps(result, grid.shape)
    values = sorted({int(value) for small in maps.values() for value in np.unique(small)} - {0})[:MOST_LABELS]
    with ThreadPoolExecutor(2) as pool:
        scans = [replace(result.scans.fixed, data=data) for data in shown.values()]
        small = list(pool.map(lambda scan: _intensities(scan, grid), scans))
        volumes = dict(zip(shown, small, strict=True))
        volumes["jacobian"] = _jacobian(images.determinant[0], result.frame.fixed, grid.shape)
        volumes |= {name: _codes(small, values) for name, small in maps.items()}
        packed = dict(zip(volumes, pool.map(pack, volumes.values()), strict=True))
    return {
        "planes": [asdict(plane) for plane in PLANES],
        "shape": grid.shape,
        "spacing": grid.spacing.tolist(),
        "affine": grid.affine.tolist(),
        "middle": middle(volumes["fixed"] / np.float32(255)),
        "full_shape": [result.frame.fixed.shape[axis] for axis in canonical_axes(result.frame.fixed)[0]],
        "oblique_degrees": oblique_degrees(grid),
        "jacobian_limits": JACOBIAN_LIMITS,
        "grid_lines": GRID_LINES,
        "labels": values,
        "volumes": packed,
        "field": _field(result),
    }


def view_grid(grid: Grid) -> Grid:
    """What is shown of an image: its whole field of view, with at most ``LARGEST_AXIS`` voxels an axis."""
    order, _ = canonical_axes(grid)
    own, size = grid.spacing[order], np.array(grid.shape)[order]
    step = np.maximum(own, (size * own).max() / LARGEST_AXIS)
    fitting = size * own / np.ceil(size * own / step - 1e-3)  # whole voxels from face to face
    return network_grid(grid, fitting.tolist(), stride=1)


def oblique_degrees(grid: Grid) -> float:
    """The largest angle between an axis of a grid and the axis of the patient that is nearest to it."""
    nearest = np.abs(grid.affine[:3, :3] / grid.spacing).max(axis=0)
    return float(np.rad2deg(np.arccos(nearest.clip(-1, 1))).max())


def pack(volume: Bytes | NDArray[np.int8]) -> str:
    """A volume's bytes, each less the one before it (modulo 256), compressed by zlib, in base 64."""
    flat = np.ascontiguousarray(volume).view(np.uint8).ravel()
    return base64.b64encode(zlib.compress(np.diff(flat, prepend=np.uint8(0)).tobytes(), 3)).decode("ascii")


def _intensities(scan: Scan, grid: Grid) -> Bytes:
    """An image in [0, 1] as bytes on the grid of what is shown."""
    small = resample_to(scan, grid)[0, 0]
    return small.mul_(255).round_().clamp_(0, 255).byte().numpy()


def _nearest(volume: Tensor, grid: Grid, shape: tuple[int, ...]) -> Volume:
    """The voxels of a volume (X, Y, Z) of a grid that lie nearest to those of what is shown."""
    turned = canonical(volume, grid)
    places = [((np.arange(n) + 0.5) * full / n).astype(int) for full, n in zip(turned.shape, shape, strict=True)]
    nearest: Volume = turned[np.ix_(*places)]
    return nearest


def _jacobian(determinant: Tensor, grid: Grid, shape: tuple[int, ...]) -> Bytes:
    """det J as bytes: 1 to 255 between its limits, and 0 for a fold.

    Where voxels of the full grid fold or nearly do, the lowest is shown, and else the nearest: that det J is small
    somewhere is what a person must not miss.
    """
    low, high = JACOBIAN_LIMITS

    def code(values: Volume) -> Bytes:
        steps = (1 + 254 * (values - low) / (high - low)).round().clip(1, 255)
        return np.where(values <= 0, 0, steps).astype(np.uint8)

    coded, full = code(_nearest(determinant, grid, shape)), canonical(determinant, grid)
    small = full <= NEAR_SINGULAR
    np.minimum.at(coded, tuple((np.argwhere(small) * shape // full.shape).T), code(full[small]))
    return coded


def _label_maps(result: Result, shape: tuple[int, ...]) -> dict[str, Volume]:
    """The label maps on the fixed grid, as far as there are any, at the voxels of what is shown."""
    fixed = result.scans.fixed_labels
    maps = {"fixed_labels": None if fixed is None else fixed.data, "warped_labels": result.warped_labels}
    grid = result.frame.fixed
    return {name: _nearest(data[0, 0], grid, shape) for name, data in maps.items() if data is not None}


def _codes(labels: Volume, values: list[int]) -> Bytes:
    """Each label's place among the values, counted from 1; ``ANOTHER`` for what is not among them, 0 for no label."""
    known = np.array([*values, 0])
    place = np.searchsorted(known[:-1], labels).clip(max=len(values))
    coded = np.where(known[place] == labels, place + 1, ANOTHER)
    return np.where(labels == 0, 0, coded).astype(np.uint8)


def _field(result: Result) -> dict[str, Any]:
    """The deformation without the affine at every few voxels of the fixed scan, as whole numbers of −127 to 127.

    Returns:
        ``data``, see ``pack``, (3, *shape): along right, anterior, superior in units of ``unit_mm``; ``every``, the
        voxels from one sample to the next, the first being the first voxel; ``spacing`` of the voxels, mm.
    """
    grid = result.frame.fixed
    order, _ = canonical_axes(grid)
    every = [-(-grid.shape[axis] // LARGEST_FIELD) for axis in order]
    few = tuple(slice(None, None, step) for step in every)
    samples = np.stack([canonical(channel, grid)[few] for channel in result.deformation[0]])
    spacing = grid.spacing[order]
    along = np.tensordot(canonical_vectors(grid) * spacing[:, None], samples, 1)
    unit = float(np.abs(along).max()) / 127 or 1.0
    return {
        "data": pack((along / unit).round().astype(np.int8)),
        "shape": along.shape[1:],
        "unit_mm": unit,
        "every": every,
        "spacing": spacing.tolist(),
    }
