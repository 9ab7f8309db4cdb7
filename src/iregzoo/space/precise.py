"""A rigid or affine start made precise, for scans of which no deformation follows, or hardly one.

The search of ``start`` finds two scans wherever they are, by the mutual information of small images, and is some tenths
of a millimetre off, which a network makes good. Local information (``similarity``), maximised from there, is an order
of magnitude nearer: it minds neither another contrast nor a bias field, which mutual information takes for a shrinkage
or a tilt. That holds for one person. Two people share too little: there it leads astray as soon as it leads far.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iregzoo.fields import identity
from iregzoo.similarity import local_information, whole_windows
from iregzoo.slices import reader
from iregzoo.space.frame import affine_displacement
from iregzoo.space.grid import Grid, Matrix, apply_matrix, inverse
from iregzoo.space.masks import Masks
from iregzoo.space.scan import Scan, normalise
from iregzoo.space.start import SAME, on_lattice

VOXELS = 700_000  # of the lattice on which the scans are compared: of a head, every 2.5 mm
WINDOW = 5  # voxels of it
COARSER = (2, 1)  # times its spacing, one after the other
STOP = {"maxiter": 30, "maxls": 8, "ftol": 1e-5, "gtol": 1e-4}  # far below what float32 tells apart it goes astray
# Of the information, to be gained: a scan has 4e-4 more of itself where interpolation smooths it, and a phantom without
# noise 1.2e-3.
LEAST = 2e-3
# Of what the fixed scan has of itself, for which a start is left farther than a search errs. One person's scans shared
# 0.31 to 0.91 of it in another contrast, with slices of 5 mm or neither; two people's, but for one pair, 0.29 at most.
SHARED = 0.3
ALL = Masks()
RADIUS_MM = 60.0  # at which a turn or a stretch counts as a shift does


def precise_start(
    fixed: Scan, moving: Scan, start: Matrix, *, rigid: bool, masks: Masks = ALL, roughly: bool = False
) -> Matrix:
    """The affine (4, 4), LPS mm, near a start in which the scans tell most of each other.

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
            objective = _Objective(here, there, found, rigid, compared(masks, here.grid, start))
            found = objective.lowest()
        told, before, itself = (objective.told(affine) for affine in (found, begun, None))
    grid, better = fixed.grid, told > (1 + LEAST) * before
    moved = grid.farthest(found.numpy() @ grid.affine, start @ grid.affine)
    return found.numpy() if better and (told > SHARED * itself or moved < SAME * grid.diagonal) else start


def lattice_spacing(fixed: Grid, moving: Grid) -> float:
    """Of lattices as fine as the coarser of two grids, with ``VOXELS`` over the fixed one at most: mm."""
    volumes = [float(np.prod(grid.spacing)) for grid in (fixed, moving)]
    return float(max(*volumes, np.prod(fixed.shape) * volumes[0] / VOXELS) ** (1 / 3))


def compared(masks: Masks, lattice: Grid, start: Matrix) -> Tensor | None:
    """Which windows of a lattice hold, at the start, only what the masks count; None if all."""
    return whole_windows(masks.counted(lattice, affine_displacement(start, lattice)), WINDOW) if masks else None


class _Objective:
    """What a motion about the middle of the fixed scan leaves untold, the negative information, and its derivative.

    Args:
        fixed, moving: scans in [0, 1], on lattices.
        start: (4, 4), LPS mm, where motions begin.
        rigid: whether there are 6 of them, or 12.
        counted: the windows of the fixed lattice that count; all if None.
    """

    def __init__(self, fixed: Scan, moving: Scan, start: Tensor, rigid: bool, counted: Tensor | None) -> None:
        self.counted, self.begun, self.motions = counted, start, _motions(fixed.grid.centre, rigid)
        self.fixed = fixed.data.clone()  # a clone, for scans may have been read in an inference mode
        self.lattice, self.moving = torch.from_numpy(fixed.grid.affine), torch.from_numpy(inverse(moving.grid.affine))
        self.places = identity(fixed.grid.shape)
        self.read = reader(moving.data.clone())

    def world(self, amounts: Tensor) -> Tensor:
        """The affine (4, 4), LPS mm, after so much of each motion, in mm at ``RADIUS_MM``."""
        moved: Tensor = torch.linalg.matrix_exp((amounts.view(-1, 1, 1) * self.motions).sum(0))
        return self.begun @ moved

    def told(self, world: Tensor | None) -> Tensor:
        """The local information of the scans by an affine (4, 4), LPS mm; of the fixed scan and itself if None."""
        seen = self.fixed
        if world is not None:
            seen = self.read(apply_matrix(self.moving @ world @ self.lattice, self.places))
        return local_information(self.fixed, seen, window=WINDOW, counted=self.counted).sum()

    def __call__(self, amounts: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        with torch.enable_grad():
            wanted = torch.from_numpy(amounts).requires_grad_()
            untold = -self.told(self.world(wanted))
            (gradient,) = torch.autograd.grad(untold, wanted)
        return untold.item(), gradient.numpy()

    def lowest(self) -> Tensor:
        """The affine (4, 4), LPS mm, after motions that leave least untold."""
        from scipy.optimize import minimize

        found = minimize(self, np.zeros(len(self.motions)), jac=True, method="L-BFGS-B", options=STOP)
        world = self.world(torch.from_numpy(found.x))
        world[3] = torch.tensor([0.0, 0.0, 0.0, 1.0])  # but for rounding, it is that
        return world


def _motions(centre: Matrix, rigid: bool) -> Tensor:
    """The generators of rigid or affine motions about a centre: (6 or 12, 4, 4), float64."""
    units = torch.eye(16, dtype=torch.float64).view(4, 4, 4, 4)  # of which [i, j] has a 1 at i, j
    shifts = [units[axis, 3] for axis in range(3)]
    if rigid:
        turns = [units[i, j] - units[j, i] for i, j in ((0, 1), (0, 2), (1, 2))]
    else:
        turns = [units[i, j] for i in range(3) for j in range(3)]
    there, back = torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    there[:3, 3], back[:3, 3] = torch.from_numpy(centre), -torch.from_numpy(centre)
    return torch.stack([there @ motion @ back for motion in (*shifts, *(turn / RADIUS_MM for turn in turns))])
