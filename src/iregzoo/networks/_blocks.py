"""What several methods share: convolution blocks, the feature pyramid, and the coarse-to-fine loop over its levels."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iregzoo.fields import check_tensor, compose, identity, resize, sample, warp
from iregzoo.iteration import AdaptiveController, Controller, FixedIterations, refine
from iregzoo.networks._convolution import Conv3d, ConvChain, conv_leaky, convolve
from iregzoo.registration import Registration

# The fewest voxels that a score looks at. Between two real brains, gains of so many differ from those of all voxels by
# about a controller's threshold at most, so that a level may now and then stop a pass earlier or later.
SCORED = 2**19


def conv_block(channels_in: int, channels_out: int) -> ConvChain:
    """Conv3d 3×3×3 and LeakyReLU(0.1)."""
    return ConvChain(Conv3d(channels_in, channels_out, 3, padding=1), nn.LeakyReLU(0.1, inplace=True))


class DisplacementConv(Conv3d):
    """Conv3d 3×3×3 to a displacement: (B, C, *shape) to (B, 3, *shape)."""

    def __init__(self, channels: int, bias: bool = True) -> None:
        super().__init__(channels, 3, 3, padding=1, bias=bias)

    def forward(self, *parts: Tensor) -> Tensor:
        """Of a volume that comes in parts, runs of its channels; where no gradient is wanted, they are not joined."""
        if torch.is_grad_enabled() or parts[0].device.type != "cpu":
            return super().forward(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
        out = self.share(parts[0], bias=True)
        first = parts[0].shape[1]
        for part in parts[1:]:
            out += self.share(part, first)
            first += part.shape[1]
        return out[:, :3]

    def share(self, part: Tensor, first: int = 0, *, bias: bool = False, scale: Tensor | None = None) -> Tensor:
        """What a run of the channels adds to the displacement: (B, C_part, *shape) to (B, 8, *shape); three count.

        A CPU computes eight channels of a volume, five of them nothing, in a third of the time of three.

        Args:
            part: channels of the volume, the first of which is number ``first``.
            bias: add the bias, too.
            scale: of the channels (C_part,).
        """
        weight = self.weight[:, first : first + part.shape[1]]
        if scale is not None:
            weight = weight * scale.view(-1, 1, 1, 1)
        weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, 0, 0, 5)).contiguous(memory_format=torch.channels_last_3d)
        return convolve(part, weight, F.pad(self.bias, (0, 5)) if bias and self.bias is not None else None, padding=1)


def flow_conv(channels: int) -> DisplacementConv:
    """A convolution to a displacement, of which a fresh network makes next to none: it begins at the identity.

    Weights are N(0, 1e-5) and biases zero (PAN's, and VoxelMorph's, initialisation).
    """
    conv = DisplacementConv(channels)
    nn.init.normal_(conv.weight, std=1e-5)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # a convolution made with a bias has one
    return conv


def halve(x: Tensor) -> Tensor:
    """Means over 2×2×2 voxels, (B, C, *shape) of even sizes to (B, C, *shape/2).

    Linear interpolation at the middle of the eight. PyTorch's average pooling on the CPU needs ten times as long, and
    float32.
    """
    return F.interpolate(x, scale_factor=0.5, mode="trilinear")


def join(*parts: Tensor) -> Tensor:
    """Volumes as channels of one, (B, C_i, *shape) each to (B, sum of C_i, *shape), in the first's order of memory.

    Where the channels of some are last in memory and those of others first, ``torch.cat`` puts all of them first, which
    takes twice as long, and so does what follows.
    """
    if parts[0].shape[1] > 1 and parts[0].stride(1) == 1:
        return torch.cat([part.movedim(1, -1) for part in parts], dim=-1).movedim(-1, 1)
    return torch.cat(parts, dim=1)


def voxel_mean(x: Tensor) -> Tensor:
    """Mean of every channel over space: (B, C, *shape) to (B, C).

    As a sum, which PyTorch makes of bfloat16 as it stands; a mean would copy it to float32 first. float16 holds no sum
    above 65,504.
    """
    return x.mean((2, 3, 4)) if x.dtype == torch.float16 else x.sum((2, 3, 4)) / x.shape[2:].numel()


class ResBlock(nn.Module):
    """LeakyReLU(conv(x) + x), (B, C, *shape) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return conv_leaky(self.conv, 0.1, x, plus=x)


class Encoder(nn.Module):
    """Feature pyramid of one image: (B, 1, *shape) to levels at 1, 1/2, 1/4 … of the shape, one for each block.

    Args:
        blocks: full resolution first, each taking the average-pooled features of the one before.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, image: Tensor) -> list[Tensor]:
        features: list[Tensor] = []
        for block in self.blocks:
            image = block(halve(features[-1]) if features else image)
            features.append(image)
        return features


def register_pyramid(
    encoder: nn.Module,
    estimators: Sequence[Callable[[Tensor], Tensor]],
    moving: Tensor,
    fixed: Tensor,
    controller: Controller,
) -> Registration:
    """Refine a displacement level by level, coarse to fine; the first estimate of the coarsest level stands alone.

    Args:
        encoder: (2B, 1, *shape) to a list of features, full resolution first.
        estimators: in the same order; each makes of the concatenated features (B, 2C, *level_shape), warped moving then
            fixed, a residual displacement (B, 3, *level_shape) in voxels.
        moving, fixed: (B, 1, *shape).
        controller: steers the iterations of every level by the similarity at full resolution.
    """
    features = _features(encoder, moving, fixed)
    similarity = None if isinstance(controller, FixedIterations) else scorer(controller, moving, fixed)
    reached: Tensor | None = None
    displacement = moving.new_zeros(
        moving.shape[0], 3, *features[-1][0].shape[2:], dtype=torch.promote_types(moving.dtype, torch.float32)
    )
    pyramid: list[Tensor] = []
    iterations: list[Tensor] = []
    scores: list[Tensor] = []
    for estimator in reversed(estimators):
        displacement = resize(displacement, features[-1][1].shape[2:])  # the coarsest level has its grid already
        look = _looker(features.pop(), again=controller.max_iterations > 1)
        propose = partial(_refined, estimator, look)
        # The papers score the resized displacement anew. It scores what it scored but for its interpolation, which can
        # be more than a threshold: under IterStop a few pairs of a hundred then iterate otherwise.
        level = refine(displacement, propose, similarity, controller, coarsest=not pyramid, reached=reached)
        displacement, reached = level.displacement, level.reached
        pyramid.append(displacement)
        iterations.append(level.iterations)
        scores.append(level.scores)
    return Registration(displacement, None, tuple(pyramid), tuple(iterations), tuple(scores))


def scorer(controller: AdaptiveController, moving: Tensor, fixed: Tensor) -> Callable[[Tensor], Tensor]:
    """Scores a level's displacement (B, 3, *level_shape), (B,), by the images (B, 1, *shape) at full resolution.

    The papers compare all voxels. Of images so large that ``SCORED`` remain, every second (third …) voxel along each
    axis is looked at, which says the same in an eighth of the time.
    """
    shape = moving.shape[2:]
    step = max(1, int((shape.numel() / SCORED) ** (1 / 3)))
    if step == 1:
        return lambda displacement: controller.score(warp(moving, resize(displacement, shape)), fixed)
    some = fixed[..., ::step, ::step, ::step].contiguous()
    places = step * identity(some.shape[2:], device=fixed.device).expand(len(fixed), -1, *some.shape[2:])

    def score(displacement: Tensor) -> Tensor:
        level = displacement.shape[2:]
        if level == shape:
            return controller.score(sample(moving, places + displacement[..., ::step, ::step, ::step]), some)
        # As ``resize`` has it: corner on corner, and values that grow as the grid does.
        nearer = places.new_tensor([(few - 1) / (size - 1) for few, size in zip(level, shape, strict=True)])
        growth = places.new_tensor([size / few for few, size in zip(level, shape, strict=True)])
        there = growth.view(-1, 1, 1, 1) * sample(displacement, nearer.view(-1, 1, 1, 1) * places)
        return controller.score(sample(moving, places + there), some)

    return score


def _features(encoder: nn.Module, moving: Tensor, fixed: Tensor) -> list[tuple[Tensor, ...]]:
    """Moving and fixed features of every level: in one pass or, at inference, one after the other in less memory."""
    if torch.is_grad_enabled():
        return [level.chunk(2) for level in encoder(torch.cat((moving, fixed)))]
    return list(zip(encoder(moving), encoder(fixed), strict=True))


def _looker(features: Sequence[Tensor], again: bool) -> Callable[[Tensor], Tensor]:
    """Makes of a displacement what an estimator sees: the warped moving and the fixed features, (B, 2C, *shape).

    Args:
        features: moving, then fixed, (B, C, *shape).
        again: whether it will be asked more than once; if not, the moving features are let go once they are warped.
    """
    moving, fixed = features
    channels = moving.shape[1]
    channels_last = fixed.is_contiguous(memory_format=torch.channels_last_3d)
    order = torch.channels_last_3d if channels_last else torch.contiguous_format
    if torch.is_grad_enabled():
        return lambda displacement: torch.cat(
            (warp(moving, displacement).contiguous(memory_format=order), fixed), dim=1
        )
    # Every pass writes into the same memory, the only features that are left; an estimator keeps nothing of it.
    joined = torch.empty(
        (len(fixed), 2 * channels, *fixed.shape[2:]),
        dtype=fixed.dtype,
        device=fixed.device,
        memory_format=order,
    )
    joined[:, channels:] = fixed
    # In float32 for later passes, as which every warp would read them.
    widen = again and moving.device.type == "cpu" and moving.dtype != torch.float64
    held = [moving.float() if widen else moving]

    def look(displacement: Tensor) -> Tensor:
        warp(held[0] if again else held.pop(), displacement, out=joined[:, :channels])
        return joined

    return look


def _refined(estimator: Callable[[Tensor], Tensor], look: Callable[[Tensor], Tensor], displacement: Tensor) -> Tensor:
    """One pass of an estimator: its residual for the features warped so far, composed with the displacement."""
    residual = estimator(look(displacement))
    return compose(displacement, residual.to(displacement.dtype), padding="zeros")


def check_pair(moving: Tensor, fixed: Tensor, stride: int) -> None:
    """Raise ValueError unless both are (B, 1, D, H, W) of one shape that ``stride`` divides; TypeError for an array."""
    for name, image in (("moving", moving), ("fixed", fixed)):
        check_tensor(image, name)
    if moving.shape != fixed.shape:
        raise ValueError(f"moving {tuple(moving.shape)} and fixed {tuple(fixed.shape)} differ in shape")
    if moving.dim() != 5 or moving.shape[1] != 1 or any(size % stride or size == 0 for size in moving.shape[2:]):
        raise ValueError(
            f"images have shape {tuple(moving.shape)}; expected (B, 1, D, H, W) with D, H, W multiples of {stride}: "
            "pad or crop them"
        )


def check_one_pass(controller: Controller | None) -> None:
    """Raise ValueError for a controller that would have a method iterate that takes one pass."""
    if controller not in (None, FixedIterations(1)):
        raise ValueError(f"controller={controller}: this method runs a single pass; leave the controller out")
