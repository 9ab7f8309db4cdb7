"""Build a template from the train split of a data set, by groupwise registration.

    python benchmarks/build_template.py --dataset-dir DIR --bundle iirp --weights hippocampus --rounds 3 --output FOLDER

DIR holds images/, labels/ and splits.json. FOLDER gets template.nii.gz, labels.nii.gz and labels.json; with --each, the
same of each round goes to round_0, round_1 … in it. The names of the labels are those on the weights' card.
"""

import argparse
import time
from pathlib import Path

from iregzoo.datasets import find_scans
from iregzoo.errors import InputError
from iregzoo.template import build_template, read_group, write_template
from iregzoo.zoo import load


def build(arguments: argparse.Namespace) -> None:
    method = load(arguments.bundle, arguments.weights)
    group = read_group(find_scans(arguments.dataset_dir, arguments.split), method)
    names = {int(value): name for value, name in method.card.labels.items()}
    begin = time.perf_counter()
    for number, template in enumerate(build_template(group, method, rounds=arguments.rounds)):
        counts = {value: int((template.labels == value).sum()) for value in group.values if value}
        print(f"round {number}: {time.perf_counter() - begin:.0f} s, voxels of the labels {counts}", flush=True)
        if arguments.each:
            write_template(arguments.output / f"round_{number}", template, group, names)
        if number == arguments.rounds:
            write_template(arguments.output, template, group, names)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset-dir", required=True, type=Path)
    parser.add_argument("--split", default="train")
    parser.add_argument("--bundle", default="iirp")
    parser.add_argument("--weights", help="a name on the bundle's card (default: its first), or a file")
    parser.add_argument("--rounds", default=3, type=int)
    parser.add_argument("--each", action="store_true", help="write every round")
    parser.add_argument("--output", required=True, type=Path)
    try:
        build(parser.parse_args())
    except InputError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
