"""Rigid and affine motions that make two scans most alike: a likeness of lattices, and its derivative."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iregzoo.fields import identity
from iregzoo.slices import reader
from iregzoo.space.grid import Matrix, apply_matrix, inverse
from iregzoo.space.scan import Scan

Likeness = Callable[[Tensor, Tensor], Tensor]  # of two images (1, 1, *shape), the fixed one first: (1,)
STOP = {"maxiter": 30, "maxls": 8, "gtol": 1e-4}
GAIN = 1e-5  # far below what float32 tells apart, a search goes astray
RADIUS_MM = 60.0  # at which a turn or a stretch counts as a shift does


class Motion:
    """How unlike two scans are after motions about the middle of the fixed one, and its derivative.

    Args:
        fixed, moving: scans in [0, 1], on lattices.
        start: (4, 4), LPS mm, where motions begin.
        rigid: whether there are 6 of them, or 12.
        likeness: what is to grow.
    """

    def __init__(self, fixed: Scan, moving: Scan, start: Tensor, rigid: bool, likeness: Likeness) -> None:
        self.likeness, self.begun, self.motions = likeness, start, _motions(fixed.grid.centre, rigid)
        self.fixed = fixed.data.clone()  # a clone, for scans may have been read in an inference mode
        self.lattice, self.moving = torch.from_numpy(fixed.grid.affine), torch.from_numpy(inverse(moving.grid.affine))
        self.places = identity(fixed.grid.shape)
        self.read = reader(moving.data.clone())

    def world(self, amounts: Tensor) -> Tensor:
        """The affine (4, 4), LPS mm, after so much of each motion, in mm at ``RADIUS_MM``."""
        moved: Tensor = torch.linalg.matrix_exp((amounts.view(-1, 1, 1) * self.motions).sum(0))
        return self.begun @ moved

    def alike(self, world: Tensor | None) -> Tensor:
        """The likeness of the scans by an affine (4, 4), LPS mm; of the fixed scan and itself if None."""
        seen = self.fixed
        if world is not None:
            seen = self.read(apply_matrix(self.moving @ world @ self.lattice, self.places))
        return self.likeness(self.fixed, seen).sum()

    def __call__(self, amounts: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        with torch.enable_grad():
            wanted = torch.from_numpy(amounts).requires_grad_()
            unlike = -self.alike(self.world(wanted))
            (gradient,) = torch.autograd.grad(unlike, wanted)
        return unlike.item(), gradient.numpy()

    def best(self, gain: float = GAIN) -> Tensor:
        """The affine (4, 4), LPS mm, after motions that leave the scans most alike.

        Args:
            gain: where a step gains less, there is no other; a part of the likeness where that is more than 1.
        """
        from scipy.optimize import minimize

        options = {**STOP, "ftol": gain}
        found = minimize(self, np.zeros(len(self.motions)), jac=True, method="L-BFGS-B", options=options)
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
