"""A pair of scans, with the label maps and masks on their grids."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from iregzoo.errors import InputError
from iregzoo.space.grid import Grid
from iregzoo.space.masks import Masks, fill_holes
from iregzoo.space.scan import Scan, looks_like_labels, read_labels, read_mask, read_scan


@dataclass(frozen=True)
class Scans:
    """A pair of scans, and label maps and masks on their grids where there are any; see ``Masks``.

    Raises:
        ValueError: for a mask on another grid than its scan's.
    """

    fixed: Scan
    moving: Scan
    fixed_labels: Scan | None = None
    moving_labels: Scan | None = None
    fixed_mask: Scan | None = None
    moving_mask: Scan | None = None

    def __post_init__(self) -> None:
        for scan, mask in ((self.fixed, self.fixed_mask), (self.moving, self.moving_mask)):
            if mask is not None and not mask.grid.matches(scan.grid):
                raise ValueError(f"{mask.path} lies on another grid than {scan.path}; give the mask of that scan")

    @property
    def masks(self) -> Masks:
        return Masks(self.fixed_mask, self.moving_mask)

    @cached_property
    def filled(self) -> "Scans":
        """The pair as all that looks for likeness sees it: no lesion draws a start, intensities' range or a network.

        See ``fill_holes``.
        """
        return Scans(fill_holes(self.fixed, self.fixed_mask), fill_holes(self.moving, self.moving_mask))

    def counted(self, grid: Grid, displacement: Tensor, when: str) -> Tensor:
        """Which voxels of a grid the masks count, as ``Masks.counted``, some of them at least.

        Raises:
            InputError: where there is none, saying ``when``.
        """
        counted = self.masks.counted(grid, displacement)
        if not counted.any():
            paths = " and ".join(str(mask.path) for mask in self.masks)
            raise InputError(
                f"{paths}: no voxel of {self.fixed.path.name} counts {when}; enlarge the masks, or align the scans "
                "with another --init, such as a transform file"
            )
        return counted


def read_scans(
    fixed: str | Path,
    moving: str | Path,
    fixed_labels: str | Path | None = None,
    moving_labels: str | Path | None = None,
    fixed_mask: str | Path | None = None,
    moving_mask: str | Path | None = None,
) -> Scans:
    """Read and check a pair of scans, and the label maps and masks on their grids.

    Raises:
        InputError: as ``read_scan``, ``read_labels`` and ``read_mask`` do, and where one scan is an image and the other
            a label map.
    """
    fixed_scan, moving_scan = read_scan(fixed), read_scan(moving)
    for scan, other in ((fixed_scan, moving_scan), (moving_scan, fixed_scan)):
        if looks_like_labels(scan) and not looks_like_labels(other):
            raise InputError(
                f"{scan.path}: looks like a label map, but {other.path.name} is an image; give the image here and "
                "the label map with --fixed-labels or --moving-labels; an image of few grey levels passes once "
                "multiplied by 0.1"
            )
    return Scans(
        fixed_scan,
        moving_scan,
        read_labels(fixed_labels, fixed_scan) if fixed_labels else None,
        read_labels(moving_labels, moving_scan) if moving_labels else None,
        read_mask(fixed_mask, fixed_scan) if fixed_mask else None,
        read_mask(moving_mask, moving_scan) if moving_mask else None,
    )
