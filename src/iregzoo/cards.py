"""What a weights file needs and is: its card, in a bundle's metadata or, as a file, beside a training's weights."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch.distributed as dist

from iregzoo.errors import InputError
from iregzoo.flags import is_count, is_number
from iregzoo.iteration import TCI, FixedIterations, IterStop
from iregzoo.precision import Precision
from iregzoo.registration import PairNetwork

FILE = "card.json"  # in the folder of the weights that it is of
T1_BRAINS, BRAINS = "T1 brains", "brains"  # what a card says that weights suit
# By what a definition calls them: what a card may have built. Anything else would be imported and called.
CONTROLLERS = {f"{each.__module__}.{each.__qualname__}": each for each in (TCI, IterStop, FixedIterations)}


@dataclass(frozen=True)
class WeightsCard:
    """What a weights file needs and is: an entry of ``weights`` in a bundle's metadata.

    Attributes:
        file: relative to the bundle's folder.
        sha256: of the file; empty for a user's own file.
        init: the affine start that ``--init auto`` means.
        spacing: mm of the grid the network was trained on.
        minimum: voxels an axis that its grid has at least.
        description: what it was trained on.
        labels: names of the labels it was trained and tested with.
        suits: ``T1_BRAINS`` or ``BRAINS`` of any contrast, for which it is chosen where the user names no weights, see
            ``suited``; empty if for none.
        window: intensities that become 0 and 1, such as (-1000, -200) HU; two percentiles of each scan if None.
        canonical: whether the file also holds the network that brings any contrast to one (``networks.canonical``).
        finder: the weights of the same bundle whose network of one contrast finds rigid and affine starts, see
            ``finder``; empty where the file's own does, or where scans are searched as they are.
        controller: definition of what ``--controller auto`` means, as in ``zoo.build``; the method's own if empty.
        refine: what ``--refine`` is unless it is given: gradient steps after the network, see ``refinement``.
        precision: what ``--precision auto`` means: ``auto`` for weights whose fields bfloat16 was measured to change by
            less than 0.05 voxel on average, to be used where a device computes it; otherwise ``float32``.
    """

    file: str
    sha256: str = ""
    init: str = "affine"
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    minimum: tuple[int, int, int] = (1, 1, 1)
    description: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    suits: str = ""
    window: tuple[float, float] | None = None
    canonical: bool = False
    finder: str = ""
    controller: Mapping[str, Any] = field(default_factory=dict)
    refine: int = 0
    precision: Precision = "float32"

    @property
    def use(self) -> dict[str, Any]:
        """What of it makes a result what it is, as JSON has it."""
        names = ("init", "spacing", "minimum", "window", "canonical", "finder", "controller")
        use: dict[str, Any] = json.loads(json.dumps({name: getattr(self, name) for name in names}))
        return use


def write_card(
    folder: str | Path,
    network: PairNetwork,
    spacing: Sequence[float],
    shape: Sequence[int],
    window: Sequence[float] | None = None,
) -> None:
    """Write, for the weights that a training leaves in its folder, what is known of them; other entries stay.

    Where several processes train together, only the first writes.

    Args:
        folder: of the training, which there is.
        network: as it is trained.
        spacing: mm of the grid along each axis, or the least and the greatest where it varies.
        shape: of the grid.
        window: intensities that become 0 and 1; percentiles if None.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        return
    path = Path(folder) / FILE
    if len(spacing) < 3:
        spacing = [sum(spacing) / len(spacing)] * 3
    known: dict[str, Any] = {"spacing": list(spacing), "minimum": list(shape), "window": window and list(window)}
    known["canonical"] = network.canonical is not None
    kind = f"{type(network.controller).__module__}.{type(network.controller).__qualname__}"
    if kind in CONTROLLERS:
        known["controller"] = {"_target_": kind, **vars(network.controller)}
    before = _read(path) if path.is_file() else {}
    partial = path.with_name(f".{FILE}.partial")
    partial.write_text(json.dumps({**before, **known}, indent=2) + "\n", "utf-8")
    partial.replace(path)


def card_of(weights: Path) -> WeightsCard:
    """The card of a file of the user's own: what ``card.json`` beside it says, or the defaults where there is none.

    Raises:
        InputError: for a card that cannot be read, or whose entry is unknown or none.
    """
    path = weights.parent / FILE
    entries = _read(path) if path.is_file() else {}
    for name, value in entries.items():
        if name not in _ENTRIES:
            raise InputError(f"{path}: has the unknown entry {name!r}; choose from {', '.join(_ENTRIES)}")
        holds, expected = _ENTRIES[name]
        if not holds(value):
            raise InputError(f"{path}: {name} {value!r} must be {expected}; correct it or leave it out")
    return WeightsCard(file=str(weights), **entries)


def _read(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text("utf-8"))
        if not isinstance(entries, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is not readable ({error}); correct it, or delete it to use the defaults") from None
    return entries


def _several(value: object, count: int, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) == count and all(map(holds, value))


def _window(value: Any) -> bool:
    return value is None or (_several(value, 2, is_number) and value[0] < value[1])


def _start(value: object) -> bool:
    from iregzoo.space.start import STARTS  # with SimpleITK, which a list of bundles need not wait for

    return value in STARTS


def _controller(value: object) -> bool:
    """Whether it defines a controller of this package, with settings that it takes."""
    if value == {}:
        return True
    if not isinstance(value, dict) or value.get("_target_") not in CONTROLLERS:
        return False
    try:
        CONTROLLERS[value["_target_"]](**{name: setting for name, setting in value.items() if name != "_target_"})
    except (TypeError, ValueError):
        return False
    return True


_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "init": (_start, "the name of an affine start: none, center, rigid or affine"),
    "spacing": (
        lambda value: _several(value, 3, lambda each: is_number(each) and each > 0),
        "three numbers of mm above 0",
    ),
    "minimum": (lambda value: _several(value, 3, is_count), "three whole numbers of voxels"),
    "description": (lambda value: isinstance(value, str), "text"),
    "labels": (lambda value: isinstance(value, dict), "an object of names by label"),
    "suits": (lambda value: value in ("", T1_BRAINS, BRAINS), f"{T1_BRAINS!r}, {BRAINS!r} or empty"),
    "window": (_window, "null or two numbers, the lower first"),
    "canonical": (lambda value: isinstance(value, bool), "true or false"),
    "finder": (lambda value: isinstance(value, str), "the name of weights of the same bundle"),
    "controller": (_controller, f"the definition of one of {', '.join(CONTROLLERS)}"),
    "refine": (lambda value: is_count(value, 0), "a whole number of steps"),
    "precision": (lambda value: value in get_args(Precision), f"one of {', '.join(get_args(Precision))}"),
}
