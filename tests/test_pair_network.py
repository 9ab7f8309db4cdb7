"""A bundle's network in a notebook: what it takes as it comes, and what it refuses in words."""

import pytest
import torch
from torch import Tensor, nn

from iregzoo import networks
from iregzoo.fields import compose, sample, warp
from iregzoo.iteration import TCI, FixedIterations
from iregzoo.registration import PairNetwork
from iregzoo.similarity import local_ncc, mse, ncc, ssim

EACH_NETWORK = pytest.mark.parametrize("name", networks.__all__)


def build(name: str = "IIRPNet") -> PairNetwork:
    narrow = {
        "IIRPNet": {"channels": (4, 4), "widths": (4, 4)},
        "SMGICNet": {"channels": 4},
        "ADRegNet": {"channels": (8, 8)},
    }
    torch.manual_seed(0)
    network: nn.Module = getattr(networks, name)(**narrow.get(name, {}))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return PairNetwork(network).eval().requires_grad_(False)


def pair(network: PairNetwork, batch: int = 1) -> Tensor:
    """Images in [0, 1] as whole 255ths, which integers hold, too."""
    size = 2 * network.stride
    whole = torch.randint(0, 256, (batch, 2, size, size, size), generator=torch.manual_seed(1))
    return whole / 255


@EACH_NETWORK
def test_any_dtype_is_taken(name: str) -> None:
    network = build(name)
    image = pair(network)
    expected = network(image)
    assert expected.abs().max() > 0.01
    doubled = network(image.double())
    assert doubled.dtype == torch.float32
    torch.testing.assert_close(doubled, expected, rtol=0, atol=0)
    torch.testing.assert_close(network(image.half()), expected, rtol=0, atol=0.05)
    mask = (image > 0.5).to(torch.uint8)
    torch.testing.assert_close(network(mask), network(mask.float()), rtol=0, atol=0)


def test_an_image_takes_the_precision_of_weights_in_float64() -> None:
    network = build().double()
    assert network(pair(network)).dtype == torch.float64


@EACH_NETWORK
def test_another_shape_is_refused_with_what_is_expected(name: str) -> None:
    network = build(name)
    image = pair(network)
    for wrong in (image[0], image[:, :1], image.movedim(1, -1), image[:, :, :, :, 0]):
        with pytest.raises(ValueError, match=r"image has shape \(.*expected \(B, 2, D, H, W\): moving then fixed"):
            network(wrong)
    with pytest.raises(ValueError, match=r"torch.cat\(\(moving, fixed\), 1\)"):
        network(image[:, :1], image[:, 1:])
    with pytest.raises(ValueError, match=rf"D, H, W multiples of {network.network.stride}: pad or crop"):
        network(image[..., :-1])


@EACH_NETWORK
def test_what_is_no_tensor_is_refused(name: str) -> None:
    network = build(name)
    image = pair(network)
    with pytest.raises(TypeError, match=r"image is a ndarray; expected a tensor: torch\.from_numpy"):
        network(image.numpy())
    with pytest.raises(TypeError, match="image is a tuple"):
        network((image[:, :1], image[:, 1:]))
    with pytest.raises(TypeError, match="fixed is a ndarray"):
        network.network(image[:, :1], image[:, 1:].numpy())


def test_another_device_is_named() -> None:
    network = build()
    with pytest.raises(ValueError, match="image is on meta, but the network on cpu; move one"):
        network(pair(network).to("meta"))
    image, field = torch.rand(1, 1, 4, 4, 4), torch.zeros(1, 3, 4, 4, 4)
    with pytest.raises(ValueError, match="image is on cpu, but where to read it on meta"):
        warp(image, field.to("meta"))


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (lambda image: 255 * image, r"to 25\d"),
        (lambda image: (255 * image).to(torch.uint8), r"to 25\d"),
        (lambda image: (image - image.mean()) / image.std(), "from -1"),
        (lambda image: image.where(image < 0.9, torch.nan), "nan"),
        (lambda image: image / image[:, :1].round(), "inf"),
    ],
    ids=["grey levels", "integers", "z-scores", "NaN", "infinite"],
)
def test_intensities_far_from_the_range_are_refused(change: object, shown: str) -> None:
    network = build()
    with pytest.raises(ValueError, match=rf"image holds intensities .*{shown}.* expected finite ones in \[0, 1\]"):
        network(change(pair(network)))  # type: ignore[operator]


def test_intensities_that_overshoot_a_little_are_taken_and_training_is_not_looked_at() -> None:
    network = build()
    image = pair(network)
    assert network(1.2 * image - 0.1).isfinite().all()
    assert network(image[:0]).shape == (0, 3, *image.shape[2:])
    assert network.train()(255 * image).isfinite().all()


@pytest.mark.parametrize("wrong", ["tci", TCI])
def test_a_controller_is_an_object(wrong: object) -> None:
    network = build()
    with pytest.raises(TypeError, match=r"controller=.*expected an object of iregzoo.iteration, such as TCI\(\)"):
        network.register(pair(network), wrong)  # type: ignore[arg-type]
    assert [int(count) for count in network.register(pair(network), FixedIterations(2)).iterations] == [2, 2]


def test_fields_and_similarities_refuse_what_they_would_misread() -> None:
    image, field = torch.rand(1, 1, 5, 6, 7), torch.zeros(1, 3, 5, 6, 7)
    for call in (lambda: warp(image[0, 0], field), lambda: warp(image[0], field), lambda: sample(image[0], field)):
        with pytest.raises(ValueError, match=r"expected 5 axes, \(B, C, \*shape\) with B = 1"):
            call()
    for call in (
        lambda: warp(image, field.expand(2, -1, -1, -1, -1)),
        lambda: warp(image.expand(2, -1, -1, -1, -1), field),
    ):
        with pytest.raises(ValueError, match=r"image has shape .*with B = [12]"):
            call()
    for similarity in (mse, ncc, local_ncc, ssim):
        with pytest.raises(ValueError, match=r"shape \(5, 6, 7\); expected \(B, C, H, W\) or"):
            similarity(image[0, 0], image[0, 0])
        with pytest.raises(TypeError, match="image is a ndarray"):
            similarity(image, image.numpy())
    with pytest.raises(TypeError, match="displacement is a ndarray"):
        warp(image, field.numpy())
    with pytest.raises(TypeError, match="image is a ndarray"):
        warp(image.numpy(), field)
    with pytest.raises(TypeError, match="displacement is a ndarray"):
        compose(field, field.numpy())
