"""A volume read slice by slice gives what ``fields.sample`` gives, and its gradient."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from iregzoo.fields import sample
from iregzoo.slices import MOST_ROWS, Slices


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def volume(*shape: int) -> Tensor:
    return torch.rand(1, 1, *shape, generator=torch.manual_seed(0))


def places_within(shape: tuple[int, ...], count: tuple[int, ...], beyond: int) -> Tensor:
    """Up to so many voxels outside (1, 3, *count), none so near a voxel's plane that rounding takes it across."""
    generator = torch.manual_seed(1)
    whole = [torch.randint(-beyond, size - 1 + beyond, count, generator=generator) for size in shape]
    return torch.stack(whole)[None] + torch.rand(1, 3, *count, generator=generator) * 0.98 + 0.01


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", [(7, 9, 6), (2, 2, 2), (5, 2, 11)])
@pytest.mark.parametrize("beyond", [0, 1, 5])
def test_values_and_gradient_are_those_of_sample(shape: tuple[int, ...], beyond: int) -> None:
    image, upstream = volume(*shape), torch.rand(1, 1, 5, 3, 7, generator=torch.manual_seed(2))
    places = places_within(shape, (5, 3, 7), beyond)
    found, expected = [], []
    for read, results in ((Slices(image).sample, found), (lambda at: sample(image, at), expected)):
        at = places.clone().requires_grad_()
        value = read(at)
        results += [value, *torch.autograd.grad((value * upstream).sum(), at)]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    assert expected[1].abs().max() > 0.1


def test_no_place_is_read_as_no_value() -> None:
    assert Slices(volume(4, 5, 6)).sample(torch.zeros(1, 3, 0, 2, 2)).shape == (1, 1, 0, 2, 2)


def test_places_far_outside_read_zero_and_have_no_gradient() -> None:
    places = torch.full((1, 3, 2, 2, 2), 3.0)
    for axis in range(3):
        for far in (-1e6, -3.0, 30.0, 1e6):
            at = places.clone()
            at[:, axis] = far
            at.requires_grad_()
            value = Slices(volume(8, 8, 8) + 1).sample(at)
            assert not value.any()
            assert not torch.autograd.grad(value.sum(), at)[0].any()


def test_a_place_that_is_not_a_number_does_not_reach_the_others() -> None:
    places = places_within((6, 6, 6), (4, 4, 4), 0)
    places[0, :, 1, 1, 1] = torch.nan
    value = Slices(volume(6, 6, 6)).sample(places)
    assert torch.isfinite(value).sum() >= 63


def test_positions_in_a_scan_are_good_to_a_hundredth_of_a_voxel() -> None:
    shape = (200, 200, 150)
    places = places_within(shape, (20, 30, 40), 0)
    for axis, (size, precision) in enumerate(zip(shape, (2e-4, 1e-2, 1e-4), strict=True)):
        ramp = torch.arange(size).float().view(-1, *[1] * (2 - axis)).expand(1, 1, *shape)
        assert (Slices(ramp).sample(places)[:, 0] - places[:, axis]).abs().max() < precision


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(1, 1, 8, 8),
        torch.zeros(2, 1, 8, 8, 8),
        torch.zeros(1, 2, 8, 8, 8),
        torch.zeros(1, 1, 8, 8, 8, dtype=torch.float64),
        torch.zeros(1, 1, 8, 8, 1),
        torch.zeros(1, 1, 8, 8, 8, device="meta"),
        torch.zeros(1, 1, 1, 1, 8).expand(1, 1, MOST_ROWS // 8, 8, 8),
    ],
)
def test_other_images_are_not_taken(other: Tensor) -> None:
    assert Slices.takes(torch.zeros(1, 1, 8, 8, 8))
    assert not Slices.takes(other)
