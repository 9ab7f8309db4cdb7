"""Two scans brought together by a rigid or affine transform alone: no network, and nothing deforms."""

from pathlib import Path

import torch

from iregzoo.errors import InputError
from iregzoo.register import Progress, Result, Scans, choose_start, finish, timed
from iregzoo.registration import Registration
from iregzoo.space.frame import Frame
from iregzoo.space.grid import Matrix
from iregzoo.space.precise import precise_start
from iregzoo.space.start import GIVEN, affine_start

KINDS = ("rigid", "affine")


@torch.no_grad()
def align(
    scans: Scans,
    kind: str = "rigid",
    *,
    init: str | Path | Matrix = "auto",
    progress: Progress = lambda stage: None,
) -> Result:
    """Find the transform with which two scans tell most of each other, of one person on two days for instance.

    A search finds where they are (``affine_start``), and local information makes that precise (``precise_start``).
    Lesions that masks leave out are filled for the search and do not count after it.

    Args:
        scans: the pair, as for ``register``.
        kind: ``rigid`` (turned and shifted) or ``affine`` (also stretched and sheared).
        init: where to begin: ``auto`` searches; otherwise as for ``register``, within some millimetres and degrees of
            the result. Where ``kind`` is ``rigid``, what it stretches stays stretched.
        progress: told the name of each stage as it begins.

    Raises:
        InputError: for another kind, scans that do not overlap, and as ``affine_start`` and ``choose_start`` do.
    """
    check_kind(kind)
    if isinstance(init, (str, Path)):
        init = choose_start(init)
    fixed, moving = scans.filled.fixed, scans.filled.moving
    seconds: dict[str, float] = {}
    with timed("start", seconds, progress):
        begin = affine_start(fixed, moving, kind if isinstance(init, str) and init == "auto" else init)
    with timed("align", seconds, progress):
        found = precise_start(fixed, moving, begin, rigid=kind == "rigid", masks=scans.masks)
    with timed("warp", seconds, progress):
        frame = Frame(scans.fixed.grid, scans.moving.grid, scans.fixed.grid, found)
        result = finish(scans, frame, kind, Registration(torch.zeros(1, 3, *frame.fixed.shape)), seconds)
    if (result.warped == scans.moving.outside).all():
        name = init if isinstance(init, str) else GIVEN
        raise InputError(
            f"{scans.moving.path}: does not overlap {scans.fixed.path.name} (init {name}); leave --init out for a "
            "search, or correct the affines in their headers"
        )
    return result


def check_kind(kind: str) -> None:
    """Check that a kind of transform is known.

    Raises:
        InputError: where it is not.
    """
    if kind not in KINDS:
        raise InputError(f"kind {kind!r} is unknown; choose {' or '.join(KINDS)}")
