"""How well warped labels overlap, as a loss: the Dice term of training with label maps, for any number of labels."""

from itertools import product

import torch
from torch import Tensor

from iregzoo.errors import InputError
from iregzoo.fields import check_displacement, identity
from iregzoo.precision import exact_dtype

EPS = 1e-5


def overlap_loss(displacement: Tensor, moving: Tensor | None, fixed: Tensor | None, values: tuple[int, ...]) -> Tensor:
    """One minus the mean soft Dice of warped and fixed labels: (B,), over the labels that either map holds.

    The Dice is that of one channel a label, warped linearly with zeros outside. Here no channel is made: each of the
    corners between which a voxel's linear interpolation reads adds its weight to the sums of the label that it has. So
    time and memory are those of one image, however many labels there are.

    Args:
        displacement: (B, N, *shape) in voxels.
        moving, fixed: integer label maps (B, 1, *shape), of any dtype.
        values: the labels that count.

    Raises:
        InputError: where a map is missing.
        ValueError: where its shape is not the field's.
    """
    axes = check_displacement(displacement)
    if moving is None or fixed is None:
        raise InputError(
            "the overlap term needs the label maps of both images; give every scan of train one, or set overlap to 0"
        )
    shape = displacement.shape[2:]
    if moving.shape != fixed.shape or fixed.shape != (displacement.shape[0], 1, *shape):
        raise ValueError(
            f"label maps {tuple(moving.shape)} and {tuple(fixed.shape)}; expected both "
            f"{(displacement.shape[0], 1, *shape)}, to match the displacement {tuple(displacement.shape)}"
        )
    source, target = _numbered(moving, values), _numbered(fixed, values)
    # Exact, for voxels are added one after the other, and a label may have millions.
    nothing = displacement.new_zeros(len(source), len(values) + 1, dtype=exact_dtype(displacement.device))
    warped, shared = nothing, nothing
    for corner in product((0, 1), repeat=axes):
        weight, place = _corner(displacement, corner)
        weight = weight.to(nothing.dtype)
        label = source.gather(1, place)
        warped = warped.scatter_add(1, label, weight)
        shared = shared.scatter_add(1, label * (label == target), weight)
    size = (warped + nothing.scatter_add(1, target, torch.ones_like(target, dtype=nothing.dtype)))[:, 1:]
    present = size > EPS
    dice = 2 * shared[:, 1:] / size.clamp_min(EPS)
    return (1 - (dice * present).sum(1) / present.sum(1).clamp_min(1)).to(displacement.dtype)


def _numbered(labels: Tensor, values: tuple[int, ...]) -> Tensor:
    """Label map to (B, voxels): 1 to L for the values in their order, 0 for all else."""
    flat = labels.flatten(1).long()
    ordered, number = torch.tensor(values, device=labels.device).sort()
    place = torch.searchsorted(ordered, flat).clamp_(max=len(values) - 1)
    return (number[place] + 1) * (ordered[place] == flat)


def _corner(displacement: Tensor, corner: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """One corner of each voxel's linear interpolation: its weight (B, voxels), 0 outside, and its place in the map."""
    shape = displacement.shape[2:]
    points = identity(shape, device=displacement.device, dtype=displacement.dtype) + displacement
    weight = torch.ones_like(points[:, 0])
    place = torch.zeros_like(weight, dtype=torch.long)
    for axis, (step, size) in enumerate(zip(corner, shape, strict=True)):
        first = points[:, axis].detach().floor()
        share = points[:, axis] - first
        index = first.long() + step
        inside = (index >= 0) & (index < size)
        weight = weight * (share if step else 1 - share) * inside
        place = place * size + index.clamp(0, size - 1)
    return weight.flatten(1), place.flatten(1)
