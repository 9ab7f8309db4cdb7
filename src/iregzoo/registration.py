"""What a registration network gives back, what makes a network one, and the same behind a bundle's one tensor."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]

from iregzoo.fields import check_tensor
from iregzoo.iteration import Controller
from iregzoo.precision import Precision, autocast

CANONICAL = "canonical."  # of a ``PairNetwork``'s tensors, those of its network of one contrast
LOWEST, HIGHEST = -0.5, 1.5  # of intensities that count as [0, 1]: interpolation by splines overshoots


@dataclass(frozen=True)
class Registration:
    """The result of registering a batch of B pairs.

    Attributes:
        displacement: (B, N, *shape) in voxels of the fixed image's grid; ``warp(moving, displacement)`` looks like it.
        inverse: of ``displacement``, on the moving image's grid, where the method gives it.
        pyramid: the displacement after each level, coarse to fine, each in voxels of its level's grid.
        iterations: refinements accepted at each level, coarse to fine: integer tensors (B,).
        scores: similarity after every candidate of each level, coarse to fine: (K, B), NaN where a pair had finished.
        opposite: the registration of fixed to moving, where a method makes both in one call.
        auxiliary: what a method's own loss terms need beside its fields, by name; filled only while training.
    """

    displacement: Tensor
    inverse: Tensor | None = None
    pyramid: tuple[Tensor, ...] = ()
    iterations: tuple[Tensor, ...] = ()
    scores: tuple[Tensor, ...] = ()
    opposite: "Registration | None" = None
    auxiliary: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)


class RegistrationNetwork(Protocol):
    """A network that registers moving to fixed.

    Any spatial size divisible by ``stride`` is accepted; the layer above pads and crops. ``controller`` is what steers
    its iterations unless a call brings its own, None for a method that takes one pass and has nothing to steer.
    """

    @property
    def stride(self) -> int: ...
    @property
    def controller(self) -> Controller | None: ...
    def __call__(self, moving: Tensor, fixed: Tensor, controller: Controller | None = None) -> Registration:
        """Register (B, 1, *shape) images in [0, 1]; ``controller`` replaces the network's own for this call."""
        ...


class PairNetwork(nn.Module):
    """A registration network behind a bundle's boundary.

    ``image`` (B, 2, D, H, W), channel 0 moving, channel 1 fixed, both in [0, 1], becomes ``pred``, the displacement
    (B, 3, D, H, W) in voxels. ``verify_net_in_out`` and MONAI Label pass this one tensor.

    Args:
        network: a module that is a ``RegistrationNetwork``.
        canonical: a module that first brings both images to one contrast, (B, 2, D, H, W) to the same; None for a
            network that sees the images as they are.

    Attributes:
        precision: of the convolutions where no gradients are wanted.
    """

    precision: Precision = "float32"

    def __init__(self, network: nn.Module, canonical: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network
        self.canonical = canonical

    @property
    def stride(self) -> int:
        """What every spatial size must be divisible by."""
        parts = (self.network, self.canonical)
        return math.lcm(*(int(part.stride) for part in parts if part is not None))  # type: ignore[arg-type]

    @property
    def controller(self) -> Controller | None:
        """What steers the network's iterations unless a call brings its own; None for one that does not iterate."""
        controller: Controller | None = self.network.controller  # type: ignore[assignment]
        return controller

    def register(self, image: Tensor, controller: Controller | None = None) -> Registration:
        """The whole result of registering (B, 2, D, H, W), moving then fixed, of any dtype, both in [0, 1].

        Each of D, H and W has to be divisible by ``stride``. Gradients pass unless the weights or the caller
        (``torch.no_grad``) say that none is wanted; ``precision`` counts, and memory is saved, only under the latter.

        Args:
            image: the pairs, on the network's device.
            controller: of the iterations; the network's own if None.

        Raises:
            TypeError: for an image that is no tensor, and a controller that is a name or a class.
            ValueError: for another shape or device, and, except in training, intensities that are not in [0, 1].
        """
        image = self._ready(image)
        if isinstance(controller, (str, type)):
            raise TypeError(
                f"controller={controller!r}; expected an object of iregzoo.iteration, such as TCI(), IterStop() or "
                "FixedIterations(1)"
            )
        with autocast(image.device, self.precision):
            seen = image if self.canonical is None else self.canonical(image)
            registration: Registration = self.network(seen[:, :1], seen[:, 1:], controller)
        return registration

    def _ready(self, image: Tensor) -> Tensor:
        """The image after all checks, in the precision of the weights."""
        check_tensor(image, "image")
        if image.dim() != 5 or image.shape[1] != 2:
            raise ValueError(
                f"image has shape {tuple(image.shape)}; expected (B, 2, D, H, W): moving then fixed, which "
                "torch.cat((moving, fixed), 1) joins"
            )
        weights = next(self.parameters(), image)
        if image.device != weights.device:
            raise ValueError(f"image is on {image.device}, but the network on {weights.device}; move one of them")
        if not (self.training or is_tracing() or torch.compiler.is_compiling()):  # type: ignore[no-untyped-call]
            _check_intensities(image)
        return image.to(weights.dtype)

    def forward(
        self, image: Tensor, complete: bool = False, controller: Controller | None = None
    ) -> Tensor | Registration:
        """The displacement (B, 3, D, H, W), or the ``Registration`` where ``complete``."""
        registration = self.register(image, controller)
        return registration if complete else registration.displacement


def _check_intensities(image: Tensor) -> None:
    """Raise ValueError for what the networks, trained on [0, 1], would register to nonsense."""
    if not image.numel():
        return
    least, most = torch.stack(image.detach().aminmax()).tolist()  # at once: a GPU is waited for
    if not (least >= LOWEST and most <= HIGHEST):
        raise ValueError(
            f"image holds intensities from {least:g} to {most:g}; expected finite ones in [0, 1], so scale each scan, "
            "for instance with iregzoo.space.scan.scale"
        )
