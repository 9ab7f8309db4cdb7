"""The one operation against the three that it stands for."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iregzoo.networks import _fused
from iregzoo.networks._fused import Chain, conv_leaky

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
    chain = Chain(conv, nn.LeakyReLU(0.1), nn.Conv3d(5, 4, 1), nn.Sigmoid()).to(memory_format=layout)
    x = x.to(memory_format=layout)
    expected = chain(x.requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(chain(x), expected)
    assert calls == [False, available()]


def test_what_is_added_is_added_before_the_activation(calls: list[bool]) -> None:
    conv, x = case(padding=1)
    plus = torch.randn(2, 5, 9, 8, 7)
    expected = nn.functional.leaky_relu(conv(x) + plus, 0.2)
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
            apart = nn.functional.leaky_relu(conv(x) + x.bfloat16(), 0.1)
    assert ours.dtype == apart.dtype == torch.bfloat16
    assert (ours - exact).abs().mean() <= (apart - exact).abs().mean()


@pytest.mark.parametrize("reason", ["float64", "hook", "padding", "lacking"])
def test_what_the_operation_cannot_do_is_done_apart(
    calls: list[bool], monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    conv, x = case(padding=1, padding_mode="circular" if reason == "padding" else "zeros")
    seen = []
    if reason == "float64":
        conv, x = conv.double(), x.double()
    if reason == "hook":
        conv.register_forward_hook(lambda layer, given, made: seen.append(made.shape))
    if reason == "lacking":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    expected = nn.functional.leaky_relu(conv(x), 0.1)
    with torch.no_grad():
        assert torch.equal(conv_leaky(conv, 0.1, x), expected)
    assert calls == [False]
    assert len(seen) == (2 if reason == "hook" else 0)


def available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
