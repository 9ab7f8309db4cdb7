"""Continuing a displacement or an image from where it counts to where it does not.

What a mask leaves out must not pull a network's field. In its place comes nothing but the smoothness of what is around,
in the image before the network or in the field after it: what a registration that never looked there would have had
(cost-function masking: Brett et al., NeuroImage 2001).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from iregzoo.fields import at_least_float32, check_tensor

SWEEPS = 12  # of relaxation, at each level
DAMPING = 6 / 7  # of each sweep: what smooths best in three dimensions (Trottenberg et al., Multigrid, 2001)


def continue_field(field: Tensor, counted: Tensor) -> Tensor:
    """Replace a field where it does not count by a smooth continuation of what does.

    Each channel becomes harmonic there (its Laplacian vanishes, and its slope across the grid's border): the
    smoothest continuation, never beyond the values around it. It is found coarse to fine, so that holes of any size
    fill: averages over blocks of 2, 4, 8 … voxels of those that count, each level filled from the one above it
    (pull-push: Gortler et al., SIGGRAPH 1996) and relaxed by some sweeps of Jacobi's method. So a constant is continued
    exactly, and a linear field within a hole nearly so.

    Args:
        field: (B, C, *shape) of 2 or 3 axes, a displacement or an image. Where it does not count it may be anything,
            also NaN.
        counted: boolean (B, 1, *shape), true where the field counts.

    Returns:
        (B, C, *shape), what was given at voxels that count; zero for a pair none of whose voxels does.

    Raises:
        TypeError: for what is no tensor.
        ValueError: for shapes that do not belong together, and a mask that is not boolean.
    """
    check_tensor(field, "field")
    if field.dim() not in (4, 5):
        raise ValueError(f"field has shape {tuple(field.shape)}; expected (B, C, H, W) or (B, C, D, H, W)")
    check_tensor(counted, "counted")
    expected = (len(field), 1, *field.shape[2:])
    if counted.shape != expected or counted.dtype != torch.bool:
        raise ValueError(
            f"counted has shape {tuple(counted.shape)} and type {counted.dtype}; expected torch.bool of {expected}"
        )
    known = counted.expand_as(field)
    # Beside one of its own values a constant is zero, which no rounding changes.
    base = field.where(known, torch.inf).flatten(2).amin(2)
    base = base.where(base.isfinite(), 0).view(*base.shape, *[1] * (field.dim() - 2))
    filled = _fill(at_least_float32((field - base).where(known, 0)), counted)
    return field.where(known, (base + filled).to(field.dtype))


def _fill(values: Tensor, known: Tensor) -> Tensor:
    """Values (B, N, *shape), zero where they are not known, with what is missing filled in."""
    shape = values.shape[2:]
    if max(shape) == 1:
        return values
    pool, mode = (F.avg_pool3d, "trilinear") if len(shape) == 3 else (F.avg_pool2d, "bilinear")
    block = [min(size, 2) for size in shape]
    share = pool(known.to(values.dtype), block, ceil_mode=True)
    coarse = pool(values, block, ceil_mode=True) / share.where(share > 0, 1)
    filled = F.interpolate(_fill(coarse, share > 0), scale_factor=[float(size) for size in block], mode=mode)
    for axis, size in enumerate(shape, start=2):
        filled = filled.narrow(axis, 0, size)  # the last block may be part of one
    filled = values.where(known, filled)
    for _ in range(SWEEPS):
        filled = values.where(known, filled.lerp(_neighbours(filled), DAMPING))
    return filled


def _neighbours(volume: Tensor) -> Tensor:
    """The mean of each voxel's neighbours along the axes, the border's own value beyond it: (B, N, *shape)."""
    total = torch.zeros_like(volume)
    for axis in range(2, volume.dim()):
        size = volume.shape[axis]
        total.narrow(axis, 1, size - 1).add_(volume.narrow(axis, 0, size - 1))
        total.narrow(axis, 0, size - 1).add_(volume.narrow(axis, 1, size - 1))
        for end in (0, size - 1):
            total.narrow(axis, end, 1).add_(volume.narrow(axis, end, 1))
    return total.div_(2 * (volume.dim() - 2))
