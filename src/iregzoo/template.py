"""Templates: built from a group of labelled scans by groupwise registration, and those that come with the package.

A template has the mean intensity and the mean shape of a group, and of its labels what most scans say. It starts as the
mean of the centred scans. In each round every scan is registered to it, and the scans are averaged where the mean of
their displacements is zero, so that no scan and no choice of a first template draws it to itself (Guimond et al., CVIU
2000; Joshi et al., NeuroImage 2004).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import EllipsisType

import numpy as np
import torch
from torch import Tensor

from iregzoo.datasets import Entry
from iregzoo.errors import InputError
from iregzoo.fields import compose, invert, warp
from iregzoo.label_names import read_names, write_names
from iregzoo.space.files import write_image
from iregzoo.space.formats import read_image, read_label_map
from iregzoo.space.grid import Grid, network_grid
from iregzoo.space.scan import Scan, normalise, resample_to
from iregzoo.zoo import Method, home

IMAGE, LABELS, NAMES = "template.nii.gz", "labels.nii.gz", "labels.json"


@dataclass(frozen=True)
class Atlas:
    """A template that is there as files.

    Attributes:
        name: of its folder.
        image: its path.
        labels: path of the label map on the image's grid.
        names: of the labels.
    """

    name: str
    image: Path
    labels: Path
    names: Mapping[int, str]


@dataclass(frozen=True)
class Group:
    """N scans on one grid, centred on each other.

    Attributes:
        images: (N, 1, *shape) in [0, 1].
        shown: (N, 1, *shape), 1 within a scan's field of view and 0 beyond.
        labels: (N, 1, *shape).
        values: the labels that every scan has, and 0.
        view: which part of the grid is a field of view, the median of the scans: an index of these tensors.
        spacing: of the grid, mm; its axes run right, anterior, superior.
    """

    images: Tensor
    shown: Tensor
    labels: Tensor
    values: tuple[int, ...]
    view: tuple[EllipsisType | slice, ...]
    spacing: tuple[float, float, float]


@dataclass(frozen=True)
class Template:
    """The mean of a group, on its grid.

    Attributes:
        image: (1, 1, *shape) in [0, 1], 0 outside the group's ``view``.
        labels: (1, 1, *shape), what most scans have there.
        fields: (N, 3, *shape) in voxels, from the template to each scan; their mean is zero. None before any round.
    """

    image: Tensor
    labels: Tensor
    fields: Tensor | None = None


def default(name: str = "hippocampus") -> Atlas:
    """The template of a name: from the user's folder, the installed package, or a source checkout.

    Raises:
        InputError: where there is none.
    """
    package = Path(__file__).resolve().parent
    roots = [home() / "templates", package / "templates", package.parents[1] / "templates"]
    found = {path.parent.name: path.parent for root in reversed(roots) for path in root.glob(f"*/{NAMES}")}
    if name not in found:
        raise InputError(f"template {name!r} is unknown; available: {', '.join(sorted(found)) or 'none'}")
    return read_atlas(found[name])


def read_atlas(folder: Path) -> Atlas:
    """The template in a folder, which gives it its name.

    Raises:
        InputError: where one of its files is missing, or the labels' names cannot be read.
    """
    missing = [name for name in (IMAGE, LABELS, NAMES) if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder / missing[0]}: is missing; restore the atlas {folder.name!r}")
    return Atlas(folder.name, folder / IMAGE, folder / LABELS, read_names(folder / NAMES))


def read_group(scans: Sequence[Entry], method: Method) -> Group:
    """Read the scans of a group onto a grid that holds the largest of them.

    Args:
        scans: image and label map of each, as ``datasets.find_scans`` gives them.
        method: whose network will see them, from ``zoo.load``.

    Raises:
        InputError: for fewer than two scans, one without labels, or with other labels than the first; and as
            ``read_scan`` and ``read_labels`` do.
    """
    if len(scans) < 2:
        raise InputError(f"template: a group of {len(scans)} is too small for a mean; give at least two scans")
    for entry in scans:
        if "label" not in entry:
            raise InputError(f"{entry['image']}: has no label map; a template needs one for every scan")
    images = [read_image(entry["image"]) for entry in scans]
    labels = [read_label_map(entry["label"], image) for entry, image in zip(scans, images, strict=True)]
    values = _common_values(labels)
    card, stride = method.card, method.network.stride
    sizes = np.array([network_grid(image.grid, card.spacing, stride=1).shape for image in images])
    shape = -(-np.maximum(sizes.max(0), card.minimum) // stride) * stride
    grids = [network_grid(image.grid, card.spacing, stride=1, minimum=shape.tolist()) for image in images]

    def onto_grids(scans: Iterable[Scan], mode: str = "linear") -> Tensor:
        return torch.cat([resample_to(scan, grid, mode=mode) for scan, grid in zip(scans, grids, strict=True)])

    return Group(
        images=onto_grids(normalise(image, card.window) for image in images),
        shown=onto_grids(replace(image, data=torch.ones_like(image.data)) for image in images),
        labels=onto_grids(labels, "nearest"),
        values=values,
        view=_middle_of(shape, np.median(sizes, axis=0).astype(int)),
        spacing=card.spacing,
    )


def _common_values(labels: Sequence[Scan]) -> tuple[int, ...]:
    """The labels that all maps have, and 0."""
    values = [sorted({0, *np.unique(label.data.numpy()).tolist()}) for label in labels]
    for label, found in zip(labels, values, strict=True):
        if found != values[0]:
            raise InputError(
                f"{label.path}: has the labels {found}, but {labels[0].path} has {values[0]}; give scans with the "
                "same labels"
            )
    if values[0] == [0]:
        raise InputError(f"{labels[0].path}: is empty; a template needs labels")
    return tuple(values[0])


def _middle_of(shape: Sequence[int], size: Sequence[int]) -> tuple[EllipsisType | slice, ...]:
    """Index of the middle of a grid, where ``network_grid`` puts a scan of ``size`` voxels."""
    starts = [(whole - part) // 2 for whole, part in zip(shape, size, strict=True)]
    return (..., *(slice(start, start + part) for start, part in zip(starts, size, strict=True)))


def build_template(group: Group, method: Method, *, rounds: int, batch: int = 2) -> Iterator[Template]:
    """Build the template of a group, round by round.

    Args:
        group: from ``read_group``.
        method: that registers the group to the template, from ``zoo.load``.
        rounds: how many.
        batch: scans registered at once.

    Yields:
        The mean of the centred scans, and what it becomes in each round.

    Raises:
        InputError: for rounds or a batch that are no such numbers.
    """
    if rounds < 0 or batch < 1:
        raise InputError(f"rounds {rounds}, batch {batch}: give at least 0 rounds and a batch of at least 1")
    template = _average(group)
    yield template
    for _ in range(rounds):
        fields = _register(group, template, method, batch)
        template = _average(group, _centred(fields))
        yield template


@torch.inference_mode()
def _register(group: Group, template: Template, method: Method, batch: int) -> Tensor:
    """Displacements (N, 3, *shape) from the template to every scan, in voxels."""
    fields = []
    for start in range(0, len(group.images), batch):
        moving = group.images[start : start + batch]
        pair = torch.cat((moving, template.image.expand_as(moving)), dim=1)
        fields.append(method.network.register(pair.to(method.device)).displacement.cpu())
    return torch.cat(fields)


def _centred(fields: Tensor) -> Tensor:
    """The displacements (N, 3, *shape) as seen from where their mean is zero.

    With the mean ū, the template's point x lies at y = x + ū(x) in the mean shape. Read at x = (id + ū)⁻¹(y), the
    fields lead from y to the scans, and their mean is zero. What a network pulls in any pair alike goes out with ū.
    """
    back = invert(fields.mean(0, keepdim=True))
    return torch.cat([compose(field[None], back) for field in fields])


def _average(group: Group, fields: Tensor | None = None) -> Template:
    """Mean of the scans, each warped once. A voxel's mean is that of the scans whose field of view has it."""
    total, seen, votes = (torch.zeros(1) for _ in range(3))
    for index in range(len(group.images)):
        one = slice(index, index + 1)
        image, shown = group.images[one], group.shown[one]
        members = torch.cat([group.labels[one] == value for value in group.values], dim=1).float()
        if fields is not None:
            image, shown = (warp(volume, fields[one]) for volume in (image, shown))
            members = warp(members, fields[one], padding="border")
        total, seen, votes = total + image, seen + shown, votes + members
    mean = torch.where(seen > 0, total / seen.clamp(min=1), 0.0)
    inside = torch.zeros_like(mean)
    inside[group.view] = 1  # the network is to see a field of view like those that it was trained on
    return Template(mean * inside, _elect(votes / len(group.images), group.values), fields)


def _elect(votes: Tensor, values: Sequence[int]) -> Tensor:
    """Labels (1, 1, *shape) from the part of the scans that have each of ``values``, (1, L, *shape).

    The voxels that most scans label are labelled, as many as a scan labels on average, each with its commonest label.
    A plain majority would be smaller than the scans' labels, because these disagree on the rim. Voxels that tie come
    in together; none comes in that fewer than a third of the scans label.
    """
    labelled = votes[:, 1:].sum(1, keepdim=True)
    size = max(1, round(float(labelled.sum())))
    weakest = max(float(labelled.flatten().topk(size).values[-1]), 1 / 3)
    commonest = torch.tensor(values[1:], dtype=torch.int32)[votes[:, 1:].argmax(1, keepdim=True)]
    return torch.where(labelled >= weakest, commonest, 0)


def write_template(folder: Path, template: Template, group: Group, names: Mapping[int, str]) -> None:
    """Write a template's image, labels and the labels' names into a folder, cropped to the group's field of view.

    Args:
        folder: is made if need be; files of these names in it are replaced.
        template: from ``build_template``.
        group: of which it is the template.
        names: of the labels.

    Raises:
        InputError: where a label has no name.
    """
    nameless = [value for value in group.values if value and value not in names]
    if nameless:
        raise InputError(f"labels {nameless} have no names, only {sorted(names)} have; name every label")
    folder.mkdir(parents=True, exist_ok=True)
    image, labels = template.image[group.view], template.labels[group.view]
    shape = (image.shape[2], image.shape[3], image.shape[4])
    grid = _around_origin(shape, group.spacing)
    write_image(folder / IMAGE, image, grid)
    write_image(folder / LABELS, labels, grid)
    write_names(folder / NAMES, names)


def _around_origin(shape: tuple[int, int, int], spacing: Sequence[float]) -> Grid:
    """A grid (LPS mm) whose axes run right, anterior and superior and whose middle is the world's origin."""
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid(shape, affine)
