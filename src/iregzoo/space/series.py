"""Several volumes in one file: a 4-D series, or an image of several numbers a voxel."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import SimpleITK as sitk

from iregzoo.errors import InputError
from iregzoo.space.grid import Grid
from iregzoo.space.volume import read_any, size_of

COLOURS = (3, 4)  # 8-bit numbers of a voxel


@dataclass(frozen=True)
class Series:
    """Volumes on one grid, in the type of voxel of their file.

    Attributes:
        image: 3-D, of one or several components, or 4-D.
        path: of its file.
    """

    image: sitk.Image
    path: Path

    @property
    def grid(self) -> Grid:
        """On which each volume lies."""
        return Grid.of(self.image)

    @property
    def components(self) -> int:
        """Numbers a voxel, each of which makes a volume."""
        return int(self.image.GetNumberOfComponentsPerPixel())

    def __len__(self) -> int:
        return int(self.image.GetSize()[3]) if self.image.GetDimension() == 4 else self.components

    def __iter__(self) -> Iterator[sitk.Image]:
        """Each volume, 3-D and of one number a voxel; only one is copied at a time."""
        size = [*self.image.GetSize()[:3], 0]
        for index in range(len(self)):
            if self.image.GetDimension() == 4:
                yield sitk.Extract(self.image, size, [0, 0, 0, index])
            else:
                yield sitk.VectorIndexSelectionCast(self.image, index) if self.components > 1 else self.image

    def join(self, volumes: Iterable[sitk.Image], grid: Grid) -> sitk.Image:
        """As many other volumes, on another grid, as one image of this kind, with this 4th axis.

        Args:
            volumes: 3-D, of this type of voxel; a 4-D image takes them in one by one.
            grid: on which they lie.
        """
        if self.image.GetDimension() == 3:
            return sitk.Compose(list(volumes)) if self.components > 1 else next(iter(volumes))
        joined = sitk.Image([*grid.shape, len(self)], self.image.GetPixelID())
        joined.SetOrigin([*grid.affine[:3, 3].tolist(), self.image.GetOrigin()[3]])
        joined.SetSpacing([*grid.spacing.tolist(), self.image.GetSpacing()[3]])
        turn = grid.affine[:3, :3] / grid.spacing
        joined.SetDirection([*(number for row in turn.tolist() for number in (*row, 0.0)), 0.0, 0.0, 0.0, 1.0])
        for index, volume in enumerate(volumes):
            joined[..., index] = volume
        return joined


def read_series(path: str | Path) -> Series:
    """Read a volume, a 4-D series of them, or a volume of several numbers a voxel.

    Raises:
        InputError: as ``read_any`` does, and for more axes, a 4-D series of vectors, and colours.
    """
    image, path = read_any(path)
    if image.GetDimension() not in (3, 4) or min(image.GetSize()[:3]) < 2:
        raise InputError(
            f"{path}: has size {size_of(image)}; expected a 3-D volume or a 4-D series, of at least 2 voxels per axis"
        )
    components = image.GetNumberOfComponentsPerPixel()
    if components in COLOURS and image.GetPixelID() == sitk.sitkVectorUInt8:
        raise InputError(
            f"{path}: has {components} values of 8 bits per voxel, as colours have; convert it to a grey-scale image, "
            "or its values to 16 bits"
        )
    if components > 1 and image.GetDimension() == 4:
        raise InputError(
            f"{path}: is a 4-D series ({size_of(image)}) of {components} values per voxel; give each component alone"
        )
    return Series(image, path)
