"""A cohort that is registered in no time: small scans, and a bundle with a small network of random weights."""

import csv
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from geometry import draw_head, make_grid
from iregzoo.engines import Outcomes
from iregzoo.jobs import Job, Report
from iregzoo.zoo import build
from shell import run

SHAPE = (20, 24, 20)
OWN_NAMES = ("first", "second")
NETWORK = {
    "_target_": "iregzoo.registration.PairNetwork",
    "network": {"_target_": "iregzoo.networks.IIRPNet", "channels": [4, 8, 8], "widths": [8, 8, 8]},
}


def write_cohort(folder: Path, pairs: int) -> list[str]:
    """A table ``pairs.csv`` with its scans, and the bundle ``tiny`` below ``home``. The names that the pairs get."""
    write_bundle(folder / "home")
    heads = write_scans(folder, pairs + 1)
    rows = [row(fixed, moving) for fixed, moving in pairwise(heads)]
    own = [*OWN_NAMES, *([""] * pairs)]
    write_pairs(folder / "pairs.csv", [{**files, "name": own[place]} for place, files in enumerate(rows)])
    return [own[place] or f"head{place + 1}_to_head{place}" for place in range(pairs)]


def write_bundle(home: Path) -> None:
    """A bundle ``tiny`` in a user's folder, whose coarse levels move by some voxels."""
    torch.manual_seed(0)
    network = build(NETWORK)
    with torch.no_grad():
        for level, factor in enumerate((0.0, 3.0, 6.0)):
            for parameter in network.network.estimators[level][-1].parameters():
                parameter.mul_(factor)
    folder = home / "bundles" / "tiny"
    for name in ("configs", "models"):
        (folder / name).mkdir(parents=True)
    torch.save(network.state_dict(), folder / "models" / "model.pt")
    digest = hashlib.sha256((folder / "models" / "model.pt").read_bytes()).hexdigest()
    card = {"file": "models/model.pt", "sha256": digest, "init": "center", "description": "random"}
    (folder / "configs" / "metadata.json").write_text(json.dumps({"version": "0.0.1", "weights": {"random": card}}))
    (folder / "configs" / "inference.json").write_text(json.dumps({"network_def": NETWORK}))


def write_scans(folder: Path, number: int) -> list[str]:
    """Scans of one head, each a little larger than the one before, with their label maps."""
    grid = make_grid(SHAPE, (1.2, 1.0, 1.5))
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid.affine
    names = [f"head{place}" for place in range(number)]
    for place, name in enumerate(names):
        head = draw_head(grid, size=0.13 + 0.01 * place)[0, 0].numpy()
        nib.save(nib.Nifti1Image(head, affine), folder / f"{name}.nii.gz")
        labels = (head > 300).astype(np.uint8) + (head > 700)
        nib.save(nib.Nifti1Image(labels, affine), folder / f"{name}_labels.nii.gz")
    return names


def row(fixed: str, moving: str) -> dict[str, str]:
    """A line of a table."""
    files = {"fixed": fixed, "moving": moving, "fixed_labels": f"{fixed}_labels", "moving_labels": f"{moving}_labels"}
    return {column: f"{name}.nii.gz" for column, name in files.items()}


def write_pairs(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def command(table: Path, output: Path, *options: str) -> list[str]:
    usual = {"--pairs": str(table), "--output": str(output), "--bundle": "tiny"}
    given = [text for option, value in usual.items() if option not in options for text in (option, value)]
    return ["iregzoo", "batch", *given, *options]


def batch(table: Path, output: Path, *options: str) -> int:
    """The exit code of ``iregzoo batch``, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        return run(patch, *command(table, output, *options)[1:])


def refusal(capsys: pytest.CaptureFixture[str], table: Path, output: Path, *options: str) -> str:
    """The one line with which a batch that goes wrong ends."""
    capsys.readouterr()
    assert batch(table, output, *options) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("iregzoo: ")
    return lines[0]


def here(work: Callable[[Job], Report | str], jobs: Sequence[Job]) -> Outcomes[Job, Report]:
    """An engine without a process of its own."""
    for job in jobs:
        yield job, work(job)


def summary(output: Path) -> dict[str, dict[str, str]]:
    """The rows of a batch's summary by name, in their order."""
    with (output / "summary.csv").open(encoding="utf-8") as stream:
        return {line["name"]: line for line in csv.DictReader(stream)}


def tree(folder: Path) -> dict[str, object]:
    """Every file below a folder, hidden ones too, without the seconds in it: alike folders give alike trees."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name + os.sep] = None
        elif path.name == "report.json":
            report = json.loads(path.read_text(encoding="utf-8"))
            del report["seconds"]
            report.get("bytes", {}).pop("report.html", None)  # which says them, too
            found[name] = report
        elif path.name == "report.html":
            found[name] = re.sub(r'\d+\.\d+ s\b|"seconds": \{[^}]*\}', "", path.read_text(encoding="utf-8"))
        elif path.name == "summary.csv":
            found[name] = [
                {**line, "seconds": bool(line["seconds"])} for line in csv.DictReader(path.open(encoding="utf-8"))
            ]
        else:
            found[name] = path.read_bytes()
    return found


def at_work(output: Path) -> int:
    """How many pairs are being registered."""
    return len(list(output.glob(".*.????????.iregzoo"))) if output.exists() else 0


def wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, "waited in vain"
        time.sleep(0.02)
