"""Images synthesised from label maps, of random contrast or with the statistics of T1 scans.

After Hoffmann et al. (SynthMorph, TMI 2021) and Billot et al. (SynthSeg, MedIA 2023): a network that learns from images
whose every tissue has another brightness each time registers scans of any contrast.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

Random = torch.Generator
BRIGHTEST = 255.0  # the scale of a tissue's statistics
DARK = 10.0
PERCENTILES = (0.005, 0.995)
SAMPLED = 50_000  # voxels are enough for two percentiles


@dataclass(frozen=True)
class Tissue:
    """What a label looks like in T1 scans, brightness from 0 to 255.

    Attributes:
        kind: labels of one kind look alike in an image, as left and right do.
        mean, mean_sd: brightness, and how it differs between people.
        std, std_sd: spread within one scan, and how that differs.
    """

    kind: int
    mean: float
    mean_sd: float
    std: float
    std_sd: float


@dataclass(frozen=True)
class Look:
    """What of an image is drawn before its voxels are, by label from 0 to the highest.

    Attributes:
        mean, spread: brightness of each label.
        shown: the label that stands for each one, 0 for one that the image lacks.
    """

    mean: Tensor
    spread: Tensor
    shown: Tensor


@dataclass(frozen=True)
class Synthesis:
    """Label map to image: brightness by label, texture, blur, thick slices, bias field and gamma, all random.

    Args:
        tissues: by label; a label without one looks like label 0.
        head: labels outside the brain, which a stripped image lacks.
        cover: labels around the brain, which half of the stripped images lack.
        t1: probability of T1 statistics; other images get a random brightness for each kind of tissue.
        stripped: probability that the brain stands alone.
        noise: largest share of a tissue's spread that one voxel differs from its neighbours (the rest is smooth).
        blur: largest standard deviation of a Gaussian, in voxels.
        bias: largest standard deviation of the logarithm of the bias field.
        gamma: standard deviation of the logarithm of the exponent.
        thick: probability of slices thicker than voxels, up to three times, along one axis.
    """

    tissues: Mapping[int, Tissue]
    head: Sequence[int] = ()
    cover: Sequence[int] = ()
    t1: float = 0.5
    stripped: float = 0.5
    noise: float = 0.7
    blur: float = 0.8
    bias: float = 0.3
    gamma: float = 0.25
    thick: float = 0.15
    highest: int = field(init=False)

    def __post_init__(self) -> None:
        if 0 not in self.tissues:
            raise ValueError(f"tissues of labels {sorted(self.tissues)[:5]}…; expected one for label 0, the background")
        object.__setattr__(self, "highest", max(self.tissues))

    def look(self, random: Random) -> Look:
        """Draw how an image looks."""
        shown = torch.arange(self.highest + 1)
        if _chance(random, self.stripped):
            shown[[*self.head, *(self.cover if _chance(random, 0.5) else ())]] = 0
        return Look(*self._brightness(random), shown)

    def __call__(self, labels: Tensor, random: Random, look: Look | None = None) -> Tensor:
        """Image (1, *shape) in [0, 1] of a label map (1, *shape) of three axes; it draws a look if it gets none."""
        look = self.look(random) if look is None else look
        labels = labels.long()
        labels = look.shown[labels.where((labels >= 0) & (labels <= self.highest), 0)]
        noise = _between(random, 0, self.noise) * _normal(random, labels.shape)
        image = look.mean[labels] + look.spread[labels] * (noise + _smooth_field(labels.shape, 8, random))
        image = blurred(image, _between(random, 0.3, max(self.blur, 0.3)))
        if _chance(random, self.thick):
            image = _thick_slices(image, random)
        image = image * (_between(random, 0, self.bias) * _smooth_field(labels.shape, 4, random)).exp()
        exponent = float((self.gamma * _normal(random, (1,))).exp())
        return _normalised(image).pow(exponent)

    def _brightness(self, random: Random) -> tuple[Tensor, Tensor]:
        """Mean and spread of every label from 0 to the highest."""
        like_t1, dark = _chance(random, self.t1), _chance(random, 0.75)
        means, spreads = torch.zeros(2, self.highest + 1)
        drawn: dict[int, tuple[float, float]] = {}
        for label, tissue in self.tissues.items():
            if tissue.kind not in drawn:
                first, second = _normal(random, (2,)).tolist()
                if like_t1:
                    drawn[tissue.kind] = (tissue.mean + tissue.mean_sd * first, tissue.std + tissue.std_sd * second)
                else:
                    drawn[tissue.kind] = (_between(random, 0, BRIGHTEST), _between(random, 1, BRIGHTEST / 8))
            means[label], spreads[label] = drawn[tissue.kind]
        if dark and not like_t1:
            means[0], spreads[0] = _between(random, 0, DARK), _between(random, 0, DARK / 2)
        known = torch.zeros(self.highest + 1, dtype=torch.bool)
        known[list(self.tissues)] = True
        return means.where(known, means[0]).clamp_min(0), spreads.where(known, spreads[0]).clamp_min(0)


def blurred(image: Tensor, sigma: float) -> Tensor:
    """Gaussian smoothing of (1, *shape) of three axes, standard deviation in voxels, the border continued."""
    reach = max(1, round(3 * sigma))
    offsets = torch.arange(-reach, reach + 1, dtype=image.dtype)
    kernel = (-0.5 * (offsets / sigma) ** 2).exp()
    kernel = kernel / kernel.sum()
    for axis in range(3):
        size = [1, 1, 1]
        size[axis] = len(kernel)
        pad = [0] * 6
        pad[4 - 2 * axis] = pad[5 - 2 * axis] = reach
        padded = F.pad(image[None], pad, mode="replicate")
        image = F.conv3d(padded, kernel.view(1, 1, *size))[0]
    return image


def _smooth_field(shape: Sequence[int], knots: int, random: Random) -> Tensor:
    """Normal numbers on a few knots an axis, linear between them: (1, *shape)."""
    coarse = _normal(random, (1, 1, knots, knots, knots))
    return F.interpolate(coarse, size=tuple(shape[1:]), mode="trilinear", align_corners=True)[0]


def _thick_slices(image: Tensor, random: Random) -> Tensor:
    """Slices thicker than voxels along one axis, brought back to the grid."""
    axis = int(torch.randint(3, (1,), generator=random))
    shape = list(image.shape[1:])
    fewer = list(shape)
    fewer[axis] = max(1, round(shape[axis] / _between(random, 1, 3)))
    slices = F.interpolate(image[None], size=fewer, mode="area")
    return F.interpolate(slices, size=shape, mode="trilinear", align_corners=False)[0]


def _normalised(image: Tensor) -> Tensor:
    """Intensities from two percentiles to [0, 1], clipped, as a scan's are."""
    flat = image.flatten()
    some = flat[:: max(1, len(flat) // SAMPLED)]
    low, high = torch.quantile(some, some.new_tensor(PERCENTILES)).tolist()
    scaled: Tensor = (image - low) / max(high - low, 1e-6)
    return scaled.clamp(0, 1)


def _normal(random: Random, shape: Sequence[int]) -> Tensor:
    return torch.randn(tuple(shape), generator=random)


def _between(random: Random, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(1, generator=random))


def _chance(random: Random, probability: float) -> bool:
    return float(torch.rand(1, generator=random)) < probability
