"""What every registration network keeps, whatever its method: a class in ``networks.__all__`` is tested by its name."""

import re

import pytest
import torch
from torch import Tensor, nn

from iregzoo import networks
from iregzoo.iteration import TCI, FixedIterations
from iregzoo.registration import Registration

EACH_NETWORK = pytest.mark.parametrize("name", networks.__all__)
ONE_PASS = FixedIterations()
ITERATES = [name for name in networks.__all__ if getattr(networks, name)().controller is not None]
EACH_ITERATING_NETWORK = pytest.mark.parametrize("name", ITERATES)
# The score of an empty image is 0 whatever its field, so its pair settles while others go on.
SETTLES = TCI(window=2, stability=1e-7, order="stability", max_iterations=4)
# Parameters that cannot change the fields of the images below, as a pattern of their names.
WITHOUT_A_SAY = {
    "ADRegNet": r"levels\.[234]\.regions\..*",  # grids of one region, whose weight is 1; its own test has more regions
    "PANNet": r"encoder\.blocks\.(0\.[12]|[1-4]\.[01])\.0\.bias",  # the instance norm that follows takes it away
}
# Few channels for what a CPU computes slowly.
NARROW = {
    "ADRegNet": {"channels": (8, 8, 8, 16, 16)},
    "PANNet": {"heads": (1, 1, 2)},
    "SMGICNet": {"channels": 4},
}


def build(name: str, **settings: object) -> nn.Module:
    """A network whose every parameter counts, also those that a method starts at zero."""
    torch.manual_seed(0)
    network: nn.Module = getattr(networks, name)(**settings)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network.eval()


def images(network: nn.Module, multiples: tuple[int, ...] = (2, 3, 4), batch: int = 2) -> tuple[Tensor, Tensor]:
    """Moving and fixed images in [0, 1], each size the given multiple of the stride."""
    shape = [network.stride * multiple for multiple in multiples]
    moving, fixed = torch.rand(2, batch, 1, *shape, generator=torch.manual_seed(1))
    return moving, fixed


def fields(result: Registration) -> list[Tensor]:
    return [result.displacement, *([] if result.inverse is None else [result.inverse]), *result.pyramid]


def select(result: Registration, pair: int) -> list[Tensor]:
    return [field[pair : pair + 1] for field in fields(result)]


@EACH_NETWORK
@pytest.mark.parametrize("multiples", [(2, 3, 4), (4, 2, 2), (2, 2, 3)])
@torch.no_grad()
def test_fields_have_the_shape_of_the_images(name: str, multiples: tuple[int, ...]) -> None:
    network = build(name)
    moving, fixed = images(network, multiples)
    result = network(moving, fixed)
    assert result.displacement.shape == (2, 3, *moving.shape[2:])
    assert result.displacement.dtype == torch.float32
    if result.inverse is not None:
        assert result.inverse.shape == result.displacement.shape
    sizes = [tuple(level.shape[2:]) for level in result.pyramid]
    assert sizes == sorted(sizes)
    assert all(level.shape[:2] == (2, 3) for level in result.pyramid)
    assert len(result.iterations) == len(result.scores)
    for count, history in zip(result.iterations, result.scores, strict=True):
        assert count.shape == (2,)
        assert not count.is_floating_point()
        assert history.shape[1] == 2
    assert all(field.isfinite().all() for field in fields(result))


@EACH_NETWORK
@torch.no_grad()
def test_untrained_network_gives_finite_fields(name: str) -> None:
    torch.manual_seed(2)
    network = getattr(networks, name)(**NARROW.get(name, {})).eval()
    moving, fixed = images(network)
    for pair in ((moving, fixed), (moving, moving), (torch.zeros_like(moving), torch.ones_like(fixed))):
        assert all(field.isfinite().all() for field in fields(network(*pair)))


@EACH_NETWORK
def test_every_parameter_gets_a_gradient_that_is_not_zero(name: str) -> None:
    network = build(name).train()
    result = network(*images(network))
    torch.stack([field.square().mean() for field in fields(result)]).sum().backward()
    gradients = {key: parameter.grad for key, parameter in network.named_parameters()}
    assert [key for key, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []
    zero = [key for key, gradient in gradients.items() if not gradient.any()]
    assert [key for key in zero if not re.fullmatch(WITHOUT_A_SAY.get(name, ""), key)] == []


@EACH_NETWORK
@pytest.mark.parametrize("passes", [1, 2])
def test_field_is_the_same_with_gradients_as_without(name: str, passes: int) -> None:
    network = build(name, **NARROW.get(name, {}))
    if passes > 1 and network.controller is None:
        pytest.skip("takes one pass")
    moving, fixed = images(network)
    for pair in ((moving, fixed), (fixed, moving)):
        with_gradients = network(*pair, FixedIterations(passes))
        assert with_gradients.displacement.requires_grad
        with torch.no_grad():
            without = network(*pair, FixedIterations(passes))
        for found, expected in zip(fields(without), fields(with_gradients), strict=True):
            torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-4)


@EACH_NETWORK
@pytest.mark.parametrize("axis", [2, 3, 4])
@pytest.mark.parametrize("half_stride", [False, True])
def test_size_that_the_stride_does_not_divide_is_refused(name: str, axis: int, half_stride: bool) -> None:
    network = build(name)
    if network.stride == 1:
        pytest.skip("takes every size")
    moving, _ = images(network)
    shape = list(moving.shape)
    shape[axis] += network.stride // 2 if half_stride else 1
    odd = torch.zeros(shape)
    with pytest.raises(ValueError, match=rf"{shape[axis]}\b.*\b{network.stride}\b"):
        network(odd, odd)


@EACH_NETWORK
def test_images_that_are_no_pair_are_refused(name: str) -> None:
    network = build(name)
    moving, fixed = images(network)
    depth, height, width = moving.shape[2:]
    with pytest.raises(ValueError, match=rf"\(2, 1, {depth}, {height}, {width}\).*\(1, 1, {depth}"):
        network(moving, fixed[:1])
    with pytest.raises(ValueError, match=rf"\(2, 2, {depth}, {height}, {width}\)"):
        network(*[torch.cat((moving, fixed), dim=1)] * 2)
    with pytest.raises(ValueError, match=rf"\(2, {depth}, {height}, {width}\)"):
        network(moving[:, 0], fixed[:, 0])


@EACH_NETWORK
@pytest.mark.parametrize("controller", [ONE_PASS, None, SETTLES], ids=["one-pass", "own", "tci"])
@torch.no_grad()
def test_batch_equals_its_singles(name: str, controller: FixedIterations | TCI | None) -> None:
    network = build(name)
    if controller is SETTLES and network.controller is None:
        pytest.skip("takes one pass")
    moving, fixed = images(network, batch=3)
    moving[1] = 0
    batch = network(moving, fixed, controller)
    for pair in range(3):
        single = network(moving[pair : pair + 1], fixed[pair : pair + 1], controller)
        for of_batch, alone in zip(select(batch, pair), fields(single), strict=True):
            torch.testing.assert_close(of_batch, alone, rtol=1e-4, atol=1e-4)
        for of_batch, alone in zip(batch.iterations, single.iterations, strict=True):
            assert of_batch[pair] == alone[0]
    if controller is SETTLES and batch.iterations:
        assert any(len(set(count.tolist())) > 1 for count in batch.iterations)


@EACH_NETWORK
@torch.no_grad()
def test_result_is_the_same_each_time(name: str) -> None:
    network = build(name)
    pair = images(network)
    first, again, rebuilt = network(*pair), network(*pair), build(name)(*pair)
    for expected, *others in zip(fields(first), fields(again), fields(rebuilt), strict=True):
        assert all(torch.equal(expected, other) for other in others)


@EACH_NETWORK
@torch.no_grad()
def test_images_are_left_as_they_are(name: str) -> None:
    network = build(name)
    pair = images(network)
    copies = [image.clone() for image in pair]
    network(*pair)
    assert all(torch.equal(image, copy) for image, copy in zip(pair, copies, strict=True))


@EACH_NETWORK
@torch.no_grad()
def test_weights_are_all_that_is_saved(name: str) -> None:
    network = build(name)
    network(*images(network))
    assert set(network.state_dict()) == {key for key, _ in network.named_parameters()}


@EACH_NETWORK
@torch.no_grad()
def test_bfloat16_autocast_stays_close(name: str) -> None:
    network = build(name, **NARROW.get(name, {}))
    pair = images(network, (2, 2, 2), batch=1)  # emulated, bfloat16 takes a hundred times as long
    expected = network(*pair, ONE_PASS).displacement
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network(*pair, ONE_PASS).displacement
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.05 * expected.norm()


@EACH_NETWORK
@torch.no_grad()
def test_half_precision_stays_close(name: str) -> None:
    network = build(name, **NARROW.get(name, {}))
    pair = images(network, (2, 2, 2), batch=1)
    expected = network(*pair, ONE_PASS).displacement
    found = network.half()(*(image.half() for image in pair), ONE_PASS).displacement
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.01 * expected.norm()


@EACH_NETWORK
@torch.no_grad()
def test_training_takes_one_pass_per_level(name: str) -> None:
    network = build(name)
    pair = images(network)
    expected = network(*pair, ONE_PASS)
    trained = network.train()(*pair)
    assert all((count == 1).all() for count in trained.iterations)
    for found, wanted in zip(fields(trained), fields(expected), strict=True):
        torch.testing.assert_close(found, wanted)


@EACH_NETWORK
@torch.no_grad()
def test_network_that_takes_one_pass_refuses_to_iterate(name: str) -> None:
    network = build(name)
    if network.controller is not None:
        pytest.skip("iterates")
    for controller in (FixedIterations(2), TCI()):
        with pytest.raises(ValueError, match=r"controller=.*single pass"):
            network(*images(network), controller)


@EACH_ITERATING_NETWORK
@torch.no_grad()
def test_controller_of_a_call_replaces_the_networks_own_for_that_call(name: str) -> None:
    network = build(name)
    pair = images(network)
    own = network(*pair)
    twice = network(*pair, FixedIterations(2))
    assert all((count == 2).all() for count in twice.iterations)
    assert torch.equal(network(*pair).displacement, own.displacement)
