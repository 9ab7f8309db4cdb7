"""``iregzoo register`` from the shell to the written files, stage by stage."""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from documents import paragraphs, table
from iregzoo.datasets import find_scans
from meter import Found, Settings, begin_peak, child
from verdicts import Target, number, target_table

STAGES = ("start", "network", "refine", "warp", "report", "write")
COLUMNS = {
    "seconds": "shell to files, s",
    "gigabytes": "GB",
    **{name: f"{name}, s" for name in STAGES},
    "rest": "rest, s",
}
STAGE_NOTE = """\
The stages are those of `report.json`; the rest is the interpreter, its imports, reading the scans and the weights,
and the page. The files were in the system's cache. Memory is the peak of the whole process. Medians of the columns
need not add up."""
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


def register(pair: Pair, folder: Path, threads: int) -> Found:
    """Seconds and peak memory of one registration, and seconds of its stages as its report has them."""
    scans = ("--fixed", str(pair.fixed), "--moving", str(pair.moving), "--output", str(folder))
    command = [sys.executable, "-m", "iregzoo", "register", *scans, *pair.options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    begin_peak()  # the system lets a child's peak begin with what its parent had at most
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    total = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed ({process.returncode})")
    stages = json.loads((folder / "report.json").read_text("utf-8"))["seconds"]
    rest = total - sum(stages.values())
    return {"seconds": total, "gigabytes": usage.ru_maxrss / (1 << 20), **stages, "rest": rest}


def measure(settings: Settings) -> Found:
    """Every pair, and what SimpleITK makes of the transforms that were written."""
    assert settings.data is not None  # the command line sees to it
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
        medians = {name: statistics.median(each.get(name, 0.0) for each in measured) for name in COLUMNS}
        files: Found = {"fixed": str(pair.fixed), "moving": str(pair.moving), "result": str(folders[-1])}
        found = child("round_trip", "differences", settings.threads, **files)
        return {"kind": pair.kind, "pair": pair.title, "differences": found, **medians}


def show(found: Found) -> str:
    """The part of the page."""
    rows = [(row["pair"], *(number(row[name]) for name in COLUMNS)) for row in found["rows"]]
    trips = [(row["pair"], *(f"{value:.1e}" for value in row["differences"].values())) for row in found["rows"]]
    heads = ("fixed, moving", *COLUMNS.values())
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
