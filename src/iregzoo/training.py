"""Training and validation on pairs of scans: the training step, and the validation's post-processing."""

import math
import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.engines import Evaluator
from monai.handlers import CheckpointSaver
from monai.transforms import Transform
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from iregzoo.datasets import find_scans as find_scans  # the name of these four in configs
from iregzoo.errors import InputError
from iregzoo.fields import sample as read_at
from iregzoo.fields import warp
from iregzoo.iteration import FixedIterations
from iregzoo.losses import RegistrationLoss, one_hot
from iregzoo.pairs import CyclicPairs as CyclicPairs
from iregzoo.pairs import LoadScan as LoadScan
from iregzoo.pairs import RandomPairs as RandomPairs
from iregzoo.pairs import Sample, plain
from iregzoo.precision import trains_in_bfloat16
from iregzoo.similarity import ncc


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
        InputError: where the loss or a gradient to be clipped is not finite, for a ``clip`` that is none, for several
            passes of a method that takes one, and for bfloat16 on a CPU with a shape that it gets wrong.
    """

    amp: bool | str = False
    passes: Sequence[int] = (1,)
    clip: float = 0.0

    def __post_init__(self) -> None:
        trains_in_bfloat16(self.amp, torch.device("cpu"))  # refuses what is none
        if not isinstance(self.clip, (int, float)) or not 0 <= self.clip < math.inf:
            raise InputError(f"clip {self.clip!r}: give the maximum gradient norm, or 0 for no limit")

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
    image = batch["image"]
    target = next(batch[kind] for kind in ("label", "points", "image") if kind in batch)
    return image.to(device, non_blocking=non_blocking), target.to(device, non_blocking=non_blocking)


def label_values(labels: Sequence[int] | None, scans: Sequence[Sample]) -> tuple[int, ...]:
    """The label values to compare: those given, or if None every one above 0 in the scans' label maps.

    Raises:
        InputError: for what is no list of whole numbers.
    """
    if labels is not None:
        if isinstance(labels, str) or not all(isinstance(each, int) for each in labels):
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


class ProgressiveLevels:
    """Handler of training: adds a network's levels one after the other, coarse to fine (SM-GICNet, section 4.2).

    What a step trains follows from its number alone, so that a resumed training goes on as it would have. A parameter
    that a step does not train has no gradient, and the optimizer leaves it as it is; DistributedDataParallel has to be
    told so (``find_unused_parameters=True``).

    Args:
        network: a ``PairNetwork``, or one wrapped for several processes, of a network with ``levels`` and with
            ``estimators``, one a level.
        starts: how many steps of the training are done when each level begins, the first 0.
        frozen: steps at the beginning of each level but the first in which the levels before are kept as they are.

    Raises:
        ValueError: for starts that do not increase from 0, or more of them than the network has levels.
    """

    def __init__(self, network: torch.nn.Module, starts: Sequence[int], frozen: int = 3000) -> None:
        whole: Any = getattr(network, "module", network)
        self.network = whole.network
        self.starts, self.frozen = tuple(starts), frozen
        levels = len(self.network.estimators)
        if not 1 <= len(self.starts) <= levels or self.starts[0] != 0 or sorted(set(self.starts)) != [*self.starts]:
            raise ValueError(f"starts={self.starts}; expected 1 to {levels} step numbers that increase from 0")

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        done = engine.state.iteration - 1
        level = bisect_right(self.starts, done)
        alone = done < self.starts[level - 1] + self.frozen
        self.network.levels = level
        for number, estimator in enumerate(self.network.estimators, start=1):
            estimator.requires_grad_(number >= level or not alone)


class FromCommand:
    """A learning rate's scheduler in a checkpoint: how far it has come, and nothing else.

    PyTorch's own state also holds the rates and the length that the training began with, which would win over those of
    the command that resumes it: a lower learning rate would do nothing, and a longer training end at its highest.

    Args:
        scheduler: stands at its beginning, with the command's settings.
    """

    def __init__(self, scheduler: LRScheduler) -> None:
        self.scheduler = scheduler

    def state_dict(self) -> dict[str, int]:
        return {"last_epoch": self.scheduler.last_epoch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go from the beginning to where the training stood; the optimizer's state has been loaded before."""
        for group, rate in zip(self.scheduler.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["initial_lr"] = rate
            group["lr"] = rate
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # before any optimizer.step
            for _ in range(state["last_epoch"]):
                self.scheduler.step()


def halving(step: int, *, starts: Sequence[int] = (0,), hold: int = 60_000, every: int = 50_000) -> float:
    """Factor of the learning rate at a step, anew from 1 in each level: SM-GICNet's rule (section 4.2).

    The paper halves "every 50k iterations after the first 60k iterations for each level"; the first time is read as at
    ``hold`` + ``every`` steps of the level.

    Args:
        step: steps of the training that are done, as ``LambdaLR`` counts them when it is stepped once an iteration.
        starts: the steps at which each level begins, as in ``ProgressiveLevels``.
        hold: steps of a level before counting begins.
        every: steps from one halving to the next.
    """
    within = step - max(start for start in starts if start <= step)
    return 0.5 ** (max(within - hold, 0) // every)


class SaveBest:
    """Handler of validation: keeps the weights with the best key metric in a file.

    MONAI's ``CheckpointSaver`` forgets, when a training resumes, how good its best was, and overwrites it; the state of
    this one goes into the training's checkpoint. Of several processes that train together, the first alone writes.

    Args:
        network: whose state_dict is written.
        path: of the file.
        lowest: whether the best is the lowest, as of an error, and not the highest.
    """

    def __init__(self, network: torch.nn.Module, path: str | Path, lowest: bool = False) -> None:
        self.network, self.path, self.lowest = network, Path(path), lowest
        self.best = float("inf" if lowest else "-inf")
        self.stale = 0  # validations since the best

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        value = float(engine.state.metrics[engine.state.key_metric_name])
        self.stale += 1
        if value < self.best if self.lowest else value > self.best:
            self.best, self.stale = value, 0
            if idist.get_rank() > 0:
                return
            partial = self.path.with_name(f".{self.path.name}.partial")
            torch.save(self.network.state_dict(), partial)
            partial.replace(self.path)

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best, "stale": self.stale}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.best, self.stale = state["best"], int(state["stale"])


class EarlyStop:
    """Handler of training: ends it when validation has brought nothing better for a while.

    What it counts is in the state of ``SaveBest``, so a resumed training counts on.

    Args:
        best: the handler of validation that knows the best.
        patience: validations without a better one after which training ends.
    """

    def __init__(self, best: SaveBest, patience: int) -> None:
        self.best, self.patience = best, patience

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if self.best.stale >= self.patience:
            engine.terminate()


class LossBar(ProgressBar):
    """A progress bar of training that shows the loss."""

    def attach(self, engine: Engine, *_: Any, **__: Any) -> None:
        super().attach(engine, output_transform=lambda terms: {"loss": terms["loss"]})


class LastEpoch:
    """Handler of training: validates and saves after the last epoch, too, where the intervals leave it out.

    Args:
        validator: as of ``ValidationHandler``.
        saver: of the training's checkpoints.
        val_interval, save_interval: epochs from one validation, and one checkpoint, to the next.
    """

    def __init__(self, validator: Evaluator, saver: CheckpointSaver, val_interval: int, save_interval: int) -> None:
        self.validator, self.saver = validator, saver
        self.val_interval, self.save_interval = val_interval, save_interval

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        if epoch % self.val_interval:
            self.validator.run(epoch)
        if epoch % self.save_interval:
            self.saver.interval_completed(engine)


def latest_checkpoint(folder: str | Path) -> str | None:
    """The training checkpoint with the most epochs in a folder, None where there is none.

    One that an interruption cut off while it was written (no longer a whole archive) does not count.
    """
    whole = filter(is_zipfile, Path(folder).glob("*checkpoint_epoch=*.pt"))
    found = {int(path.stem.split("=")[1]): path for path in whole}
    return str(found[max(found)]) if found else None
