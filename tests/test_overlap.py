"""The overlap of warped labels against the Dice of one channel a label, warped by numpy and scipy."""

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor

from iregzoo.overlap import overlap_loss

SHAPES = {2: (9, 12), 3: (7, 9, 12)}
VALUES = (3, 17, 530)
AXES = pytest.mark.parametrize("axes", [2, 3])


def random_pair(
    axes: int, reach: float = 2.0, batch: int = 2, shape: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A displacement that leads out of the grid here and there, and label maps with labels of no value among them."""
    random = torch.manual_seed(axes)
    shape = shape or SHAPES[axes]
    choice = torch.tensor([0, *VALUES, 4, 531, -2])
    moving, fixed = choice[torch.randint(0, len(choice), (2, batch, 1, *shape), generator=random)]
    field = (2 * torch.rand(batch, axes, *shape, generator=random, dtype=torch.float64) - 1) * reach
    return field, moving, fixed


def expected_loss(field: Tensor, moving: Tensor, fixed: Tensor, values: tuple[int, ...]) -> list[float]:
    found = []
    for u, source, target in zip(field.numpy(), moving.numpy(), fixed.numpy(), strict=True):
        places = np.indices(u.shape[1:]) + u
        dice = []
        for value in values:
            # Zeros are a ring of their own around the map: "constant" would not fade out beyond its last voxel.
            ringed = np.pad((source[0] == value).astype(float), 1)
            warped = map_coordinates(ringed, places + 1, order=1, mode="constant")
            size = warped.sum() + (target[0] == value).sum()
            if size > 0:
                dice.append(2 * warped[target[0] == value].sum() / size)
        found.append(1 - np.mean(dice))
    return found


@AXES
@pytest.mark.parametrize("values", permutations(VALUES, 2))
def test_it_is_the_dice_of_channels_warped_linearly(axes: int, values: tuple[int, ...]) -> None:
    pair = random_pair(axes)
    np.testing.assert_allclose(overlap_loss(*pair, values), expected_loss(*pair, values), rtol=1e-10)


@AXES
@pytest.mark.parametrize("dtype", [torch.int16, torch.int64, torch.float32])
def test_maps_may_have_any_dtype(axes: int, dtype: torch.dtype) -> None:
    field, moving, fixed = random_pair(axes)
    found = overlap_loss(field, moving.to(dtype), fixed.to(dtype), VALUES)
    torch.testing.assert_close(found, overlap_loss(field, moving, fixed, VALUES), rtol=0, atol=0)


@pytest.mark.parametrize("values", [(614454277, 3), (-2, 17), (530, 3, 17)])
def test_values_may_be_large_negative_and_in_any_order(values: tuple[int, ...]) -> None:
    """As the numbers of an atlas; memory does not depend on them."""
    field, moving, fixed = random_pair(3)
    moving, fixed = (torch.where(labels == 530, max(values), labels) for labels in (moving, fixed))
    found = overlap_loss(field, moving, fixed, values)
    np.testing.assert_allclose(found, expected_loss(field, moving, fixed, values), rtol=1e-9)


def test_labels_that_neither_map_holds_do_not_count_and_those_of_one_do() -> None:
    first = torch.tensor([[1, 1, 1], [0, 0, 2]]).view(1, 1, 2, 3)
    second = torch.tensor([[0, 1, 2], [0, 2, 2]]).view(1, 1, 2, 3)
    still = torch.zeros(1, 2, 2, 3, dtype=torch.float64)
    for values in ((1, 2), (1, 2, 5), (5, 2, 1)):
        np.testing.assert_allclose(overlap_loss(still, first, second, values), [1 - (2 / 4 + 2 / 4) / 2])
    np.testing.assert_allclose(overlap_loss(still, first, first, (1, 2)), [0.0])
    np.testing.assert_allclose(overlap_loss(still, first, first.where(first != 2, 0), (1, 2)), [0.5])
    np.testing.assert_allclose(overlap_loss(still, first, second, (7,)), [1.0])


def test_a_shift_that_undoes_a_shift_loses_nothing() -> None:
    moving = torch.zeros(1, 1, *SHAPES[3], dtype=torch.int64)
    moving[..., 3:5, 4:6, 5:8] = 530
    field = torch.zeros(1, 3, *SHAPES[3], dtype=torch.float64)
    field[:, 1] = 2.0
    fixed = moving.roll(-2, 3)
    assert overlap_loss(field, moving, fixed, VALUES).tolist() == [0.0]
    assert overlap_loss(-field, moving, fixed, VALUES).tolist() == [1.0]


@AXES
def test_its_gradient_is_right(axes: int) -> None:
    field, moving, fixed = random_pair(axes, reach=0.4, batch=1, shape=(4, 3, 5)[:axes])
    # Away from the voxels' middles, where a linear interpolation has a kink.
    field = (field + 0.45).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: overlap_loss(u, moving, fixed, VALUES), (field,))


def test_a_label_of_a_million_voxels_loses_nothing_to_rounding() -> None:
    labels = torch.zeros(1, 1, 104, 104, 104, dtype=torch.uint8)
    labels[..., 2:-2, 2:-2, 2:-2] = 1
    field = 0.4 * torch.sin(torch.arange(3 * 104**3).reshape(1, 3, 104, 104, 104) / 977.0)
    exact = overlap_loss(field.double(), labels, labels, (1,))
    found = overlap_loss(field, labels, labels, (1,))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), abs=1e-6)
    assert exact.item() > 1e-3


def test_a_batch_gives_what_its_items_give() -> None:
    field, moving, fixed = random_pair(3)
    alone = [overlap_loss(field[i : i + 1], moving[i : i + 1], fixed[i : i + 1], VALUES) for i in range(2)]
    torch.testing.assert_close(overlap_loss(field, moving, fixed, VALUES), torch.cat(alone))


def test_a_missing_map_or_one_of_another_shape_is_refused() -> None:
    field, moving, fixed = random_pair(3)
    with pytest.raises(ValueError, match="label maps of both"):
        overlap_loss(field, None, fixed, VALUES)
    with pytest.raises(ValueError, match=r"label maps .* expected both \(2, 1, 7, 9, 12\)"):
        overlap_loss(field, moving[..., :-1], fixed[..., :-1], VALUES)
