"""Weights of PAN's published code: the same field from them, here and in that code's network written out again."""

import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iregzoo import zoo
from iregzoo.errors import InputError
from iregzoo.networks import PANNet
from iregzoo.registration import PairNetwork
from iregzoo.states import rename

RULES = json.loads((Path(__file__).parents[2] / "bundles/pan/configs/import.json").read_text("utf-8"))
HEADS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8}
CHANNELS = {1: 16, 2: 32, 3: 64, 4: 128, 5: 256}
State = dict[str, Tensor]


# --- the published network, written out with its names, in float64


class Weights:
    """Random tensors, of a given seed."""

    def __init__(self) -> None:
        self.generator = torch.manual_seed(0)
        self.state: State = {}

    def add(self, name: str, *shape: int, gain: float = 1.0, mean: float = 0.0) -> None:
        noise = torch.randn(shape, generator=self.generator)
        self.state[name] = mean + gain * noise

    def conv(self, name: str, before: int, after: int, gain: float = 1.0) -> None:
        self.add(f"{name}.weight", after, before, 3, 3, 3, gain=gain / (27 * before) ** 0.5)
        self.add(f"{name}.bias", after, gain=0.1)


@cache
def published_weights() -> State:
    """Residuals of a good part of a voxel at each level, so that every step of the way shows."""
    weights = Weights()
    before = 8
    weights.conv("encoder.conv0.0.main", 1, before)
    for level, channels in CHANNELS.items():
        block, heads = f"encoder.conv{level - 1}", HEADS[level]
        weights.conv(f"{block}.1.main", before, channels)
        weights.conv(f"{block}.2.main", channels, channels)
        weights.add(f"{block}.3.fc.0.weight", channels // 16, channels, gain=2.0)
        weights.add(f"{block}.3.fc.2.weight", channels, channels // 16, gain=2.0)
        weights.add(f"peblock{level}.proj.weight", 6 * heads, channels + 1, gain=channels**-0.5)
        weights.add(f"peblock{level}.proj.bias", 6 * heads, gain=0.3)
        weights.add(f"peblock{level}.norm.weight", 6 * heads, gain=0.2, mean=1.0)
        weights.add(f"peblock{level}.norm.bias", 6 * heads, gain=0.3)
        weights.add(f"flow_peblock{level}.proj.weight", 6, 3)  # not used
        weights.add(f"lat{level}.rpb", heads, 3, 3, 3)
        weights.state[f"lat{level}.v"] = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=3)))
        weights.conv(f"dfi{level}.conv", 3 * heads, 3)
        weights.state[f"transformer.{level - 1}.grid"] = torch.zeros(1, 3, 160 >> level, 192 >> level, 2)
        before = channels
    return weights.state


def published_state() -> State:
    return dict(published_weights())


def parameters(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not any(map(name.__contains__, ("grid", ".v", "flow_")))}


class Published:
    """One pass a level, coarse to fine."""

    def __init__(self, state: State) -> None:
        self.state = {name: tensor.double() for name, tensor in state.items()}

    def conv(self, x: Tensor, name: str) -> Tensor:
        return F.conv3d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], padding=1)

    def conv_ins(self, x: Tensor, name: str) -> Tensor:
        x = self.conv(x, name)
        mean = x.mean((2, 3, 4), keepdim=True)
        variance = (x - mean).square().mean((2, 3, 4), keepdim=True)
        return F.leaky_relu((x - mean) / (variance + 1e-5).sqrt(), 0.1)

    def squeeze_excite(self, x: Tensor, name: str) -> Tensor:
        squeezed = F.leaky_relu(x.mean((2, 3, 4)) @ self.state[f"{name}.0.weight"].T, 0.01)
        return torch.einsum("bcdhw,bc->bcdhw", x, torch.sigmoid(squeezed @ self.state[f"{name}.2.weight"].T))

    def encode(self, image: Tensor) -> dict[int, Tensor]:
        x = F.leaky_relu(self.conv(image, "encoder.conv0.0.main"), 0.1)
        levels = {}
        for level in CHANNELS:
            x = F.avg_pool3d(x, 2) if level > 1 else x
            for layer in (1, 2):
                x = self.conv_ins(x, f"encoder.conv{level - 1}.{layer}.main")
            x = self.squeeze_excite(x, f"encoder.conv{level - 1}.3.fc")
            levels[level] = torch.cat((x, F.avg_pool3d(image, 2 ** (level - 1))), dim=1)
        return levels

    def tokens(self, x: Tensor, level: int) -> Tensor:
        """(B, S, D, H, W, 6)."""
        last = x.permute(0, 2, 3, 4, 1)
        linear = F.linear(last, *(self.state[f"peblock{level}.proj.{kind}"] for kind in ("weight", "bias")))
        norm = [self.state[f"peblock{level}.norm.{kind}"] for kind in ("weight", "bias")]
        return F.layer_norm(linear, linear.shape[-1:], *norm).unflatten(-1, (HEADS[level], 6)).movedim(-2, 1)

    def attend(self, warped: Tensor, fixed: Tensor, level: int) -> Tensor:
        """With an unfold of the keys."""
        query, key = self.tokens(fixed, level), self.tokens(warped, level)
        padded = F.pad(key, (0, 0, 1, 1, 1, 1, 1, 1))
        neighbours = padded.unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1)
        logits = torch.einsum("bsdhwc,bsdhwcijk->bsdhwijk", query, neighbours).flatten(-3)
        bias = self.state[f"lat{level}.rpb"].flatten(1)[:, None, None, None]
        fields = (logits + bias).softmax(-1) @ self.state[f"lat{level}.v"]
        return self.conv(fields.movedim(-1, 2).flatten(1, 2), f"dfi{level}.conv")

    def __call__(self, moving: Tensor, fixed: Tensor) -> list[Tensor]:
        """Fields in voxels of their level's grid, coarse to fine."""
        moving_levels, fixed_levels = self.encode(moving), self.encode(fixed)
        fields = [self.attend(moving_levels[5], fixed_levels[5], 5)]
        for level in (4, 3, 2, 1):
            flow = F.interpolate(2 * fields[-1], scale_factor=2, mode="trilinear", align_corners=True)
            step = self.attend(published_warp(moving_levels[level], flow), fixed_levels[level], level)
            fields.append(published_warp(flow, step) + step)
        return fields


def published_warp(image: Tensor, flow: Tensor) -> Tensor:
    """Trilinear, align_corners=True, zeros outside: image(x + flow(x)), by torch's normalised coordinates."""
    sizes = image.shape[2:]
    axes = [torch.arange(size, dtype=flow.dtype) for size in sizes]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None] + flow
    scaled = [2 * places[:, axis] / (size - 1) - 1 for axis, size in enumerate(sizes)]
    return F.grid_sample(image, torch.stack(scaled[::-1], dim=-1), padding_mode="zeros", align_corners=True)


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    moving, fixed = torch.rand(2, 1, 1, *shape, generator=torch.manual_seed(1))
    return moving, fixed


# --- the import


def imported(state: State) -> nn.Module:
    """The bundle's network with published weights, as ``iregzoo import-checkpoint`` and ``--weights`` give it."""
    with TemporaryDirectory() as folder:
        source, target = Path(folder) / "published.pth", Path(folder) / "pan.pt"
        torch.save({"model_state": state}, source)
        zoo.import_checkpoint("pan", source, target)
        return zoo.load("pan", str(target)).network.network


@torch.no_grad()
def test_imported_weights_give_the_published_fields() -> None:
    state = published_state()
    moving, fixed = pair(32, 48, 32)
    found = imported(state)(moving, fixed).pyramid
    expected = Published(state)(moving.double(), fixed.double())
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.std() > 0.1
        assert (ours - theirs).abs().max() < 1e-3
    assert expected[-1].abs().mean() > 1


def test_every_published_parameter_is_used() -> None:
    state = {name: tensor.clone().requires_grad_() for name, tensor in parameters(published_state()).items()}
    assert sum(tensor.numel() for tensor in state.values()) == 3_568_751
    fields = Published({**published_state(), **state})(*(image.double() for image in pair(32, 32, 32)))
    fields[-1].square().sum().backward()
    undone = {f"encoder.conv{level}.{layer}.main.bias" for level in range(5) for layer in (1, 2)}  # by the norm
    assert [name for name, tensor in state.items() if tensor.grad is None] == []
    assert [name for name, tensor in state.items() if name not in undone and tensor.grad.abs().max() < 1e-6] == []


def test_names_go_there_and_back() -> None:
    ours = {new: old for old, new in RULES["names"].items()}
    assert len(ours) == len(RULES["names"])
    state = PairNetwork(PANNet()).state_dict()
    published = rename(state, ours)
    assert set(published) == set(parameters(published_state()))
    assert list(rename(published, RULES["names"])) == list(state)


PARTS = ("encoder.conv0.0.main.bias", "encoder.conv4.2.main.weight", "encoder.conv1.3.fc.2.weight")


@pytest.mark.parametrize("name", [*PARTS, "peblock1.proj.weight", "peblock5.norm.bias", "lat2.rpb", "dfi3.conv.bias"])
def test_missing_tensor_is_named_as_published(name: str) -> None:
    state = published_state()
    del state[name]
    with pytest.raises(InputError, match=rf"published\.pth: has no tensor '{name}'"):
        imported(state)


@pytest.mark.parametrize("name", ["lat6.rpb", "encoder.conv0.1.main.scale", "peblock1.weight", "network.grid"])
def test_extra_tensor_is_named_as_published(name: str) -> None:
    with pytest.raises(InputError, match=rf"unexpected tensor '{name}'"):
        imported({**published_state(), name: torch.ones(3)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda bias: bias.flatten(1), r"has shape \(4, 27\), expected \(4, 3, 3, 3\)"),
        (lambda bias: bias[:2], r"has shape \(2, 3, 3, 3\), expected \(4, 3, 3, 3\)"),
        (lambda bias: bias / 0, "holds NaN or infinite values"),
    ],
)
def test_position_bias_that_does_not_fit_is_refused(change: Callable[[Tensor], Tensor], message: str) -> None:
    state = published_state()
    state["lat4.rpb"] = change(state["lat4.rpb"])
    with pytest.raises(InputError, match=rf"'lat4\.rpb' {message}"):
        imported(state)
