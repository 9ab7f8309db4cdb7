"""The operations as they are usually written, from their published formulas: what the library's are measured against.

VoxelMorph (Balakrishnan et al., TMI 2019): local NCC by box filters that are dense convolutions, warping by an identity
grid that is kept, moved, normalised and permuted, and scaling and squaring by such warps. Neighbourhood attention
(Hassani et al., CVPR 2023) by gathering every window.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def local_ncc(first: Tensor, second: Tensor, window: int = 9, eps: float = 1e-5) -> Tensor:
    """Mean squared local correlation of two images (B, 1, D, H, W), a scalar."""
    ones = first.new_ones(1, 1, window, window, window)
    n = window**3
    sum_a, sum_b, sum_aa, sum_bb, sum_ab = (
        F.conv3d(each, ones, padding=window // 2)
        for each in (first, second, first * first, second * second, first * second)
    )
    cross = sum_ab - sum_a * sum_b / n
    variance_a = sum_aa - sum_a * sum_a / n
    variance_b = sum_bb - sum_b * sum_b / n
    return (cross * cross / (variance_a * variance_b + eps)).mean()


class Warp(nn.Module):
    """image(x + u(x)), bilinear, of one grid; beyond it the border goes on."""

    grid: Tensor

    def __init__(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        axes = [torch.arange(size, dtype=dtype) for size in shape]
        self.register_buffer("grid", torch.stack(torch.meshgrid(*axes, indexing="ij"))[None])

    def forward(self, image: Tensor, displacement: Tensor) -> Tensor:
        places = self.grid + displacement
        for axis, size in enumerate(image.shape[2:]):
            places[:, axis] = 2 * places[:, axis] / (size - 1) - 1
        places = places.permute(0, 2, 3, 4, 1)[..., [2, 1, 0]]
        return F.grid_sample(image, places, mode="bilinear", padding_mode="border", align_corners=True)


class Integrate(nn.Module):
    """Scaling and squaring of a velocity (B, 3, D, H, W) of one grid."""

    def __init__(self, shape: Sequence[int], steps: int = 7, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.steps = steps
        self.warp = Warp(shape, dtype)

    def forward(self, velocity: Tensor) -> Tensor:
        displacement: Tensor = velocity / 2**self.steps
        for _ in range(self.steps):
            displacement = displacement + self.warp(displacement, displacement)
        return displacement


def neighbourhood_attention(query: Tensor, key: Tensor, value: Tensor, window: int = 3) -> Tensor:
    """One head over the window around each voxel, shifted inside at the borders: (B, C, D, H, W) to the same."""
    keys, values = (_windows(each, window) for each in (key, value))
    scores = (query[..., None] * keys).sum(1, keepdim=True) * query.shape[1] ** -0.5
    attended: Tensor = (scores.softmax(-1) * values).sum(-1)
    return attended


def _windows(volume: Tensor, window: int) -> Tensor:
    """Every voxel's window, gathered: (B, C, D, H, W, window³)."""
    for axis in (2, 3, 4):
        size = volume.shape[axis]
        starts = torch.arange(size, device=volume.device).sub(window // 2).clamp(0, size - window)
        volume = volume.unfold(axis, window, 1).index_select(axis, starts)
    return volume.flatten(5)
