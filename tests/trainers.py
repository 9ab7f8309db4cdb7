"""What of a MONAI trainer a training step touches, and MONAI's command in several processes."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
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


def in_processes(files: Sequence[Path], count: int = 2, **given: Any) -> Any:
    """``torchrun``, on the CPU, of MONAI's command with these configs and settings."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command += ["-m", "monai.bundle", "run", "--config_file", str([str(path) for path in files])]
    command += [part for key, value in given.items() for part in (f"--{key}", str(value))]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
