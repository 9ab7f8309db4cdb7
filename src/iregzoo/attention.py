"""Neighbourhood attention in volumes: each voxel attends to a small window of voxels around it.

Two forms share one operator, which differs only in how the keys continue beyond the border:

- ``neighbourhood_attention`` shifts a window that would reach over the border back inside, so that every query sees
  equally many keys (Hassani et al., "Neighborhood Attention Transformer", CVPR 2023; the form of NATTEN's na3d).
- ``offset_attention`` counts neighbours outside with a zero key, has a learned position bias, and its values are the
  neighbours' offsets, so that attention weights become displacements (PAN, ISBI 2024).

Both are exact and need memory for their operands alone: the window's keys are views of the padded volume, the weights
are made for a few planes at a time, and the backward pass makes them again. An unfold would hold window³ copies.
"""

import importlib
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from iregzoo import kernels

# Elements of a slab's largest temporary: what stays in a CPU's cache, and what keeps a GPU busy.
_SLAB_CPU, _SLAB_GPU = 2**18, 2**24
# And of the planes that are brought to float32 together.
_PLANES_CPU, _PLANES_GPU = 2**19, 2**27


def neighbourhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | Sequence[int] = 3,
    heads: int = 1,
    scale: float | None = None,
) -> Tensor:
    """Attend from each voxel to the window of voxels around it, shifted inside the volume at its borders.

    Where the tensors are on a GPU and natten is installed with its kernels, natten computes it.

    Args:
        query, key: (B, heads·d, *shape), three spatial axes; channels are head-major. For cross-attention they come
            from two images.
        value: (B, heads·e, *shape).
        window: voxels along every axis, or along each: odd, or the whole axis.
        heads: number of heads.
        scale: of the products q·k, d^(−1/2) unless given.

    Returns:
        (B, heads·e, *shape) in the value's dtype; sums run in float32 or better.

    Raises:
        ValueError: for grids that differ, channels that the heads do not divide, and an axis smaller than its window.
    """
    _check_operands(query, key, heads)
    _check_value(value, query, heads)
    sizes = _check_window(window, query.shape[2:])
    q, k, v = (_split(operand, heads) for operand in (query, key, value))
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if _natten_takes(q, v, sizes):
        out = _natten_attention(q, k, v, sizes, scale)
    elif kernels.attends(q, k, v):
        out = kernels.attend(q, k, v, None, sizes, scale)
    elif not torch.is_grad_enabled():
        out = _attend_by_planes(q, k, v, sizes, scale)
    else:
        out = _attend(q, _pad_inside(k, sizes), _pad_inside(v, sizes), None, sizes, scale)
    return out.flatten(1, 2).to(value.dtype)


def offset_attention(query: Tensor, key: Tensor, bias: Tensor, *, scale: float = 1.0) -> Tensor:
    """Mean offset of the neighbours, weighted by attention: Σ_o o · softmax_o(scale · q(x)·k(x + o) + bias[o]).

    A neighbour outside the volume takes part with k = 0. Of PAN's local attention transformer.

    Args:
        query, key: (B, heads·d, *shape), three spatial axes; channels are head-major.
        bias: (heads, *window), one for each neighbour, o running from −window // 2 to window // 2 along each axis.
        scale: of the products q·k.

    Returns:
        (B, heads·3, *shape) in voxels, head-major, component i along array axis i; float32 or better.

    Raises:
        ValueError: for grids that differ, channels that the heads do not divide, and a window that has no centre.
    """
    if bias.dim() != 4 or any(size % 2 == 0 for size in bias.shape[1:]):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected (heads, *window) with three odd sizes")
    heads, sizes = bias.shape[0], tuple(bias.shape[1:])
    _check_operands(query, key, heads)
    q, k = (_split(operand, heads) for operand in (query, key))
    biases = bias.flatten(1)  # a network's is a parameter, and this a plain tensor where no gradient is wanted
    if kernels.attends(q, k, None, biases):
        return kernels.attend(q, k, None, biases, sizes, scale).flatten(1, 2)
    padded = F.pad(k, [size // 2 for size in reversed(sizes) for _ in range(2)])
    return _attend(q, padded, None, biases, sizes, scale).flatten(1, 2)


def _split(operand: Tensor, heads: int) -> Tensor:
    """(B, heads·d, *shape) as (B, heads, d, *shape)."""
    return operand.view(operand.shape[0], heads, operand.shape[1] // heads, *operand.shape[2:])


def _check_operands(query: Tensor, key: Tensor, heads: int) -> None:
    if query.dim() != 5 or query.shape != key.shape:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)}; expected the same shape (B, heads·d, D, H, W)"
        )
    if heads < 1 or query.shape[1] % heads:
        raise ValueError(f"{query.shape[1]} channels; expected a multiple of the {heads} heads")


def _check_value(value: Tensor, query: Tensor, heads: int) -> None:
    if value.shape[:1] + value.shape[2:] != query.shape[:1] + query.shape[2:] or value.shape[1] % heads:
        raise ValueError(
            f"value has shape {tuple(value.shape)}; expected the batch size and grid of query {tuple(query.shape)} "
            f"and a number of channels divisible by {heads} heads"
        )


def _check_window(window: int | Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    sizes = (window,) * 3 if isinstance(window, int) else tuple(window)
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(f"window={window}; expected one positive size, or three")
    for size, length in zip(sizes, shape, strict=True):
        if length < size:
            raise ValueError(f"grid {tuple(shape)} has an axis of {length} voxels; the window of {size} needs {size}")
        if size % 2 == 0 and size != length:
            raise ValueError(
                f"window={window} on grid {tuple(shape)}; expected odd sizes, or the size of the whole axis"
            )
    return sizes


def _pad_inside(volume: Tensor, window: Sequence[int]) -> Tensor:
    """Pad (B, heads, d, *shape) such that windows centred on every voxel hold what the shifted windows hold.

    Beyond a border the volume is continued with the period of the window: the voxel before the first is the
    window's last. A window that reaches out by m then finds there the m voxels that the shifted window would gain at
    its other end. They stand in another order, which attention without a position bias does not see.
    """
    for axis, size in enumerate(window, start=3):
        length = volume.shape[axis]
        before, after = size // 2, (size - 1) // 2
        first = volume.narrow(axis, size - before, before)
        last = volume.narrow(axis, length - size, after)
        volume = torch.cat((first, volume, last), dim=axis)
    return volume


def _attend_by_planes(query: Tensor, key: Tensor, value: Tensor, window: tuple[int, ...], scale: float) -> Tensor:
    """As ``_attend`` of padded keys and values, in the value's dtype and order of memory, without gradients.

    A few planes at a time are padded and brought to float32, always in the same memory.
    """
    depth = query.shape[3]
    most = max(1, (_PLANES_GPU if query.is_cuda else _PLANES_CPU) // max(1, query[:, :, :, 0].numel()))
    most = min(most, -(-depth // 4))  # so that what is made on the way stays below a small volume, too
    # The padding along the first axis, as ``_pad_inside`` has it, of its planes' numbers.
    size, before, after = window[0], window[0] // 2, (window[0] - 1) // 2
    source = [*range(size - before, size), *range(depth), *range(depth - size, depth - size + after)]
    outer = [most, *query.shape[4:]]
    padded = [size + reach - 1 for size, reach in zip(outer, window, strict=True)]
    places = [_float_like(query, outer), _float_like(key, padded), _float_like(value, padded)]
    out = torch.empty_like(value)
    for start in range(0, depth, most):
        count = min(most, depth - start)
        near = source[start : start + count + window[0] - 1]
        part = places[0].narrow(3, 0, count).copy_(query.narrow(3, start, count))
        keys, values = (place.narrow(3, 0, len(near)) for place in places[1:])
        for volume, target in ((key, keys), (value, values)):
            inside = _inside(target, window)
            for index, plane in enumerate(near):
                inside[:, :, :, index] = volume[:, :, :, plane]
            _wrap(target, window)
        out.narrow(3, start, count).copy_(_attend(part, keys, values, None, window, scale))
    return out


def _float_like(volume: Tensor, shape: Sequence[int]) -> Tensor:
    dtype = torch.promote_types(volume.dtype, torch.float32)
    return torch.empty(*volume.shape[:3], *shape, dtype=dtype, device=volume.device)


def _inside(padded: Tensor, window: Sequence[int]) -> Tensor:
    """The own voxels of padded planes, along the last two axes, a view."""
    for axis, size in enumerate(window[1:], start=4):
        padded = padded.narrow(axis, size // 2, padded.shape[axis] - size + 1)
    return padded


def _wrap(padded: Tensor, window: Sequence[int]) -> None:
    """Continue the voxels inside with the period of the window along the last two axes, as ``_pad_inside`` does."""
    for axis, size in enumerate(window[1:], start=4):
        before, after, last = size // 2, (size - 1) // 2, padded.shape[axis]
        padded.narrow(axis, 0, before).copy_(padded.narrow(axis, size, before))
        padded.narrow(axis, last - after, after).copy_(padded.narrow(axis, last - after - size, after))


# --- the operator


class _Operands(NamedTuple):
    """Query (B, heads, d, *shape), key and value (B, heads, d or e, *(shape + window − 1)), bias (heads, neighbours).

    Without a value, the values are the neighbours' offsets.
    """

    query: Tensor
    key: Tensor
    value: Tensor | None
    bias: Tensor | None
    window: tuple[int, ...]
    scale: float


class _Slab(NamedTuple):
    """A run of query planes from ``start``, their neighbours' keys and values, row-major, and the weights of these.

    Keys and values are views (B, heads, channels, *shape); weights (neighbours, B, heads, *shape).
    """

    start: int
    query: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    weights: Tensor


def _attend(
    query: Tensor, key: Tensor, value: Tensor | None, bias: Tensor | None, window: tuple[int, ...], scale: float
) -> Tensor:
    """``_WindowAttention`` in float32 or better."""
    given = [query, key, value, bias]
    dtype = torch.float32
    for operand in given:
        dtype = dtype if operand is None else torch.promote_types(dtype, operand.dtype)
    operands = [None if operand is None else operand.to(dtype).contiguous() for operand in given]
    sizes = tuple(map(int, window))  # while a network is traced, shapes are of tensors, which may not be nested here
    result: Tensor = _WindowAttention.apply(*operands, sizes, scale)  # type: ignore[no-untyped-call]  # so in torch
    return result


def _offsets(window: Sequence[int], like: Tensor) -> Tensor:
    """Neighbours' offsets in voxels, row-major: (neighbours, 3, 1, 1, 1)."""
    axes = [range(-(size // 2), size - size // 2) for size in window]
    return like.new_tensor(list(itertools.product(*axes))).view(-1, 3, 1, 1, 1)


def _neighbours(padded: Tensor, window: Sequence[int], start: int, planes: int) -> list[Tensor]:
    """Views of a padded volume, one for each place in the window, row-major, as seen from a run of query planes."""
    slab = padded.narrow(3, start, planes + window[0] - 1)
    sizes = [length - size + 1 for length, size in zip(slab.shape[3:], window, strict=True)]
    views = []
    for place in itertools.product(*map(range, window)):
        view = slab
        for axis, (first, size) in enumerate(zip(place, sizes, strict=True), start=3):
            view = view.narrow(axis, first, size)
        views.append(view)
    return views


def _products(query: Tensor, neighbours: Sequence[Tensor]) -> Tensor:
    """Sum over channels of q(x) times each neighbour: (neighbours, B, heads, *shape)."""
    batch, heads, _, *shape = query.shape
    sums = query.new_empty(len(neighbours), batch, heads, *shape)
    product = torch.empty_like(query)
    for total, neighbour in zip(sums, neighbours, strict=True):
        torch.mul(query, neighbour, out=product)
        torch.sum(product, 2, out=total)
    return sums


def _slabs(operands: _Operands) -> Iterator[_Slab]:
    """The volume in runs of planes along its first axis, small enough for their weights to be held."""
    query, key, value, bias, window, scale = operands
    batch, heads, channels, depth, height, width = query.shape
    plane = batch * heads * height * width * max(channels, math.prod(window))
    most = max(1, (_SLAB_GPU if query.is_cuda else _SLAB_CPU) // max(plane, 1))
    for start in range(0, depth, most):
        planes = min(most, depth - start)
        part = query.narrow(3, start, planes)
        keys = _neighbours(key, window, start, planes)
        logits = _products(part, keys).mul_(scale)
        if bias is not None:
            logits += bias.t()[:, None, :, None, None, None]
        values = list(_offsets(window, part)) if value is None else _neighbours(value, window, start, planes)
        yield _Slab(start, part, keys, values, logits.softmax(0))


class _WindowAttention(torch.autograd.Function):
    """Σ_o a_o v_o with a = softmax_o(scale · q·k_o + bias_o), over the windows of a padded volume; see ``_Operands``.

    For a gradient g of the result, with b_o = g·v_o and l_o = a_o (b_o − Σ_p a_p b_p) the gradient of logit o,
        ∂/∂q = scale Σ_o l_o k_o,  and, at the neighbour o of each query,  ∂/∂k += scale · l_o q  and  ∂/∂v += a_o g.
    Kept for the backward pass are the operands alone; the weights are made again, slab by slab.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        operands = _Operands(*inputs)
        ctx.save_for_backward(*operands[:4])
        ctx.settings = operands[4:]
        query, value = operands.query, operands.value
        batch, heads, _, *shape = query.shape
        out = query.new_zeros(batch, heads, 3 if value is None else value.shape[2], *shape)
        for slab in _slabs(operands):
            part = out.narrow(3, slab.start, slab.query.shape[3])
            for weight, neighbour in zip(slab.weights, slab.values, strict=True):
                part.addcmul_(weight.unsqueeze(2), neighbour)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        operands = _Operands(*ctx.saved_tensors, *ctx.settings)
        totals = [None if operand is None else torch.zeros_like(operand) for operand in ctx.saved_tensors]
        grad_query, grad_key, grad_value, grad_bias = totals
        assert grad_query is not None
        assert grad_key is not None
        for slab in _slabs(operands):
            place = (slab.start, slab.query.shape[3])
            grad = grads[0].narrow(3, *place)
            logits = _products(grad, slab.values)
            logits.sub_((slab.weights * logits).sum(0)).mul_(slab.weights)
            if grad_bias is not None:
                grad_bias += logits.sum((1, 3, 4, 5)).t()
            logits = logits.mul_(operands.scale).unsqueeze(3)
            part = grad_query.narrow(3, *place)
            for logit, key, total in zip(
                logits, slab.keys, _neighbours(grad_key, operands.window, *place), strict=True
            ):
                part.addcmul_(logit, key)
                total.addcmul_(logit, slab.query)
            if grad_value is not None:
                for weight, total in zip(slab.weights, _neighbours(grad_value, operands.window, *place), strict=True):
                    total.addcmul_(weight.unsqueeze(2), grad)
        return *totals, None, None


# --- NATTEN


@cache
def _natten() -> ModuleType | None:
    """The natten package where it is installed with its CUDA kernels; without them it would weigh every pair."""
    try:
        natten = importlib.import_module("natten")
    except ImportError:
        return None
    return natten if getattr(natten, "HAS_LIBNATTEN", False) else None


def _natten_takes(query: Tensor, value: Tensor, window: Sequence[int]) -> bool:
    """Whether these are operands that natten's kernels take: on a GPU, single or half precision, odd windows."""
    return (
        query.is_cuda
        and query.dtype != torch.float64
        and query.shape[2] == value.shape[2]
        and query.shape[2] % 8 == 0
        and all(size > 1 and size % 2 for size in window)
        and _natten() is not None
    )


def _natten_attention(query: Tensor, key: Tensor, value: Tensor, window: Sequence[int], scale: float) -> Tensor:
    """natten's na3d of (B, heads, d, *shape), which it takes as (B, *shape, heads, d) of one dtype."""
    natten = _natten()
    assert natten is not None
    operands = (operand.to(query.dtype).movedim((1, 2), (4, 5)).contiguous() for operand in (query, key, value))
    out: Tensor = natten.na3d(*operands, kernel_size=tuple(window), scale=scale)
    return out.movedim((4, 5), (1, 2))
