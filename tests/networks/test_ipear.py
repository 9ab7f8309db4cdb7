"""iPEAR against its paper: size, layers and first passes written out a second time, and its iteration."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iregzoo.fields import resize, warp
from iregzoo.iteration import TCI, FixedIterations, IterStop
from iregzoo.networks import IIRPNet, IPEARNet, ipear
from iregzoo.networks.ipear import FARM, NeighbourhoodAttention, SpatialAttention, SqueezeExcitation
from iregzoo.similarity import ncc

SHAPE = (16, 24, 16)


def build() -> IPEARNet:
    """In float64, with residuals of about a voxel."""
    torch.manual_seed(0)
    network = IPEARNet().double().eval()
    with torch.no_grad():
        for farm in network.estimators:
            farm.flow.weight.mul_(4)
            farm.flow.bias.copy_(torch.tensor([0.8, -0.6, 1.1]))
    return network


def pair(batch: int = 1) -> tuple[Tensor, Tensor]:
    moving, fixed = torch.rand(2, batch, 1, *SHAPE, generator=torch.manual_seed(1), dtype=torch.float64)
    return moving, fixed


def volume(channels: int, *shape: int) -> Tensor:
    return torch.randn(2, channels, *shape, generator=torch.manual_seed(2), dtype=torch.float64)


def conv(x: Tensor, layer: nn.Module) -> Tensor:
    return F.conv3d(x, layer.weight, layer.bias, padding=1)


# --- the paper's layers, written out


def plain_attention(block: NeighbourhoodAttention, x: Tensor) -> Tensor:
    """With every pair of voxels weighed and those outside the 3×3×3 windows masked."""
    channels, *shape = x.shape[1:]
    tokens = x.flatten(2).transpose(1, 2)
    normed = F.layer_norm(tokens, (channels,), block.norm.weight, block.norm.bias)
    query, key, value = F.linear(normed, block.project.weight, block.project.bias).chunk(3, dim=-1)
    places = torch.cartesian_prod(*[torch.arange(size) for size in shape])
    centres = torch.stack([p.clamp(1, max(s - 2, 1)) for p, s in zip(places.T, shape, strict=True)], dim=1)
    near = ((places[None] - centres[:, None]).abs() <= 1).all(-1)
    logits = (query @ key.transpose(1, 2) / channels**0.5).masked_fill(~near, -torch.inf)
    return (tokens + logits.softmax(-1) @ value).transpose(1, 2).view_as(x)


def plain_seb(block: SqueezeExcitation, x: Tensor) -> Tensor:
    descriptor = x.flatten(2).mean(2)
    weights = torch.sigmoid(F.leaky_relu(descriptor @ block.squeeze.weight.T, 0.1) @ block.excite.weight.T)
    return torch.einsum("bcdhw,bc->bcdhw", x, weights)


def plain_sab(block: SpatialAttention, x: Tensor) -> Tensor:
    heat = conv(torch.stack((x.sum(1) / x.shape[1], x.max(dim=1).values), dim=1), block.conv)
    return torch.einsum("bcdhw,bdhw->bcdhw", x, 1 / (1 + torch.exp(-heat[:, 0])))


def plain_rp(block: nn.Module, x: Tensor) -> Tensor:
    first, *residual_blocks, last = block
    x = F.leaky_relu(conv(x, first[0]), 0.1)
    assert len(residual_blocks) == 2
    for residual in residual_blocks:
        x = F.leaky_relu(conv(x, residual.conv) + x, 0.1)
    return conv(x, last)


def plain_farm(farm: FARM, x: Tensor) -> Tensor:
    seb, sab = farm.attention
    return conv(torch.cat((plain_sab(sab, plain_seb(seb, x)), plain_rp(farm.residual, x)), dim=1), farm.flow)


def plain_features(network: IPEARNet, image: Tensor) -> list[Tensor]:
    features = []
    for level, block in enumerate(network.encoder.blocks):
        if level:
            image = F.avg_pool3d(image, kernel_size=2, stride=2)
        image = F.leaky_relu(conv(image, block[0]), 0.1)
        if level:
            image = plain_attention(block[2], image)
        features.append(image)
    return features


# --- size and layers


def test_parameters_are_those_of_the_paper() -> None:
    count = sum(parameter.numel() for parameter in IPEARNet().parameters())
    assert count == 508_680
    assert count == pytest.approx(508.7e3, rel=1e-3)


def test_stride_is_that_of_four_levels() -> None:
    assert IPEARNet().stride == 8


@torch.no_grad()
def test_encoder_has_attention_in_all_but_the_first_block() -> None:
    network = build()
    image = pair()[0] - 0.5
    features = network.encoder(image)
    assert [level.shape[1] for level in features] == [16, 32, 32, 32]
    assert [tuple(level.shape[2:]) for level in features] == [(16, 24, 16), (8, 12, 8), (4, 6, 4), (2, 3, 2)]
    for found, expected in zip(features, plain_features(network, image), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [(5, 4, 3), (2, 3, 4), (1, 1, 1)])
@torch.no_grad()
def test_attention_takes_a_short_axis_as_a_whole(shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    block = NeighbourhoodAttention(8).double()
    x = volume(8, *shape)
    torch.testing.assert_close(block(x), plain_attention(block, x), rtol=0, atol=1e-12)


@torch.no_grad()
def test_squeeze_excitation_is_the_papers() -> None:
    torch.manual_seed(3)
    block = SqueezeExcitation(32, 16).double()
    assert [tuple(p.shape) for p in block.parameters()] == [(2, 32), (32, 2)]  # W1, W2, no biases
    x = volume(32, 4, 5, 6) + 1
    torch.testing.assert_close(block(x), plain_seb(block, x), rtol=0, atol=1e-12)


@torch.no_grad()
def test_spatial_attention_weighs_voxels_and_not_channels() -> None:
    torch.manual_seed(3)
    block = SpatialAttention().double()
    x = volume(6, 4, 5, 6)
    found = block(x)
    torch.testing.assert_close(found, plain_sab(block, x), rtol=0, atol=1e-12)
    weights = found / x
    torch.testing.assert_close(weights, weights[:, :1].expand_as(weights))
    assert weights[:, 0].std() > 1e-3
    assert ((weights > 0) & (weights < 1)).all()


@pytest.mark.parametrize("channels", [16, 32])
@torch.no_grad()
def test_farm_adds_both_paths(channels: int) -> None:
    torch.manual_seed(3)
    farm = FARM(channels, 16).double()
    sizes = [tuple(m.weight.shape[:2]) for m in farm.residual.modules() if isinstance(m, nn.Conv3d)]
    assert sizes == [(channels, 2 * channels), (channels, channels), (channels, channels), (channels // 2, channels)]
    assert farm.flow.weight.shape == (3, 2 * channels + channels // 2, 3, 3, 3)
    x = volume(2 * channels, 4, 5, 6)
    torch.testing.assert_close(farm.residual(x), plain_rp(farm.residual, x), rtol=0, atol=1e-12)
    torch.testing.assert_close(farm(x), plain_farm(farm, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("pooled", "convolved"), [(1, 1), (2000, 4000), (10**9, 10**9)])
def test_farm_in_slabs_of_any_size_is_what_it_is_with_gradients(
    monkeypatch: pytest.MonkeyPatch, pooled: int, convolved: int
) -> None:
    monkeypatch.setattr(ipear, "_POOLED", pooled)
    monkeypatch.setattr(ipear, "_CONVOLVED", convolved)
    torch.manual_seed(3)
    farm = FARM(16, 16).double()
    with torch.no_grad():
        farm.flow.bias.copy_(torch.tensor([0.8, -0.6, 1.1]))
    x = volume(32, 7, 5, 6)
    before = x.clone()
    with_gradients = farm(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(farm(x), with_gradients, rtol=0, atol=1e-12)
        torch.testing.assert_close(farm(x[1:]), with_gradients[1:], rtol=0, atol=1e-12)
    assert torch.equal(x, before)


@torch.no_grad()
def test_layers_with_hooks_are_called() -> None:
    torch.manual_seed(3)
    farm, attention = FARM(16, 16).double(), NeighbourhoodAttention(8).double()
    x, y = volume(32, 4, 5, 6), volume(8, 4, 5, 6)
    plain = farm(x), attention(y)
    called: list[nn.Module] = []
    for layer in (farm.flow, attention.project):
        layer.register_forward_hook(lambda module, given, result: called.append(module))
    for found, expected in zip((farm(x), attention(y)), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert called == [farm.flow, attention.project]


@torch.no_grad()
def test_attention_of_a_level_may_be_looked_into_and_left_out() -> None:
    """By hooks on its layers, as for a picture of them, and as an ablation replaces one."""
    torch.manual_seed(3)
    farm, x = FARM(16, 16).double(), volume(32, 4, 5, 6)
    plain = farm(x)
    called: list[nn.Module] = []
    layers = [farm.attention, *farm.attention]
    for layer in layers:
        hook = layer.register_forward_hook(lambda module, given, result: called.append(module))
        torch.testing.assert_close(farm(x), plain, rtol=0, atol=1e-12)
        hook.remove()
    assert called == layers
    farm.attention[0] = nn.Identity()
    with torch.enable_grad():
        expected = farm(x).detach()
    torch.testing.assert_close(farm(x), expected, rtol=0, atol=1e-12)
    assert (expected - plain).abs().max() > 1e-5


@torch.no_grad()
def test_network_in_bfloat16_alone_and_without_pairs() -> None:
    torch.manual_seed(0)
    network = IPEARNet().eval()
    images = torch.rand(2, 1, 1, *SHAPE)
    found = network.bfloat16()(*images.bfloat16(), FixedIterations(2)).displacement
    assert found.isfinite().all()
    empty = network.float()(*images[:, :0], FixedIterations(2)).displacement
    assert empty.shape == (0, 3, *SHAPE)


# --- the pyramid


@torch.no_grad()
def test_levels_compose_as_the_paper_writes() -> None:
    network = build()
    moving, fixed = pair()
    found = network(moving, fixed, FixedIterations(1)).pyramid
    moving_features, fixed_features = plain_features(network, moving), plain_features(network, fixed)
    # Level 4's first estimate stands alone: nothing is warped, nothing composed.
    estimate = plain_farm(network.estimators[3], torch.cat((moving_features[3], fixed_features[3]), dim=1))
    torch.testing.assert_close(found[0], estimate, rtol=0, atol=1e-9)
    for level, (before, after) in zip((2, 1, 0), pairwise(found), strict=True):
        start = 2 * F.interpolate(before, scale_factor=2, mode="trilinear", align_corners=True)
        warped = warp(moving_features[level], start)
        residual = plain_farm(network.estimators[level], torch.cat((warped, fixed_features[level]), dim=1))
        torch.testing.assert_close(after, warp(start, residual) + residual, rtol=0, atol=1e-9)


@torch.no_grad()
def test_second_iteration_refines_the_first() -> None:
    network = build()
    moving, fixed = pair()
    once, twice = (network(moving, fixed, FixedIterations(count)).pyramid[0] for count in (1, 2))
    moving_features, fixed_features = (network.encoder(image)[3] for image in (moving, fixed))
    residual = plain_farm(network.estimators[3], torch.cat((warp(moving_features, once), fixed_features), dim=1))
    torch.testing.assert_close(twice, warp(once, residual) + residual, rtol=0, atol=1e-9)


@torch.no_grad()
def test_smallest_image_is_registered() -> None:
    image = torch.rand(1, 1, 8, 8, 8, generator=torch.manual_seed(3))
    found = IPEARNet()(image, image.flip(2))
    assert found.displacement.shape == (1, 3, 8, 8, 8)
    assert found.displacement.isfinite().all()


# --- iteration


def test_tci_with_the_papers_settings_is_the_networks_own_controller() -> None:
    controller = IPEARNet().controller
    assert controller == TCI(window=3, stability=0.005, convergence=0.005, max_iterations=10)
    assert IPEARNet(controller=IterStop()).controller == IterStop()


@torch.no_grad()
def test_tci_takes_at_least_a_window_of_iterations_a_level() -> None:
    network = build()
    moving, fixed = pair(batch=2)
    found = network(moving, fixed)
    assert len(found.iterations) == 4
    for count, level, history in zip(found.iterations, found.pyramid, found.scores, strict=True):
        assert ((count >= 3) & (count <= 10)).all()
        assert history.shape == (count.max(), 2)
        for one in range(2):
            last = ncc(warp(moving, resize(level, SHAPE)), fixed)[one]
            torch.testing.assert_close(history[count[one] - 1, one], last)


@torch.no_grad()
def test_tci_stops_at_the_third_iteration_where_nothing_changes() -> None:
    network = build()
    moving = torch.zeros(1, 1, *SHAPE, dtype=torch.float64)  # whatever the field, its score is 0
    assert [count.tolist() for count in network(moving, pair()[1]).iterations] == [[3]] * 4


@torch.no_grad()
def test_both_controllers_work_on_both_networks() -> None:
    moving, fixed = (image.float() for image in pair())
    for network in (IIRPNet().eval(), IPEARNet().eval()):
        stopped = network(moving, fixed, IterStop(threshold=2.0))
        assert [count.tolist() for count in stopped.iterations] == [[1], [0], [0], [0]]
        assert all(count >= 3 for count in network(moving, fixed, TCI()).iterations)


# --- other pyramids


@torch.no_grad()
def test_number_of_levels_is_a_setting() -> None:
    network = IPEARNet(channels=(4, 6), reduction=4).eval()
    assert network.stride == 2
    image = torch.rand(1, 1, 6, 4, 10)
    assert [tuple(level.shape[2:]) for level in network(image, image).pyramid] == [(3, 2, 5), (6, 4, 10)]


@pytest.mark.parametrize(("channels", "reduction"), [((16, 7), 16), ((1, 8), 1)])
def test_channels_too_few_for_the_blocks_are_refused(channels: tuple[int, ...], reduction: int) -> None:
    with pytest.raises(ValueError, match=rf"channels=\({channels[0]}, {channels[1]}\).*reduction={reduction}"):
        IPEARNet(channels=channels, reduction=reduction)


@torch.no_grad()
def test_untrained_network_hardly_moves() -> None:
    torch.manual_seed(2)
    moving, fixed = torch.rand(2, 1, 1, 16, 16, 16)
    assert IPEARNet().eval()(moving, fixed).displacement.abs().max() < 0.05
