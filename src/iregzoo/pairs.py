"""Scans on the network's grid, and the pairs that training and validation make of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.transforms import Randomizable, Transform
from monai.utils import convert_to_tensor
from torch import Tensor
from torch.utils.data import Dataset

from iregzoo.errors import InputError
from iregzoo.flags import check_numbers
from iregzoo.space.formats import read_image, read_label_map, read_landmarks
from iregzoo.space.grid import Grid, bounding_grid, inverse, middle, network_grid
from iregzoo.space.points import map_points
from iregzoo.space.scan import Scan, Window, normalise, resample_to

Sample = dict[str, Any]


class LoadScan(Transform):
    """Read a scan, with its labels and landmarks where there are any, onto the network's grid.

    Gives ``image`` and ``label`` (1, *shape), ``points`` (K, 3) in voxels of that grid, and ``group`` as it is. Scans
    are centred on each other, as registration with ``--init center`` does; what a scan has beyond ``shape`` is cut off
    evenly.

    Args:
        spacing: of the network's grid, in mm.
        shape: in voxels, divisible by the network's stride.
        window: intensities that become 0 and 1, such as (-1000, -200) HU; two percentiles of each scan if None. Weights
            trained with one carry it on their card.
        center: what stands in the middle: the ``scan``, or the box around its ``labels``.

    Raises:
        InputError: for another ``center``, a spacing or a window of other than three and two numbers, and where labels
            are to stand in the middle and there are none.
    """

    def __init__(
        self, spacing: Sequence[float], shape: Sequence[int], window: Window | None = None, center: str = "scan"
    ) -> None:
        if center not in ("scan", "labels"):
            raise InputError(f"center {center!r} is unknown; choose scan or labels")
        check_numbers(spacing, "spacing", (3,), positive=True)
        if window is not None:
            check_numbers(window, "intensity_window", (2,))
        self.spacing, self.shape, self.window, self.center = tuple(spacing), tuple(shape), window, center

    def __call__(self, data: Mapping[str, str]) -> Sample:
        scan = read_image(data["image"])
        labels = read_label_map(data["label"], scan) if "label" in data else None
        grid = self._grid(scan, labels)
        sample: Sample = {"image": resample_to(normalise(scan, self.window), grid)[0]}
        if labels is not None:
            sample["label"] = resample_to(labels, grid, mode="nearest")[0]
        if "points" in data:
            points = map_points(inverse(grid.affine), read_landmarks(data["points"], scan))
            sample["points"] = points.float().contiguous()
        return {**sample, "group": data["group"]} if "group" in data else sample

    def _grid(self, scan: Scan, labels: Scan | None) -> Grid:
        around = scan.grid
        if self.center == "labels":
            if labels is None or not labels.data.any():
                raise InputError(f"{scan.path}: has no labels to center on; set center to scan")
            around = bounding_grid(labels.data[0, 0] != 0, scan.grid)
        return middle(network_grid(around, self.spacing, stride=1, minimum=self.shape), self.shape)


def plain(tensor: Tensor) -> Tensor:
    """Without MONAI's metadata, which costs time at every operation."""
    plain: Tensor = convert_to_tensor(tensor, track_meta=False)
    return plain


class RandomPairs(Dataset[Sample], Randomizable):
    """Random ordered pairs of different scans, the same ones for the same seed and epoch.

    Gives ``image`` (2, *shape), moving then fixed, and ``label`` (2, *shape) and ``points`` (2, K, 3) where both scans
    have them. Scans that have a ``group`` pair within it, see ``group_pairs``.

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
        self.within = group_pairs(data)
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        random = np.random.default_rng((self.seed, self.epoch, index))
        if self.within:
            chosen: Sequence[int] = self.within[random.integers(len(self.within))]
        else:
            chosen = random.choice(len(self.scans), 2, replace=False).tolist()
        scans = [dict(self.scans[i]) for i in chosen]
        if self.augmentation is not None:
            if any("points" in scan for scan in scans):
                raise InputError("augmentation: would move the scans away from their landmarks; set it to null")
            if isinstance(self.augmentation, Randomizable):
                self.augmentation.set_random_state(seed=int(random.integers(2**31)))
            scans = [self.augmentation(scan) for scan in scans]
        pair = join_pair(*scans)
        if random.random() < self.mirror:
            pair = _mirror(pair)
        return pair

    def attach(self, engine: Engine) -> None:
        """Follow the epochs of a trainer, also of a resumed one (the protocol of MONAI's handlers)."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)

    def _start_epoch(self, engine: Engine) -> None:
        self.epoch = engine.state.epoch


class CyclicPairs(Dataset[Sample]):
    """Each scan as fixed image with the next one as moving image, the last with the first: a fixed set of pairs.

    Scans that have a ``group`` pair within it, see ``group_pairs``.
    """

    def __init__(self, data: Sequence[Sample]) -> None:
        self.scans = data
        count = len(data)
        self.pairs = group_pairs(data) or [((fixed + 1) % count, fixed) for fixed in range(count)]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        if index >= len(self):
            raise IndexError(index)
        moving, fixed = self.pairs[index]
        return join_pair(self.scans[moving], self.scans[fixed])


def group_pairs(data: Sequence[Sample]) -> list[tuple[int, int]]:
    """Indices (moving, fixed) of pairs within groups: a group's first scan is fixed, each other one moves to it.

    Empty where scans have no group. Of a data set of MONAI, which reads scans as they are asked for, the descriptions
    are looked at and not the scans.
    """
    groups: dict[str, list[int]] = {}
    for index, scan in enumerate(getattr(data, "data", data)):
        if "group" in scan:
            groups.setdefault(scan["group"], []).append(index)
    return [(moving, group[0]) for group in groups.values() for moving in group[1:]]


def join_pair(moving: Sample, fixed: Sample) -> Sample:
    """Two samples as one, moving in channel 0 and fixed in channel 1 of each key that both have.

    Landmarks become (2, K, 3): row k of the one belongs to row k of the other.

    Raises:
        InputError: where the numbers of landmarks differ.
    """
    both = moving.keys() & fixed.keys()
    pair: Sample = {
        key: torch.cat((plain(moving[key]), plain(fixed[key]))) for key in ("image", "label") if key in both
    }
    if "points" in both:
        if len(moving["points"]) != len(fixed["points"]):
            counts = f"{len(moving['points'])} and {len(fixed['points'])}"
            raise InputError(f"points: the scans of a pair have {counts} landmarks; they must correspond one to one")
        pair["points"] = torch.stack((moving["points"], fixed["points"]))
    return pair


def _mirror(pair: Sample) -> Sample:
    """A pair mirrored left to right, its landmarks with it."""
    mirrored = {key: value.flip(1) for key, value in pair.items() if key != "points"}
    if "points" in pair:
        points = pair["points"].clone()
        points[..., 0] = pair["image"].shape[1] - 1 - points[..., 0]
        mirrored["points"] = points
    return mirrored
