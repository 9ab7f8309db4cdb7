"""Two scans brought together by a rigid or affine transform alone: no network, and nothing deforms."""

from pathlib import Path

import torch

from iregzoo.errors import InputError
from iregzoo.register import Progress, Result, Scans, choose_start, finish, timed
from iregzoo.registration import Registration
from iregzoo.space.frame import Frame
from iregzoo.space.grid import Matrix, network_grid
from iregzoo.space.precise import WINDOW, compared, lattice_spacing, precise_start
from iregzoo.space.start import GIVEN, SEARCHED, Find, affine_start


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

    A search finds where they are (``affine_start``), and local information makes that precise (``precise_start``).
    Lesions that masks leave out are filled for the search and do not count after it. Where a finder is given that finds
    both brains, it begins there; and if they then share less than one person's scans do, the search may know better.

    Args:
        scans: the pair, as for ``register``.
        kind: ``rigid`` (turned and shifted) or ``affine`` (also stretched and sheared).
        init: where to begin: ``auto`` searches; otherwise as for ``register``, within some millimetres and degrees of
            the result. Where ``kind`` is ``rigid``, what it stretches stays stretched.
        finder: what finds brains, such as ``zoo.brain_finder()``, whatever their contrasts and with or without heads.
        progress: told the name of each stage as it begins.

    Raises:
        InputError: for another kind, masks that leave nothing to compare, scans that do not overlap, and as
            ``affine_start`` and ``choose_start`` do.
    """
    check_kind(kind)
    if isinstance(init, (str, Path)):
        init = choose_start(init)
    begin = kind if isinstance(init, str) and init == "auto" else init
    name = begin if isinstance(begin, str) else GIVEN
    fixed, moving = scans.filled.fixed, scans.filled.moving
    seconds: dict[str, float] = {}
    rigid, masks = kind == "rigid", scans.masks
    with timed("start", seconds, progress):
        brains = finder(fixed, moving, rigid=begin == "rigid") if finder and name in SEARCHED else None
        start = affine_start(fixed, moving, begin) if brains is None else brains
        _check_compared(scans, start)
    with timed("align", seconds, progress):
        found = precise_start(fixed, moving, start, rigid=rigid, masks=masks)
        if brains is not None and not found.one_person:
            searched = precise_start(fixed, moving, affine_start(fixed, moving, begin), rigid=rigid, masks=masks)
            found = searched if searched.one_person else found
    with timed("warp", seconds, progress):
        frame = Frame(scans.fixed.grid, scans.moving.grid, scans.fixed.grid, found.start)
        result = finish(scans, frame, name, Registration(torch.zeros(1, 3, *frame.fixed.shape)), seconds)
    if (result.warped == scans.moving.outside).all():
        raise InputError(
            f"{scans.moving.path}: shows nothing where {scans.fixed.path.name} lies (init {name}); try --init center "
            "or a transform file, or correct the affines in their headers"
        )
    return result


def _check_compared(scans: Scans, start: Matrix) -> None:
    """Refuse masks that leave nothing to look at."""
    if not scans.masks:
        return
    spacing = lattice_spacing(scans.fixed.grid, scans.moving.grid)
    lattice = network_grid(scans.fixed.grid, (spacing,) * 3, stride=1)
    windows = compared(scans.masks, lattice, start)
    if windows is not None and not windows.any():
        paths = " and ".join(str(mask.path) for mask in scans.masks)
        raise InputError(
            f"{paths}: nowhere do {WINDOW}×{WINDOW}×{WINDOW} voxels of {spacing:.2g} mm count, by which the scans are "
            "compared; enlarge the masks"
        )


def check_kind(kind: str) -> None:
    """Check that a kind of transform is known.

    Raises:
        InputError: where it is not.
    """
    if kind not in SEARCHED:
        raise InputError(f"kind {kind!r} is unknown; choose {' or '.join(SEARCHED)}")
