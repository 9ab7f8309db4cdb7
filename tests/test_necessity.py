"""A displacement is needless where the images tell less of each other with it than without."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from iregzoo.fields import invert, warp
from iregzoo.necessity import try_without
from iregzoo.similarity import local_information, whole_windows

SHAPE = (20, 22, 24)


def texture(seed: int) -> Tensor:
    """Smooth enough to be interpolated, and nowhere flat: (1, 1, *SHAPE) in [0, 1]."""
    noise = torch.rand(1, 1, *SHAPE, generator=torch.manual_seed(seed))
    smooth = torch.nn.functional.avg_pool3d(torch.nn.functional.pad(noise, [2] * 6, mode="reflect"), 5, 1)
    return (smooth - smooth.min()) / (smooth.max() - smooth.min())


def bend(reach: float = 1.5) -> Tensor:
    """A displacement (1, 3, *SHAPE) of some voxels."""
    along = torch.linspace(0, torch.pi, SHAPE[2]).sin()
    return torch.stack([reach * along, -reach * along, 0 * along]).view(1, 3, 1, 1, -1).expand(1, 3, *SHAPE).clone()


LOOKS = pytest.mark.parametrize("look", [lambda x: x, lambda x: 1 - x, lambda x: x * (1 - x / 2)])


@LOOKS
def test_what_is_alike_already_needs_no_displacement(look: Callable[[Tensor], Tensor]) -> None:
    fixed = texture(0)
    images = torch.cat([look(fixed), fixed], 1)
    found = try_without(bend(), images, images[:, :1]).needless
    assert found is not None
    assert found.information_network < 0.9 * found.information_start
    torch.testing.assert_close(
        torch.tensor(found.information_start), local_information(fixed, look(fixed), window=3)[0]
    )
    assert try_without(torch.zeros(1, 3, *SHAPE), images, images[:, :1]).needless is None  # which changes nothing


@LOOKS
def test_what_a_displacement_aligns_needs_it(look: Callable[[Tensor], Tensor]) -> None:
    fixed = texture(0)
    moving = look(warp(fixed, invert(bend()), padding="border"))
    assert try_without(bend(), torch.cat([moving, fixed], 1), moving).needless is None
    wrong = try_without(-bend(4.0), torch.cat([fixed, fixed], 1), fixed).needless
    assert wrong is not None


@pytest.mark.parametrize(("alike", "reach", "needless"), [(0.4, 0.6, False), (0.5, 0.6, True), (0.4, 1.0, True)])
def test_images_that_share_little_must_lose_more(alike: float, reach: float, needless: bool) -> None:
    """As two people do whom a start brought near, whose displacement is needed for what it does to their labels."""
    fixed = texture(0)
    moving = alike * fixed + (1 - alike) * texture(1)
    before, after, itself = (
        float(local_information(fixed, seen, window=3)) for seen in (moving, warp(moving, bend(reach)), fixed)
    )
    assert (before > itself / 3) == (alike > 0.4)
    assert after < (0.88 if reach < 1 else 0.74) * before  # of what shares more, each would do
    found = try_without(bend(reach), torch.cat([moving, fixed], 1), moving).needless
    assert (found is not None) == needless


def test_the_moving_image_may_lie_elsewhere_without_the_displacement() -> None:
    fixed = texture(0)
    images = torch.cat([warp(fixed, -bend(0.4), padding="border"), fixed], 1)
    found = try_without(bend(1.0), images, fixed).needless
    assert found is not None
    torch.testing.assert_close(torch.tensor(found.information_start), local_information(fixed, fixed, window=3)[0])


def test_images_that_show_nothing_keep_what_the_network_gave() -> None:
    assert try_without(bend(), torch.zeros(1, 2, *SHAPE), torch.zeros(1, 1, *SHAPE)).needless is None


def test_only_what_counts_decides() -> None:
    """One half is alike already, the other half is aligned by the displacement."""
    fixed = texture(0)
    half = torch.zeros(1, 1, *SHAPE, dtype=torch.bool)
    half[:, :, :10] = True
    moving = torch.where(half, fixed, warp(fixed, invert(bend()), padding="border"))
    images = torch.cat([moving, fixed], 1)
    assert try_without(bend(), images, moving, counted=half).needless is not None
    assert try_without(bend(), images, moving, counted=~half).needless is None
    there = try_without(bend(), images, moving, counted=half).needless
    windows = whole_windows(half, 3)
    assert there is not None
    expected = local_information(fixed, moving, window=3, counted=windows)
    torch.testing.assert_close(torch.tensor(there.information_start), expected[0])
