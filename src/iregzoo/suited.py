"""Which of a bundle's weights suit a pair of scans, where the user names none."""

from iregzoo.scans import Scans
from iregzoo.space.brains import LEAST_MM3
from iregzoo.zoo import Bundle, find_weights, finder_of

T1_BRAINS, BRAINS = "T1 brains", "brains"  # what a card says that weights suit
LIKE_T1 = 0.6  # of ``Finder.likeness``


def suited(bundle: Bundle, scans: Scans) -> tuple[str, str] | None:
    """The name of the weights that suit two scans, and what these show.

    Where both show a whole brain, those are weights for T1 brains if both look like a T1, and else weights for brains
    of any contrast. None where the bundle has no weights for what the scans show: its first are as good as any.

    Raises:
        InputError: as ``finder_of`` and ``find_weights`` do.
    """
    pair = scans.filled.fixed, scans.filled.moving
    named = {card.suits: name for name, card in bundle.weights.items() if card.suits}
    if BRAINS not in named or min(scan.grid.volume for scan in pair) < LEAST_MM3:
        return None
    finder = finder_of(bundle, find_weights(bundle, named[BRAINS]))
    likeness = [like for scan in pair if finder and (like := finder.likeness(scan)) is not None]
    if len(likeness) < len(pair):
        return None
    shown = T1_BRAINS if T1_BRAINS in named and min(likeness) > LIKE_T1 else BRAINS
    return named[shown], shown
