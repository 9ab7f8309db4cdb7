"""Atlases of a Label app: the template that comes with the package, or a user's own."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from iregzoo.errors import InputError
from iregzoo.label_names import read_names, write_names
from iregzoo.space.files import write_image
from iregzoo.space.formats import read_image, read_label_map
from iregzoo.space.scan import Scan, looks_like_labels
from iregzoo.template import IMAGE, LABELS, NAMES, default

ATLASES = "atlas"  # the folder of a Label face that holds them
MOST = 255  # viewers ask for 8 bits a voxel


@dataclass(frozen=True)
class LabelledImage:
    """An atlas in memory.

    Attributes:
        name: what the option panel calls it.
        image, labels: on one grid.
        names: of the labels that the map holds, in their order.
        notes: where it comes from and under which licence, in Markdown.
        former: the numbers that the labels had, by those that they have now, where they were numbered anew.
    """

    name: str
    image: Scan
    labels: Scan
    names: Mapping[int, str]
    notes: str = ""
    former: Mapping[int, int] = field(default_factory=dict)


def packaged() -> LabelledImage:
    """The hippocampus template."""
    atlas = default()
    image = read_image(atlas.image)
    notes = (atlas.image.parent / "README.md").read_text(encoding="utf-8")
    return LabelledImage(atlas.name, image, read_label_map(atlas.labels, image), atlas.names, notes)


def own(images: Sequence[str], labels: Sequence[str], names: str) -> list[LabelledImage]:
    """A user's atlases, which share their labels' names; labels above 255 become 1, 2, … in their order.

    Args:
        images: paths, in any format that ``read_image`` reads.
        labels: path of the label map of each.
        names: path of the names, see ``read_names``.

    Raises:
        InputError: for files that cannot be read, maps on another grid or without labels, labels without a name of
            their own, more than 255 labels, atlases of one name, and one given twice.
    """
    if len(images) != len(labels):
        raise InputError(
            f"{len(images)} atlases and {len(labels)} label maps: give one map per atlas with --atlas-labels"
        )
    for image in images:
        if images.count(image) > 1:
            raise InputError(f"{image}: is given {images.count(image)} times; give each atlas once")
    given, found = read_names(Path(names)), []
    for image, map_path in zip(images, labels, strict=True):
        scan = read_image(image)
        if looks_like_labels(scan):
            raise InputError(
                f"{image}: looks like a label map; give the image with --atlas, the map with --atlas-labels"
            )
        label_map = read_label_map(map_path, scan)
        found.append(LabelledImage(_name_of(image), scan, label_map, _named(label_map, given, names)))
        if [atlas.name for atlas in found].count(found[-1].name) > 1:
            raise InputError(f"two atlases are called {found[-1].name!r}; rename one of the files")
    return _fit_bytes(found)


def _name_of(path: str) -> str:
    """The name of a file without what follows its first dot, of characters that mean nothing to MONAI's configs."""
    return re.sub(r"[^\w-]", "_", Path(path).resolve().name.lstrip(".").split(".")[0])


def _named(labels: Scan, names: Mapping[int, str], source: str) -> dict[int, str]:
    """The names of the labels that a map holds. MONAI Label tells names apart by their lower case alone."""
    values = [int(value) for value in np.unique(labels.data.numpy()) if value]
    if not values or values[0] < 0:
        what = f"holds the negative label {values[0]}" if values else "is empty"
        raise InputError(f"{labels.path}: {what}; an atlas needs positive labels")
    nameless = [value for value in values if not names.get(value)]
    if nameless:
        raise InputError(f"{source}: does not name the labels {nameless} of {labels.path.name}; name every label")
    known: dict[str, int] = {"background": 0}
    for value in values:
        name = names[value].lower()
        if name in known:
            raise InputError(
                f"{source}: the labels {known[name]} and {value} are both named {name!r}; give each its own name"
            )
        known[name] = value
    return {value: names[value] for value in values}


def _fit_bytes(atlases: Sequence[LabelledImage]) -> list[LabelledImage]:
    """The same atlases with labels of at most 255."""
    values = sorted({value for atlas in atlases for value in atlas.names})
    if len(values) > MOST:
        raise InputError(f"the atlas has {len(values)} labels, but viewers show at most {MOST}; leave some out")
    if values[-1] <= MOST:
        return list(atlases)
    fitted = []
    for atlas in atlases:
        index = torch.bucketize(atlas.labels.data, torch.tensor(values, dtype=atlas.labels.data.dtype)) + 1
        data = torch.where(atlas.labels.data > 0, index, 0).int()
        names = {values.index(value) + 1: name for value, name in atlas.names.items()}
        former = {values.index(value) + 1: value for value in atlas.names}
        fitted.append(replace(atlas, labels=replace(atlas.labels, data=data), names=names, former=former))
    return fitted


def write(folder: Path, atlases: Sequence[LabelledImage]) -> None:
    """Write atlases into a Label face's folder, for ``place_of`` to find."""
    for atlas in atlases:
        place = folder / ATLASES / atlas.name
        place.mkdir(parents=True)
        write_image(place / IMAGE, atlas.image.data, atlas.image.grid)
        write_image(place / LABELS, atlas.labels.data, atlas.labels.grid)
        write_names(place / NAMES, atlas.names)
        if atlas.notes:
            (place / "README.md").write_text(atlas.notes, encoding="utf-8")


def place_of(folder: Path, name: str) -> Path:
    """Where the atlas of a name lies in a Label face's folder; the first one where the name is empty.

    Raises:
        InputError: where there are others, but not this one.
    """
    known = sorted(path.name for path in (folder / ATLASES).glob("*") if path.is_dir())
    if name and known and name not in known:
        raise InputError(f"atlas {name!r} is unknown; available: {', '.join(known)}")
    return folder / ATLASES / (name or next(iter(known), ""))
