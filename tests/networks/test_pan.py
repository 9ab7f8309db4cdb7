"""PAN against its paper: size, layers and levels written out a second time, its tokens, and its settings."""

from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iregzoo.fields import resize, warp
from iregzoo.iteration import TCI, Controller, FixedIterations, IterStop
from iregzoo.losses import orthogonality
from iregzoo.networks import PANNet
from iregzoo.networks._norm import InstanceNorm
from iregzoo.networks.pan import LAT, OffsetAttention, SqueezeExcitation
from iregzoo.similarity import ncc

SHAPE = (32, 48, 32)
SMALL = (1, 2, 4)  # heads of a pyramid of three levels


def build(heads: tuple[int, ...] = (1, 1, 2, 4, 8), controller: Controller | None = None) -> PANNet:
    """In float64, with residuals of about a voxel, so that sampling, padding and order of composition all show."""
    torch.manual_seed(0)
    network = PANNet(heads=heads, controller=controller).double().eval()
    with torch.no_grad():
        for lat in network.estimators:
            lat.attention.rpb.normal_()
            lat.flow.weight.normal_(std=0.3)
            lat.flow.bias.copy_(torch.tensor([0.8, -0.6, 1.1]))
    return network


def pair(shape: tuple[int, ...] = SHAPE, batch: int = 1) -> tuple[Tensor, Tensor]:
    moving, fixed = torch.rand(2, batch, 1, *shape, generator=torch.manual_seed(1), dtype=torch.float64)
    return moving, fixed


def volume(channels: int, *shape: int, seed: int = 2) -> Tensor:
    return torch.randn(2, channels, *shape, generator=torch.manual_seed(seed), dtype=torch.float64)


# --- the paper's layers, written out


def conv(x: Tensor, layer: nn.Module) -> Tensor:
    return F.conv3d(x, layer.weight, layer.bias, padding=1)


def plain_conv_norm(x: Tensor, layer: nn.Module) -> Tensor:
    x = conv(x, layer).flatten(2)
    x = (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
    return F.leaky_relu(x, 0.1)


def plain_excitation(block: SqueezeExcitation, x: Tensor) -> Tensor:
    first, _, second, _ = block.weigh
    descriptor = x.flatten(2).mean(2)
    weights = torch.sigmoid(F.leaky_relu(descriptor @ first.weight.T, 0.01) @ second.weight.T)
    return torch.einsum("bcdhw,bc->bcdhw", x, weights)


def plain_levels(network: PANNet, image: Tensor) -> list[Tensor]:
    """Features and, as the last channel, the image, full resolution first."""
    x, levels = image, []
    for level, block in enumerate(network.encoder.blocks):
        first, second, excite = block[-3:]
        x = F.avg_pool3d(x, kernel_size=2, stride=2) if level else F.leaky_relu(conv(x, block[0][0]), 0.1)
        shape = x.shape[2:]
        for layer in (first, second):
            x = plain_conv_norm(x, layer[0]).unflatten(2, shape)
        x = plain_excitation(excite, x)
        levels.append(torch.cat((x, F.avg_pool3d(image, kernel_size=2**level)), dim=1))
    return levels


def plain_tokens(lat: LAT, x: Tensor) -> Tensor:
    """(B, heads, channels, *shape)."""
    linear, norm = lat.project
    y = torch.einsum("bcdhw,oc->bdhwo", x, linear.weight) + linear.bias
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    return torch.stack((y * norm.weight + norm.bias).chunk(lat.heads, dim=-1), dim=1).movedim(-1, 2)


def plain_lat(lat: LAT, moving: Tensor, fixed: Tensor) -> Tensor:
    """Neighbour by neighbour; one outside is zero."""
    query, key = plain_tokens(lat, fixed), F.pad(plain_tokens(lat, moving), [1] * 6)
    depth, height, width = fixed.shape[2:]
    offsets, logits = list(product((-1, 0, 1), repeat=3)), []
    for i, j, k in offsets:
        neighbour = key[..., 1 + i : 1 + i + depth, 1 + j : 1 + j + height, 1 + k : 1 + k + width]
        bias = lat.attention.rpb[:, 1 + i, 1 + j, 1 + k].view(-1, 1, 1, 1)
        logits.append((query * neighbour).sum(2) + bias)
    weights = torch.stack(logits).exp()
    weights = weights / weights.sum(0)
    fields = [
        sum(o[axis] * w[:, head] for o, w in zip(offsets, weights, strict=True))
        for head in range(lat.heads)
        for axis in range(3)
    ]
    return conv(torch.stack(fields, dim=1), lat.flow)


# --- size and layers


def test_parameters_are_those_of_the_published_checkpoints() -> None:
    assert sum(parameter.numel() for parameter in PANNet().parameters()) == 3_568_751


def test_stride_is_that_of_five_levels() -> None:
    assert PANNet().stride == 16


@torch.no_grad()
def test_encoder_is_the_papers_and_gives_the_image_too() -> None:
    network = build()
    image = pair()[0] - 0.3
    found = network.encoder(image)
    assert [level.shape[1] for level in found] == [17, 33, 65, 129, 257]
    sizes = [tuple(level.shape[2:]) for level in found]
    assert sizes == [(32, 48, 32), (16, 24, 16), (8, 12, 8), (4, 6, 4), (2, 3, 2)]
    for ours, expected in zip(found, plain_levels(network, image), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_instance_norm_is_torchs_and_takes_one_voxel() -> None:
    x = 3 * volume(4, 5, 1, 3) + 2
    torch.testing.assert_close(InstanceNorm()(x), F.instance_norm(x), rtol=0, atol=1e-12)
    assert InstanceNorm()(volume(4, 1, 1, 1)).tolist() == torch.zeros(2, 4, 1, 1, 1).tolist()


@torch.no_grad()
def test_squeeze_excitation_is_the_papers() -> None:
    torch.manual_seed(3)
    block = SqueezeExcitation(32).double()
    assert [tuple(p.shape) for p in block.parameters()] == [(2, 32), (32, 2)]  # no biases
    x = 5 * volume(32, 3, 4, 2) - 1
    torch.testing.assert_close(block(x), plain_excitation(block, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("heads", "shape"), [(1, (3, 4, 5)), (3, (5, 2, 3)), (8, (2, 3, 1)), (2, (1, 1, 1))])
@torch.no_grad()
def test_lat_is_the_papers(heads: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    lat = LAT(7, heads, 6).double()
    for parameter in lat.parameters():
        parameter.normal_()
    moving, fixed = volume(7, *shape, seed=4), volume(7, *shape, seed=5)
    found = lat(torch.cat((moving, fixed), dim=1))
    expected = plain_lat(lat, moving, fixed)
    assert found.shape == (2, 3, *shape)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@torch.no_grad()
def test_untrained_network_hardly_moves() -> None:
    torch.manual_seed(0)
    network = PANNet()
    for lat in network.estimators:
        assert not lat.attention.rpb.any()
        assert not lat.flow.bias.any()
        assert 0.7e-5 < lat.flow.weight.std() < 1.3e-5
    found = network.eval()(*(image.float() for image in pair()))
    assert 0 < found.displacement.abs().max() < 1e-2


# --- the pyramid


@torch.no_grad()
def test_levels_compose_as_written_out() -> None:
    network = build()
    moving, fixed = pair()
    found = network(moving, fixed).pyramid
    moving_levels, fixed_levels = plain_levels(network, moving), plain_levels(network, fixed)
    # Level 5's estimate stands alone: nothing is warped, nothing composed.
    estimate = plain_lat(network.estimators[4], moving_levels[4], fixed_levels[4])
    assert estimate.abs().mean() > 0.5
    torch.testing.assert_close(found[0], estimate, rtol=0, atol=1e-9)
    for level, (before, after) in zip((3, 2, 1, 0), pairwise(found), strict=True):
        start = 2 * F.interpolate(before, scale_factor=2, mode="trilinear", align_corners=True)
        residual = plain_lat(network.estimators[level], warp(moving_levels[level], start), fixed_levels[level])
        torch.testing.assert_close(after, warp(start, residual) + residual, rtol=0, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
def test_smallest_image_is_registered(training: bool) -> None:
    network = build().train(training)
    image = pair((16, 16, 16))[0]
    found = network(image, image.flip(2))
    assert [tuple(level.shape[2:]) for level in found.pyramid][::4] == [(1, 1, 1), (16, 16, 16)]
    assert found.displacement.isfinite().all()
    found.displacement.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@torch.no_grad()
def test_moving_and_fixed_are_told_apart() -> None:
    network = build(SMALL)
    moving, fixed = pair((8, 12, 4))
    there, back = network(moving, fixed), network(fixed, moving)
    assert (there.displacement - back.displacement).abs().max() > 0.1


# --- iteration


def test_one_pass_is_the_networks_own_controller() -> None:
    assert PANNet().controller == FixedIterations(1)
    assert PANNet(controller=TCI()).controller == TCI()


@torch.no_grad()
def test_own_controller_is_used_at_inference_and_not_in_training() -> None:
    network, images = build(SMALL, FixedIterations(3)), pair((8, 4, 4))
    assert [count.tolist() for count in network(*images).iterations] == [[3]] * 3
    assert [count.tolist() for count in network.train()(*images).iterations] == [[1]] * 3


@torch.no_grad()
def test_second_pass_refines_the_first() -> None:
    network = build(SMALL)
    moving, fixed = pair((16, 12, 8))
    once, twice = (network(moving, fixed, FixedIterations(count)).pyramid[0] for count in (1, 2))
    features = [plain_levels(network, image)[2] for image in (moving, fixed)]
    residual = plain_lat(network.estimators[2], warp(features[0], once), features[1])
    torch.testing.assert_close(twice, warp(once, residual) + residual, rtol=0, atol=1e-9)


@torch.no_grad()
def test_controllers_of_iterations_steer_it() -> None:
    network = build(SMALL)
    moving, fixed = pair((8, 12, 8))
    stopped = network(moving, fixed, IterStop(threshold=2.0))
    assert [count.tolist() for count in stopped.iterations] == [[1], [0], [0]]
    torch.testing.assert_close(stopped.displacement, resize(resize(stopped.pyramid[0], (4, 6, 4)), (8, 12, 8)))
    steered = network(moving, fixed, TCI())
    assert all(count >= 3 for count in steered.iterations)
    last = ncc(warp(moving, steered.displacement), fixed)
    torch.testing.assert_close(steered.scores[-1][-1], last)


# --- tokens of the orthogonality loss


def test_tokens_are_query_and_key_while_training() -> None:
    network = build(SMALL).train()
    moving, fixed = pair((8, 12, 8), batch=2)
    found = network(moving, fixed)
    query, key = found.auxiliary["tokens"]
    assert query.shape == key.shape == (2, 2, 6, 4, 6, 4)  # heads, channels, grid of level 2
    moving_levels, fixed_levels = plain_levels(network, moving), plain_levels(network, fixed)
    lat, start = network.estimators[1], resize(found.pyramid[0], (4, 6, 4))
    torch.testing.assert_close(query, plain_tokens(lat, fixed_levels[1]), rtol=0, atol=1e-10)
    torch.testing.assert_close(key, plain_tokens(lat, warp(moving_levels[1], start)), rtol=0, atol=1e-10)


@torch.no_grad()
def test_tokens_are_those_of_the_last_pass() -> None:
    network = build(SMALL).train()
    images = pair((8, 12, 8))
    once, twice = (network(*images, FixedIterations(count)).auxiliary["tokens"] for count in (1, 2))
    assert len(once) == len(twice) == 2
    torch.testing.assert_close(once[0], twice[0])  # the fixed image's stay
    assert (once[1] - twice[1]).abs().max() > 0.1


def test_orthogonality_of_the_tokens_teaches_the_projection() -> None:
    network = build(SMALL).train()
    tokens = network(*pair((8, 12, 8))).auxiliary["tokens"]
    torch.stack([orthogonality(each).mean() for each in tokens]).mean().backward()
    for parameter in (*network.estimators[1].project.parameters(), network.encoder.blocks[0][0][0].weight):
        assert parameter.grad is not None
        assert parameter.grad.any()
    assert network.estimators[0].project[0].weight.grad is None


@pytest.mark.parametrize("heads", [(1, 1, 2, 4, 8), SMALL])
@torch.no_grad()
def test_tokens_are_collected_in_training_alone(heads: tuple[int, ...]) -> None:
    network, image = build(heads), pair((16, 32, 16))[0]
    assert network(image, image).auxiliary == {}
    trained = network.train()(image, image).auxiliary["tokens"]
    level = 4 if len(heads) == 5 else 2
    assert [tuple(each.shape) for each in trained] == [(1, 2, 6, 16 // level, 32 // level, 16 // level)] * 2
    assert network.eval()(image, image).auxiliary == {}


@torch.no_grad()
def test_levels_of_the_tokens_are_a_setting() -> None:
    image = torch.rand(1, 1, 8, 8, 8)
    both = PANNet(heads=(2, 1, 4, 2), orthogonal_heads=(4, 2))(image, image).auxiliary["tokens"]
    assert [tuple(each.shape[1:4]) for each in both[::2]] == [(2, 6, 8), (4, 6, 2), (2, 6, 1)]
    assert PANNet(heads=SMALL, orthogonal_heads=())(image, image).auxiliary == {}


# --- memory format


@torch.no_grad()
def test_channels_last_changes_nothing_but_the_layout() -> None:
    network, images = build(SMALL), pair((8, 12, 8))
    expected = network(*images).displacement
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.to(memory_format=torch.channels_last_3d)
    assert network.encoder.blocks[1][0][0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    torch.testing.assert_close(network(*images).displacement, expected, rtol=0, atol=1e-9)


def test_position_bias_follows_every_move_of_the_module_with_its_gradient() -> None:
    attention = OffsetAttention(2)
    with torch.no_grad():
        bias = attention.rpb.normal_().clone()
    attention.rpb.square().sum().backward()
    assert attention.to(memory_format=torch.channels_last_3d) is attention
    moved = attention.double().rpb
    assert moved.grad is not None
    assert moved.dtype == moved.grad.dtype == torch.float64
    assert torch.equal(moved, bias.double())
    assert torch.equal(moved.grad, 2 * bias.double())


# --- settings


@torch.no_grad()
def test_channels_of_heads_and_levels_are_settings() -> None:
    network = PANNet(base=10, heads=(2, 3), head_channels=4).eval()
    assert network.stride == 2
    assert [lat.project[0].weight.shape for lat in network.estimators] == [(8, 21), (12, 41)]
    image = torch.rand(1, 1, 6, 4, 10)
    assert [tuple(level.shape[2:]) for level in network(image, image).pyramid] == [(3, 2, 5), (6, 4, 10)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": 7}, "base=7; expected at least 8"),
        ({"heads": ()}, r"heads=\(\); expected at least one head"),
        ({"heads": (1, 0)}, r"heads=\(1, 0\); expected at least one head"),
        ({"head_channels": 1}, "head_channels=1; expected at least 2"),
        ({"orthogonal_heads": (1,)}, r"orthogonal_heads=\(1,\); .*above 1 that are in heads=\(1, 1, 2, 4, 8\)"),
        ({"orthogonal_heads": (2, 3)}, r"orthogonal_heads=\(2, 3\); .*above 1 that are in"),
        ({"heads": (1, 1)}, r"orthogonal_heads=\(2,\); .*above 1 that are in heads=\(1, 1\)"),
    ],
)
def test_settings_that_leave_nothing_are_refused(settings: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PANNet(**settings)  # type: ignore[arg-type]
