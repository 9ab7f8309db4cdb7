"""On a GPU every method gives what it gives on the CPU."""

import pytest
import torch
from torch import Tensor

from iregzoo import zoo
from iregzoo.fields import warp
from iregzoo.iteration import FixedIterations
from iregzoo.losses import RegistrationLoss
from iregzoo.networks.canonical import CanonicalNet
from iregzoo.refinement import refine_displacement
from meter import smooth_pair

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
METHODS = [bundle.name for bundle in zoo.bundles()]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32, and not in the ten bits of TF32, in which they run unless told."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def image() -> Tensor:
    return smooth_pair((32, 48, 32))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", METHODS)
def test_displacements_are_those_of_the_cpu(name: str, image: Tensor) -> None:
    found = []
    with torch.inference_mode():
        for device in ("cpu", "cuda"):
            network = zoo.load(name, device=device, precision="float32").network
            passes = FixedIterations(2) if network.controller is not None and name in ("iirp", "ipear") else None
            found.append(network.register(image.to(device), passes).displacement.cpu())
    assert found[0].abs().amax() > 0.5
    assert (found[0] - found[1]).abs().amax() < 2e-3


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_stays_near(name: str, image: Tensor) -> None:
    found = []
    with torch.inference_mode():
        for precision in ("float32", "bfloat16"):
            network = zoo.load(name, device="cuda", precision=precision).network
            passes = FixedIterations(1) if network.controller is not None else None
            found.append(network.register(image.cuda(), passes).displacement)
    assert torch.linalg.vector_norm(found[0] - found[1], dim=1).mean() < 0.05


def test_features_of_the_network_of_one_contrast_stay_in_bfloat16_under_autocast(image: Tensor) -> None:
    """Layer norm would be computed in float32, and keep as much for the gradient."""
    network = CanonicalNet().cuda()
    with torch.autocast("cuda", torch.bfloat16):
        assert network.features(image.cuda()).dtype == torch.bfloat16


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_the_cpu(name: str, image: Tensor) -> None:
    gradients = []
    for device in ("cpu", "cuda"):
        network = zoo.load(name, device=device, precision="float32").network.requires_grad_(True).train()
        pair = image.to(device)
        loss = RegistrationLoss()(network(pair, True), pair[:, :1], pair[:, 1:])["loss"]
        torch.autograd.backward(loss)
        gradients.append(
            torch.cat([each.grad.flatten().cpu() for each in network.parameters() if each.grad is not None])
        )
    assert (gradients[0] - gradients[1]).norm() < 2e-2 * gradients[0].norm()


def test_gradient_steps_are_those_of_the_cpu(image: Tensor) -> None:
    start = torch.zeros(1, 3, *image.shape[2:])
    found = []
    for device in ("cpu", "cuda"):
        pair = image.to(device)
        found.append(refine_displacement(start.to(device), pair[:, :1], pair[:, 1:], steps=10).cpu())
    assert found[0].abs().amax() > 0.1
    assert (found[0] - found[1]).abs().mean() < 1e-2
    worth = [(warp(image[:, :1], each) - image[:, 1:]).square().mean() for each in (start, found[1])]
    assert worth[1] < worth[0]
