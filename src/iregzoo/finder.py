"""Finds brains: where one lies in another scan, whatever their contrasts, with or without the heads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch

from iregzoo.networks.canonical import CanonicalNet
from iregzoo.precision import Precision, autocast
from iregzoo.similarity import ncc
from iregzoo.space.brains import brain_of, brain_start
from iregzoo.space.grid import Matrix, network_grid
from iregzoo.space.scan import Scan, Window, normalise, resample_to

MOST_MM3 = 380.0**3  # of the field of view of a head; more takes memory and time for what is no brain
STRUCTURE = 0.05  # of one contrast: what is brighter is a structure of the brain
# Of one contrast, what surely is white matter, and the least of it in a brain: 14 rendered and real scans had 55 ml and
# more, phantoms of a head of any size, in which the network sees much of a brain, 14 ml at most.
WHITE, LEAST_WHITE_MM3 = 0.85, 3e4


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
        return brain_start(self.see(fixed), self.see(moving), rigid=rigid)

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
        seen = _SEEN.setdefault(self, WeakKeyDictionary())
        if scan not in seen:
            seen[scan] = self._look(scan)
        return seen[scan]

    @torch.no_grad()
    def _look(self, scan: Scan) -> Scan:
        grid = network_grid(scan.grid, self.spacing, stride=self.network.stride, minimum=self.minimum)
        image = resample_to(normalise(scan, self.window), grid).to(next(self.network.parameters()))
        with autocast(image.device, self.precision):
            made = self.network(image) * (image > 0)  # of what is black it may make anything
        seen = replace(scan, data=made.float().cpu(), grid=grid)
        own = network_grid(scan.grid, self.spacing, stride=1)  # without what pads it: the same voxels, fewer
        return replace(seen, data=resample_to(seen, own), grid=own)


_SEEN: WeakKeyDictionary[Finder, WeakKeyDictionary[Scan, Scan]] = WeakKeyDictionary()
