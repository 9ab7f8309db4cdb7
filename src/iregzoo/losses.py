"""Training losses: regularity of a field, consistency of two, overlap of labels, and their named sum.

Every function gives one number per pair, (B,), of fields in voxels (B, N, *shape).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from iregzoo.errors import InputError
from iregzoo.fields import check_displacement, compose, sample, warp
from iregzoo.flags import is_count
from iregzoo.jacobian import jacobian, jacobian_determinant, jacobian_determinant_at
from iregzoo.overlap import overlap_loss
from iregzoo.precision import exact_dtype
from iregzoo.registration import Registration
from iregzoo.similarity import local_ncc, ncc, ssim


def diffusion(displacement: Tensor) -> Tensor:
    """Mean squared forward difference over voxels, components and axes: (B,), in voxel² per voxel².

    An axis of one voxel has no differences and counts as 0.

    Equation (4) of IIRP-Net as a mean, the form in which its weight of 1 is meant (Balakrishnan et al., TMI 2019).
    """
    check_displacement(displacement)
    mean: Tensor = _Diffusion.apply(displacement)  # type: ignore[no-untyped-call]  # so in torch's stubs
    return mean


class _Diffusion(torch.autograd.Function):
    """With its gradient, which has none itself: twice the difference to each neighbour, over those of that axis."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        terms = [u.diff(dim=axis).square_().flatten(1).mean(1) for axis in range(2, u.dim()) if u.shape[axis] > 1]
        return torch.stack(terms).sum(0) / (u.dim() - 2) if terms else u.new_zeros(len(u))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        axes = u.dim() - 2
        total = torch.zeros_like(u)
        for axis in range(2, u.dim()):
            steps = u.diff(dim=axis)
            scale = 2 / max(1, axes * steps.shape[1:].numel()) * grads[0]
            steps *= scale.view(-1, *[1] * (u.dim() - 1))
            total.narrow(axis, 1, u.shape[axis] - 1).add_(steps)
            total.narrow(axis, 0, u.shape[axis] - 1).sub_(steps)
        return total


def folding(displacement: Tensor, *, margin: float = 0.0) -> Tensor:
    """Mean of relu(margin − det J): zero for a field without folds (AD-RegNet's Jacobian term, where margin is 0).

    A positive margin also counts voxels that are squashed to less than that share of their volume. Only voxels below
    the margin have a gradient, so it is made for them alone.
    """
    with torch.no_grad():
        determinant = jacobian_determinant(displacement)
        places = (~(determinant >= margin)).nonzero()  # with those that are NaN
    below = F.relu(margin - jacobian_determinant_at(displacement, places))
    exact = exact_dtype(below.device)  # these are added one after the other, and there may be millions
    sums = below.new_zeros(len(displacement), dtype=exact).index_add(0, places[:, 0], below.to(exact))
    return (sums / determinant.shape[1:].numel()).to(below.dtype)


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
    """Mean squared difference of the heads' Gram matrix from the identity (PAN, equation 6).

    Args:
        tokens: (B, S, …), of S attention heads; all that a head has is one vector, normalised here to length one.
    """
    flat = tokens.flatten(2)
    # Queries of a network in bfloat16 are that, too; these are long sums.
    heads = F.normalize(flat.to(torch.promote_types(flat.dtype, torch.float32)), dim=2)
    gram = heads @ heads.transpose(1, 2)
    unit = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    return (gram - unit).square().flatten(1).mean(1)


def one_hot(labels: Tensor, values: tuple[int, ...]) -> Tensor:
    """Label map (B, 1, *shape) to one channel per value: float (B, L, *shape)."""
    wanted = labels.new_tensor(values).view(1, -1, *[1] * (labels.dim() - 2))
    return (labels == wanted).float()


def landmark_error(
    displacement: Tensor, fixed_points: Tensor, moving_points: Tensor, spacing: Sequence[float]
) -> Tensor:
    """Mean distance in mm between landmarks after registration: (B,), 0 for a pair without any.

    Equation (19) of AD-RegNet carries the moving image's points to the fixed image's. A field that pulls knows the
    other way: p goes to p + u(p) from the fixed image to the moving one, and the distance is measured there.

    Args:
        displacement: (B, N, *shape) in voxels; beyond the grid it is continued with its border.
        fixed_points, moving_points: (B, K, N) in voxels; a point with NaN in either does not count.
        spacing: size of a voxel along each axis, in mm.

    Raises:
        ValueError: for points or a spacing that do not match the field.
    """
    axes = check_displacement(displacement)
    shape = (displacement.shape[0], fixed_points.shape[-2], axes)
    if fixed_points.shape != shape or moving_points.shape != shape or len(spacing) != axes:
        raise ValueError(
            f"fixed_points {tuple(fixed_points.shape)}, moving_points {tuple(moving_points.shape)} and "
            f"spacing={tuple(spacing)}; expected (B, K, {axes}) twice and {axes} sizes, with the field's B = {shape[0]}"
        )
    given = (fixed_points + moving_points).isfinite().all(2)
    start, goal = (points.where(given[..., None], 0) for points in (fixed_points, moving_points))
    coordinates = start.transpose(1, 2)
    moved = sample(displacement, coordinates.reshape(*coordinates.shape, *[1] * (axes - 1)), padding="border")
    offsets = (start + moved.flatten(2).transpose(1, 2) - goal) * goal.new_tensor(spacing)
    distances: Tensor = torch.linalg.vector_norm(offsets, dim=2) * given
    return distances.sum(1) / given.sum(1).clamp_min(1)


def check_windows(windows: Sequence[int], name: str) -> None:
    """Refuse windows of the local NCC that have no middle.

    Raises:
        InputError: naming the setting.
    """
    for window in windows:
        if not is_count(window) or window % 2 == 0:
            raise InputError(f"{name} {window!r}: give an odd number of voxels")


@dataclass(frozen=True)
class RegistrationLoss:
    """Similarity + weighted regularity + weighted overlap of labels and landmarks, each term under its own name.

    The default is IIRP-Net's equation (5): local NCC of window 9 and diffusion of weight 1, no labels.

    Args:
        window: of the local NCC, in voxels.
        metric: ``local_ncc``, whose term is the negative mean of its squares, or the global ``ncc``, whose term is
            1 − NCC (AD-RegNet, equations 17 and 20).
        similarity: weight of the metric's term; 0 where images of any contrast are trained on labels alone.
        ssim: weight of 1 − SSIM (AD-RegNet, equations 17 and 22).
        smoothness: weight λ of the diffusion term.
        folding: weight of the folding term.
        margin: the Jacobian determinant below which a voxel counts in it.
        orthogonality: weight β of the orthogonality term (PAN); needs a network that gives tokens while training.
        overlap: weight of the soft Dice term; needs label maps.
        labels: the label values that the Dice term compares.
        landmarks: weight of the landmarks' distance in mm; the term is left out where a batch has none.
        spacing: size of the images' voxels in mm, for that distance.

    Raises:
        InputError: for an even window, a metric of another name, an overlap without labels, and sizes that are not
            positive.
    """

    window: int = 9
    metric: Literal["local_ncc", "ncc"] = "local_ncc"
    similarity: float = 1.0
    ssim: float = 0.0
    smoothness: float = 1.0
    folding: float = 0.0
    margin: float = 0.0
    orthogonality: float = 0.0
    overlap: float = 0.0
    labels: tuple[int, ...] = ()
    landmarks: float = 0.0
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        object.__setattr__(self, "spacing", tuple(self.spacing))
        check_windows((self.window,), "window")
        if self.metric not in ("local_ncc", "ncc"):
            raise InputError(f"metric {self.metric!r}: choose local_ncc or ncc")
        if not all(size > 0 for size in self.spacing):
            raise InputError(f"spacing {[*self.spacing]}: give positive sizes in mm")
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
            registration: of the pair.
            moving, fixed: images (B, 1, *shape).
            moving_labels, fixed_labels: integer maps (B, 1, *shape), wanted where ``overlap`` is not zero.
            moving_points, fixed_points: corresponding landmarks (B, K, 3) in voxels, both or neither.
        """
        u = registration.displacement
        compared = self._similarities(fixed, warp(moving, u)) if self.similarity or self.ssim else {}
        terms = {**compared, "smoothness": self.smoothness * diffusion(u).mean()}
        if self.folding:
            terms["folding"] = self.folding * folding(u, margin=self.margin).mean()
        if self.orthogonality:
            terms["orthogonality"] = self.orthogonality * _orthogonality_of_heads(registration)
        if self.overlap:
            terms["overlap"] = self.overlap * overlap_loss(u, moving_labels, fixed_labels, self.labels).mean()
        if self.landmarks and not (moving_points is None and fixed_points is None):
            if moving_points is None or fixed_points is None:
                raise ValueError("the landmark term needs the points of both images")
            terms["landmarks"] = self.landmarks * landmark_error(u, fixed_points, moving_points, self.spacing).mean()
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    def _similarities(self, fixed: Tensor, warped: Tensor) -> dict[str, Tensor]:
        terms = {}
        if self.similarity:
            if self.metric == "ncc":
                term = 1 - ncc(fixed, warped).mean()
            else:
                term = -local_ncc(fixed, warped, window=self.window).mean()
            terms["similarity"] = self.similarity * term
        if self.ssim:
            terms["ssim"] = self.ssim * (1 - ssim(fixed, warped).mean())
        return terms


def _orthogonality_of_heads(registration: Registration) -> Tensor:
    """Mean over the batch and over all tokens that the network gave."""
    tokens = registration.auxiliary.get("tokens", ())
    if not tokens:
        raise ValueError(
            "the orthogonality term needs a registration with tokens, but this one has none because its network is not "
            "in training mode or has no attention heads"
        )
    return torch.stack([orthogonality(each).mean() for each in tokens]).mean()
