"""Any contrast to one: a U-net that gives each structure of a brain its own brightness, whatever the scan's contrast.

A method whose weights come with it (``canonical`` on their card) registers what it makes of both scans, so that a T1
and a T2 look alike to the method. It is trained on images synthesised from label maps with random contrast (Hoffmann et
al., TMI 2021; Billot et al., MedIA 2023), to give back the brightness below of every voxel's label. None of the five
papers has it: it is this project's way of bringing one training to every contrast and to all of its methods.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def canonical_image(labels: Tensor) -> Tensor:
    """The image that ``CanonicalNet`` is to make of a scan with these FreeSurfer labels, of their shape, in [0, 1]."""
    table = torch.zeros(max(BRIGHTNESS) + 2, device=labels.device)
    table[list(BRIGHTNESS)] = torch.tensor(list(BRIGHTNESS.values()), device=labels.device)
    return table[labels.long().clamp(-1, max(BRIGHTNESS) + 1)]  # the last entry, which -1 reads, too, is 0


class Block(nn.Sequential):
    """Two times Conv3d 3×3×3, instance norm and LeakyReLU(0.1): (B, channels_in, *shape) to (B, channels, *shape)."""

    def __init__(self, channels_in: int, channels: int) -> None:
        layers: list[nn.Module] = []
        for count in (channels_in, channels):
            layers += [
                nn.Conv3d(count, channels, 3, padding=1),
                nn.InstanceNorm3d(channels),
                nn.LeakyReLU(0.1, inplace=True),
            ]
        super().__init__(*layers)


class CanonicalNet(nn.Module):
    """(B, C, *shape) in [0, 1] to the same, each channel by itself; a U-net of four levels.

    Args:
        channels: of the levels, full resolution first.
    """

    def __init__(self, channels: tuple[int, ...] = (8, 16, 32, 64)) -> None:
        super().__init__()
        self.stride = 2 ** (len(channels) - 1)
        self.down = nn.ModuleList(map(Block, (1, *channels), channels))
        self.up = nn.ModuleList(Block(fine + coarse, fine) for fine, coarse in pairwise(channels))
        self.head = nn.Conv3d(channels[0], 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, *shape) of a shape divisible by ``stride``; clamped to [0, 1] when not training.

        Raises:
            ValueError: for another shape.
        """
        if any(size % self.stride or not size for size in images.shape[2:]):
            raise ValueError(
                f"images have shape {tuple(images.shape)}; expected (B, C, D, H, W) with D, H, W multiples of "
                f"{self.stride}"
            )
        x = images.flatten(0, 1)[:, None]
        skips: list[Tensor] = []
        for block in self.down:
            x = block(F.avg_pool3d(x, 2) if skips else x)
            skips.append(x)
        for block, skip in zip(reversed(self.up), reversed(skips[:-1]), strict=True):
            x = block(torch.cat((skip, F.interpolate(x, scale_factor=2.0, mode="trilinear")), dim=1))
        made: Tensor = self.head(x)
        made = made.to(torch.promote_types(made.dtype, torch.float32)).view_as(images)
        return made if self.training else made.clamp(0, 1)  # a clamp would stop the gradient
