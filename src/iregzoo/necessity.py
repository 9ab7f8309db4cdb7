"""Whether a pair needs the deformation that a network gave: two scans of one person may not.

Networks learn from pairs of people. Shown one person twice, they deform what is the same, the brain weights by about a
millimetre. Such a field makes the images tell less of each other, where a pair of people gains from it.
"""

from dataclasses import dataclass

from torch import Tensor

from iregzoo.fields import warp
from iregzoo.similarity import local_information, whole_windows

WINDOW = 3
# The local information with a displacement, of that without. From precise starts it was 0.54 to 0.89 for one person
# twice, of T1 or of two contrasts, and for two people 0.90 to 5.0, but for a pair of two contrasts 0.83. What two
# people share without a displacement is at most 0.3 of what the fixed scan has of itself. One person's scans share
# more, unless noise or the contrast hides it; of those that shared less the ratio was 0.80 at most, mostly below 0.7.
NEEDLESS, STRANGERS = 0.9, 0.75
SHARED = 1 / 3
LEFT_OUT = (
    "the scans tell less of each other with the network's deformation than without it, as two scans of one person do, "
    "so it was left out"
)


@dataclass(frozen=True)
class Needless:
    """What shows that a pair is better off without a network's displacement.

    Attributes:
        information_start: local information of the pair without it, nats.
        information_network: and with it.
    """

    information_start: float
    information_network: float


@dataclass(frozen=True)
class Trial:
    """A pair without a network's displacement and with it.

    Attributes:
        information_start: local information of the pair without it, nats.
        information_network: and with it.
        information_fixed: of the fixed image and itself.
    """

    information_start: float
    information_network: float
    information_fixed: float

    @property
    def needless(self) -> Needless | None:
        """What shows that the pair is better off without the displacement; None where it is not.

        It is where less than ``NEEDLESS`` of the local information is left with the displacement, and for images that
        have less than ``SHARED`` of what the fixed one has of itself, where less than ``STRANGERS`` is.
        """
        most = NEEDLESS if self.information_start > SHARED * self.information_fixed else STRANGERS
        left_out = self.information_network < most * self.information_start
        return Needless(self.information_start, self.information_network) if left_out else None

    @property
    def gains(self) -> bool:
        """Whether the images tell more of each other with the displacement, as two people's do."""
        return self.information_network >= self.information_start


def try_without(displacement: Tensor, images: Tensor, unmoved: Tensor, counted: Tensor | None = None) -> Trial:
    """Compare a pair without a network's displacement and with it.

    Args:
        displacement: (1, N, *shape) in voxels.
        images: (1, 2, *shape), moving then fixed, in [0, 1].
        unmoved: the moving image as it would be used without the displacement, (1, 1, *shape).
        counted: boolean (1, 1, *shape): the voxels that may be compared. All if None.
    """
    moving, fixed = images[:, :1], images[:, 1:]
    windows = None if counted is None else whole_windows(counted, WINDOW)

    def information(warped: Tensor) -> float:
        return float(local_information(fixed, warped, window=WINDOW, counted=windows))

    return Trial(information(unmoved), information(warp(moving, displacement.to(moving.dtype))), information(fixed))
