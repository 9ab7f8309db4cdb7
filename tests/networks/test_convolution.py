"""oneDNN's operation against PyTorch's convolution, and against the three operations that it stands for."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iregzoo.networks import ADRegNet, IIRPNet, IPEARNet, PANNet, SMGICNet, _convolution
from iregzoo.networks._convolution import Conv3d, ConvChain, conv_leaky, convolve
from iregzoo.networks.canonical import CanonicalNet

LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


def case(**options: Any) -> tuple[Conv3d, Tensor]:
    torch.manual_seed(3)
    return Conv3d(5, 5, 3, **options), torch.randn(2, 5, 9, 8, 7)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many convolutions were oneDNN's, and how many of them one operation with what follows."""
    made = {"_operation": 0, "_followed": 0}
    for name in made:

        def noted(name: str, kept: Any, *given: Any) -> Any:
            made[name] += 1
            return kept(*given)

        monkeypatch.setattr(_convolution, name, partial(noted, name, getattr(_convolution, name)))
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"padding": 1, "bias": False}, {"stride": 2, "padding": 1}, {"dilation": 2}]
)
def test_a_chain_is_its_layers_one_by_one(
    calls: dict[str, int], options: dict[str, Any], layout: torch.memory_format
) -> None:
    conv, x = case(**options)
    chain = ConvChain(conv, nn.LeakyReLU(0.1), Conv3d(5, 4, 1), nn.Sigmoid()).to(memory_format=layout)
    x = x.to(memory_format=layout)
    expected = chain(x.requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(chain(x), expected)
    assert calls == {"_operation": 2 * available(), "_followed": available()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of_plus", LAYOUTS)
def test_what_is_added_is_added_before_the_activation(
    calls: dict[str, int], layout: torch.memory_format, of_plus: torch.memory_format
) -> None:
    """In both orders of memory: channels last, as networks are loaded, it is one operation, and else two."""
    conv, x = case(padding=1)
    conv, x = conv.to(memory_format=layout), x.to(memory_format=layout)
    plus = torch.randn(2, 5, 9, 8, 7).to(memory_format=of_plus)
    expected = F.leaky_relu(conv(x) + plus, 0.2)
    torch.testing.assert_close(conv_leaky(conv, 0.2, x, plus), expected)
    before = x.clone(), plus.clone()
    with torch.inference_mode():
        torch.testing.assert_close(conv_leaky(conv, 0.2, x, plus), expected)
    assert torch.equal(x, before[0])
    assert torch.equal(plus, before[1])
    assert calls["_followed"] == available()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"padding": 1, "bias": False}, {"stride": 2}, {"dilation": 2}, {"padding": "same"}]
)
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_a_convolution_is_that_of_pytorch(
    calls: dict[str, int], batch: int, options: dict[str, Any], layout: torch.memory_format
) -> None:
    conv, x = case(**options)
    theirs = nn.Conv3d(5, 5, 3, **options)
    theirs.load_state_dict(conv.state_dict())
    conv, x = conv.to(memory_format=layout), x[:batch].to(memory_format=layout)
    with torch.no_grad():
        exact = theirs.double()(x.double())
        torch.testing.assert_close(conv(x).double(), exact, rtol=0, atol=1e-5)
        if options == {"padding": 1}:
            found = convolve(x, conv.weight, conv.bias, padding=1)
            torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)
            assert torch.equal(convolve(x.double(), theirs.weight, theirs.bias, padding=1), exact)
    one_dnn = available() and batch > 0 and options != {"padding": "same"}
    assert calls["_operation"] == one_dnn * (1 + (options == {"padding": 1}))


def test_a_convolution_has_its_gradients(calls: dict[str, int]) -> None:
    conv, x = case(padding=1)
    wanted = torch.autograd.grad(conv(x.requires_grad_()).square().sum(), [x, *conv.parameters()])
    theirs = nn.Conv3d(5, 5, 3, padding=1)
    theirs.load_state_dict(conv.state_dict())
    for found, expected in zip(
        wanted, torch.autograd.grad(theirs(x).square().sum(), [x, *theirs.parameters()]), strict=True
    ):
        assert torch.equal(found, expected)
    assert calls["_operation"] == 0


@pytest.mark.skipif("not available()", reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("network", [ADRegNet, IIRPNet, IPEARNet, PANNet, SMGICNet, CanonicalNet])
def test_no_convolution_of_a_network_is_left_to_the_slow_loop(network: type[nn.Module]) -> None:
    """Which PyTorch takes for small volumes; a batch of one on a small grid has such layers in every method.

    Transposed convolutions, of which AD-RegNet and SM-GICNet have some, are all PyTorch's own.
    """
    image = torch.rand(1, 2, 32, 32, 32)
    pair = (image[:, :1],) if network is CanonicalNet else (image[:, :1], image[:, 1:])
    with torch.no_grad(), torch.profiler.profile() as profile:
        network().eval()(*pair)
    ran = {event.key for event in profile.key_averages()}
    assert "mkldnn::_convolution_pointwise" in ran
    assert "aten::slow_conv3d" not in ran


def test_gradients_are_those_of_the_three() -> None:
    conv, x = case(padding=1)
    x, plus = x.double().requires_grad_(), x.clone().double().requires_grad_()
    conv.double()
    assert torch.autograd.gradcheck(
        lambda a, b: conv_leaky(conv, 0.1, a, b), (x[:1, :, :3, :2, :2], plus[:1, :, :3, :2, :2])
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast_computes_in_its_precision_no_less_exactly(layout: torch.memory_format) -> None:
    conv, x = case(padding=1)
    conv, x = conv.to(memory_format=layout), x.to(memory_format=layout)
    with torch.no_grad():
        exact = conv_leaky(conv, 0.1, x, x)
        with torch.autocast("cpu", torch.bfloat16):
            ours = conv_leaky(conv, 0.1, x, x)
            apart = F.leaky_relu(conv(x) + x.bfloat16(), 0.1)
    assert ours.dtype == apart.dtype == torch.bfloat16
    assert (ours - exact).abs().mean() <= (apart - exact).abs().mean()


@pytest.mark.parametrize(
    "change", ["float64", "circular", "same", "hook", "after", "everywhere", "forward", "isa", "none"]
)
def test_what_the_operation_cannot_do_is_done_apart(
    calls: dict[str, int], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    conv, x = case(
        padding="same" if change == "same" else 1, padding_mode="circular" if change == "circular" else "zeros"
    )
    chain = ConvChain(conv, nn.LeakyReLU(0.1))
    seen: list[torch.Size] = []

    def see(layer: nn.Module, given: Any, made: Tensor) -> None:
        seen.append(made.shape)

    handle = None
    if change == "float64":
        chain, x = chain.double(), x.double()
    if change == "hook":
        conv.register_forward_hook(see)
    if change == "after":
        chain[1].register_forward_hook(see)
    if change == "everywhere":
        handle = nn.modules.module.register_module_forward_hook(see)
    if change == "forward":
        monkeypatch.setattr(conv, "forward", lambda given: F.conv3d(given, conv.weight, padding=1))
    if change == "isa":
        monkeypatch.setattr(_convolution, "_has_operation", lambda dtype: dtype != torch.bfloat16)
    if change == "none":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "isa"), torch.no_grad():
        found = chain(x)
        expected = F.leaky_relu(conv(x), 0.1)
    if handle is not None:
        handle.remove()
    assert torch.equal(found, expected)
    assert not calls["_followed"]
    assert bool(seen) == (change in ("hook", "after", "everywhere"))


def test_a_processor_without_bfloat16_has_the_operation_in_float32_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not _convolution._has_operation(torch.bfloat16)
    assert _convolution._has_operation(torch.float32) == available()


def test_a_network_can_be_traced() -> None:
    _, x = case()
    chain = ConvChain(Conv3d(5, 5, 3, padding=1), nn.LeakyReLU(0.1))
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(chain, x)(x[:1]), chain(x[:1]))


def test_float64_stays_so_under_autocast() -> None:
    conv, x = case(padding=1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = ConvChain(conv.double(), nn.LeakyReLU(0.1))(x.double())
    assert found.dtype == torch.float64


def available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
