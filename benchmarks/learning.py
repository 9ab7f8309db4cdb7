"""Does each method learn? Untrained it must change next to nothing; a few hundred steps must raise the Dice on val.

For each bundle: the size of the field of a freshly initialised network on ten test scans, then a short training with
the bundle's hippocampus recipe, and the Dice on val without registration and after it.
"""

import argparse
import json
import logging
import tempfile
import warnings
from pathlib import Path

import monai.bundle
import torch
from monai.metrics import DiceMetric
from torch import Tensor

from iregzoo import zoo
from iregzoo.fields import warp
from iregzoo.iteration import FixedIterations, IterStop
from iregzoo.losses import one_hot
from iregzoo.registration import PairNetwork
from iregzoo.training import CyclicPairs, LoadScan, find_scans

ROOT = Path(__file__).resolve().parents[1]
LABELS = (1, 2)
SHAPE, SPACING = (48, 64, 48), (1.0, 1.0, 1.0)
TEST_SCANS = 10


def pairs(dataset_dir: Path, split: str, count: int | None = None) -> CyclicPairs:
    """Cyclic pairs of a split's first scans on the recipe's grid."""
    load = LoadScan(SPACING, SHAPE)
    return CyclicPairs([load(scan) for scan in find_scans(dataset_dir, split)[:count]])


@torch.inference_mode()
def untrained_field(bundle: str, test: CyclicPairs) -> Tensor:
    """Lengths in voxels, (pairs, *shape), of the fields of a freshly initialised network."""
    torch.manual_seed(0)
    network = zoo.untrained(zoo.find(bundle)).eval()
    fields = [network(test[index]["image"][None])[0] for index in range(len(test))]
    return torch.stack([torch.linalg.vector_norm(field, dim=0) for field in fields])


@torch.inference_mode()
def mean_dice(val: CyclicPairs, network: PairNetwork | None = None) -> float:
    """Mean Dice of the pairs as they are, or registered by a network.

    Methods that iterate do so under IterStop: TCI takes every refinement, and those of weights that are hardly trained
    lead away.
    """
    iterates = network is not None and not isinstance(network.controller, FixedIterations | None)
    controller = IterStop() if iterates else None
    metric = DiceMetric()
    for index in range(len(val)):
        pair = val[index]
        moving, fixed = (pair["label"][None, channel : channel + 1] for channel in (0, 1))
        if network is not None:
            moving = warp(moving, network(pair["image"][None], False, controller), mode="nearest")
        metric(one_hot(moving, LABELS), one_hot(fixed, LABELS))
    return float(metric.aggregate())


def trained(bundle: str, dataset_dir: Path, output: str, steps: int) -> PairNetwork:
    """A bundle's network after a short training."""
    configs = ROOT / "bundles" / bundle / "configs"
    recipe = json.loads((configs / "train_hippocampus.json").read_text("utf-8"))
    # A schedule of levels is shortened with the training.
    schedule = (
        {"starts": [start * steps // recipe["steps"] for start in recipe["starts"]]} if "starts" in recipe else {}
    )
    workflow = monai.bundle.create_workflow(
        config_file=[str(configs / "train.json"), str(configs / "train_hippocampus.json")],
        workflow_type="train",
        bundle_root=str(configs.parent),
        dataset_dir=str(dataset_dir),
        output_dir=output,
        steps=steps,
        steps_per_epoch=steps,
        val_interval=1,
        save_interval=1,
        **schedule,
    )
    logging.disable(logging.INFO)
    workflow.run()
    network: PairNetwork = workflow.parser.get_parsed_content("network_def")
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset-dir", type=Path, required=True, help="images/, labels/ and splits.json")
    parser.add_argument("--bundles", nargs="+", default=[bundle.name for bundle in zoo.bundles()])
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    test, val = pairs(arguments.dataset_dir, "test", TEST_SCANS), pairs(arguments.dataset_dir, "val")
    before = mean_dice(val)
    print(f"{len(test)} test pairs untrained; {arguments.steps} steps; {len(val)} val pairs, unregistered {before:.3f}")
    for bundle in arguments.bundles:
        lengths = untrained_field(bundle, test)
        with tempfile.TemporaryDirectory() as output:
            after = mean_dice(val, trained(bundle, arguments.dataset_dir, output, arguments.steps))
        print(
            f"{bundle}: untrained field finite {bool(lengths.isfinite().all())}, {lengths.mean():.4f} voxel on "
            f"average, at most {lengths.max():.3f}; Dice {before:.3f} → {after:.3f} ({after - before:+.3f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
