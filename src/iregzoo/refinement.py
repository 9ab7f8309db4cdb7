"""Finishing a pair by gradient steps: its displacement moves on until the images agree better, without labels.

Instance optimisation (Balakrishnan et al., TMI 2019) in the form of ConvexAdam (Siebert et al., 2021): a correction on
a coarser grid, smoothed there, moved by Adam.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from iregzoo.fields import check_displacement, jacobian_determinant, resize, warp
from iregzoo.losses import diffusion
from iregzoo.similarity import box_sum, local_ncc

COARSER = 2  # voxels of the images per voxel of the correction, along each axis
SMOOTHINGS = 2  # running means over 3 voxels that smooth the correction
DAMPING = 1e-3  # Adam's epsilon, for gradients a voxel: where the images are flat, as in air, nearly nothing moves


def refine_displacement(
    displacement: Tensor,
    moving: Tensor,
    fixed: Tensor,
    *,
    steps: int,
    rate: float = 0.1,
    window: int = 9,
    smoothness: float = 1.0,
    folding: float = 10.0,
    margin: float = 0.1,
) -> Tensor:
    """Finish a displacement by steps of Adam on local NCC, with the correction's diffusion and a penalty of folds.

    The correction is added to the displacement. Of all steps, the start among them, each pair keeps the one with the
    lowest objective that has no more folded voxels than the start. So nothing gets worse by its own objective, and a
    pair whose objective is not finite keeps its start.

    Args:
        displacement: (B, N, *shape) in voxels, where the steps begin.
        moving, fixed: images (B, 1, *shape) in [0, 1].
        steps: how many; 0 gives the displacement back.
        rate: Adam's learning rate, about the voxels that a step moves at most.
        window: of the local NCC, in voxels.
        smoothness: weight of the correction's diffusion; what is smooth already in the displacement stays.
        folding: weight of the mean of relu(margin − det J) of the whole displacement.
        margin: the Jacobian determinant below which a voxel counts in it.

    Returns:
        (B, N, *shape) in voxels, without a gradient.

    Raises:
        ValueError: for fewer than 0 steps, and images that do not lie on the displacement's grid.
    """
    check_displacement(displacement)
    if steps < 0:
        raise ValueError(f"steps={steps}; expected 0 or more")
    for name, image in (("moving", moving), ("fixed", fixed)):
        if image.shape != (displacement.shape[0], 1, *displacement.shape[2:]):
            raise ValueError(
                f"{name} has shape {tuple(image.shape)}; expected one channel on the grid of the displacement, "
                f"{tuple(displacement.shape)}"
            )
    if steps == 0:
        return displacement
    # Also inside a caller's inference mode, whose tensors no gradient may pass: the clones are ordinary ones.
    with torch.inference_mode(False), torch.enable_grad():
        start, moving, fixed = (tensor.detach().clone().float() for tensor in (displacement, moving, fixed))
        voxels = start[0, 0].numel()
        coarse = [-(-size // COARSER) for size in start.shape[2:]]
        raw = start.new_zeros(*start.shape[:2], *coarse, requires_grad=True)
        adam = torch.optim.Adam([raw], lr=rate / COARSER, eps=DAMPING)
        best = torch.zeros_like(raw)
        lowest = start.new_full(start.shape[:1], torch.inf)
        allowed: Tensor | None = None
        for step in range(steps + 1):
            correction = _correction(raw, start.shape[2:])
            u = start + correction
            determinant = jacobian_determinant(u).flatten(1)
            objective = (
                smoothness * diffusion(correction)
                + folding * F.relu(margin - determinant).mean(1)
                - local_ncc(fixed, warp(moving, u), window=window)
            )
            folded = (determinant <= 0).sum(1)
            allowed = folded if allowed is None else allowed
            better = (objective.detach() < lowest) & (folded <= allowed)
            lowest = torch.where(better, objective.detach(), lowest)
            best = torch.where(better.view(-1, *[1] * (raw.dim() - 1)), raw.detach(), best)
            if step < steps:
                # As a sum over voxels and pairs, a pair's step depends on neither the size of the grid nor the batch.
                (raw.grad,) = torch.autograd.grad(voxels * objective.sum(), raw)
                adam.step()
    return (displacement + _correction(best, start.shape[2:])).detach()


def _correction(raw: Tensor, shape: torch.Size) -> Tensor:
    """A correction's parameters, in voxels of their coarse grid, smoothed and brought to the images' grid."""
    for _ in range(SMOOTHINGS):
        raw = box_sum(raw, 3) / 3 ** (raw.dim() - 2)
    return resize(raw, shape)
