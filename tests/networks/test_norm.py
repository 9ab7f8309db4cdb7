"""Instance norm in place, slab by slab, against torch's in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iregzoo.networks import _norm
from iregzoo.networks._convolution import Conv3d, ConvChain
from iregzoo.networks._norm import InstanceNorm, may_overwrite, normalise_


def features(*shape: int, offset: float = 3.0) -> Tensor:
    """Channels of different means and spreads, in channels-last order, as a convolution gives them."""
    noise = torch.randn(*shape, generator=torch.manual_seed(0))
    spread = torch.linspace(0.1, 5, shape[1]).view(1, -1, 1, 1, 1)
    return (noise * spread + offset * spread).contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("slab", [1, 3000, 2**18])
@pytest.mark.parametrize(("offset", "limit"), [(0.0, 1e-5), (3.0, 1e-5), (1000.0, 1e-3)])
def test_it_is_torchs_however_the_volume_is_cut(
    monkeypatch: pytest.MonkeyPatch, slab: int, offset: float, limit: float
) -> None:
    """Also where a mean is a thousand spreads away, and a sum of squares would have lost them."""
    monkeypatch.setattr(_norm, "SLAB", slab)
    x = features(2, 5, 7, 12, 9, offset=offset)
    expected = F.leaky_relu(F.instance_norm(x.double()), 0.1)
    found = normalise_(x, 0.1)
    assert found is x
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=limit)


def test_planes_of_different_brightness_do_not_lose_precision() -> None:
    """Slabs whose own means differ by far more than their spreads."""
    x = features(1, 4, 16, 64, 64)
    x += 100 * torch.arange(16).view(1, 1, -1, 1, 1)
    expected = F.instance_norm(x.double())
    torch.testing.assert_close(normalise_(x, 1.0).double(), expected, rtol=0, atol=2e-5)


def test_bfloat16_is_rounded_once() -> None:
    x = features(2, 5, 7, 12, 9).bfloat16()
    expected = F.leaky_relu(F.instance_norm(x.double()), 0.1).bfloat16()
    torch.testing.assert_close(normalise_(x, 0.1), expected, rtol=2**-8, atol=1e-6)


def test_a_flat_channel_becomes_zero_and_what_is_not_finite_stays_in_its_channel() -> None:
    x = features(1, 3, 4, 5, 6)
    x[:, 0], x[:, 1, 0, 0, 0] = 7, torch.nan
    found = normalise_(x, 0.1)
    assert (found[:, 0] == 0).all()
    assert found[:, 1].isnan().all()
    assert found[:, 2].isfinite().all()


@pytest.mark.parametrize("batch", [1, 2])
def test_a_chain_overwrites_what_it_made_itself_and_nothing_else(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(_norm, "LARGE", 1)
    torch.manual_seed(0)
    chain = ConvChain(Conv3d(5, 6, 3, padding=1), InstanceNorm(), nn.LeakyReLU(0.1))
    follows = ConvChain(InstanceNorm(), nn.LeakyReLU(0.1))
    chain = chain.to(memory_format=torch.channels_last_3d)
    x = features(batch, 5, 7, 12, 9)
    kept = x.clone()
    wanted, alone = chain(x.requires_grad_()).detach(), follows(x).detach()
    calls: list[float] = []
    monkeypatch.setattr(
        "iregzoo.networks._convolution.normalise_", lambda x, slope: (calls.append(slope), normalise_(x, slope))[1]
    )
    with torch.no_grad():
        torch.testing.assert_close(chain(x), wanted, rtol=0, atol=1e-5)
        assert calls == [0.1]
        torch.testing.assert_close(follows(x), alone, rtol=0, atol=1e-5)
    assert calls == [0.1]
    assert torch.equal(x.detach(), kept)


def test_small_volumes_gradients_and_other_orders_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = features(1, 5, 7, 12, 9)
    with torch.no_grad():
        assert not may_overwrite(x)
        monkeypatch.setattr(_norm, "LARGE", x.numel())
        assert may_overwrite(x)
        assert not may_overwrite(x.contiguous())
        assert not may_overwrite(x[0])
        assert not may_overwrite(x[:0])
    assert not may_overwrite(x)
