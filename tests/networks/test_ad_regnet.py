"""AD-RegNet against its paper: size, and each of its parts written out a second time with loops and full softmax."""

import itertools
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import map_coordinates
from torch import Tensor, nn

from iregzoo.networks import ADRegNet
from iregzoo.networks.ad_regnet import NARROW, PAPER, CrossAttention, Fusion, Level, RegionalAttention

SHAPE = (8, 12, 16)
CHANNELS = (4, 6, 8)


def build(**settings: int | bool) -> ADRegNet:
    """Three levels in float64, with fields of about a voxel, and α and weights that differ from their start."""
    torch.manual_seed(0)
    network = ADRegNet(channels=CHANNELS, **settings).double().eval()
    with torch.no_grad():
        for level in network.levels:
            level.attention.balance.fill_(0.7)
            level.head[-1].weight.normal_(std=0.3)
            level.head[-1].bias.copy_(torch.tensor([0.8, -0.6, 1.1]))
    return network


def pair(batch: int = 1) -> tuple[Tensor, Tensor]:
    moving, fixed = torch.rand(2, batch, 1, *SHAPE, generator=torch.manual_seed(1), dtype=torch.float64)
    return moving, fixed


def volume(channels: int, *shape: int, seed: int = 2) -> Tensor:
    return torch.randn(2, channels, *shape, generator=torch.manual_seed(seed), dtype=torch.float64)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# --- the paper's parts, written out


def plain_blocks(blocks: nn.Module, x: Tensor) -> Tensor:
    for convolution, norm, _ in blocks:
        x = F.conv3d(x, convolution.weight, convolution.bias, padding=1)
        groups = x.unflatten(1, (norm.num_groups, -1)).flatten(2)
        groups = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
        x = torch.einsum("bcdhw,c->bcdhw", groups.view_as(x), norm.weight) + norm.bias.view(-1, 1, 1, 1)
        x = F.leaky_relu(x, 0.1)
    return x


def plain_features(network: ADRegNet, image: Tensor) -> list[Tensor]:
    """Decoder features, full resolution first."""
    encoded = []
    for level, encoder in enumerate(network.encoders):
        blocks = list(encoder)
        if level:
            down = blocks.pop(0)
            image = F.conv3d(image, down.weight, down.bias, stride=2)
        assert len(blocks) == 2
        image = plain_blocks(nn.Sequential(*blocks), image)
        encoded.append(image)
    features = [encoded[-1]]
    for decoder, skip in zip(reversed(network.decoders), encoded[-2::-1], strict=True):
        up = F.conv_transpose3d(features[0], decoder.up.weight, decoder.up.bias, stride=2)
        assert len(decoder.blocks) == 2
        features.insert(0, plain_blocks(decoder.blocks, torch.cat((up, skip), dim=1)))
    return features


def plain_attention(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """Softmax over all voxels, those outside the windows masked where there is a window."""
    shape = query.shape[2:]
    q, k, v = (x.flatten(2).transpose(1, 2) for x in (query, key, value))
    logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[2])
    if window is not None:
        places = torch.cartesian_prod(*[torch.arange(size) for size in shape])
        reach = window // 2
        starts = [(p - reach).clamp(0, max(s - window, 0)) for p, s in zip(places.T, shape, strict=True)]
        first = torch.stack(starts, dim=1)[:, None]
        near = ((places[None] >= first) & (places[None] < first + window)).all(-1)
        logits = logits.masked_fill(~near, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).reshape(value.shape)


def plain_bcam(module: CrossAttention, moving: Tensor, fixed: Tensor, window: int | None) -> Tensor:
    def projections(weight: Tensor, x: Tensor) -> list[Tensor]:
        return [torch.einsum("oc,bcdhw->bodhw", each[:, :, 0, 0, 0], x) for each in weight.chunk(3)]

    query_m, key_m, value_m = projections(module.moving.weight, moving)
    query_f, key_f, value_f = projections(module.fixed.weight, fixed)
    alpha = 1 / (1 + math.exp(-module.balance.item()))
    there = plain_attention(query_m, key_f, value_f, window)
    back = plain_attention(query_f, key_m, value_m, window)
    return alpha * there + (1 - alpha) * back


def plain_scales(module: RegionalAttention, x: Tensor) -> Tensor:
    """N·w of each region of one image (C, *shape), on the grid of regions."""
    counts = [-(-size // module.patch) for size in x.shape[1:]]
    descriptors = []
    for place in itertools.product(*map(range, counts)):
        box = [
            slice(i * size // n, -(-(i + 1) * size // n)) for i, n, size in zip(place, counts, x.shape[1:], strict=True)
        ]
        descriptors.append(x[:, box[0], box[1], box[2]].flatten(1).mean(1))
    regions = torch.stack(descriptors)
    query, key = (regions @ weight.T for weight in module.project.weight.chunk(2))
    gathered = (query @ key.T / math.sqrt(len(x))).softmax(1) @ regions
    weights = ((regions + gathered) @ module.score.weight[0]).softmax(0)
    assert weights.sum().item() == pytest.approx(1)
    return (weights * len(regions)).reshape(counts)


def plain_raa(module: RegionalAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    maps = []
    for image in x:
        scales = plain_scales(module, image)
        axes = [(np.arange(s) + 0.5) * n / s - 0.5 for s, n in zip(x.shape[2:], scales.shape, strict=True)]
        places = np.array(np.meshgrid(*axes, indexing="ij"))
        maps.append(torch.from_numpy(map_coordinates(scales.numpy(), places, order=1, mode="nearest"))[None])
    importance = torch.stack(maps)
    return torch.einsum("bcdhw,bdhw->bcdhw", x, importance[:, 0]), importance


def plain_head(head: nn.Module, attended: Tensor) -> Tensor:
    *blocks, flow = head
    return F.conv3d(plain_blocks(nn.Sequential(*blocks), attended), flow.weight, flow.bias, padding=1)


def double(displacement: Tensor) -> Tensor:
    return 2 * F.interpolate(displacement, scale_factor=2, mode="trilinear", align_corners=True)


def plain_fusion(fusion: Fusion, attended: Tensor, importance: Tensor, estimate: Tensor, coarse: Tensor) -> Tensor:
    up = double(coarse)
    logits = F.conv3d(torch.cat((attended, up), dim=1), fusion.weigh.weight, fusion.weigh.bias, padding=1)
    weight = torch.minimum(importance / (1 + torch.exp(-logits)), torch.ones(()))
    assert ((weight >= 0) & (weight <= 1)).all()
    return estimate * weight + up * (1 - weight)


# --- size and backbone


def test_parameters_of_the_papers_widths_and_of_the_narrow_ones() -> None:
    assert PAPER == (32, 64, 128, 256, 512)
    assert parameters(ADRegNet(channels=PAPER)) == 35_597_052
    assert parameters(ADRegNet()) == parameters(ADRegNet(channels=NARROW)) == 1_334_340


def test_stride_is_that_of_five_levels_and_there_is_nothing_to_control() -> None:
    assert ADRegNet().stride == 16
    assert ADRegNet().controller is None


@torch.no_grad()
def test_u_net_has_the_papers_grids_and_widths() -> None:
    torch.manual_seed(0)
    found = ADRegNet()._features(torch.rand(1, 1, 16, 32, 48))
    assert [tuple(level.shape[1:]) for level in found] == [
        (64, 1, 2, 3),
        (64, 2, 4, 6),
        (32, 4, 8, 12),
        (16, 8, 16, 24),
        (8, 16, 32, 48),
    ]


@torch.no_grad()
def test_u_net_is_the_papers() -> None:
    network = build()
    image = pair()[0] - 0.5
    features = reversed(network._features(image))
    for found, expected in zip(features, plain_features(network, image), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@torch.no_grad()
def test_features_keep_their_scale_on_the_way_down() -> None:
    torch.manual_seed(0)
    image = torch.randn(1, 1, 32, 32, 32)
    spreads = [level.std().item() for level in ADRegNet()._features(image)]
    assert all(0.3 < spread < 10 for spread in spreads), spreads


# --- bidirectional cross-attention


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 1, 1), (1, 2, 6)])
@torch.no_grad()
def test_few_voxels_attend_to_all(shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    module = CrossAttention(8, max_tokens=math.prod(shape), window=3).double()
    module.balance.fill_(-0.4)
    moving, fixed = volume(8, *shape), volume(8, *shape, seed=3)
    expected = plain_bcam(module, moving, fixed, window=None)
    torch.testing.assert_close(module(moving, fixed), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("shape", "window"), [((3, 4, 5), 3), ((1, 2, 6), 3), ((6, 5, 7), 5), ((3, 7, 2), 5)])
@torch.no_grad()
def test_many_voxels_attend_to_their_neighbourhood(shape: tuple[int, ...], window: int) -> None:
    torch.manual_seed(3)
    module = CrossAttention(8, max_tokens=math.prod(shape) - 1, window=window).double()
    module.balance.fill_(-0.4)
    moving, fixed = volume(8, *shape), volume(8, *shape, seed=3)
    expected = plain_bcam(module, moving, fixed, window)
    torch.testing.assert_close(module(moving, fixed), expected, rtol=0, atol=1e-12)
    assert (expected - plain_bcam(module, moving, fixed, window=None)).abs().max() > 1e-3


@torch.no_grad()
def test_neighbourhood_that_covers_the_volume_is_full_attention() -> None:
    torch.manual_seed(3)
    full, near = (CrossAttention(8, max_tokens, window=9).double() for max_tokens in (4096, 0))
    near.load_state_dict(full.state_dict())
    moving, fixed = volume(8, 4, 9, 5), volume(8, 4, 9, 5, seed=3)
    torch.testing.assert_close(near(moving, fixed), full(moving, fixed), rtol=0, atol=1e-12)


@torch.no_grad()
def test_untrained_attention_is_the_difference_of_the_images_features() -> None:
    """Features so far apart that each voxel attends to its like alone: A(M→F) is F there, and A(F→M) is −M."""
    attention = CrossAttention(8, max_tokens=4096, window=3)
    moving = 40 * torch.eye(8).reshape(1, 8, 2, 2, 2)
    fixed = moving.clone()
    fixed[:, 0] *= 3
    torch.testing.assert_close(attention(moving, fixed), (fixed - moving) / 2)


@pytest.mark.parametrize("balance", [-50.0, -3.0, 0.0, 3.0, 50.0])
@torch.no_grad()
def test_alpha_blends_both_directions(balance: float) -> None:
    torch.manual_seed(3)
    module = CrossAttention(8, max_tokens=4096, window=3).double()
    assert module.balance.item() == 0
    moving, fixed = volume(8, 3, 4, 5), volume(8, 3, 4, 5, seed=3)
    found = []
    for value in (balance, 1e9, -1e9):
        module.balance.fill_(value)
        found.append(module(moving, fixed))
    blended, there, back = found
    alpha = 1 / (1 + math.exp(-balance))
    assert 0 < alpha <= 1
    torch.testing.assert_close(blended, alpha * there + (1 - alpha) * back, rtol=0, atol=1e-12)
    assert (there - back).abs().max() > 0.1


@pytest.mark.parametrize("max_tokens", [4096, 0])
def test_one_direction_after_the_other_is_both_at_once(max_tokens: int) -> None:
    torch.manual_seed(3)
    module = CrossAttention(8, max_tokens, window=3).double()
    with torch.no_grad():
        module.balance.fill_(-0.4)
    moving, fixed = volume(8, 3, 4, 5), volume(8, 3, 4, 5, seed=3)
    with_gradients = module(moving, fixed)
    with torch.no_grad():
        torch.testing.assert_close(module(moving, fixed), with_gradients, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_projection_with_a_hook_is_called() -> None:
    torch.manual_seed(3)
    module = CrossAttention(8, 4096, window=3).double()
    moving, fixed = volume(8, 3, 4, 5), volume(8, 3, 4, 5, seed=3)
    plain = module(moving, fixed)
    called: list[nn.Module] = []
    module.fixed.register_forward_hook(lambda layer, given, result: called.append(layer))
    torch.testing.assert_close(module(moving, fixed), plain, rtol=0, atol=1e-12)
    assert called == [module.fixed]


# --- regional adaptive attention


@pytest.mark.parametrize(
    ("shape", "patch", "counts"),
    [((8, 12, 4), 4, (2, 3, 1)), ((6, 5, 4), 16, (1, 1, 1)), ((7, 9, 10), 4, (2, 3, 3)), ((1, 2, 3), 1, (1, 2, 3))],
)
@torch.no_grad()
def test_regions_are_weighed_by_attention(shape: tuple[int, ...], patch: int, counts: tuple[int, ...]) -> None:
    torch.manual_seed(4)
    module = RegionalAttention(6, patch).double()
    module.score.weight.mul_(10)
    x = volume(6, *shape) + torch.arange(shape[0]).view(-1, 1, 1) / shape[0]
    found, importance = module(x)
    expected, expected_importance = plain_raa(module, x)
    torch.testing.assert_close(importance, expected_importance, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert plain_scales(module, x[0]).shape == counts
    assert (importance.std() > 0.1) == (math.prod(counts) > 1)


@torch.no_grad()
def test_weights_have_a_mean_of_one_over_regions_and_voxels() -> None:
    torch.manual_seed(4)
    module = RegionalAttention(6, 4).double()
    module.score.weight.mul_(10)
    scales = module._scales(volume(6, 3, 4, 5).flatten(2).transpose(1, 2))
    assert scales.shape == (2, 60)
    assert (scales > 0).all()
    torch.testing.assert_close(scales.sum(1), torch.full((2,), 60.0, dtype=torch.float64))
    _, importance = module(volume(6, 8, 12, 16))
    assert importance.std() > 0.1
    torch.testing.assert_close(importance.flatten(1).mean(1), torch.ones(2, dtype=torch.float64))


@torch.no_grad()
def test_regions_and_groups_are_those_of_the_settings() -> None:
    network, sizes = ADRegNet(), []
    for level in network.modules():
        if isinstance(level, RegionalAttention):
            level.register_forward_hook(lambda part, inputs, output: sizes.append((inputs[0].shape[2:], part.patch)))
    network(torch.rand(1, 1, 32, 32, 32), torch.rand(1, 1, 32, 32, 32))
    assert sizes
    assert all(patch == 16 for _, patch in sizes)
    norms = [part for part in network.modules() if isinstance(part, torch.nn.GroupNorm)]
    assert norms
    assert all(norm.num_channels / norm.num_groups == 8 for norm in norms if norm.num_channels % 8 == 0)


@torch.no_grad()
def test_regions_that_are_alike_stay_as_they_are() -> None:
    torch.manual_seed(4)
    module = RegionalAttention(6, 4).double()
    x = volume(6, 1, 1, 1).expand(-1, -1, 8, 12, 5)
    found, importance = module(x)
    torch.testing.assert_close(importance, torch.ones_like(importance), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)


# --- fields


@torch.no_grad()
def test_level_makes_a_field_of_what_leaves_the_regions() -> None:
    torch.manual_seed(5)
    level = Level(8, patch=3, max_tokens=4096, window=3).double()
    level.head[-1].weight.normal_()
    features = torch.cat((volume(8, 4, 5, 6), volume(8, 4, 5, 6, seed=3)))
    attended, importance, estimate = level(*features.chunk(2))
    found, found_importance = plain_raa(level.regions, plain_bcam(level.attention, *features.chunk(2), window=None))
    torch.testing.assert_close(attended, found, rtol=0, atol=1e-12)
    torch.testing.assert_close(importance, found_importance, rtol=0, atol=1e-12)
    torch.testing.assert_close(estimate, plain_head(level.head, attended), rtol=0, atol=1e-11)
    assert estimate.shape == (2, 3, 4, 5, 6)


@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
@torch.no_grad()
def test_fusion_is_equation_15(scale: float) -> None:
    torch.manual_seed(5)
    fusion = Fusion(8).double()
    fusion.weigh.weight.mul_(3)
    coarse, estimate, attended = volume(3, 2, 3, 4), volume(3, 4, 6, 8, seed=3), volume(8, 4, 6, 8, seed=4)
    importance = scale * volume(1, 4, 6, 8, seed=5).sigmoid()
    found = fusion(attended, importance, estimate, coarse)
    torch.testing.assert_close(found, plain_fusion(fusion, attended, importance, estimate, coarse))


@torch.no_grad()
def test_fusion_goes_from_the_coarse_field_to_the_levels_own() -> None:
    fusion = Fusion(8).double()
    coarse, estimate, attended = volume(3, 2, 3, 4), volume(3, 4, 6, 8, seed=3), volume(8, 4, 6, 8, seed=4)
    for bias, importance, expected in ((99.0, 1.0, estimate), (99.0, 7.0, estimate), (-99.0, 1.0, double(coarse))):
        fusion.weigh.bias.fill_(bias)
        found = fusion(attended, torch.full((2, 1, 4, 6, 8), importance).double(), estimate, coarse)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_levels_are_fused_from_coarse_to_fine() -> None:
    network = build(patch=4, max_tokens=100)  # so that the finest two have regions and windows
    moving, fixed = pair(batch=2)
    found = network(moving, fixed)
    expected: list[Tensor] = []
    levels = zip(network.levels, (*network.fusions, None), (3, 3, None), strict=True)
    features = [plain_features(network, image) for image in (moving, fixed)]
    for (level, fusion, window), *both in reversed(list(zip(levels, *features, strict=True))):
        attended, importance = plain_raa(level.regions, plain_bcam(level.attention, *both, window=window))
        estimate = plain_head(level.head, attended)
        if fusion is not None:
            estimate = plain_fusion(fusion, attended, importance, estimate, expected[-1])
        expected.append(estimate)
    for level, wanted in zip(found.pyramid, expected, strict=True):
        assert wanted.abs().mean() > 0.3
        torch.testing.assert_close(level, wanted, rtol=0, atol=1e-9)
    assert torch.equal(found.displacement, found.pyramid[-1])
    assert [tuple(level.shape[2:]) for level in found.pyramid] == [(2, 3, 4), (4, 6, 8), (8, 12, 16)]
    assert found.inverse is None


@torch.no_grad()
def test_moving_and_fixed_are_told_apart() -> None:
    network = build()
    moving, fixed = pair()
    assert (network(moving, fixed).displacement - network(fixed, moving).displacement).abs().max() > 0.01


@torch.no_grad()
def test_untrained_field_is_nearly_the_identity() -> None:
    torch.manual_seed(6)
    moving, fixed = torch.rand(2, 1, 1, 32, 32, 32)
    found = ADRegNet()(moving, fixed).displacement
    assert 0 < found.abs().max() < 0.01


def test_every_parameter_gets_a_gradient_that_is_not_zero() -> None:
    network = build(patch=2).train()
    network(*pair()).displacement.square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


# --- checkpointing and other settings


def test_one_image_after_the_other_gives_what_both_at_once_do() -> None:
    network = build()
    moving, fixed = pair()
    with_gradients = network(moving, fixed)
    with torch.no_grad():
        for found, expected in zip(network(moving, fixed).pyramid, with_gradients.pyramid, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_checkpointing_changes_neither_fields_nor_gradients() -> None:
    plain, saving = build(), build(checkpointing=True)
    moving, fixed = pair()
    kept: list[int] = []
    for network in (plain, saving):
        count = 0

        def count_up(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count_up, lambda tensor: tensor):
            displacement = network(moving, fixed).displacement
        kept.append(count)
        displacement.square().mean().backward()
    assert kept[1] < kept[0] / 2
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=name)
    with torch.no_grad():
        for one, other in zip(plain(moving, fixed).pyramid, saving(moving, fixed).pyramid, strict=True):
            assert torch.equal(one, other)


@torch.no_grad()
def test_smallest_image_is_registered() -> None:
    image = torch.rand(1, 1, 16, 16, 16, generator=torch.manual_seed(3))
    for network in (ADRegNet(), ADRegNet(max_tokens=0)):
        found = network(image, image.flip(2))
        assert found.displacement.shape == (1, 3, 16, 16, 16)
        assert all(level.isfinite().all() for level in found.pyramid)
        assert [tuple(level.shape[2:]) for level in found.pyramid] == [(size,) * 3 for size in (1, 2, 4, 8, 16)]


@torch.no_grad()
def test_number_of_levels_is_a_setting() -> None:
    network = ADRegNet(channels=(4, 6)).eval()
    assert network.stride == 2
    image = torch.rand(1, 1, 6, 4, 10)
    found = [tuple(level.shape[2:]) for level in network(image, image).pyramid]
    assert found == [(3, 2, 5), (6, 4, 10)]
    assert all(a < b for a, b in pairwise(found))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": ()}, r"channels=\(\); expected a positive number"),
        ({"channels": (8, 0)}, r"channels=\(8, 0\); expected a positive number"),
        ({"patch": 0}, r"patch=0; expected at least one voxel"),
        ({"window": 4}, r"window=4; expected an odd number"),
        ({"window": -1}, r"window=-1; expected an odd number"),
    ],
)
def test_settings_that_make_no_network_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ADRegNet(**settings)
