"""Finishing a pair by gradient steps: its displacement moves on until the images agree better, without labels.

Instance optimisation (Balakrishnan et al., TMI 2019) in the form of ConvexAdam (Siebert et al., 2021): a correction on
a coarser grid, smoothed there and moved by Adam. Here it adds to what a network gave, whose own smoothness is left to
it, and it may not fold what the network did not.

A step looks at every second voxel along each axis, the next step at the next of the eight lattices of such voxels. No
detail is lost by that, as it would be by coarser images, and a step costs an eighth. Squared local NCC over the 27
nearest voxels of a lattice asks only that the images depend on each other linearly over 5 voxels, where few tissues
meet: it serves pairs of different contrasts, too, once a network has brought them near.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from iregzoo import losses
from iregzoo.fields import check_displacement, identity, jacobian_determinant, sample
from iregzoo.similarity import box_sum, local_ncc

Lattice = tuple[int, ...]  # the voxel with which it begins
STRIDE = 2  # voxels of the images from one voxel of a lattice, and of the correction, to the next
WINDOW = 3  # of the local NCC, in voxels of a lattice
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
    smoothness: float = 1.5,
    folding: float = 100.0,
    margin: float = 0.1,
) -> Tensor:
    """Finish a displacement by steps of Adam on local NCC, with the correction's diffusion and a penalty of folds.

    What would make more voxels fold than at the start is taken back, and a pair keeps its start where the rest is no
    better by the two lattices farthest from each other, or not finite. So no pair gets worse by its own objective.

    Args:
        displacement: (B, N, *shape) in voxels, where the steps begin.
        moving, fixed: images (B, 1, *shape) in [0, 1].
        steps: how many; 0 gives the displacement back.
        rate: Adam's learning rate, about the voxels that a step moves at most.
        window: of the local NCC, in voxels of a lattice.
        smoothness: weight of the correction's diffusion.
        folding: weight of the mean of relu(margin − det J) of the whole displacement.
        margin: the Jacobian determinant below which a voxel counts in it.

    Returns:
        (B, N, *shape) in voxels, in float32 or better, without a gradient.

    Raises:
        ValueError: for fewer than 0 steps, and images that do not lie on the displacement's grid.
    """
    _check(displacement, moving, fixed)
    if steps < 0:
        raise ValueError(f"steps={steps}; expected 0 or more")
    if steps == 0:
        return displacement.detach()
    # Also inside a caller's inference mode, whose tensors no gradient may pass: the clones are ordinary ones.
    with torch.inference_mode(False), torch.enable_grad():
        start, moving, fixed = (tensor.detach().clone().float() for tensor in (displacement, moving, fixed))
        objective = _Objective(start, moving, fixed, window, smoothness, folding, margin)
        correction = _without_folds(start, _descend(objective, steps, rate))
        with torch.no_grad():
            better = objective.whole(correction) < objective.whole(torch.zeros_like(correction))
        return displacement.detach() + _each(better, start) * correction


def likeness(displacement: Tensor, moving: Tensor, fixed: Tensor, *, window: int = WINDOW) -> Tensor:
    """What the steps raise, by one lattice: mean squared local NCC of the warped and the fixed image, (B,), in [0, 1].

    Args:
        displacement: (B, N, *shape) in voxels.
        moving, fixed: images (B, 1, *shape).
        window: in voxels of a lattice.

    Raises:
        ValueError: for images that do not lie on the displacement's grid.
    """
    _check(displacement, moving, fixed)
    axes, stride = displacement.shape[1], _stride(displacement.shape[2:])
    lattice = (0,) * axes
    places = _at(identity(displacement.shape[2:], device=displacement.device) + displacement, lattice, stride)
    return local_ncc(_at(fixed, lattice, stride), sample(moving, places), window=window)


def _check(displacement: Tensor, moving: Tensor, fixed: Tensor) -> None:
    check_displacement(displacement)
    for name, image in (("moving", moving), ("fixed", fixed)):
        if image.shape != (displacement.shape[0], 1, *displacement.shape[2:]):
            raise ValueError(
                f"{name} has shape {tuple(image.shape)}; expected one channel on the grid of the displacement, which "
                f"has shape {tuple(displacement.shape)}"
            )


def _stride(shape: Sequence[int]) -> int:
    """From one voxel of a lattice to the next; 1 where a lattice would have an axis without a derivative."""
    return STRIDE if min(shape) >= 2 * STRIDE else 1


def _lattices(axes: int, stride: int) -> list[Lattice]:
    """All of them, each followed by the one farthest from it."""
    found = list(itertools.product(range(stride), repeat=axes))
    return [lattice for both in zip(found, reversed(found), strict=True) for lattice in both][: len(found)]


def _view(volume: Tensor, lattice: Lattice, stride: int) -> Tensor:
    """The voxels of a lattice: (B, C, *shape) to (B, C, *about shape / stride)."""
    every = (slice(None), slice(None), *(slice(first, None, stride) for first in lattice))
    return volume[every]


def _at(volume: Tensor, lattice: Lattice, stride: int) -> Tensor:
    return _view(volume, lattice, stride).contiguous()


class _Objective:
    """What the steps lower, (B,), as a function of the correction: by one of the lattices, or by two of them."""

    def __init__(
        self,
        start: Tensor,
        moving: Tensor,
        fixed: Tensor,
        window: int,
        smoothness: float,
        folding: float,
        margin: float,
    ) -> None:
        self.moving, self.window = moving, window
        self.smoothness, self.folding, self.margin = smoothness, folding, margin
        self.stride = _stride(start.shape[2:])
        self.lattices = _lattices(start.shape[1], self.stride)
        places = identity(start.shape[2:], device=start.device) + start
        self.places = [_at(places, lattice, self.stride) for lattice in self.lattices]
        self.fixed = [_at(fixed, lattice, self.stride) for lattice in self.lattices]
        self.start = _at(start, self.lattices[0], self.stride) / self.stride

    def step(self, coarse: Tensor, number: int) -> Tensor:
        """Of a correction (B, N, *ceil(shape / stride)) in voxels of its own grid, by the lattice whose turn it is."""
        number %= len(self.lattices)
        correction = self.stride * _between(coarse, self.lattices[number], self.places[number].shape[2:])
        return self._regularity(coarse) - self._alike(correction, number)

    def whole(self, correction: Tensor) -> Tensor:
        """Of a correction (B, N, *shape) in voxels, by the first two lattices, which are farthest from each other."""
        parts = [_at(correction, lattice, self.stride) for lattice in self.lattices[:2]]
        alike = torch.stack([self._alike(part, number) for number, part in enumerate(parts)])
        return self._regularity(parts[0] / self.stride) - alike.mean(0)

    def complete(self, coarse: Tensor) -> Tensor:
        """A correction as ``step`` has it, at every voxel and in voxels: (B, N, *shape)."""
        correction = coarse.new_empty((*coarse.shape[:2], *self.moving.shape[2:]))
        for lattice in self.lattices:
            part = _view(correction, lattice, self.stride)
            part.copy_(self.stride * _between(coarse, lattice, part.shape[2:]))
        return correction

    def _regularity(self, coarse: Tensor) -> Tensor:
        folds = losses.folding(self.start + coarse, margin=self.margin)
        return self.smoothness * losses.diffusion(coarse) + self.folding * folds

    def _alike(self, correction: Tensor, number: int) -> Tensor:
        return local_ncc(self.fixed[number], sample(self.moving, self.places[number] + correction), window=self.window)


def _between(coarse: Tensor, lattice: Lattice, shape: Sequence[int]) -> Tensor:
    """Linear between the voxels of the first lattice, (B, N, *coarse), at those of another: (B, N, *shape)."""
    for axis, (first, size) in enumerate(zip(lattice, shape, strict=True), start=2):
        here = coarse.narrow(axis, 0, size)
        if first:
            after = coarse.narrow(axis, 1, coarse.shape[axis] - 1)
            if after.shape[axis] < size:  # beyond the last voxel it goes on as it is
                after = torch.cat((after, coarse.narrow(axis, size - 1, 1)), dim=axis)
            here = torch.lerp(here, after, first / STRIDE)
        coarse = here
    return coarse


def _descend(objective: _Objective, steps: int, rate: float) -> Tensor:
    """Each pair's correction, (B, N, *shape) in voxels; zero where it is not finite."""
    raw = torch.zeros_like(objective.start, requires_grad=True)
    adam = torch.optim.Adam([raw], lr=rate / objective.stride, eps=DAMPING)
    voxels = objective.moving.shape[2:].numel()
    for step in range(steps):
        value = objective.step(_smooth(raw), step)
        # As a sum over voxels and pairs, a pair's step depends on neither the size of the grid nor the batch.
        (raw.grad,) = torch.autograd.grad(voxels * value.sum(), raw)
        adam.step()
    correction = objective.complete(_smooth(raw).detach())
    finite = correction.flatten(1).isfinite().all(1)
    return correction.where(_each(finite, correction), 0)


def _smooth(raw: Tensor) -> Tensor:
    """Running means over 3 voxels along each axis, of nothing beyond the border."""
    smooth: Tensor = box_sum(raw, 3) / 3 ** (raw.dim() - 2)
    return smooth


@torch.no_grad()
def _without_folds(start: Tensor, correction: Tensor) -> Tensor:
    """The correction, halved around folds until no more voxels fold than without it; zero where that does not help."""
    allowed = _folds(start).flatten(1).sum(1)
    share = torch.ones_like(start[:, :1])
    voxels = box_sum(share[:1], REACH)
    for _ in range(HALVINGS):
        folds = _folds(start + share * correction)
        worse = folds.flatten(1).sum(1) > allowed
        if not worse.any():
            return share * correction
        around = box_sum((folds & _each(worse, folds)).float(), REACH).clamp(max=1)
        for _ in range(2):  # smoothed, for an edge of the share would fold anew; over the voxels that there are
            around = box_sum(around, REACH) / voxels
        share = share * (1 - around / 2)
    helped = _folds(start + share * correction).flatten(1).sum(1) <= allowed
    return _each(helped, start) * share * correction


def _folds(displacement: Tensor) -> Tensor:
    """Where det J ≤ 0: (B, 1, *shape)."""
    return (jacobian_determinant(displacement) <= 0)[:, None]


def _each(of_pairs: Tensor, tensor: Tensor) -> Tensor:
    """One value a pair, (B,), shaped to go with a tensor (B, …)."""
    return of_pairs.view(-1, *[1] * (tensor.dim() - 1))
