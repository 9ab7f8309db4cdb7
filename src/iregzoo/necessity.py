"""Whether a pair needs the deformation that a network gave: two scans of one person may not.

Networks learn from pairs of people. Shown one person twice, they deform what is the same, the brain weights by about a
millimetre. Such a field makes the images tell less of each other, where a pair of people gains from it.
"""

from dataclasses import dataclass

from torch import Tensor

from iregzoo.fields import warp
from iregzoo.similarity import local_information, whole_windows

WINDOW = 3
# Ratio of the local information with a displacement to that without. With the brain weights it was 0.62 to 0.79 for one
# person twice, of T1 or of two contrasts, and 1.04 to 2.3 for two people; with the hippocampus weights 0.65 to 0.78 for
# one, and 1.2 or more for the pairs of val.
NEEDLESS = 0.9
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


def find_needless(
    displacement: Tensor, images: Tensor, unmoved: Tensor, counted: Tensor | None = None
) -> Needless | None:
    """What shows that a pair is better off without a displacement; None where it is not.

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

    before, after = information(unmoved), information(warp(moving, displacement.to(moving.dtype)))
    return Needless(before, after) if after < NEEDLESS * before else None
