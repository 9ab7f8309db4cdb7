"""The 24 ways in which a patient may lie in a scan."""

from pathlib import Path

import numpy as np
import pytest
import torch

from geometry import GRIDS
from iregzoo.space.grid import RAS_FROM_LPS, Grid, canonical_axes, network_grid
from iregzoo.space.scan import Scan, resample_to
from iregzoo.space.upright import ROTATIONS, lying, rotated


def test_there_are_24_the_first_of_which_turns_nothing() -> None:
    assert len({rotation.tobytes() for rotation in ROTATIONS}) == 24
    np.testing.assert_array_equal(ROTATIONS[0], np.eye(4))
    for rotation in ROTATIONS:
        np.testing.assert_array_equal(rotation @ rotation.T, np.eye(4))
        assert np.linalg.det(rotation) == pytest.approx(1)


@pytest.mark.parametrize("name", ["plain", "oblique", "flipped"])  # whose sides 2 mm divide
def test_an_image_is_turned_as_a_grid_of_the_turned_world_sees_it(name: str) -> None:
    grid = GRIDS[name]
    torch.manual_seed(0)
    scan = Scan(torch.rand(1, 1, *grid.shape), grid, Path("scan.nii.gz"))
    upright = resample_to(scan, network_grid(grid, (2.0,) * 3, stride=1))
    for rotation in ROTATIONS:
        other = network_grid(grid, (2.0,) * 3, stride=1, upright=rotation)
        torch.testing.assert_close(resample_to(scan, other), rotated(upright, rotation), rtol=0, atol=1e-4)
        world = RAS_FROM_LPS @ rotation @ other.affine
        assert canonical_axes(other, rotation) == ([0, 1, 2], [1, 1, 1])
        assert (np.abs(world[:3, :3]).argmax(0) == [0, 1, 2]).all()


def test_what_a_header_says_wrong_is_said_in_its_axes() -> None:
    ras = Grid((4, 4, 4), RAS_FROM_LPS)
    scan = Scan(torch.zeros(1, 1, 4, 4, 4), ras, Path("a") / "scan.nii.gz")
    assert lying(scan, ROTATIONS[0], "affine") == ""
    # What the header calls left, posterior, superior (LPS) is patient's superior, left, posterior.
    turn = np.eye(4)
    turn[:3, :3] = [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert lying(scan, turn, "rigid") == (
        "scan.nii.gz: its axes look like IRP or, mirrored, ILP, which its header does not say; the brain was "
        "registered as it looks, and the results keep the header: correct it"
    )
    assert "; this was seen, but the start (center) did not, and" in lying(scan, turn, "center")
    assert "; this was seen, but the start was used as it is, and" in lying(scan, turn, "given")
    said = {lying(scan, rotation, "affine") for rotation in ROTATIONS[1:]}
    assert len(said) == 23
