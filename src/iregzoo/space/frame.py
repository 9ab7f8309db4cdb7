"""Where a network sees a pair of scans, and the way of its field back to the scans' own grids."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from iregzoo.space.grid import (
    Grid,
    Matrix,
    bounding_grid,
    inverse,
    network_grid,
    positions,
    pull,
    read_at,
    slabs,
    to_voxels,
    turn,
)
from iregzoo.space.points import map_points, move_points_back, voxel_places
from iregzoo.space.scan import Scan, Window, normalise, resample_to

MARGIN_MM = 10.0
MAX_VOXELS = 256**3


@dataclass(frozen=True)
class Frame:
    """The geometry of one registration.

    Attributes:
        fixed, moving: the scans' own grids.
        network: the grid on which the network sees both.
        start: affine (4, 4), LPS mm, from fixed to moving world.
    """

    fixed: Grid
    moving: Grid
    network: Grid
    start: Matrix

    def deform(self, displacement: Tensor) -> Tensor:
        """The network's displacement on the fixed image's grid: (1, 3, *fixed.shape), LPS mm, without the affine.

        Beyond the network's grid the displacement of its border goes on. In the precision of what is given.

        Args:
            displacement: (1, 3, *network.shape) in voxels of the network's grid.
        """
        matrix = to_voxels(self.fixed, None, self.network)
        return pull(self.network.in_mm(displacement), matrix, self.fixed.shape, outside=None)

    def carry(self, displacement: Tensor, grid: Grid) -> Tensor:
        """The network's displacement on another grid: (1, 3, *grid.shape) float32, in voxels of that grid.

        Args:
            displacement: (1, 3, *network.shape) in voxels of the network's grid.
            grid: where it is wanted; beyond the network's grid the displacement of its border goes on.
        """
        there = replace(self, fixed=grid)
        return there.in_voxels(there.deform(displacement)).float()

    def backward(self, inverted: Tensor) -> Tensor:
        """The whole way back on the moving image's grid: (1, 3, *moving.shape), LPS mm, affine included.

        Args:
            inverted: the inverse of the network's displacement, (1, 3, *network.shape) in voxels of the network's grid.
        """
        affine = inverse(self.start)
        matrix = to_voxels(self.moving, affine, self.network)
        moved = pull(self.network.in_mm(inverted), matrix, self.moving.shape, outside=None)
        return _moved(np.eye(4), affine, moved, self.moving)

    def undo(self, deformation: Tensor, grid: Grid, own: Tensor | None = None) -> Tensor:
        """What undoes a deformation, on a grid in the moving world: (1, 3, *grid.shape), LPS mm, without the affine.

        A place y of the moving world comes from start⁻¹(y + v(y)) in the fixed one, v being the result. Every voxel is
        solved by itself, see ``move_points_back``; beyond the fixed image the deformation of its border goes on.

        Args:
            deformation: (1, 3, *fixed.shape), LPS mm, from ``deform``.
            grid: where the result is wanted.
            own: an inverse of the network's displacement, as for ``backward``, to begin with.
        """
        there, affine = voxel_places(grid), inverse(self.start)
        start = None
        if own is not None:
            start = there + replace(self, moving=grid).backward(own).double().reshape(3, -1).T
        places = move_points_back(map_points(affine, there), deformation, self.fixed, start)
        return (map_points(self.start, places) - there).T.reshape(1, 3, *grid.shape)

    def total_back(self, undone: Tensor) -> Tensor:
        """What ``undo`` gives on the moving grid and the affine's inverse as one displacement, like ``total``."""
        affine = inverse(self.start)
        return _moved(affine, affine, undone, self.moving)

    def total(self, deformation: Tensor) -> Tensor:
        """Deformation and affine as one displacement on the fixed grid: (1, 3, *fixed.shape), LPS mm."""
        return _moved(self.start, self.start, deformation, self.fixed)

    def in_voxels(self, deformation: Tensor) -> Tensor:
        """A displacement in mm on the fixed grid in that grid's voxels, for its Jacobian."""
        return self.fixed.in_voxels(deformation)


def affine_displacement(world: Matrix, grid: Grid) -> Tensor:
    """Displacement (1, 3, *shape), LPS mm, of an affine of the world at every voxel of a grid."""
    return positions((world - np.eye(4)) @ grid.affine, grid.shape, slice(None))


def _moved(linear: Matrix, world: Matrix, vectors: Tensor, grid: Grid) -> Tensor:
    """The displacement of an affine of the world on a grid, plus vectors (1, 3, *shape) that another one turns."""
    moved = torch.empty_like(vectors)
    for part in slabs(grid.shape):
        still = positions((world - np.eye(4)) @ grid.affine, grid.shape, part, device=vectors.device)
        moved[:, :, part] = still + turn(linear, vectors[:, :, part].double())
    return moved


def warp_scan(scan: Scan, displacement: Tensor, grid: Grid, *, mode: str = "linear") -> Tensor:
    """A scan warped once, from its own full resolution: (1, C, *grid.shape) for one of C channels.

    Agrees with ITK's resampler, also at the faces of the field of view.

    Args:
        scan: what is warped.
        displacement: (1, 3, *grid.shape), LPS mm, from a place on ``grid`` to one in the scan.
        grid: of the result.
        mode: ``linear``, or ``nearest`` for a label map.
    """
    return _warp(scan, displacement, grid, mode=mode, outside=0.0 if mode == "nearest" else scan.outside)


def warp_mask(mask: Scan, displacement: Tensor, grid: Grid) -> Tensor:
    """Where a mask counts on a grid: boolean (1, 1, *grid.shape); beyond its field of view it goes on as at its border.

    Args:
        mask: as ``read_mask`` gives it.
        displacement: (1, 3, *grid.shape), LPS mm, from a place on ``grid`` to one in the mask.
        grid: of the result.
    """
    return _warp(mask, displacement, grid, mode="nearest", outside=None) != 0


def _warp(scan: Scan, displacement: Tensor, grid: Grid, *, mode: str, outside: float | None) -> Tensor:
    """As ``warp_scan``; ``outside`` as for ``read_at``."""
    matrix = to_voxels(grid, None, scan.grid)
    warped = scan.data.new_empty(1, scan.data.shape[1], *grid.shape)
    for part in slabs(grid.shape):
        points = positions(matrix, grid.shape, part) + scan.grid.in_voxels(displacement[:, :, part].double())
        warped[:, :, part] = read_at(scan.data, points, mode=mode, outside=outside)
    return warped


def make_frame(
    fixed: Scan,
    moving: Scan,
    start: Matrix,
    *,
    spacing: Sequence[float],
    stride: int,
    minimum: Sequence[int],
    window: Window | None = None,
    upright: Matrix | None = None,
) -> Frame:
    """Choose the network's grid for a pair.

    It covers what the fixed image shows (not an empty background), with a margin. Where that were more than
    ``MAX_VOXELS``, its spacing is made coarser.

    Args:
        fixed, moving: the scans.
        start: affine (4, 4), LPS mm, from fixed to moving world.
        spacing: that the network was trained at, mm.
        stride: divides the grid's shape.
        minimum: voxels an axis that the grid has at least.
        window: of the intensities, as for ``network_input``; what lies above its lower end is not empty.
        upright: how the fixed scan's patient lies, as for ``canonical_axes``.
    """
    shown = bounding_grid(normalise(fixed, window).data[0, 0] > 0, fixed.grid, MARGIN_MM)
    grid = network_grid(shown, spacing, stride=stride, minimum=minimum, upright=upright)
    excess = float(np.prod(np.array(grid.shape, dtype=float))) / MAX_VOXELS
    if excess > 1:
        coarser = np.asarray(spacing) * excess ** (1 / 3)
        grid = network_grid(shown, coarser.tolist(), stride=stride, minimum=minimum, upright=upright)
    return Frame(fixed.grid, moving.grid, grid, start)


def network_input(frame: Frame, fixed: Scan, moving: Scan, window: Window | None = None) -> Tensor:
    """Both scans on the network's grid: (1, 2, *network.shape), moving (after the affine) then fixed, in [0, 1].

    ``window`` holds the intensities that become 0 and 1; without one it is percentiles of each scan, see ``normalise``.
    """
    return torch.cat(
        (
            resample_to(normalise(moving, window), frame.network, frame.start),
            resample_to(normalise(fixed, window), frame.network),
        ),
        dim=1,
    )
