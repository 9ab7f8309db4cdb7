"""Training with the network that brings any contrast to one (``networks.canonical``), and of it."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fire
import torch
import torch.nn.functional as F
from torch import Tensor

from iregzoo.errors import InputError
from iregzoo.networks.canonical import (
    BRIGHTNESS,
    CORNERS,
    LEVELS,
    CanonicalNet,
    at_corner,
    canonical_class,
    canonical_image,
)
from iregzoo.pairs import Sample
from iregzoo.precision import trains_in_bfloat16
from iregzoo.registration import CANONICAL
from iregzoo.states import load_strictly, read_state, save_whole, sha256
from iregzoo.synthesis import BRIGHTEST, Synthesis, Tissue

# What a voxel of each class counts: one outside the brain 1, of what is large there 2, and of small structures 4.
LARGE = (BRIGHTNESS[2], BRIGHTNESS[3], BRIGHTNESS[7], BRIGHTNESS[8])
WEIGHTS = tuple(1.0 if level == 0 else 2.0 if level in LARGE else 4.0 for level in LEVELS)


@dataclass(frozen=True)
class CanonicalStep:
    """One step of MONAI's ``SupervisedTrainer``, as its ``iteration_update``: cross-entropy of the classes.

    Of each block of 2×2×2 voxels a step sees one corner, the next one each step: neighbours say much the same.

    Args:
        amp: run the network in bfloat16; ``auto`` where a device computes it.

    Raises:
        InputError: where the loss is not finite.
    """

    amp: bool | str = False

    def __post_init__(self) -> None:
        trains_in_bfloat16(self.amp, torch.device("cpu"))  # refuses what is none

    def __call__(self, engine: Any, batch: Sample) -> dict[str, float]:
        image, label = (batch[key].to(engine.state.device) for key in ("image", "label"))
        corner = engine.state.iteration % len(CORNERS)
        engine.network.train()
        engine.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(image.device.type, torch.bfloat16, enabled=trains_in_bfloat16(self.amp, image.device)):
            logits = engine.network.logits(engine.network.features(image), corner)
        classes = canonical_class(at_corner(label.flatten(0, 1), corner))
        loss = F.cross_entropy(logits, classes, logits.new_tensor(WEIGHTS))
        if not loss.isfinite():
            raise InputError(f"the loss at step {engine.state.iteration} is not finite; lower learning_rate")
        torch.autograd.backward(loss)
        engine.optimizer.step()
        return {"loss": float(loss.detach())}


def canonical_pair(batch: Sample, device: torch.device, non_blocking: bool = False, **_: Any) -> tuple[Tensor, Tensor]:
    """MONAI's ``prepare_batch``: images (B, 2, *shape), and of their labels what the network is to make of them."""
    image, label = (batch[key].to(device, non_blocking=non_blocking) for key in ("image", "label"))
    return image, canonical_image(label)


def canonical_synthesis(blur: float = 1.2) -> Synthesis:
    """Images like those that the network makes, a little blurred and uneven, to train methods on before it is there."""
    tissues = {
        label: Tissue(kind=label, mean=BRIGHTEST * brightness, mean_sd=4.0, std=6.0, std_sd=3.0)
        for label, brightness in {0: 0.0, **BRIGHTNESS}.items()
    }
    return Synthesis(tissues, t1=1.0, stripped=0.0, blur=blur, bias=0.05, gamma=0.05, thick=0.0)


def trained(path: str | Path) -> CanonicalNet:
    """The network with the weights that its training wrote, or one together with a method, for use.

    Raises:
        InputError: where there are none.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; train the network with canonical/train.json first")
    network, state = CanonicalNet(), read_state(path)
    own = {name.removeprefix(CANONICAL): value for name, value in state.items() if name.startswith(CANONICAL)}
    load_strictly(network, own or state, path)
    return network.eval().requires_grad_(False)


def assemble(network: str, canonical: str, output: str) -> None:
    """Write a trained method and the canonical network that it is to see through as one file, in half precision.

    Args:
        network: the best weights of the method's training.
        canonical: the best weights of the canonical network's, or of one together with a method.
        output: the weights file.

    Raises:
        InputError: for what are no weights, and for a file that cannot be written.
    """
    target = Path(output)
    state = read_state(Path(network))
    state |= {f"{CANONICAL}{name}": value for name, value in trained(canonical).state_dict().items()}
    save_whole({name: value.half() for name, value in state.items()}, target)
    print(f"written to {target}: sha256 {sha256(target)}")


if __name__ == "__main__":
    try:
        fire.Fire(assemble)
    except InputError as error:
        print(f"iregzoo: {error}", file=sys.stderr)
        sys.exit(2)
