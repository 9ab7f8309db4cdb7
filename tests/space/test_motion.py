"""A motion's derivative is that of its likeness, and the best one undoes what was done."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import approx_fprime
from scipy.spatial.transform import Rotation

from geometry import draw_head, make_grid
from iregzoo.similarity import local_information, ncc
from iregzoo.space.motion import Likeness, Motion
from iregzoo.space.scan import Scan

GRID = make_grid((46, 56, 44), (2.1, 2.2, 2.1), centre=(4, -3, 2))
OTHER = make_grid((60, 52, 54), (2.0, 2.4, 2.1), degrees=(4, 6, -5), axes=(0, 2, 1), signs=(-1, 1, -1))
MOVED = np.eye(4)
MOVED[:3, :3] = Rotation.from_euler("xyz", (9, -5, 7), degrees=True).as_matrix()
MOVED[:3, 3] = (5, -3, 4)
NEAR = np.eye(4)
NEAR[:3, :3] = Rotation.from_euler("xyz", (0.4, 0.3, -0.4), degrees=True).as_matrix() * (1.004, 0.996, 1.0)
NEAR[:3, 3] = (0.5, 0.3, -0.2)
LIKENESSES = pytest.mark.parametrize(
    "likeness", [ncc, partial(local_information, window=5)], ids=["correlation", "local information"]
)


def scans() -> tuple[Scan, Scan]:
    """A phantom's head, and the same moved."""
    moved = draw_head(OTHER, np.linalg.inv(MOVED), size=0.7) / 1000
    return Scan(draw_head(GRID, size=0.7) / 1000, GRID, Path("fixed")), Scan(moved, OTHER, Path("moving"))


@LIKENESSES
@pytest.mark.parametrize("rigid", [True, False])
def test_the_derivative_is_that_of_finite_differences(likeness: Likeness, rigid: bool) -> None:
    # In double precision: float32 leaves too few digits of a difference.
    exact = [replace(scan, data=scan.data.double()) for scan in scans()]
    motion = Motion(exact[0], exact[1], torch.from_numpy(MOVED @ NEAR), rigid, likeness)
    motion.places = motion.places.double()
    still = np.zeros(6 if rigid else 12)
    _, found = motion(still)
    expected = approx_fprime(still, lambda amounts: motion(amounts)[0], 1e-3)
    np.testing.assert_allclose(found, expected, atol=2e-4 + 0.03 * np.abs(expected).max())
    assert np.abs(expected).max() > 1e-3


def test_the_best_motion_undoes_what_was_done() -> None:
    motion = Motion(*scans(), torch.eye(4, dtype=torch.float64), True, ncc)
    found = motion.best()
    assert GRID.farthest(found.numpy() @ GRID.affine, MOVED @ GRID.affine) < 1.5
    assert motion.alike(found) > 0.97 > 0.9 > motion.alike(motion.begun)
    np.testing.assert_array_equal(found[3], (0, 0, 0, 1))
    soon = motion.alike(motion.best(gain=0.03))
    assert motion.alike(motion.begun) < soon < motion.alike(found)


def test_a_scan_is_likest_itself() -> None:
    motion = Motion(*scans(), torch.from_numpy(MOVED), True, ncc)
    assert motion.alike(None) == pytest.approx(1, abs=1e-3)
    assert motion.alike(torch.from_numpy(MOVED)) < 1
