"""Training and validation on pairs of scans: data sets, the training step, and the validation's post-processing."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.transforms import CenterSpatialCrop, Randomizable, Transform
from monai.utils import convert_to_tensor
from torch import Tensor
from torch.utils.data import Dataset

from iregzoo.errors import InputError
from iregzoo.fields import warp
from iregzoo.iteration import FixedIterations
from iregzoo.losses import RegistrationLoss, one_hot
from iregzoo.space.grid import network_grid
from iregzoo.space.scan import normalise, read_labels, read_scan, resample_to

Sample = dict[str, Any]


def find_scans(dataset_dir: str | Path, split: str) -> list[dict[str, str]]:
    """The scans of one split of a data set, as ``{"image": path, "label": path}`` (label where there is one).

    The folder holds ``images/NAME.nii.gz``, ``labels/NAME.nii.gz`` and ``splits.json``, which names the scans of each
    split.

    Raises:
        InputError: where the layout is another.
    """
    root = Path(dataset_dir)
    listing = root / "splits.json"
    if not listing.is_file():
        raise InputError(
            f"{root}: has no splits.json; expected images/, labels/ and splits.json naming each split's scans"
        )
    splits = json.loads(listing.read_text())
    if split not in splits:
        raise InputError(f"{listing}: has no split {split!r}, only {', '.join(splits)}")
    scans = []
    for name in splits[split]:
        image, label = (root / folder / f"{name}.nii.gz" for folder in ("images", "labels"))
        if not image.is_file():
            raise InputError(f"{image}: no such file, but {listing.name} names it in {split}")
        scans.append({"image": str(image), **({"label": str(label)} if label.is_file() else {})})
    if len(scans) < 2:
        raise InputError(f"{listing}: split {split!r} has {len(scans)} scans; a pair needs two")
    return scans


class LoadScan(Transform):
    """Read a scan, and its labels where there are any, onto the network's grid: tensors (1, *shape).

    Scans are centred on each other, as registration with ``--init center`` does; what a scan has beyond ``shape`` is
    cut off evenly.

    Args:
        spacing: of the network's grid, in mm.
        shape: in voxels, divisible by the network's stride.
    """

    def __init__(self, spacing: Sequence[float], shape: Sequence[int]) -> None:
        self.spacing, self.shape = tuple(spacing), tuple(shape)
        self.crop = CenterSpatialCrop(self.shape)

    def __call__(self, data: Mapping[str, str]) -> Sample:
        scan = read_scan(data["image"])
        grid = network_grid(scan.grid, self.spacing, stride=1, minimum=self.shape)
        sample = {"image": resample_to(normalise(scan), grid)}
        if "label" in data:
            sample["label"] = resample_to(read_labels(data["label"], scan), grid, mode="nearest")
        return {key: _plain(self.crop(value[0])).contiguous() for key, value in sample.items()}


def _plain(tensor: Tensor) -> Tensor:
    """Without MONAI's metadata, which costs time at every operation."""
    plain: Tensor = convert_to_tensor(tensor, track_meta=False)
    return plain


class RandomPairs(Dataset[Sample], Randomizable):
    """Random ordered pairs of different scans, the same ones for the same seed and epoch.

    Gives ``image`` (2, *shape), moving then fixed, and ``label`` (2, *shape) where both scans have labels.

    Args:
        data: samples of ``LoadScan``.
        length: pairs an epoch.
        seed: of everything random here.
        augmentation: MONAI transform applied to each scan by itself.
        mirror: probability of mirroring a pair left to right.
    """

    def __init__(
        self,
        data: Sequence[Sample],
        length: int,
        seed: int = 0,
        augmentation: Callable[[Sample], Sample] | None = None,
        mirror: float = 0.0,
    ) -> None:
        self.scans, self.length, self.seed = data, length, seed
        self.augmentation, self.mirror = augmentation, mirror
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        random = np.random.default_rng((self.seed, self.epoch, index))
        chosen = random.choice(len(self.scans), 2, replace=False)
        scans = [dict(self.scans[i]) for i in chosen]
        if self.augmentation is not None:
            if isinstance(self.augmentation, Randomizable):
                self.augmentation.set_random_state(seed=int(random.integers(2**31)))
            scans = [self.augmentation(scan) for scan in scans]
        pair = join_pair(*scans)
        if random.random() < self.mirror:
            pair = {key: value.flip(1) for key, value in pair.items()}
        return pair

    def attach(self, engine: Engine) -> None:
        """Follow the epochs of a trainer, also of a resumed one (the protocol of MONAI's handlers)."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)

    def _start_epoch(self, engine: Engine) -> None:
        self.epoch = engine.state.epoch


class CyclicPairs(Dataset[Sample]):
    """Each scan as fixed image with the next one as moving image, the last with the first: a fixed set of pairs."""

    def __init__(self, data: Sequence[Sample]) -> None:
        self.scans = data

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, index: int) -> Sample:
        if index >= len(self):
            raise IndexError(index)
        return join_pair(self.scans[(index + 1) % len(self)], self.scans[index])


def join_pair(moving: Sample, fixed: Sample) -> Sample:
    """Two samples as one, moving in channel 0 and fixed in channel 1 of each key that both have."""
    return {key: torch.cat((_plain(moving[key]), _plain(fixed[key]))) for key in moving if key in fixed}


@dataclass(frozen=True)
class TrainStep:
    """One step of MONAI's ``SupervisedTrainer``, as its ``iteration_update``: gives every loss term under its name.

    Args:
        amp: run the network in bfloat16 (fields and losses stay in float32).
        passes: refinements a level, of which each step takes one at random (the same for the same iteration). The
            papers train with one; weights that have seen more stay accurate when iterated.
    """

    amp: bool = False
    passes: Sequence[int] = (1,)

    def __call__(self, engine: Any, batch: Sample) -> dict[str, float]:
        device = engine.state.device
        image = batch["image"].to(device)
        labels = batch["label"].to(device) if "label" in batch else None
        passes = np.random.default_rng(engine.state.iteration).choice(list(self.passes))
        controller = FixedIterations(int(passes))
        engine.network.train()
        engine.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.amp):
            registration = engine.network(image, True, controller)
        loss: RegistrationLoss = engine.loss_function
        channels = [image[:, :1], image[:, 1:]]
        if labels is not None:
            channels += [labels[:, :1], labels[:, 1:]]
        terms = loss(registration, *channels)
        torch.autograd.backward(terms["loss"])
        engine.optimizer.step()
        return {name: float(value.detach()) for name, value in terms.items()}


def prepare_pairs(batch: Sample, device: torch.device, non_blocking: bool = False, **_: Any) -> tuple[Tensor, Tensor]:
    """MONAI's ``prepare_batch`` for validation: the images, and the label maps as target, both (B, 2, *shape)."""
    return batch["image"].to(device, non_blocking=non_blocking), batch["label"].to(device, non_blocking=non_blocking)


class WarpLabels(Transform):
    """After inference: ``pred`` and ``label`` become what a Dice metric compares, warped and fixed labels one-hot.

    Args:
        labels: the label values to compare.
    """

    def __init__(self, labels: Sequence[int]) -> None:
        self.labels = tuple(labels)

    def __call__(self, data: Sample) -> Sample:
        maps = _plain(data["label"])[None]
        warped = warp(maps[:, :1], _plain(data["pred"])[None], mode="nearest")
        return {**data, "pred": one_hot(warped, self.labels)[0], "label": one_hot(maps[:, 1:], self.labels)[0]}


class SaveBest:
    """Handler of validation: keeps the weights with the best key metric in a file.

    MONAI's ``CheckpointSaver`` forgets, when a training resumes, how good its best was, and overwrites it; the state of
    this one goes into the training's checkpoint. Of several processes that train together, the first alone writes.

    Args:
        network: whose state_dict is written.
        path: of the file.
    """

    def __init__(self, network: torch.nn.Module, path: str | Path) -> None:
        self.network, self.path = network, Path(path)
        self.best = float("-inf")

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        value = float(engine.state.metrics[engine.state.key_metric_name])
        if value > self.best:
            self.best = value
            if idist.get_rank() > 0:
                return
            partial = self.path.with_name(f".{self.path.name}.partial")
            torch.save(self.network.state_dict(), partial)
            partial.replace(self.path)

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.best = state["best"]


def latest_checkpoint(folder: str | Path) -> str | None:
    """The training checkpoint with the most epochs in a folder, None where there is none.

    One that an interruption cut off while it was written (no longer a whole archive) does not count.
    """
    whole = filter(is_zipfile, Path(folder).glob("*checkpoint_epoch=*.pt"))
    found = {int(path.stem.split("=")[1]): path for path in whole}
    return str(found[max(found)]) if found else None
