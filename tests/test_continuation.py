"""A field continued where it does not count: what counts stays, the rest follows from it, whatever is there."""

import math

import pytest
import torch
from torch import Tensor

from iregzoo.continuation import continue_field
from iregzoo.fields import identity
from iregzoo.jacobian import jacobian_determinant
from iregzoo.similarity import box_sum

SHAPE = (26, 31, 22)


def smooth_field(batch: int = 1, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Random displacements (B, N, *shape) of 1.5 voxels."""
    field = torch.randn(batch, len(shape), *shape, generator=torch.manual_seed(seed))
    for _ in range(2):
        field = box_sum(field, 9)
    return 1.5 * field / field.std()


def ball(radius: float, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """The voxels near the middle: (1, 1, *shape)."""
    middle = torch.tensor([(size - 1) / 2 for size in shape]).view(1, -1, *[1] * len(shape))
    return (identity(shape) - middle).norm(dim=1, keepdim=True) <= radius


def linear(shape: tuple[int, ...] = SHAPE) -> Tensor:
    places = identity(shape)
    return 0.2 * places.flip(1) - 0.1 * places + 3


MASKS = {
    "a hole": ~ball(8),
    "all but the middle": ball(6),
    "one voxel": ball(0.9),
    "scattered": torch.rand(1, 1, *SHAPE, generator=torch.manual_seed(1)) < 0.01,
    "half": identity(SHAPE)[:, :1] < 13,
}


@pytest.mark.parametrize("counted", MASKS.values(), ids=MASKS)
def test_what_counts_stays_and_what_does_not_is_not_looked_at(counted: Tensor) -> None:
    field = smooth_field()
    found = continue_field(field, counted)
    everywhere = counted.expand_as(field)
    assert torch.equal(found[everywhere], field[everywhere])
    for other in (math.nan, math.inf, 1e9):
        assert torch.equal(continue_field(field.where(counted, other), counted), found)
    # Nowhere beyond what it continues: a mean of means.
    for component, known in zip(found[0], field[0], strict=True):
        least, most = known[counted[0, 0]].aminmax()
        assert float(least) - 1e-5 <= float(component.min()) <= float(component.max()) <= float(most) + 1e-5


@pytest.mark.parametrize("counted", MASKS.values(), ids=MASKS)
def test_a_constant_goes_on_exactly(counted: Tensor) -> None:
    constant = torch.tensor([0.1, -7.3, 1e-3]).view(1, 3, 1, 1, 1).expand(1, 3, *SHAPE)
    assert torch.equal(continue_field(constant.where(counted, math.nan), counted), constant)


@pytest.mark.parametrize("shape", [SHAPE, (40, 37)])
def test_a_linear_field_goes_on_through_a_hole(shape: tuple[int, ...]) -> None:
    field, hole = linear(shape), ball(8, shape)
    error = (continue_field(field, ~hole) - field).abs()
    change = 0.3 * 16  # of a component across the hole
    assert float(error.max()) < 0.05 * change
    assert error[..., 0, 0].max() == 0


def test_a_hole_in_a_smooth_field_is_filled_smoothly_and_does_not_fold() -> None:
    field, hole = 0.5 * smooth_field(seed=2), ball(6)
    assert float(jacobian_determinant(field).min()) > 0.2
    torn = field.where(~hole, -4 * field.flip(2))
    assert float((jacobian_determinant(torn) <= 0).float().mean()) > 0.001
    found = continue_field(torn, ~hole)
    assert float(jacobian_determinant(found).min()) > 0.2
    error, change = ((each - field).norm(dim=1, keepdim=True)[hole].mean() for each in (found, torch.zeros_like(field)))
    assert error < 0.5 * change


def test_a_batch_gives_each_pair_what_it_would_get_alone() -> None:
    fields, counted = smooth_field(3), torch.cat([MASKS["a hole"], MASKS["scattered"], torch.zeros_like(ball(1))])
    together = continue_field(fields, counted)
    for i in range(3):
        assert torch.equal(together[i : i + 1], continue_field(fields[i : i + 1], counted[i : i + 1]))
    assert torch.equal(together[2], torch.zeros_like(together[2]))  # nothing is known of it


@pytest.mark.parametrize("shape", [(9, 1, 1), (1, 1, 1), (5, 1), (2, 17, 3)])
def test_axes_of_few_voxels_and_other_precisions(shape: tuple[int, ...]) -> None:
    counted = torch.zeros(1, 1, *shape, dtype=torch.bool)
    counted[(..., *[0] * len(shape))] = True
    field = torch.rand(1, len(shape), *shape, dtype=torch.float64)
    found = continue_field(field, counted)
    assert found.dtype == torch.float64
    assert torch.equal(found, field[(..., *[slice(0, 1)] * len(shape))].expand_as(field))
    assert continue_field(field.half(), counted).dtype == torch.float16


@pytest.mark.parametrize(
    "counted", [ball(4).float(), ball(4)[..., 1:], ball(4).expand(1, 3, *SHAPE)], ids=["numbers", "shape", "channels"]
)
def test_a_mask_that_does_not_fit_is_refused(counted: Tensor) -> None:
    with pytest.raises(ValueError, match=r"counted has shape .* expected torch.bool of \(1, 1, 26, 31, 22\)"):
        continue_field(smooth_field(), counted)


def test_images_of_any_channels_go_on_each_by_itself() -> None:
    image, counted = torch.cat([smooth_field(seed=seed) for seed in (0, 1)], dim=1)[:, :4], MASKS["a hole"]
    alone = [continue_field(image[:, channel : channel + 1], counted) for channel in range(4)]
    assert torch.equal(continue_field(image, counted), torch.cat(alone, dim=1))
    with pytest.raises(ValueError, match=r"field has shape \(26, 31, 22\); expected"):
        continue_field(image[0, 0], counted)
