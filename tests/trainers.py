"""What of a MONAI trainer a training step touches."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


def trainer_of(
    network: nn.Module, loss: Callable[..., Any] | None = None, *, rate: float = 1e-3, iteration: int = 1
) -> Any:
    """A trainer in the midst of a step, on the CPU."""
    return SimpleNamespace(
        network=network,
        optimizer=torch.optim.Adam(network.parameters(), lr=rate),
        loss_function=loss,
        state=SimpleNamespace(device=torch.device("cpu"), iteration=iteration),
    )
