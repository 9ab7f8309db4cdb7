"""AD-RegNet: attention-driven framework for non-rigid registration (Iqbal et al., 2026).

Paper: "Attention-Driven Framework for Non-Rigid Medical Image Registration". No code is published; this file is written
from the paper.

A 3-D U-Net reads both images; at each of its levels, bidirectional cross-attention (BCAM) relates their decoder
features, regional adaptive attention (RAA) weighs the regions of the result, and a head makes a field of it; the fields
are blended from coarse to fine.

Readings of the paper, the others each at its place below:
- No normalisation and no activation are printed: group norm, with which it learns faster, and LeakyReLU(0.1).
- The widths are a setting: ``PAPER`` is printed, ``NARROW`` is what two CPU cores can train.
- The sign of the blend in section III-B-1 contradicts (15); (15) stands.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iregzoo.attention import neighbourhood_attention
from iregzoo.fields import resize
from iregzoo.iteration import Controller
from iregzoo.networks._blocks import check_one_pass, check_pair, flow_conv, join
from iregzoo.networks._convolution import Conv3d, convolve, is_plain
from iregzoo.registration import Registration

PAPER = (32, 64, 128, 256, 512)
NARROW = (8, 16, 32, 64, 64)


def conv_norm_block(channels_in: int, channels_out: int) -> nn.Sequential:
    """Conv3d 3×3×3, group norm over groups of 8 channels, and LeakyReLU(0.1). A batch gets what its pairs would."""
    groups = math.gcd(channels_out, max(1, channels_out // 8))
    conv = Conv3d(channels_in, channels_out, 3, padding=1)
    return nn.Sequential(conv, nn.GroupNorm(groups, channels_out), nn.LeakyReLU(0.1, inplace=True))


class Encoder(nn.Sequential):
    """Two blocks, after a 2×2×2 convolution of stride 2 but on the first level, (4) and (5)."""

    def __init__(self, channels_in: int, channels: int, *, down: bool) -> None:
        halve = [Conv3d(channels_in, channels_in, 2, stride=2)] if down else []
        super().__init__(*halve, conv_norm_block(channels_in, channels), conv_norm_block(channels, channels))


class Decoder(nn.Module):
    """The coarser features on twice the grid, beside the encoder's of that grid, in two blocks, (6) and (7)."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(channels_in, channels, 2, stride=2)
        self.blocks = nn.Sequential(conv_norm_block(2 * channels, channels), conv_norm_block(channels, channels))

    def forward(self, coarse: Tensor, skip: Tensor) -> Tensor:
        features: Tensor = self.blocks(join(self.up(coarse), skip))
        return features


class CrossAttention(nn.Module):
    """BCAM: αA(M→F) + (1−α)A(F→M) of the images' features (B, C, *shape), (8) to (12); to the same shape.

    One head with d_k = C, which the paper leaves open. A(M→F) lies on the moving image's grid and A(F→M) on the fixed
    image's; as printed, they are blended voxel by voxel. α is the sigmoid of a parameter.

    Softmax over all voxels needs time that grows with their square. Where a level has more than ``max_tokens`` voxels,
    each attends to the ``window`` around it; a grid smaller than the window along an axis is attended to as a whole
    along that axis.

    The projections begin such that features attend to their like (queries and keys are the features) and A is the
    difference of the images' features (values of opposite sign): from random ones learning takes far longer.
    """

    def __init__(self, channels: int, max_tokens: int, window: int) -> None:
        super().__init__()
        self.max_tokens, self.window = max_tokens, window
        self.moving = _projection(channels, -1.0)
        self.fixed = _projection(channels, 1.0)
        self.balance = nn.Parameter(torch.zeros(()))

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        alpha = self.balance.sigmoid()
        plain = is_plain(self.moving, Conv3d) and is_plain(self.fixed, Conv3d)
        if plain and not torch.is_grad_enabled():  # one direction after the other, in less memory
            there = alpha * self._direction(self.moving, moving, self.fixed, fixed)
            return there.add_((1 - alpha) * self._direction(self.fixed, fixed, self.moving, moving))
        query_m, key_m, value_m = self.moving(moving).chunk(3, dim=1)
        query_f, key_f, value_f = self.fixed(fixed).chunk(3, dim=1)
        # Both directions in one pass, each querying the other image.
        operands = [torch.cat(each) for each in ((query_m, query_f), (key_f, key_m), (value_f, value_m))]
        there, back = self._attend(*operands).chunk(2)
        return alpha * there + (1 - alpha) * back

    def _direction(self, asks: Conv3d, asking: Tensor, answers: Conv3d, answering: Tensor) -> Tensor:
        """A of one image's queries to the other's keys and values, (B, C, *shape)."""
        channels = asking.shape[1]
        query = convolve(asking, asks.weight[:channels], None, padding=0)
        key, value = convolve(answering, answers.weight[channels:], None, padding=0).chunk(2, dim=1)
        return self._attend(query, key, value)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shape = query.shape[2:]
        if shape.numel() > self.max_tokens:
            window = [min(self.window, size) for size in shape]
            return neighbourhood_attention(query, key, value, window=window)
        # (B, 1, tokens, C), contiguous: what the kernels take that never hold the matrix of all weights.
        q, k, v = (x.flatten(2).transpose(1, 2)[:, None].contiguous() for x in (query, key, value))
        attended: Tensor = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        return attended.reshape(value.shape)


def _projection(channels: int, sign: float) -> Conv3d:
    """W_Q, W_K and W_V of one image, begun as the identity, the identity and ``sign`` times the identity."""
    project = Conv3d(channels, 3 * channels, 1, bias=False)
    unit = torch.eye(channels)
    with torch.no_grad():
        project.weight.copy_(torch.cat((unit, unit, sign * unit))[:, :, None, None, None])
    return project


class RegionalAttention(nn.Module):
    """RAA: features (B, C, *shape) scaled region by region, and the scale M, (B, 1, *shape), with a mean of 1.

    The paper's text leaves open:
    - The regions are as equal as voxels allow, of about ``patch`` voxels along each axis, so that they fill any grid.
      Where their number does not divide it, neighbours share a plane of voxels, and M's mean is 1 only nearly.
    - The descriptors attend to each other with one head; a score is linear in the descriptor and what it gathers.
    - A sum of regions, as printed, has no grid. Each region is scaled by its weight instead, times the number N of the
      regions: weights that sum to one would make the features vanish on large grids.
    - The weights are interpolated between the centres of the regions: a step at their borders would tear the field.
    """

    def __init__(self, channels: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.project = nn.Linear(channels, 2 * channels, bias=False)
        self.score = nn.Linear(channels, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        depth, height, width = (math.ceil(size / self.patch) for size in x.shape[2:])
        regions = F.adaptive_avg_pool3d(x, (depth, height, width)).flatten(2).transpose(1, 2)
        scales = self._scales(regions).view(-1, 1, depth, height, width)
        # Centres of regions, unlike those of voxels, are no corners of the grid: align_corners=False.
        importance = F.interpolate(scales, size=x.shape[2:], mode="trilinear")
        return x * importance, importance

    def _scales(self, regions: Tensor) -> Tensor:
        """N·w of N descriptors: (B, N, C) to (B, N)."""
        query, key = self.project(regions).chunk(2, dim=-1)
        gathered = F.scaled_dot_product_attention(query[:, None], key[:, None], regions[:, None])[:, 0]
        weights: Tensor = self.score(regions + gathered)[..., 0].softmax(1)
        return regions.shape[1] * weights


class Level(nn.Module):
    """Both images' features (B, C, *shape) to A (B, C, *shape), M (B, 1, *shape) and the field φ, (13).

    A is what leaves the RAA. The head's depth is not printed: a block before the convolution to the field, since
    nothing else here would relate the two images' features voxel by voxel.
    """

    def __init__(self, channels: int, patch: int, max_tokens: int, window: int) -> None:
        super().__init__()
        self.attention = CrossAttention(channels, max_tokens, window)
        self.regions = RegionalAttention(channels, patch)
        self.head = nn.Sequential(conv_norm_block(channels, channels), flow_conv(channels))

    def forward(self, moving: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attended, importance = self.regions(self.attention(moving, fixed))
        estimate = self.head(attended)
        return attended, importance, estimate.to(torch.promote_types(estimate.dtype, torch.float32))


class Fusion(nn.Module):
    """W φ + (1−W) up(Φ) with W = σ(conv([A, up(Φ)])) M clipped to 1, where Φ is the coarser level's field, (15)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weigh = Conv3d(channels + 3, 1, 3, padding=1)

    def forward(self, attended: Tensor, importance: Tensor, estimate: Tensor, coarse: Tensor) -> Tensor:
        coarse = resize(coarse, estimate.shape[2:])
        weight: Tensor = self.weigh(join(attended, coarse.to(attended.dtype))).to(coarse.dtype).sigmoid()
        weight = (weight * importance).clamp(max=1)
        return weight * estimate + (1 - weight) * coarse


class ADRegNet(nn.Module):
    """AD-RegNet, one pass.

    Args:
        channels: of the levels, full resolution first; ``PAPER`` are the paper's.
        patch: largest size of a region of the RAA, in voxels of its level: 16 for the paper's CT, 24 for its brains.
        max_tokens: most voxels of a level at which each attends to all.
        window: of the attention at finer levels, in voxels, odd.
        checkpointing: compute the levels again in the backward pass instead of keeping what they computed, so that the
            paper's widths fit into a GPU.

    Raises:
        ValueError: for settings that are not positive, and an even window.
    """

    controller: Controller | None = None

    def __init__(
        self,
        *,
        channels: Sequence[int] = NARROW,
        patch: int = 16,
        max_tokens: int = 4096,
        window: int = 3,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not channels or min(channels) < 1:
            raise ValueError(f"channels={tuple(channels)}; expected a positive number for each level")
        if patch < 1:
            raise ValueError(f"patch={patch}; expected at least one voxel")
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window={window}; expected an odd number of voxels")
        self.checkpointing = checkpointing
        self.stride = 2 ** (len(channels) - 1)
        self.encoders = nn.ModuleList(
            Encoder(before, count, down=level > 0)
            for level, (before, count) in enumerate(zip((1, *channels), channels, strict=False))
        )
        self.decoders = nn.ModuleList(map(Decoder, channels[1:], channels))
        self.levels = nn.ModuleList(Level(count, patch, max_tokens, window) for count in channels)
        self.fusions = nn.ModuleList(map(Fusion, channels[:-1]))

    def forward(self, moving: Tensor, fixed: Tensor, controller: Controller | None = None) -> Registration:
        """Register (B, 1, D, H, W) images in [0, 1] of a shape divisible by ``stride``; see ``Registration``."""
        check_pair(moving, fixed, self.stride)
        check_one_pass(controller)
        features = self._pair_features(moving, fixed)
        estimates = (self._run(level, *features.pop(0)) for level in reversed(self.levels))
        _, _, displacement = next(estimates)
        pyramid = [displacement]
        for fusion, estimate in zip(reversed(self.fusions), estimates, strict=True):
            displacement = self._run(fusion, *estimate, displacement)
            pyramid.append(displacement)
        return Registration(displacement, pyramid=tuple(pyramid))

    def _pair_features(self, moving: Tensor, fixed: Tensor) -> list[tuple[Tensor, ...]]:
        """Both images' features, coarse to fine. The U-Net is shared: one pass or, at inference, two in less memory."""
        if torch.is_grad_enabled():
            return [level.chunk(2) for level in self._features(torch.cat((moving, fixed)))]
        return list(zip(self._features(moving), self._features(fixed), strict=True))

    def _features(self, images: Tensor) -> list[Tensor]:
        """Decoder features of the U-Net, coarse to fine; the bottleneck is the first."""
        encoded = [images]
        for encoder in self.encoders:
            encoded.append(self._run(encoder, encoded[-1]))
        features = [encoded.pop()]
        for decoder in reversed(self.decoders):
            features.append(self._run(decoder, features[-1], encoded.pop()))
        return features

    def _run(self, part: nn.Module, *inputs: Tensor) -> Any:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)
        return part(*inputs)
