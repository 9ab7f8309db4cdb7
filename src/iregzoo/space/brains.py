"""Affine start of two brains that are seen in one contrast, without their heads.

A head beside a brain without its skull, or two contrasts, may have most mutual information in a wrong place. Where the
structures of both brains have the same brightness and all else is black (``networks.canonical``), plain correlation
leads to the right one, in less time.
"""

from dataclasses import replace

import numpy as np
import torch
from scipy import ndimage

from iregzoo.similarity import ncc
from iregzoo.space.grid import Matrix, bounding_grid
from iregzoo.space.motion import Motion
from iregzoo.space.scan import Scan, resample_to
from iregzoo.space.start import TRIED, candidates, on_lattice

COARSE_MM, FINE_MM = 12.0, 4.0  # of the lattices on which brains are compared
GAIN = 1e-4  # of the correlation, where a search ends
# Of 4 mm: what is darker is a ventricle, or outside a brain; and at the field of view's sides, what the network, which
# has seen little beyond heads, is sure of.
BRIGHT, SURE = 0.3, 0.45
LEAST_MM3 = 2e5  # of a brain: half of a newborn's
# On a side of the field of view: more than of a brain that just touches it, and about half of a section through its
# middle. Where so much is missing, what is there would be drawn out of place.
CUT_MM2 = 6000.0
MARGIN_MM = 12.0
# Two people's brains that lie on each other: they correlated by 0.82 to 0.97, one of them turned by up to 40°, and the
# affine's ``skew`` was 0.03 at most.
CORRELATED, SKEWED = 0.7, 0.1


def brain_start(fixed: Scan, moving: Scan, *, rigid: bool) -> Matrix | None:
    """Affine (4, 4), LPS mm, from a place in the fixed image to the one in the moving one.

    None where one of them shows no brain, or only a part of one, and where the two do not come to lie on each other, or
    only by more of a stretch than people differ by.

    Args:
        fixed, moving: of one contrast, in [0, 1], black where no structure is.
        rigid: only turn and shift.
    """
    here, there = brain_of(fixed), brain_of(moving)
    if here is None or there is None:
        return None
    coarse, fine = (on_lattice(here, COARSE_MM), on_lattice(there, COARSE_MM)), (here, there)
    with torch.inference_mode(False):  # a caller's, whose tensors no gradient may pass
        begun = [torch.from_numpy(world) for world in candidates(*coarse)]
        alike = Motion(*coarse, begun[0], True, ncc).alike
        best = sorted(begun, key=lambda world: float(alike(world)), reverse=True)[:TRIED]
        found = max((Motion(*coarse, world, True, ncc).best(GAIN) for world in best), key=alike)
        if not rigid:
            found = Motion(*coarse, found, False, ncc).best(GAIN)
        motion = Motion(*fine, found, rigid, ncc)
        found = motion.best(GAIN)
        likely = float(motion.alike(found)) > CORRELATED and skew(found.numpy()) < SKEWED
    return found.numpy() if likely else None


def skew(world: Matrix) -> float:
    """How unevenly an affine (4, 4) stretches: the sum of the squared logarithms of its three factors of their mean."""
    logs = np.log(np.linalg.svd(world[:3, :3], compute_uv=False))
    return float(((logs - logs.mean()) ** 2).sum())


def brain_of(scan: Scan) -> Scan | None:
    """The brain alone, on the finer lattice; None where there is none, or a side of the field of view cuts it.

    It is the largest piece that hangs together by more than a voxel, for a neck may have something bright, too.
    """
    scan = on_lattice(scan, FINE_MM)
    image = scan.data[0, 0].numpy()
    bright = image > BRIGHT
    pieces, _ = ndimage.label(ndimage.binary_erosion(bright))
    sizes = np.bincount(pieces.ravel())[1:]
    if not sizes.size:
        return None
    brain = ndimage.binary_dilation(pieces == 1 + sizes.argmax(), iterations=2)
    # Of the two outermost slices on each side, for the last one may lie half outside, where it is black.
    sides = (np.moveaxis(brain & (image > SURE), axis, 0) for axis in range(3))
    cut = max(face.sum() * FINE_MM**2 for side in sides for face in (*side[:2], *side[-2:]))
    if (brain & bright).sum() * FINE_MM**3 < LEAST_MM3 or cut > CUT_MM2:
        return None
    kept = torch.from_numpy(brain)
    grid = bounding_grid(kept, scan.grid, MARGIN_MM)
    alone = replace(scan, data=scan.data * kept)
    return replace(alone, data=resample_to(alone, grid), grid=grid)
