"""What bundle configs name: the network behind one two-channel tensor, its inferer, and the transforms around it."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.inferers import Inferer
from monai.transforms import MapTransform
from torch import Tensor, nn

from iregzoo.iteration import Controller
from iregzoo.registration import Registration, RegistrationNetwork
from iregzoo.space.grid import network_grid
from iregzoo.space.scan import Scan, normalise, read_labels, read_scan, resample_to


class PairNetwork(nn.Module):
    """A registration network behind a bundle's boundary.

    ``image`` (B, 2, D, H, W), channel 0 moving, channel 1 fixed, both in [0, 1], becomes ``pred``, the displacement
    (B, 3, D, H, W) in voxels. ``verify_net_in_out`` and MONAI Label pass this one tensor.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @property
    def stride(self) -> int:
        """What every spatial size must be divisible by."""
        stride: int = self.network.stride  # type: ignore[assignment]
        return stride

    def register(self, image: Tensor, controller: Controller | None = None) -> Registration:
        """The whole result of registering (B, 2, D, H, W)."""
        if image.dim() != 5 or image.shape[1] != 2:
            raise ValueError(f"image has shape {tuple(image.shape)}; expected (B, 2, D, H, W), moving then fixed")
        network: RegistrationNetwork = self.network  # type: ignore[assignment]
        return network(image[:, :1], image[:, 1:], controller)

    def forward(self, image: Tensor, complete: bool = False) -> Any:
        """The displacement (B, 3, D, H, W), or the ``Registration`` where ``complete``."""
        registration = self.register(image)
        return registration if complete else registration.displacement
