"""What a person looks at to compare methods: overlap by structure, accuracy against time, best and worst cases."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter

from iregzoo.cases import Case
from iregzoo.errors import InputError
from iregzoo.measure import Row
from iregzoo.planes import Volume, canonical
from iregzoo.quality import Comparison
from iregzoo.register import Result
from iregzoo.space.grid import canonical_axes
from iregzoo.tables import by_method, counted, label_columns, numbers, title

FIXED_COLOUR, WARPED_COLOUR = "lime", "magenta"
CORONAL = 1
LINE = 24  # letters of a method's title
COLOURS = 10
MARKERS = ("o", "s", "^", "v", "D", "P", "*", "X", "<", ">")
HATCHES = ("", "/", ".", "x", "-", "\\", "+", "o", "|", "*")


def overlap_plot(rows: Sequence[Row], label_names: Mapping[str, str], path: Path) -> None:
    """Write ``overlap_figure`` as a picture; nothing where no pair has labels.

    Raises:
        InputError: where the file cannot be written.
    """
    figure = overlap_figure(rows, label_names)
    if figure is not None:
        _save(figure, path)


def overlap_figure(rows: Sequence[Row], label_names: Mapping[str, str]) -> Figure | None:
    """Box plots of Dice by structure and method; None where no pair has labels.

    Boxes span the quartiles with the median inside, whiskers reach to the last pair within 1.5 times that span, and
    pairs beyond are dots.
    """
    groups = list(by_method(rows).values())
    columns = label_columns(rows)
    if not columns:
        return None
    columns = ["dice_mean", *columns] if len(columns) > 1 else columns
    figure = _figure(max(5.0, 1.6 + 0.3 * len(columns) * (len(groups) + 1)), 4.6)
    axis = figure.subplots()
    width = 0.8 / len(groups)
    for index, members in enumerate(groups):
        places = [column + (index - (len(groups) - 1) / 2) * width for column in range(len(columns))]
        drawn = axis.boxplot(
            [numbers(members, name) for name in columns],
            positions=places,
            widths=0.85 * width,
            patch_artist=True,
            manage_ticks=False,
            boxprops={"facecolor": _colour(index), "hatch": _cycle(index, HATCHES)},
            medianprops={"color": "black"},
            flierprops={"markersize": 3},
        )
        drawn["boxes"][0].set_label(_label(title(members[0])))
    axis.set_xticks(range(len(columns)), [_structure(name, label_names) for name in columns], rotation=30, ha="right")
    axis.set_ylabel("Dice")
    most = max(len(numbers(members, "dice_mean")) for members in groups)
    axis.set_title(f"Dice by structure, {counted(most, 'pair')}")
    axis.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper")
    return figure


def _structure(column: str, label_names: Mapping[str, str]) -> str:
    return "mean of labels" if column == "dice_mean" else label_names.get(column[5:], f"label {column[5:]}")


def time_plot(rows: Sequence[Row], path: Path) -> None:
    """Write ``time_figure`` as a picture.

    Raises:
        InputError: where the file cannot be written.
    """
    _save(time_figure(rows), path)


def time_figure(rows: Sequence[Row]) -> Figure:
    """Accuracy against seconds a pair, a point a method: mean and standard deviation of Dice, or of NCC without labels.

    A method none of whose pairs could be measured has no point.
    """
    groups = by_method(rows).values()
    metric = "dice_mean" if any(numbers(members, "dice_mean") for members in groups) else "ncc_after"
    figure = _figure(6.4, 4.6)
    axis = figure.subplots()
    for index, members in enumerate(groups):
        values, seconds = numbers(members, metric), numbers(members, "seconds")
        if values:
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            axis.errorbar(
                float(np.mean(seconds)),
                float(np.mean(values)),
                yerr=spread,
                fmt=_cycle(index, MARKERS),
                capsize=4,
                color=_colour(index),
                label=_label(title(members[0])),
            )
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(LogFormatter())
    axis.xaxis.set_minor_formatter(LogFormatter())
    axis.set_xlabel("seconds per pair (mean)")
    axis.set_ylabel("Dice, mean ± sd" if metric == "dice_mean" else "NCC, mean ± sd")
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper")
    return figure


@dataclass(frozen=True)
class Snapshot:
    """A coronal slice of a registered pair, axes running right and superior: images in [0, 1], and label maps.

    Attributes:
        labelled: whether its score is Dice; NCC where there are no labels, which ranks behind every Dice.
        score: of them.
        fixed, warped: (X, Z).
        fixed_labels, warped_labels: (X, Z), or None.
        aspect: height of a pixel over its width.
    """

    name: str
    labelled: bool
    score: float
    fixed: Volume
    warped: Volume
    fixed_labels: Volume | None
    warped_labels: Volume | None
    aspect: float


@dataclass
class Extremes:
    """The best and the worst case of each method so far."""

    best: dict[str, Snapshot] = field(default_factory=dict)
    worst: dict[str, Snapshot] = field(default_factory=dict)

    def see(self, case: Case, row: Row, result: Result, images: Comparison) -> None:
        """Remember a case where it is better or worse than all before."""
        method = title(row)
        snapshot = _snapshot(case, row, result, images)
        for kept, sign in ((self.best, 1), (self.worst, -1)):
            before = kept.get(method)
            if not before or (snapshot.labelled, sign * snapshot.score) > (before.labelled, sign * before.score):
                kept[method] = snapshot


def _snapshot(case: Case, row: Row, result: Result, images: Comparison) -> Snapshot:
    grid = result.frame.fixed
    fixed_labels = result.scans.fixed_labels
    volumes = {"fixed": images.fixed, "warped": images.after}
    if fixed_labels is not None and result.warped_labels is not None:
        volumes |= {"fixed_labels": fixed_labels.data, "warped_labels": result.warped_labels}
    turned = {name: canonical(volume[0, 0], grid) for name, volume in volumes.items()}
    shown = turned.get("fixed_labels", turned["fixed"]) > 0
    along = shown.sum(axis=(0, 2))
    middle = int(along.argmax()) if along.any() else shown.shape[CORONAL] // 2
    cuts = {name: np.take(volume, middle, axis=CORONAL) for name, volume in turned.items()}
    order, _ = canonical_axes(grid)
    dice = row.get("dice_mean", math.nan)
    return Snapshot(
        case.title,
        not math.isnan(dice),
        row["ncc_after"] if math.isnan(dice) else dice,
        cuts["fixed"],
        cuts["warped"],
        cuts.get("fixed_labels"),
        cuts.get("warped_labels"),
        float(grid.spacing[order[2]] / grid.spacing[order[0]]),
    )


def cases_picture(extremes: Extremes, path: Path) -> None:
    """Write ``cases_figure`` as a picture.

    Raises:
        InputError: where the file cannot be written.
    """
    _save(cases_figure(extremes), path)


def cases_figure(extremes: Extremes) -> Figure:
    """Best and worst case of each method: the fixed scan, and the warped one, in the coronal slice with most labels.

    Labels of the fixed scan are outlined in green, warped ones in magenta.
    """
    figure = _figure(10.0, 2.9 * len(extremes.best) + 0.4)
    axes = figure.subplots(len(extremes.best), 4, squeeze=False)
    for row, method in zip(axes, extremes.best, strict=True):
        for start, word, snapshot in ((0, "best", extremes.best[method]), (2, "worst", extremes.worst[method])):
            outlines = [(snapshot.fixed_labels, FIXED_COLOUR), (snapshot.warped_labels, WARPED_COLOUR)]
            _draw(row[start], snapshot.fixed, snapshot.aspect, outlines[:1])
            _draw(row[start + 1], snapshot.warped, snapshot.aspect, outlines)
            row[start].set_title(f"{word}: {snapshot.name}", fontsize=6, loc="left")
            kind = "Dice" if snapshot.labelled else "NCC"
            row[start + 1].set_title(f"{kind} {snapshot.score:.3f}", fontsize=8)
        row[0].set_ylabel(_label(method))
    figure.suptitle("fixed scan and warped scan; outlines: fixed labels green, warped labels magenta", fontsize=9)
    return figure


def _draw(axis: Axes, image: Volume, aspect: float, outlines: Sequence[tuple[Volume | None, str]]) -> None:
    """A slice, and each label of some maps outlined in the map's colour."""
    axis.imshow(image.T, origin="lower", aspect=aspect, interpolation="nearest", cmap="gray", vmin=0, vmax=1)
    axis.set_xlim(len(image) - 0.5, -0.5)  # the patient's right on the left, as in every picture
    axis.set_xticks([])
    axis.set_yticks([])
    for labels, colour in outlines:
        if labels is not None:
            for label in np.unique(labels[labels != 0]):
                axis.contour((labels == label).T.astype(float), levels=[0.5], colors=colour, linewidths=0.8)


def _label(method: str) -> str:
    """A method's title in lines so short that the axes keep their room: weights may be a long path."""
    return fill(method, LINE)


def _colour(index: int) -> tuple[float, float, float, float]:
    colour: tuple[float, float, float, float] = colormaps["tab10"](index % COLOURS)
    return colour


def _cycle(index: int, marks: Sequence[str]) -> str:
    """A mark beside the colour: for those who see few colours, and when colours begin anew."""
    return marks[(index + index // COLOURS) % len(marks)]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(min(width, 40.0), height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # two dollars in a file's name are no formula
    try:
        figure.savefig(path, dpi=110, facecolor="white")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); free up disk space") from None
