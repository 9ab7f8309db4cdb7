"""The report's picture: where things stand in it, folds, the grid, and names of any letters."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from geometry import make_grid, world_points
from iregzoo.errors import InputError
from iregzoo.planes import PLANES
from iregzoo.quality import compare, figures
from iregzoo.register import Result, Scans, finish
from iregzoo.registration import Registration
from iregzoo.report import (
    COLUMNS,
    GAP,
    GOLD,
    GREYS,
    LEFT,
    MAGENTA,
    SIDE,
    TOP,
    _name,
    _with_folds,
    coloured,
    font,
    key_figures,
    picture,
)
from iregzoo.space.frame import Frame
from iregzoo.space.grid import Grid
from iregzoo.space.scan import Scan

# Cubes of 40 mm, whose every plane fills its place in the picture.
CUBES = {
    "plain": make_grid((40, 40, 40)),
    "turned": make_grid((20, 40, 32), (2.0, 1.0, 1.25), axes=(2, 0, 1), signs=(-1, 1, -1), centre=(5, -9, 31)),
    "flipped": make_grid((40, 25, 40), (1.0, 1.6, 1.0), axes=(1, 2, 0), signs=(-1, -1, 1)),
}
DIRECTIONS = {letter: np.array(way) for letter, way in zip("LPS", np.eye(3), strict=True)}  # of LPS
DIRECTIONS |= {other: -DIRECTIONS[letter] for letter, other in zip("LPS", "RAI", strict=True)}


def ball(grid: Grid, offset: NDArray[np.float64]) -> torch.Tensor:
    """Bright around a place off the middle, in a body that fills the field of view: (1, 1, *shape)."""
    points = world_points(grid) - grid.centre
    near = np.linalg.norm(points - offset, axis=-1) < 9
    return torch.from_numpy(np.where(near, 1000.0, 300.0)).float()[None, None]


def drawn(path: Path, grid: Grid, image: torch.Tensor, displacement: torch.Tensor | None = None) -> NDArray[np.uint8]:
    """The picture of a scan registered to itself by a displacement (1, 3, *shape) in its voxels."""
    scan = Scan(image, grid, Path("scan.nii.gz"))
    moved = torch.zeros(1, 3, *grid.shape) if displacement is None else displacement
    result = finish(Scans(scan, scan), Frame(grid, grid, grid, np.eye(4)), "none", Registration(moved))
    return written(path, result)


def written(path: Path, result: Result) -> NDArray[np.uint8]:
    images = compare(result)
    picture(result, images, figures(result, images), path)
    return np.asarray(Image.open(path))


def tile(whole: NDArray[np.uint8], row: int, column: str) -> NDArray[np.int64]:
    """One of the pictures in the picture: (y, x, colour)."""
    top, left = TOP + row * (SIDE + GAP), LEFT + COLUMNS.index(column) * (SIDE + GAP)
    return whole[top : top + SIDE, left : left + SIDE].astype(int)


def middle_of(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The middle of what is marked, (x, y), from -1/2 to 1/2 of a picture's width to the right and its height up."""
    y, x = np.nonzero(mask)
    return np.array([(x.mean() + 0.5) / mask.shape[1] - 0.5, 0.5 - (y.mean() + 0.5) / mask.shape[0]])


@pytest.mark.parametrize("grid", CUBES.values(), ids=CUBES)
def test_sides_are_the_patients_in_every_plane(grid: Grid, tmp_path: Path) -> None:
    offset = 8 * DIRECTIONS["L"] + 6 * DIRECTIONS["A"] + 5 * DIRECTIONS["S"]
    whole = drawn(tmp_path / "p.png", grid, ball(grid, offset))
    for row, plane in enumerate(PLANES):
        _, right, top, _ = (DIRECTIONS[letter] for letter in plane.sides)
        expected = np.array([right @ offset, top @ offset]) / 40
        for column in ("fixed", "moving at affine start", "warped"):
            inner = tile(whole, row, column)[20:-20, 20:-20].min(-1)  # without the letters
            found = middle_of(inner > 200) * (SIDE - 40) / SIDE
            assert np.abs(found - expected).max() < 0.02, (plane.name, column)


def test_a_picture_has_the_proportions_of_the_patient(tmp_path: Path) -> None:
    """Thick slices make no plane taller or wider than it is in mm."""
    grid = make_grid((60, 40, 10), (0.5, 1.0, 4.0))
    whole = drawn(tmp_path / "p.png", grid, ball(grid, np.zeros(3)))
    inner = whole[TOP:, LEFT - 1 : LEFT + round(SIDE * 40 / 40) + 1].astype(int)
    shown = inner[:, 1:-1].min(-1) < 250
    rows = np.flatnonzero(shown[:, shown.shape[1] // 2])
    # Axial 30 × 40 mm, coronal 30 × 40 and sagittal 40 × 40: each is SIDE pixels high.
    assert rows[-1] == pytest.approx(3 * SIDE + 2 * GAP, abs=2)
    widths = [np.ptp(np.flatnonzero(shown[row * (SIDE + GAP) + SIDE // 3])) + 1 for row in range(3)]
    assert widths == [pytest.approx(size, abs=2) for size in (SIDE * 30 / 40, SIDE * 30 / 40, SIDE)]


@pytest.mark.parametrize("grid", CUBES.values(), ids=CUBES)
def test_folds_are_magenta_where_they_are_and_nowhere_else(grid: Grid, tmp_path: Path) -> None:
    image = ball(grid, np.zeros(3))
    whole = drawn(tmp_path / "none.png", grid, image)
    assert not any((tile(whole, row, "Jacobian") == MAGENTA).all(-1).any() for row in range(3))
    # A block near the middle is turned inside out along its first voxel axis.
    points = world_points(grid) - grid.centre
    offset = 5 * DIRECTIONS["R"] + 4 * DIRECTIONS["P"] + 3 * DIRECTIONS["I"]
    inside = np.abs(points - offset).max(-1) < 8
    along = points @ grid.affine[:3, 0] / grid.spacing[0] ** 2  # in voxels
    displacement = torch.zeros(1, 3, *grid.shape)
    displacement[0, 0] = torch.from_numpy(np.where(inside, -2.5 * along, 0)).float()
    whole = drawn(tmp_path / "folds.png", grid, image, displacement)
    for row, plane in enumerate(PLANES):
        _, right, top, _ = (DIRECTIONS[letter] for letter in plane.sides)
        marked = (tile(whole, row, "Jacobian") == MAGENTA).all(-1)
        expected = np.array([right @ offset, top @ offset]) / 40
        assert np.abs(middle_of(marked) - expected).max() < 0.06, plane.name
        assert marked.mean() == pytest.approx((16 / 40) ** 2, rel=0.4)


def test_the_jacobian_is_white_where_nothing_changes_its_volume_red_where_it_grows(tmp_path: Path) -> None:
    grid = CUBES["plain"]
    points = torch.from_numpy(world_points(grid) - grid.centre).movedim(-1, 0)[None].float()
    colours = {}
    for name, factor in (("still", 0.0), ("grows", 0.3), ("shrinks", -0.3)):
        whole = drawn(tmp_path / f"{name}.png", grid, ball(grid, np.zeros(3)), factor * points)
        colours[name] = tile(whole, 0, "Jacobian")[SIDE // 2, SIDE // 2]
    assert np.ptp(colours["still"]) <= 2
    assert colours["still"].min() > 240
    assert colours["grows"][0] > colours["grows"][2] + 50
    assert colours["shrinks"][2] > colours["shrinks"][0] + 50


@pytest.mark.parametrize("grid", CUBES.values(), ids=CUBES)
def test_the_grid_goes_where_the_deformation_reads(grid: Grid, tmp_path: Path) -> None:
    """Reading 0.4 mm farther to the patient's left moves the lines, of 1 to 2 mm, to the right of the axial plane."""
    image = ball(grid, np.zeros(3))
    way = np.linalg.inv(grid.affine[:3, :3]) @ (0.4 * DIRECTIONS["L"])
    moved = torch.from_numpy(way).float().view(1, 3, 1, 1, 1).expand(1, 3, *grid.shape)
    profiles = []
    for name, displacement in (("still", torch.zeros_like(moved)), ("moved", moved)):
        whole = drawn(tmp_path / f"{name}.png", grid, image, displacement)
        lines = tile(whole, 0, "deformed grid")
        profiles.append((lines[..., 0] - lines[..., 2]).mean(0))  # gold is what is not grey
    shifts = range(-2, 3)  # pixels
    matches = [np.corrcoef(profiles[0][20:-20], np.roll(profiles[1], -by)[20:-20])[0, 1] for by in shifts]
    assert shifts[int(np.argmax(matches))] == round(0.4 * SIDE / 40)
    assert (np.abs(lines - GOLD).max(-1) < 60).any()


def test_a_fold_of_one_voxel_is_seen_where_voxels_are_smaller_than_pixels() -> None:
    """Each voxel of some rows in turn, so that none falls between two pixels."""
    middle, step = 165, 8
    for offset in range(step):
        determinant = np.ones((330, 330), np.float32)
        folded = np.arange(step + offset, 320, step)
        determinant[folded, middle + offset] = -0.5
        marked = (np.asarray(_with_folds(Image.new("RGB", (SIDE, SIDE)), determinant)) == MAGENTA).all(-1)
        # The plane's axes end where the picture begins.
        x = ((330 - 0.5 - folded) * SIDE / 330).astype(int)
        y = int((330 - 0.5 - middle - offset) * SIDE / 330)
        assert marked[y, x].all()
        assert marked[:, x].sum() >= 2 * marked[y, x].sum()
        assert marked.sum() <= 9 * len(x)


def ink(band: NDArray[np.uint8], gap: int = GAP) -> list[NDArray[np.uint8]]:
    """What is written in a band, (length, …): runs with a gap of white between them."""
    written = np.flatnonzero((band < 255).reshape(len(band), -1).any(1))
    ends = np.flatnonzero(np.diff(written) > gap)
    parts = zip(np.append(written[0], written[ends + 1]), np.append(written[ends], written[-1]) + 1, strict=True)
    return [band[first:last] for first, last in parts]


@pytest.mark.parametrize("extent", [(40, 40, 200), (256, 256, 30), (20, 200, 20)], ids=["tall", "flat", "long"])
def test_titles_and_names_are_whole_whatever_the_scans_proportions(
    extent: tuple[int, int, int], tmp_path: Path
) -> None:
    grid = make_grid((20, 20, 20), tuple(size / 20 for size in extent))
    whole = drawn(tmp_path / "p.png", grid, ball(grid, np.zeros(3)))
    usual = drawn(tmp_path / "usual.png", CUBES["plain"], ball(CUBES["plain"], np.zeros(3)))
    titles = [ink(each[TOP - 16 : TOP, LEFT:].swapaxes(0, 1))[:-1] for each in (whole, usual)]  # then the bar's
    names = [ink(each[TOP:, : LEFT - 2]) for each in (whole, usual)]
    for (found, expected), count in ((titles, len(COLUMNS)), (names, len(PLANES))):
        assert len(found) == len(expected) == count
        assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    assert (whole[: TOP - 20, -GAP:] == 255).all()


def test_labels_that_meet_none_before_the_start_have_a_dice_of_zero_there() -> None:
    """One that both scans have, elsewhere until the start; and none in the fixed scan, as of no lesion."""
    grid = CUBES["plain"]
    apart = np.eye(4)
    apart[0, 3] = 500.0
    far = Grid(grid.shape, apart @ grid.affine)
    image = ball(grid, np.zeros(3))
    labels = (image > 500).int()
    fixed, moving = Scan(image, grid, Path("fixed.nii.gz")), Scan(image, far, Path("moving.nii.gz"))
    still = Registration(torch.zeros(1, 3, *grid.shape))
    said = []
    for there in (1, 0):
        scans = Scans(fixed, moving, replace(fixed, data=there * labels), replace(moving, data=labels))
        result = finish(scans, Frame(grid, far, grid, apart), "center", still)
        said.append(key_figures(figures(result, compare(result))))
    assert "Dice 0.000 before, 1.000 after" in said[0]
    assert not any("Dice" in words for words in said[1])


def test_the_lines_of_the_grid_are_as_far_apart_along_every_axis(tmp_path: Path) -> None:
    """In mm, however thick the slices are."""
    grid = make_grid((80, 80, 20), (0.5, 0.5, 2.0), signs=(-1, -1, 1))
    whole = drawn(tmp_path / "p.png", grid, torch.arange(80.0 * 80 * 20).view(1, 1, 80, 80, 20))
    counts = []
    for row in range(3):
        drawn_lines = tile(whole, row, "deformed grid")
        gold = drawn_lines[..., 0] - drawn_lines[..., 2]
        for axis in range(2):
            profile = gold.mean(axis)
            lines = profile > (profile.max() + np.median(profile)) / 2.5
            counts.append(int((np.diff(lines.astype(int)) == 1).sum()) + int(lines[0]))
    assert counts == [20] * 6


@pytest.mark.parametrize(
    ("size", "shown"), [((190, 190), "RLAP"), ((190, 30), "RL"), ((25, 25), "RL"), ((20, 190), "AP"), ((190, 4), "")]
)
def test_letters_that_have_no_room_are_left_out(size: tuple[int, int], shown: str) -> None:
    """So that those that are there can be read."""
    cut = Image.new("RGB", size)
    _name(cut, PLANES[0])
    white = np.asarray(cut).min(-1) > 200
    wide, high = size[0] // 3, size[1] // 3
    where = {"R": np.s_[high:-high, :wide], "L": np.s_[high:-high, -wide:], "A": np.s_[:high, wide:-wide]}
    where["P"] = np.s_[-high:, wide:-wide]
    assert "".join(letter for letter, place in where.items() if white[place].any()) == shown


def test_a_name_of_many_lines_is_written_in_one(tmp_path: Path) -> None:
    grid = CUBES["plain"]
    scan = Scan(ball(grid, np.zeros(3)), grid, Path("new\nline.nii.gz"))
    still = Registration(torch.zeros(1, 3, *grid.shape))
    whole = written(tmp_path / "p.png", finish(Scans(scan, scan), Frame(grid, grid, grid, np.eye(4)), "none", still))
    assert len(ink(whole[: TOP - 20, :400], gap=1)) == 3


def test_a_long_name_is_whole(tmp_path: Path) -> None:
    grid = CUBES["plain"]
    scan = Scan(ball(grid, np.zeros(3)), grid, Path("sub-" + 120 * "x" + "_T1w.nii.gz"))
    still = Registration(torch.zeros(1, 3, *grid.shape))
    whole = written(tmp_path / "p.png", finish(Scans(scan, scan), Frame(grid, grid, grid, np.eye(4)), "none", still))
    assert (whole[: TOP - 20, -GAP:] == 255).all()


def test_what_is_no_number_is_drawn_as_nothing() -> None:
    assert (coloured(np.array([np.nan, 0.0]), GREYS) == 0).all()


def test_a_scan_of_few_voxels_is_drawn(tmp_path: Path) -> None:
    grid = make_grid((2, 3, 2), (1.0, 40.0, 0.01))
    whole = drawn(tmp_path / "p.png", grid, torch.arange(12.0).view(1, 1, 2, 3, 2))
    axial = tile(whole, 0, "fixed")
    rows = [np.unique(axial[SIDE * third // 6]) for third in (1, 3, 5)]  # the middle of each voxel
    below = whole[TOP + SIDE + GAP :, LEFT : LEFT + SIDE]
    rows += [np.unique(line) for line in below if (line < 255).any()]  # a pixel high: coronal and sagittal
    greys = [[0, 6], [2, 8], [4, 10], [2, 8], [6, 8, 10]]  # of 11, the brightest
    for found, expected in zip(rows, greys, strict=True):
        np.testing.assert_allclose(found[found < 255], 255 / 11 * np.array(expected), atol=2)


def test_files_of_any_name_are_named(tmp_path: Path) -> None:
    """Letters that a font lacks become boxes, all alike; those of many languages are there."""
    masks = [bytes(font(12).getmask(letter)) for letter in "→·äéñøžЖΩ"]
    assert len({bytes(font(12).getmask("\U0010ffff")), *masks}) == 1 + len(masks)
    grid = CUBES["plain"]
    scan = Scan(ball(grid, np.zeros(3)), grid, Path("Schädel.nii.gz"))
    still = Registration(torch.zeros(1, 3, *grid.shape))
    result = finish(Scans(scan, scan), Frame(grid, grid, grid, np.eye(4)), "none", still)
    named = written(tmp_path / "a.png", result)
    other = replace(result, scans=Scans(replace(scan, path=Path("Kopf.nii.gz")), scan))
    assert (named[:TOP] != written(tmp_path / "b.png", other)[:TOP]).any()
    assert (named[TOP:] == np.asarray(Image.open(tmp_path / "b.png"))[TOP:]).all()


def test_a_picture_that_cannot_be_written_is_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"p\.png: cannot be written \(No such file or directory\)"):
        drawn(tmp_path / "missing" / "p.png", CUBES["plain"], ball(CUBES["plain"], np.zeros(3)))
