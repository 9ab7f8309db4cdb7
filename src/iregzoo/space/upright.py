"""Which way up: the 24 ways in which what an image shows may lie along its axes, but for mirroring."""

from itertools import permutations, product

import nibabel as nib
import numpy as np
from torch import Tensor

from iregzoo.space.grid import RAS_FROM_LPS, Matrix
from iregzoo.space.scan import Scan
from iregzoo.space.start import GIVEN, SEARCHED

MIRRORED = str.maketrans("LR", "RL")


def _rotations() -> list[Matrix]:
    found = []
    for order, signs in product(permutations(range(3)), product((1.0, -1.0), repeat=3)):
        rotation = np.eye(4)
        rotation[:3, :3] = np.eye(3)[list(order)] * np.array(signs)[:, None]
        if np.linalg.det(rotation) > 0:
            found.append(rotation)
    return found


ROTATIONS = tuple(_rotations())  # (4, 4), of a world by quarters; the first turns nothing


def rotated(image: Tensor, rotation: Matrix) -> Tensor:
    """An image (B, C, *shape) whose axes run right, anterior, superior, after a rotation (4, 4) of its world, LPS.

    Its axes then run so again, and the voxels are the same.
    """
    turn = (RAS_FROM_LPS @ rotation @ RAS_FROM_LPS)[:3, :3]
    order = np.abs(turn).argmax(1)
    flipped = [2 + axis for axis in range(3) if turn[axis, order[axis]] < 0]
    return image.permute(0, 1, *(2 + int(axis) for axis in order)).flip(flipped)


def lying(scan: Scan, upright: Matrix, init: str) -> str:
    """In words, that a scan lies otherwise than its header says, after the rotation ``upright``; empty if not.

    Args:
        scan: of which it is said.
        upright: rotation (4, 4) of the world.
        init: the name of the affine start; those that are searched for follow what is seen.
    """
    if np.array_equal(upright, np.eye(4)):
        return ""
    seen = "".join(nib.orientations.aff2axcodes(RAS_FROM_LPS @ upright @ scan.grid.affine))
    used = "was used as it is" if init == GIVEN else f"({init}) did not"
    followed = "the brain was registered as it looks" if init in SEARCHED else f"this was seen, but the start {used}"
    return (
        f"{scan.path.name}: its axes look like {seen} or, mirrored, {seen.translate(MIRRORED)}, which its header does "
        f"not say; {followed}, and the results keep the header: correct it"
    )
