"""Groupwise registration: the template of a group of scans, and each scan's way to it.

A template has the mean intensity and the mean shape of a group, and of its labels what most scans say. It starts as the
mean of the scans in their mean pose. In each round every scan is registered to it as ``register`` does, and the scans
are averaged where the mean of their displacements is zero, so that no scan and no first template draws it to itself
(Guimond et al., CVIU 2000; Joshi et al., NeuroImage 2004).
"""

import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iregzoo.errors import InputError
from iregzoo.fields import compose, length
from iregzoo.flags import check_count
from iregzoo.group import Group, Progress, mean_image, poses, warped
from iregzoo.metrics import dice, folding_percent, mean_of
from iregzoo.outputs import whole_file
from iregzoo.quality import labels_of
from iregzoo.register import Scans, register
from iregzoo.similarity import ncc
from iregzoo.space.files import write_transform
from iregzoo.space.frame import Frame, warp_scan
from iregzoo.space.grid import Grid
from iregzoo.space.scan import Scan
from iregzoo.zoo import Method

AT_ONCE = 8  # labels that are warped together
WEAKEST = 1 / 3  # part of the scans that have to label a voxel
MOST_ROUNDS = 100
FAR = 5.0  # standard deviations below the median
LEAST_SPREAD = 0.02  # of NCC: scans of one kind differ by that much
HALF = 0.5  # of a voxel that a field of view has to have for it to count
MEAN, BACK = "mean.npy", "back.npy"  # of a round's folder: its template, and the way to where the mean is zero


@dataclass(frozen=True)
class Template:
    """The mean of a group, on its grid.

    Attributes:
        image: (1, 1, *shape), in [0, 1], or within the window of the weights.
        seen: (1, 1, *shape), how many scans show a voxel.
        fields: a file for each scan, its deformation (1, 3, *shape) float32 from the template, LPS mm, without the
            affine; the mean of them is zero. Empty before any round.
    """

    image: Tensor
    seen: Tensor
    fields: Sequence[Path] = ()


def build_template(
    group: Group,
    method: Method,
    folder: str | Path,
    *,
    rounds: int,
    refine: int | None = None,
    resume: bool = False,
    progress: Progress = lambda name: None,
) -> Iterator[Template]:
    """Build the template of a group, round by round.

    Args:
        group: from ``read_group``.
        method: that registers the scans to the template, from ``zoo.load``.
        folder: for the scans' deformations, 12 bytes a voxel and scan, in a folder of the last round; made if need be.
        rounds: how many, at most ``MOST_ROUNDS``.
        refine: gradient steps of each registration; the card's if None.
        resume: go on with what an earlier build left in the folder, which has to be of the same group and method.
        progress: told the name of each scan that is registered.

    Yields:
        The mean of the scans in their mean pose, and what it becomes in each round, but for those done earlier.

    Raises:
        InputError: for rounds that are no such number, a mean that shows nothing, files that cannot be written, and as
            ``register`` does.
    """
    check_count(rounds, "rounds", least=0, most=MOST_ROUNDS)
    places = [Path(folder) / f"round{number}" for number in range(rounds + 1)]
    done = max((number for number, place in enumerate(places) if resume and (place / MEAN).is_file()), default=0)
    if not resume:
        for place in Path(folder).glob("round*"):
            if re.fullmatch(r"round[0-9]+", place.name):
                shutil.rmtree(place, ignore_errors=True)
    template = _mean_of_round(group, places[done]) if done else Template(*mean_image(group, poses(group)))
    if template.image.min() == template.image.max():
        shape = "×".join(map(str, group.grid.shape))
        raise InputError(f"scans: their mean on {shape} voxels shows nothing; align them by --init, or lower --spacing")
    yield template
    for earlier, place in pairwise(places[done:]):
        for field in template.fields:  # the next round begins with the image alone
            field.unlink(missing_ok=True)
        _register(template, group, method, place, refine, progress)
        _centre(place, len(group.members), group.grid)
        _save(place / MEAN, torch.stack(mean_image(group, ways(group, _fields(group, place)))))
        shutil.rmtree(earlier, ignore_errors=True)
        template = _mean_of_round(group, place)
        yield template


def _register(
    template: Template, group: Group, method: Method, place: Path, refine: int | None, progress: Progress
) -> None:
    """Write a round's deformations, as registered, but for those that are there."""
    fixed = Scan(template.image, group.grid, Path("template"))
    for number, (member, start) in enumerate(zip(group.members, group.starts, strict=True)):
        if not (_raw(place, number).is_file() or _field(place, number).is_file()):
            progress(member.name)
            result = register(Scans(fixed, member.scan()), method, init=start, refine=refine)
            _save(_raw(place, number), result.deformation)


def _centre(place: Path, count: int, grid: Grid) -> None:
    """Replace a round's deformations, LPS mm, by those seen from where their mean is zero.

    With the mean ū, the template's point x lies at y = x + ū(x) in the mean shape. Read at x = (id + ū)⁻¹(y), the
    fields lead from y to the scans, and their mean is zero. What a network pulls in any pair alike goes out with ū.
    Whatever ends this early, it can be called again.
    """
    frame = Frame(grid, grid, grid, np.eye(4))
    if not (place / BACK).is_file():
        mean = torch.zeros(1, 3, *grid.shape)
        for number in range(count):
            mean += _read(_raw(place, number), grid) / count
        _save(place / BACK, frame.in_voxels(frame.undo(mean, grid)))
    back = _read(place / BACK, grid)
    for number in range(count):
        if not _field(place, number).is_file():
            moved = compose(frame.in_voxels(_read(_raw(place, number), grid)), back)
            _save(_field(place, number), frame.deform(moved))
        _raw(place, number).unlink(missing_ok=True)


def _mean_of_round(group: Group, place: Path) -> Template:
    """A round's template, whose deformations are gone where the next round has begun."""
    image, seen = _read(place / MEAN, group.grid)
    return Template(image, seen, _fields(group, place))


def _fields(group: Group, place: Path) -> list[Path]:
    return [_field(place, number) for number in range(len(group.members))]


def _field(place: Path, number: int) -> Path:
    return place / f"{number}.npy"


def _raw(place: Path, number: int) -> Path:
    """A deformation before the mean is taken out."""
    return place / f"{number}.raw.npy"


def _save(path: Path, tensor: Tensor) -> None:
    with whole_file(path, overwrite=True) as partial:
        np.save(partial, tensor.float().numpy())


def _read(field: Path, grid: Grid) -> Tensor:
    with suppress(OSError, EOFError, ValueError):  # where a machine stopped before it was on the disk
        read = np.load(field)
        if read.shape[-3:] == grid.shape:
            return torch.from_numpy(read)
    raise InputError(f"{field}: is damaged; remove the folder that it is in, and run again")


def ways(group: Group, fields: Sequence[Path]) -> Iterator[Tensor]:
    """Each scan's whole displacement from the template, affine included: (1, 3, *shape), LPS mm."""
    grid = group.grid
    if not fields:
        return poses(group)
    pairs = zip(group.starts, fields, strict=True)
    return (Frame(grid, grid, grid, start).total(_read(field, grid)) for start, field in pairs)


def template_labels(group: Group, template: Template, labels: Sequence[int]) -> Tensor:
    """What most scans have at each voxel of a template: (1, 1, *shape) int32, one of ``labels`` or 0."""
    labelled, most = torch.zeros(1, 1, *group.grid.shape), torch.zeros(1, 1, *group.grid.shape)
    commonest = torch.zeros(1, 1, *group.grid.shape, dtype=torch.int32)
    for first in range(0, len(labels), AT_ONCE):  # all at once would take a brain's atlas gigabytes
        some = torch.tensor(labels[first : first + AT_ONCE], dtype=torch.int32)
        votes = torch.zeros(1, len(some), *group.grid.shape)
        for member, way in zip(group.members, ways(group, template.fields), strict=True):
            own = member.label_map()
            of_each = (own.data == some.view(1, -1, 1, 1, 1)).float()
            votes += warp_scan(replace(own, data=of_each), way, group.grid) / len(group.members)
        labelled += votes.sum(1, keepdim=True)
        largest, which = votes.max(1, keepdim=True)
        commonest = torch.where(largest > most, some[which], commonest)
        most = torch.maximum(most, largest)
    return torch.where(_elected(labelled), commonest, 0)


def _elected(labelled: Tensor) -> Tensor:
    """Which voxels are labelled, from the part of the scans that label each.

    Those that most scans label, as many as a scan labels on average. A plain majority would be smaller than the scans'
    labels, because these disagree on the rim. Voxels that tie come in together; none comes in that fewer than
    ``WEAKEST`` of the scans label.
    """
    size = max(1, round(float(labelled.double().sum())))
    weakest = float(labelled.flatten().topk(size).values[-1])
    return labelled >= max(weakest, WEAKEST)


def agreement(group: Group, template: Template, labels: Tensor | None = None) -> list[dict[str, Any]]:
    """How well each scan, warped by its own way, agrees with a template, as a row of a table.

    ``ncc`` with the mean of the other scans, where they and it show something (NaN if nowhere); the mean ``dice`` with
    the labels where there are any; and of the deformation without the affine the mean length in mm and the voxels that
    fold in percent.

    Args:
        group: from ``read_group``.
        template: from ``build_template``.
        labels: from ``template_labels``.
    """
    frame, rows = Frame(group.grid, group.grid, group.grid, np.eye(4)), list[dict[str, Any]]()
    for number, (member, way) in enumerate(zip(group.members, ways(group, template.fields), strict=True)):
        row: dict[str, Any] = {"name": member.name, "image": str(Path(member.image).absolute())}
        row["ncc"] = _likeness(group, template, *warped(member, way, group))
        if labels is not None:
            own = warp_scan(member.label_map(), way, group.grid, mode="nearest")
            row["dice"] = mean_of(dice(own, labels, labels_of(labels)))
        if template.fields:
            displacement = _read(template.fields[number], group.grid)
            row["displacement_mean_mm"] = float(length(displacement).mean())
            row["folding_percent"] = float(folding_percent(frame.in_voxels(displacement)))
        rows.append(row)
    return rows


def _likeness(group: Group, template: Template, image: Tensor, shown: Tensor) -> float:
    """NCC of a scan, warped, and the mean of the others: the mean of few scans would be like each of them."""
    low, high = group.window or (0.0, 1.0)
    others = template.seen - shown
    both = (shown > HALF) & (others > HALF)
    if not both.any():
        return math.nan
    rest = ((template.image - low) / (high - low) * template.seen - image)[both] / others[both]
    return float(ncc(rest.view(1, 1, -1, 1), image[both].view(1, 1, -1, 1)))


def usual_ncc(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The median of the scans' NCC with the others, and the least that is not far below it.

    Far is ``FAR`` standard deviations, of at least ``LEAST_SPREAD`` each, by the median absolute deviation, which scans
    that are far off do not change.

    Args:
        rows: from ``agreement``.
    """
    known = [row["ncc"] for row in rows if not math.isnan(row["ncc"])] or [math.nan]
    middle = median(known)
    spread = 1.4826 * median(abs(value - middle) for value in known)
    return middle, middle - FAR * max(spread, LEAST_SPREAD)


def write_ways(group: Group, template: Template, folder: str | Path) -> None:
    """Write each scan's transform from the template into a new folder: NAME.h5 (ITK) warps the scan to the template."""
    folder = Path(folder)
    folder.mkdir()
    still = torch.zeros(1, 3, *group.grid.shape)
    for number, (member, start) in enumerate(zip(group.members, group.starts, strict=True)):
        field = _read(template.fields[number], group.grid) if template.fields else still
        own = start if member.upright is None else member.upright.T @ start  # to where its header says that it lies
        write_transform(folder / f"{member.name}.h5", field, group.grid, own)
