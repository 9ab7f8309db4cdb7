"""PAN: pyramid attention network (Wang et al., ISBI 2024).

Paper: "Pyramid Attention Network for Medical Image Registration".
Published code: https://github.com/JuliusWang-7/PAN. This file is written from the paper.

An encoder with channel attention gives features of both images; each level decodes them with a local attention
transformer (LAT) whose values are the neighbours' offsets, so that its attention weights are a displacement.

What the paper does not print follows the published code, so that its checkpoints give the same fields: the channels,
the encoder's first convolution, the slopes, the zero keys outside the volume, the convolution that merges the heads and
how it starts, and the composition of the levels, which is IIRP-Net's. Because it is, controllers of iterations may
steer PAN, too; this goes beyond the paper, which takes one pass a level.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from iregzoo.attention import offset_attention
from iregzoo.iteration import Controller, FixedIterations
from iregzoo.networks._blocks import (
    Encoder,
    check_pair,
    conv_block,
    flow_conv,
    halve,
    join,
    register_pyramid,
    voxel_mean,
)
from iregzoo.networks._convolution import Conv3d, ConvChain
from iregzoo.networks._norm import InstanceNorm
from iregzoo.registration import Registration

REDUCTION = 16


def conv_norm_block(channels_in: int, channels_out: int) -> ConvChain:
    """Conv3d 3×3×3, instance norm and LeakyReLU(0.1). The norm undoes the bias, which published checkpoints have."""
    conv = Conv3d(channels_in, channels_out, 3, padding=1)
    # In place, to hold one volume less: the norm's backward pass needs its input alone.
    return ConvChain(conv, InstanceNorm(), nn.LeakyReLU(0.1, inplace=True))


class SqueezeExcitation(nn.Module):
    """Scale each channel by a weight made of all their means (Hu et al., CVPR 2018), (B, C, *shape) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weigh = nn.Sequential(
            nn.Linear(channels, channels // REDUCTION, bias=False),
            nn.LeakyReLU(0.01),
            nn.Linear(channels // REDUCTION, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        weights: Tensor = self.weigh(voxel_mean(x))
        return x * weights[:, :, None, None, None]


def encoder_block(channels_in: int, channels_out: int) -> nn.Sequential:
    """Two convolution blocks and squeeze-and-excitation (section 2.2)."""
    return nn.Sequential(
        conv_norm_block(channels_in, channels_out),
        conv_norm_block(channels_out, channels_out),
        SqueezeExcitation(channels_out),
    )


class ImageEncoder(Encoder):
    """``Encoder`` whose levels come with the image, average-pooled to their grid, as their last channel."""

    def forward(self, image: Tensor) -> list[Tensor]:
        levels: list[Tensor] = []
        for features in super().forward(image):
            image = halve(image) if levels else image
            levels.append(join(features, image.to(features.dtype)))
        return levels


class OffsetAttention(nn.Module):
    """Attention over the 3×3×3 neighbourhood with a learned bias P of each neighbour, (4) and (5).

    (B, heads·d, *shape) query and key to one displacement a head, (B, heads·3, *shape) in voxels.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.rpb = nn.Parameter(torch.zeros(heads, 3, 3, 3))

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return offset_attention(query, key, self.rpb)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OffsetAttention":
        # ``Module.to`` asks for channels_last_3d also of what has four axes, and no such order.
        super()._apply(lambda tensor: fn(tensor.flatten(1)).view_as(tensor), recurse)  # type: ignore[no-untyped-call]
        return self


class LAT(nn.Module):
    """Local attention transformer: concatenated features (B, 2C, *shape) to a displacement (B, 3, *shape).

    Args:
        channels: C, of one image's features.
        heads: of the attention, each with ``head_channels`` channels.
        head_channels: of a query and a key.
    """

    def __init__(self, channels: int, heads: int, head_channels: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Sequential(nn.Linear(channels, heads * head_channels), nn.LayerNorm(heads * head_channels))
        self.attention = OffsetAttention(heads)
        self.flow = flow_conv(3 * heads)

    def forward(self, features: Tensor, tokens: list[Tensor] | None = None) -> Tensor:
        """Displacement in voxels; ``tokens`` becomes query and key, (B, heads, head_channels, *shape) both."""
        key, query = (self.project(part.movedim(1, -1)).movedim(-1, 1) for part in features.chunk(2, dim=1))
        if tokens is not None:
            tokens[:] = (operand.unflatten(1, (self.heads, -1)) for operand in (query, key))
        flow: Tensor = self.flow(self.attention(query, key).to(self.flow.weight.dtype))
        return flow


class PANNet(nn.Module):
    """PAN, one pass a level unless a controller says otherwise.

    While training, ``Registration.auxiliary["tokens"]`` holds what the orthogonality loss compares: query and key of
    the last pass of each level in ``orthogonal_heads``, (B, heads, head_channels, *level_shape).

    Args:
        base: c; level i, full resolution first, has c·2^i channels.
        heads: of the attention at each level, full resolution first.
        head_channels: of each head's query and key.
        orthogonal_heads: levels with these numbers of heads give their tokens to the orthogonality loss. The paper
            does not say which; the published code takes the one with two heads.
        controller: used when not training. Training takes one pass a level unless a call brings a controller.
    """

    def __init__(
        self,
        *,
        base: int = 8,
        heads: Sequence[int] = (1, 1, 2, 4, 8),
        head_channels: int = 6,
        orthogonal_heads: Sequence[int] = (2,),
        controller: Controller | None = None,
    ) -> None:
        super().__init__()
        _check_settings(base, heads, head_channels, orthogonal_heads)
        self.controller: Controller = FixedIterations() if controller is None else controller
        self.stride = 2 ** (len(heads) - 1)
        self.orthogonal_levels = [level for level, count in enumerate(heads) if count in orthogonal_heads]
        channels = [base * 2 ** (level + 1) for level in range(len(heads))]
        first = nn.Sequential(conv_block(1, base), *encoder_block(base, channels[0]))
        self.encoder = ImageEncoder([first, *map(encoder_block, channels[:-1], channels[1:])])
        self.estimators = nn.ModuleList(
            LAT(count + 1, each, head_channels) for count, each in zip(channels, heads, strict=True)
        )

    def forward(self, moving: Tensor, fixed: Tensor, controller: Controller | None = None) -> Registration:
        """Register (B, 1, D, H, W) images in [0, 1] of a shape divisible by ``stride``; see ``Registration``."""
        check_pair(moving, fixed, self.stride)
        if controller is None:
            controller = FixedIterations() if self.training else self.controller
        tokens: dict[int, list[Tensor]] = {level: [] for level in self.orthogonal_levels if self.training}
        estimators = [partial(lat, tokens=tokens.get(level)) for level, lat in enumerate(self.estimators)]
        registration = register_pyramid(self.encoder, estimators, moving, fixed, controller)
        return replace(registration, auxiliary={"tokens": tuple(chain(*tokens.values()))}) if tokens else registration


def _check_settings(base: int, heads: Sequence[int], head_channels: int, orthogonal_heads: Sequence[int]) -> None:
    """Raise ValueError for settings that leave a layer without channels, or the orthogonality loss without a use."""
    if 2 * base < REDUCTION:
        raise ValueError(
            f"base={base}; expected at least {REDUCTION // 2}, because squeeze-and-excitation divides 2·base"
        )
    if not heads or min(heads) < 1:
        raise ValueError(f"heads={tuple(heads)}; expected at least one head at each of one or more levels")
    if head_channels < 2:
        raise ValueError(f"head_channels={head_channels}; expected at least 2, because LayerNorm makes one a constant")
    for count in orthogonal_heads:
        if count < 2 or count not in heads:
            raise ValueError(
                f"orthogonal_heads={tuple(orthogonal_heads)}; expected none, or numbers above 1 that are in "
                f"heads={tuple(heads)}"
            )
