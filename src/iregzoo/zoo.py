"""The bundles at hand: find, load and verify them, and import checkpoints of published code."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from pydoc import locate
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from iregzoo.cards import BRAINS, WeightsCard, card_of
from iregzoo.devices import choose_device
from iregzoo.errors import InputError
from iregzoo.networks.canonical import CanonicalNet
from iregzoo.precision import Precision, as_precision
from iregzoo.registration import CANONICAL, PairNetwork
from iregzoo.states import check_state, load_strictly, read_state, rename, save_whole, sha256

if TYPE_CHECKING:
    from iregzoo.finder import Finder

Network = TypeVar("Network", bound=torch.nn.Module)


@dataclass(frozen=True)
class Bundle:
    """A bundle's folder and metadata."""

    path: Path
    metadata: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def version(self) -> str:
        return str(self.metadata.get("version", ""))

    @property
    def weights(self) -> dict[str, WeightsCard]:
        """Its weights by name, the default first."""
        try:
            return {name: WeightsCard(**card) for name, card in self.metadata.get("weights", {}).items()}
        except (AttributeError, TypeError):
            raise InputError(
                f"{self.path}: the weights' cards in metadata.json are not in a form that iregzoo can read"
            ) from None


@dataclass(frozen=True)
class Weights:
    """A weights file that is there and whose hash is right."""

    name: str
    card: WeightsCard
    path: Path
    sha256: str


@dataclass(frozen=True)
class Method:
    """A bundle's network with weights, ready to register.

    Attributes:
        alias: what it is called among others where its bundle's name does not tell it apart.
        finder: what finds rigid and affine starts; None where scans are searched as they are.
    """

    bundle: Bundle
    weights: Weights
    network: PairNetwork
    alias: str = ""
    finder: "Finder | None" = None

    @property
    def name(self) -> str:
        return self.alias or self.bundle.name

    @property
    def card(self) -> WeightsCard:
        return self.weights.card

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device


def home() -> Path:
    """The user's folder of downloaded bundles; the variable IREGZOO_HOME moves it."""
    return Path(os.environ.get("IREGZOO_HOME") or Path.home() / ".cache" / "iregzoo")


def shipped() -> list[Path]:
    """Where iregzoo's own bundles may lie: in the installed package, or in a source checkout."""
    package = Path(__file__).resolve().parent
    return [package / "bundles", package.parents[1] / "bundles"]


def numbers(version: str) -> tuple[int, ...]:
    """A version such as 0.10.0 as numbers to compare; empty for what is none."""
    return tuple(map(int, version.split("."))) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})*", version) else ()


def bundles() -> list[Bundle]:
    """Every bundle at hand, by name: of one name the newest, and of one version that of the user's folder."""
    found: dict[str, Bundle] = {}
    for root in (home() / "bundles", *shipped()):
        for metadata in sorted(root.glob("*/configs/metadata.json")):
            name, bundle = metadata.parts[-3], read_bundle(metadata.parents[1])
            if name not in found or () < numbers(found[name].version) < numbers(bundle.version):
                found[name] = bundle
    return [found[name] for name in sorted(found)]


def read_bundle(path: str | Path) -> Bundle:
    """The bundle in a folder.

    Raises:
        InputError: where its metadata is missing or no JSON object.
    """
    file = Path(path).resolve() / "configs" / "metadata.json"
    try:
        metadata = json.loads(file.read_text("utf-8"))
        if not isinstance(metadata, dict):
            raise TypeError("not an object")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{file}: is not readable metadata ({error}); install the bundle again") from None
    return Bundle(file.parents[1], metadata)


def is_bundle(folder: str | Path) -> bool:
    """Whether a folder holds a bundle."""
    return os.path.isfile(Path(folder) / "configs" / "metadata.json")  # also of a name that is too long for a file


def find(name: str) -> Bundle:
    """The bundle of a name, or in a folder of the user's.

    Raises:
        InputError: where there is none.
    """
    known = {bundle.name: bundle for bundle in bundles()}
    if name in known:
        return known[name]
    if is_bundle(name):
        return read_bundle(name)
    raise InputError(
        f"bundle {name!r} is unknown; available: {', '.join(known) or 'none'}, or the folder of a bundle of your own"
    )


def build(definition: Mapping[str, Any]) -> Any:
    """The object of a plain MONAI definition, ``{"_target_": "module.Class", …}``, nested ones included.

    MONAI's own parser does the same and more; this one starts without importing MONAI, which takes seconds.
    """
    arguments = {
        key: build(value) if isinstance(value, Mapping) else value
        for key, value in definition.items()
        if key != "_target_"
    }
    target = locate(definition["_target_"])
    if not callable(target):
        raise InputError(f"{definition['_target_']!r} cannot be imported; install the package that provides it")
    return target(**arguments)


def untrained(bundle: Bundle) -> PairNetwork:
    """A bundle's network with random weights, as its inference config defines it.

    Raises:
        InputError: where that is missing or defines none.
    """
    path = bundle.path / "configs" / "inference.json"
    try:
        definition = json.loads(path.read_text("utf-8"))["network_def"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path}: has no readable network_def ({error}); correct it or get the bundle again") from None
    network: PairNetwork = build(definition)
    return network


def complete(network: PairNetwork, card: WeightsCard, precision: str = "auto") -> PairNetwork:
    """The network with what these weights also need, in a precision (``auto`` is the card's): the same one, changed.

    It is for inference, and its parameters want no gradient: where they do, PyTorch rounds some layers otherwise, and
    MONAI would not give bit for bit what ``load`` does.

    Raises:
        InputError: for an unknown precision.
    """
    network.canonical = CanonicalNet() if card.canonical else None
    if card.controller:
        network.network.controller = build(card.controller)
    network.precision = _precision(card, precision)
    return network.requires_grad_(False)


def _precision(card: WeightsCard, asked: str) -> Precision:
    wanted = as_precision(asked)
    return card.precision if wanted == "auto" else wanted


def finder_of(
    bundle: Bundle, weights: Weights, device: torch.device | str = "cpu", precision: str = "auto"
) -> "Finder | None":
    """What finds rigid and affine starts for weights: the network of one contrast in their file, or in their finder's.

    Raises:
        InputError: for an unknown precision, a finder that is no weights of the bundle with such a network, and where
            the file is missing, damaged, or of another network.
    """
    named, holder = weights.card.finder, weights
    if named:
        able = [name for name, card in bundle.weights.items() if card.canonical]
        if named not in able:
            raise InputError(
                f"finder {named!r} of the weights {weights.name}: is not among the weights of {bundle.name} with a "
                f"network of one contrast ({', '.join(able) or 'none'}); name one of these, or leave finder out"
            )
        holder = find_weights(bundle, named)
    if not holder.card.canonical:
        return None
    card = holder.card
    window = (card.window[0], card.window[1]) if card.window else None
    sees = tuple(card.spacing), tuple(card.minimum), window, _precision(card, precision)
    return _finder(holder.path, holder.sha256, str(device), sees)


@lru_cache(maxsize=1)  # who looks at a pair to choose its weights, and then to find its start, looks once
def _finder(
    path: Path,
    digest: str,
    device: str,
    sees: tuple[tuple[float, ...], tuple[int, ...], tuple[float, float] | None, Precision],
) -> "Finder":
    from iregzoo.finder import Finder  # which imports what reads scans, and takes its time

    state = read_state(path)
    own = {name.removeprefix(CANONICAL): tensor for name, tensor in state.items() if name.startswith(CANONICAL)}
    network = CanonicalNet().requires_grad_(False)
    load_strictly(network, own, path)
    return Finder(_for_inference(network, device), *sees, digest)


def brain_finder() -> "Finder | None":
    """What finds brains, of the first weights for them at hand that bring it, on the CPU; None where none do.

    Raises:
        InputError: as ``finder_of`` does.
    """
    for bundle in bundles():
        for name, card in bundle.weights.items():
            if card.canonical and card.suits == BRAINS:
                return finder_of(bundle, find_weights(bundle, name))
    return None


def _for_inference(network: Network, device: torch.device | str) -> Network:
    """A network in evaluation mode, on a device."""
    # Channels last is the faster layout of 3-D convolutions on the CPU; torch's stubs do not know the argument.
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return network.eval().to(device)


def load(name: str, weights: str | None = None, device: str | torch.device = "cpu", precision: str = "auto") -> Method:
    """Load a bundle's network with weights, ready for inference.

    Args:
        name: of the bundle, or its folder.
        weights: a name in the bundle's metadata (default: its first), or the path of a file.
        device: where the network goes; as text, what ``choose_device`` takes, such as ``auto``.
        precision: ``float32``, ``bfloat16``, or ``auto``: what the weights' card says.

    Returns:
        The method, whose network is in evaluation mode and wants no gradient of its weights.

    Raises:
        InputError: unknown bundle, weights, device or precision; a file missing, damaged, or of another network.
    """
    if isinstance(device, str):
        device = choose_device(device)
    bundle = find(name)
    found = find_weights(bundle, weights)
    network = complete(untrained(bundle), found.card, precision)
    load_strictly(network, read_state(found.path), found.path)
    finder = finder_of(bundle, found, device, precision)
    return Method(bundle, found, _for_inference(network, device), finder=finder)


def find_weights(bundle: Bundle, weights: str | None = None) -> Weights:
    """The weights of a name in the bundle's metadata (default: its first), or a file, with its hash checked.

    Raises:
        InputError: unknown weights, a file that is missing or has changed, and as ``card_of`` does.
    """
    cards = bundle.weights
    if weights is None:
        if not cards:
            raise InputError(
                f"bundle {bundle.name} names no weights in its metadata.json; give a file with --weights FILE"
            )
        weights = next(iter(cards))
    if weights not in cards:
        path = Path(weights)
        if not os.path.isfile(path):
            names = ", ".join(cards) or "none"
            raise InputError(f"weights {weights!r} are neither one of {bundle.name}'s ({names}) nor a file")
        digest = sha256(path)
        known = (card for card in cards.values() if card.sha256 == digest)  # a copy of the bundle's own
        return Weights(path.name, next(known, None) or card_of(path), path, digest)
    card = cards[weights]
    path = bundle.path / card.file
    if not path.is_file():
        raise InputError(f"{path}: the weights {weights!r} of {bundle.name} are missing; install the bundle again")
    digest = sha256(path)
    if card.sha256 and digest != card.sha256:
        raise InputError(
            f"{path}: sha256 is {digest}, expected {card.sha256[:12]}…: the file is damaged, or the card in "
            "metadata.json belongs to another file; get the bundle again, or enter the hash of a file of your own there"
        )
    return Weights(weights, card, path, digest)


def import_checkpoint(bundle: str, checkpoint: str | Path, output: str | Path) -> None:
    """Turn a checkpoint of a method's published code into weights for its bundle.

    The names of the published tensors are those of ``bundle``'s ``configs/import.json``: ``names`` maps a prefix there
    to a prefix here, ``ignored`` are patterns of what is no weight.

    Raises:
        InputError: for a bundle without import, a file that is no checkpoint, and every tensor that does not fit.
    """
    found = find(bundle)
    rules_file = found.path / "configs" / "import.json"
    if not rules_file.is_file():
        raise InputError(f"bundle {bundle} has no published checkpoint to import")
    source, target = Path(checkpoint), Path(output)
    if not os.path.isfile(source):
        raise InputError(f"{source}: no such file; check the path")
    if os.path.exists(target):
        raise InputError(f"{target}: already exists; choose another --output")
    rules = json.loads(rules_file.read_text("utf-8"))
    published = {
        name: tensor
        for name, tensor in read_state(source).items()
        if not any(fnmatch(name, pattern) for pattern in rules["ignored"])
    }
    network = untrained(found)
    ours = {new: old for old, new in rules["names"].items()}
    check_state(rename(network.state_dict(), ours), published, source)
    save_whole({name: tensor.float() for name, tensor in rename(published, rules["names"]).items()}, target)
