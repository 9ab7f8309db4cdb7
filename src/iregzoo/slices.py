"""Linear sampling of one volume at places that have a gradient, on a CPU: a stack of slices, each read as a picture.

PyTorch has vector instructions for reading pictures, none for reading volumes. So a place is read in the two slices
around it, and the two values are weighed by its distance to them: a third of the time, forwards and backwards.

The slices stand below each other in one picture, where a position has the precision of a float32 as large as all their
rows: in a scan of 200 slices of 200 rows, some thousandths of a voxel. That is enough for steps of gradient descent
(``refinement``), for which this is; for anything else there is ``fields.sample``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from iregzoo.fields import sample

EDGE = 2  # slices and rows of zeros on either side: what is read between the two last is zero and flat
MOST_ROWS = 2**17  # in which positions are good to about a hundredth of a voxel


class Slices:
    """A volume to be read.

    Args:
        volume: (1, 1, D, H, W), float32 on the CPU, D · H at most about ``MOST_ROWS``; see ``takes``.
    """

    def __init__(self, volume: Tensor) -> None:
        depth, height, self.width = volume.shape[2:]
        self.slices, self.height = depth + 2 * EDGE, height + 2 * EDGE
        self.rows = (self.slices - 1) * self.height  # of the slices but the last, after which none follows
        padded = F.pad(volume, [0, 0, *[EDGE] * 4]).contiguous()
        size = self.height * self.width
        both = padded.as_strided((2, self.rows, self.width), (size, self.width, 1))  # a slice, and the next
        # PyTorch gives each picture of a batch one thread.
        self.pictures = both.expand(torch.get_num_threads(), *both.shape)

    @staticmethod
    def takes(volume: Tensor) -> bool:
        """Whether a volume can be read by slices, and sooner than by ``fields.sample``."""
        return (
            type(volume) is Tensor
            and volume.dim() == 5
            and volume.shape[:2] == (1, 1)
            and volume.device.type == "cpu"
            and volume.dtype == torch.float32
            and min(volume.shape[2:]) > 1
            and (volume.shape[2] + 2 * EDGE) * (volume.shape[3] + 2 * EDGE) <= MOST_ROWS
        )

    def sample(self, places: Tensor) -> Tensor:
        """Read the volume at places (1, 3, *shape) in its voxels, float32: (1, 1, *shape), zero outside."""
        values: Tensor = _Sample.apply(self, places)  # type: ignore[no-untyped-call]  # so in torch's stubs
        return values

    def find(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Where places (1, 3, *shape) lie: positions in the pictures, as ``grid_sample`` counts, and beyond a slice.

        Positions (pictures, 1, places of each, 2), of which the last may be none; the others (places,), in [0, 1].
        """
        slices, rows, columns = places.reshape(3, -1)
        grid = places.new_zeros(len(self.pictures), 1, -(-len(slices) // len(self.pictures)), 2)
        beyond = (slices + EDGE).clamp_(0, self.slices - 1)
        lower = beyond.floor().clamp_(max=self.slices - 2)
        beyond -= lower
        rows = (rows + EDGE).clamp_(0, self.height - 1).add_(lower, alpha=self.height)
        flat = grid.view(-1, 2)[: len(slices)]
        torch.mul(columns, 2 / (self.width - 1), out=flat[:, 0])
        torch.mul(rows, 2 / (self.rows - 1), out=flat[:, 1])
        return grid.sub_(1), beyond


def reader(image: Tensor) -> Callable[[Tensor], Tensor]:
    """Reads an image (1, 1, *shape) at places (1, N, *others) in its voxels, by slices where that is sooner."""
    return Slices(image).sample if Slices.takes(image) else partial(sample, image)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, volume: Slices, places: Tensor) -> Tensor:
        grid, beyond = volume.find(places)
        read = F.grid_sample(volume.pictures, grid, align_corners=True)
        here, after = read.transpose(0, 1).reshape(2, -1)[:, : len(beyond)]
        rise = after - here
        ctx.volume = volume
        ctx.save_for_backward(grid, beyond, rise)
        return torch.addcmul(here, rise, beyond).view(1, 1, *places.shape[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        volume, (grid, beyond, rise) = ctx.volume, ctx.saved_tensors
        gradient = grads[0].reshape(-1)
        of_read = grid.new_zeros(2, grid[..., 0].numel())
        torch.mul(gradient, beyond, out=of_read[1, : len(beyond)])
        torch.sub(gradient, of_read[1, : len(beyond)], out=of_read[0, : len(beyond)])
        of_read = of_read.view(2, len(grid), 1, -1).transpose(0, 1)
        # What F.grid_sample itself calls: bilinear (0), zeros outside (0), no gradient of the pictures.
        _, of_grid = torch.ops.aten.grid_sampler_2d_backward(of_read, volume.pictures, grid, 0, 0, True, (False, True))
        flat = of_grid.view(-1, 2)[: len(beyond)]
        of_places = grid.new_empty(3, len(beyond))
        torch.mul(rise, gradient, out=of_places[0])
        torch.mul(flat[:, 1], 2 / (volume.rows - 1), out=of_places[1])
        torch.mul(flat[:, 0], 2 / (volume.width - 1), out=of_places[2])
        return None, of_places.view(1, 3, *grads[0].shape[2:])
