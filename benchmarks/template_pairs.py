"""Write the table of pairs of a split for ``iregzoo evaluate``: each scan as fixed, a template as moving.

    python benchmarks/template_pairs.py --dataset-dir DIR --split val --template FOLDER --output pairs.csv

DIR holds images/, labels/ and splits.json; FOLDER the template. Without --output the table goes to standard output.
"""

import argparse
import csv
import sys
from pathlib import Path

from iregzoo.datasets import find_scans
from iregzoo.template import IMAGE, LABELS


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset-dir", required=True, type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--template", required=True, type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    template = arguments.template.absolute()
    stream = arguments.output.open("w", newline="", encoding="utf-8") if arguments.output else sys.stdout
    with stream:
        writer = csv.writer(stream)
        writer.writerow(("fixed", "moving", "fixed_labels", "moving_labels"))
        for scan in find_scans(arguments.dataset_dir.absolute(), arguments.split):
            writer.writerow((scan["image"], template / IMAGE, scan["label"], template / LABELS))


if __name__ == "__main__":
    main()
