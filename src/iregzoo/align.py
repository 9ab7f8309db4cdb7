"""Two scans brought together by a rigid or affine transform alone: nothing deforms."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch

from iregzoo.errors import InputError
from iregzoo.register import Progress, Result, Scans, choose_start, finish, timed, uprights
from iregzoo.registration import Registration
from iregzoo.space.frame import Frame
from iregzoo.space.grid import Matrix, network_grid
from iregzoo.space.precise import WINDOW, Precise, compared, lattice_spacing, precise_start
from iregzoo.space.scan import Scan
from iregzoo.space.start import GIVEN, SEARCHED, Find, Nowhere, affine_start, others


@torch.no_grad()
def align(
    scans: Scans,
    kind: str = "rigid",
    *,
    init: str | Path | Matrix = "auto",
    finder: Find | None = None,
    progress: Progress = lambda stage: None,
) -> Result:
    """Find the transform with which two scans tell most of each other, of one person on two days for instance.

    A finder finds where their brains are, or else a search where they are (``affine_start``), and local information
    makes that precise (``precise_start``). If the scans then share less than one person's do, the search has its turn
    after the finder, and counts if they share as much by it. Lesions that masks leave out are filled for both and do
    not count after them.

    Args:
        scans: the pair, as for ``register``.
        kind: ``rigid`` (turned and shifted) or ``affine`` (also stretched and sheared).
        init: where to begin: ``auto`` is the kind; otherwise as for ``register``, within some millimetres and degrees
            of the result. Where ``kind`` is ``rigid``, what a matrix stretches stays stretched.
        finder: what finds brains, such as ``zoo.brain_finder()``, whatever their contrasts and with or without heads,
            where the start is to be searched for; without one, or without brains, it is.
        progress: told the name of each stage as it begins.

    Raises:
        InputError: as ``check_kind`` does, for masks that leave nothing to compare, scans that do not overlap, and as
            ``affine_start`` and ``choose_start`` do.
    """
    if isinstance(init, (str, Path)):
        init = choose_start(init)
    check_kind(kind, init)
    begin = kind if isinstance(init, str) and init == "auto" else init
    name = begin if isinstance(begin, str) else GIVEN
    seconds: dict[str, float] = {}
    with timed("start", seconds, progress):
        starts = _starts(scans.filled.fixed, scans.filled.moving, begin, finder if name in SEARCHED else None)
        first = next(starts)
    with timed("align", seconds, progress):
        found = _best(scans, chain((first,), starts), rigid=kind == "rigid")
    with timed("warp", seconds, progress):
        frame = Frame(scans.fixed.grid, scans.moving.grid, scans.fixed.grid, found.start)
        result = finish(scans, frame, name, Registration(torch.zeros(1, 3, *frame.fixed.shape)), seconds)
        result = replace(result, shared=found.shared, lying=uprights(scans, name, finder)[1])
    if (result.warped == scans.moving.outside).all():
        refused = ("affine",) if kind == "rigid" else ()
        raise InputError(
            f"{scans.moving.path}: shows nothing where {scans.fixed.path.name} lies (init {name}); try --init "
            f"{others(name, *refused)} or a transform file, or correct the affines in their headers"
        )
    return result


def _starts(fixed: Scan, moving: Scan, begin: str | Matrix, finder: Find | None) -> Iterator[Matrix]:
    """Where the brains lie, if they are found, and then where the start leads that was asked for."""
    brains = finder(fixed, moving, rigid=begin == "rigid") if finder else None
    if brains is not None:
        yield brains
    yield affine_start(fixed, moving, begin, Nowhere(finder) if finder else None)


def _best(scans: Scans, starts: Iterable[Matrix], *, rigid: bool) -> Precise:
    """The first start, made precise, by which the scans share as much as one person's do; the first if none is.

    Raises:
        InputError: where the masks leave nothing to look at, whatever the start.
    """
    found = []
    for start in starts:
        if _comparable(scans, start):
            found.append(precise_start(scans.filled.fixed, scans.filled.moving, start, rigid=rigid, masks=scans.masks))
            if found[-1].one_person:
                return found[-1]
    if not found:
        paths = " and ".join(str(mask.path) for mask in scans.masks)
        spacing = lattice_spacing(scans.fixed.grid, scans.moving.grid)
        raise InputError(
            f"{paths}: nowhere do {WINDOW}×{WINDOW}×{WINDOW} voxels of {spacing:.2g} mm count, by which the scans are "
            "compared; enlarge the masks"
        )
    return found[0]


def _comparable(scans: Scans, start: Matrix) -> bool:
    """Whether masks leave something to look at."""
    spacing = lattice_spacing(scans.fixed.grid, scans.moving.grid)
    windows = compared(scans.masks, network_grid(scans.fixed.grid, (spacing,) * 3, stride=1), start)
    return windows is None or bool(windows.any())


def searches(init: str | Matrix) -> bool:
    """Whether a start of an alignment is searched for, so that a finder helps."""
    return isinstance(init, str) and init in ("auto", *SEARCHED)


def check_kind(kind: str, init: str | Matrix, option: str = "kind") -> None:
    """Check that a kind of transform is known, and that no start is to be searched for that has what it may not have.

    Args:
        kind: of transform.
        init: where to begin.
        option: what a message calls the kind.

    Raises:
        InputError: where it is not known, and for a rigid one that is to begin with an affine.
    """
    if kind not in SEARCHED:
        raise InputError(f"{option} {kind!r} is unknown; choose {' or '.join(SEARCHED)}")
    if kind == "rigid" and isinstance(init, str) and init == "affine":
        raise InputError(f"init affine: stretches the scan, which {option} rigid must not; choose --init rigid")
