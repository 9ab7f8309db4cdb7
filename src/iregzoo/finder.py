"""Finds brains: where one lies in another scan, whatever their contrasts, with or without the heads.

Also which way up: scans that were made from arrays often have a header that says nothing of it, or the wrong thing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from iregzoo.networks.canonical import CanonicalNet
from iregzoo.precision import Precision, autocast
from iregzoo.similarity import ncc
from iregzoo.space.brains import LEAST_MM3, brain_of, brain_start
from iregzoo.space.grid import Matrix, network_grid
from iregzoo.space.scan import Scan, Window, normalise, resample_to
from iregzoo.space.start import alike
from iregzoo.space.upright import ROTATIONS, rotated

MOST_MM3 = 380.0**3  # of the field of view of a head; more takes memory and time for what is no brain
STRUCTURE = 0.05  # of one contrast: what is brighter is a structure of the brain
# Of one contrast, what surely is white matter, and the least of it in a brain: 14 rendered and real scans had 55 ml and
# more, phantoms of a head of any size, in which the network sees much of a brain, 14 ml at most.
WHITE, LEAST_WHITE_MM3 = 0.85, 3e4
CUBE_MM = 160.0
# Of ``CanonicalNet.certainty`` in such a cube around a brain. By hand, 66 scans that lay upright, rendered heads and
# brains of T1 and random contrasts and two real brains, had 0.656 to 0.751; in the 23 other ways in which they could
# lie, they had 0.687 at most (54 of them less than ``DOUBTFUL``), and at least 0.035 less than upright.
CERTAIN, DOUBTFUL, CLEARER = 0.65, 0.67, 0.015


@dataclass(frozen=True, eq=False)
class Finder:
    """The affine start of two scans by what the network of one contrast makes of them.

    Args:
        network: trained, in evaluation mode.
        spacing: mm of the grids that it was trained on.
        minimum: voxels an axis that its grids have at least.
        window: intensities that it was trained to see as 0 and 1; percentiles if None.
        precision: of its convolutions.
        sha256: of the weights file that it is from.
    """

    network: CanonicalNet
    spacing: Sequence[float]
    minimum: Sequence[int]
    window: Window | None = None
    precision: Precision = "float32"
    sha256: str = ""

    def __call__(self, fixed: Scan, moving: Scan, *, rigid: bool) -> Matrix | None:
        """As ``brain_start``: None where no two brains are found, and for a larger field of view than a head's."""
        if max(fixed.grid.volume, moving.grid.volume) > MOST_MM3:
            return None
        turn = alike(self, fixed, moving)
        found = brain_start(self.see(fixed), self.see(moving).in_world(turn), rigid=rigid)
        return None if found is None else turn.T @ found

    def likeness(self, scan: Scan) -> float | None:
        """How like a T1 a scan's brain is: its correlation with itself in one contrast, whose order is nearly a T1's.

        None where the scan shows no whole brain, see ``brain_start``, or hardly any white matter. By hand, two real T1
        had 0.85 and 0.88; ten rendered T1 from 0.51 to 0.92; and ten of random contrasts −0.56 to 0.45, but for one
        that was like a T1, 0.77.
        """
        if scan.grid.volume > MOST_MM3 or (brain := brain_of(self.see(scan))) is None:
            return None
        if int((brain.data > WHITE).sum()) * np.prod(brain.grid.spacing) < LEAST_WHITE_MM3:
            return None
        structures = brain.data > STRUCTURE
        image = resample_to(normalise(scan, self.window), brain.grid)
        return float(ncc(image[structures][None, None, None], brain.data[structures][None, None, None]))

    def see(self, scan: Scan) -> Scan:
        """The scan in one contrast, on a grid along its own axes that covers it; made once while there is the scan."""
        return self._seen(scan)[0]

    def upright(self, scan: Scan) -> Matrix:
        """A rotation (4, 4) of the world after which the scan's brain lies as the axes say; mostly it lies so before.

        It turns by quarters. Left and right cannot be told apart.
        """
        return self._seen(scan)[1] if scan.grid.volume <= MOST_MM3 else np.eye(4)

    def _seen(self, scan: Scan) -> tuple[Scan, Matrix]:
        seen = _SEEN.setdefault(self, WeakKeyDictionary())
        if scan not in seen:
            seen[scan] = self._look(scan)
        return seen[scan]

    @torch.no_grad()
    def _look(self, scan: Scan) -> tuple[Scan, Matrix]:
        """What ``see`` and ``upright`` give."""
        image, made = self._made(scan, np.eye(4))
        cube, upright = self._cube(image, made), np.eye(4)
        certain = self._certainty(cube)
        if certain < DOUBTFUL and scan.grid.volume >= LEAST_MM3 and (made.data > STRUCTURE).any():
            best = max(ROTATIONS[1:], key=lambda rotation: self._certainty(rotated(cube, rotation)))
            image, other = self._made(scan, best)
            if self._certainty(self._cube(image, other)) > max(CERTAIN, certain + CLEARER):
                made, upright = other, best
        own = network_grid(scan.grid, self.spacing, stride=1, upright=upright)  # without what pads it
        return replace(made, data=resample_to(made, own), grid=own), upright

    def _made(self, scan: Scan, upright: Matrix) -> tuple[Tensor, Scan]:
        """A scan on the network's grid, and what the network makes of it."""
        grid = network_grid(scan.grid, self.spacing, stride=self.network.stride, minimum=self.minimum, upright=upright)
        image = resample_to(normalise(scan, self.window), grid).to(next(self.network.parameters()))
        with autocast(image.device, self.precision):
            made = self.network(image) * (image > 0)  # of what is black it may make anything
        return image, replace(scan, data=made.float().cpu(), grid=grid)

    def _cube(self, image: Tensor, made: Scan) -> Tensor:
        """As much of an image as a brain takes up, around the middle of the structures."""
        side = -(-round(CUBE_MM / min(self.spacing)) // self.network.stride) * self.network.stride
        structures = (made.data[0, 0] > STRUCTURE).nonzero().double()
        for axis in range(2, image.dim()):
            size = image.shape[axis]
            centre = float(structures[:, axis - 2].mean()) if len(structures) else size / 2
            first = round(centre - side / 2)
            before, after = max(0, -first), max(0, first + side - size)
            within = image.narrow(axis, max(0, first), side - before - after)
            image = F.pad(within, [0, 0] * (image.dim() - 1 - axis) + [before, after])
        return image

    def _certainty(self, image: Tensor) -> float:
        with autocast(image.device, self.precision):
            return float(self.network.certainty(image))


_SEEN: WeakKeyDictionary[Finder, WeakKeyDictionary[Scan, tuple[Scan, Matrix]]] = WeakKeyDictionary()
