"""Finds brains: where one lies in another scan, whatever their contrasts, with or without the heads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from iregzoo.networks.canonical import CanonicalNet
from iregzoo.precision import Precision, autocast
from iregzoo.space.brains import brain_start
from iregzoo.space.grid import Matrix, network_grid
from iregzoo.space.scan import Scan, normalise, resample_to

MOST_VOXELS = 192**3  # of the grid on which a scan is seen: of 2 mm, a field of view of 38 cm


@dataclass(frozen=True)
class Finder:
    """The affine start of two scans by what the network of one contrast makes of them.

    Args:
        network: trained, in evaluation mode.
        spacing: mm of the grids that it was trained on.
        minimum: voxels an axis that its grids have at least.
        precision: of its convolutions.
    """

    network: CanonicalNet
    spacing: Sequence[float]
    minimum: Sequence[int]
    precision: Precision = "float32"

    def __call__(self, fixed: Scan, moving: Scan, *, rigid: bool) -> Matrix | None:
        """As ``brain_start``: None where no two brains are found, and for a larger field of view than a head's."""
        seen = [self.see(scan) for scan in (fixed, moving)]
        found = [scan for scan in seen if scan is not None]
        return brain_start(found[0], found[1], rigid=rigid) if len(found) == 2 else None

    @torch.no_grad()
    def see(self, scan: Scan) -> Scan | None:
        """The scan in one contrast, on a grid along its own axes that covers it; None where that would be too large."""
        grid = network_grid(scan.grid, self.spacing, stride=self.network.stride, minimum=self.minimum)
        if np.prod(grid.shape) > MOST_VOXELS:
            return None
        image = resample_to(normalise(scan), grid).to(next(self.network.parameters()).device)
        with autocast(image.device, self.precision):
            made = self.network(image) * (image > 0)  # of what is black it may make anything
        seen = replace(scan, data=made.float().cpu(), grid=grid)
        own = network_grid(scan.grid, self.spacing, stride=1)  # without what pads it: the same voxels, fewer
        return replace(seen, data=resample_to(seen, own), grid=own)
