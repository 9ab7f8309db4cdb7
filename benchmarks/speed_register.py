"""``iregzoo register`` from the shell to the written files, stage by stage."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from documents import paragraphs, table
from iregzoo.datasets import find_scans
from meter import Found, Settings
from round_trip import differences
from verdicts import Target, number, target_table

STAGES = ("start", "network", "warp", "report", "write")
STAGE_NOTE = """\
The stages are those of `report.json`; the rest is the interpreter, its imports, reading the scans and the weights,
and the page. The files were in the system's cache. Medians of the columns need not add up."""
TRIP_NOTE = """\
That is what SimpleITK alone makes of the written transforms, beside the warped scan
([benchmarks/round_trip.py](../benchmarks/round_trip.py)). All this shows time and geometry, not accuracy."""
TARGETS = {"hippocampus": 6.0, "brain": 10.0}


@dataclass(frozen=True)
class Pair:
    """Two scans, and how they are registered."""

    kind: str
    fixed: Path
    moving: Path
    options: tuple[str, ...] = ("--bundle", "iirp")

    @property
    def title(self) -> str:
        fixed, moving = (path.name.removesuffix(".nii.gz") for path in (self.fixed, self.moving))
        return f"{fixed}, {moving}"


def pairs(data: Path) -> list[Pair]:
    """Two crops of the hippocampus and two whole brains, where there are any, both ways."""
    found = []
    if (data / "hippocampus").is_dir():
        first, second = (Path(scan["image"]) for scan in find_scans(data / "hippocampus", "test")[:2])
        found.append(Pair("hippocampus", first, second))
    brains = [data / "scans" / f"t1_brain_{name}.nii.gz" for name in "ab"]
    if all(path.is_file() for path in brains):
        options = ("--bundle", "iirp", "--weights", "brain", "--init", "affine")
        found += [Pair("brain", fixed, moving, options) for fixed, moving in (brains, brains[::-1])]
    return found


def register(pair: Pair, folder: Path, threads: int) -> tuple[float, dict[str, float]]:
    """Seconds of one registration, and those of its stages as its report has them."""
    scans = ("--fixed", str(pair.fixed), "--moving", str(pair.moving), "--output", str(folder))
    command = [sys.executable, "-m", "iregzoo", "register", *scans, *pair.options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    begin = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=True)
    total = time.perf_counter() - begin
    return total, json.loads((folder / "report.json").read_text("utf-8"))["seconds"]


def measure(settings: Settings) -> Found:
    """Every pair, and what SimpleITK makes of the transforms that were written."""
    if settings.data is None:
        raise SystemExit("the part register needs scans: give --dataset-dir, or set IREGZOO_TEST_DATA")
    rows = []
    for pair in pairs(settings.data):
        if settings.wants(pair.kind):
            rows.append(_measure_one(pair, settings))
            print(rows[-1], flush=True)
    return {"rows": rows}


def _measure_one(pair: Pair, settings: Settings) -> Found:
    with TemporaryDirectory() as scratch:
        folders = [Path(scratch) / str(number) for number in range(settings.runs)]
        measured = [register(pair, folder, settings.threads) for folder in folders]
        return {
            "kind": pair.kind,
            "pair": pair.title,
            "seconds": statistics.median(total for total, _ in measured),
            "stages": {name: _median([stages.get(name, 0.0) for _, stages in measured]) for name in STAGES},
            "rest": _median([total - sum(stages.values()) for total, stages in measured]),
            "differences": differences(pair.fixed, pair.moving, folders[-1]),
        }


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def show(found: Found) -> str:
    """The part of the page."""
    rows = []
    for row in found["rows"]:
        stages = [number(row["stages"][name]) for name in STAGES]
        rows.append((row["pair"], number(row["seconds"]), *stages, number(row["rest"])))
    trips = [(row["pair"], *(f"{value:.1e}" for value in row["differences"].values())) for row in found["rows"]]
    heads = ("fixed, moving", "shell to files, s", *STAGES, "rest")
    return paragraphs(
        table(heads, rows),
        target_table(targets(found)),
        STAGE_NOTE,
        table(("largest difference, part of the range", "`transform.h5`", "`displacement.nii.gz`"), trips),
        TRIP_NOTE,
    )


def targets(found: Found) -> list[Target]:
    """What was aimed at."""
    return [Target(f"{row['pair']}: seconds", TARGETS[row["kind"]], row["seconds"]) for row in found["rows"]]
