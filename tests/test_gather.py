"""Many channels read on a CPU against grid_sample in float64, and when fields.py goes that way."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iregzoo.fields import identity, sample, warp
from iregzoo.gather import takes


@pytest.fixture(autouse=True)
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads: one, until told otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


PADDING = pytest.mark.parametrize("padding", ["zeros", "border"])
LAYOUT = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
SHAPE = (13, 17, 22)


def features(channels: int, shape: tuple[int, ...] = SHAPE, batch: int = 1) -> Tensor:
    return torch.randn(batch, channels, *shape, generator=torch.manual_seed(1)) * 5 + 2


def rough_field(shape: tuple[int, ...] = SHAPE, batch: int = 1, reach: float = 5.0) -> Tensor:
    """Independent at every voxel, and reaching beyond every face."""
    return (torch.rand(batch, 3, *shape, generator=torch.manual_seed(2)) * 2 - 1) * reach


def plain(image: Tensor, places: Tensor, padding: str) -> Tensor:
    """grid_sample at absolute places in voxels, in the precision of the arguments."""
    sizes = image.shape[2:]
    grid = torch.stack([places[:, i] * (2 / max(sizes[i] - 1, 1)) - 1 for i in (2, 1, 0)], dim=-1)
    return F.grid_sample(image, grid, padding_mode=padding, align_corners=True)


def exact(image: Tensor, u: Tensor, padding: str) -> Tensor:
    places = identity(u.shape[2:], dtype=torch.float64) + u.double()
    if padding == "zeros":  # grid_sample knows no outside of an axis of one voxel
        image, places = F.pad(image, [1] * 6), places + 1
    return plain(image.double(), places, padding)


@LAYOUT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_given_to_write_to_is_written_to(layout: torch.memory_format, dtype: torch.dtype) -> None:
    image, u = features(8, batch=2), rough_field(batch=2)
    assert takes(image, u)
    beside = torch.full((2, 12, *SHAPE), 7.0, dtype=dtype).contiguous(memory_format=layout)
    assert warp(image, u, out=beside[:, 2:10]).data_ptr() == beside[:, 2:10].data_ptr()
    assert torch.equal(beside[:, 2:10], warp(image, u).to(dtype))
    assert (beside[:, :2] == 7).all()
    assert (beside[:, 10:] == 7).all()


@PADDING
@LAYOUT
@pytest.mark.parametrize(("channels", "batch"), [(8, 1), (9, 2), (17, 1), (33, 1)])
def test_warp_equals_grid_sample(channels: int, batch: int, layout: torch.memory_format, padding: str) -> None:
    image, u = features(channels, batch=batch).contiguous(memory_format=layout), rough_field(batch=batch)
    assert takes(image, u)
    warped = warp(image, u, padding=padding)
    assert warped.dtype == torch.float32
    assert warped.is_contiguous(memory_format=torch.channels_last_3d)
    truth = exact(image, u, padding)
    error = (warped - truth).abs().max()
    assert error < 2e-6 * image.abs().max()
    # Positions are not rounded to a fraction of the axis on the way.
    assert error <= (plain(image, identity(SHAPE) + u, padding) - truth).abs().max()


@PADDING
@pytest.mark.parametrize("shape", [(4, 5, 6), (7, 1, 1), (1, 1, 50), (60, 40, 50), (1, 1, 150000)])
def test_sample_equals_grid_sample_at_places_of_any_shape(shape: tuple[int, ...], padding: str) -> None:
    image = features(9, batch=2)
    places = torch.rand(2, 3, *shape, generator=torch.manual_seed(3)) * 30 - 4
    assert takes(image, places)
    expected = plain(image.double(), places.double(), padding)
    torch.testing.assert_close(sample(image, places, padding=padding).double(), expected, rtol=0, atol=4e-5)


@PADDING
@pytest.mark.parametrize("shape", [(150, 51, 53), (3, 380, 390)])
def test_slabs_make_one_whole(threads: Callable[[int], None], shape: tuple[int, ...], padding: str) -> None:
    """More places than go at once, and planes that do not divide them or are larger."""
    image = features(16, shape).contiguous(memory_format=torch.channels_last_3d)
    u = (rough_field(shape) * 64).round() / 64  # float32 holds every place
    warped = warp(image, u, padding=padding)
    torch.testing.assert_close(warped.double(), exact(image, u, padding), rtol=0, atol=1e-5)
    threads(2)
    assert takes(image, u)
    assert torch.equal(warped, warp(image, u, padding=padding))
    threads(3)
    assert not takes(image, u)


@PADDING
def test_bfloat16_is_float32_rounded(padding: str) -> None:
    image, u = features(24).bfloat16(), rough_field()
    assert takes(image, u)
    warped = warp(image, u, padding=padding)
    assert warped.dtype == torch.bfloat16
    rounded = exact(image, u, padding).bfloat16()
    # Half the last of its 8 binary digits, and what is lost where numbers of both signs cancel.
    scale = exact(image.abs(), u, padding)
    assert ((warped - exact(image, u, padding)).abs() <= 2.0**-8 * scale).all()
    assert (warped != rounded).double().mean() < 0.01


def test_bfloat16_displacements_are_read_in_float32() -> None:
    image, u = features(8), rough_field().bfloat16()
    assert torch.equal(warp(image, u), warp(image, u.float()))


def test_places_in_float64_keep_their_precision() -> None:
    """float32 knows a place beside voxel 60000 to 1/256 voxel."""
    ramp = (torch.arange(70000.0) % 2).view(1, 1, 1, 1, -1).expand(1, 8, 2, 2, -1)
    places = torch.tensor([0.5, 0.5, 60000.001], dtype=torch.float64).view(1, 3, 1, 1, 1)
    torch.testing.assert_close(sample(ramp, places), torch.full((1, 8, 1, 1, 1), 0.001), rtol=0, atol=1e-7)


@pytest.mark.parametrize("far", [-1.5, 22.5, -1e9, 1e9, 1e30, float("inf"), float("-inf")])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_far_outside_is_zero_or_the_border(axis: int, far: float) -> None:
    image = features(8)
    places = torch.full((1, 3, 1, 1, 2), 4.0)
    places[:, axis, ..., 0] = far
    outside, inside = sample(image, places, padding="zeros").unbind(-1)
    assert torch.equal(outside, torch.zeros_like(outside))
    torch.testing.assert_close(inside[0, :, 0, 0], image[0, :, 4, 4, 4])
    border = sample(image, places, padding="border")[0, :, 0, 0, 0]
    end = [4, 4, 4]
    end[axis] = 0 if far < 0 else SHAPE[axis] - 1
    torch.testing.assert_close(border, image[0, :, end[0], end[1], end[2]])


@PADDING
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_no_number_reads_no_number(axis: int, padding: str) -> None:
    image, u = features(8), torch.zeros(1, 3, *SHAPE)
    u[:, axis, 5, 6, 7] = torch.nan
    warped = warp(image, u, padding=padding)
    assert warped[..., 5, 6, 7].isnan().all()
    assert int(warped.isnan().sum()) == 8


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_nothing_moves_where_nothing_moves(layout: torch.memory_format) -> None:
    image = features(8).contiguous(memory_format=layout)
    for padding in ("zeros", "border"):
        assert torch.equal(warp(image, torch.zeros(1, 3, *SHAPE), padding=padding), image)


def test_gradients_are_those_of_grid_sample() -> None:
    image, u = features(8), rough_field()
    quick = warp(image, u)
    for tracked in (image, u):
        tracked.requires_grad_()
        assert not takes(image, u)
        with torch.no_grad():
            assert takes(image, u)
        slow = warp(image, u)
        torch.testing.assert_close(slow.detach(), quick, rtol=0, atol=1e-4)
        (gradient,) = torch.autograd.grad(slow.sum(), tracked)
        assert gradient.abs().max() > 0.1
        tracked.requires_grad_(False)


@pytest.mark.parametrize(
    "image",
    [
        features(7),
        features(11).bfloat16(),
        features(8).double(),
        (features(8) * 100).short(),
        features(8, (1, 17, 22)),
        features(8, (13, 17, 1)),
    ],
    ids=["few", "few-bfloat16", "float64", "integers", "one-plane", "one-column"],
)
def test_what_it_does_not_take_is_read_all_the_same(image: Tensor) -> None:
    u = rough_field(tuple(image.shape[2:]))
    assert not takes(image, u)
    warped = warp(image, u).double()
    expected = exact(image, u, "zeros")
    if image.is_floating_point():
        torch.testing.assert_close(warped, expected, rtol=0, atol=0.1)  # of bfloat16
    else:
        torch.testing.assert_close(warped, expected.round(), rtol=0, atol=1.0)  # where rounding goes the other way


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "around", [lambda: torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode, torch.no_grad]
)
def test_contexts_change_nothing(around: Callable[[], torch.no_grad], dtype: torch.dtype) -> None:
    expected = warp(features(12).to(dtype), rough_field())
    with around():
        image, u = features(12).to(dtype), rough_field()
        assert takes(image, u)
        warped = warp(image, u)
    assert torch.equal(warped, expected)


def test_nothing_to_read() -> None:
    assert sample(features(8), torch.zeros(1, 3, 0, 4, 5)).shape == (1, 8, 0, 4, 5)
