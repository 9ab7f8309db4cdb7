"""SM-GICNet against its paper: wavelets, layers and levels written out a second time, and its two directions."""

from itertools import pairwise

import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from scipy.linalg import expm
from torch import Tensor, nn

from iregzoo.fields import identity, integrate, inverse_error, resize, warp
from iregzoo.iteration import FixedIterations
from iregzoo.networks import SMGICNet
from iregzoo.networks.sm_gicnet import (
    AttentionGate,
    Decoder,
    ImageStem,
    LowStem,
    ResidualBlock,
    ResidualUNet,
    VelocityEstimator,
    WaveletStem,
    wavelet_levels,
)
from iregzoo.registration import Registration

SHAPE = (16, 32, 16)


def build(**settings: object) -> SMGICNet:
    """A small one in float64, with velocities of about a voxel."""
    torch.manual_seed(0)
    network = SMGICNet(**{"channels": 4, **settings}).double().eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for estimator in network.estimators:
            estimator.head.weight.normal_(std=0.5)
    return network


def pair(batch: int = 1) -> tuple[Tensor, Tensor]:
    moving, fixed = torch.rand(2, batch, 1, *SHAPE, generator=torch.manual_seed(1), dtype=torch.float64)
    return moving, fixed


def volume(channels: int, *shape: int, seed: int = 2) -> Tensor:
    return torch.randn(2, channels, *shape, generator=torch.manual_seed(seed), dtype=torch.float64)


def fields(result: Registration) -> list[Tensor]:
    assert result.inverse is not None
    return [result.displacement, result.inverse, *result.pyramid]


# --- the paper's layers, written out


def conv(x: Tensor, layer: nn.Module, **how: int) -> Tensor:
    assert layer.bias is None
    return F.conv3d(x, layer.weight, **how)


def active(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def plain_residual(block: ResidualBlock, x: Tensor) -> Tensor:
    return active(x + conv(active(conv(x, block.first[0], padding=1)), block.second, padding=1))


def plain_gate(gate: AttentionGate, x: Tensor, gating: Tensor) -> Tensor:
    key = torch.einsum("oi,bidhw->bodhw", gate.feature.weight[:, :, 0, 0, 0], x[..., ::2, ::2, ::2])
    query = torch.einsum("oi,bidhw->bodhw", gate.gate.weight[:, :, 0, 0, 0], gating)
    logits = torch.einsum("i,bidhw->bdhw", gate.weight.weight[0, :, 0, 0, 0], (key + query).clamp(min=0))[:, None]
    weights = 1 / (1 + torch.exp(-logits))
    return x * F.interpolate(weights, scale_factor=2, mode="trilinear", align_corners=True)


def plain_decoder(block: Decoder, x: Tensor, skip: Tensor) -> Tensor:
    x = plain_residual(block.residual, x)
    if block.gate is not None:
        skip = plain_gate(block.gate, skip, x)
    assert block.up[0].bias is None
    up = active(F.conv_transpose3d(x, block.up[0].weight, stride=2))
    return active(conv(torch.cat((up, skip), dim=1), block.merge[0], padding=1))


def plain_unet(unet: ResidualUNet, x: Tensor) -> Tensor:
    scales = [x]
    for convolution, _, residual in unet.down:
        scales.append(plain_residual(residual, active(conv(scales[-1], convolution, stride=2, padding=1))))
    x = scales.pop()
    for block, skip in zip(unet.up, reversed(scales), strict=True):
        x = plain_decoder(block, x, skip)
    return x


def plain_stem(stem: nn.Module, warped: Tensor, fixed: Tensor, field: Tensor) -> Tensor:
    if isinstance(stem, LowStem):
        convolution, _, residual = stem.layers
        return plain_residual(residual, active(conv(torch.cat((warped, fixed), dim=1), convolution, padding=1)))
    if isinstance(stem, WaveletStem):
        low = torch.stack((warped[:, 0], fixed[:, 0], *field.unbind(1)), dim=1)
        energy = torch.stack((warped[:, 1], fixed[:, 1]), dim=1)
        both = (active(conv(x, layers[0], padding=1)) for x, layers in ((low, stem.low), (energy, stem.energy)))
        return plain_residual(stem.residual, torch.cat(tuple(both), dim=1))
    assert isinstance(stem, ImageStem)
    difference = (warped - fixed).abs()
    weights = torch.stack([0.5 * one / one.max() + 0.5 for one in difference])
    x = torch.cat((weights * warped, weights * fixed, field), dim=1)
    first, _, second, _ = stem.layers
    return active(conv(active(conv(x, first, padding=1)), second, padding=1))


def plain_velocity(estimator: VelocityEstimator, warped: Tensor, fixed: Tensor, field: Tensor) -> Tensor:
    x = conv(plain_unet(estimator.unet, plain_stem(estimator.stem, warped, fixed, field)), estimator.head, padding=1)
    return estimator.reach * x / (1 + x.abs())


def plain_wavelets(image: np.ndarray) -> list[np.ndarray]:
    """Low band and energy of three levels as PyWavelets has them, not rescaled."""
    levels = []
    for _ in range(3):
        bands = pywt.dwtn(image, "haar")
        image = bands.pop("aaa")
        levels.append(np.stack((image, np.sqrt(sum(band**2 for band in bands.values())))))
    return levels


# --- size


def test_parameters_are_counted() -> None:
    network = SMGICNet()
    counts = [sum(parameter.numel() for parameter in estimator.parameters()) for estimator in network.estimators]
    assert counts == [261_344, 464_368, 666_096, 645_984]
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_037_792
    assert not any("bias" in name for name, _ in network.named_parameters())


def test_parameters_are_the_same_whatever_the_levels() -> None:
    few = SMGICNet(channels=4, levels=2)
    few.load_state_dict(SMGICNet(channels=4).state_dict())


def test_stride_lets_every_level_halve_to_the_end() -> None:
    assert SMGICNet.stride == 16
    image = torch.rand(1, 1, 16, 16, 16, generator=torch.manual_seed(3))
    found = SMGICNet(channels=4).eval()(image, image.flip(2))
    assert [level.shape[2] for level in found.pyramid] == [2, 4, 8, 16]
    assert all(field.isfinite().all() for field in fields(found))


def test_velocities_reach_as_far_as_the_levels_see() -> None:
    network = SMGICNet()
    assert [estimator.reach for estimator in network.estimators] == [8.0, 4.0, 4.0, 4.0]


@torch.no_grad()
def test_untrained_network_gives_nearly_the_identity() -> None:
    torch.manual_seed(0)
    found = SMGICNet()(*(image.float() for image in pair()), both=False)
    assert 0 < found.displacement.abs().max() < 0.1


# --- wavelets


def test_wavelets_are_those_of_pywavelets() -> None:
    images = pair(2)[0]
    found = wavelet_levels(images)
    assert [tuple(level.shape) for level in found] == [(2, 2, 8, 16, 8), (2, 2, 4, 8, 4), (2, 2, 2, 4, 2)]
    for one in range(2):
        for level, (values, expected) in enumerate(zip(found, plain_wavelets(images[one, 0].numpy()), strict=True), 1):
            np.testing.assert_allclose(values[one], expected / 8 ** (level / 2), rtol=0, atol=1e-12)


def test_low_band_is_the_average_of_the_voxels() -> None:
    image = pair()[0]
    for level, found in enumerate(wavelet_levels(image), 1):
        torch.testing.assert_close(found[:, :1], F.avg_pool3d(image, 2**level), rtol=0, atol=1e-12)


def test_wavelets_keep_the_energy_of_the_image() -> None:
    image = pair()[0]
    bands = wavelet_levels(image)
    unscaled = [8 ** (level / 2) * band for level, band in enumerate(bands, 1)]
    energy = sum((band[:, 1].square().sum() for band in unscaled), unscaled[-1][:, 0].square().sum())
    torch.testing.assert_close(energy, image.square().sum(), rtol=1e-12, atol=0)


def test_energy_has_a_gradient_where_the_image_is_flat() -> None:
    image = torch.zeros(1, 1, *SHAPE)
    image[..., 9] = 1
    image.requires_grad_()
    (gradient,) = torch.autograd.grad(sum(level[:, 1].sum() for level in wavelet_levels(image)), image)
    assert gradient.isfinite().all()
    assert gradient[..., 8:10].abs().max() > 0


def test_wavelets_are_not_rounded_under_autocast() -> None:
    image = pair()[0].float()
    with torch.autocast("cpu", torch.bfloat16):
        found = wavelet_levels(image)
    for level, expected in zip(found, wavelet_levels(image), strict=True):
        assert torch.equal(level, expected)


# --- layers


@torch.no_grad()
def test_attention_gate_weighs_voxels_and_not_channels() -> None:
    torch.manual_seed(3)
    gate = AttentionGate(6).double()
    x, gating = volume(6, 8, 4, 6), volume(6, 4, 2, 3, seed=4)
    found = gate(x, gating)
    torch.testing.assert_close(found, plain_gate(gate, x, gating), rtol=0, atol=1e-12)
    weights = found / x
    torch.testing.assert_close(weights, weights[:, :1].expand_as(weights))
    assert weights[:, 0].std() > 1e-3
    assert ((weights > 0) & (weights < 1)).all()


@pytest.mark.parametrize(("depth", "gated"), [(1, False), (2, False), (3, False), (3, True)])
@torch.no_grad()
def test_unet_is_the_papers(depth: int, gated: bool) -> None:
    torch.manual_seed(3)
    unet = ResidualUNet(4, depth, gated).double()
    # Appendix A: as many residual blocks as stride-2 convolutions, and as many again as upsamplings.
    assert sum(isinstance(module, ResidualBlock) for module in unet.modules()) == 2 * depth
    assert sum(isinstance(module, AttentionGate) for module in unet.modules()) == depth * gated
    x = volume(4, 16, 8, 8)
    torch.testing.assert_close(unet(x), plain_unet(unet, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("level", "stem", "depth", "gated"), [(1, LowStem, 1, False), (4, ImageStem, 3, True)])
def test_levels_have_the_papers_networks(level: int, stem: type[nn.Module], depth: int, gated: bool) -> None:
    estimator = SMGICNet().estimators[level - 1]
    assert isinstance(estimator.stem, stem)
    assert len(estimator.unet.down) == len(estimator.unet.up) == depth
    assert all((block.gate is not None) == gated for block in estimator.unet.up)


@torch.no_grad()
def test_equal_images_are_weighted_by_half() -> None:
    torch.manual_seed(3)
    stem = ImageStem(4).double()
    image, field = volume(1, 4, 4, 4), volume(3, 4, 4, 4)
    first, _, second, _ = stem.layers
    x = torch.cat((image / 2, image / 2, field), dim=1)
    expected = active(conv(active(conv(x, first, padding=1)), second, padding=1))
    torch.testing.assert_close(stem(image, image, field), expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_velocity_stays_within_reach() -> None:
    network = build(reach=(0.5, 1.0, 2.0, 3.0))
    for estimator, reach in zip(network.estimators, (0.5, 1.0, 2.0, 3.0), strict=True):
        estimator.head.weight.mul_(1e4)
        channels = {LowStem: 1, WaveletStem: 2, ImageStem: 1}[type(estimator.stem)]
        velocity = estimator(volume(channels, 8, 8, 8), volume(channels, 8, 8, 8, seed=4), volume(3, 8, 8, 8))
        assert 0.9 * reach < velocity.abs().max() <= reach


# --- the levels


@torch.no_grad()
def test_levels_compose_as_the_paper_writes() -> None:
    network = build()
    moving, fixed = pair(batch=2)
    result = network(moving, fixed)
    inputs = []
    for image in (moving, fixed):
        bands = [torch.stack([torch.from_numpy(plain_wavelets(one[0].numpy())[i]) for one in image]) for i in range(3)]
        scaled = [band / 8 ** ((i + 1) / 2) for i, band in enumerate(bands)]
        inputs.append([scaled[2][:, :1], scaled[1], scaled[0], image])
    displacement = inverse = torch.zeros(2, 3, 2, 4, 2, dtype=torch.float64)
    for level, (estimator, found) in enumerate(zip(network.estimators, result.pyramid, strict=True)):
        if level:
            displacement, inverse = (
                2 * F.interpolate(field, scale_factor=2, mode="trilinear", align_corners=True)
                for field in (displacement, inverse)
            )
        warped, target = warp(inputs[0][level], displacement), inputs[1][level]
        velocity = plain_velocity(estimator, warped, target, displacement / (1, 2, 4, 8)[level])
        assert 0.1 < velocity.abs().max() < estimator.reach
        forward, backward = integrate(velocity, 7), integrate(-velocity, 7)
        displacement = forward + warp(displacement, forward, padding="border")
        inverse = inverse + warp(backward, inverse, padding="border")
        torch.testing.assert_close(found, displacement, rtol=0, atol=1e-9)
    torch.testing.assert_close(result.displacement, displacement, rtol=0, atol=1e-9)
    torch.testing.assert_close(result.inverse, inverse, rtol=0, atol=1e-9)


class Given(nn.Module):
    """A level that always sees the same velocity (1, 3, *shape)."""

    def __init__(self, velocity: Tensor) -> None:
        super().__init__()
        self.velocity = velocity

    def forward(self, warped: Tensor, fixed: Tensor, field: Tensor) -> Tensor:
        return self.velocity.expand_as(field)


def give(velocities: list[Tensor]) -> Registration:
    network = SMGICNet(channels=2).eval()
    network.estimators = nn.ModuleList(map(Given, velocities))
    image = torch.zeros(1, 1, *velocities[-1].shape[2:], dtype=velocities[0].dtype)
    result: Registration = network(image, image)
    return result


def test_images_are_warped_by_the_first_level_first() -> None:
    """A shift at level 2 and a turn at level 4 in closed form; in the other order they give another map."""
    shape = (32, 32, 32)
    zeros = [torch.zeros(1, 3, *[size // scale for size in shape], dtype=torch.float64) for scale in (8, 4, 2, 1)]
    shift = torch.tensor([0.7, -0.5, 0.4], dtype=torch.float64).view(1, 3, 1, 1, 1)
    matrix = torch.tensor([[0.05, 0.2, 0.0], [-0.2, 0.0, 0.1], [0.0, -0.1, -0.05]], dtype=torch.float64)
    places = identity(shape, dtype=torch.float64) - 15.5
    turn = torch.einsum("ij,bj...->bi...", matrix, places)
    result = give([zeros[0], zeros[1] + shift, zeros[2], turn])
    forward, backward = (
        torch.einsum("ij,bj...->bi...", torch.from_numpy(expm(sign * matrix.numpy())), points)
        for sign, points in ((1, places), (-1, places - 4 * shift))
    )
    inside = (..., *[slice(8, -8)] * 3)
    # warped(x) = moving(φ(x)): φ_4 = up(φ_3) ∘ exp(v_4) turns x first and then looks 4 shifts further.
    expected = forward + 4 * shift - places
    torch.testing.assert_close(result.displacement[inside], expected[inside], rtol=0, atol=5e-3)
    assert result.inverse is not None
    torch.testing.assert_close(result.inverse[inside], (backward - places)[inside], rtol=0, atol=5e-3)


def smooth_velocity(shape: tuple[int, ...], size: float, phase: int) -> Tensor:
    """(1, 3, *shape) of about so many voxels, none at the border."""
    angles = [identity(shape)[:, axis] / (shape[axis] - 1) * torch.pi for axis in range(3)]
    window = angles[0].sin() * angles[1].sin() * angles[2].sin()
    return size * torch.stack([window * torch.cos(angles[(axis + 1) % 3] + phase + axis) for axis in range(3)], dim=1)


def test_inverse_is_the_inverse_across_the_levels() -> None:
    sizes = (0.1, 0.25, 0.5, 2.0)
    shapes = [(64 // scale, 48 // scale, 64 // scale) for scale in (8, 4, 2, 1)]
    result = give([smooth_velocity(*level) for level in zip(shapes, sizes, range(4), strict=True)])
    assert result.inverse is not None
    assert result.displacement.abs().max() > 2
    inside = (..., *[slice(2, -2)] * 3)
    for there, back in ((result.displacement, result.inverse), (result.inverse, result.displacement)):
        assert inverse_error(there, back)[inside].max() < 0.05


@torch.no_grad()
def test_image_warped_by_all_levels_is_warped_by_one_after_the_other() -> None:
    shapes = [(48 // scale,) * 3 for scale in (8, 4, 2, 1)]
    velocities = [smooth_velocity(*level) for level in zip(shapes, (0.3, 0.5, 1.0, 3.0), (0, 1, 2, 5), strict=True)]
    result = give(velocities)
    before, last = resize(result.pyramid[-2], shapes[-1]), integrate(velocities[-1])
    image = (identity(shapes[-1]) / 6).sin().sum(1, keepdim=True)  # interpolated well
    inside = (..., *[slice(8, -8)] * 3)
    once, twice, reverse = (
        warped[inside]
        for warped in (
            warp(image, result.displacement),
            warp(warp(image, before), last),
            warp(warp(image, last), before),
        )
    )
    assert (once - twice).abs().max() < 0.02
    assert (once - reverse).abs().max() > 0.1


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@torch.no_grad()
def test_fewer_levels_are_the_first_ones(levels: int) -> None:
    moving, fixed = pair()
    whole = build()(moving, fixed)
    network = build(levels=levels)
    found = network(moving, fixed)
    assert network.levels == len(found.pyramid) == levels
    for level, expected in zip(found.pyramid, whole.pyramid, strict=False):
        assert torch.equal(level, expected)
    scale = 2 ** (4 - levels)
    last = found.pyramid[-1]
    resized = scale * F.interpolate(last, SHAPE, mode="trilinear", align_corners=True)
    torch.testing.assert_close(found.displacement, resized, rtol=0, atol=1e-12)
    assert found.inverse is not None
    assert found.inverse.shape == found.displacement.shape
    # Level 1 of the inverse is the exponential of the negated velocity.
    if levels == 1:
        low = [wavelet_levels(image)[2][:, :1] for image in (moving, fixed)]
        velocity = network.estimators[0](*low, torch.zeros_like(last))
        torch.testing.assert_close(found.inverse, resize(integrate(-velocity), SHAPE), rtol=0, atol=1e-9)


def test_levels_that_do_not_run_have_no_gradient() -> None:
    network = build(levels=2).train()
    network(*pair()).displacement.square().sum().backward()
    for level, estimator in enumerate(network.estimators, 1):
        assert all((parameter.grad is not None) == (level <= 2) for parameter in estimator.parameters())


@pytest.mark.parametrize("levels", [0, 5, -1])
def test_number_of_levels_that_there_is_not_is_refused(levels: int) -> None:
    with pytest.raises(ValueError, match=rf"levels={levels}; expected 1 to 4"):
        SMGICNet(channels=2, levels=levels)
    network = SMGICNet(channels=2)
    with pytest.raises(ValueError, match=rf"levels={levels}; expected 1 to 4"):
        network.levels = levels
    assert network.levels == 4


@pytest.mark.parametrize("channels", [0, 3])
def test_odd_channels_are_refused(channels: int) -> None:
    with pytest.raises(ValueError, match=rf"channels={channels}; expected an even number"):
        SMGICNet(channels=channels)


@pytest.mark.parametrize("reach", [(8.0, 4.0, 4.0), (8.0, 4.0, 4.0, 0.0)])
def test_reach_that_is_not_one_of_each_level_is_refused(reach: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"reach=\(8.0, 4.0, 4.0.*expected 4 ranges above 0"):
        SMGICNet(channels=2, reach=reach)


@torch.no_grad()
def test_steps_are_those_of_the_exponential() -> None:
    moving, fixed = pair()
    coarse = build(steps=0, levels=1)(moving, fixed).pyramid[0]
    low = [wavelet_levels(image)[2][:, :1] for image in (moving, fixed)]
    torch.testing.assert_close(coarse, build().estimators[0](*low, torch.zeros_like(coarse)), rtol=0, atol=1e-12)


# --- both ways


@torch.no_grad()
def test_swapped_images_give_swapped_results_exactly() -> None:
    torch.manual_seed(0)
    network = build().float()
    moving, fixed = (image.float() for image in pair(batch=2))
    there, back = network(moving, fixed, both=True), network(fixed, moving, both=True)
    for found, other in ((there, back.opposite), (there.opposite, back)):
        for field, expected in zip(fields(found), fields(other), strict=True):
            assert torch.equal(field, expected)
    assert (there.displacement - back.displacement).abs().max() > 0.1


@torch.no_grad()
def test_both_ways_at_once_are_each_way_alone() -> None:
    network = build()
    moving, fixed = pair(batch=2)
    both = network(moving, fixed, FixedIterations(1), both=True)
    for found, images in ((both, (moving, fixed)), (both.opposite, (fixed, moving))):
        alone = network(*images)
        assert alone.opposite is None
        for field, expected in zip(fields(found), fields(alone), strict=True):
            torch.testing.assert_close(field, expected, rtol=0, atol=1e-9)
    assert both.opposite.opposite is None


@torch.no_grad()
def test_training_goes_both_ways_unless_told_otherwise() -> None:
    network = build()
    images = pair()
    for training in (False, True):
        network.train(training)
        assert (network(*images).opposite is not None) == training
        assert network(*images, both=True).opposite is not None
        assert network(*images, both=False).opposite is None


def test_levels_are_coarse_to_fine() -> None:
    sizes = [level.shape[2:] for level in build()(*pair()).pyramid]
    assert all(fine == torch.Size(2 * size for size in coarse) for coarse, fine in pairwise(sizes))
