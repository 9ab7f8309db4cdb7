"""IIRP-Net: iterative inference residual pyramid network (Ma et al., CVPR 2024).

Paper: "IIRP-Net: Iterative Inference Residual Pyramid Network for Enhanced Image Registration".
Published code: https://github.com/Torbjorn1997/IIRP-Net. This file is written from the paper.

RP-Net is the trained network, one pass a level; IIRP-Net is the same weights with each level's flow estimator repeated
under IterStop. Deviations from the published code: IterStop follows the paper's Algorithm 1 (``iteration.IterStop``).
"""

from collections.abc import Sequence

from torch import Tensor, nn

from iregzoo.iteration import Controller, FixedIterations, IterStop
from iregzoo.networks._blocks import DisplacementConv, Encoder, ResBlock, check_pair, conv_block, register_pyramid
from iregzoo.networks._convolution import Conv3d
from iregzoo.registration import Registration


class FlowEstimator(nn.Sequential):
    """Residual flow estimator f: concatenated features (B, 2C, *shape) to a displacement (B, 3, *shape)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(
            conv_block(2 * channels, width),
            ResBlock(width),
            ResBlock(width),
            Conv3d(width, width // 2, 3, padding=1),
            DisplacementConv(width // 2),
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
        self.encoder = Encoder(map(conv_block, (1, *channels), channels))
        self.estimators = nn.ModuleList(map(FlowEstimator, channels, widths))

    def forward(self, moving: Tensor, fixed: Tensor, controller: Controller | None = None) -> Registration:
        """Register (B, 1, D, H, W) images in [0, 1] of a shape divisible by ``stride``; see ``Registration``."""
        check_pair(moving, fixed, self.stride)
        if controller is None:
            controller = FixedIterations() if self.training else self.controller
        return register_pyramid(self.encoder, tuple(self.estimators), moving, fixed, controller)
