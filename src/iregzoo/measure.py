"""The figures of one registered pair, whoever registered it: a row of ``iregzoo evaluate``'s table."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from iregzoo.cases import Case
from iregzoo.errors import InputError
from iregzoo.metrics import mean_of, surface_scores, tre
from iregzoo.quality import Comparison, figures, labels_of
from iregzoo.register import Result
from iregzoo.similarity import ssim
from iregzoo.space.points import move_points, reached, read_points
from iregzoo.space.transforms import read_linear

Row = dict[str, Any]
LOST = "labels_lost"  # how many of those that both scans have
DOUBTS = "doubts"  # in words, what keeps a pair's figures from meaning what they seem to; no column of a table
SSIM_WINDOW = 7  # voxels


def check_cases(cases: Sequence[Case]) -> None:
    """Refuse pairs whose landmarks or own start would make them fail; scans and label maps are not looked at.

    Raises:
        InputError: naming the first of them by its place in the table, for labels or landmarks of one scan alone, for
            landmarks as ``measure`` does, and for a start as ``read_linear`` does.
    """
    for number, case in enumerate(cases, 1):
        try:
            for what, fixed, moving in (
                ("labels", case.fixed_labels, case.moving_labels),
                ("points", case.fixed_points, case.moving_points),
            ):
                if bool(fixed) != bool(moving):
                    has, lacks = ("fixed", "moving") if fixed else ("moving", "fixed")
                    raise InputError(f"has {has}_{what} but no {lacks}_{what}; give both, or neither")
            _landmarks(case)
            if case.init:
                read_linear(case.init)
        except InputError as error:
            raise InputError(f"pair {number}, {case.title}: {error}") from None


def measure(case: Case, result: Result, images: Comparison) -> Row:
    """What a pair's row holds beside its names and seconds; NaN for what cannot be measured.

    Everything is measured on the fixed scan's own grid. Overlap and surface distances are those of the moving labels,
    warped once with nearest neighbours, of the labels that both scans have. One that the registration lost has a Dice
    of 0 and no surface; ``labels_lost`` counts those. Folding and the deviation of log det J are of the deformation
    without the affine start. Similarities are of intensities in [0, 1], see ``Comparison``; ``ssim`` is of the warped
    scan, with windows of 7 voxels. ``tre_before_mm`` is the landmark error where the headers put the scans.

    Raises:
        InputError: for landmarks that cannot be read, or are not as many in both scans.
    """
    found = figures(result, images)
    row: Row = {"name": case.name, "fixed": case.fixed, "moving": case.moving}
    row[DOUBTS] = [found["dice_missing"]] if "dice_missing" in found else []
    row |= _overlap(result, found)
    if landmarks := _landmarks(case):
        moved = move_points(landmarks[0], result.displacement, result.frame.fixed)
        row["tre_mm"] = float(tre(moved, landmarks[1]).mean())
        row["tre_before_mm"] = float(tre(*landmarks).mean())
        row[DOUBTS] += _misplaced(case, landmarks, result)
    for name in ("folding_percent", "near_singular_percent", "sdlogj", "ncc_before", "ncc_after"):
        row[name] = found.get(name, math.nan)
    row["mse"] = found["mse_after"]
    large_enough = min(images.fixed.shape[2:]) >= SSIM_WINDOW
    row["ssim"] = float(ssim(images.fixed, images.after, window=SSIM_WINDOW)) if large_enough else math.nan
    row["iterations"] = " ".join(map(str, found["iterations"]))
    if result.needless:
        row["network_left_out"] = 1
    return row


def _landmarks(case: Case) -> tuple[Tensor, Tensor] | None:
    """Those of the fixed and of the moving scan, (N, 3) each, LPS mm; None where one of them has none."""
    if not (case.fixed_points and case.moving_points):
        return None
    fixed, moving = read_points(case.fixed_points), read_points(case.moving_points)
    if len(fixed) != len(moving):
        raise InputError(
            f"{case.fixed_points}: {len(fixed)} points, but {case.moving_points}: {len(moving)}; give as many in both"
        )
    return fixed, moving


def _misplaced(case: Case, landmarks: tuple[Tensor, Tensor], result: Result) -> Iterator[str]:
    """Landmarks that lie outside their scan, as those do whose coordinate system is another one than they say."""
    grids = result.frame.fixed, result.frame.moving
    for path, points, grid in zip((case.fixed_points, case.moving_points), landmarks, grids, strict=True):
        if outside := int((~reached(grid, points)).sum()):
            yield f"{outside} of {len(points)} points of {path} lie outside their scan; check LPS and RAS"


def _overlap(result: Result, found: Mapping[str, Any]) -> Row:
    if "dice" not in found or result.scans.fixed_labels is None or result.warped_labels is None:
        return {}
    fixed, warped, labels = result.scans.fixed_labels.data, result.warped_labels, list(found["dice"])
    hd95, assd = surface_scores(warped, fixed, labels, result.frame.fixed.spacing.tolist())
    row: Row = {
        "dice_mean": found["dice_mean"],
        "dice_before": found["dice_before_mean"],
        **{f"dice_{label}": value for label, value in found["dice"].items()},
        "hd95_mm": mean_of(hd95),
        "assd_mm": mean_of(assd),
    }
    if lost := set(labels) - set(labels_of(warped)):
        row[LOST] = len(lost)
    return row
