"""What a registration network gives back, and what makes a network one."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from iregzoo.iteration import Controller


@dataclass(frozen=True)
class Registration:
    """The result of registering a batch of B pairs.

    Attributes:
        displacement: (B, N, *shape) in voxels of the fixed image's grid; ``warp(moving, displacement)`` looks like fixed.
        inverse: the displacement of the other direction, on the moving image's grid, where the method predicts it.
        pyramid: the displacement after each level, coarse to fine, each in voxels of its level's grid.
        iterations: refinements accepted at each level, coarse to fine: integer tensors (B,).
        scores: similarity after every candidate of each level, coarse to fine: (K, B), NaN where a pair had finished.
    """

    displacement: Tensor
    inverse: Tensor | None = None
    pyramid: tuple[Tensor, ...] = ()
    iterations: tuple[Tensor, ...] = ()
    scores: tuple[Tensor, ...] = ()


class RegistrationNetwork(Protocol):
    """A network that registers moving to fixed.

    Any spatial size divisible by ``stride`` is accepted; the layer above pads and crops.
    """

    stride: int

    def __call__(
        self, moving: Tensor, fixed: Tensor, controller: Controller | None = None
    ) -> Registration:
        """Register (B, 1, *shape) images in [0, 1]; ``controller`` replaces the network's own for this call."""
        ...
