"""A rigid or affine start made precise, for scans of which no deformation follows, or hardly one.

The search of ``start`` finds two scans wherever they are, by the mutual information of small images, and is some tenths
of a millimetre off, which a network makes good. Local information (``similarity``), maximised from there, is an order
of magnitude nearer: it minds neither another contrast nor a bias field, which mutual information takes for a shrinkage
or a tilt. That holds for one person. Two people share too little: there it leads astray as soon as it leads far.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from iregzoo.similarity import local_information, whole_windows
from iregzoo.space.frame import affine_displacement
from iregzoo.space.grid import Grid, Matrix
from iregzoo.space.masks import Masks
from iregzoo.space.motion import Motion
from iregzoo.space.scan import Scan, normalise
from iregzoo.space.start import SAME, on_lattice

VOXELS = 700_000  # of the lattice on which the scans are compared: of a head, every 2.5 mm
WINDOW = 5  # voxels of it
COARSER = (2, 1)  # times its spacing, one after the other
# Of the information, to be gained: a scan has 4e-4 more of itself where interpolation smooths it, and a phantom without
# noise 1.2e-3.
LEAST = 2e-3
# Of what the fixed scan has of itself, for which a start is left farther than a search errs. One person's scans shared
# 0.31 to 0.91 of it in another contrast, with slices of 5 mm or neither; two people's, but for one pair, 0.29 at most.
SHARED = 0.3
ALL = Masks()


@dataclass(frozen=True)
class Precise:
    """A start made precise.

    Attributes:
        start: affine (4, 4), LPS mm.
        shared: what the scans tell of each other by it, a part of what the fixed one tells of itself.
    """

    start: Matrix
    shared: float

    @property
    def one_person(self) -> bool:
        """Whether the scans share as much as those of one person do."""
        return self.shared > SHARED


def precise_start(
    fixed: Scan, moving: Scan, start: Matrix, *, rigid: bool, masks: Masks = ALL, roughly: bool = False
) -> Precise:
    """The affine near a start in which the scans tell most of each other.

    The start itself if none tells more, and if what tells more lies farther away than a search errs (``SAME``) and is
    less than scans of one person share (``SHARED``).

    Args:
        fixed, moving: the scans.
        start: affine (4, 4), LPS mm, from fixed to moving world, within some millimetres of the result.
        rigid: only turn and shift what the start gives, and neither stretch nor shear it.
        masks: of the scans: windows count that hold, at the start, only what the masks count.
        roughly: look only at the coarser lattices, an eighth of the work.
    """
    spacing = lattice_spacing(fixed.grid, moving.grid)
    with torch.inference_mode(False):  # a caller's, whose tensors no gradient may pass
        fixed, moving = normalise(fixed), normalise(moving)
        found = begun = torch.from_numpy(start)
        for coarser in COARSER[:1] if roughly else COARSER:
            here, there = (on_lattice(scan, coarser * spacing) for scan in (fixed, moving))
            counted = compared(masks, here.grid, start)
            motion = Motion(here, there, found, rigid, partial(local_information, window=WINDOW, counted=counted))
            found = motion.best()
        told, before, itself = (float(motion.alike(affine)) for affine in (found, begun, None))
    result, kept = (
        Precise(world, information / itself if itself > 0 else 0.0)
        for world, information in ((found.numpy(), told), (start, before))
    )
    near = fixed.grid.farthest(result.start @ fixed.grid.affine, start @ fixed.grid.affine) < SAME * fixed.grid.diagonal
    return result if told > (1 + LEAST) * before and (result.one_person or near) else kept


def lattice_spacing(fixed: Grid, moving: Grid) -> float:
    """Of lattices as fine as the coarser of two grids, with ``VOXELS`` over the fixed one at most: mm."""
    volumes = [float(np.prod(grid.spacing)) for grid in (fixed, moving)]
    return float(max(*volumes, np.prod(fixed.shape) * volumes[0] / VOXELS) ** (1 / 3))


def compared(masks: Masks, lattice: Grid, start: Matrix) -> Tensor | None:
    """Which windows of a lattice hold, at the start, only what the masks count; None if all."""
    return whole_windows(masks.counted(lattice, affine_displacement(start, lattice)), WINDOW) if masks else None
