"""Write the table of pairs of a split for ``iregzoo evaluate``: each scan as fixed, the next one as moving, cyclic.

    python benchmarks/pair_table.py --dataset-dir DIR --split SPLIT [--template FOLDER | --scans] [--output pairs.csv]

DIR holds images/, labels/ and splits.json. With --template, the template in FOLDER is the moving scan of every pair.
With --scans, the table lists the single scans, for ``iregzoo template``. Without --output the table goes to standard
output.
"""

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from iregzoo.datasets import Entry, find_scans
from iregzoo.template import IMAGE, LABELS


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset-dir", required=True, type=Path)
    parser.add_argument("--split", required=True)
    parser.add_argument("--template", type=Path)
    parser.add_argument("--scans", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    scans = find_scans(arguments.dataset_dir.absolute(), arguments.split)
    rows: list[tuple[str, ...]]
    if arguments.scans:
        rows = [("image", "labels"), *((scan["image"], scan["label"]) for scan in scans)]
    else:
        rows = [("fixed", "moving", "fixed_labels", "moving_labels"), *pairs(scans, arguments.template)]
    stream = arguments.output.open("w", newline="", encoding="utf-8") if arguments.output else sys.stdout
    with stream:
        csv.writer(stream).writerows(rows)


def pairs(scans: Sequence[Entry], template: Path | None) -> Iterator[tuple[str, ...]]:
    """Every scan with the next one, or with the template: image and image, label map and label map."""
    moved = [*scans[1:], *scans[:1]]
    if template:
        folder = template.absolute()
        moved = [Entry(image=str(folder / IMAGE), label=str(folder / LABELS))] * len(scans)
    for fixed, moving in zip(scans, moved, strict=True):
        yield fixed["image"], moving["image"], fixed["label"], moving["label"]


if __name__ == "__main__":
    main()
