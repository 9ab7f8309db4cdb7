"""The one operation against the three that it stands for."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iregzoo.networks import _fused
from iregzoo.networks._fused import ConvChain, conv_leaky

LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


def case(**options: Any) -> tuple[nn.Conv3d, Tensor]:
    torch.manual_seed(3)
    return nn.Conv3d(5, 5, 3, **options), torch.randn(2, 5, 9, 8, 7)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each convolution was one operation with what follows."""
    made: list[bool] = []
    decide = _fused._fuses

    def noted(conv: nn.Conv3d, x: Tensor) -> bool:
        made.append(decide(conv, x))
        return made[-1]

    monkeypatch.setattr(_fused, "_fuses", noted)
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"padding": 1, "bias": False}, {"stride": 2, "padding": 1}, {"dilation": 2}]
)
def test_a_chain_is_its_layers_one_by_one(
    calls: list[bool], options: dict[str, Any], layout: torch.memory_format
) -> None:
    conv, x = case(**options)
    chain = ConvChain(conv, nn.LeakyReLU(0.1), nn.Conv3d(5, 4, 1), nn.Sigmoid()).to(memory_format=layout)
    x = x.to(memory_format=layout)
    expected = chain(x.requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(chain(x), expected)
    assert calls == [False, available()]


def test_what_is_added_is_added_before_the_activation(calls: list[bool]) -> None:
    conv, x = case(padding=1)
    plus = torch.randn(2, 5, 9, 8, 7)
    expected = F.leaky_relu(conv(x) + plus, 0.2)
    torch.testing.assert_close(conv_leaky(conv, 0.2, x, plus), expected)
    before = x.clone(), plus.clone()
    with torch.inference_mode():
        torch.testing.assert_close(conv_leaky(conv, 0.2, x, plus), expected)
    assert torch.equal(x, before[0])
    assert torch.equal(plus, before[1])
    assert calls == [False, available()]


def test_gradients_are_those_of_the_three() -> None:
    conv, x = case(padding=1)
    x, plus = x.double().requires_grad_(), x.clone().double().requires_grad_()
    conv.double()
    assert torch.autograd.gradcheck(
        lambda a, b: conv_leaky(conv, 0.1, a, b), (x[:1, :, :3, :2, :2], plus[:1, :, :3, :2, :2])
    )


def test_autocast_computes_in_its_precision_no_less_exactly() -> None:
    conv, x = case(padding=1)
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
    calls: list[bool], monkeypatch: pytest.MonkeyPatch, change: str
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
        monkeypatch.setattr(_fused, "_has_operation", lambda dtype: dtype != torch.bfloat16)
    if change == "none":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "isa"), torch.no_grad():
        found = chain(x)
        expected = F.leaky_relu(conv(x), 0.1)
    if handle is not None:
        handle.remove()
    assert torch.equal(found, expected)
    assert not any(calls)
    assert bool(seen) == (change in ("hook", "after", "everywhere"))


def test_a_processor_without_bfloat16_has_the_operation_in_float32_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not _fused._has_operation(torch.bfloat16)
    assert _fused._has_operation(torch.float32) == available()


def test_a_network_can_be_traced() -> None:
    _, x = case()
    chain = ConvChain(nn.Conv3d(5, 5, 3, padding=1), nn.LeakyReLU(0.1))
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(chain, x)(x[:1]), chain(x[:1]))


def test_float64_stays_so_under_autocast() -> None:
    conv, x = case(padding=1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = ConvChain(conv.double(), nn.LeakyReLU(0.1))(x.double())
    assert found.dtype == torch.float64


def available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
