"""Measures of a registration: Dice, HD95 and ASSD of label maps, landmark error, folding, log Jacobian.

Label maps are integer tensors (X, Y, Z) or (1, 1, X, Y, Z), two of them on one grid; displacements are
(B, 3, X, Y, Z) in voxels; distances are in mm. Measures of labels come as one number per label, NaN where
there is nothing to measure; ``mean_of`` averages them.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iregzoo.jacobian import jacobian_determinant

_LEARN2REG_CROP = 2
_LEARN2REG_OFFSET = 3.0
SMALLEST_AXIS = 2 * _LEARN2REG_CROP + 1


def _label_map(labels: Tensor, name: str) -> Tensor:
    shape = tuple(labels.shape)
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"{name} has dtype {labels.dtype}; expected integers, so convert it with .long()")
    if len(shape) != 3 and not (len(shape) == 5 and shape[:2] == (1, 1)):
        raise ValueError(f"{name} has shape {shape}; expected one map, (X, Y, Z) or (1, 1, X, Y, Z)")
    # torch wraps the other side of a comparison into a narrow dtype: 300 would equal the 44 of a uint8 map.
    return labels.reshape(shape[-3:]).long()


def _label_maps(first: Tensor, second: Tensor, labels: Sequence[int]) -> tuple[Tensor, Tensor]:
    if len(labels) == 0:
        raise ValueError("labels is empty; give the values to compare, such as labels=[1, 2]")
    a, b = _label_map(first, "first"), _label_map(second, "second")
    if a.shape != b.shape:
        raise ValueError(
            f"label maps differ in grid: {tuple(a.shape)} and {tuple(b.shape)}; resample one onto the other's grid"
        )
    return a, b


def dice(first: Tensor, second: Tensor, labels: Sequence[int]) -> dict[int, float]:
    """Dice overlap 2|A ∩ B| / (|A| + |B|) per label, in [0, 1] (Dice, Ecology 1945).

    NaN where neither map holds the label, 0 where only one does.

    Args:
        first, second: label maps (X, Y, Z) or (1, 1, X, Y, Z) on one grid and device.
        labels: the values to compare.

    Raises:
        ValueError: where a map is not an integer map of these shapes, the grids differ, or ``labels`` is
            empty.
    """
    a, b = _label_maps(first, second, labels)
    return {label: _dice_of(a == label, b == label) for label in labels}


def _dice_of(a: Tensor, b: Tensor) -> float:
    total = int(a.count_nonzero()) + int(b.count_nonzero())
    return 2 * int((a & b).count_nonzero()) / total if total else math.nan


def surface_scores(
    first: Tensor, second: Tensor, labels: Sequence[int], spacing: Sequence[float]
) -> tuple[dict[int, float], dict[int, float]]:
    """``hd95`` and ``assd`` per label, in mm, for the price of one of them.

    The surface of a label is its voxels with a face neighbour outside the label, and outside the grid is
    outside the label. Each surface voxel counts once, at its centre, and its distance is that to the nearest
    surface voxel of the other map. These are MONAI's surfaces and distances. Runs on the CPU.

    Args:
        first, second: label maps (X, Y, Z) or (1, 1, X, Y, Z) on one grid.
        labels: the values to compare.
        spacing: voxel size along X, Y and Z in mm.

    Returns:
        HD95 by label and ASSD by label. Both are NaN where either map lacks the label.

    Raises:
        ValueError: as ``dice`` does, and where ``spacing`` is not three positive numbers.
    """
    if len(spacing) != 3 or not all(math.isfinite(size) and size > 0 for size in spacing):
        raise ValueError(f"spacing={tuple(spacing)}; expected three positive voxel sizes in mm, along X, Y and Z")
    a, b = (labelled.cpu().numpy() for labelled in _label_maps(first, second, labels))
    hd95_of: dict[int, float] = {}
    assd_of: dict[int, float] = {}
    for label in labels:
        there, back = _surface_distances(a == label, b == label, spacing)
        present = there.size > 0
        hd95_of[label] = max(float(np.percentile(d, 95)) for d in (there, back)) if present else math.nan
        assd_of[label] = float(np.concatenate([there, back]).mean()) if present else math.nan
    return hd95_of, assd_of


def _surface_distances(
    a: NDArray[np.bool_], b: NDArray[np.bool_], spacing: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distances in mm from each surface voxel of ``a`` to ``b`` and back; both empty where either mask is."""
    if not (a.any() and b.any()):
        return np.empty(0), np.empty(0)
    # Nothing outside the common box belongs to either mask, and MONAI takes the outside of an array as
    # background, so the box needs no margin.
    box = _bounding_box(a | b)
    from monai.metrics.utils import get_mask_edges, get_surface_distance  # MONAI takes seconds to import

    edges_a, edges_b = get_mask_edges(a[box], b[box], crop=False)
    there = get_surface_distance(edges_a, edges_b, spacing=tuple(spacing))
    back = get_surface_distance(edges_b, edges_a, spacing=tuple(spacing))
    return there.astype(np.float64), back.astype(np.float64)


def _bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    box = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        held = np.flatnonzero(mask.any(axis=others))
        box.append(slice(int(held[0]), int(held[-1]) + 1))
    return tuple(box)


def hd95(first: Tensor, second: Tensor, labels: Sequence[int], spacing: Sequence[float]) -> dict[int, float]:
    """95th percentile Hausdorff distance per label, in mm; NaN where either map lacks the label.

    The larger of the two directed 95th percentiles, interpolated linearly between the sorted distances, as
    ``monai.metrics.compute_hausdorff_distance(percentile=95)``. Learn2Reg's own weighs the distances by
    surface area and is in voxels, so the two differ. Arguments, surfaces and errors: ``surface_scores``.
    """
    return surface_scores(first, second, labels, spacing)[0]


def assd(first: Tensor, second: Tensor, labels: Sequence[int], spacing: Sequence[float]) -> dict[int, float]:
    """Average symmetric surface distance per label, in mm; NaN where either map lacks the label.

    The mean over all surface voxels of both maps together (not the mean of the two directed means), as
    ``monai.metrics.compute_average_surface_distance(symmetric=True)``. Arguments, surfaces and errors:
    ``surface_scores``.
    """
    return surface_scores(first, second, labels, spacing)[1]


def tre(first_points: Tensor, second_points: Tensor) -> Tensor:
    """Target registration error: the distance between corresponding world points, (N,) in mm.

    Args:
        first_points, second_points: (N, 3) in mm, in one world frame and one order.

    Raises:
        ValueError: where the shapes differ or are not (N, 3).
    """
    shapes = tuple(first_points.shape), tuple(second_points.shape)
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][1] != 3:
        raise ValueError(f"points have shapes {shapes[0]} and {shapes[1]}; expected (N, 3) twice, with the same N")
    dtype = torch.promote_types(torch.promote_types(first_points.dtype, second_points.dtype), torch.float32)
    return (first_points.to(dtype) - second_points.to(dtype)).square().sum(1).sqrt()


def folding_percent(displacement: Tensor) -> Tensor:
    """Percent of voxels where x + u(x) folds, det J ≤ 0: (B,), in [0, 100]; NaN for a field that holds a NaN.

    Every voxel of the grid counts, those at the faces with one-sided differences; see ``jacobian``.

    Args:
        displacement: (B, 3, X, Y, Z) in voxels.

    Raises:
        ValueError: where it is not a field, or an axis has fewer than two voxels.
    """
    return folding_of(jacobian_determinant(displacement))


def folding_of(determinant: Tensor) -> Tensor:
    """``folding_percent`` of a Jacobian determinant (B, X, Y, Z): (B,)."""
    determinant = determinant.flatten(1)
    percent = (determinant <= 0).sum(1) * (100.0 / determinant.shape[1])
    return percent.masked_fill(determinant.isnan().any(1), math.nan)


def std_log_jacobian(displacement: Tensor) -> Tensor:
    """Learn2Reg's smoothness, the standard deviation of log(clip(det J + 3, 1e-9, 1e9)): (B,).

    The + 3 is Learn2Reg's: its evaluator adds 3 to the determinant before it clips, so that mild folds keep a
    finite logarithm, and values compare with published ones only with it. Two voxels at each face are left
    out, as there, and the deviation is that of the population. Source: ``evaluation/evaluation.py`` and
    ``evaluation/utils.py`` of github.com/MDL-UzL/L2R (Hering et al., TMI 2023).

    Args:
        displacement: (B, 3, X, Y, Z) in voxels.

    Raises:
        ValueError: where it is not a field, or nothing is left inside the crop.
    """
    if min(displacement.shape[2:], default=0) < SMALLEST_AXIS:
        raise ValueError(
            f"displacement has shape {tuple(displacement.shape)}; two voxels are cropped at each face, "
            f"so every axis needs at least {SMALLEST_AXIS}"
        )
    return std_log_of(jacobian_determinant(displacement))


def std_log_of(determinant: Tensor) -> Tensor:
    """``std_log_jacobian`` of a determinant (B, X, Y, Z) with at least ``SMALLEST_AXIS`` voxels an axis: (B,)."""
    for axis in range(1, determinant.dim()):
        determinant = determinant.narrow(axis, _LEARN2REG_CROP, determinant.shape[axis] - 2 * _LEARN2REG_CROP)
    shifted = (determinant.flatten(1) + _LEARN2REG_OFFSET).clamp(1e-9, 1e9)
    return shifted.log().std(1, correction=0)


def mean_of(values: Mapping[int, float]) -> float:
    """Mean of the values that are numbers; NaN where none is."""
    numbers = [value for value in values.values() if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan
