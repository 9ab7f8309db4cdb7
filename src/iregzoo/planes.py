"""How a scan is laid before a person: axes to right, anterior and superior, and planes in radiological convention."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from iregzoo.space.grid import Grid, Matrix, canonical_axes, inverse

Volume = NDArray[np.float32]
JACOBIAN_LIMITS = (0.0, 2.5)  # det J at the ends of the colours
GRID_LINES = 22  # of a deformed grid, along the longest axis of the field of view


@dataclass(frozen=True)
class Plane:
    """A plane of a volume whose axes run to right (0), anterior (1) and superior (2).

    Attributes:
        name: of the plane.
        across: the axis through it.
        along: the axis that runs from the picture's right to its left.
        up: the axis that runs from its bottom to its top.
        sides: letters of the patient's sides at the picture's left, right, top and bottom.
    """

    name: str
    across: int
    along: int
    up: int
    sides: str


PLANES = (
    Plane("axial", across=2, along=0, up=1, sides="RLAP"),
    Plane("coronal", across=1, along=0, up=2, sides="RLSI"),
    Plane("sagittal", across=0, along=1, up=2, sides="APSI"),
)


def canonical(volume: Tensor, grid: Grid) -> Volume:
    """A view of a volume (X, Y, Z) of a grid with its axes running nearest to right, anterior, superior."""
    order, signs = canonical_axes(grid)
    turned: Volume = volume.permute(order).numpy()[tuple(slice(None, None, sign) for sign in signs)]
    return turned


def canonical_vectors(grid: Grid) -> Matrix:
    """Matrix (3, 3) from LPS mm to voxels along the axes that ``canonical`` gives a grid."""
    order, signs = canonical_axes(grid)
    turn: Matrix = np.array(signs)[:, None] * inverse(grid.affine)[:3, :3][order]
    return turn


def middle(volume: Volume) -> list[int]:
    """The voxel in the centre of what an image in [0, 1] shows."""
    bright, found = volume > 0.1, []
    for axis, size in enumerate(volume.shape):
        seen = np.flatnonzero(bright.any(tuple(other for other in range(3) if other != axis)))
        found.append(int(seen[0] + seen[-1]) // 2 if len(seen) else size // 2)
    return found
