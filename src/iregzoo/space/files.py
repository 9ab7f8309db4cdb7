"""Files for the world: images, label maps, displacement fields and ITK transforms."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import h5py
import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from iregzoo.errors import InputError
from iregzoo.fields import identity
from iregzoo.space.grid import RAS_FROM_LPS, Grid, Matrix, apply_matrix, to_voxels
from iregzoo.space.packing import gzip_floats


def write_image(path: str | Path, data: Tensor, grid: Grid) -> None:
    """Write (1, 1, X, Y, Z): float images as float32, label maps in the smallest integer type that holds them.

    Raises:
        InputError: where it cannot be written.
        ValueError: for labels beyond 32 bits, and a shape that is not the grid's.
    """
    _check_shape(data, 1, grid)
    array = data[0, 0].cpu()
    dtype = torch.float32 if array.is_floating_point() else _smallest_type(int(array.min()), int(array.max()))
    write_volume(Path(path), grid.to_sitk(array.to(dtype).numpy()))


def _check_shape(tensor: Tensor, channels: int, grid: Grid) -> None:
    expected = (1, channels, *grid.shape)
    if tuple(tensor.shape) != expected:
        raise ValueError(f"shape {tuple(tensor.shape)}; expected {expected}, the grid's: write pair by pair")


def _smallest_type(least: int, most: int) -> torch.dtype:
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if torch.iinfo(dtype).min <= least and most <= torch.iinfo(dtype).max:
            return dtype
    raise ValueError(f"labels from {least} to {most}; expected at most 32 bits")


def write_displacement(path: str | Path, displacement: Tensor, grid: Grid) -> None:
    """Write a displacement (1, 3, X, Y, Z), LPS mm, as the float32 vector image that ITK reads.

    Raises:
        InputError: where it cannot be written.
        ValueError: for a shape that is not the grid's.
    """
    _check_shape(displacement, 3, grid)
    vectors = displacement[0].movedim(0, -1).float().cpu().numpy()
    write_volume(Path(path), grid.to_sitk(vectors, vector=True))


def write_voxel_displacement(path: str | Path, displacement: Tensor, fixed: Grid, moving: Grid) -> None:
    """Write a displacement (1, 3, X, Y, Z), LPS mm on the fixed grid, as Learn2Reg's evaluator reads it.

    A NIfTI image of shape (X, Y, Z, 3), float32: where to read the moving array, in its voxels, minus where one is in
    the fixed array. ``scipy.ndimage.map_coordinates(moving, identity + field)`` is the warped image, also where the two
    grids differ in shape, spacing or orientation.
    """
    path = Path(path)
    _check_shape(displacement, 3, fixed)
    index = identity(fixed.shape, dtype=torch.float64)
    read = apply_matrix(to_voxels(fixed, None, moving), index) + moving.in_voxels(displacement.double())
    vectors = (read - index)[0].movedim(0, -1).float().cpu().numpy()
    _reserve(path, vectors.nbytes)
    try:
        nib.save(nib.Nifti1Image(vectors, RAS_FROM_LPS @ fixed.affine), path)
    except OSError as error:
        raise _cannot_write(path, error) from None


def write_transform(path: str | Path, deformation: Tensor, grid: Grid, affine: Matrix | None = None) -> None:
    """Write an ITK composite transform: first the deformation (1, 3, X, Y, Z) on ``grid``, LPS mm, then the affine.

    The groups and data sets are those that ITK writes. ITK itself would add the time and the kernel's version to them,
    and no two files would be alike.

    Raises:
        InputError: where it cannot be written.
        ValueError: for a shape that is not the grid's.
    """
    _check_shape(deformation, 3, grid)
    vectors = deformation[0].permute(3, 2, 1, 0).double().cpu().numpy()  # ITK's order: along x first
    direction = grid.affine[:3, :3] / grid.spacing
    geometry = (grid.shape, grid.affine[:3, 3], grid.spacing, direction.ravel())
    field = _Part("DisplacementFieldTransform", np.concatenate(geometry), vectors.ravel())
    linear = [] if affine is None else [_linear(affine)]
    _write_parts(Path(path), [_Part("CompositeTransform"), *linear, field])  # ITK applies the last one first


def write_linear(path: str | Path, affine: Matrix) -> None:
    """Write an affine (4, 4), LPS mm, as an ITK transform, which viewers take for a linear one.

    Raises:
        InputError: where it cannot be written.
    """
    _write_parts(Path(path), [_linear(affine)])


class _Part(NamedTuple):
    """A transform of an ITK file: its class, and its parameters; a composite has none of its own."""

    kind: str
    fixed: ArrayLike | None = None
    parameters: ArrayLike | None = None


def _linear(affine: Matrix) -> _Part:
    return _Part("AffineTransform", np.zeros(3), np.append(affine[:3, :3], affine[:3, 3]))


def _write_parts(path: Path, parts: Sequence[_Part]) -> None:
    _reserve(path, sum(np.asarray(part.parameters).nbytes for part in parts))
    try:
        with h5py.File(path, "w") as file:
            transforms = file.create_group("TransformGroup")
            for number, part in enumerate(parts):
                group = transforms.create_group(str(number))
                name = f"{part.kind}_double_3_3"
                group.create_dataset("TransformType", data=[name], dtype=h5py.string_dtype("ascii"))
                for what, values in (("Fixed", part.fixed), ("", part.parameters)):
                    if values is not None:
                        group[f"Transform{what}Parameters"] = np.asarray(values, "<f8")
    except OSError as error:
        raise _cannot_write(path, error) from None


def affine_transform(matrix: Matrix) -> sitk.AffineTransform:
    """The ITK transform of an affine (4, 4), LPS mm."""
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(matrix[:3, :3].ravel().tolist())
    transform.SetTranslation(matrix[:3, 3].tolist())
    return transform


def write_volume(path: Path, image: sitk.Image) -> None:
    """Write an ITK image in the format that the path's ending says, compressed.

    What holds floats and goes to ``.nii.gz`` is packed by ``gzip_floats``.

    Raises:
        InputError: where the disk has no room.
    """
    size = image.GetNumberOfPixels() * image.GetNumberOfComponentsPerPixel() * image.GetSizeOfPixelComponent()
    floats = "float" in image.GetPixelIDTypeAsString() and path.name.endswith(".nii.gz")
    plain = path.with_name(f".{path.name.removesuffix('.gz')}")  # for a moment, beside the packed one
    _reserve(path, 2 * size if floats else size)
    try:
        if floats:
            sitk.WriteImage(image, str(plain))
            gzip_floats(plain, path, threads=torch.get_num_threads())
        else:
            sitk.WriteImage(image, str(path), useCompression=True, compressionLevel=1)
    except (RuntimeError, OSError) as error:
        raise _cannot_write(path, error) from None
    finally:
        plain.unlink(missing_ok=True)


def _reserve(path: Path, size: int) -> None:
    """Make sure that ``size`` bytes fit: where they do not, ITK leaves half a NIfTI file silently, and HDF5 crashes."""
    room = path.with_name(f".{path.name}.room")
    try:
        with room.open("wb") as file:
            _fill(file, size)
    except OSError as error:
        raise _cannot_write(path, error) from None
    finally:
        room.unlink(missing_ok=True)


def _fill(file: BinaryIO, size: int) -> None:
    """Take so many bytes of the disk: all at once where the system can, else by writing them."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    block = os.urandom(1 << 20)
    for _ in range(size // len(block) + 1):
        file.write(block)


def _cannot_write(path: Path, error: RuntimeError | OSError) -> InputError:
    reason = error.strerror if isinstance(error, OSError) else str(error).strip().splitlines()[-1][-120:]
    return InputError(f"{path}: cannot be written ({reason}); check its folder, its ending and the free disk space")
