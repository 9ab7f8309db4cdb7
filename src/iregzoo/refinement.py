"""Finishing a pair by gradient steps: its displacement moves on until the images agree better, without labels.

Instance optimisation (Balakrishnan et al., TMI 2019) in the form of ConvexAdam (Siebert et al., 2021): a correction on
a coarser grid, smoothed there and moved by Adam. Here it adds to what a network gave, whose own smoothness is left to
it, and it may not fold what the network did not.

A step looks at every second voxel along each axis, the next step at the next of the eight lattices of such voxels. No
detail is lost by that, as it would be by coarser images, and a step costs an eighth. Local information over the 8
voxels of a lattice's cell (27 where images have few slices, all of whose voxels are looked at) asks only that the
images depend on each other linearly over 3 voxels, where few tissues meet: it serves pairs of different contrasts,
too, once a network has brought them near.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from iregzoo import losses
from iregzoo.adam import Adam
from iregzoo.fields import check_displacement, identity, sample
from iregzoo.jacobian import jacobian_determinant, jacobian_determinant_at
from iregzoo.similarity import box_sum, local_information, local_ncc, local_ncc_map, whole_windows
from iregzoo.slices import reader

Lattice = tuple[int, ...]  # the voxel with which it begins
STRIDE = 2  # voxels of the images from one voxel of a lattice, and of the correction, to the next
WINDOW = 3  # voxels from the first to the last of the local information's, of which a lattice has every STRIDE-th
FOLDS_EVERY = 2  # steps; few voxels fold, and to look for them takes a fifth of a step
LIKENESS_WINDOW = 3  # of the local NCC that a report says, in voxels of a lattice
SMOOTHNESS = 0.75  # of a correction of what a network gave
ROUNDS = 20  # of lessening the correction around folds, at most
REACH = 3  # blocks of STRIDE voxels around a fold, in which a round takes up to half of the correction
MUCH = 0.1  # of a pair's blocks; to change more in a round is faster everywhere than place by place


def refine_displacement(
    displacement: Tensor,
    moving: Tensor,
    fixed: Tensor,
    *,
    steps: int,
    counted: Tensor | None = None,
    rate: float = 0.35,
    window: int = WINDOW,
    smoothness: float = SMOOTHNESS,
    folding: float = 25.0,
    margin: float = 0.1,
) -> Tensor:
    """Finish a displacement by Adam on local information, with the correction's diffusion and a penalty of folds.

    What would make more voxels fold than at the start is taken back, and a pair keeps its start where the rest is no
    better by the two lattices farthest from each other, or not finite, or no window counts. So no pair gets worse by
    its own objective.

    Args:
        displacement: (B, N, *shape) in voxels, where the steps begin.
        moving, fixed: images (B, 1, *shape) in [0, 1].
        steps: how many; 0 gives the displacement back.
        counted: boolean (B, 1, *shape), as it is at the start: a window's information counts where all of its voxels
            do, and their neighbours, between which images are read. All if None. The regularity counts everywhere.
        rate: Adam's learning rate, about the voxels that a step moves at most.
        window: of the local information, in voxels of the images, at least 3.
        smoothness: weight of the correction's diffusion.
        folding: weight of the mean of relu(margin − det J) of the whole displacement, at which every second step looks.
        margin: the Jacobian determinant below which a voxel counts in it.

    Returns:
        (B, N, *shape) in voxels, in float32 or better, without a gradient.

    Raises:
        ValueError: for fewer than 0 steps, a window below 3, images that do not lie on the displacement's grid, and
            ``counted`` that is not boolean.
    """
    _check(displacement, moving, fixed, counted)
    if steps < 0:
        raise ValueError(f"steps={steps}; expected 0 or more")
    if window < WINDOW:
        raise ValueError(f"window={window}; expected {WINDOW} voxels or more")
    if steps == 0 or len(displacement) == 0:
        return displacement.detach()
    # Also inside a caller's inference mode, whose tensors no gradient may pass: the clones are ordinary ones.
    with torch.inference_mode(False), torch.enable_grad():
        start, moving, fixed = (tensor.detach().clone().float() for tensor in (displacement, moving, fixed))
        objective = _Objective(start, moving, fixed, window, smoothness, folding, margin, counted)
        correction = _without_folds(start, _descend(objective, steps, rate))
        with torch.no_grad():
            better = objective.whole(correction) < objective.whole(torch.zeros_like(correction))
            if counted is not None:
                better &= torch.stack([each.flatten(1).any(1) for each in objective.counted]).any(0)
        return displacement.detach() + _each(better, start) * correction


def likeness(
    displacement: Tensor,
    moving: Tensor,
    fixed: Tensor,
    *,
    window: int = LIKENESS_WINDOW,
    counted: Tensor | None = None,
) -> Tensor:
    """How alike one lattice is, (B,), in [0, 1]: mean squared local NCC of the warped and the fixed image.

    For a report: the steps raise ``local_information``, over smaller windows.

    Args:
        displacement: (B, N, *shape) in voxels.
        moving, fixed: images (B, 1, *shape).
        window: in voxels of a lattice.
        counted: as for ``refine_displacement``; a pair without a window that counts gets 0.

    Raises:
        ValueError: for images that do not lie on the displacement's grid, and ``counted`` that is not boolean.
    """
    _check(displacement, moving, fixed, counted)
    axes, stride = displacement.shape[1], _stride(displacement.shape[2:])
    lattice = (0,) * axes
    there, warped = _at(fixed, lattice, stride), sample(moving, _places(displacement, lattice, stride))
    if counted is None:
        return local_ncc(there, warped, window=window)
    whole = _whole(_inner(counted), lattice, stride, window)
    alike = local_ncc_map(there, warped, window=window) * whole
    return alike.flatten(1).mean(1) / whole.float().flatten(1).mean(1).clamp(min=1 / whole.numel())


def _check(displacement: Tensor, moving: Tensor, fixed: Tensor, counted: Tensor | None) -> None:
    check_displacement(displacement)
    for name, image in (("moving", moving), ("fixed", fixed), ("counted", counted)):
        if image is not None and image.shape != (displacement.shape[0], 1, *displacement.shape[2:]):
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


def _inner(counted: Tensor) -> Tensor:
    """The voxels that count with all neighbours, between which an image is read: boolean (B, 1, *shape)."""
    return whole_windows(counted, 3)


def _whole(inner: Tensor, lattice: Lattice, stride: int, window: int) -> Tensor:
    """Which windows of a lattice hold inner voxels alone: boolean (B, 1, *about shape / stride)."""
    return whole_windows(_at(inner, lattice, stride), window)


def _places(displacement: Tensor, lattice: Lattice, stride: int) -> Tensor:
    """Where the voxels of a lattice are taken: (B, N, *about shape / stride), in voxels of the whole grid."""
    moved = _view(displacement, lattice, stride)
    first = moved.new_tensor(lattice).view(1, -1, *[1] * len(lattice))
    return identity(moved.shape[2:], device=moved.device).mul_(stride).add_(first) + moved


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
        counted: Tensor | None = None,
    ) -> None:
        self.shape = moving.shape[2:]
        self.read = [reader(image[None]) for image in moving.unbind()]
        self.smoothness, self.folding, self.margin = smoothness, folding, margin
        self.stride = _stride(start.shape[2:])
        self.window = 1 + (window - 1) // self.stride
        self.lattices = _lattices(start.shape[1], self.stride)
        self.places = [_places(start, lattice, self.stride) for lattice in self.lattices]
        self.fixed = [_at(fixed, lattice, self.stride) for lattice in self.lattices]
        self.counted: list[Tensor] = []  # nothing where all counts
        if counted is not None:
            inner = _inner(counted)
            self.counted = [_whole(inner, lattice, self.stride, self.window) for lattice in self.lattices]
        self.start = _at(start, self.lattices[0], self.stride) / self.stride

    def step(self, coarse: Tensor, number: int) -> Tensor:
        """Of a correction (B, N, *ceil(shape / stride)) in voxels of its own grid, by the lattice whose turn it is."""
        # So often as much, as every step would on average.
        folding = 0.0 if (number + 1) % FOLDS_EVERY else self.folding * FOLDS_EVERY
        number %= len(self.lattices)
        correction = self.stride * _between(coarse, self.lattices[number], self.places[number].shape[2:])
        return self._regularity(coarse, folding) - self._alike(correction, number)

    def whole(self, correction: Tensor) -> Tensor:
        """Of a correction (B, N, *shape) in voxels, by the first two lattices, which are farthest from each other."""
        parts = [_at(correction, lattice, self.stride) for lattice in self.lattices[:2]]
        alike = torch.stack([self._alike(part, number) for number, part in enumerate(parts)])
        return self._regularity(parts[0] / self.stride, self.folding) - alike.mean(0)

    def complete(self, coarse: Tensor) -> Tensor:
        """A correction as ``step`` has it, at every voxel and in voxels: (B, N, *shape)."""
        correction = coarse.new_empty((*coarse.shape[:2], *self.shape))
        for lattice in self.lattices:
            part = _view(correction, lattice, self.stride)
            part.copy_(self.stride * _between(coarse, lattice, part.shape[2:]))
        return correction

    def _regularity(self, coarse: Tensor, folding: float) -> Tensor:
        uneven = self.smoothness * losses.diffusion(coarse)
        return uneven + folding * losses.folding(self.start + coarse, margin=self.margin) if folding else uneven

    def _alike(self, correction: Tensor, number: int) -> Tensor:
        places = self.places[number] + correction
        warped = [read(place[None]) for read, place in zip(self.read, places.unbind(), strict=True)]
        counted = self.counted[number] if self.counted else None
        return local_information(self.fixed[number], torch.cat(warped), window=self.window, counted=counted)


def _between(coarse: Tensor, lattice: Lattice, shape: Sequence[int]) -> Tensor:
    """Linear between the voxels of the first lattice, (B, N, *coarse), at those of another: (B, N, *shape)."""
    between: Tensor = _Between.apply(coarse, lattice, tuple(shape))  # type: ignore[no-untyped-call]  # so in torch's stubs
    return between


class _Between(torch.autograd.Function):
    """Autograd by itself would fill a volume with zeros for every part that the forward pass looks at."""

    @staticmethod
    def forward(ctx: Any, coarse: Tensor, lattice: Lattice, shape: Sequence[int]) -> Tensor:
        ctx.lattice, ctx.coarse = lattice, coarse.shape[2:]
        for axis, (first, size) in enumerate(zip(lattice, shape, strict=True), start=2):
            here = coarse.narrow(axis, 0, size)
            if first:
                after = coarse.narrow(axis, 1, coarse.shape[axis] - 1)
                here = here.clone()  # beyond the last voxel it goes on as it is
                here.narrow(axis, 0, after.shape[axis]).lerp_(after, first / STRIDE)
            coarse = here
        return coarse.clone() if lattice == (0,) * len(lattice) else coarse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = grads
        for axis, (first, size) in enumerate(zip(ctx.lattice, ctx.coarse, strict=True), start=2):
            here = gradient
            if size > gradient.shape[axis] or first:
                here = F.pad(gradient, [0, 0] * (gradient.dim() - 1 - axis) + [0, size - gradient.shape[axis]])
            if first:
                passed = gradient.narrow(axis, 0, size - 1) * (first / STRIDE)
                here.narrow(axis, 0, size - 1).sub_(passed)
                here.narrow(axis, 1, size - 1).add_(passed)
            gradient = here
        return gradient, None, None


def _descend(objective: _Objective, steps: int, rate: float) -> Tensor:
    """Each pair's correction, (B, N, *shape) in voxels; zero where it is not finite."""
    raw = torch.zeros_like(objective.start, requires_grad=True)
    adam = Adam(raw, rate / objective.stride)
    voxels = objective.shape.numel()
    for step in range(steps):
        value = objective.step(_smooth(raw), step)
        # As a sum over voxels and pairs, a pair's step depends on neither the size of the grid nor the batch.
        (gradient,) = torch.autograd.grad(voxels * value.sum(), raw)
        adam.step(gradient)
    correction = objective.complete(_smooth(raw).detach())
    finite = correction.flatten(1).sum(1).isfinite()  # a hundred times as fast as to ask every number
    return correction.where(_each(finite, correction), 0)


def _smooth(raw: Tensor) -> Tensor:
    """Running means over 3 voxels along each axis, of nothing beyond the border."""
    smooth: Tensor = _Smooth.apply(raw)  # type: ignore[no-untyped-call]  # so in torch's stubs
    return smooth


class _Smooth(torch.autograd.Function):
    """Its own transpose. One component after the other, which a processor's cache may hold."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor) -> Tensor:
        smooth = torch.empty_like(raw)
        for part in itertools.product(*map(range, raw.shape[:2])):
            smooth[part] = box_sum(raw[part][None, None], 3)[0, 0]
        return smooth.div_(3 ** (raw.dim() - 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _Smooth.forward(ctx, grads[0])


@torch.no_grad()
def _without_folds(start: Tensor, correction: Tensor) -> Tensor:
    """The correction, less of it around folds until no more fold than without it; zero where that does not help."""
    pairs = zip(start[:, None].unbind(), correction[:, None].unbind(), strict=True)
    kept = [_pair_without_folds(*pair) for pair in pairs]
    return kept[0] if len(kept) == 1 else torch.cat(kept)  # a copy of one takes as long as a round


def _pair_without_folds(start: Tensor, correction: Tensor) -> Tensor:
    """``_without_folds`` of one pair. The first round changes much of it, and the next ones little, which is sparse."""
    shape = start.shape[2:]
    allowed = int(_folds(start).sum())
    kept, whole = correction, start + correction
    folds = _folds(whole)
    coarse = start.new_ones(1, 1, *(-(-size // STRIDE) for size in shape))
    within = box_sum(coarse, REACH)
    for _ in range(ROUNDS):
        places = folds.nonzero()
        if len(places) <= allowed:
            return kept
        around = torch.zeros_like(coarse)
        around[0, 0][(places[:, 2:] // STRIDE).unbind(1)] = 1
        around = box_sum(around, REACH).clamp(max=1)
        for _ in range(2):  # smoothed, for an edge of the share would fold anew; over the blocks that there are
            around = box_sum(around, REACH) / within
        coarse = coarse * (1 - around / 2)
        # Between blocks the share is linear, and a voxel's derivative looks at its neighbours.
        changed = box_sum((around > 0).float(), 5) > 0
        if float(changed.float().mean()) > MUCH:
            kept = _share(coarse, shape) * correction
            torch.add(start, kept, out=whole)
            folds = _folds(whole)
            continue
        if kept is correction:
            kept = correction.clone()
        places = _voxels(changed, shape)
        here: Any = (slice(None), *places.unbind(1)[1:])
        kept[0][here] = _share_at(coarse, places) * correction[0][here]
        whole[0][here] = start[0][here] + kept[0][here]
        folds[0][here] = jacobian_determinant_at(whole, places) <= 0
    return kept if int(folds.sum()) <= allowed else torch.zeros_like(kept)


def _share(coarse: Tensor, shape: Sequence[int]) -> Tensor:
    """Linear between the blocks (1, 1, *coarse), at every voxel: (1, 1, *shape)."""
    share = F.interpolate(coarse, scale_factor=float(STRIDE), mode="trilinear" if len(shape) == 3 else "bilinear")
    for axis, size in enumerate(shape, start=2):
        share = share.narrow(axis, 0, size)  # the last block may be part of one
    return share


def _share_at(coarse: Tensor, places: Tensor) -> Tensor:
    """``_share`` at some voxels, (n,)."""
    middles = (places[:, 1:].T + 0.5) / STRIDE - 0.5
    there = middles.to(coarse.dtype).view(1, len(middles), -1, *[1] * (len(middles) - 1))
    return sample(coarse, there, padding="border").flatten()


def _voxels(blocks: Tensor, shape: Sequence[int]) -> Tensor:
    """The voxels of blocks (1, 1, *coarse), boolean: (n, 1 + N), as ``nonzero`` gives them without the channel."""
    corners = itertools.product(range(STRIDE), repeat=len(shape))
    found = blocks[:, 0].nonzero()
    first = found * found.new_tensor([1, *[STRIDE] * len(shape)])
    voxels = (first[:, None] + first.new_tensor([(0, *corner) for corner in corners])).flatten(0, 1)
    return voxels[(voxels[:, 1:] < voxels.new_tensor(shape)).all(1)]


def _folds(displacement: Tensor) -> Tensor:
    """Where det J ≤ 0: (B, 1, *shape)."""
    return (jacobian_determinant(displacement) <= 0)[:, None]


def _each(of_pairs: Tensor, tensor: Tensor) -> Tensor:
    """One value a pair, (B,), shaped to go with a tensor (B, …)."""
    return of_pairs.view(-1, *[1] * (tensor.dim() - 1))
