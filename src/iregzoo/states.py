"""The weights of a network in a file: read without running code, checked, loaded strictly, written whole."""

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from iregzoo.errors import InputError


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file.

    Raises:
        InputError: where it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path and the permissions") from None
    return digest.hexdigest()


def read_state(path: Path) -> dict[str, Tensor]:
    """A state_dict from a file, without running any code in it; the file itself, its entry ``model_state``, as in
    published code, or ``network``, as in the checkpoints of a training.

    Raises:
        InputError: for a file that is no such thing.
    """
    try:
        with warnings.catch_warnings():  # of a pickle's protocol, before it is refused
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises many kinds (IndexError, struct.error, …); all mean the same
        reason = str(error).strip().split("\n")[0][:100]
        if reason.startswith("Weights only"):  # torch's advice is to run the code in it
            reason = "it holds more than tensors"
        raise InputError(
            f"{path}: is not a readable weights file ({reason or type(error).__name__}); get it again"
        ) from None
    state = content
    if isinstance(content, dict):
        state = next(
            (content[name] for name in ("model_state", "network") if isinstance(content.get(name), dict)), content
        )
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items())
    ):
        raise InputError(f"{path}: holds no state_dict, alone, as model_state or as network; it is no weights file")
    return state


def check_state(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: Path) -> None:
    """Check that names and shapes of tensors are the expected ones, and their values finite.

    Raises:
        InputError: naming the first tensor that is missing, foreign, of another shape, or not finite.
    """
    for name, tensor in expected.items():
        if name not in state:
            raise InputError(f"{source}: has no tensor {name!r}; the weights belong to another network")
        if state[name].shape != tensor.shape:
            shapes = f"{tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
            raise InputError(f"{source}: tensor {name!r} has shape {shapes}; the weights belong to another network")
        if not torch.isfinite(state[name]).all():
            raise InputError(f"{source}: tensor {name!r} holds NaN or infinite values; the weights are damaged")
    foreign = [name for name in state if name not in expected]
    if foreign:
        raise InputError(f"{source}: has the unexpected tensor {foreign[0]!r}; the weights belong to another network")


def load_strictly(network: torch.nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Load weights whose names, shapes and values all fit.

    Raises:
        InputError: see ``check_state``.
    """
    check_state(network.state_dict(), state, source)
    network.load_state_dict({name: tensor.float() for name, tensor in state.items()})


def rename(state: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """The same tensors under other names: ``prefixes`` maps what stands before a dot."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        prefix = next((old for old in prefixes if name.startswith(f"{old}.")), None)
        renamed[name if prefix is None else prefixes[prefix] + name[len(prefix) :]] = tensor
    return renamed


def save_whole(state: Mapping[str, Tensor], target: Path) -> None:
    """Write a state_dict that appears whole or not at all."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save(dict(state), partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # PyTorch reports a full disk or a read-only folder as RuntimeError
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0][:100]
        raise InputError(f"{target}: cannot be written ({reason}); choose another --output") from None
