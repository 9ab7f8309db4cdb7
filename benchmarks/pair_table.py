"""Write the table of pairs of a split for ``iregzoo evaluate``: each scan as fixed, the next one as moving, cyclic.

    python benchmarks/pair_table.py --dataset-dir DIR --split SPLIT [--template FOLDER] [--output pairs.csv]

DIR holds images/, labels/ and splits.json. With --template, the template in FOLDER is the moving scan of every pair.
Without --output the table goes to standard output.
"""

import argparse
import csv
import sys
from pathlib import Path

from iregzoo.datasets import Entry, find_scans
from iregzoo.template import IMAGE, LABELS


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset-dir", required=True, type=Path)
    parser.add_argument("--split", required=True)
    parser.add_argument("--template", type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    scans = find_scans(arguments.dataset_dir.absolute(), arguments.split)
    moved = scans[1:] + scans[:1]
    if arguments.template:
        folder = arguments.template.absolute()
        moved = [Entry(image=str(folder / IMAGE), label=str(folder / LABELS))] * len(scans)
    stream = arguments.output.open("w", newline="", encoding="utf-8") if arguments.output else sys.stdout
    with stream:
        writer = csv.writer(stream)
        writer.writerow(("fixed", "moving", "fixed_labels", "moving_labels"))
        for fixed, moving in zip(scans, moved, strict=True):
            writer.writerow((fixed["image"], moving["image"], fixed["label"], moving["label"]))


if __name__ == "__main__":
    main()
