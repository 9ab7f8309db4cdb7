"""Templates as files: those that come with the package, and what ``iregzoo template`` makes."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from iregzoo.errors import InputError
from iregzoo.label_names import read_names, write_names
from iregzoo.space.files import write_image
from iregzoo.space.grid import Grid
from iregzoo.tables import cell
from iregzoo.zoo import home

IMAGE, LABELS, NAMES, AGREEMENT, REPORT = (
    "template.nii.gz",
    "labels.nii.gz",
    "labels.json",
    "agreement.csv",
    "template.json",
)
TRANSFORMS = "transforms"  # the folder of the scans' own


def names_in(folder: Path) -> list[str]:
    """The names of the scans of a template that is in a folder; none where there is no such template."""
    try:
        with (folder / AGREEMENT).open(newline="", encoding="utf-8") as stream:
            return [row["name"] for row in csv.DictReader(stream)]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError):
        return []


def files_of(scans: Iterable[str]) -> tuple[str, ...]:
    """Every file that a template of scans of these names may have; the last one tells what the others are."""
    return IMAGE, LABELS, NAMES, AGREEMENT, *(f"{TRANSFORMS}/{name}.h5" for name in scans), REPORT


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


def read_atlas(folder: str | Path) -> Atlas:
    """The template in a folder, which gives it its name.

    Raises:
        InputError: where one of its files is missing, or the labels' names cannot be read.
    """
    folder = Path(folder)
    missing = [name for name in (IMAGE, LABELS, NAMES) if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder / missing[0]}: is missing; restore the atlas {folder.name!r}")
    return Atlas(folder.name, folder / IMAGE, folder / LABELS, read_names(folder / NAMES))


def write_template(
    folder: str | Path,
    image: Tensor,
    grid: Grid,
    *,
    labels: Tensor | None = None,
    names: Mapping[int, str] | None = None,
) -> None:
    """Write a template's image, and its labels with their names where it has any, into a folder.

    Args:
        folder: made if need be; files of these names in it are replaced.
        image: (1, 1, *grid.shape).
        grid: its place in the scanner.
        labels: (1, 1, *grid.shape).
        names: of the labels.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_image(folder / IMAGE, image, grid)
    if labels is not None:
        write_image(folder / LABELS, labels, grid)
        write_names(folder / NAMES, names or {})


def write_report(folder: Path, rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> None:
    """Write agreement.csv, a row a scan, and template.json, what the template was made from and how."""
    with (folder / AGREEMENT).open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)
    (folder / REPORT).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", "utf-8")


def named(labels: Sequence[int], names: Mapping[int, str] | None) -> dict[int, str]:
    """The names of these labels: those given or, for want of any, ``label 1`` and so on.

    Raises:
        InputError: where names are given, but not for all.
    """
    if names is None:
        return {value: f"label {value}" for value in labels}
    nameless = [value for value in labels if not names.get(value)]
    if nameless:
        raise InputError(f"labels {nameless} have no names; name every label that the scans have, or give no names")
    return {value: names[value] for value in labels}
