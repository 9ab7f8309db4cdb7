"""Any contrast to one: a U-net that gives each structure of a brain its own brightness, whatever the scan's contrast.

A method whose weights come with it (``canonical`` on their card) registers what it makes of both scans, so that a T1
and a T2 look alike to the method. It is trained on images synthesised from label maps with random contrast (Hoffmann et
al., TMI 2021; Billot et al., MedIA 2023), to tell every voxel's class, which are the labels of
one brightness below; what it gives is the brightness that it expects. None of the five
papers has it: it is this project's way of bringing one training to every contrast and to all of its methods.
"""

import itertools
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iregzoo.networks._blocks import halve, join
from iregzoo.networks._convolution import Conv3d, ConvChain
from iregzoo.networks._norm import InstanceNorm

# Brightness by FreeSurfer label, left and right alike; all other labels are 0. Structures that touch differ.
BRIGHTNESS = {
    **dict.fromkeys((4, 43, 5, 44, 14, 15), 0.10),  # ventricles
    24: 0.20,  # cerebrospinal fluid
    **dict.fromkeys((17, 53), 0.30),  # hippocampus
    **dict.fromkeys((26, 58), 0.35),  # accumbens area
    **dict.fromkeys((8, 47), 0.40),  # cerebellum cortex
    **dict.fromkeys((3, 42, 28, 60), 0.45),  # cerebral cortex, ventral DC
    **dict.fromkeys((11, 50), 0.50),  # caudate
    **dict.fromkeys((12, 51, 18, 54), 0.60),  # putamen, amygdala
    **dict.fromkeys((10, 49), 0.70),  # thalamus
    16: 0.75,  # brain-stem
    **dict.fromkeys((13, 52), 0.80),  # pallidum
    **dict.fromkeys((7, 46), 0.90),  # cerebellum white matter
    **dict.fromkeys((2, 41), 1.00),  # cerebral white matter
}
LEVELS = tuple(sorted({0.0, *BRIGHTNESS.values()}))  # the brightness of each class, that of all other labels first
CORNERS = tuple(itertools.product(range(2), repeat=3))  # of a block of 2×2×2 voxels


def at_corner(volume: Tensor, corner: int) -> Tensor:
    """The voxels (…, D / 2, H / 2, W / 2) at one corner of the blocks of (…, D, H, W), a view."""
    i, j, k = CORNERS[corner]
    return volume[..., i::2, j::2, k::2]


def canonical_class(labels: Tensor) -> Tensor:
    """The class of each voxel of a map with FreeSurfer labels, whole numbers from 0 that index ``LEVELS``."""
    table = torch.zeros(max(BRIGHTNESS) + 2, dtype=torch.long, device=labels.device)
    table[list(BRIGHTNESS)] = torch.tensor([LEVELS.index(level) for level in BRIGHTNESS.values()], device=labels.device)
    return table[labels.long().clamp(-1, max(BRIGHTNESS) + 1)]  # the last entry, which -1 reads, too, is 0


def canonical_image(labels: Tensor) -> Tensor:
    """The image that ``CanonicalNet`` is to make of a scan with these FreeSurfer labels, of their shape, in [0, 1]."""
    return torch.tensor(LEVELS, device=labels.device)[canonical_class(labels)]


class Block(ConvChain):
    """Two times Conv3d 3×3×3, instance norm and LeakyReLU(0.1): (B, channels_in, *shape) to (B, channels, *shape)."""

    def __init__(self, channels_in: int, channels: int) -> None:
        layers: list[nn.Module] = []
        for count in (channels_in, channels):
            layers += [
                Conv3d(count, channels, 3, padding=1),
                InstanceNorm(),
                nn.LeakyReLU(0.1, inplace=True),
            ]
        super().__init__(*layers)


class CanonicalNet(nn.Module):
    """(B, C, *shape) in [0, 1] to the same, each channel by itself; a U-net on blocks of 2×2×2 voxels.

    The voxels of a block are channels, so that the widest layers are an eighth as large.

    Args:
        channels: of the levels, the finest first.
    """

    def __init__(self, channels: tuple[int, ...] = (32, 64, 96, 128)) -> None:
        super().__init__()
        self.stride = 2 ** len(channels)
        self.down = nn.ModuleList(map(Block, (len(CORNERS), *channels), channels))
        self.up = nn.ModuleList(Block(fine + coarse, fine) for fine, coarse in pairwise(channels))
        self.heads = nn.ModuleList(Conv3d(channels[0], len(LEVELS), 1) for _ in CORNERS)

    def features(self, images: Tensor) -> Tensor:
        """Images (B, C, *shape) of a shape divisible by ``stride`` to (B·C, channels, *shape / 2).

        Raises:
            ValueError: for another shape.
        """
        if any(size % self.stride or not size for size in images.shape[2:]):
            raise ValueError(
                f"images have shape {tuple(images.shape)}; expected (B, C, D, H, W) with D, H, W multiples of "
                f"{self.stride}"
            )
        flat = images.flatten(0, 1)
        x = torch.stack([at_corner(flat, corner) for corner in range(len(CORNERS))], dim=1)
        skips: list[Tensor] = []
        for block in self.down:
            x = block(halve(x) if skips else x)
            skips.append(x)
        for block, skip in zip(reversed(self.up), reversed(skips[:-1]), strict=True):
            x = block(join(skip, F.interpolate(x, scale_factor=2.0)))
        return x

    def logits(self, features: Tensor, corner: int) -> Tensor:
        """Of the classes (B·C, classes, *shape / 2) of the voxels at one corner of each block."""
        logits: Tensor = self.heads[corner](features)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def certainty(self, images: Tensor) -> Tensor:
        """How sure it is of the structures in images (B, C, *shape): (B·C,), in [0, 1].

        The mean probability of the classes, over the voxels whose likeliest is a structure; 0 where there is none.

        Raises:
            ValueError: for a shape that ``stride`` does not divide.
        """
        features = self.features(images)
        total = count = features.new_zeros(len(features), dtype=torch.float32)
        for corner in range(len(CORNERS)):
            greatest, classes = self.logits(features, corner).softmax(1).max(1)
            structure = classes > 0
            total = total + (greatest * structure).flatten(1).sum(1)
            count = count + structure.flatten(1).sum(1)
        return total / count.clamp(min=1)

    def forward(self, images: Tensor) -> Tensor:
        """The brightness expected of each voxel, (B, C, *shape).

        Raises:
            ValueError: for a shape that ``stride`` does not divide.
        """
        features = self.features(images)
        made = images.new_empty(images.shape, dtype=torch.promote_types(images.dtype, torch.float32))
        for corner in range(len(CORNERS)):
            logits = self.logits(features, corner)
            levels = logits.new_tensor(LEVELS).view(-1, 1, 1, 1)
            expected = (logits.softmax(1) * levels).sum(1)
            at_corner(made, corner).copy_(expected.view(*images.shape[:2], *expected.shape[1:]))
        return made
