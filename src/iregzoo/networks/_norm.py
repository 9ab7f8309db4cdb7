"""Instance norm, and one that overwrites a large volume, with the LeakyReLU after it, at inference on a CPU.

PyTorch's first puts the channels first, then has two passes over the volume and gives a new one, of which the next
convolution has to put the channels last again. Here planes that a cache holds are read once for their moments, and once
more to be changed: a quarter of the time, and of a volume's memory nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]

LARGE = 2**20  # numbers of an image's features, which a cache no longer holds
SLAB = 2**18  # numbers of the planes that are looked at together
EPSILON = 1e-5


class InstanceNorm(nn.Module):
    """Each channel of each image to mean 0 and variance 1, (B, C, *shape) to the same.

    torch's refuses a grid of one voxel, which a small image has at the coarsest level; the formula makes it 0, and so
    does layer norm. Of other grids it gives the same as torch's, but under autocast on a GPU in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:].numel() == 1 or len(x) == 0:
            return F.layer_norm(x, x.shape[2:], eps=EPSILON)
        return F.instance_norm(x, eps=EPSILON)


def may_overwrite(x: Tensor) -> bool:
    """Whether ``normalise_`` serves features that nobody else needs."""
    return (
        not torch.is_grad_enabled()
        and not (is_tracing() or torch.compiler.is_compiling())  # type: ignore[no-untyped-call]
        and type(x) is Tensor
        and x.device.type == "cpu"
        and x.dim() == 5
        and len(x) > 0
        and x[0].numel() >= LARGE
        and x.is_contiguous(memory_format=torch.channels_last_3d)
    )


def normalise_(x: Tensor, slope: float) -> Tensor:
    """LeakyReLU of a slope of the instance norm of x (B, C, *shape), in its place; it is computed in float32."""
    for image in torch.split(x, 1):
        mean, variance = _moments(image)
        scale = (variance + EPSILON).rsqrt_()
        shift = -mean * scale
        for slab in _slabs(image):
            exact = slab.to(scale.dtype)
            torch.addcmul(shift, exact, scale, out=exact)
            F.leaky_relu_(exact, slope)
            if exact is not slab:
                slab.copy_(exact)
    return x


def _slabs(image: Tensor) -> tuple[Tensor, ...]:
    return torch.split(image, max(1, SLAB // image[:, :, 0].numel()), dim=2)


def _moments(image: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of (1, C, *shape), (1, C, 1, 1, 1) each.

    Slabs are put together as Chan, Golub and LeVeque do (The American Statistician 37, 1983), so that nothing cancels.
    """
    total, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for slab in _slabs(image):
        # As rows of channels, whose sums PyTorch makes pairwise.
        rows = slab.permute(0, 2, 3, 4, 1).flatten(0, 3)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        own = rows.sum(0) / len(rows)
        part = len(rows) / (total + len(rows))
        away = own - mean
        squares = squares + (rows - own).square_().sum(0) + away.square() * (total * part)
        mean = mean + away * part
        total += len(rows)
    shape = (1, -1, 1, 1, 1)
    return mean.view(shape), (squares / total).view(shape)
