"""iPEAR: iterative pyramid estimation with attention and residuals (Wu et al., 2025).

Paper: "iPEAR: Iterative Pyramid Estimation with Attention and Residuals for Deformable Medical Image Registration".
This file is written from the paper.

A pyramid like IIRP-Net's, whose encoder has neighbourhood attention, whose levels decode with a Fused
Attention-Residual Module (FARM), and which is steered by Threshold-Controlled Iteration (``iteration.TCI``).

Readings of the paper, each at its place below: channels and the encoder's attention block are not printed; the slope of
LeakyReLU is IIRP-Net's; SAB pools over channels and ends in a sigmoid.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from iregzoo.attention import neighbourhood_attention
from iregzoo.iteration import TCI, Controller, FixedIterations
from iregzoo.networks._blocks import (
    DisplacementConv,
    Encoder,
    ResBlock,
    check_pair,
    conv_block,
    flow_conv,
    register_pyramid,
    voxel_mean,
)
from iregzoo.networks._convolution import Conv3d, ConvChain, is_plain
from iregzoo.registration import Registration


class NeighbourhoodAttention(nn.Module):
    """x + attention(norm(x)) over the 3×3×3 neighbourhood, (B, C, *shape) to the same.

    The paper names the operator alone. The residual and the norm before it are a transformer's usual ones; there is no
    projection of the result, which meets the printed number of parameters; one head, a choice that the paper leaves
    open. A grid of fewer than 3 voxels along an axis, as a small image has at the coarsest level, is attended to as a
    whole along that axis.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.project = nn.Linear(channels, 3 * channels)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x.movedim(1, -1))
        if is_plain(self.project, nn.Linear):
            # As a product whose result has its channels first, which is how attention reads them.
            weight, bias = self.project.weight, self.project.bias[:, None]
            product = torch.baddbmm(bias, weight.expand(len(x), -1, -1), normed.flatten(1, 3).transpose(1, 2))
            projected = product.view(len(x), len(weight), *x.shape[2:])
        else:
            projected = self.project(normed).movedim(-1, 1)
        query, key, value = projected.chunk(3, dim=1)
        window = [min(3, size) for size in x.shape[2:]]
        return x + neighbourhood_attention(query, key, value, window=window)


def encoder_block(channels_in: int, channels_out: int, attention: bool) -> ConvChain:
    """Convolution and LeakyReLU, and neighbourhood attention in all but the first block."""
    block = conv_block(channels_in, channels_out)
    if attention:
        block.append(NeighbourhoodAttention(channels_out))
    return block


class SqueezeExcitation(nn.Module):
    """SEB: scale each of the channels C by a weight made of all their means, (3) to (5); (B, C, *shape) to the same."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // reduction, bias=False)
        self.activation = nn.LeakyReLU(0.1)
        self.excite = nn.Linear(channels // reduction, channels, bias=False)

    def weigh(self, x: Tensor) -> Tensor:
        """The weight of each channel, (B, C)."""
        weights: Tensor = self.excite(self.activation(self.squeeze(voxel_mean(x)))).sigmoid()
        return weights

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weigh(x)[:, :, None, None, None]


class SpatialAttention(nn.Module):
    """SAB: scale each voxel by a weight made of the channels' mean and maximum around it, (6) and (9).

    Equations (7) and (8) pool over space, as SEB's (3), which would leave nothing spatial. The text ("salient spatial
    regions") and the heat maps of Figure B mean the usual form: pooling over channels, and a sigmoid.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv3d(2, 1, 3, padding=1)

    def pool(self, x: Tensor) -> Tensor:
        """Mean and maximum of the channels, (B, 2, *shape)."""
        return torch.cat((x.sum(1, keepdim=True) / x.shape[1], x.amax(1, keepdim=True)), dim=1)

    def weigh(self, pooled: Tensor) -> Tensor:
        """The weight of each voxel, (B, 1, *shape)."""
        weights: Tensor = self.conv(pooled).sigmoid()
        return weights

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weigh(self.pool(x))


# Numbers of a slab of planes: what a processor's cache holds until they are pooled, and so many that a convolution
# spends little on the planes beside them.
_POOLED, _CONVOLVED = 2**20, 2**23


def _slabs(volume: Tensor, numbers: int) -> list[tuple[int, int]]:
    """First plane and the one after the last of runs of about so many numbers of a volume (1, C, *shape)."""
    depth = volume.shape[2]
    planes = max(1, numbers // volume[:, :, 0].numel())
    return [(start, min(start + planes, depth)) for start in range(0, depth, planes)]


class FARM(nn.Module):
    """Fused Attention-Residual Module: concatenated features (B, 2C, *shape) to a displacement (B, 3, *shape), (12).

    Args:
        channels: C, of one image's features.
        reduction: r of SEB.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(SqueezeExcitation(2 * channels, reduction), SpatialAttention())
        self.residual = nn.Sequential(
            conv_block(2 * channels, channels),
            ResBlock(channels),
            ResBlock(channels),
            Conv3d(channels, channels // 2, 3, padding=1),
        )
        self.flow = flow_conv(2 * channels + channels // 2)

    def forward(self, features: Tensor) -> Tensor:
        held = torch.is_grad_enabled() or features.device.type != "cpu" or len(features) == 0
        if held or not self._is_plain():
            flow: Tensor = self.flow(self.attention(features), self.residual(features))
            return flow
        # One pair after the other: the weights of its channels become the convolution's own.
        return torch.cat([self._flow_of_one(features[i : i + 1]) for i in range(len(features))])

    def _is_plain(self) -> bool:
        """Whether all layers are what they were made as: without hooks, and none replaced, as in an ablation."""
        kinds = (SqueezeExcitation, SpatialAttention)
        layers = list(self.attention)
        return (
            is_plain(self.flow, DisplacementConv)
            and is_plain(self.attention, nn.Sequential)
            and len(layers) == len(kinds)
            and all(is_plain(layer, kind) for layer, kind in zip(layers, kinds, strict=True))
        )

    def _flow_of_one(self, features: Tensor) -> Tensor:
        """(1, 2C, *shape) to (1, 3, *shape). The attended features are made a few planes at a time and never held."""
        squeeze, spatial = self.attention
        assert isinstance(squeeze, SqueezeExcitation)
        assert isinstance(spatial, SpatialAttention)
        channels = squeeze.weigh(features)
        # Pooled in float32 or better; the weights of the channels reach the result as a scale of the convolution's.
        scale = channels.to(torch.promote_types(channels.dtype, torch.float32))[:, :, None, None, None]
        slabs = _slabs(features, _POOLED)
        pooled = torch.cat([spatial.pool(features[:, :, start:stop] * scale) for start, stop in slabs], dim=2)
        voxels = spatial.weigh(pooled.to(features.dtype))
        flow: Tensor = self.flow.share(self.residual(features), features.shape[1], bias=True)
        for start, stop in _slabs(features, _CONVOLVED):
            near = slice(max(0, start - 1), stop + 1)  # with the planes around it, which a convolution looks at
            share = self.flow.share(features[:, :, near] * voxels[:, :, near], scale=channels[0])
            flow[:, :, start:stop] += share[:, :, start - near.start : stop - near.start]
        return flow[:, :3]


class IPEARNet(nn.Module):
    """iPEAR's network with a controller of its iterations.

    Args:
        channels: of the levels, full resolution first. The paper prints none; these meet its 508.7K parameters.
        reduction: of the channels in each squeeze-and-excitation block.
        controller: used when not training. Training always does one pass a level.
    """

    def __init__(
        self,
        *,
        channels: Sequence[int] = (16, 32, 32, 32),
        reduction: int = 16,
        controller: Controller | None = None,
    ) -> None:
        super().__init__()
        if any(2 * count < reduction or count < 2 for count in channels):
            raise ValueError(
                f"channels={tuple(channels)}; expected at least 2 and at least half of reduction={reduction}"
            )
        self.controller: Controller = TCI() if controller is None else controller
        self.stride = 2 ** (len(channels) - 1)
        attention = [level > 0 for level in range(len(channels))]
        self.encoder = Encoder(map(encoder_block, (1, *channels), channels, attention))
        self.estimators = nn.ModuleList(FARM(count, reduction) for count in channels)

    def forward(self, moving: Tensor, fixed: Tensor, controller: Controller | None = None) -> Registration:
        """Register (B, 1, D, H, W) images in [0, 1] of a shape divisible by ``stride``; see ``Registration``."""
        check_pair(moving, fixed, self.stride)
        if controller is None:
            controller = FixedIterations() if self.training else self.controller
        return register_pyramid(self.encoder, tuple(self.estimators), moving, fixed, controller)
