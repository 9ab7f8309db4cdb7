"""Whether a bundle is whole: its weights against their cards, its files against the manifest."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from iregzoo.cards import WeightsCard
from iregzoo.errors import InputError
from iregzoo.manifest import SIGN, files, manifest
from iregzoo.states import load_strictly, read_state, sha256
from iregzoo.zoo import Bundle, complete, find_weights, untrained

NEEDED = ("LICENSE", "configs/metadata.json", "configs/inference.json")


@dataclass(frozen=True)
class Check:
    """What was checked and what came of it.

    Attributes:
        what: was checked.
        good: whether it is as it should be; None where nothing is known to check it against.
        said: the finding, in words.
    """

    what: str
    good: bool | None
    said: str


def check(bundle: Bundle) -> list[Check]:
    """Check every weights file of a bundle against its card and its network, and all files against the manifest.

    The network is built as the bundle's ``inference.json`` says, which may name any code that is installed;
    ``download`` looks at that file first.

    Raises:
        InputError: where this iregzoo's manifest is missing.
    """
    try:
        cards = bundle.weights
    except InputError as error:
        return [Check("contents", False, str(error))]
    looks: list[tuple[str, Callable[[], str]]] = [("contents", partial(_contents, bundle))]
    for name, card in cards.items():
        looks += [
            (f"weights {name}", partial(_hash, bundle, name, card)),
            (f"weights {name}", partial(_fit, bundle, card)),
        ]
    known = manifest().get(bundle.name, {}).get(bundle.version)
    if known is not None:
        looks.append(("manifest", partial(_compare, bundle, known["files"])))
    found = [_tried(bundle, what, look) for what, look in looks]
    if known is None:
        found.append(
            Check("manifest", None, f"this version of iregzoo has no entry for {bundle.name} {bundle.version}")
        )
    return found


def first_fault(bundle: Bundle) -> str:
    """What is wrong with a bundle, in words; empty where nothing is."""
    return next((found.said for found in check(bundle) if found.good is False), "")


def _tried(bundle: Bundle, what: str, look: Callable[[], str]) -> Check:
    try:
        return Check(what, True, look())
    except InputError as error:
        return Check(what, False, str(error))
    # What a bundle from elsewhere holds may be wrong in any way.
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return Check(
            what,
            False,
            f"{bundle.path}: cannot be used by this version of iregzoo ({reason}); a newer version may support it",
        )


def _contents(bundle: Bundle) -> str:
    names, carded = files(bundle), [card.file for card in bundle.weights.values()]
    for name in (*NEEDED, *carded):
        if name not in names:
            raise InputError(f"{bundle.path}: has no file {name!r}; get the bundle again")
    for name in names:
        if name.endswith(".pt") and name not in carded:
            raise InputError(f"{bundle.path / name}: has no card in metadata.json; add one or move the file elsewhere")
    return f"{len(names)} files in {bundle.path}, all of which belong in a bundle"


def _hash(bundle: Bundle, name: str, card: WeightsCard) -> str:
    if not card.sha256:
        raise InputError(f"{bundle.path / card.file}: has no sha256 in its card; add it in metadata.json")
    return f"{card.file} matches the sha256 in its card, {find_weights(bundle, name).sha256}"


def _fit(bundle: Bundle, card: WeightsCard) -> str:
    network, path = complete(untrained(bundle), card), bundle.path / card.file
    load_strictly(network, read_state(path), path)
    return f"{card.file} loads strictly, {sum(tensor.numel() for tensor in network.parameters()):,} parameters"


def _compare(bundle: Bundle, expected: dict[str, str]) -> str:
    """Compare each file with the manifest, and name the first that differs."""
    found = {name: sha256(path) for name, path in files(bundle).items()}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise InputError(
                f"{bundle.path / name}: {'differs from what was' if name in found else 'is missing, but was'} "
                f"signed off for {bundle.name} {bundle.version}; get the bundle again, or, if you "
                f"changed it yourself, raise its version or run {SIGN}"
            )
    return f"all {len(found)} files match those signed off for {bundle.name} {bundle.version}"
