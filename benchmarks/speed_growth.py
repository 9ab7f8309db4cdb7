"""How time and memory of one pass grow with the number of voxels."""

import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, NullFormatter, NullLocator
from monai.bundle import ConfigParser

from documents import paragraphs, table
from iregzoo import zoo
from iregzoo.iteration import FixedIterations
from iregzoo.precision import resolve
from iregzoo.registration import PairNetwork
from meter import Found, Settings, Shape, begin_peak, child, median_seconds, peak_gigabytes, smooth_pair
from verdicts import number, size, slope

SHAPES: tuple[Shape, ...] = ((64, 64, 64), (96, 96, 96), (128, 128, 128), (160, 192, 160), (192, 224, 192))
FIGURES = {"seconds": "seconds", "gigabytes": "peak memory, GB"}
PICTURE = "growth.svg"
WIDE = "ad_regnet_paper"  # with as many channels as in the paper
NOTE = """\
One pass a level, in the precision that each card chooses here; memory as above. The slope is that of the logarithms,
by least squares over the grids that were measured: 1 is linear. On small grids what every run needs weighs more,
which makes a slope smaller; more than 1 means that large grids cost more a voxel. Neither says anything of grids
beyond the largest. `ad_regnet_paper` is AD-RegNet with its paper's channels (`configs/paper_width.json`) and random
weights."""


@torch.inference_mode()
def run(bundle: str, shape: Shape, runs: int, device: str) -> Found:
    """Measure one pass a level of a method in a child process."""
    network = (wide() if bundle == WIDE else zoo.load(bundle, device=device).network).to(device)
    controller = FixedIterations() if network.controller is not None else None
    image = smooth_pair(shape).to(device)
    held = begin_peak(device)
    (seconds,) = median_seconds([lambda: network.register(image, controller)], runs, device)
    precision = resolve(network.precision, device)
    return {"seconds": seconds, "gigabytes": peak_gigabytes(device) - held, "precision": precision}


def wide() -> PairNetwork:
    """AD-RegNet with its paper's channels, and random weights: nobody has trained it here."""
    bundle = zoo.find("ad_regnet")
    configs = ConfigParser()
    configs.read_config([str(bundle.path / "configs" / name) for name in ("inference.json", "paper_width.json")])
    network: PairNetwork = configs.get_parsed_content("network_def")
    network = zoo.complete(network, zoo.find_weights(bundle).card).eval().requires_grad_(False)
    return network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload,no-any-return]


def measure(settings: Settings) -> Found:
    """Every method on every grid; one that the memory does not suffice is kept as such."""
    rows = []
    names = [*(bundle.name for bundle in zoo.bundles()), WIDE]
    for name in filter(settings.wants, names):
        for shape in settings.shapes or SHAPES:
            given: Found = {"bundle": name, "shape": shape, "runs": settings.runs, "device": settings.device}
            row = {"bundle": name, "shape": list(shape), **child(__name__, "run", settings.threads, **given)}
            rows.append(row)
            print(row, flush=True)
    return {"rows": rows}


def show(found: Found) -> str:
    """The part of the page."""
    return paragraphs(
        *(_table(found, figure, words) for figure, words in FIGURES.items()),
        f"![seconds and peak memory against voxels](benchmarks/{PICTURE})",
        NOTE,
    )


def _table(found: Found, figure: str, words: str) -> str:
    shapes = sorted({tuple(row["shape"]) for row in found["rows"]}, key=math.prod)
    rows = []
    for name, members in _by_bundle(found).items():
        cells = {tuple(row["shape"]): row.get("failed") or number(row[figure]) for row in members}
        measured = [row for row in members if "failed" not in row]
        grown = slope([math.prod(row["shape"]) for row in measured], [row[figure] for row in measured])
        precisions = {row["precision"]: None for row in measured}  # one, but where nothing could be measured
        rows.append((", ".join((name, *precisions)), *(cells.get(shape, "") for shape in shapes), number(grown)))
    return table((words, *map(size, shapes), "slope"), rows)


def _by_bundle(found: Found) -> dict[str, list[Found]]:
    groups: dict[str, list[Found]] = {}
    for row in found["rows"]:
        groups.setdefault(row["bundle"], []).append(row)
    return groups


def draw(found: Found, folder: Path) -> None:
    """Both figures against voxels, a line a method, and what linear would be."""
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (name, words) in zip(figure.subplots(1, 2), FIGURES.items(), strict=True):
        for bundle, members in _by_bundle(found).items():
            measured = sorted((math.prod(row["shape"]), row[name]) for row in members if "failed" not in row)
            axis.loglog(*np.array(measured).reshape(-1, 2).T, "o-", markersize=4, label=bundle)
        low, high = axis.get_xlim()
        bottom, _ = axis.get_ylim()
        axis.loglog([low, high], [bottom, bottom * high / low], color="gray", linestyle=":", label="linear")
        voxels = sorted({math.prod(row["shape"]) for row in found["rows"]})
        axis.set_xticks(voxels, [f"{count / 1e6:.2g}" for count in voxels], minor=False)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set(xlabel="million voxels", ylabel=words)
        axis.grid(alpha=0.3, which="both")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper")
    # The same figures give the same file, with letters as text.
    with matplotlib.rc_context({"svg.hashsalt": PICTURE, "svg.fonttype": "none"}):
        figure.savefig(folder / PICTURE, facecolor="white", metadata={"Date": None})
