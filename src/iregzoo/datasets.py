"""Where the scans of a data set lie: our own layout, and those of the papers' data sets as people download them.

``docs/datasets.md`` shows each folder, its download page and licence.
"""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from glob import escape
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

from iregzoo.errors import InputError

Entry = dict[str, str]
Unit = list[Entry]  # one scan, or those of a group
Splits = Mapping[str, int | Sequence[str]]
FIELD = re.compile(r"\{(\w+)(?::([^}]*))?\}")
TRANSMORPH = "https://github.com/junyuchen245/TransMorph_Transformer_for_Medical_Image_Registration"
APART = ("train", "val", "test")  # splits that should share no scan
NEURITE = "https://github.com/adalca/medical-datasets/blob/master/neurite-oasis.md"


@dataclass(frozen=True)
class Layout:
    """How a data set lies in its folder, or in a folder directly within.

    Patterns are globs, relative to that folder. ``{name}`` or ``{name:glob}`` in a pattern for images stands for a part
    of the path, which ``{name}`` repeats in the patterns for labels and points. Scans with one ``{group}`` are of one
    patient and pair with each other only.

    Attributes:
        images: patterns; the first with a match counts.
        example: a path as it is expected, for the message where there is none.
        page: where the data set comes from.
        labels: patterns for a scan's label map; the first with a match counts, and one must. None for no labels.
        points: the same for a scan's landmarks.
        splits: by name either how many scans (or groups), taken one split after the other in the order of names, or
            patterns of the paths that belong to it.
    """

    images: tuple[str, ...]
    example: str
    page: str
    labels: tuple[str, ...] = ()
    points: tuple[str, ...] = ()
    splits: Splits = field(default_factory=dict)


LAYOUTS = {
    "ixi": Layout(
        images=("{folder}/{name:subject_*}.pkl",),
        labels=("{folder}/{name}.pkl",),
        example="Train/subject_0.pkl, Val/…, Test/…",
        page=TRANSMORPH,
        splits={"train": ["Train/*"], "val": ["Val/*"], "test": ["Test/*"]},
    ),
    "freesurfer": Layout(
        images=("{name}/mri/norm.mgz", "{name}/mri/norm.nii.gz"),
        labels=("{name}/mri/aseg.mgz", "{name}/mri/aseg.nii.gz"),
        example="SUBJECT/mri/norm.mgz and aseg.mgz",
        page="https://surfer.nmr.mgh.harvard.edu",
        splits={"train": 269, "val": 15, "test": 30},
    ),
    "oasis": Layout(
        images=("{name:OASIS_*}/aligned_norm.nii.gz", "imagesTr/{name:OASIS_*}_0000.nii.gz"),
        labels=("{name}/aligned_seg35.nii.gz", "labelsTr/{name}_0000.nii.gz", "labelsTr/{name}.nii.gz"),
        example="OASIS_OAS1_0001_MR1/aligned_norm.nii.gz and aligned_seg35.nii.gz",
        page=NEURITE,
        splits={"train": 280, "val": 20, "test": 60},
    ),
    "oasis_native": Layout(
        images=("{name:OASIS_*}/norm.nii.gz",),
        labels=("{name}/seg35.nii.gz",),
        example="OASIS_OAS1_0001_MR1/norm.nii.gz and seg35.nii.gz",
        page=NEURITE,
        splits={"train": 280, "val": 20, "test": 60},
    ),
    "lpba40": Layout(
        images=tuple(f"{{name:S*}}/{{scan:S*}}.delineation.skullstripped.{end}" for end in ("nii.gz", "nii", "hdr")),
        labels=tuple(f"{{name}}/{{scan}}.delineation.structure.label.{end}" for end in ("nii.gz", "nii", "hdr")),
        example="S01/S01.delineation.skullstripped.nii.gz and S01.delineation.structure.label.nii.gz (or .nii, .hdr)",
        page="https://www.loni.usc.edu/research/atlases",
        splits={"train": 27, "val": 3, "test": 10},
    ),
    "mindboggle": Layout(
        images=("{set}/{name}/t1weighted_brain.MNI152.nii.gz",),
        labels=("{set}/{name}/labels.DKT31.manual+aseg.MNI152.nii.gz",),
        example="OASIS-TRT-20_volumes/OASIS-TRT-20-1/t1weighted_brain.MNI152.nii.gz "
        "and labels.DKT31.manual+aseg.MNI152.nii.gz",
        page="https://mindboggle.info/data.html",
        splits={"train": ["NKI-RS-22*", "NKI-TRT-20*"], "val": ["OASIS-TRT-20*"], "test": ["MMRR-21*"]},
    ),
    "flare21": Layout(
        images=("TrainingImg/{name:train_*}_0000.nii.gz",),
        labels=("TrainingMask/{name}.nii.gz",),
        example="TrainingImg/train_000_0000.nii.gz and TrainingMask/train_000.nii.gz",
        page="https://flare.grand-challenge.org",
        splits={"train": 301, "val": 20, "test": 40},
    ),
    "flare22": Layout(
        images=("imagesTr/{name:FLARE22_Tr_*}_0000.nii.gz",),
        labels=("labelsTr/{name}.nii.gz",),
        example="imagesTr/FLARE22_Tr_0001_0000.nii.gz and labelsTr/FLARE22_Tr_0001.nii.gz",
        page="https://flare22.grand-challenge.org",
        splits={"train": 38, "val": 4, "test": 8},
    ),
    "abdomen_mr": Layout(
        images=("imagesTr/{name:AbdomenMRCT_*}_0000.nii.gz",),
        labels=("labelsTr/{name}_0000.nii.gz", "labelsTr/{name}.nii.gz"),
        example="imagesTr/AbdomenMRCT_0001_0000.nii.gz (_0000 is MR) and labelsTr/AbdomenMRCT_0001_0000.nii.gz",
        page="https://learn2reg.grand-challenge.org",
        splits={"train": 34, "val": 4, "test": 10},
    ),
    "dirlab": Layout(
        images=("{folder:[Cc]ase*}/[Ii]mages/[Cc]ase{group:[0-9]*}_T{phase:[05]0}*.img",),
        points=("{folder}/[Ee]xtreme[Pp]hases/[Cc]ase{group}_*300_T{phase}_xyz.txt",),
        example="Case1Pack/Images/case1_T00_s.img, …T50… and Case1Pack/ExtremePhases/Case1_300_T00_xyz.txt, …T50…",
        page="https://www.dir-lab.com/ReferenceData.html",
        splits={"train": 6, "val": 2, "test": 2},
    ),
}


def find_scans(
    dataset_dir: str | Path, split: str, layout: str = "iregzoo", splits: Splits | None = None
) -> list[Entry]:
    """The scans of one split of a data set, as ``{"image": path, "label": path, "points": path, "group": name}``.

    Label map and landmarks stand there where there are any, a group where scans are of one patient; the first scan of a
    group is the fixed one of its pairs.

    Args:
        dataset_dir: the data set's folder, or the one above it.
        split: ``train``, ``val`` or ``test``.
        layout: ``iregzoo`` (images/NAME.nii.gz, and labels/NAME.nii.gz, points/NAME.csv or .mrk.json where there are
            any; splits.json lists each split's names, those of one patient in a list of their own), or a name of
            ``LAYOUTS``.
        splits: other splits than the layout's own, see ``Layout``.

    Raises:
        InputError: where the folder is missing or has another layout.
    """
    root = Path(dataset_dir)
    if not str(dataset_dir).strip() or not root.is_dir():
        raise InputError(f"dataset_dir {str(dataset_dir)!r}: no such folder; give the data set's folder")
    if layout == "iregzoo":
        if splits is not None:
            raise InputError("splits: the layout iregzoo defines its own in splits.json; leave this setting out")
        units = _own(root, split)
    elif layout in LAYOUTS:
        units = _published(root, layout, split, LAYOUTS[layout].splits if splits is None else splits)
    else:
        raise InputError(f"layout {layout!r} is unknown; choose iregzoo, {', '.join(LAYOUTS)}")
    scans = [scan for unit in units for scan in unit]
    for unit in units:
        if "group" in unit[0] and len(unit) < 2:
            raise InputError(f"{unit[0]['image']}: is the only scan of its patient; a pair needs two")
        if ("group" in unit[0]) != ("group" in scans[0]):
            raise InputError(
                f"{unit[0]['image']}: only some scans are listed by patient; list all of them by patient, or none"
            )
    if len(scans) < 2:
        raise InputError(f"{root}: split {split!r} has {len(scans)} scans; a pair needs two")
    return scans


def _own(root: Path, split: str) -> list[Unit]:
    """Scans, or groups of them, of our own layout."""
    listing = root / "splits.json"
    if not listing.is_file():
        raise InputError(
            f"{root}: has no splits.json; expected images/, labels/ and a splits.json that lists the scans of each "
            "split; for another layout, set layout (see docs/datasets.md)"
        )
    try:
        splits = json.loads(listing.read_text(encoding="utf-8"))
        if not isinstance(splits, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise InputError(f"{listing}: is not a JSON object of splits ({error}); correct it") from None
    if split not in splits:
        raise InputError(f"{listing}: has no split {split!r}, only {', '.join(splits)}")
    _check_listed(listing, split, splits[split])
    listed = {name: found for name, found in splits.items() if isinstance(found, list)}
    _warn_of_shared(
        listing, {name: {scan for unit in found for scan in _names(unit)} for name, found in listed.items()}
    )
    units: list[Unit] = []
    for unit in splits[split]:
        if isinstance(unit, str):
            units.append([_entry(root, unit, split)])
        else:
            units.append([{**_entry(root, name, split), "group": unit[0]} for name in unit])
    return units


def _names(unit: object) -> list[str]:
    """Of a unit of a split, a scan or those of a patient; of what is neither, none."""
    return [name for name in (unit if isinstance(unit, list) else [unit]) if isinstance(name, str)]


def _warn_of_shared(place: Path, members: Mapping[str, set[str]]) -> None:
    """Warn of scans with which weights would be trained, and also chosen or tested, as for a first try."""
    for one, other in combinations([name for name in APART if name in members], 2):
        if shared := sorted(members[one] & members[other]):
            warnings.warn(
                f"{place}: {shared[0]} is in the splits {one} and {other}: what is measured says nothing of others",
                stacklevel=3,
            )


def _check_listed(listing: Path, split: str, units: object) -> None:
    """Refuse a split that is no list of names or of lists of names, or where a scan would be paired with itself."""
    if not isinstance(units, list):
        raise InputError(f"{listing}: split {split!r} is {units!r}; expected a list of names, or of lists of names")
    first: set[str] = set()
    for unit in units:
        names = [unit] if isinstance(unit, str) else unit
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise InputError(f"{listing}: split {split!r} lists {unit!r}; expected a name, or a list of names")
        if names[0] in first or len(set(names)) < len(names):
            raise InputError(
                f"{listing}: split {split!r} has a scan twice, with {unit!r}; list those of a patient once"
            )
        first.add(names[0])


def _entry(root: Path, name: str, split: str) -> Entry:
    image, label = (root / folder / f"{name}.nii.gz" for folder in ("images", "labels"))
    points = [path for end in ("csv", "mrk.json") if (path := root / "points" / f"{name}.{end}").is_file()]
    if not image.is_file():
        raise InputError(f"{image}: no such file, but splits.json lists it in {split}")
    entry = {"image": str(image)}
    if label.is_file():
        entry["label"] = str(label)
    return {**entry, "points": str(points[0])} if points else entry


def _published(root: Path, name: str, split: str, splits: Splits) -> list[Unit]:
    """Scans, or groups of them, of one split of a published data set, in the order of names."""
    if not isinstance(splits, Mapping):
        raise InputError(f"splits {splits!r}: give what belongs to each split, such as {{'train':10,'val':2,'test':2}}")
    if split not in splits:
        raise InputError(f"splits: there is no split {split!r}, only {', '.join(splits)}")
    base, layout, images = _images(root, name)
    found = [(path, _companions(base, path, fields, layout)) for path, fields in images]
    grouped = groupby(found, lambda scan: scan[1].get("group", scan[0]))
    units = {paths[0]: list(entries) for paths, entries in (zip(*unit, strict=True) for _, unit in grouped)}
    counts = {name: count for name, count in splits.items() if isinstance(count, int)}
    if split in counts and sum(counts.values()) > len(units):
        asked = f"holds {len(units)} of the {sum(counts.values())} scans or patients that the splits {counts} need"
        raise InputError(f"{base}: {asked}; get the rest from {layout.page}, or set splits")
    for name, wanted in splits.items():
        if name not in counts and (not isinstance(wanted, Sequence) or isinstance(wanted, str)):  # of patterns
            raise InputError(
                f"splits: {name} is {wanted!r}; give a number of scans, or a list of patterns such as ['NKI*']"
            )
    members = {name: _paths_of(list(units), splits, name) for name in splits}
    _warn_of_shared(base, {name: set(paths) for name, paths in members.items()})
    if not members[split] and split not in counts:
        patterns = ", ".join(splits[split])  # type: ignore[arg-type]
        raise InputError(f"{base}: holds no scan of split {split!r} ({patterns}); get it from {layout.page}")
    return [units[path] for path in members[split]]


def _paths_of(paths: Sequence[str], splits: Splits, split: str) -> list[str]:
    """Of scans or patients, in the order of names, what a split has: the next so many, or all of some patterns."""
    wanted = splits[split]
    if not isinstance(wanted, int):
        return [path for path in paths if any(fnmatch(path, pattern) for pattern in wanted)]
    counts = {name: count for name, count in splits.items() if isinstance(count, int)}
    first = sum(list(counts.values())[: list(counts).index(split)])
    return list(paths)[first : first + wanted]


def _images(root: Path, name: str) -> tuple[Path, Layout, list[tuple[str, dict[str, str]]]]:
    """The folder that has the layout, and its images: relative path and what the fields of its pattern stand for."""
    layout = LAYOUTS[name]
    for base in (root, *sorted(path for path in root.iterdir() if path.is_dir())):
        for pattern in layout.images:
            glob = FIELD.sub(lambda found: found[2] or "*", pattern)
            paths = [path.relative_to(base).as_posix() for path in base.glob(glob)]
            found = [(path, fields) for path in paths if (fields := _fields(pattern, path)) is not None]
            if found:
                return base, layout, sorted(found, key=lambda scan: _order(scan[0]))
    raise InputError(
        f"{root}: holds no data set of layout {name}; expected {layout.example}, from {layout.page}; "
        "see docs/datasets.md"
    )


def _fields(pattern: str, path: str) -> dict[str, str] | None:
    """What the fields of a pattern stand for in a path."""
    named = FIELD.sub(lambda found: f"(?P<{found[1]}>{found[2] or '*'})", pattern.replace(".", r"\."))
    found = re.fullmatch(named.replace("*", "[^/]*"), path)
    return found.groupdict() if found else None


def _order(path: str) -> list[list[Any]]:
    """Scans sort by file name, then by folder; numbers by their value."""
    parts = (path.rpartition("/")[2].casefold(), path)
    return [[int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)] for text in parts]


def _companions(base: Path, path: str, fields: Mapping[str, str], layout: Layout) -> Entry:
    """An image with its label map, landmarks and group."""
    entry = {"image": str(base / path)}
    for kind, patterns in (("label", layout.labels), ("points", layout.points)):
        filled = [pattern.format(**{key: escape(value) for key, value in fields.items()}) for pattern in patterns]
        match = next((path for pattern in filled for path in sorted(base.glob(pattern))), None)
        if match is not None:
            entry[kind] = str(match)
        elif filled:
            raise InputError(f"{base / path}: has no {kind}; expected {base / filled[0]}, from {layout.page}")
    return {**entry, "group": fields["group"]} if "group" in fields else entry
