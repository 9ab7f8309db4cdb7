"""Which of a bundle's weights suit scans, where the user names none."""

from collections.abc import Collection, Iterable

import torch

from iregzoo.cards import BRAINS, T1_BRAINS
from iregzoo.space.brains import LEAST_MM3
from iregzoo.space.scan import Scan
from iregzoo.zoo import Bundle, find_weights, finder_of

LIKE_T1 = 0.6  # of ``Finder.likeness``


def choices(bundle: Bundle) -> tuple[str, ...]:
    """The names of the weights that ``suited`` may choose, after that of the first, which all else gets."""
    return tuple(dict.fromkeys([*list(bundle.weights)[:1], *_suiting(bundle).values()]))


def suited(
    bundle: Bundle, scans: Iterable[Scan], device: torch.device | str = "cpu", precision: str = "auto"
) -> tuple[str, str] | None:
    """The name of the weights that suit scans, such as the two of a pair, and what these show, as a card has it.

    Where all show a whole brain, those are weights for T1 brains if all look like a T1, and else weights for brains of
    any contrast. None where the bundle has no weights for what the scans show: its first are as good as any.

    Raises:
        InputError: as ``finder_of`` and ``find_weights`` do.
    """
    seen = []
    for scan in scans:
        seen.append(shown(bundle, scan, device, precision))
        if not seen[-1]:
            break
    return choice(bundle, seen)


def for_pair(
    bundle: Bundle, pair: tuple[Scan, Scan], device: torch.device | str = "cpu", precision: str = "auto"
) -> tuple[str | None, str, str]:
    """The name of the weights for two scans, None for the bundle's first; what they show for it; a note on the choice.

    The last two are empty where there was nothing to choose by.

    Raises:
        InputError: as ``suited`` does.
    """
    if suiting := suited(bundle, pair, device, precision):
        weights, seen = suiting
        return weights, seen, f"both scans show {seen}, so the weights are {weights}; --weights chooses others"
    note = ""
    if all(may_suit(bundle, scan) for scan in pair):
        note = (
            "the scans do not both show a whole brain, as the bundle's other weights need, so the weights are its "
            f"first, {next(iter(bundle.weights))}; --weights chooses others"
        )
    return None, "", note


def choice(bundle: Bundle, seen: Collection[str]) -> tuple[str, str] | None:
    """The name of a bundle's weights for scans that show so much, each as ``shown`` has it, and what they suit.

    None where it has none, where one shows no brain, and where there is no scan.
    """
    named = _suiting(bundle)
    suiting = T1_BRAINS if set(seen) == {T1_BRAINS} and T1_BRAINS in named else BRAINS
    return (named[suiting], suiting) if seen and all(seen) and suiting in named else None


def shown(bundle: Bundle, scan: Scan, device: torch.device | str = "cpu", precision: str = "auto") -> str:
    """What a scan shows, by what finds brains for a bundle's weights: ``T1_BRAINS``, ``BRAINS`` or nothing.

    Raises:
        InputError: as ``finder_of`` and ``find_weights`` do.
    """
    if not may_suit(bundle, scan):
        return ""
    finder = finder_of(bundle, find_weights(bundle, next(iter(_suiting(bundle).values()))), device, precision)
    likeness = finder.likeness(scan) if finder else None
    if likeness is None:
        return ""
    return T1_BRAINS if likeness >= LIKE_T1 else BRAINS


def may_suit(bundle: Bundle, scan: Scan) -> bool:
    """Whether a bundle has weights for brains, and a scan is large enough to show one."""
    return bool(_suiting(bundle)) and scan.grid.volume >= LEAST_MM3


def _suiting(bundle: Bundle) -> dict[str, str]:
    """The names of a bundle's weights by what they suit."""
    named: dict[str, str] = {}
    for name, card in bundle.weights.items():
        if card.suits:
            named.setdefault(card.suits, name)
    return named
