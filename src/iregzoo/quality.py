"""What tells whether to trust a result: its images side by side, and figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iregzoo.cards import WeightsCard
from iregzoo.fields import length
from iregzoo.jacobian import jacobian_determinant
from iregzoo.metrics import SMALLEST_AXIS, dice, folding_of, mean_of, std_log_of
from iregzoo.register import Result
from iregzoo.similarity import mse, ncc
from iregzoo.space.grid import Grid, Matrix, pull, to_voxels
from iregzoo.space.precise import SHARED
from iregzoo.space.scan import scale
from iregzoo.space.start import mutual_information

NEAR_SINGULAR = 0.1  # det J
LITTLE_ALIKE = 0.3  # NCC
EARLIER = {"before": "before", "start": "at the affine start"}  # than the end
SAME_NCC = 1e-4  # what rounding and interpolation change where nothing moves
UNLIKE_AT_START = 0.1  # NCC: of the 380 pairs of hippocampus test scans, middle on middle, one has less
MUCH_FOLDING, MUCH_SQUASHED = 1.0, 5.0  # percent
FEW_COUNTED = 3.0  # percent of the fixed scan: a brain in a large field of view is more, most lesions are less
LARGE_FIELD = 6.0  # times the weights' smallest: 200×250×250 mm, which hold a head, are 4.8 times the brain weights'


@dataclass(frozen=True)
class Comparison:
    """A result's images on the fixed grid, intensities in [0, 1], each (1, 1, *fixed.shape), and its Jacobian.

    Attributes:
        fixed: the fixed scan.
        before: the moving scan where the headers put it.
        start: the moving scan after the affine start.
        after: the moving scan in the end.
        determinant: of the Jacobian of the deformation without the affine, (1, *fixed.shape).
        counted: the voxels that the masks count, boolean (1, 1, *fixed.shape): those within the fixed mask that come
            from within the moving one in the end. All if None.
    """

    fixed: Tensor
    before: Tensor
    start: Tensor
    after: Tensor
    determinant: Tensor
    counted: Tensor | None = None


def compare(result: Result) -> Comparison:
    """Make what both the figures and the picture of a result show.

    Raises:
        InputError: where the masks leave nothing to compare.
    """
    scans, frame = result.scans, result.frame
    moving, limits = scans.moving, scans.filled.moving.limits

    def placed(world: Matrix | None) -> Tensor:
        matrix = to_voxels(frame.fixed, world, moving.grid)
        return scale(pull(moving.data, matrix, frame.fixed.shape, outside=moving.outside), limits)

    return Comparison(
        fixed=scale(scans.fixed.data, scans.filled.fixed.limits),
        before=placed(None),
        start=placed(frame.start),
        after=scale(result.warped, limits),
        determinant=jacobian_determinant(frame.in_voxels(result.deformation).float()),
        counted=scans.counted(frame.fixed, result.displacement, "in the end") if scans.masks else None,
    )


def figures(result: Result, images: Comparison) -> dict[str, Any]:
    """What tells whether to trust a result: similarity, overlap, regularity, iterations.

    ``before`` is the moving scan where the headers put it, ``start`` after the affine start, ``after`` in the end, all
    over the voxels that count in the end, of which ``counted_percent`` tells how many there are, where there are masks.
    ``mutual_information`` (nats) is there where NCC fell, which between two contrasts need not mean anything.
    ``shared_information`` is what ``Result.shared`` has.
    ``sdlogj`` needs a grid of at least 5 voxels an axis. ``near_singular_percent`` counts voxels, folds included, where
    the deformation shrinks volume to a tenth or less: tissue that is squashed to fit. ``field_size`` is the volume of
    the network's grid as a multiple of the smallest on which the weights are used, where their card tells one.
    ``dice_before`` and ``dice`` are by label, of those that both scans have; ``labels_unpaired`` has the others,
    and ``dice_missing`` says in words why there is none, where both scans have label maps.
    ``warnings`` says in words what should make a person doubt.
    """
    lengths = length(result.deformation)
    found = _similarity(images)
    found["folding_percent"] = float(folding_of(images.determinant))
    found["near_singular_percent"] = float((images.determinant <= NEAR_SINGULAR).float().mean()) * 100
    if min(result.frame.fixed.shape) >= SMALLEST_AXIS:
        found["sdlogj"] = float(std_log_of(images.determinant))
    found |= {
        "displacement_mean_mm": float(lengths.mean()),
        "displacement_max_mm": float(lengths.max()),
        "iterations": [int(count[0]) for count in result.registration.iterations],
        "scores": [[round(float(s), 6) for s in level[:, 0] if s == s] for level in result.registration.scores],
    }
    network = result.frame.network if result.refinement is None else result.refinement.network
    if (size := field_size(network, result.card)) is not None:
        found["field_size"] = size
    if result.shared is not None:
        found["shared_information"] = round(result.shared, 4)
    found |= _overlap(result) | _lost(result)
    headers = (result.scans.fixed.doubt, result.scans.moving.doubt, *result.lying)
    if any(headers):
        found["header_doubts"] = [doubt for doubt in headers if doubt]
    return {**found, "warnings": list(doubts(found).values())}


def doubts(found: Mapping[str, Any]) -> dict[str, str]:
    """What should make a person doubt a result with these figures, in words, by the figure that says so."""
    said = {f"header_{n}": doubt for n, doubt in enumerate(found.get("header_doubts", ()))}
    one_person = found.get("shared_information", 0) > SHARED  # whose contrasts may differ
    if less := [when for name, when in EARLIER.items() if _fell(found, name)]:
        said["ncc_after"] = f"the images are less similar than {less[0]}"
    elif found["ncc_after"] < LITTLE_ALIKE and "mutual_information" not in found and not one_person:  # which rose
        said["ncc_after"] = f"the images are still dissimilar after registration (NCC {found['ncc_after']:.2f})"
    if found["ncc_start"] < UNLIKE_AT_START and not one_person:
        said["ncc_start"] = (
            f"the images were hardly similar before the deformation (NCC {found['ncc_start']:.2f}): check that they "
            "show the same body part, side, orientation and contrast; if they do, try another init"
        )
    if found.get("shared_information", 1) <= SHARED:
        said["shared_information"] = (
            f"the scans tell too little of each other for one person's ({found['shared_information']:.2f} of what one "
            "tells of itself), so they were brought together only roughly: right for two people; for one person, look "
            "at the result and, if it is wrong, give another --init"
        )
    if found["folding_percent"] > MUCH_FOLDING:
        said["folding_percent"] = f"the deformation folds in {found['folding_percent']:.1f} % of the voxels"
    if found["near_singular_percent"] > MUCH_SQUASHED:
        said["near_singular_percent"] = (
            f"the deformation shrinks {found['near_singular_percent']:.1f} % of the voxels to a tenth of their "
            "volume or less"
        )
    if found.get("counted_percent", 100) < FEW_COUNTED:
        said["counted_percent"] = (
            f"the masks count only {found['counted_percent']:.1f} % of the fixed scan's voxels: check that they are 0 "
            "where the scans must not be compared, and not the other way round"
        )
    if doubt := large_field(found.get("field_size")):
        said["field_size"] = doubt
    if found.get("labels_lost"):
        lost = _listed(found["labels_lost"])
        said["labels_lost"] = f"labels of the moving scan are not left on the fixed scan's grid: {lost}"
    if "dice_missing" in found:
        said["dice_missing"] = found["dice_missing"]
    if found.get("dice_mean") == 0:
        said["dice_mean"] = "no label overlaps its counterpart"
    return said


def _listed(labels: Sequence[int]) -> str:
    """The first eight of some labels in words."""
    return ", ".join(map(str, labels[:8])) + ("…" if len(labels) > 8 else "")


def _fell(found: Mapping[str, Any], earlier: str) -> bool:
    """Whether the images are less alike in the end than earlier: by NCC and, where that is known, by information."""
    information = found.get("mutual_information", {"after": 0.0, earlier: 1.0})
    alike = found["ncc_after"] >= found[f"ncc_{earlier}"] - SAME_NCC
    return not alike and information["after"] < information[earlier]


def _similarity(images: Comparison) -> dict[str, Any]:
    """NCC and MSE over the voxels that count, and the mutual information where NCC fell."""
    counted = images.counted

    def seen(image: Tensor) -> Tensor:
        return image if counted is None else image[counted].view(1, 1, 1, 1, -1)

    found: dict[str, Any] = {}
    fixed = seen(images.fixed)
    for name in (*EARLIER, "after"):
        image = seen(getattr(images, name))
        # In double precision: of millions of voxels, mostly air, float32 is wrong in the third digit.
        found |= {f"ncc_{name}": float(ncc(fixed.double(), image.double())), f"mse_{name}": float(mse(fixed, image))}
    if any(_fell(found, name) for name in EARLIER):
        found["mutual_information"] = {
            name: mutual_information(fixed.numpy(), seen(getattr(images, name)).numpy()) for name in (*EARLIER, "after")
        }
    return found if counted is None else {**found, "counted_percent": float(counted.double().mean()) * 100}


def field_size(network: Grid, card: WeightsCard | None) -> float | None:
    """The volume of the network's grid beside that of the weights' card, which a file of the user's own has not."""
    if card is None or max(card.minimum) == 1:
        return None
    volume = network.volume
    return round(float(volume / np.prod(np.array(card.minimum) * card.spacing)), 2)


def large_field(size: float | None) -> str:
    """In words, that scans of this ``field_size`` cover far more than the weights were made for; empty if not."""
    if size is None or size <= LARGE_FIELD:
        return ""
    return (
        f"the scans cover {size:.0f} times the volume that these weights were made for: choose other weights with "
        "--weights (see iregzoo list), or crop the scans"
    )


def _overlap(result: Result) -> dict[str, Any]:
    """Dice before and after, of the labels that both scans have, and the labels that only one has.

    The maps as they were read say which: a label that a registration lost has a Dice of 0, and one that has no
    counterpart has none, whether a registration leaves something of it or not. So methods are compared on one set.
    """
    fixed, moving, warped = result.scans.fixed_labels, result.scans.moving_labels, result.warped_labels
    if fixed is None or moving is None or warped is None:
        return {}
    labels = {"fixed": set(labels_of(fixed.data)), "moving": set(labels_of(moving.data))}
    both = labels["fixed"] & labels["moving"]
    unpaired = {name: sorted(held - both) for name, held in labels.items() if held - both}
    found: dict[str, Any] = {"labels_unpaired": unpaired} if unpaired else {}
    if not both:
        empty = next((name for name, held in labels.items() if not held), "")
        apart = "; ".join(f"{name}: {_listed(held)}" for name, held in unpaired.items())
        reason = f"the {empty} scan's label map is empty" if empty else f"the label maps share no label ({apart})"
        return {**found, "dice_missing": f"{reason}, so there is no Dice"}
    grid = result.frame.fixed
    unmoved = pull(moving.data, to_voxels(grid, None, moving.grid), grid.shape, mode="nearest")
    before, after = (dice(each, fixed.data, sorted(both)) for each in (unmoved, warped))
    found |= {"dice_before_mean": mean_of(before), "dice_mean": mean_of(after), "dice_before": before, "dice": after}
    return found


def _lost(result: Result) -> dict[str, list[int]]:
    """The labels of the moving scan of which nothing is left: too small, or beyond the fixed scan."""
    moving, warped = result.scans.moving_labels, result.warped_labels
    if moving is None or warped is None:
        return {}
    lost = set(labels_of(moving.data)) - set(labels_of(warped))
    return {"labels_lost": sorted(lost)} if lost else {}


def labels_of(*maps: Tensor) -> list[int]:
    """The labels, except the background 0, that any of the maps holds."""
    values = sorted(set().union(*(torch.unique(labels).tolist() for labels in maps)) - {0})
    return [int(value) for value in values]
