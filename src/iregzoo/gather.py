"""Linear sampling of many channels on a CPU: a weighted sum of eight rows for each place, without gradients.

On a CPU, PyTorch's ``grid_sample`` reads volumes one number at a time. Where the channels of a voxel stand side by side
in memory (``channels_last_3d``) a voxel is a row, and a sample is the weighted sum of the eight rows around it, which
``torch.nn.functional.embedding_bag`` computes with vector instructions.

``iregzoo.fields`` goes this way by itself where it can; there is nothing to switch on.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

# The fewest channels for each thread for which it pays: indices and weights are made by one thread, while fields.py has
# all of them share grid_sample. By one thread, 80×96×112 voxels with 8, 16 and 32 channels of float32 take 0.8, 0.6 and
# 0.5 of the time of grid_sample, and 16 channels of bfloat16 take 0.6; by two, 16 and 32 channels take 0.7 and 0.5.
_CHANNELS = {torch.float32: 8, torch.bfloat16: 12}

# Places of a slab for each thread, up to four. Each has 64 bytes of indices and weights (bfloat16: 96).
_SLAB = 2**17

# So few numbers PyTorch leaves to one thread. Indices and weights take some eighty short operations; were threads to
# meet after each, a busy machine would let them wait there for far longer than the work takes.
_SERIAL = 2**15


def takes(image: Tensor, places: Tensor) -> bool:
    """Whether ``gather`` can read the image at these places, and sooner than ``grid_sample``."""
    return (
        type(image) is type(places) is Tensor
        and image.dim() == 5
        and image.device.type == places.device.type == "cpu"
        and image.dtype in _CHANNELS
        and image.shape[0] == places.shape[0]
        and places.numel() > 0
        and image.shape[1] >= _CHANNELS[image.dtype] * torch.get_num_threads()
        and min(image.shape[2:]) > 1
        and math.prod(image.shape[2:]) < 2**31
        and not (torch.is_grad_enabled() and (image.requires_grad or places.requires_grad))
    )


def gather(image: Tensor, places: Tensor, *, relative: bool, padding: str, out: Tensor | None = None) -> Tensor:
    """Read an image at places by linear interpolation; what lies outside is as ``grid_sample`` has it.

    Args:
        image: (B, C, D, H, W) on the CPU, float32 or bfloat16, finite, no axis of one voxel.
        places: (B, 3, *shape) in voxels of the image, float32 or float64.
        relative: places are displacements from the voxels of their own grid, not positions.
        padding: ``zeros`` or ``border`` outside the image.
        out: (B, C, *shape) of any dtype and order of memory, of displacements; written to and returned where given.

    Returns:
        (B, C, *shape) in the image's dtype, its channels last in memory. A place that is NaN reads NaN.
    """
    shape = places.shape[2:]
    if not relative:  # positions need no grid
        places = places.reshape(len(image), 3, -1, 1, 1)
    rows = image.new_empty(len(image), *places.shape[2:], image.shape[1]) if out is None else out.movedim(1, -1)
    for volume, place, result in zip(image, places, rows, strict=True):
        _gather_volume(_rows(volume), volume.shape[1:], place, relative, padding, result)
    return rows.view(len(image), *shape, -1).movedim(-1, 1) if out is None else out


def _rows(volume: Tensor) -> Tensor:
    """(C, D, H, W) as (D·H·W, C), a view where the channels are last in memory."""
    last = volume.movedim(0, -1)
    return last.view(-1, len(volume)) if last.is_contiguous() else volume.reshape(len(volume), -1).t().contiguous()


def _gather_volume(rows: Tensor, sizes: torch.Size, places: Tensor, relative: bool, padding: str, out: Tensor) -> None:
    """Write samples of a volume of so many voxels an axis at places (3, X, Y, Z) into out (X, Y, Z, C)."""
    plane = math.prod(places.shape[2:])
    depth = min(max(1, _SLAB * min(torch.get_num_threads(), 4) // plane), places.shape[1])
    parts = 1 if rows.dtype == torch.float32 else 2
    index = torch.empty(depth * plane, 8, parts, dtype=torch.int32)
    weights = torch.empty(depth * plane, 8, parts, dtype=rows.dtype)
    bags = torch.arange(0, index.numel(), index[0].numel(), dtype=torch.int32)
    starts = [torch.arange(size, dtype=places.dtype) for size in places.shape[1:]]
    for first in range(0, places.shape[1], depth):
        slab = places[:, first : first + depth]
        if relative:
            slab = torch.stack(torch.meshgrid(starts[0][first : first + depth], *starts[1:], indexing="ij")).add_(slab)
        positions = slab.reshape(3, -1)
        count = positions.shape[1]
        filled = index[:count], weights[:count]
        pieces = (torch.split(positions, _SERIAL, dim=1), *(torch.split(table, _SERIAL) for table in filled))
        for position, rows_around, shares in zip(*pieces, strict=True):
            _tabulate(position, rows_around, shares, sizes, padding)
        around, weighing = (table.flatten() for table in filled)
        sums = F.embedding_bag(around, rows, bags[:count], mode="sum", per_sample_weights=weighing)
        target = out[first : first + depth]
        target.copy_(sums.view(target.shape))


def _tabulate(positions: Tensor, index: Tensor, weights: Tensor, sizes: torch.Size, padding: str) -> None:
    """Write the rows around each position (3, n) and their weights, each (n, 8, 1), or (n, 8, 2) for bfloat16.

    A bfloat16 weight alone is as coarse as the result, so a bfloat16 row takes part twice, with its weight and with
    what the weight was rounded by. Sums run in float32: the result is that of float32 sampling, rounded, except for one
    in six hundred, which is the next bfloat16. Rows of float32 made for the occasion take as long, and twice the
    image's memory.
    """
    strides = (sizes[1] * sizes[2], sizes[2], 1)
    lowest = torch.zeros(positions.shape[1], dtype=torch.int32)
    pairs = []
    for position, size, stride in zip(positions, sizes, strides, strict=True):
        lower, pair = _neighbours(position, size, padding)
        lowest.add_(lower, alpha=stride)
        pairs.append(pair)
    steps = [sum(corner) for corner in itertools.product(*((0, stride) for stride in strides))]
    edges = [first * second for first, second in itertools.product(*pairs[:2])]
    for corner, (step, (edge, end)) in enumerate(zip(steps, itertools.product(edges, pairs[2]), strict=True)):
        for part in range(index.shape[2]):
            torch.add(lowest, step, out=index[:, corner, part])
        if index.shape[2] == 1:
            torch.mul(edge, end, out=weights[:, corner, 0])
        else:
            weight = edge * end
            rounded = weight.to(weights.dtype)
            weights[:, corner, 0] = rounded
            weights[:, corner, 1] = weight.sub_(rounded.float())


def _neighbours(position: Tensor, size: int, padding: str) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The lower of the two voxels around each position along an axis, and the weights of both."""
    if padding == "border":
        position = position.clamp(0, size - 1)
    # Conversion cuts towards zero, as floor does here; torch.floor is shared among threads at any length. Whatever
    # number a NaN becomes, it must be that of a voxel.
    index = position.clamp(0, size - 2).to(torch.int32).clamp_(0, size - 2)
    beyond = (position - index.to(position.dtype)).float()
    if padding == "border":
        return index, (1 - beyond, beyond)
    # Outside, an image falls to zero within one voxel: a voxel weighs 1 less its distance, or nothing.
    return index, ((1 - beyond.abs()).clamp_(min=0), (1 - (beyond - 1).abs()).clamp_(min=0))
