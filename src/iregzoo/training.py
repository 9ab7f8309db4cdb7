"""Training and validation on pairs of scans: the training step, the checks before it, and post-processing."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import ignite.distributed as idist
import numpy as np
import torch
from monai.transforms import Transform
from torch import Tensor

from iregzoo.cards import write_card as write_card  # the name of these six in configs
from iregzoo.datasets import find_scans as find_scans
from iregzoo.devices import check_device as check_device
from iregzoo.errors import InputError
from iregzoo.fields import sample as read_at
from iregzoo.fields import warp
from iregzoo.flags import check_count, is_count
from iregzoo.iteration import FixedIterations
from iregzoo.losses import RegistrationLoss, one_hot
from iregzoo.pairs import CyclicPairs as CyclicPairs
from iregzoo.pairs import LoadScan as LoadScan
from iregzoo.pairs import RandomPairs as RandomPairs
from iregzoo.pairs import Sample, plain
from iregzoo.precision import trains_in_bfloat16
from iregzoo.registration import PairNetwork
from iregzoo.similarity import ncc
from iregzoo.states import check_state, read_state


@dataclass(frozen=True)
class TrainStep:
    """One step of MONAI's ``SupervisedTrainer``, as its ``iteration_update``.

    Gives every loss term under its name, and the learning rate.

    Args:
        amp: run the network in bfloat16 (fields and losses stay in float32); ``auto`` where a device computes it, and
            not where it would be emulated, which takes several times as long as float32.
        passes: refinements a level, of which each step takes one at random (the same for the same iteration). The
            papers train with one; weights that have seen more stay accurate when iterated.
        clip: largest norm of a step's gradient, to which a longer one is shortened; 0 for any. One pair that goes wrong
            can cost a training all that it has learned.

    Raises:
        InputError: where the loss or a gradient to be clipped is not finite, for a ``clip`` or ``passes`` that are
            none, for several passes of a method that takes one, and for bfloat16 on a CPU with a shape that it gets
            wrong.
    """

    amp: bool | str = False
    passes: Sequence[int] = (1,)
    clip: float = 0.0

    def __post_init__(self) -> None:
        trains_in_bfloat16(self.amp, torch.device("cpu"))  # refuses what is none
        if not isinstance(self.clip, (int, float)) or not 0 <= self.clip < math.inf:
            raise InputError(f"clip {self.clip!r}: give the maximum gradient norm, or 0 for no limit")
        if not isinstance(self.passes, Sequence) or not self.passes or not all(map(is_count, self.passes)):
            raise InputError(f"passes {self.passes!r}: give a list of numbers of passes a level, such as [1] or [1,2]")

    def __call__(self, engine: Any, batch: Sample) -> dict[str, float]:
        device = engine.state.device
        image = batch["image"].to(device)
        labels = batch["label"].to(device) if "label" in batch else None
        passes = np.random.default_rng(engine.state.iteration).choice(list(self.passes))
        controller = FixedIterations(int(passes))
        network = getattr(engine.network, "module", engine.network)
        if network.controller is None and max(self.passes) > 1:
            raise InputError(f"passes {list(self.passes)}: this method runs a single pass; set passes to [1]")
        amp = trains_in_bfloat16(self.amp, device)
        if amp and device.type == "cpu":
            _check_bfloat16(image.shape[2], network.stride)
        engine.network.train()
        engine.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            registration = engine.network(image, True, controller)
        loss: RegistrationLoss = engine.loss_function
        channels = [image[:, :1], image[:, 1:]]
        if labels is not None:
            channels += [labels[:, :1], labels[:, 1:]]
        landmarks: dict[str, Tensor] = {}  # by name, and only those there are: not every loss takes them
        if "points" in batch:
            points = batch["points"].to(device)
            landmarks = {"moving_points": points[:, 0], "fixed_points": points[:, 1]}
        terms = loss(registration, *channels, **landmarks)
        _check_finite(terms["loss"], "loss", engine.state.iteration)
        torch.autograd.backward(terms["loss"])
        if self.clip:
            norm = torch.nn.utils.clip_grad_norm_(engine.network.parameters(), self.clip)
            _check_finite(norm, "gradient", engine.state.iteration)
        engine.optimizer.step()
        found = {name: float(value.detach()) for name, value in terms.items()}
        return {**found, "learning_rate": float(engine.optimizer.param_groups[0]["lr"])}


def _check_finite(number: Tensor, name: str, step: int) -> None:
    """Refuse what would make the weights worthless, before it does."""
    if not number.isfinite():
        raise InputError(
            f"the {name} of step {step} is not finite; lower learning_rate and run the same command again to resume "
            "from the last checkpoint"
        )


def _check_bfloat16(depth: int, stride: int) -> None:
    """Refuse a first axis that comes down to 2 voxels at a coarse level.

    There torch 2.13 on a CPU (oneDNN) gives a 3×3×3 convolution in bfloat16 a gradient of its weights that is garbage.
    """
    if depth <= 2 * stride and depth.bit_count() == 1:
        raise InputError(
            f"shape {depth} along the first axis: a coarse level would have 2 voxels there, where torch's bfloat16 on "
            "a CPU gives wrong gradients; choose another shape, or set amp to false"
        )


def prepare_pairs(batch: Sample, device: torch.device, non_blocking: bool = False, **_: Any) -> tuple[Tensor, Tensor]:
    """MONAI's ``prepare_batch`` for validation: the images (B, 2, *shape), and as target the label maps (B, 2, *shape).

    Landmarks (B, 2, K, 3) are the target where there are no label maps, and the images where there is neither.
    """
    target = next(batch[kind] for kind in ("label", "points", "image") if kind in batch)
    return batch["image"].to(device, non_blocking=non_blocking), target.to(device, non_blocking=non_blocking)


def prepare_landmarks(
    batch: Sample, device: torch.device, non_blocking: bool = False, **_: Any
) -> tuple[Tensor, Tensor]:
    """As ``prepare_pairs``, with landmarks (B, 2, K, 3) as target, also of scans that have label maps besides."""
    image, points = batch["image"], batch["points"]
    return image.to(device, non_blocking=non_blocking), points.to(device, non_blocking=non_blocking)


def label_values(labels: Sequence[int] | None, scans: Sequence[Sample]) -> tuple[int, ...]:
    """The label values to compare: those given, or if None every one above 0 in the scans' label maps.

    Raises:
        InputError: for what is no list of whole numbers.
    """
    if labels is not None:
        listed = isinstance(labels, Sequence) and not isinstance(labels, str)
        if not listed or not all(isinstance(each, int) for each in labels):
            raise InputError(
                f"labels {labels!r}: give a list of whole numbers, such as [1,2]; for all, null in a config file "
                "and '$None' on the command line"
            )
        return tuple(labels)
    found = {int(value) for scan in scans if "label" in scan for value in scan["label"].unique()}
    return tuple(sorted(value for value in found if value > 0))


def check_measurable(scans: Sequence[Sample], measured: Transform) -> None:
    """Refuse, before any step, scans of the val split that have nothing to be measured by.

    Args:
        scans: of the split; anatomies, which are no scans yet, are taken as they are.
        measured: the validation's post-processing.

    Raises:
        InputError: where label maps or landmarks are wanted that a scan has not, and where no label map has any of the
            labels to compare.
    """
    scans = [scan for scan in scans if isinstance(scan, Mapping)]
    kind = {WarpLabels: "label", LandmarkErrors: "points"}.get(type(measured))
    if kind is not None and any(kind not in scan for scan in scans):
        wanted = "label maps" if kind == "label" else "landmarks"
        raise InputError(
            f"validation needs {wanted}, but scans of val have none; provide them, or add configs/unlabelled.json to "
            "the config files to validate by the similarity of the images"
        )
    if isinstance(measured, WarpLabels) and scans:
        found = label_values(None, scans)
        if not set(measured.labels) & set(found):
            raise InputError(
                f"labels {list(measured.labels)}: the label maps of val have none of them, but {list(found[:20])}; set "
                "labels to those to compare"
            )


def check_processes(pairs: int) -> None:
    """Refuse, before any step, fewer pairs to validate than the processes that are to share them.

    Raises:
        InputError: saying how many there are.
    """
    processes = idist.get_world_size()
    if pairs < processes:
        raise InputError(f"{pairs} pairs to validate for {processes} processes; give more, or start fewer processes")


def check_network(network: PairNetwork, shape: Sequence[int], start: str | None = None) -> None:
    """Refuse, before any scan is read, a grid that a network cannot take and weights that it cannot start from.

    Args:
        network: to be trained.
        shape: of the grid.
        start: file of the initial weights, or None; of an evaluation, of the weights to measure.

    Raises:
        InputError: for a shape that is none or that the network's stride does not divide, a file that is missing or
            holds no weights, and as ``check_state`` does.
    """
    sizes = list(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else []
    if len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise InputError(f"shape {shape!r}: give the voxels of three axes, such as [160,192,160]")
    if any(size % network.stride for size in sizes):
        fit = [-(-size // network.stride) * network.stride for size in sizes]
        raise InputError(f"shape {sizes}: must be multiples of {network.stride} voxels for this network, such as {fit}")
    if start is None:
        return
    if not isinstance(start, (str, Path)):
        raise InputError(f"start {start!r}: give the file of the initial weights, or null to begin from none")
    path = Path(start)
    if not path.is_file():
        raise InputError(f"{start}: no such file; give a file of weights, or for a training's start null for none")
    check_state(network.state_dict(), read_state(path), path)


class WarpLabels(Transform):
    """After inference: ``pred`` and ``label`` become what a Dice metric compares, warped and fixed labels one-hot.

    Args:
        labels: the label values to compare.
    """

    def __init__(self, labels: Sequence[int]) -> None:
        self.labels = tuple(labels)

    def __call__(self, data: Sample) -> Sample:
        maps = plain(data["label"])[None]
        warped = warp(maps[:, :1], plain(data["pred"])[None], mode="nearest")
        return {**data, "pred": one_hot(warped, self.labels)[0], "label": one_hot(maps[:, 1:], self.labels)[0]}


class ImageSimilarity(Transform):
    """After inference: ``pred`` becomes the NCC (1,) of the warped moving image and the fixed one, ``label`` zero.

    The mean absolute error of the two is the mean NCC, of which a negative one counts as 0.
    """

    def __call__(self, data: Sample) -> Sample:
        images = plain(data["image"])[None]
        found = ncc(warp(images[:, :1], plain(data["pred"])[None]), images[:, 1:]).clamp(min=0)
        return {**data, "pred": found, "label": torch.zeros_like(found)}


class LandmarkErrors(Transform):
    """After inference: ``pred`` becomes each landmark's distance (K,) in mm to where it should be, ``label`` zeros.

    The mean absolute error of the two is the target registration error. A fixed image's landmark goes along the
    displacement, and should come to the moving image's.

    Args:
        spacing: of the network's grid, in mm.
    """

    def __init__(self, spacing: Sequence[float]) -> None:
        self.spacing = tuple(spacing)

    def __call__(self, data: Sample) -> Sample:
        moving, fixed = plain(data["label"])
        places = fixed.T.reshape(1, 3, -1, 1, 1)
        moved = fixed + read_at(plain(data["pred"])[None], places, padding="border").reshape(3, -1).T
        distances = torch.linalg.vector_norm((moved - moving) * moved.new_tensor(self.spacing), dim=1)
        return {**data, "pred": distances, "label": torch.zeros_like(distances)}


def epochs(steps: int, steps_per_epoch: int) -> int:
    """How many epochs hold so many steps; a part of one becomes a whole one, and there is one at least.

    Raises:
        InputError: for numbers that are none.
    """
    check_count(steps_per_epoch, "steps_per_epoch")
    if not isinstance(steps, int):
        raise InputError(f"steps {steps!r}: give a whole number")
    return -(-max(1, steps) // steps_per_epoch)


def latest_checkpoint(folder: str | Path, most: int) -> str | None:
    """The training checkpoint with the most epochs in a folder, None where there is none.

    One that an interruption cut off while it was written (no longer a whole archive) does not count.

    Args:
        folder: of the training.
        most: epochs that the training is to have.

    Raises:
        InputError: where the checkpoint has more.
    """
    named = ((re.fullmatch(r"(?:.*_)?checkpoint_epoch=(\d+)", path.stem), path) for path in Path(folder).glob("*.pt"))
    found = {int(name[1]): path for name, path in named if name and is_zipfile(path)}
    if not found:
        return None
    if max(found) > most:
        raise InputError(
            f"{found[max(found)]}: has {max(found)} epochs, more than the {most} of steps; raise steps, keep "
            "steps_per_epoch, or choose another output_dir"
        )
    return str(found[max(found)])
