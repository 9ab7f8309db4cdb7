"""Measure the methods of a Label app through the REST interface of MONAI Label's server, as docs/clinicians.md says.

    python benchmarks/label_app.py --dataset-dir DIR [--server http://127.0.0.1:8000] [--write]

DIR holds the hippocampus scans (images/, labels/, splits.json). Each scan of the split test is uploaded to every method
that the server offers; what comes back is compared with the scan's own labels. --write puts the table into
docs/clinicians.md, and draws its picture.
"""

import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import fire
import numpy as np
import requests
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from requests_toolbelt.multipart.decoder import MultipartDecoder

from documents import machine_line, paragraphs, replace_part, table
from iregzoo.datasets import Entry, find_scans
from iregzoo.metrics import dice, mean_of
from iregzoo.space.scan import Scan, read_labels, read_scan
from iregzoo.tables import counted

PAGE = Path(__file__).resolve().parents[1] / "docs" / "clinicians.md"
PICTURE = PAGE.with_suffix("") / "labels.png"
LABELS = (1, 2)
COLOURS = {1: (0.95, 0.55, 0.1), 2: (0.1, 0.65, 0.95)}
TIMEOUT_S = 600


@dataclass(frozen=True)
class Answer:
    """What a method says of a patient.

    Attributes:
        scan, true, found: the scan, its own labels, and those that came back.
        report: the figures that came with them.
        seconds: from the request to the answer.
    """

    scan: Scan
    true: Scan
    found: Scan
    report: dict[str, Any]
    seconds: float

    @property
    def dice(self) -> float:
        return mean_of(dice(self.found.data, self.true.data, LABELS))


def ask(server: str, method: str, entry: Entry, folder: Path) -> Answer:
    """Upload a scan to a method; an answer that is no label map ends the measurement with its reason."""
    scan = read_scan(entry["image"])
    options = {"result_extension": ".nii.gz", "result_dtype": "uint8"}
    begin = time.perf_counter()
    said = requests.post(
        f"{server}/infer/{method}?output=all",
        data={"params": json.dumps(options)},
        files={"file": ("scan.nii.gz", Path(entry["image"]).read_bytes())},
        timeout=TIMEOUT_S,
    )
    seconds = time.perf_counter() - begin
    if said.status_code != 200:
        raise SystemExit(f"{method}, {entry['image']}: {said.status_code} {said.text[:300]}")
    report, labels = (part.content for part in MultipartDecoder.from_response(said).parts)
    path = folder / "labels.nii.gz"
    path.write_bytes(labels)
    return Answer(scan, read_labels(entry["label"], scan), read_labels(path, scan), json.loads(report), seconds)


def ask_all(server: str, entries: Sequence[Entry]) -> Iterator[tuple[str, list[Answer]]]:
    """The answers of every method."""
    models = requests.get(f"{server}/info/", timeout=TIMEOUT_S).json()["models"]
    with TemporaryDirectory() as scratch:
        for method in models:
            yield method, [ask(server, method, entry, Path(scratch)) for entry in entries]


def cells(method: str, answers: Sequence[Answer]) -> tuple[str, ...]:
    """A method's row of the table."""
    overlaps = [answer.dice for answer in answers]
    doubted = sum(bool(answer.report["warnings"]) for answer in answers)
    seconds = mean(answer.seconds for answer in answers[1:])  # the first waits for the weights
    return (
        method,
        f"{mean(overlaps):.3f} ± {stdev(overlaps):.3f}",
        f"{min(overlaps):.3f}",
        str(doubted),
        f"{seconds:.1f}",
        answers[0].report["weights_sha256"][:8],
    )


def picture(answer: Answer, path: Path) -> None:
    """Draw a patient's slices, and the labels that came back on them, beside the true ones."""
    planes = [np.argmax((answer.true.data[0, 0] > 0).numpy().sum(others)) for others in ((1, 2), (0, 2), (0, 1))]
    figure = Figure(figsize=(7.5, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    rows = ((None, "scan"), (answer.found, "labels that came back"), (answer.true, "labels by hand"))
    axes = figure.subplots(3, 3)
    for column, (labels, title) in enumerate(rows):
        axes[0, column].set_title(title, fontsize=10)
        for row, index in enumerate(planes):
            shown = overlay(answer.scan, labels, row, int(index))
            axes[row, column].imshow(shown.transpose(1, 0, 2), origin="lower", interpolation="nearest")
            axes[row, column].set_axis_off()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=90, facecolor="white")


def overlay(scan: Scan, labels: Scan | None, across: int, index: int) -> NDArray[np.float64]:
    """A plane of a scan as colours (X, Y, 3), its labels half transparent."""
    low, high = scan.limits
    grey = np.clip((np.take(scan.data[0, 0].numpy(), index, across) - low) / (high - low), 0, 1)
    shown = np.repeat(grey[..., None], 3, axis=2).astype(np.float64)
    if labels is not None:
        plane = np.take(labels.data[0, 0].numpy(), index, across)
        for value, colour in COLOURS.items():
            shown[plane == value] = 0.5 * shown[plane == value] + 0.5 * np.array(colour)
    return shown


def main(dataset_dir: str, server: str = "http://127.0.0.1:8000", write: bool = False) -> None:
    """Measure, print the table and, where asked, write it into the page; the server is one of this machine."""
    entries = find_scans(dataset_dir, "test")
    heads = ("method", "Dice, mean ± sd", "worst scan", "scans with warnings", "s a request", "weights")
    rows = []
    best: list[Answer] = []
    for method, answers in ask_all(server, entries):
        rows.append(cells(method, answers))
        print(*rows[-1], sep="  ", flush=True)
        best = max(best, answers, key=lambda found: sum(answer.dice for answer in found))
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    text = paragraphs(table(heads, rows), f"{counted(len(entries), 'scan')}; server on {machine_line(machine)}.")
    print(text)
    if write:
        replace_part(PAGE, "dice", Path(__file__).name, text)
        picture(sorted(best, key=lambda answer: answer.dice)[len(best) // 2], PICTURE)


if __name__ == "__main__":
    fire.Fire(main)
