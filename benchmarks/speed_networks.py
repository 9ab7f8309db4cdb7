"""Every method under its own controller: seconds, memory and iterations in both precisions, beside the floor."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from documents import paragraphs, table
from iregzoo import zoo
from iregzoo.iteration import TCI, Controller, FixedIterations, IterStop
from iregzoo.precision import Precision
from iregzoo.space.frame import make_frame, network_input
from iregzoo.space.scan import read_scan
from iregzoo.space.start import affine_start
from meter import Found, Settings, Shape, begin_peak, child, median_seconds, peak_gigabytes, smooth_pair
from speed_floor import floor_seconds, precisions
from speed_floor import rates as machine_rates
from speed_floor import work as count_work
from verdicts import NOTHING, Target, number, ratio, size, target_table

LARGE: Shape = (160, 192, 160)
SHAPES: tuple[Shape, ...] = ((80, 96, 112), LARGE)
GPU_SHAPES: tuple[Shape, ...] = ((80, 96, 112), LARGE, (160, 192, 224))


@dataclass(frozen=True)
class Variant:
    """A bundle under a controller.

    Attributes:
        bundle, controller: which.
        seconds, gigabytes: targets on a CPU at 160×192×160.
        published: seconds and gigabytes of the published code on such a CPU, with two cores.
        paper: grid and seconds on a GPU, as its paper prints them.
        weights: of the bundle; its first if None.
        brains: register the two T1 brains, on a CPU at 160×192×160, instead of a smooth random pair.
    """

    bundle: str
    controller: Controller | None = None
    seconds: float | None = None
    gigabytes: float | None = None
    published: tuple[float, float] | None = None
    paper: tuple[Shape, float] | None = None
    weights: str | None = None
    brains: bool = False


VARIANTS = {
    "RP-Net, one pass": Variant("iirp", FixedIterations(), published=(8.1, 2.1)),
    "IIRP-Net, IterStop": Variant("iirp", IterStop(), 5.0, 1.3, (14.2, 2.6), (LARGE, 0.12)),
    "iPEAR, TCI": Variant("ipear", TCI(), 8.0, paper=((80, 96, 112), 0.12)),
    "iPEAR, two passes": Variant("ipear", FixedIterations(2)),
    "PAN, one pass": Variant("pan", FixedIterations(), 7.0, 1.5, (21.0, 7.4), ((160, 192, 224), 0.6)),
    "SM-GICNet, one pass": Variant("sm_gicnet", paper=((80, 96, 112), 0.27)),
    "AD-RegNet, one pass": Variant("ad_regnet"),
    "IIRP-Net, IterStop, T1 brains": Variant("iirp", IterStop(), 5.0, 1.3, weights="brain", brains=True),
    "iPEAR, TCI, T1 brains": Variant("ipear", TCI(), 8.0, weights="brain", brains=True),
}
BRAINS = ("t1_brain_a", "t1_brain_b")  # fixed, moving
FLOOR = """\
Both were measured in the same run; here a GB is 10⁹ bytes. The floor is the longer of two times: that of the
convolutions and matrix products at the one rate, and that of what goes into and out of the layers at the other, as if
nothing stayed in a cache. Window attention, warps and scores are in neither."""
CPU_NOTE = """\
The pair is a smooth random image and a deformed copy of it, the weights are the bundles' own (hippocampus): this
shows time and memory, not accuracy, and the number of iterations is not that of whole brains. *T1 brains* are two real
ones, stripped, after an affine start on a grid of 1 mm, with the weights `brain`, which were trained at 2 mm. Memory
is the peak beyond a process that has loaded the weights and the pair; a GB is 2³⁰ bytes. The published code's figures
are of another machine with two cores, not of this run. Where the precisions took different numbers of
iterations, their fields differ by what iterations do."""
GPU_NOTE = """\
The pair is a smooth random image and a deformed copy of it, the weights are the bundles' own: this shows time and
memory, not accuracy. Memory is what torch's tensors take on the GPU at most. In float32, convolutions are in TF32, as
PyTorch has them by default, and so is the floor. The papers' figures are of their authors' GPUs."""
GPU_PART = 0.2  # of a paper's seconds, which is aimed at


@torch.inference_mode()
def run(variant: str, shape: Shape, precision: Precision, runs: int, device: str, field: str, scans: str) -> Found:
    """Measure one method in a child process; its displacement goes to a file."""
    chosen = VARIANTS[variant]
    method = zoo.load(chosen.bundle, chosen.weights, device=device, precision=precision)
    image = pair(chosen, shape, scans).to(device)
    results: list[Any] = []

    def register() -> None:
        results.clear()
        results.append(method.network.register(image, chosen.controller))

    held = begin_peak(device)
    (seconds,) = median_seconds([register], runs, device)
    gigabytes = peak_gigabytes(device) - held
    np.save(field, results[0].displacement.float().cpu().numpy())
    iterations = [int(count) for count in results[0].iterations]
    return {"seconds": seconds, "gigabytes": gigabytes, "iterations": iterations}


def work(variant: str, shape: Shape, precision: Precision, device: str, scans: str) -> Found:
    """Count what one method computes and moves, in a child process."""
    chosen = VARIANTS[variant]
    network = zoo.load(chosen.bundle, chosen.weights, device=device, precision=precision).network
    return count_work(network, pair(chosen, shape, scans).to(device), chosen.controller)


def pair(variant: Variant, shape: Shape, scans: str) -> Tensor:
    """What a variant registers: (1, 2, *shape), moving then fixed."""
    if not variant.brains:
        return smooth_pair(shape)
    fixed, moving = (read_scan(Path(scans) / f"{name}.nii.gz") for name in BRAINS)
    start = affine_start(fixed, moving, "affine")
    frame = make_frame(fixed, moving, start, spacing=(1.0, 1.0, 1.0), stride=1, minimum=tuple(shape))
    if frame.network.shape != tuple(shape):
        raise SystemExit(f"{BRAINS[0]} needs a grid of {size(frame.network.shape)}, more than {size(shape)}")
    return network_input(frame, fixed, moving)


def rates(device: str) -> Found:
    """What the machine can, in a child process."""
    return machine_rates(device)


def measure(settings: Settings) -> Found:
    """Every method on every grid, in every precision."""
    rows = []
    shapes = settings.shapes or (GPU_SHAPES if settings.device == "cuda" else SHAPES)
    wanted = [(name, shape) for name, each in VARIANTS.items() for shape in shapes if _measures(settings, each, shape)]
    with TemporaryDirectory() as scratch:
        for name, shape in wanted:
            fields = {precision: str(Path(scratch) / f"{precision}.npy") for precision in precisions(settings.device)}
            found = {precision: _measure_one(settings, name, shape, precision, fields) for precision in fields}
            row = {"method": name, "shape": list(shape), "precisions": found}
            if len(found) > 1 and not any("failed" in each for each in found.values()):
                row["difference"] = _difference(*map(np.load, fields.values()))
            rows.append(row)
            print(f"{name}, {size(shape)}: {row}", flush=True)
    machine = child(__name__, "rates", settings.threads, device=settings.device)
    return {"device": settings.device, "rates": machine, "rows": rows}


def _scans(settings: Settings) -> Path | None:
    folder = settings.data / "scans" if settings.data else None
    return folder if folder and all((folder / f"{name}.nii.gz").is_file() for name in BRAINS) else None


def _measures(settings: Settings, variant: Variant, shape: Shape) -> bool:
    if variant.brains and (settings.device != "cpu" or shape != LARGE or _scans(settings) is None):
        return False
    return settings.wants(variant.bundle)


def _measure_one(
    settings: Settings, name: str, shape: Shape, precision: Precision, fields: dict[Precision, str]
) -> Found:
    given: Found = {"variant": name, "shape": shape, "precision": precision, "device": settings.device}
    given["scans"] = str(_scans(settings) or "")
    found = child(__name__, "run", settings.threads, runs=settings.runs, field=fields[precision], **given)
    if "failed" not in found:
        found["work"] = child(__name__, "work", settings.threads, **given)
    return found


def _difference(first: Any, second: Any) -> Found:
    """Mean and largest length in voxels by which two displacements (1, 3, *shape) differ."""
    length = np.linalg.norm(first - second, axis=1)
    return {"mean": float(length.mean()), "largest": float(length.max())}


def show(found: Found) -> str:
    """The part of the page."""
    of = found["rates"]
    can = " and ".join(f"{of[name] / 1e9:.0f} GFLOP/s in {name}" for name in ("float32", "bfloat16") if name in of)
    copies = f"{of['bytes'] / 1e9:.1f} GB/s (read and written)"
    floor = f"The machine multiplies matrices at {can}, and copies {copies}.\n{FLOOR}"
    note = {"cpu": CPU_NOTE, "cuda": GPU_NOTE}[found["device"]]
    return paragraphs(_speed(found), _floors(found), floor, _differences(found), target_table(targets(found)), note)


def _lines(found: Found) -> list[tuple[Found, str, Found]]:
    return [(row, precision, of) for row in found["rows"] for precision, of in row["precisions"].items()]


def _speed(found: Found) -> str:
    rows = []
    for row, precision, of in _lines(found):
        published = VARIANTS[row["method"]].published if found["device"] == "cpu" and row["shape"] == [*LARGE] else None
        others = f"{published[0]} s, {published[1]} GB" if published else NOTHING
        counts = ", ".join(map(str, of.get("iterations", []))) or NOTHING
        seconds = of.get("failed") or number(of["seconds"])
        rows.append(
            (row["method"], size(row["shape"]), precision, seconds, number(of.get("gigabytes")), counts, others)
        )
    heads = ("method", "grid", "precision", "seconds", "GB", "iterations, coarse to fine", "published code")
    return table(heads, rows)


def _floors(found: Found) -> str:
    rows = []
    for row, precision, of in _lines(found):
        if "failed" in of or "failed" in of["work"]:
            continue
        computing, moving = floor_seconds(of["work"], found["rates"], precision)
        rows.append(
            (
                row["method"],
                size(row["shape"]),
                precision,
                number(of["work"]["operations"] / 1e9),
                number(of["work"]["bytes"] / 1e9),
                number(computing),
                number(moving),
                number(ratio(of["seconds"], max(computing, moving))),
            )
        )
    heads = ("method", "grid", "precision", "GFLOP", "GB", "s of GFLOP", "s of GB", "times the floor")
    return table(heads, rows)


def _differences(found: Found) -> str:
    rows = [
        (row["method"], size(row["shape"]), number(row["difference"]["mean"]), number(row["difference"]["largest"]))
        for row in found["rows"]
        if "difference" in row
    ]
    if not rows:
        return ""
    return table(("bfloat16 against float32, voxels", "grid", "mean", "largest"), rows)


def targets(found: Found) -> list[Target]:
    """What was aimed at, in each precision."""
    aims = []
    for row, precision, of in _lines(found):
        variant = VARIANTS[row["method"]]
        words = f"{row['method']}, {size(row['shape'])}, {precision}"
        if found["device"] == "cuda" and variant.paper and row["shape"] == [*variant.paper[0]]:
            aim = f"{words}: seconds, a fifth of the paper's {variant.paper[1]}"
            aims.append(Target(aim, GPU_PART * variant.paper[1], of.get("seconds")))
        if found["device"] == "cpu" and row["shape"] == [*LARGE]:
            limits = {"seconds": variant.seconds, "gigabytes": variant.gigabytes}
            aims += [Target(f"{words}: {name}", limit, of.get(name)) for name, limit in limits.items() if limit]
    return aims
