"""A group of scans in its mean pose: what groupwise registration begins with.

Affine starts are averaged by their logarithms (Arsigny et al., SIAM J. Matrix Analysis 2007).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import expm, logm
from torch import Tensor

from iregzoo.cards import WeightsCard
from iregzoo.cases import distinct_names, read_rows, stem
from iregzoo.errors import InputError
from iregzoo.quality import labels_of
from iregzoo.space.frame import MARGIN_MM, MAX_VOXELS, affine_displacement, warp_scan
from iregzoo.space.grid import CORNERS, Grid, Matrix, bounding_grid, canonical_axes, inverse
from iregzoo.space.points import map_points
from iregzoo.space.scan import Scan, Window, looks_like_labels, normalise, read_labels, read_scan
from iregzoo.space.start import SEARCHED, STARTS, Find, affine_start, others
from iregzoo.space.upright import lying

Progress = Callable[[str], None]
COLUMNS = ("image", "labels", "name")  # of a table of scans


@dataclass(frozen=True)
class Member:
    """One scan of a group: its name and files; ``labels`` is empty where it has no label map.

    Attributes:
        upright: a rotation (4, 4) of its world after which it lies as its axes say; None where its header says so. The
            scan and its label map are read in the world after it.
    """

    name: str
    image: str
    labels: str = ""
    upright: Matrix | None = None

    def scan(self) -> Scan:
        return self.lying(read_scan(self.image))

    def label_map(self) -> Scan:
        """Its label map, which ``labels_in`` has compared with the image."""
        return self.lying(read_labels(self.labels))

    def lying(self, scan: Scan) -> Scan:
        """What was read of it, as it lies."""
        return scan if self.upright is None else scan.in_world(self.upright)


@dataclass(frozen=True)
class Group:
    """Scans in their mean pose.

    Attributes:
        members: the scans, two or more.
        starts: affine (4, 4) of each, LPS mm, from the template's world to the scan's, in which that lies upright.
        grid: of the template; its axes run right, anterior, superior.
        init: the name of the starts.
        window: of the intensities, as for ``normalise``.
        doubts: what makes a scan's place in its scanner doubtful, in words, by the scan's name.
    """

    members: Sequence[Member]
    starts: Sequence[Matrix]
    grid: Grid
    init: str = "none"
    window: Window | None = None
    doubts: Mapping[str, str] = field(default_factory=dict)


def read_members(table: str | Path) -> list[Member]:
    """The scans of a CSV file with the columns image and, optionally, labels and name; see ``cases.read_rows``.

    Raises:
        InputError: as ``read_rows`` and ``distinct_names`` do.
    """
    rows = read_rows(table, COLUMNS, ("image",), of="scans")
    members = [Member(row.get("name", ""), row["image"], row.get("labels", "")) for row in rows]
    made, paths = [stem(member.image) for member in members], [[member.image] for member in members]
    names = distinct_names([member.name for member in members], made, paths, of="scan")
    return [replace(member, name=name) for member, name in zip(members, names, strict=True)]


def read_group(
    members: Sequence[Member],
    card: WeightsCard,
    *,
    init: str = "auto",
    spacing: Sequence[float] | None = None,
    finder: Find | None = None,
    progress: Progress = lambda name: None,
) -> Group:
    """Bring the scans of a group to their mean pose, and choose the template's grid.

    That has the scans' median field of view, around what they show, and stands in the middle of the world, or where
    the scans' headers say for the start ``none``. The starts ``rigid`` and ``affine`` are searched twice: from the
    first scan, then from the mean that this gives, which looks like every scan.

    Args:
        members: the scans.
        card: of the weights that will register them.
        init: affine start, a name as for ``register``.
        spacing: of the template along right, anterior, superior, mm; the scans' median if None.
        finder: what finds starts, where the weights have it; None searches the scans as they are.
        progress: told the name of each scan as it is placed, at most ``placings`` times.

    Raises:
        InputError: for fewer than two scans, one twice, a label map among images, an unknown start, a spacing that is
            none or gives a grid that is too fine or too coarse, a scan that the others' field of view does not meet or
            that is turned too far from them; and as ``read_scan`` and ``affine_start`` do.
    """
    check_members(members)
    name = card.init if init == "auto" else init
    if name not in STARTS:
        raise InputError(f"init {init!r} is unknown; choose auto, {', '.join(STARTS)}")
    if spacing is not None and not all(0 < step < np.inf for step in spacing):
        raise InputError(f"spacing {', '.join(map(str, spacing))}: give millimetres above 0")
    members, views, spacings, doubts = _look(members, card.window, name, finder, progress)
    step = np.median(spacings, axis=0) if spacing is None else np.array(spacing, dtype=float)
    first, starts = members[0].scan(), [np.eye(4)]
    for member in members[1:]:
        progress(member.name)
        starts.append(affine_start(first, member.scan(), name, finder))
    group = _around_mean(Group(members, starts, first.grid, name, card.window, doubts), views, step)
    if name not in SEARCHED:
        return _checked(group, views)
    mean, again = Scan(mean_image(group, poses(group))[0], group.grid, Path("template")), []
    for member in members:
        progress(member.name)
        again.append(affine_start(mean, member.scan(), name, finder))
    return _checked(_around_mean(replace(group, starts=again), views, step), views)


def _look(
    members: Sequence[Member], window: Window | None, init: str, finder: Find | None, progress: Progress
) -> tuple[list[Member], list[Grid], list[Matrix], dict[str, str]]:
    """All scans as they lie, what each shows, its spacing along right, anterior, superior, and doubts.

    They are read before any work.

    Raises:
        InputError: as ``read_scan`` and ``normalise`` do, and where some are label maps and others images.
    """
    seen, views, spacings, doubts = list[Member](), [], [], dict[str, str]()
    labels, images = list[Member](), list[Member]()
    for member in members:
        progress(member.name)
        scan = member.scan()
        (labels if looks_like_labels(scan) else images).append(member)
        if labels and images:
            raise InputError(
                f"{labels[0].image}: looks like a label map, but {images[0].name} is an image; give the image here and "
                "the label map in the column labels"
            )
        upright = finder.upright(scan) if finder else np.eye(4)
        if doubt := "; ".join(filter(None, (scan.doubt, lying(scan, upright, init)))):
            doubts[member.name] = doubt
        seen.append(replace(member, upright=upright if init in SEARCHED else None))
        scan = seen[-1].lying(scan)
        views.append(bounding_grid(normalise(scan, window).data[0, 0] > 0, scan.grid, MARGIN_MM))
        spacings.append(scan.grid.spacing[canonical_axes(scan.grid)[0]])
    return seen, views, spacings, doubts


def placings(init: str, card: WeightsCard) -> int:
    """How many times ``read_group`` reads each scan but the first, at most."""
    return 3 if (card.init if init == "auto" else init) in SEARCHED else 2


def check_members(members: Sequence[Member]) -> None:
    """Check that there are two scans or more, each once.

    Raises:
        InputError: where there are not.
    """
    if len(members) < 2:
        raise InputError(f"scans: {len(members)} are too few for a mean; give two or more")
    seen = dict[Path, Member]()
    for member in members:
        other = seen.setdefault(Path(member.image).resolve(), member)
        if other is not member:
            raise InputError(f"{member.image}: is listed twice, as {other.name} and {member.name}; list it once")


def labels_in(members: Sequence[Member]) -> list[int]:
    """The labels that any scan has; none where there are no label maps.

    Raises:
        InputError: for a scan without a label map where others have one, an empty one, and as ``read_scan`` and
            ``read_labels`` do.
    """
    labelled, found = [member for member in members if member.labels], set[int]()
    for member in members if labelled else ():
        if not member.labels:
            raise InputError(f"{member.image}: has no label map, but {labelled[0].name} has; give all one or none")
        own = labels_of(read_labels(member.labels, member.scan()).data)
        if not own:
            raise InputError(f"{member.labels}: is empty; give a label map that labels something")
        found |= set(own)
    return sorted(found)


def _around_mean(group: Group, views: Sequence[Grid], spacing: Matrix) -> Group:
    """A group, whose starts are from any one world, in its mean pose and on its grid.

    Args:
        group: the scans.
        views: what each scan shows, in its own world.
        spacing: of the grid, mm.
    """
    mean = expm(
        np.mean([_log(start, member) for start, member in zip(group.starts, group.members, strict=True)], axis=0)
    )
    starts = [_exact(start @ inverse(mean)) for start in group.starts]
    boxes = np.array([_box(view, inverse(start)) for view, start in zip(views, starts, strict=True)])
    low, high = np.median(boxes, axis=0)
    grid = _grid_between(low, high, spacing)
    if group.init != "none":
        moved = np.eye(4)
        moved[:3, 3] = grid.centre
        starts, grid = [_exact(start @ moved) for start in starts], Grid(grid.shape, inverse(moved) @ grid.affine)
    return replace(group, starts=starts, grid=grid)


def _checked(group: Group, views: Sequence[Grid]) -> Group:
    """A group whose scans all reach its grid; ``views`` is what each shows, in its own world."""
    low, high = _box(group.grid, np.eye(4))
    for member, start, view in zip(group.members, group.starts, views, strict=True):
        first, last = _box(view, inverse(start))
        if (first >= high).any() or (last <= low).any():
            raise InputError(
                f"{member.image}: does not meet the other scans (init {group.init}); align them with --init "
                f"{others(group.init)}, or leave it out"
            )
    return group


def _log(start: Matrix, member: Member) -> Matrix:
    """The logarithm of a start; one that turns by 180° or mirrors has none that is real."""
    found = logm(start)
    if np.abs(np.imag(found)).max() > 1e-6 or not np.allclose(expm(np.real(found)), start, atol=1e-4):
        raise InputError(f"{member.image}: is turned or mirrored so far that the scans have no mean pose; reorient it")
    real: Matrix = np.real(found)
    return real


def _exact(matrix: Matrix) -> Matrix:
    """An affine whose last row is no longer rounded."""
    matrix[3] = (0, 0, 0, 1)
    return matrix


def _box(grid: Grid, world: Matrix) -> Matrix:
    """The lowest and highest coordinates that a grid's voxels reach after an affine of the world: (2, 3)."""
    placed = map_points(world @ grid.affine, torch.from_numpy(CORNERS * grid.shape - 0.5)).numpy()
    return np.stack((placed.min(0), placed.max(0)))


def _grid_between(low: Matrix, high: Matrix, spacing: Matrix) -> Grid:
    """A grid (LPS mm) whose axes run right, anterior and superior, in the middle between two corners."""
    sizes = np.ceil((high - low) / spacing - 1e-3)
    if sizes.min() < 2 or sizes.prod() > MAX_VOXELS:
        shape, step = ("×".join(f"{number:.4g}" for number in numbers) for numbers in (sizes, spacing))
        raise InputError(
            f"spacing {step} mm: the template would have {shape} voxels; set --spacing for 2 or more along each axis "
            f"and at most {MAX_VOXELS:,} in all"
        )
    x, y, z = (int(size) for size in sizes)
    affine = np.diag([*(spacing * (-1, -1, 1)), 1.0])
    affine[:3, 3] = (low + high) / 2 - affine[:3, :3] @ ((np.array((x, y, z)) - 1) / 2)
    return Grid((x, y, z), affine)


def mean_image(group: Group, ways: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean of the scans, each warped once, and of how many it is: (1, 1, *grid.shape) each.

    A voxel's mean is that of the scans whose field of view has it, in [0, 1] or within the group's window.

    Args:
        group: the scans.
        ways: each one's whole displacement from the template, (1, 3, *grid.shape), LPS mm.
    """
    total, seen = torch.zeros(1), torch.zeros(1)
    for member, way in zip(group.members, ways, strict=True):
        image, shown = warped(member, way, group)
        total, seen = total + image, seen + shown
    low, high = group.window or (0.0, 1.0)
    return low + (high - low) * torch.where(seen > 0, total / seen.clamp(min=1e-6), 0.0), seen


def warped(member: Member, way: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """A scan in [0, 1] on its group's grid, and how much of each voxel its field of view has: (1, 1, *grid.shape) each.

    Args:
        member: the scan.
        way: its whole displacement from the template, (1, 3, *grid.shape), LPS mm.
        group: to which it belongs.
    """
    scan = normalise(member.scan(), group.window)
    both = warp_scan(replace(scan, data=torch.cat((scan.data, torch.ones_like(scan.data)), 1)), way, group.grid)
    return both[:, :1], both[:, 1:]


def poses(group: Group) -> Iterator[Tensor]:
    """Each scan's displacement from the template by its start alone: (1, 3, *grid.shape), LPS mm."""
    return (affine_displacement(start, group.grid) for start in group.starts)
