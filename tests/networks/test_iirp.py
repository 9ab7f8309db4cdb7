"""IIRP-Net against its paper: size, layers, and RP-Net written out a second time with scipy and torch's functions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import map_coordinates
from torch import Tensor, nn

from iregzoo.fields import resize, warp
from iregzoo.iteration import TCI, FixedIterations, IterStop
from iregzoo.networks import IIRPNet
from iregzoo.registration import Registration
from iregzoo.similarity import ncc

SHAPE = (16, 24, 32)


def build(seed: int = 0) -> IIRPNet:
    """In float64, with residuals of about a voxel, so that sampling, padding and order of composition all show."""
    torch.manual_seed(seed)
    network = IIRPNet().double().eval()
    with torch.no_grad():
        for estimator in network.estimators:
            estimator[-1].weight.mul_(40)
            estimator[-1].bias.copy_(torch.tensor([0.8, -0.6, 1.1]))
    return network


def pair(batch: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.manual_seed(1)
    moving, fixed = torch.rand(2, batch, 1, *SHAPE, generator=generator, dtype=torch.float64)
    return moving, fixed


# --- the paper's network, written out


def conv(x: Tensor, layer: nn.Module) -> Tensor:
    return F.conv3d(x, layer.weight, layer.bias, padding=1)


def plain_features(network: IIRPNet, image: Tensor) -> list[Tensor]:
    features = []
    for level, block in enumerate(network.encoder.blocks):
        if level:
            image = F.avg_pool3d(image, kernel_size=2, stride=2)
        image = F.leaky_relu(conv(image, block[0]), 0.1)
        features.append(image)
    return features


def plain_estimate(estimator: nn.Module, moving: Tensor, fixed: Tensor) -> Tensor:
    first, *residual_blocks, halve, flow = estimator
    x = F.leaky_relu(conv(torch.cat((moving, fixed), dim=1), first[0]), 0.1)
    assert len(residual_blocks) == 2
    for block in residual_blocks:
        x = F.leaky_relu(conv(x, block.conv) + x, 0.1)
    return conv(conv(x, halve), flow)


def scipy_warp(image: Tensor, displacement: Tensor) -> Tensor:
    """image(x + u(x)) of one pair, trilinear, zeros outside."""
    places = np.indices(image.shape[2:]) + displacement[0].numpy()
    channels = [map_coordinates(c, places, order=1, mode="grid-constant") for c in image[0].numpy()]
    return torch.from_numpy(np.array(channels))[None]


def scipy_double(displacement: Tensor) -> Tensor:
    """To twice the shape, corners on corners, values twice as large."""
    axes = [np.linspace(0, size - 1, 2 * size) for size in displacement.shape[2:]]
    places = np.array(np.meshgrid(*axes, indexing="ij"))
    return 2 * torch.from_numpy(np.array([map_coordinates(c, places, order=1) for c in displacement[0].numpy()]))[None]


def plain_rp_net(network: IIRPNet, moving: Tensor, fixed: Tensor) -> list[Tensor]:
    """Displacements coarse to fine."""
    moving_features, fixed_features = plain_features(network, moving), plain_features(network, fixed)
    displacement = plain_estimate(network.estimators[3], moving_features[3], fixed_features[3])
    displacements = [displacement]
    for level in (2, 1, 0):
        displacement = scipy_double(displacement)
        warped = scipy_warp(moving_features[level], displacement)
        residual = plain_estimate(network.estimators[level], warped, fixed_features[level])
        displacement = scipy_warp(displacement, residual) + residual
        displacements.append(displacement)
    return displacements


# --- size and layers


def test_parameters_are_those_of_the_published_checkpoint() -> None:
    assert sum(parameter.numel() for parameter in IIRPNet().parameters()) == 419_964


def test_stride_is_that_of_four_levels() -> None:
    assert IIRPNet().stride == 8


@torch.no_grad()
def test_encoder_is_the_papers() -> None:
    network = build()
    image = pair()[0] - 0.5
    features = network.encoder(image)
    assert [level.shape[1] for level in features] == [8, 16, 32, 32]
    assert [tuple(level.shape[2:]) for level in features] == [
        (16, 24, 32),
        (8, 12, 16),
        (4, 6, 8),
        (2, 3, 4),
    ]
    for found, expected in zip(features, plain_features(network, image), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("level", range(4))
@torch.no_grad()
def test_flow_estimator_is_the_papers(level: int) -> None:
    network = build()
    width, channels = [16, 32, 32, 32][level], [8, 16, 32, 32][level]
    estimator = network.estimators[level]
    sizes = [tuple(m.weight.shape[:2]) for m in estimator.modules() if isinstance(m, nn.Conv3d)]
    half = width // 2
    assert sizes == [(width, 2 * channels), (width, width), (width, width), (half, width), (3, half)]
    moving, fixed = torch.randn(2, 1, channels, 4, 5, 6, generator=torch.manual_seed(2), dtype=torch.float64)
    found = estimator(torch.cat((moving, fixed), dim=1))
    torch.testing.assert_close(found, plain_estimate(estimator, moving, fixed), rtol=0, atol=1e-11)


# --- the pyramid


@torch.no_grad()
def test_one_iteration_is_rp_net() -> None:
    network = build()
    moving, fixed = pair()
    found = network(moving, fixed, FixedIterations(1))
    for level, expected in zip(found.pyramid, plain_rp_net(network, moving, fixed), strict=True):
        assert expected.abs().mean() > 0.5
        torch.testing.assert_close(level, expected, rtol=0, atol=1e-8)
    assert torch.equal(found.displacement, found.pyramid[-1])


@torch.no_grad()
def test_pyramid_goes_from_coarse_to_fine() -> None:
    found = build()(*pair(batch=2))
    shapes = [tuple(level.shape) for level in found.pyramid]
    assert shapes == [(2, 3, 2, 3, 4), (2, 3, 4, 6, 8), (2, 3, 8, 12, 16), (2, 3, 16, 24, 32)]
    assert len(found.iterations) == len(found.scores) == 4
    assert found.inverse is None


@torch.no_grad()
def test_moving_and_fixed_are_told_apart() -> None:
    network = build()
    moving, fixed = pair()
    there, back = network(moving, fixed, FixedIterations()), network(fixed, moving, FixedIterations())
    assert (there.displacement - back.displacement).abs().max() > 0.1


def test_every_parameter_gets_a_gradient_that_is_not_zero() -> None:
    network = build().train()
    network(*pair()).displacement.square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
def test_smallest_image_is_registered() -> None:
    image = torch.rand(1, 1, 8, 8, 8, generator=torch.manual_seed(3))
    found = IIRPNet()(image, image.flip(2))
    assert found.displacement.shape == (1, 3, 8, 8, 8)
    assert found.displacement.isfinite().all()


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_image_without_voxels_is_refused(axis: int) -> None:
    shape = [1, 1, 8, 8, 8]
    shape[axis] = 0
    with pytest.raises(ValueError, match=r"\(1, 1, .*0.*\).*multiples of 8"):
        IIRPNet()(torch.zeros(shape), torch.zeros(shape))


# --- iteration at inference


def full_resolution_score(displacement: Tensor, moving: Tensor, fixed: Tensor) -> Tensor:
    return ncc(warp(moving, resize(displacement, SHAPE)), fixed)


@torch.no_grad()
def test_levels_are_scored_by_global_ncc_at_full_resolution() -> None:
    network = build()
    moving, fixed = pair(batch=2)
    found = network(moving, fixed, TCI(max_iterations=3, stability=-1.0))
    for level, history in zip(found.pyramid, found.scores, strict=True):
        assert history.shape == (3, 2)
        torch.testing.assert_close(history[-1], full_resolution_score(level, moving, fixed))


@torch.no_grad()
def test_iterstop_that_refuses_all_keeps_the_first_estimate_of_the_coarsest_level() -> None:
    network = build()
    moving, fixed = pair()
    found = network(moving, fixed, IterStop(threshold=2.0))
    coarse = plain_rp_net(network, moving, fixed)[0]
    torch.testing.assert_close(found.pyramid[0], coarse, rtol=0, atol=1e-8)
    expected = scipy_double(scipy_double(scipy_double(coarse)))
    torch.testing.assert_close(found.displacement, expected, rtol=0, atol=1e-8)
    assert [count.tolist() for count in found.iterations] == [[1], [0], [0], [0]]


@torch.no_grad()
def test_refinements_reach_the_next_from_the_last() -> None:
    network = build()
    moving, fixed = pair()
    twice = network(moving, fixed, FixedIterations(2)).pyramid[0]
    moving_features, fixed_features = (plain_features(network, image)[3] for image in (moving, fixed))
    once = plain_estimate(network.estimators[3], moving_features, fixed_features)
    residual = plain_estimate(network.estimators[3], scipy_warp(moving_features, once), fixed_features)
    torch.testing.assert_close(twice, scipy_warp(once, residual) + residual, rtol=0, atol=1e-8)


def test_iterstop_is_the_networks_own_controller_when_not_training() -> None:
    network = IIRPNet()
    assert network.controller == IterStop()
    with torch.no_grad():
        own, given = (build()(*pair(), controller) for controller in (None, IterStop()))
    assert torch.equal(own.displacement, given.displacement)
    assert IIRPNet(controller=TCI()).controller == TCI()


@torch.no_grad()
def test_own_controller_is_used_at_inference_and_not_in_training() -> None:
    network = IIRPNet(controller=FixedIterations(3))
    image = torch.rand(1, 1, 8, 8, 8)

    def counts(found: Registration) -> list[list[int]]:
        return [count.tolist() for count in found.iterations]

    assert counts(network.eval()(image, image)) == [[3]] * 4
    assert counts(network.train()(image, image)) == [[1]] * 4


# --- other pyramids


@torch.no_grad()
def test_number_of_levels_is_a_setting() -> None:
    network = IIRPNet(channels=(4, 6), widths=(8, 10)).eval()
    assert network.stride == 2
    image = torch.rand(1, 1, 6, 4, 10)
    assert [tuple(level.shape[2:]) for level in network(image, image).pyramid] == [(3, 2, 5), (6, 4, 10)]


def test_channels_and_widths_of_different_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="3 channels and 2 widths"):
        IIRPNet(channels=(8, 16, 32), widths=(16, 32))
