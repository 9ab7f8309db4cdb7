"""Anatomical label maps, and the endless pairs of synthesised images that training makes of a few of them."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.utils.data import Dataset, get_worker_info

from iregzoo.errors import InputError, in_a_line
from iregzoo.fields import identity
from iregzoo.flags import check_numbers
from iregzoo.pairs import Sample
from iregzoo.space.grid import Matrix
from iregzoo.synthesis import Look, Random, Synthesis, Tissue

COLUMNS = ("label", "evaluate", "intensity_class", "t1_mean", "t1_mean_sd", "t1_std", "t1_std_sd")
FEW = 20  # a label of fewer voxels says little about where it lies
SPREAD = 4  # structures, of which an affine is made
HEAD = 500  # labels from here on are tissue outside the brain
CSF = 24


@dataclass(frozen=True)
class Table:
    """What ``labels.csv`` says of every label: how it looks in T1 scans, and whether it is compared."""

    tissues: dict[int, Tissue]
    compared: tuple[int, ...]

    def synthesis(self, **settings: Any) -> Synthesis:
        """Images of maps with these labels."""
        head = [label for label in self.tissues if label >= HEAD]
        return Synthesis(self.tissues, head=head, cover=[CSF] if CSF in self.tissues else [], **settings)


@dataclass(frozen=True)
class Anatomy:
    """A person's label map, and how it is turned to lie as the others do.

    Attributes:
        labels: (X, Y, Z), axes nearest to right, anterior, superior.
        pose: (4, 4), from mm about the middle of the brain, in the average person's orientation and size, to voxels.
    """

    labels: Tensor
    pose: Matrix


def read_table(folder: str | Path) -> Table:
    """The table ``labels.csv`` of a folder of label maps.

    Raises:
        InputError: where it is missing or lacks a column.
    """
    path = Path(folder) / "labels.csv"
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a folder with label maps, labels.csv and splits.json")
    try:
        rows = list(csv.DictReader(path.read_text("utf-8").splitlines()))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: is not a table in UTF-8 text ({error}); save it as CSV") from None
    missing = [name for name in COLUMNS if not rows or name not in rows[0]]
    if missing:
        raise InputError(f"{path}: lacks the columns {', '.join(missing)}")
    try:
        tissues = {
            int(row["label"]): Tissue(int(row["intensity_class"]), *(float(row[name]) for name in COLUMNS[3:]))
            for row in rows
        }
        return Table(tissues, tuple(int(row["label"]) for row in rows if int(row["evaluate"])))
    except (ValueError, TypeError) as error:  # a row that ends early has None in the cells that it lacks
        raise InputError(
            f"{path}: has a cell that is not a number ({error}); give every row all of its numbers"
        ) from None


def read_splits(folder: str | Path) -> dict[str, list[str]]:
    """The names of the maps of each split, from ``splits.json``.

    Raises:
        InputError: where the file is missing, or holds something else.
    """
    path = Path(folder) / "splits.json"
    try:
        splits = json.loads(path.read_text("utf-8"))
        return {split: [str(name) for name in found] for split, found in splits.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: does not say which maps are in which split ({error})") from None


def read_anatomies(folder: str | Path, split: str) -> list[Anatomy]:
    """The label maps of a split, laid alike: an affine each brings the middles of its structures to the average's.

    Raises:
        InputError: for a missing folder, table, split or map, and a map with too few structures for that.
    """
    table = read_table(folder)
    splits = read_splits(folder)
    if split not in splits:
        raise InputError(f"{folder}: has no split {split!r}, only {', '.join(splits)}")
    maps = [_read_map(Path(folder) / f"{name}.nii.gz") for name in splits[split]]
    middles = [_middles(labels, affine, table.compared) for labels, affine in maps]
    for name, middle in zip(splits[split], middles, strict=True):
        _check_spread(Path(folder) / f"{name}.nii.gz", middle)
    average = np.nanmean([middle - np.nanmean(middle, axis=0) for middle in middles], axis=0)
    return [
        Anatomy(labels, np.linalg.inv(affine) @ _fit(average, middle))
        for (labels, affine), middle in zip(maps, middles, strict=True)
    ]


def _read_map(path: Path) -> tuple[Tensor, Matrix]:
    """Label map (X, Y, Z) of canonical axes, and its affine, voxels to RAS mm."""
    if not path.is_file():
        raise InputError(f"{path}: no such file, although splits.json lists it")
    try:
        image = nib.as_closest_canonical(nib.load(path))
        voxels = np.asarray(image.dataobj).astype(np.int16)
    except Exception as error:  # a damaged file raises many kinds
        raise InputError(f"{path}: is not a readable label map ({in_a_line(error)}); get it again") from None
    return torch.from_numpy(voxels), np.asarray(image.affine, dtype=np.float64)


def _middles(labels: Tensor, affine: Matrix, compared: Sequence[int]) -> Matrix:
    """The middle of each label in mm (L, 3), NaN where there is next to nothing of it."""
    flat, most = labels.flatten().long().clamp_min(0), max(compared, default=0) + 1
    count = torch.bincount(flat, minlength=most).numpy()
    sums = [
        torch.bincount(flat, axis.expand(labels.shape).flatten().double(), minlength=most).numpy()
        for axis in torch.meshgrid(*(torch.arange(size) for size in labels.shape), indexing="ij")
    ]
    with np.errstate(invalid="ignore", divide="ignore"):
        voxels = np.stack(sums, axis=1)[list(compared)] / count[list(compared), None]
    voxels[count[list(compared)] < FEW] = np.nan
    middles: Matrix = voxels @ affine[:3, :3].T + affine[:3, 3]
    return middles


def _check_spread(path: Path, middles: Matrix) -> None:
    """Refuse a map whose structures' middles (L, 3) cannot say how it is turned: too few, or all in one plane."""
    given = middles[np.isfinite(middles).all(1)]
    if len(given) < SPREAD or np.linalg.matrix_rank(given - given.mean(0), tol=1.0) < 3:
        raise InputError(
            f"{path}: of the structures that labels.csv says to evaluate, it holds {len(given)} with at least {FEW} "
            f"voxels; to lay the maps alike, each needs at least {SPREAD} that are not all in one plane"
        )


def _fit(source: Matrix, target: Matrix) -> Matrix:
    """The affine (4, 4) that brings points (L, 3) nearest to others, by least squares; points with NaN do not count."""
    given = np.isfinite(source + target).all(1)
    points = np.column_stack((source[given], np.ones(given.sum())))
    found, *_ = np.linalg.lstsq(points, target[given], rcond=None)
    matrix = np.eye(4)
    matrix[:3] = found.T
    return matrix


@dataclass(frozen=True)
class Pose:
    """How far people are turned, moved, scaled and deformed at random: standard deviations.

    Attributes:
        turn: about each axis, in degrees.
        move: along each axis, in mm.
        scale: of the logarithm of the size along each axis.
        bend: of the smooth displacement, in mm.
    """

    turn: float = 0.0
    move: float = 0.0
    scale: float = 0.0
    bend: float = 0.0

    def matrix(self, random: Random) -> Matrix:
        """A random affine (4, 4), mm to mm."""
        angles, offset, sizes = torch.randn(3, 3, generator=random).double().numpy()
        matrix = np.diag([*np.exp(self.scale * sizes), 1.0])
        for axis, angle in enumerate(np.deg2rad(self.turn * angles)):
            turned = np.eye(4)
            first, second = (axis + 1) % 3, (axis + 2) % 3
            turned[first, first] = turned[second, second] = np.cos(angle)
            turned[first, second], turned[second, first] = -np.sin(angle), np.sin(angle)
            matrix = turned @ matrix
        matrix[:3, 3] = self.move * offset
        return matrix


class SynthesisedPairs(Dataset[Sample]):
    """Pairs of images synthesised from two people's label maps, the same ones for the same seed and epoch.

    Gives ``image`` (2, *shape), moving then fixed, and ``label`` (2, *shape). Both people are turned, moved, scaled and
    mirrored together, as scans lie in scanners, and each by itself a little, as an affine start leaves them, and bent.

    Args:
        anatomies: of ``read_anatomies``, at least two.
        synthesis: makes the images.
        shape: of the grid, in voxels.
        spacing: of the grid in mm: one number, or two between which each pair's lies.
        length: pairs an epoch.
        seed: of everything random here.
        together: what is done to both people of a pair.
        alone: what is done to each.
        mirror: probability of mirroring both left to right.
        alike: probability that both images have one look.
        both: probability that both show the head, or neither.
        canonical: brings both images to one contrast (``networks.canonical``); None leaves them as they are.

    Raises:
        InputError: for fewer than two anatomies, a spacing that is none, and in a worker of a data loader for a
            ``canonical`` on a GPU.
    """

    def __init__(
        self,
        anatomies: Sequence[Anatomy],
        synthesis: Synthesis,
        shape: Sequence[int],
        spacing: Sequence[float],
        length: int,
        seed: int = 0,
        together: Pose = Pose(turn=6.0, move=5.0, scale=0.05),
        alone: Pose = Pose(turn=2.0, move=2.0, scale=0.03, bend=3.0),
        mirror: float = 0.5,
        alike: float = 0.25,
        both: float = 0.75,
        canonical: nn.Module | None = None,
    ) -> None:
        if len(anatomies) < 2:
            raise InputError(f"{len(anatomies)} label maps: a pair needs two subjects; list more in splits.json")
        check_numbers(spacing, "spacing", (1, 2), positive=True)
        self.anatomies, self.synthesis = anatomies, synthesis
        self.shape, self.spacing, self.length, self.seed = tuple(shape), tuple(spacing), length, seed
        self.together, self.alone, self.mirror = together, alone, mirror
        self.alike, self.both, self.canonical = alike, both, canonical
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if index >= len(self):
            raise IndexError(index)
        random = torch.Generator().manual_seed(hash((self.seed, self.epoch, index)) % 2**63)
        chosen = torch.randperm(len(self.anatomies), generator=random)[:2].tolist()
        grid = self._grid(random)
        labels = [self._lay(self.anatomies[i], grid, random) for i in chosen]
        looks = self._looks(random)
        images = [self.synthesis(each, random, look) for each, look in zip(labels, looks, strict=True)]
        return {"image": self._seen(torch.cat(images)), "label": torch.cat(labels)}

    @torch.no_grad()
    def _seen(self, images: Tensor) -> Tensor:
        """Both images as the network that is trained gets them."""
        if self.canonical is None:
            return images
        device = next(self.canonical.parameters()).device
        if device.type != "cpu" and get_worker_info() is not None:
            raise InputError(
                f"workers: the canonical-contrast network is on {device}, which worker processes cannot "
                "use; set workers to 0"
            )
        with torch.autocast(device.type, torch.bfloat16):
            made: Tensor = self.canonical(images[None].to(device))
        return made[0].cpu()

    def _grid(self, random: Random) -> Matrix:
        """Matrix (4, 4) from the grid's voxels to mm about the middle of the average brain."""
        low, high = self.spacing[0], self.spacing[-1]
        spacing = low + (high - low) * float(torch.rand(1, generator=random))
        grid = np.diag([spacing] * 3 + [1.0])
        grid[:3, 3] = -spacing * (np.array(self.shape) - 1) / 2
        common = self.together.matrix(random)
        if float(torch.rand(1, generator=random)) < self.mirror:
            common = np.diag([-1.0, 1.0, 1.0, 1.0]) @ common
        matrix: Matrix = common @ grid
        return matrix

    def _looks(self, random: Random) -> tuple[Look, Look]:
        """How both images look; what is shown of the head is the same in both more often than not."""
        first = self.synthesis.look(random)
        second = first if float(torch.rand(1, generator=random)) < self.alike else self.synthesis.look(random)
        if float(torch.rand(1, generator=random)) < self.both:
            second = replace(second, shown=first.shown)
        return first, second

    def _lay(self, anatomy: Anatomy, grid: Matrix, random: Random) -> Tensor:
        """A person's label map (1, *shape) on a grid."""
        to_voxels = anatomy.pose @ self.alone.matrix(random) @ grid
        linear = torch.as_tensor(to_voxels[:3, :3], dtype=torch.float32)
        offset = torch.as_tensor(to_voxels[:3, 3], dtype=torch.float32)
        spacing = float(np.linalg.norm(grid[:3, 0]))
        places = identity(self.shape)[0] + self._bend(spacing, random)
        points = (torch.einsum("ij,jxyz->ixyz", linear, places) + offset.view(3, 1, 1, 1)).round().long()
        inside = torch.ones(self.shape, dtype=torch.bool)
        place = torch.zeros(self.shape, dtype=torch.long)
        for axis, size in enumerate(anatomy.labels.shape):
            inside &= (points[axis] >= 0) & (points[axis] < size)
            place = place * size + points[axis].clamp(0, size - 1)
        return (anatomy.labels.flatten()[place] * inside)[None]

    def _bend(self, spacing: float, random: Random) -> Tensor:
        """A smooth random displacement (3, *shape) in voxels: coarse and fine waves of about the same strain."""
        bend = torch.zeros(3, *self.shape)
        strength = self.alone.bend / spacing * float(torch.rand(1, generator=random))
        for share, apart_mm in ((0.8, 40.0), (0.4, 20.0)):
            knots = [max(2, round(size * spacing / apart_mm) + 1) for size in self.shape]
            waves = torch.randn(1, 3, *knots, generator=random)
            bend += share * F.interpolate(waves, size=self.shape, mode="trilinear", align_corners=True)[0]
        return strength * bend

    def attach(self, engine: Engine) -> None:
        """Follow the epochs of a trainer, also of a resumed one (the protocol of MONAI's handlers)."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)

    def _start_epoch(self, engine: Engine) -> None:
        self.epoch = engine.state.epoch
