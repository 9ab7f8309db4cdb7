"""Where a pair of scans may be compared: masks that leave out a lesion or an implant, or all but a brain."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from scipy import ndimage
from torch import Tensor

from iregzoo.continuation import continue_field
from iregzoo.space.frame import Frame, warp_mask
from iregzoo.space.grid import Grid
from iregzoo.space.scan import Scan


@dataclass(frozen=True)
class Masks:
    """A pair's masks, as ``read_mask`` gives them: a place counts if neither leaves it out.

    Beyond the field of view of its scan, a mask goes on as at its border.
    """

    fixed: Scan | None = None
    moving: Scan | None = None

    def __bool__(self) -> bool:
        return self.fixed is not None or self.moving is not None

    def __iter__(self) -> Iterator[Scan]:
        return (mask for mask in (self.fixed, self.moving) if mask is not None)

    def closed(self) -> "Masks":
        """The masks that also count what each leaves out within what counts: what ``fill_holes`` fills."""
        return Masks(*(mask and _closed(mask) for mask in (self.fixed, self.moving)))

    def counted(self, grid: Grid, displacement: Tensor) -> Tensor:
        """Which voxels of a grid in the fixed world count: boolean (1, 1, *grid.shape).

        Args:
            grid: any in the fixed scan's world.
            displacement: (1, 3, *grid.shape), LPS mm, from a place there to one in the moving scan, affine included.
        """
        within = torch.ones(1, 1, *grid.shape, dtype=torch.bool)
        if self.fixed is not None:
            own = grid.matches(self.fixed.grid)
            within &= self.fixed.data != 0 if own else warp_mask(self.fixed, torch.zeros_like(displacement), grid)
        if self.moving is not None:
            within &= warp_mask(self.moving, displacement, grid)
        return within

    def counted_in(self, frame: Frame, displacement: Tensor) -> Tensor:
        """Which voxels of a frame's network grid count: boolean (1, 1, *network.shape), on the CPU.

        Args:
            frame: the pair's geometry.
            displacement: (1, 3, *network.shape) in voxels of that grid, without the affine.
        """
        there = replace(frame, fixed=frame.network)
        return self.counted(frame.network, there.total(there.deform(displacement.cpu())))


def _closed(mask: Scan) -> Scan:
    """A mask that also counts what it leaves out within what counts, such as a lesion, as 0 and 1."""
    parts, found = ndimage.label(mask.data[0, 0].numpy() == 0)
    outer = torch.zeros(found + 1, dtype=torch.bool)
    for axis, face in product(range(3), (0, -1)):
        outer[parts.take(face, axis)] = True
    outer[0] = False  # what counts
    return replace(mask, data=(~outer[parts])[None, None].to(torch.uint8))


def fill_holes(scan: Scan, mask: Scan | None) -> Scan:
    """A scan whose lesions look like their surroundings: filled where the mask leaves out what ``Masks.closed`` counts.

    What lies around a brain's mask, or reaches the border of the field of view, stays as it is.
    """
    if mask is None:
        return scan
    holes = (_closed(mask).data != 0) & (mask.data == 0)
    if not holes.any():
        return scan
    first, last = holes[0, 0].nonzero().aminmax(dim=0)
    x, y, z = (slice(start - 1, end + 2) for start, end in zip(first.tolist(), last.tolist(), strict=True))
    data = scan.data.clone()
    data[..., x, y, z] = continue_field(data[..., x, y, z], ~holes[..., x, y, z])
    return replace(scan, data=data)
