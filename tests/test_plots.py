"""Pictures of an evaluation: the cases they choose, the slice they show, and that they are written."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from iregzoo.cases import Case
from iregzoo.errors import InputError
from iregzoo.measure import Row
from iregzoo.plots import Extremes, cases_picture, overlap_plot, time_plot
from iregzoo.quality import compare
from iregzoo.register import Result, Scans, finish
from iregzoo.registration import Registration
from iregzoo.space.frame import Frame
from iregzoo.space.grid import Grid
from iregzoo.space.scan import Scan

SHAPE = (12, 15, 18)


def make_result(signs: tuple[int, int, int] = (-1, -1, 1), *, labels: bool = True) -> Result:
    """A pair whose only label lies in coronal slices 4 to 9, most of it in slice 6, seen as it was by ``signs``."""
    image = torch.rand(1, 1, *SHAPE, generator=torch.manual_seed(0))
    label = torch.zeros(1, 1, *SHAPE, dtype=torch.int32)
    label[..., 3:8, 4:9, 6:12] = 2
    label[..., 2:9, 6, 5:14] = 2
    affine = np.diag([*(sign * size for sign, size in zip(signs, (1.0, 1.5, 2.0), strict=True)), 1.0])
    grid = Grid(SHAPE, affine)
    # Axes that run right, anterior, superior have the signs −, −, + in LPS; others are stored the other way round.
    turned = [2 + axis for axis, (sign, ras) in enumerate(zip(signs, (-1, -1, 1), strict=True)) if sign != ras]
    scan, label_map = (Scan(data.flip(turned), grid, Path("scan.nii.gz")) for data in (image, label))
    scans = Scans(scan, scan, label_map, label_map) if labels else Scans(scan, scan)
    still = Registration(torch.zeros(1, 3, *SHAPE))
    return finish(scans, Frame(grid, grid, grid, np.eye(4)), "none", still)


def make_row(bundle: str, dice: float, seconds: float = 1.0, **labels: float) -> Row:
    return {"bundle": bundle, "controller": "", "dice_mean": dice, "ncc_after": 0.5, "seconds": seconds} | labels


def see(extremes: Extremes, row: Row, name: str, result: Result) -> None:
    extremes.see(Case("fixed", name), row, result, compare(result))


def assert_drawn(path: Path) -> None:
    pixels = imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 200
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


def test_best_and_worst_of_each_method_are_remembered(tmp_path: Path) -> None:
    extremes, result = Extremes(), make_result()
    for bundle, scores in (("iirp", (0.7, 0.9, 0.4)), ("greedy", (0.5, 0.5, 0.6))):
        for number, score in enumerate(scores):
            see(extremes, make_row(bundle, score), f"moving_{number}", result)
    assert {name: case.name for name, case in extremes.best.items()} == {
        "iirp": "moving_1 → fixed",
        "greedy": "moving_2 → fixed",
    }
    assert {name: case.score for name, case in extremes.worst.items()} == {"iirp": 0.4, "greedy": 0.5}
    cases_picture(extremes, tmp_path / "cases.png")
    assert_drawn(tmp_path / "cases.png")


@pytest.mark.parametrize("signs", [(-1, -1, 1), (1, -1, 1), (1, 1, -1)])
def test_the_slice_is_the_coronal_one_with_most_labels_however_it_is_stored(signs: tuple[int, int, int]) -> None:
    extremes, result = Extremes(), make_result(signs)
    see(extremes, make_row("iirp", 1.0), "moving", result)
    snapshot = extremes.best["iirp"]
    assert snapshot.fixed_labels is not None
    expected = make_result().scans
    assert expected.fixed_labels is not None
    np.testing.assert_array_equal(snapshot.fixed_labels, expected.fixed_labels.data[0, 0, :, 6].numpy())
    assert np.corrcoef(snapshot.warped.ravel(), expected.fixed.data[0, 0, :, 6].numpy().ravel())[0, 1] > 0.99
    assert snapshot.aspect == pytest.approx(2.0)


def test_without_labels_correlation_chooses(tmp_path: Path) -> None:
    extremes, result = Extremes(), make_result(labels=False)
    for number, ncc in enumerate((0.3, 0.8)):
        see(extremes, make_row("iirp", math.nan) | {"ncc_after": ncc}, str(number), result)
    assert extremes.best["iirp"].score == 0.8
    assert extremes.best["iirp"].fixed_labels is None
    cases_picture(extremes, tmp_path / "cases.png")
    assert_drawn(tmp_path / "cases.png")


def test_overlap_and_time_are_drawn(tmp_path: Path) -> None:
    rows = [make_row(name, 0.6 + 0.1 * i, 0.1 + i, dice_1=0.6, dice_2=0.8) for name in ("a", "b") for i in range(3)]
    rows.append(make_row("b", math.nan, 2.0))
    overlap_plot(rows, {"1": "anterior"}, tmp_path / "dice.png")
    time_plot(rows, tmp_path / "time.png")
    assert_drawn(tmp_path / "dice.png")
    assert_drawn(tmp_path / "time.png")


def test_without_labels_there_are_no_boxes_and_time_shows_correlation(tmp_path: Path) -> None:
    rows = [make_row("iirp", math.nan)]
    overlap_plot(rows, {}, tmp_path / "dice.png")
    time_plot(rows, tmp_path / "time.png")
    assert not (tmp_path / "dice.png").exists()
    assert_drawn(tmp_path / "time.png")


def test_a_picture_that_cannot_be_written_is_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"time\.png: cannot be written"):
        time_plot([make_row("iirp", 0.5)], tmp_path / "gone" / "time.png")
