"""Finishing a pair by gradient steps: its displacement moves on until the images agree better, without labels.

Instance optimisation (Balakrishnan et al., TMI 2019) in the form of ConvexAdam (Siebert et al., 2021): a correction on
a coarser grid, smoothed there and moved by Adam. Here it adds to what a network gave, whose own smoothness is left to
it, and it may not fold what the network did not.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from iregzoo import losses
from iregzoo.fields import check_displacement, jacobian_determinant, resize, warp
from iregzoo.similarity import box_sum, local_ncc

WINDOW = 5  # of the local NCC, in voxels
COARSER = 2  # voxels of the images per voxel of the correction, along each axis
SMOOTHINGS = 2  # running means over 3 voxels that smooth the correction
DAMPING = 1e-3  # Adam's epsilon, for gradients a voxel: where the images are flat, as in air, nearly nothing moves
HALVINGS = 12  # of the correction around a fold, at most
REACH = 7  # voxels around a fold whose correction is halved


def refine_displacement(
    displacement: Tensor,
    moving: Tensor,
    fixed: Tensor,
    *,
    steps: int,
    rate: float = 0.2,
    window: int = WINDOW,
    smoothness: float = 4.0,
    folding: float = 100.0,
    margin: float = 0.1,
) -> Tensor:
    """Finish a displacement by steps of Adam on local NCC, with the correction's diffusion and a penalty of folds.

    Each pair takes the step with the lowest objective, less what would make more voxels fold than at the start, and
    keeps its start where that is no better or not finite. So no pair gets worse by its own objective.

    Args:
        displacement: (B, N, *shape) in voxels, where the steps begin.
        moving, fixed: images (B, 1, *shape) in [0, 1].
        steps: how many; 0 gives the displacement back.
        rate: Adam's learning rate, about the voxels that a step moves at most.
        window: of the local NCC, in voxels.
        smoothness: weight of the correction's diffusion.
        folding: weight of the mean of relu(margin − det J) of the whole displacement.
        margin: the Jacobian determinant below which a voxel counts in it.

    Returns:
        (B, N, *shape) in voxels, without a gradient.

    Raises:
        ValueError: for fewer than 0 steps, and images that do not lie on the displacement's grid.
    """
    _check(displacement, moving, fixed, steps)
    if steps == 0:
        return displacement.detach()
    # Also inside a caller's inference mode, whose tensors no gradient may pass: the clones are ordinary ones.
    with torch.inference_mode(False), torch.enable_grad():
        start, moving, fixed = (tensor.detach().clone().float() for tensor in (displacement, moving, fixed))

        def objective(correction: Tensor) -> Tensor:
            u = start + correction
            alike = local_ncc(fixed, warp(moving, u), window=window)
            return smoothness * losses.diffusion(correction) + folding * losses.folding(u, margin=margin) - alike

        correction = _without_folds(start, _descend(objective, start, steps, rate))
        better = objective(correction).detach() < objective(torch.zeros_like(start))
        return displacement.detach() + (_each(better, start) * correction).to(displacement.dtype)


def _check(displacement: Tensor, moving: Tensor, fixed: Tensor, steps: int) -> None:
    check_displacement(displacement)
    if steps < 0:
        raise ValueError(f"steps={steps}; expected 0 or more")
    for name, image in (("moving", moving), ("fixed", fixed)):
        if image.shape != (displacement.shape[0], 1, *displacement.shape[2:]):
            raise ValueError(
                f"{name} has shape {tuple(image.shape)}; expected one channel on the grid of the displacement, which "
                f"has shape {tuple(displacement.shape)}"
            )


def _descend(objective: Callable[[Tensor], Tensor], start: Tensor, steps: int, rate: float) -> Tensor:
    """Each pair's correction of the lowest objective, (B, N, *shape) in voxels; zero is among them."""
    shape = start.shape[2:]
    raw = start.new_zeros(*start.shape[:2], *(-(-size // COARSER) for size in shape), requires_grad=True)
    adam = torch.optim.Adam([raw], lr=rate / COARSER, eps=DAMPING)
    best, lowest = torch.zeros_like(raw), start.new_full(start.shape[:1], torch.inf)
    for step in range(steps + 1):
        value = objective(_correction(raw, shape))
        better = value.detach() < lowest  # never where it is not finite
        lowest = torch.where(better, value.detach(), lowest)
        best = torch.where(_each(better, raw), raw.detach(), best)
        if step < steps:
            # As a sum over voxels and pairs, a pair's step depends on neither the size of the grid nor the batch.
            (raw.grad,) = torch.autograd.grad(shape.numel() * value.sum(), raw)
            adam.step()
    return _correction(best, shape).detach()


def _correction(raw: Tensor, shape: torch.Size) -> Tensor:
    """Adam's parameters, in voxels of the coarse grid, smoothed and brought to the images' grid."""
    for _ in range(SMOOTHINGS):
        raw = box_sum(raw, 3) / 3 ** (raw.dim() - 2)
    return resize(raw, shape)


@torch.no_grad()
def _without_folds(start: Tensor, correction: Tensor) -> Tensor:
    """The correction, halved around folds until no more voxels fold than without it; zero where that does not help."""
    allowed = _folds(start).flatten(1).sum(1)
    share = torch.ones_like(start[:, :1])
    for _ in range(HALVINGS):
        folds = _folds(start + share * correction)
        worse = folds.flatten(1).sum(1) > allowed
        if not worse.any():
            return share * correction
        around = box_sum((folds & _each(worse, folds)).float(), REACH).clamp(max=1)
        for _ in range(2):  # smoothed, for an edge of the share would fold anew
            around = box_sum(around, REACH) / REACH ** (start.dim() - 2)
        share = share * (1 - around / 2)
    helped = _folds(start + share * correction).flatten(1).sum(1) <= allowed
    return _each(helped, start) * share * correction


def _folds(displacement: Tensor) -> Tensor:
    """Where det J ≤ 0: (B, 1, *shape)."""
    return (jacobian_determinant(displacement) <= 0)[:, None]


def _each(of_pairs: Tensor, tensor: Tensor) -> Tensor:
    """One value a pair, (B,), shaped to go with a tensor (B, …)."""
    return of_pairs.view(-1, *[1] * (tensor.dim() - 1))
