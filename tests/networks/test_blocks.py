"""What the methods share: the score of a level's displacement, the convolution to a displacement, joined volumes."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from iregzoo.fields import resize, warp
from iregzoo.iteration import FixedIterations, IterStop
from iregzoo.networks import _blocks
from iregzoo.networks._blocks import (
    DisplacementConv,
    Encoder,
    conv_block,
    flow_conv,
    join,
    register_pyramid,
    scorer,
    voxel_mean,
)

LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


def smooth(shape: tuple[int, ...], channels: int, seed: int) -> torch.Tensor:
    """Random (2, channels, *shape), smooth enough to be resampled."""
    coarse = torch.randn(2, channels, 5, 5, 5, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)


@pytest.mark.parametrize("level", [1, 2, 4])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_scores_every_nth_voxel_of_the_whole_warped_image(
    monkeypatch: pytest.MonkeyPatch, level: int, step: int
) -> None:
    shape = (24, 20, 28)
    monkeypatch.setattr(_blocks, "SCORED", 24 * 20 * 28 // step**3)
    moving, fixed = smooth(shape, 1, 1), smooth(shape, 1, 2)
    displacement = smooth(tuple(size // level for size in shape), 3, 3)
    warped = warp(moving, resize(displacement, shape))
    expected = IterStop().score(warped[..., ::step, ::step, ::step], fixed[..., ::step, ::step, ::step])
    assert scorer(IterStop(), moving, fixed)(displacement) == pytest.approx(expected, abs=1e-5)


def test_part_of_a_large_image_says_what_the_whole_says_of_a_gain() -> None:
    shape = (160, 176, 160)
    moving, fixed = smooth(shape, 1, 1)[:1], smooth(shape, 1, 2)[:1]
    air = nn.functional.pad(torch.ones(1, 1, 120, 136, 120), [20] * 6)  # as around a head
    moving, fixed = air * moving, air * (fixed + moving)
    fixed = fixed + 0.1 * torch.randn(fixed.shape, generator=torch.Generator().manual_seed(0))
    better = smooth((20, 22, 20), 3, 3)[:1]
    candidates = [torch.zeros_like(better), better]
    first, second = (IterStop().score(warp(moving, resize(each, shape)), fixed) for each in candidates)
    score = scorer(IterStop(), moving, fixed)
    assert abs(second - first) > 2 * IterStop().threshold
    assert score(candidates[1]) - score(candidates[0]) == pytest.approx(second - first, abs=IterStop().threshold / 5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_convolution_to_a_displacement_is_the_plain_one(bias: bool, dtype: torch.dtype) -> None:
    conv = DisplacementConv(8, bias=bias).to(dtype)
    x = torch.randn(2, 8, 6, 5, 7, dtype=dtype)
    plain = nn.functional.conv3d(x, conv.weight, conv.bias, padding=1)
    with torch.no_grad():
        torch.testing.assert_close(conv(x), plain)
    assert conv(x).requires_grad
    torch.testing.assert_close(conv(x), plain)


def test_convolution_of_parts_is_that_of_the_whole() -> None:
    conv, x = DisplacementConv(12), torch.randn(2, 12, 6, 5, 7)
    parts = x.split([5, 4, 3], dim=1)
    torch.testing.assert_close(conv(*parts), conv(x))
    with torch.no_grad():
        torch.testing.assert_close(conv(*parts), conv(x))


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("channels", [(16, 1), (1, 3), (4, 4, 3)])
def test_joined_volumes_are_their_channels_in_the_order_of_the_first(
    first: torch.memory_format, second: torch.memory_format, channels: tuple[int, ...]
) -> None:
    parts = [torch.rand(2, count, 3, 4, 5).contiguous(memory_format=second) for count in channels]
    parts[0] = parts[0].contiguous(memory_format=first)
    joined = join(*parts)
    assert torch.equal(joined, torch.cat(parts, dim=1))
    if channels[0] > 1:
        assert joined.is_contiguous(memory_format=first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_mean_of_many_voxels_is_a_number_in_any_precision(dtype: torch.dtype) -> None:
    x = torch.tensor([1.5, -3.0]).view(1, 2, 1, 1, 1).expand(3, 2, 40, 40, 40).to(dtype)
    # Of bfloat16 the sum is rounded, and then the mean.
    torch.testing.assert_close(voxel_mean(x).double(), torch.tensor([[1.5, -3.0]] * 3).double(), rtol=2.0**-7, atol=0)


@pytest.mark.parametrize("passes", [1, 2])
@torch.no_grad()
def test_moving_features_are_let_go_once_they_are_warped_for_the_last_time(passes: int) -> None:
    """Also those of the levels that are done; what a later pass warps again is held."""
    encoder, made = Encoder([conv_block(1, 4), conv_block(4, 6)]), []
    convs = [flow_conv(8), flow_conv(12)]
    alive: list[int] = []

    def encode(image: Tensor) -> list[Tensor]:
        features: list[Tensor] = encoder(image)
        made.append([weakref.ref(level) for level in features])
        return features

    def watching(conv: nn.Module) -> Callable[[Tensor], Tensor]:
        def estimate(joined: Tensor) -> Tensor:
            alive.append(sum(level() is not None for level in made[0]))
            flow: Tensor = conv(joined)
            return flow

        return estimate

    moving, fixed = torch.rand(2, 1, 1, 8, 8, 8, generator=torch.manual_seed(0))
    register_pyramid(encode, [watching(conv) for conv in convs], moving, fixed, FixedIterations(passes))  # type: ignore[arg-type]
    assert alive == {1: [1, 0], 2: [2, 2, 1, 1]}[passes]
