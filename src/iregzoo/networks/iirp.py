"""IIRP-Net: iterative inference residual pyramid network (Ma et al., CVPR 2024).

Paper: "IIRP-Net: Iterative Inference Residual Pyramid Network for Enhanced Image Registration".
Published code: https://github.com/Torbjorn1997/IIRP-Net. This file is written from the paper.

RP-Net is the trained network, one pass a level; IIRP-Net is the same weights with each level's flow estimator repeated
under IterStop. Deviations from the published code: IterStop follows the paper's Algorithm 1 (``iteration.IterStop``).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from iregzoo.fields import compose, resize, warp
from iregzoo.iteration import Controller, FixedIterations, IterStop, refine
from iregzoo.registration import Registration


def conv_block(channels_in: int, channels_out: int) -> nn.Sequential:
    """Conv3d 3×3×3 and LeakyReLU(0.1)."""
    return nn.Sequential(nn.Conv3d(channels_in, channels_out, 3, padding=1), nn.LeakyReLU(0.1))


class ResBlock(nn.Module):
    """LeakyReLU(conv(x) + x), (B, C, *shape) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, 3, padding=1)
        self.activation = nn.LeakyReLU(0.1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(self.conv(x) + x)
        return out


class Encoder(nn.Module):
    """Feature pyramid of one image: (B, 1, *shape) to levels at 1, 1/2, 1/4, 1/8 of the shape."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            conv_block(before, after) for before, after in zip((1, *channels), channels, strict=False)
        )
        self.pool = nn.AvgPool3d(2)

    def forward(self, image: Tensor) -> list[Tensor]:
        features: list[Tensor] = []
        for block in self.blocks:
            image = block(self.pool(features[-1]) if features else image)
            features.append(image)
        return features


class FlowEstimator(nn.Sequential):
    """Residual flow estimator f: concatenated features (B, 2C, *shape) to a displacement (B, 3, *shape)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(
            conv_block(2 * channels, width),
            ResBlock(width),
            ResBlock(width),
            nn.Conv3d(width, width // 2, 3, padding=1),
            nn.Conv3d(width // 2, 3, 3, padding=1),
        )


class IIRPNet(nn.Module):
    """RP-Net with a controller of its iterations.

    Args:
        channels: of the encoder's levels, full resolution first.
        widths: of the flow estimators, full resolution first.
        controller: used when not training; ``FixedIterations()`` is RP-Net. Training always does one pass a level.
    """

    def __init__(
        self,
        *,
        channels: Sequence[int] = (8, 16, 32, 32),
        widths: Sequence[int] = (16, 32, 32, 32),
        controller: Controller | None = None,
    ) -> None:
        super().__init__()
        if len(channels) != len(widths):
            raise ValueError(f"{len(channels)} channels and {len(widths)} widths; expected one of each per level")
        self.controller: Controller = IterStop() if controller is None else controller
        self.stride = 2 ** (len(channels) - 1)
        self.encoder = Encoder(channels)
        self.estimators = nn.ModuleList(map(FlowEstimator, channels, widths))

    def forward(self, moving: Tensor, fixed: Tensor, controller: Controller | None = None) -> Registration:
        """Register (B, 1, D, H, W) images in [0, 1] of a shape divisible by ``stride``; see ``Registration``."""
        check_pair(moving, fixed, self.stride)
        if controller is None:
            controller = FixedIterations() if self.training else self.controller
        # One pass over both images: the encoder is shared.
        features = [level.chunk(2) for level in self.encoder(torch.cat((moving, fixed)))]

        def similarity(displacement: Tensor) -> Tensor:
            return controller.score(warp(moving, resize(displacement, moving.shape[2:])), fixed)

        displacement = moving.new_zeros(
            moving.shape[0], 3, *features[-1][0].shape[2:], dtype=torch.promote_types(moving.dtype, torch.float32)
        )
        pyramid: list[Tensor] = []
        iterations: list[Tensor] = []
        scores: list[Tensor] = []
        for level in reversed(range(len(features))):
            moving_features, fixed_features = features[level]

            def propose(
                current: Tensor,
                estimator: nn.Module = self.estimators[level],
                moving_features: Tensor = moving_features,
                fixed_features: Tensor = fixed_features,
            ) -> Tensor:
                warped = warp(moving_features, current)
                residual = estimator(torch.cat((warped, fixed_features), dim=1))
                return compose(current, residual.to(current.dtype), padding="zeros")

            coarsest = not pyramid
            if not coarsest:
                displacement = resize(displacement, fixed_features.shape[2:])
            displacement, count, history = refine(displacement, propose, similarity, controller, coarsest=coarsest)
            pyramid.append(displacement)
            iterations.append(count)
            scores.append(history)
        return Registration(displacement, None, tuple(pyramid), tuple(iterations), tuple(scores))


def check_pair(moving: Tensor, fixed: Tensor, stride: int) -> None:
    """Raise ValueError unless both are (B, 1, D, H, W) of one shape that ``stride`` divides."""
    if moving.shape != fixed.shape:
        raise ValueError(f"moving {tuple(moving.shape)} and fixed {tuple(fixed.shape)} differ in shape")
    if moving.dim() != 5 or moving.shape[1] != 1 or any(size % stride or size == 0 for size in moving.shape[2:]):
        raise ValueError(
            f"images have shape {tuple(moving.shape)}; expected (B, 1, D, H, W) with D, H, W multiples of {stride}"
        )
