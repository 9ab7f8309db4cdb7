"""Training losses: regularity of a field, consistency of two, overlap of labels, and their named sum.

Every function gives one number per pair, (B,), of fields in voxels (B, N, *shape).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from iregzoo.fields import check_displacement, compose, jacobian, jacobian_determinant, warp
from iregzoo.registration import Registration
from iregzoo.similarity import local_ncc


def diffusion(displacement: Tensor) -> Tensor:
    """Mean squared forward difference over voxels, components and axes: (B,), in voxel² per voxel².

    Equation (4) of IIRP-Net as a mean, the form in which its weight of 1 is meant (Balakrishnan et al., TMI 2019).
    """
    axes = check_displacement(displacement)
    terms = [displacement.diff(dim=2 + axis).square().flatten(1).mean(1) for axis in range(axes)]
    return torch.stack(terms).mean(0)


def folding(displacement: Tensor, *, margin: float = 0.0) -> Tensor:
    """Mean of relu(margin − det J): zero for a field without folds (AD-RegNet's Jacobian term, where margin is 0).

    A positive margin also counts voxels that are squashed to less than that share of their volume.
    """
    return F.relu(margin - jacobian_determinant(displacement)).flatten(1).mean(1)


def inverse_consistency(forward: Tensor, backward: Tensor) -> Tensor:
    """Mean squared length of forward ∘ backward − id, in voxel²."""
    return compose(forward, backward).square().sum(1).flatten(1).mean(1)


def gradicon(forward: Tensor, backward: Tensor) -> Tensor:
    """Gradient inverse consistency ‖∇(φ_AB ∘ φ_BA) − I‖² (Tian et al., CVPR 2023), mean over voxels."""
    composed = compose(forward, backward)
    axes = composed.shape[1]
    unit = torch.eye(axes, device=composed.device, dtype=composed.dtype).view(1, axes, axes, *[1] * axes)
    return (jacobian(composed) - unit).square().sum((1, 2)).flatten(1).mean(1)


def orthogonality(tokens: Tensor) -> Tensor:
    """Mean squared difference of the tokens' Gram matrix from the identity (PAN, equation 6).

    Args:
        tokens: (B, S, T, C) vectors, normalised here to length one: S heads of T tokens of C channels. The Gram matrix
            is C × C, over the tokens.
    """
    columns = F.normalize(tokens, dim=2)
    gram = columns.transpose(2, 3) @ columns
    unit = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    return (gram - unit).square().flatten(1).mean(1)


def soft_dice(first: Tensor, second: Tensor, *, eps: float = 1e-5) -> Tensor:
    """One minus the mean Dice of soft label maps (B, L, *shape) in [0, 1], over the labels that either holds."""
    a, b = first.flatten(2), second.flatten(2)
    size = (a + b).sum(2)
    present = size > eps
    dice = 2 * (a * b).sum(2) / size.clamp_min(eps)
    return 1 - (dice * present).sum(1) / present.sum(1).clamp_min(1)


def one_hot(labels: Tensor, values: tuple[int, ...]) -> Tensor:
    """Label map (B, 1, *shape) to one channel per value: float (B, L, *shape)."""
    wanted = labels.new_tensor(values).view(1, -1, *[1] * (labels.dim() - 2))
    return (labels == wanted).float()


@dataclass(frozen=True)
class RegistrationLoss:
    """Similarity + weighted regularity + weighted label overlap, each term under its own name.

    The default is IIRP-Net's equation (5): local NCC of window 9 and diffusion of weight 1, no labels.

    Args:
        window: of the local NCC, in voxels.
        similarity: weight of the negative local NCC.
        smoothness: weight λ of the diffusion term.
        folding: weight of the folding term.
        margin: the Jacobian determinant below which a voxel counts in it.
        overlap: weight of the soft Dice term; needs label maps.
        labels: the label values that the Dice term compares.
    """

    window: int = 9
    similarity: float = 1.0
    smoothness: float = 1.0
    folding: float = 0.0
    margin: float = 0.0
    overlap: float = 0.0
    labels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        if self.overlap and not self.labels:
            raise ValueError(f"overlap={self.overlap} needs label values; give labels=[1, 2, …]")

    def __call__(
        self,
        registration: Registration,
        moving: Tensor,
        fixed: Tensor,
        moving_labels: Tensor | None = None,
        fixed_labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Weighted terms, scalars averaged over the batch, and their sum as ``loss``.

        Args:
            registration: of the pair.
            moving, fixed: images (B, 1, *shape).
            moving_labels, fixed_labels: integer maps (B, 1, *shape), wanted where ``overlap`` is not zero.
        """
        u = registration.displacement
        terms = {
            "similarity": -self.similarity * local_ncc(fixed, warp(moving, u), window=self.window).mean(),
            "smoothness": self.smoothness * diffusion(u).mean(),
        }
        if self.folding:
            terms["folding"] = self.folding * folding(u, margin=self.margin).mean()
        if self.overlap:
            if moving_labels is None or fixed_labels is None:
                raise ValueError("the overlap term needs the label maps of both images")
            soft = warp(one_hot(moving_labels, self.labels), u)
            terms["overlap"] = self.overlap * soft_dice(soft, one_hot(fixed_labels, self.labels)).mean()
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}
