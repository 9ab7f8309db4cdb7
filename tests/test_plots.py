"""Pictures of an evaluation: the cases they choose, what stands in each, and that they are written."""

import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from numpy.typing import NDArray

from iregzoo.cases import Case
from iregzoo.errors import InputError
from iregzoo.measure import Row
from iregzoo.plots import (
    FIXED_COLOUR,
    WARPED_COLOUR,
    Extremes,
    Snapshot,
    cases_figure,
    cases_picture,
    overlap_figure,
    overlap_plot,
    time_figure,
    time_plot,
)
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


def snapshot(method: str, word: str, score: float, *, labels: bool = True) -> Snapshot:
    """Grey images of the score's brightness, 4×6 mm, and a label of a voxel in each map: not the same one."""
    maps: list[NDArray[np.float32] | None] = [None, None]
    if labels:
        maps = [np.zeros((4, 3), np.float32) for _ in range(2)]
        maps[0][1, 1] = maps[1][2, 1] = 3
    images = np.full((4, 3), score, np.float32), np.full((4, 3), score / 2, np.float32)
    return Snapshot(f"{word} of {method}", labels, score, *images, *maps, aspect=2.0)


def test_label_maps_without_a_label_show_correlation() -> None:
    """As of a lesion that neither scan has."""
    result = make_result()
    scans = result.scans
    empty = replace(scans.fixed, data=torch.zeros_like(scans.fixed.data, dtype=torch.int32))
    result = replace(result, scans=replace(scans, fixed_labels=empty, moving_labels=empty), warped_labels=empty.data)
    extremes = Extremes()
    see(extremes, {"bundle": "iirp", "controller": "", "ncc_after": 0.25}, "pair", result)
    assert [axis.get_title() for axis in cases_figure(extremes).axes] == ["", "NCC 0.250"] * 2


def test_no_two_of_many_methods_look_alike() -> None:
    rows = [make_row(f"method{number}", 0.8 + number / 100) for number in range(13)]
    lines = [container.lines[0] for container in time_figure(rows).axes[0].containers]
    assert len({(to_hex(line.get_color()), line.get_marker()) for line in lines}) == len(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as for a hatch that a later matplotlib refuses
        axis = overlap_figure([{**each, "dice_1": each["dice_mean"]} for each in rows], {}).axes[0]  # type: ignore[union-attr]
    assert len({(to_hex(patch.get_facecolor()), patch.get_hatch()) for patch in axis.patches}) == len(rows)
    assert axis.get_title() == "Dice by structure, 1 pair"


def legend(figure: Figure) -> list[str]:
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]


def boxes(axis: Axes) -> list[tuple[float, float, float, float]]:
    """The middle of each box, its lower end, its median and its upper end."""
    level = [(np.mean(x), y[0]) for x, y in (line.get_data() for line in axis.lines) if len(x) and np.ptp(y) == 0]
    found = []
    for patch in axis.patches:
        (left, low), (right, high) = patch.get_path().get_extents().get_points()
        # The ends of the whiskers are level, too: the median lies within the box.
        median = sorted(y for x, y in level if left < x < right)[1]
        found.append(((left + right) / 2, low, median, high))
    return found


def outlines(axis: Axes) -> dict[str, list[float]]:
    """The ends of what each colour outlines: left, bottom, right and top."""
    return {
        to_hex(lines.get_edgecolor()[0]): lines.get_paths()[0].get_extents().extents.tolist()
        for lines in axis.collections
    }


def test_best_and_worst_of_each_method_are_remembered() -> None:
    extremes, result = Extremes(), make_result()
    for bundle, scores in (("iirp", (0.7, 0.9, 0.4)), ("greedy", (0.5, 0.5, 0.6))):
        for number, score in enumerate(scores):
            see(extremes, make_row(bundle, score), f"moving_{number}", result)
    assert {name: case.name for name, case in extremes.best.items()} == {
        "iirp": "moving_1 → fixed",
        "greedy": "moving_2 → fixed",
    }
    assert {name: case.score for name, case in extremes.worst.items()} == {"iirp": 0.4, "greedy": 0.5}


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


def test_a_case_without_labels_is_no_extreme_beside_those_with_labels() -> None:
    extremes, labelled, bare = Extremes(), make_result(), make_result(labels=False)
    see(extremes, make_row("iirp", math.nan) | {"ncc_after": 0.1}, "bare", bare)
    for number, dice in enumerate((0.7, 0.6)):
        see(extremes, make_row("iirp", dice), str(number), labelled)
    see(extremes, make_row("iirp", math.nan) | {"ncc_after": 0.9}, "bare", bare)
    assert (extremes.best["iirp"].score, extremes.worst["iirp"].score) == (0.7, 0.6)


def test_without_labels_correlation_chooses() -> None:
    extremes, result = Extremes(), make_result(labels=False)
    for number, ncc in enumerate((0.3, 0.8)):
        see(extremes, make_row("iirp", math.nan) | {"ncc_after": ncc}, str(number), result)
    assert extremes.best["iirp"].score == 0.8
    assert extremes.best["iirp"].fixed_labels is None


def test_every_method_has_a_box_at_every_structure() -> None:
    """Of the pairs that have it: a structure that a pair lacks is a smaller box's."""
    rows = [make_row("a", mean, dice_1=one, dice_12=0.3) for mean, one in ((0.4, 0.1), (0.5, 0.2), (0.9, 0.6))]
    rows += [make_row("b", 0.7, dice_1=0.7, dice_12=0.8), make_row("b", math.nan)]
    figure = overlap_figure(rows, {"1": "anterior"})
    assert figure is not None
    (axis,) = figure.axes
    ticks = [(text.get_position()[0], text.get_text()) for text in axis.get_xticklabels()]
    assert ticks == [(0, "mean of labels"), (1, "anterior"), (2, "label 12")]
    found = {"a": boxes(axis)[:3], "b": boxes(axis)[3:]}
    assert np.array(found["a"])[:, 1:] == pytest.approx(np.array([[0.45, 0.5, 0.7], [0.15, 0.2, 0.4], [0.3] * 3]))
    assert np.array(found["b"])[:, 1:] == pytest.approx(np.array([[0.7] * 3, [0.7] * 3, [0.8] * 3]))
    for place in range(3):
        one, other = (found[method][place][0] for method in "ab")
        assert place - 0.5 < one < place < other < place + 0.5
    colours = [to_hex(patch.get_facecolor()) for patch in axis.patches]
    assert [len(set(part)) for part in (colours[:3], colours[3:], colours)] == [1, 1, 2]
    assert legend(figure) == ["a", "b"]
    assert axis.get_title() == "Dice by structure, 3 pairs"


def test_a_single_structure_is_no_mean_and_none_is_no_figure() -> None:
    figure = overlap_figure([make_row("iirp", 0.5, dice_4=0.5)], {})
    assert figure is not None
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["label 4"]
    assert overlap_figure([make_row("iirp", math.nan)], {}) is None


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "no labels"])
def test_accuracy_stands_against_time(labels: bool) -> None:
    """The mean and the deviation of the sample, of correlation where there is no overlap."""
    values = {"a": ((0.5, 1.0), (0.6, 2.0), (0.7, 6.0)), "b": ((0.9, 0.2),)}
    rows = [make_row(name, math.nan, seconds) for name in values for _, seconds in values[name]]
    for row, (value, _) in zip(rows, (pair for pairs in values.values() for pair in pairs), strict=True):
        row["dice_mean" if labels else "ncc_after"] = value
    figure = time_figure([*rows, make_row("nothing", math.nan) | {"ncc_after": math.nan}])
    (axis,) = figure.axes
    points = [container.lines[0].get_xydata()[0].tolist() for container in axis.containers]
    assert points == [pytest.approx((3.0, 0.6)), pytest.approx((0.2, 0.9))]
    bars = [container.lines[2][0].get_segments()[0][:, 1].tolist() for container in axis.containers]
    assert bars == [pytest.approx((0.5, 0.7)), pytest.approx((0.9, 0.9))]
    assert axis.get_xscale() == "log"
    assert axis.get_ylabel() == ("Dice, mean ± sd" if labels else "NCC, mean ± sd")
    assert legend(figure) == ["a", "b"]


def test_cases_show_both_scans_their_labels_and_how_they_did() -> None:
    extremes = Extremes()
    for number, method in enumerate(("iirp", "greedy")):
        extremes.best[method] = snapshot(method, "best", 0.9 - 0.1 * number)
        extremes.worst[method] = snapshot(method, "worst", 0.5 - 0.1 * number)
    axes = np.reshape(cases_figure(extremes).axes, (2, 4))
    titles = [[axis.get_title("left") + axis.get_title() for axis in row] for row in axes]
    assert titles == [
        ["best: best of iirp", "Dice 0.900", "worst: worst of iirp", "Dice 0.500"],
        ["best: best of greedy", "Dice 0.800", "worst: worst of greedy", "Dice 0.400"],
    ]
    assert [row[0].get_ylabel() for row in axes] == ["iirp", "greedy"]
    brightness = [[float(axis.images[0].get_array().mean()) for axis in row] for row in axes]
    assert brightness == [pytest.approx(row) for row in ((0.9, 0.45, 0.5, 0.25), (0.8, 0.4, 0.4, 0.2))]
    fixed, warped = to_hex(FIXED_COLOUR), to_hex(WARPED_COLOUR)
    for axis in axes.flat:
        assert axis.get_xlim() == (3.5, -0.5)  # the patient's right on the left
        assert axis.get_aspect() == 2.0
    for axis in axes[:, 0::2].flat:
        assert outlines(axis) == {fixed: [0.5, 0.5, 1.5, 1.5]}
    for axis in axes[:, 1::2].flat:
        assert outlines(axis) == {fixed: [0.5, 0.5, 1.5, 1.5], warped: [1.5, 0.5, 2.5, 1.5]}


def test_cases_without_labels_have_no_outlines_and_show_correlation() -> None:
    pair = snapshot("iirp", "only", 0.25, labels=False)
    axes = cases_figure(Extremes({"iirp": pair}, {"iirp": pair})).axes
    assert [axis.get_title() for axis in axes] == ["", "NCC 0.250"] * 2
    assert not any(axis.collections for axis in axes)


def test_a_long_name_leaves_the_axes_their_room() -> None:
    name = "ipear@experiments/of/a/researcher/runs_of_this_month/a_training/best.pt"
    rows = [make_row(name, 0.6, dice_1=0.6), make_row("iirp", 0.7, 2.0, dice_1=0.7)]
    for figure in (overlap_figure(rows, {}), time_figure(rows)):
        assert figure is not None
        figure.canvas.draw()
        assert figure.axes[0].get_position().width > 0.3
        assert "".join(legend(figure)[0].split()) == name
    pair = snapshot(name, "only", 0.25)
    figure = cases_figure(Extremes({name: pair}, {name: pair}))
    figure.canvas.draw()
    assert figure.axes[0].yaxis.label.get_window_extent().height < figure.bbox.height


def test_each_is_written(tmp_path: Path) -> None:
    """With what is drawn in it: a picture of bare axes has no colours."""
    rows = [make_row("iirp", 0.6, dice_1=0.6), make_row("iirp", 0.7, 2.0, dice_1=0.7)]
    pair = snapshot("iirp", "only", 0.25)
    overlap_plot(rows, {}, tmp_path / "dice.png")
    time_plot(rows, tmp_path / "time.png")
    cases_picture(Extremes({"iirp": pair}, {"iirp": pair}), tmp_path / "cases.png")
    for name in ("dice", "time", "cases"):
        pixels = imread(tmp_path / f"{name}.png")[..., :3]
        assert min(pixels.shape[:2]) > 200
        assert np.ptp(pixels, axis=-1).max() > 0.5


def test_dollars_in_names_are_no_formulas(tmp_path: Path) -> None:
    name = "iirp@p$a_$.pt"
    rows = [make_row(name, 0.6, dice_1=0.6, dice_2=0.6)]
    pair = snapshot(name, "$a_$", 0.25)
    overlap_plot(rows, {"1": "$a_$"}, tmp_path / "dice.png")
    time_plot(rows, tmp_path / "time.png")
    cases_picture(Extremes({name: pair}, {name: pair}), tmp_path / "cases.png")
    assert {path.name for path in tmp_path.iterdir()} == {"dice.png", "time.png", "cases.png"}


def test_without_labels_no_boxes_are_written(tmp_path: Path) -> None:
    overlap_plot([make_row("iirp", math.nan)], {}, tmp_path / "dice.png")
    assert not (tmp_path / "dice.png").exists()


def test_a_picture_that_cannot_be_written_is_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"time\.png: cannot be written"):
        time_plot([make_row("iirp", 0.5)], tmp_path / "gone" / "time.png")
