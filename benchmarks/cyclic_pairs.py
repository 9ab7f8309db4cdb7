"""Write the table of pairs of a split for ``iregzoo evaluate``: each scan as fixed, the next one as moving, cyclic.

    python benchmarks/cyclic_pairs.py --dataset-dir DIR --split test --output pairs.csv

DIR holds images/, labels/ and splits.json. Without --output the table goes to standard output.
"""

import argparse
import csv
import sys
from pathlib import Path

from iregzoo.datasets import find_scans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset-dir", required=True, type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    scans = find_scans(arguments.dataset_dir.absolute(), arguments.split)
    stream = arguments.output.open("w", newline="", encoding="utf-8") if arguments.output else sys.stdout
    with stream:
        writer = csv.writer(stream)
        writer.writerow(("fixed", "moving", "fixed_labels", "moving_labels"))
        for fixed, moving in zip(scans, scans[1:] + scans[:1], strict=True):
            writer.writerow((fixed["image"], moving["image"], fixed["label"], moving["label"]))


if __name__ == "__main__":
    main()
