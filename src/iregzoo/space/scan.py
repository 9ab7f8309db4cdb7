"""Reading scans, label maps and masks, with every check that input needs, and their intensities."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from torch import Tensor

from iregzoo.errors import InputError
from iregzoo.space.grid import RAS_FROM_LPS, Grid, Matrix, pull, to_voxels
from iregzoo.space.headers import check_finite, header_doubt
from iregzoo.space.separable import axis_order, resample_axes
from iregzoo.space.volume import read_volume

PERCENTILES = (0.5, 99.5)
SMALLEST_MM = 1.0  # of a scan, along its longest axis
SPARSE = 0.001  # of the voxels: no image shows so little
NO_BLUR = 0.25  # voxels: a narrower Gaussian changes nothing
Window = Sequence[float]  # the intensities that become 0 and 1


@dataclass(frozen=True, eq=False)
class Scan:
    """An image in scanner space: ``data`` (1, 1, X, Y, Z) float32, or integer for a label map or a mask.

    A scan equals itself alone. ``doubt`` says in words what makes its place in the scanner doubtful.
    """

    data: Tensor
    grid: Grid
    path: Path
    doubt: str = ""

    def in_world(self, world: Matrix) -> "Scan":
        """The same voxels in a world that an affine (4, 4) gives; the scan itself where that moves nothing."""
        if np.array_equal(world, np.eye(4)):
            return self
        return replace(self, grid=replace(self.grid, affine=world @ self.grid.affine))

    @cached_property
    def outside(self) -> float:
        """What lies beyond the field of view: 0, or the lowest value where that is below 0 (air in CT)."""
        return min(0.0, float(self.data.min()))

    @cached_property
    def limits(self) -> tuple[float, float]:
        """The intensities that become 0 and 1: two percentiles, so that a few bright voxels change nothing."""
        low, high = (float(value) for value in np.percentile(self.data.numpy(), PERCENTILES))
        if high > low:
            return low, high
        return float(self.data.min()), float(self.data.max())  # nearly all voxels are one value: take the full range


def read_scan(path: str | Path) -> Scan:
    """Read a scan: NIfTI, NRRD, MetaImage and whatever else ITK reads, or a folder with one DICOM series.

    Raises:
        InputError: missing, unreadable, not 3-D, more than one channel, no or a singular affine, NaN or infinite
            voxels, or constant.
    """
    image, path = read_volume(path)
    grid = Grid.of(image)
    scan = image_scan(sitk.GetArrayFromImage(image).transpose(2, 1, 0), grid, path)
    return replace(scan, doubt=header_doubt(grid, path))


def image_scan(array: NDArray[Any], grid: Grid, path: str | Path) -> Scan:
    """The scan of an image's voxels (X, Y, Z), with the checks of ``read_scan`` on their values.

    Args:
        array: the intensities; of a SimpleITK image, ``sitk.GetArrayFromImage(image).transpose(2, 1, 0)``.
        grid: where they lie: ``Grid.of(image)``, or ``Grid(shape, RAS_FROM_LPS @ affine)`` of nibabel's affine.
        path: what messages and reports call the scan.

    Raises:
        InputError: for an array of another shape than the grid's, and as ``read_scan`` does.
    """
    path = Path(path)
    _check_shape(array, grid, path)
    check_finite(array, path)
    size = np.array(grid.shape) * grid.spacing
    if size.max() < SMALLEST_MM:
        shown = "×".join(f"{length:.3g}" for length in size)
        raise InputError(f"{path}: measures {shown} mm, too small for a scan; give its header the spacing in mm")
    single = as_float32(array, path)
    if single.min() == single.max() and array.min() != array.max():
        raise InputError(
            f"{path}: its voxel values, around {single.flat[0]:g}, differ by less than single precision resolves; "
            "subtract a constant or scale the values"
        )
    if single.min() == single.max():
        raise InputError(f"{path}: every voxel is {single.flat[0]:g}; an image without contrast cannot be registered")
    return Scan(_tensor(single), grid, path)


def read_labels(path: str | Path, scan: Scan | None = None) -> Scan:
    """Read a label map that lies on the grid of ``scan``, or on any if that is None.

    Raises:
        InputError: as for a scan, and for values that are no whole numbers or another grid. An empty map is allowed.
    """
    image, path = read_volume(path)
    return label_scan(sitk.GetArrayFromImage(image).transpose(2, 1, 0), Grid.of(image), path, scan)


def label_scan(array: NDArray[Any], grid: Grid, path: str | Path, scan: Scan | None = None) -> Scan:
    """The label map of voxels (X, Y, Z) on ``scan``'s grid, with the checks of ``read_labels``; see ``image_scan``.

    Raises:
        InputError: for an array of another shape than the grid's, and as ``read_labels`` does.
    """
    path = Path(path)
    _check_shape(array, grid, path)
    if not np.isfinite(array).all() or (array != np.round(array)).any():
        odd = array[~np.isfinite(array) | (array != np.round(array))].flat[0]
        raise InputError(f"{path}: holds the value {odd:g}; a label map may hold only whole numbers")
    if (sizes := np.abs(array.astype(np.float64))).max() >= 2**31:
        large = array.flat[int(sizes.argmax())]
        raise InputError(f"{path}: holds the label {large}; use labels below 2147483648")
    if scan is not None:
        _check_grid(grid, scan, path, "labels")
    return Scan(_tensor(array.astype(np.int32)), grid if scan is None else scan.grid, path)


def read_mask(path: str | Path, scan: Scan) -> Scan:
    """Read the mask of a scan, on its grid: voxels that are not zero count.

    Raises:
        InputError: as for a scan, and for another grid or a mask that is zero everywhere.
    """
    image, path = read_volume(path)
    return mask_scan(sitk.GetArrayFromImage(image).transpose(2, 1, 0), Grid.of(image), path, scan)


def mask_scan(array: NDArray[Any], grid: Grid, path: str | Path, scan: Scan) -> Scan:
    """The mask of voxels (X, Y, Z) of any type on ``scan``'s grid, with the checks of ``read_mask``: 0 and 1, uint8.

    Raises:
        InputError: for an array of another shape than the grid's, and as ``read_mask`` does.
    """
    path = Path(path)
    _check_shape(array, grid, path)
    check_finite(array, path)
    _check_grid(grid, scan, path, "mask")
    if not array.any():
        raise InputError(f"{path}: the mask is zero everywhere; set the voxels that count to 1")
    return Scan(_tensor((array != 0).astype(np.uint8)), scan.grid, path)


def _check_grid(grid: Grid, scan: Scan, path: Path, what: str) -> None:
    if not grid.matches(scan.grid):
        doubts = [doubt for doubt in (header_doubt(grid, path), scan.doubt) if doubt]
        apart = f", up to {grid.farthest(grid.affine, scan.grid.affine):.3g} mm apart" * (grid.shape == scan.grid.shape)
        raise InputError(
            f"{path}: its grid ({_describe(grid)}) differs from that of {scan.path.name} ({_describe(scan.grid)})"
            f"{apart}; resample the {what} to the image with nearest-neighbour interpolation"
            + "".join(f" ({doubt})" for doubt in doubts)
        )


def _check_shape(array: NDArray[Any], grid: Grid, path: Path) -> None:
    if array.shape != grid.shape:
        raise InputError(
            f"{path}: the array has shape {array.shape}, its grid {grid.shape}; give the axes in the grid's order "
            "(SimpleITK's arrays have them reversed)"
        )


def looks_like_labels(scan: Scan) -> bool:
    """Whether a scan is whole numbers in patches of one value or hardly anywhere, apart from its commonest value."""
    data = scan.data[0, 0]
    if bool((data != data.round()).any()):
        return False
    values, counts = np.unique(data.numpy(), return_counts=True)
    shown = data != float(values[counts.argmax()])
    if not shown.any():
        return False
    inside, alike = 0, 0  # pairs of neighbours along each axis
    for axis, size in enumerate(data.shape):
        (here, there), (value, other) = (
            (volume.narrow(axis, 0, size - 1), volume.narrow(axis, 1, size - 1)) for volume in (shown, data)
        )
        both = here & there
        inside += int(both.count_nonzero())  # sooner than a sum of int64
        alike += int((both & (value == other)).count_nonzero())
    return 2 * alike > inside or int(shown.count_nonzero()) < SPARSE * shown.numel()


def _tensor(array: NDArray[np.float32] | NDArray[np.int32] | NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))[None, None]


def _describe(grid: Grid) -> str:
    size, spacing = "×".join(map(str, grid.shape)), "×".join(f"{s:.3g}" for s in grid.spacing)
    axes = "".join(nib.aff2axcodes(RAS_FROM_LPS @ grid.affine))
    return f"{size}, axes to {axes}, spacing {spacing} mm, centre {np.round(grid.centre, 1).tolist()}"


def as_float32(array: NDArray[Any], path: Path) -> NDArray[np.float32]:
    """Finite values in the precision in which everything is computed.

    Raises:
        InputError: where they are too large for it.
    """
    most = np.finfo(np.float32).max
    least, largest = array.min(), array.max()
    if least < -most or largest > most:
        raise InputError(
            f"{path}: holds the value {max(least, largest, key=abs):g}, beyond the range of single precision "
            f"({most:.1e}); divide the image by a constant"
        )
    return array.astype(np.float32)


def scale(data: Tensor, limits: tuple[float, float]) -> Tensor:
    """Intensities from ``limits`` to [0, 1], clipped."""
    low, high = limits
    return (data - low).div_(high - low).clamp_(0, 1)


def normalise(scan: Scan, window: Window | None = None) -> Scan:
    """The scan with its intensities in [0, 1], clipped.

    Args:
        scan: of any intensities.
        window: those that become 0 and 1, such as (-1000, -200) HU; two percentiles of the scan if None.

    Raises:
        InputError: where the window is empty, or the scan has next to nothing in it.
    """
    if window is None:
        return replace(scan, data=scale(scan.data, scan.limits))
    low, high = window
    if not low < high:
        raise InputError(f"intensity window {low:g} to {high:g}: is empty; give the lower value first")
    least, most = float(scan.data.min()), float(scan.data.max())
    if most <= low or least >= high:
        raise InputError(
            f"{scan.path}: its values, {least:g} to {most:g}, lie outside the intensity window {low:g} to {high:g}; "
            "give a scan in the units of that window (HU for CT)"
        )
    return replace(scan, data=scale(scan.data, (low, high)))


def resample_to(scan: Scan, grid: Grid, world: Matrix | None = None, *, mode: str = "linear") -> Tensor:
    """A scan's voxels on another grid: (1, 1, *grid.shape); ``world`` takes grid positions to the scan's, LPS mm.

    Where the grid is coarser than the scan, a Gaussian takes out first what it cannot hold.
    """
    matrix = to_voxels(grid, world, scan.grid)
    data = scan.data
    if mode == "linear":
        # Voxels of the scan per voxel of the grid, along each axis of the scan.
        coarser = np.linalg.norm(matrix[:3, :3], axis=1)
        sigma = 0.5 * np.sqrt(np.maximum(coarser**2 - 1, 0))
        sigma = np.where(sigma < NO_BLUR, 0.0, sigma)
        order = axis_order(matrix, grid.shape)
        if order is not None and data.is_floating_point():
            return resample_axes(data, matrix, grid.shape, order, sigma=sigma.tolist(), outside=scan.outside)
        data = _smooth(data, sigma)
        return pull(data, matrix, grid.shape, outside=scan.outside)
    return pull(data, matrix, grid.shape, mode=mode)


def _smooth(data: Tensor, sigma: Matrix) -> Tensor:
    """Gaussian smoothing, standard deviations in voxels."""
    if not sigma.any():
        return data
    from scipy.ndimage import gaussian_filter

    return torch.from_numpy(gaussian_filter(data[0, 0].numpy(), sigma, truncate=3.0))[None, None]
