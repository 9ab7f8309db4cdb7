"""Which of a bundle's weights suit a pair of scans, where the user names none."""

import torch

from iregzoo.cards import BRAINS, T1_BRAINS
from iregzoo.scans import Scans
from iregzoo.space.brains import LEAST_MM3
from iregzoo.zoo import Bundle, find_weights, finder_of

LIKE_T1 = 0.6  # of ``Finder.likeness``


def suited(
    bundle: Bundle, scans: Scans, device: torch.device | str = "cpu", precision: str = "auto"
) -> tuple[str, str] | None:
    """The name of the weights that suit two scans, and what these show, as a card has it.

    Where both show a whole brain, those are weights for T1 brains if both look like a T1, and else weights for brains
    of any contrast. None where the bundle has no weights for what the scans show: its first are as good as any.

    Raises:
        InputError: as ``finder_of`` and ``find_weights`` do.
    """
    named: dict[str, str] = {}
    for name, card in bundle.weights.items():
        if card.suits:
            named.setdefault(card.suits, name)
    pair = scans.filled.fixed, scans.filled.moving
    if not named or min(scan.grid.volume for scan in pair) < LEAST_MM3:
        return None
    finder = finder_of(bundle, find_weights(bundle, next(iter(named.values()))), device, precision)
    if finder is None:
        return None
    shown = T1_BRAINS
    for scan in pair:
        likeness = finder.likeness(scan)
        if likeness is None:
            return None
        if likeness < LIKE_T1:
            shown = BRAINS
    if shown not in named:
        shown = BRAINS
    return (named[shown], shown) if shown in named else None
