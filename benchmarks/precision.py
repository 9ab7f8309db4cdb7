"""How much bfloat16 changes the fields of weights, on pairs of scans.

    python benchmarks/precision.py --pairs pairs.csv [--bundle iirp,pan] [--weights NAME] [--threads 2]

For each bundle that has the weights (of its first ones without --weights), over all pairs: the mean and the largest
distance in voxels of the network's grid between the displacement in float32 and in bfloat16, the mean Dice of both
where there are labels, and the seconds of the network in both. Weights whose mean distance is below 0.05 voxel may have
``"precision": "auto"`` on their card. Choose on pairs of a val split.
"""

import argparse
from statistics import fmean

import torch

from iregzoo.cases import read_cases
from iregzoo.metrics import dice
from iregzoo.register import Result, read_scans, register
from iregzoo.zoo import bundles, load


def mean_dice(result: Result) -> float:
    fixed, warped = result.scans.fixed_labels, result.warped_labels
    if fixed is None or warped is None:
        return float("nan")
    values = [int(label) for label in torch.unique(fixed.data) if label != 0]
    return fmean(dice(warped, fixed.data.view_as(warped), values).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--bundle", help="names with commas; all that have the weights if not given")
    parser.add_argument("--weights")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = read_cases(arguments.pairs)
    for bundle in bundles():
        wanted = not arguments.bundle or bundle.name in arguments.bundle.split(",")
        if not wanted or (arguments.weights and arguments.weights not in bundle.weights):
            continue
        methods = [load(bundle.name, arguments.weights, precision=precision) for precision in ("float32", "bfloat16")]
        means, largest, dices, seconds, iterations = [], [], [], [], 0
        for case in cases:
            scans = read_scans(case.fixed, case.moving, case.fixed_labels or None, case.moving_labels or None)
            full, half = (register(scans, method, refine=0) for method in methods)
            pair = [result.registration for result in (full, half)]
            distance = torch.linalg.vector_norm(pair[0].displacement - pair[1].displacement, dim=1)
            means.append(float(distance.mean()))
            largest.append(float(distance.max()))
            dices.append([mean_dice(full), mean_dice(half)])
            seconds.append([result.seconds["network"] for result in (full, half)])
            iterations += any(
                not torch.equal(a, b) for a, b in zip(pair[0].iterations, pair[1].iterations, strict=True)
            )
        table = torch.tensor(dices).mean(0).tolist(), torch.tensor(seconds).median(0).values.tolist()
        print(
            f"{bundle.name} {methods[0].weights.name}: {len(cases)} pairs, mean {fmean(means):.4f} voxel "
            f"(worst pair {max(means):.4f}), largest {max(largest):.2f}, other iterations in {iterations}, "
            f"Dice {table[0][0]:.4f} and {table[0][1]:.4f}, network {table[1][0]:.3f} s and {table[1][1]:.3f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
