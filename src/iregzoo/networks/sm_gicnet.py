"""SM-GICNet: symmetric multi-level gradient-inverse consistency network (Bai et al., MIDL 2025).

Paper: "Symmetric Multi-level Gradient-Inverse Consistency Network for Brain Image Registration with Large Deformation".
Published code: https://github.com/LSYLAB/SM-GICNet. This file is written from the paper.

Four levels, at 1/8, 1/4, 1/2 and 1 of the shape, each predict a stationary velocity v_i from the wavelets of the images
(level 4: from the images). With up(·) for the step to the next level's grid,
    φ_i = up(φ_(i-1)) ∘ exp(v_i)  and  φ_i⁻¹ = exp(−v_i) ∘ up(φ_(i-1)⁻¹),
so the inverse is one by construction (the published code warps the negated velocity once; this is the paper's text). In
training both directions are made in one call, as one batch of the same weights. Its losses are ``symmetric``.

Readings of the paper, which prints little of its layers: an activation follows every convolution but the last, in a
residual block after the sum; residual blocks stand after each stride-2 and before each transposed convolution; the
range of Softsign is in voxels of the level (``reach``).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iregzoo.fields import compose, integrate, length, resize, warp
from iregzoo.iteration import Controller
from iregzoo.networks._blocks import DisplacementConv, check_one_pass, check_pair, join
from iregzoo.networks._convolution import Conv3d, ConvChain, conv_leaky
from iregzoo.registration import Registration

LEVELS = 4


def conv_block(channels_in: int, channels_out: int, stride: int = 1) -> ConvChain:
    """Conv3d 3×3×3 without bias, and LeakyReLU(0.2)."""
    return ConvChain(
        Conv3d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False), nn.LeakyReLU(0.2, inplace=True)
    )


class ResidualBlock(nn.Module):
    """LeakyReLU(conv(LeakyReLU(conv(x))) + x), (B, C, *shape) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = conv_block(channels, channels)
        self.second = Conv3d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return conv_leaky(self.second, 0.2, self.first(x), plus=x)


class AttentionGate(nn.Module):
    """Scale each voxel of an encoder feature by a weight in (0, 1), in which the decoder has a say (Appendix A).

    The weights are made on the decoder's grid, to which the feature's 1×1×1 convolution steps, and resampled. The
    number of channels between is not printed; it is that of the features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.feature = Conv3d(channels, channels, 1, stride=2, bias=False)
        self.gate = Conv3d(channels, channels, 1, bias=False)
        self.weight = Conv3d(channels, 1, 1, bias=False)

    def forward(self, x: Tensor, gating: Tensor) -> Tensor:
        """Gate x (B, C, *shape) by the decoder's feature (B, C, *shape/2)."""
        weights = self.weight(F.relu_(self.feature(x) + self.gate(gating))).sigmoid()
        resampled = F.interpolate(weights, size=x.shape[2:], mode="trilinear", align_corners=True)
        return x * resampled.to(x.dtype)


class Decoder(nn.Module):
    """One step up: residual block, transposed convolution, skip, and a convolution of both."""

    def __init__(self, channels: int, gated: bool) -> None:
        super().__init__()
        self.residual = ResidualBlock(channels)
        self.gate = AttentionGate(channels) if gated else None
        self.up = nn.Sequential(
            nn.ConvTranspose3d(channels, channels, 2, stride=2, bias=False), nn.LeakyReLU(0.2, inplace=True)
        )
        self.merge = conv_block(2 * channels, channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Merge x (B, C, *shape/2) with the encoder's feature (B, C, *shape)."""
        x = self.residual(x)
        if self.gate is not None:
            skip = self.gate(skip, x)
        merged: Tensor = self.merge(join(self.up(x), skip))
        return merged


class ResidualUNet(nn.Module):
    """(B, C, *shape) to the same, by way of shape/2**depth.

    Args:
        channels: C, at every depth.
        depth: number of downsamplings.
        gated: whether an attention gate stands on each skip.
    """

    def __init__(self, channels: int, depth: int, gated: bool) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            conv_block(channels, channels, stride=2).append(ResidualBlock(channels)) for _ in range(depth)
        )
        self.up = nn.ModuleList(Decoder(channels, gated) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for down in self.down:
            skips.append(x)
            x = down(x)
        for up in self.up:
            x = up(x, skips.pop())
        return x


class LowStem(nn.Module):
    """Level 1: the low bands (B, 1, *shape) of both images; there is no field yet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = conv_block(2, channels).append(ResidualBlock(channels))

    def forward(self, warped: Tensor, fixed: Tensor, field: Tensor) -> Tensor:
        features: Tensor = self.layers(torch.cat((warped, fixed), dim=1))
        return features


class WaveletStem(nn.Module):
    """Levels 2 and 3: low band and energy (B, 2, *shape) of both images, the low bands together with the field."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.low = conv_block(5, channels // 2)
        self.energy = conv_block(2, channels // 2)
        self.residual = ResidualBlock(channels)

    def forward(self, warped: Tensor, fixed: Tensor, field: Tensor) -> Tensor:
        low = self.low(torch.cat((warped[:, :1], fixed[:, :1], field), dim=1))
        energy = self.energy(torch.cat((warped[:, 1:], fixed[:, 1:]), dim=1))
        features: Tensor = self.residual(torch.cat((low, energy), dim=1))
        return features


class ImageStem(nn.Module):
    """Level 4: the images (B, 1, *shape), weighted by 0.5·D + 0.5 where they differ by D, and the field.

    D is the absolute difference normalised to a maximum of 1 in each pair.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = conv_block(5, channels).extend(conv_block(channels, channels))

    def forward(self, warped: Tensor, fixed: Tensor, field: Tensor) -> Tensor:
        difference = (warped - fixed).abs()
        largest = difference.amax((1, 2, 3, 4), keepdim=True).clamp_min(1e-6)  # of equal images
        weights = 0.5 * difference / largest + 0.5
        features: Tensor = self.layers(torch.cat((warped * weights, fixed * weights, field), dim=1))
        return features


class VelocityEstimator(nn.Module):
    """One level: what is warped, what is fixed and the field so far to a velocity (B, 3, *shape) in voxels.

    Args:
        stem: makes (B, channels, *shape) of the three.
        channels: of the U-net.
        depth: of the U-net.
        gated: whether the U-net has attention gates.
        reach: largest velocity of the level along an axis, in its voxels: Softsign times this.
    """

    def __init__(self, stem: nn.Module, channels: int, depth: int, gated: bool, reach: float) -> None:
        super().__init__()
        self.reach = reach
        self.stem = stem
        self.unet = ResidualUNet(channels, depth, gated)
        self.head = DisplacementConv(channels, bias=False)
        nn.init.normal_(self.head.weight, std=1e-5)

    def forward(self, warped: Tensor, fixed: Tensor, field: Tensor) -> Tensor:
        inputs = (each.to(self.head.weight.dtype) for each in (warped, fixed, field))
        velocity: Tensor = self.head(self.unet(self.stem(*inputs)))
        return self.reach * F.softsign(velocity.to(field.dtype))


def wavelet_levels(images: Tensor) -> list[Tensor]:
    """Low band and energy of three wavelet levels: (B, 1, *shape) to (B, 2, *shape/2), shape/4 and shape/8.

    The Haar wavelet: orthogonal, and it halves an even size exactly. The energy is the root of the summed squares of
    the seven other bands (Figure 1). Each level is divided by √8, by which an orthonormal transform lets the low band
    grow: it is then the average over 2×2×2 voxels and stays in the images' range, and the energy with it.
    """
    import ptwt  # only this method needs it

    levels: list[Tensor] = []
    with torch.autocast(images.device.type, enabled=False):  # bfloat16 would round the differences of large bands
        low = images.to(torch.promote_types(images.dtype, torch.float32))
        for _ in range(LEVELS - 1):
            low, bands = ptwt.wavedec3(low / 8**0.5, "haar", level=1)
            energy = length(torch.stack(list(bands.values())), dim=0)
            levels.append(torch.cat((low, energy), dim=1))
    return levels


class SMGICNet(nn.Module):
    """SM-GICNet: takes one pass, and registers both ways at once where asked.

    Args:
        channels: of every level, even.
        reach: range of each level's Softsign, coarse to fine: the largest velocity along an axis in voxels of the
            level, which are 8, 4, 2 and 1 of the image's. The paper prints none. The default lets level 1, which has to
            find what an affine start would, move by 64 voxels of the image, and the others by 16, 8 and 4.
        levels: how many levels run, from the coarsest; see the attribute.
        steps: of ``fields.integrate``; the paper squares so many times, there it is half as many of a midpoint step.
    """

    stride = 2**LEVELS
    controller: Controller | None = None

    def __init__(
        self,
        *,
        channels: int = 32,
        reach: Sequence[float] = (8.0, 4.0, 4.0, 4.0),
        levels: int = LEVELS,
        steps: int = 7,
    ) -> None:
        super().__init__()
        if channels < 2 or channels % 2:
            raise ValueError(f"channels={channels}; expected an even number, at least 2")
        if len(reach) != LEVELS or min(reach) <= 0:
            raise ValueError(f"reach={tuple(reach)}; expected {LEVELS} ranges above 0, coarse to fine")
        self.levels = levels
        self.steps = steps
        self.estimators = nn.ModuleList(
            VelocityEstimator(stem(channels), channels, depth, gated=stem is ImageStem, reach=limit)
            for stem, depth, limit in zip(
                (LowStem, WaveletStem, WaveletStem, ImageStem), (1, 2, 3, 3), reach, strict=True
            )
        )

    @property
    def levels(self) -> int:
        """How many levels run, 1 to 4 from the coarsest; training adds them one by one.

        The network has all its parameters whatever this is. With fewer than 4, ``displacement`` and ``inverse`` are
        those of the last level, resized to the images' grid.

        Raises:
            ValueError: when set to another number.
        """
        return self._levels

    @levels.setter
    def levels(self, count: int) -> None:
        if count not in range(1, LEVELS + 1):
            raise ValueError(f"levels={count}; expected 1 to {LEVELS}")
        self._levels = count

    def forward(
        self, moving: Tensor, fixed: Tensor, controller: Controller | None = None, *, both: bool | None = None
    ) -> Registration:
        """Register (B, 1, D, H, W) images in [0, 1] of a shape divisible by ``stride``; see ``Registration``.

        Args:
            moving, fixed: the images.
            controller: None or one iteration.
            both: whether to register fixed to moving in the same call, as ``opposite``; None does so in training.
        """
        check_pair(moving, fixed, self.stride)
        check_one_pass(controller)
        both = self.training if both is None else both
        images = torch.cat((moving, fixed))
        bands = wavelet_levels(images)
        inputs = [bands[2][:, :1], bands[1], bands[0], images][: self.levels]
        # (moving, fixed) twice the batch for both ways: each image is once the one and once the other.
        pairs = [(level, level.roll(len(moving), 0)) if both else level.chunk(2) for level in inputs]
        pyramid, inverse = self._register(pairs)
        fields = [resize(pyramid[-1], moving.shape[2:]), resize(inverse, moving.shape[2:]), *pyramid]
        if not both:
            return _registration(fields)
        there, back = zip(*(field.chunk(2) for field in fields), strict=True)
        return _registration(there, opposite=_registration(back))

    def _register(self, pairs: Sequence[tuple[Tensor, ...]]) -> tuple[list[Tensor], Tensor]:
        """The displacement after each level, coarse to fine, and the inverse after the last, on its grid."""
        coarsest = pairs[0][0]
        displacement = coarsest.new_zeros(coarsest.shape[0], 3, *coarsest.shape[2:])
        inverse = displacement
        pyramid: list[Tensor] = []
        for level, (moving, fixed) in enumerate(pairs):
            displacement, inverse = (resize(field, fixed.shape[2:]) for field in (displacement, inverse))
            # The estimator sees the field in voxels of level 1, so that a movement looks the same at every level.
            velocity = self.estimators[level](warp(moving, displacement), fixed, displacement / 2**level)
            forward, backward = integrate(torch.cat((velocity, -velocity)), self.steps).chunk(2)
            displacement, inverse = compose(displacement, forward), compose(backward, inverse)
            pyramid.append(displacement)
        return pyramid, inverse


def _registration(fields: Sequence[Tensor], opposite: Registration | None = None) -> Registration:
    displacement, inverse, *pyramid = fields
    return Registration(displacement, inverse, tuple(pyramid), opposite=opposite)
