"""The Jacobian matrix of a displacement (B, N, *shape) in voxels of its own grid, and its determinant."""

import math

import torch
from torch import Tensor

from iregzoo.fields import at_least_float32, check_displacement

_SLAB = 2**17  # voxels at a time: what they need stays in the cache


def _check_derivative(displacement: Tensor) -> int:
    """Return the number of spatial axes of a field that has derivatives, or raise ValueError."""
    axes = check_displacement(displacement)
    if min(displacement.shape[2:]) < 2:
        raise ValueError(f"grid {tuple(displacement.shape[2:])} has an axis of one voxel; a derivative needs two")
    return axes


def _jacobian_rows(displacement: Tensor) -> list[list[Tensor]]:
    """Entry [i][j], (B, *shape), is ∂(x + u)_i / ∂x_j."""
    axes = _check_derivative(displacement)
    u = at_least_float32(displacement)
    rows = [list(torch.gradient(u[:, axis], dim=list(range(1, 1 + axes)))) for axis in range(axes)]
    for axis in range(axes):
        rows[axis][axis] = rows[axis][axis] + 1
    return rows


def jacobian(displacement: Tensor) -> Tensor:
    """Jacobian matrix of x + u(x): (B, N, N, *shape), entry [i, j] = ∂(x + u)_i / ∂x_j.

    Central differences inside, one-sided at the faces.

    Raises:
        ValueError: for an axis of fewer than two voxels.
    """
    return torch.stack([torch.stack(row, dim=1) for row in _jacobian_rows(displacement)], dim=1)


def jacobian_determinant(displacement: Tensor) -> Tensor:
    """Determinant of the Jacobian of x + u(x): (B, *shape). At or below zero the field folds.

    Raises:
        ValueError: for an axis of fewer than two voxels.
    """
    if torch.is_grad_enabled() and displacement.requires_grad:
        return _determinant(_jacobian_rows(displacement))
    _check_derivative(displacement)
    depth = displacement.shape[2]
    dtype = torch.promote_types(displacement.dtype, torch.float32)
    determinant = displacement.new_empty((len(displacement), *displacement.shape[2:]), dtype=dtype)
    thick = max(1, _SLAB // math.prod(displacement.shape[3:]))
    for first in range(0, depth, thick):
        before, after = max(0, first - 1), min(depth, first + thick + 1)
        part = _determinant_of_steps(displacement[:, :, before:after].to(dtype))
        determinant[:, first : first + thick] = part[:, first - before : first - before + thick]
    return determinant


def _determinant_of_steps(u: Tensor) -> Tensor:
    """``jacobian_determinant`` without a gradient, in half the time: of twice the matrix, as few passes as can be."""
    axes = u.shape[1]
    columns = []
    for axis in range(axes):
        dim, last = 2 + axis, u.shape[2 + axis] - 1
        steps = torch.empty_like(u, memory_format=torch.contiguous_format)
        # Not ``torch.sub(…, out=…)``, which forward-mode differentiation, vmap and torch.compile do not take.
        steps.narrow(dim, 1, last - 1).copy_(u.narrow(dim, 2, last - 1)).sub_(u.narrow(dim, 0, last - 1))
        for face, before in ((0, 0), (last, last - 1)):
            steps.narrow(dim, face, 1).copy_(u.narrow(dim, before + 1, 1)).sub_(u.narrow(dim, before, 1)).mul_(2)
        steps[:, axis].add_(2)
        columns.append(steps.unbind(1))
    if axes == 2:
        (a, c), (b, d) = columns
        return (a * d).addcmul_(b, c, value=-1).div_(4)
    (a, d, g), (b, e, h), (c, f, i) = columns
    determinant = (e * i).addcmul_(f, h, value=-1).mul_(a)
    determinant.addcmul_(b, (d * i).addcmul_(f, g, value=-1), value=-1)
    determinant.addcmul_(c, (d * h).addcmul_(e, g, value=-1))
    return determinant.div_(8)


def jacobian_determinant_at(displacement: Tensor, places: Tensor) -> Tensor:
    """``jacobian_determinant`` at some voxels alone: a gradient of few costs little.

    Args:
        displacement: (B, N, *shape) in voxels.
        places: (n, 1 + N), each the number of a pair and a voxel's index, as ``nonzero`` gives them.

    Returns:
        (n,)
    """
    axes = check_displacement(displacement)
    u = at_least_float32(displacement).movedim(1, 0)
    strides = [math.prod(u.shape[1 + axis + 1 :]) for axis in range(axes + 1)]
    here = (places * places.new_tensor(strides)).sum(1)  # of each pair's every component
    steps, ends = [], []
    for axis in range(axes):
        index = places[:, 1 + axis]
        after = (index + 1).clamp(max=u.shape[2 + axis] - 1) - index
        before = index - (index - 1).clamp(min=0)
        steps.append(after + before)
        ends += [here + after * strides[1 + axis], here - before * strides[1 + axis]]
    # One reading of all, because its gradient begins with zeros everywhere.
    values = u.flatten(1).gather(1, torch.cat(ends).expand(axes, -1)).view(axes, axes, 2, len(places))
    columns = [(values[:, axis, 0] - values[:, axis, 1]) / steps[axis] for axis in range(axes)]
    rows = [[columns[j][i] + (i == j) for j in range(axes)] for i in range(axes)]
    return _determinant(rows)


def _determinant(rows: list[list[Tensor]]) -> Tensor:
    """Of a matrix of two or three rows, written out, which is far cheaper than a batched LU."""
    if len(rows) == 2:
        return rows[0][0] * rows[1][1] - rows[0][1] * rows[1][0]
    (a, b, c), (d, e, f), (g, h, i) = rows
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
