"""The loss of a method that registers both ways over several levels: SM-GICNet's (Bai et al., MIDL 2025, 3.4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from iregzoo.errors import InputError
from iregzoo.fields import warp
from iregzoo.losses import check_windows, diffusion, folding, gradicon, inverse_consistency
from iregzoo.overlap import overlap_loss
from iregzoo.registration import Registration
from iregzoo.similarity import local_ncc, mse


@dataclass(frozen=True)
class SymmetricLoss:
    """Similarity and smoothness of every level and consistency of both ways, each term under its own name.

    Every term is the average of both ways. A level's images are the images averaged over its voxels, its smoothness is
    in its own voxels. Where a registration has fewer levels than there are weights, as in progressive training, the
    windows are those of the coarsest and the weights those of the finest: its last level always counts fully.

    The paper prints λ and neither α_i nor β_i: here each coarser level counts half, and smoothness as in IIRP-Net's
    equation (5). Section 3.3 demands gradient inverse consistency, which the sum in 3.4 does
    not name: its weight of 1 is ours. (3) is read as the mean squared length, three times the mean over components.

    Args:
        windows: of the local NCC, in voxels of the level, coarse to fine; one for each level.
        similarity: weights α_i of the negative local NCC, coarse to fine.
        smoothness: weights β_i of the diffusion term, coarse to fine.
        symmetric: weight λ_s of the mean squared difference of both warped images, (2).
        inverse: weight λ_i of the mean squared length of φ_AB ∘ φ_AB⁻¹ − id in voxels, (3).
        multilevel: weight λ_m of the mean squared difference of each level's warped image w_i from its mean with that
            of the level before, (4).
        gradicon: weight of gradient inverse consistency of φ_AB and φ_BA, at the last level.
        folding: weight of the folding term.
        margin: the Jacobian determinant below which a voxel counts in it.
        overlap: weight of the soft Dice term; needs label maps.
        labels: the label values that the Dice term compares.

    Raises:
        InputError: where the windows and weights are no lists of one number of levels, for an even window, and where
            overlap has no labels.
    """

    windows: tuple[int, ...] = (3, 5, 7, 9)
    similarity: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    smoothness: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    symmetric: float = 0.001
    inverse: float = 0.01
    multilevel: float = 0.0005
    gradicon: float = 1.0
    folding: float = 0.0
    margin: float = 0.0
    overlap: float = 0.0
    labels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("windows", "similarity", "smoothness", "labels"):
            value = getattr(self, name)
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise InputError(f"{name} {value!r}: give a list, of one number per level or label")
            object.__setattr__(self, name, tuple(value))
        check_windows(self.windows, "windows")
        if not len(self.windows) == len(self.similarity) == len(self.smoothness):
            raise InputError(
                f"windows {[*self.windows]}, similarity {[*self.similarity]}, smoothness {[*self.smoothness]}: give "
                "one of each per level"
            )
        if self.overlap and not self.labels:
            raise InputError(f"overlap {self.overlap} needs label values; give labels, such as [1, 2]")

    def __call__(
        self,
        registration: Registration,
        moving: Tensor,
        fixed: Tensor,
        moving_labels: Tensor | None = None,
        fixed_labels: Tensor | None = None,
        moving_points: Tensor | None = None,
        fixed_points: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Weighted terms, scalars averaged over the batch, and their sum as ``loss``.

        Args:
            registration: of the pair, with its ``opposite``, and both with ``inverse`` and ``pyramid``.
            moving, fixed: images (B, 1, *shape).
            moving_labels, fixed_labels: integer maps (B, 1, *shape), wanted where ``overlap`` is not zero.
            moving_points, fixed_points: landmarks of a data set that has them, at which the paper's loss does not look.

        Raises:
            ValueError: where the registration lacks one of these, has more levels than there are weights, or labels
                are missing.
        """
        displacement, inverse, pyramid = _both_ways(registration)
        count = len(pyramid)
        if not 1 <= count <= len(self.windows):
            raise ValueError(
                f"the registration has {count} levels; windows={self.windows} are for 1 to {len(self.windows)}"
            )
        images = [F.interpolate(torch.cat((moving, fixed)), size=field.shape[2:], mode="area") for field in pyramid]
        warped = [warp(image, field) for image, field in zip(images, pyramid, strict=True)]
        scores = [
            local_ncc(_swap(image), looks, window=window).mean()
            for image, looks, window in zip(images, warped, self.windows, strict=False)
        ]
        terms = {
            "similarity": -_weighted(self.similarity, scores),
            "smoothness": _weighted(self.smoothness, [diffusion(field).mean() for field in pyramid]),
            # As printed, though of registered images one looks like the fixed and the other like the moving.
            "symmetric": self.symmetric * mse(*warped[-1].chunk(2)).mean(),
            "inverse": self.inverse * inverse_consistency(displacement, inverse).mean(),
            "multilevel": self.multilevel * _multilevel(warped),
            "gradicon": self.gradicon * gradicon(pyramid[-1], _swap(pyramid[-1])).mean(),
        }
        if self.folding:
            terms["folding"] = self.folding * folding(displacement, margin=self.margin).mean()
        if self.overlap:
            there, back = displacement.chunk(2)
            overlaps = [
                overlap_loss(there, moving_labels, fixed_labels, self.labels),
                overlap_loss(back, fixed_labels, moving_labels, self.labels),
            ]
            terms["overlap"] = self.overlap * torch.cat(overlaps).mean()
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}


def _both_ways(registration: Registration) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Displacement, inverse and pyramid of both ways as one batch (2B, …): first there, then back."""
    opposite = registration.opposite
    if opposite is None or registration.inverse is None or opposite.inverse is None:
        raise ValueError(
            "the symmetric loss needs the registration of fixed to moving as opposite, and the inverse of both; "
            "SMGICNet provides them in training or with both=True"
        )
    pyramid = [torch.cat(levels) for levels in zip(registration.pyramid, opposite.pyramid, strict=True)]
    displacement = torch.cat((registration.displacement, opposite.displacement))
    return displacement, torch.cat((registration.inverse, opposite.inverse)), pyramid


def _swap(both: Tensor) -> Tensor:
    """The other way's of every pair: halves of the batch exchanged."""
    return both.roll(both.shape[0] // 2, 0)


def _weighted(weights: Sequence[float], levels: Sequence[Tensor]) -> Tensor:
    """Sum over the levels, the last of which has the last weight."""
    pairs = zip(reversed(weights), reversed(levels), strict=False)
    return torch.stack([weight * level for weight, level in pairs]).sum()


def _multilevel(warped: Sequence[Tensor]) -> Tensor:
    """Equation (4) over the levels after the first: w_i − (w_i + w_(i-1)) / 2 is half their difference.

    The paper does not define w_i; it is read as the warped image of level i, and w_(i-1) is resized to its grid. Voxels
    that are means of eight lie between these: unlike a field's, their corners are no corners of the finer grid.
    """
    total = warped[0].new_zeros(())
    for coarse, fine in pairwise(warped):
        before = F.interpolate(coarse, size=fine.shape[2:], mode="trilinear")
        total = total + mse(fine, before).mean() / 4
    return total
