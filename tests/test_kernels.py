"""Triton's kernels give what the other ways give: in Triton's interpreter, and on a GPU where there is one."""

import importlib.util
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor

from iregzoo import fields, kernels
from iregzoo.attention import neighbourhood_attention, offset_attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = importlib.util.find_spec("triton") is not None
GPU = torch.cuda.is_available() and TRITON and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
ORDERS = (torch.contiguous_format, torch.channels_last_3d)

here = pytest.mark.skipif(not (GPU or INTERPRETED), reason="runs in the interpreter, and where there is a GPU")


@pytest.mark.skipif(INTERPRETED, reason="is the one that starts the interpreter")
@pytest.mark.skipif(not TRITON, reason="needs Triton, which is for Linux")
def test_kernels_give_in_the_interpreter_what_the_other_ways_give() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", __file__]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = re.search(r"(\d+) passed", done.stdout)
    assert counted is not None
    assert int(counted[1]) > 30  # and not skipped


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@here
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("channels", [1, 3, 40])
def test_sampling(channels: int, dtype: torch.dtype, order: torch.memory_format, padding: str) -> None:
    image = normal(2, channels, 5, 6, 7).to(dtype).to(memory_format=order)
    displacement = 3 * normal(2, 3, 5, 6, 7, seed=1)
    places = 8 * normal(2, 3, 4, 5, 3, seed=2)
    for relative, where in ((True, displacement), (False, places)):
        expected = (fields.warp if relative else fields.sample)(image.float(), where, padding=padding)
        given = image.to(DEVICE), where.to(DEVICE)
        found = kernels.sample(*given, relative=relative, padding=padding)
        assert found.dtype == dtype
        assert torch.allclose(found.cpu().float(), expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@here
def test_samples_are_written_into_what_is_given() -> None:
    image, displacement = normal(2, 4, 5, 6, 7), normal(2, 3, 5, 6, 7, seed=1)
    joined = torch.full((2, 8, 5, 6, 7), 9.0, device=DEVICE).to(memory_format=torch.channels_last_3d)
    kernels.sample(image.to(DEVICE), displacement.to(DEVICE), relative=True, padding="zeros", out=joined[:, :4])
    assert torch.allclose(joined[:, :4].cpu(), fields.warp(image, displacement), atol=1e-5)
    assert (joined[:, 4:] == 9).all()


@here
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_places_that_are_far_away_or_no_numbers(padding: str) -> None:
    image = normal(1, 2, 5, 6, 7)
    places = torch.zeros(1, 3, 1, 1, 4)
    places[0, :, 0, 0] = torch.tensor([[1e30, -1e30, 2.0, torch.nan], [1.0, 1.0, torch.inf, 1.0], [1.0, 1.0, 1.0, 1.0]])
    expected = fields.sample(image, places, padding=padding)
    found = kernels.sample(image.to(DEVICE), places.to(DEVICE), relative=False, padding=padding).cpu()
    assert torch.allclose(found, expected, atol=1e-5, equal_nan=True)
    assert found[..., 3].isnan().all()


@here
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("shape", [(1, 5, 6), (5, 1, 6), (5, 6, 1), (1, 1, 1)])
def test_an_axis_of_one_voxel(shape: tuple[int, ...], padding: str) -> None:
    image, displacement = normal(2, 3, *shape), normal(2, 3, *shape, seed=1)
    expected = fields.warp(image, displacement, padding=padding)
    found = kernels.sample(image.to(DEVICE), displacement.to(DEVICE), relative=True, padding=padding).cpu()
    assert torch.allclose(found, expected, atol=1e-5)


def heads_apart(*operands: Tensor, heads: int) -> list[Tensor]:
    return [operand.unflatten(1, (heads, -1)).to(DEVICE) for operand in operands]


@here
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("window", [(3, 3, 3), (4, 5, 3), (3, 1, 6)])
def test_attention_to_a_window_inside(window: tuple[int, int, int], dtype: torch.dtype) -> None:
    query, key = (normal(2, 12, 4, 5, 6, seed=seed).to(dtype) for seed in (0, 1))
    value = normal(2, 8, 4, 5, 6, seed=2).to(dtype)
    expected = neighbourhood_attention(*(each.double() for each in (query, key, value)), window=window, heads=2)
    found = kernels.attend(*heads_apart(query, key, value, heads=2), None, window, 6**-0.5).flatten(1, 2)
    assert found.dtype == dtype
    assert torch.allclose(found.cpu().double(), expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@here
@pytest.mark.parametrize("size", [(3, 3, 3), (5, 3, 1)])
def test_attention_to_offsets(size: tuple[int, int, int]) -> None:
    query, key = (normal(2, 12, 4, 5, 6, seed=seed) for seed in (0, 1))
    bias = normal(2, *size, seed=2)
    expected = offset_attention(*(each.double() for each in (query, key, bias)), scale=0.7)
    parts = heads_apart(query, key, heads=2)
    found = kernels.attend(*parts, None, bias.flatten(1).to(DEVICE), size, 0.7).flatten(1, 2)
    assert found.dtype == torch.float32
    assert torch.allclose(found.cpu().double(), expected, atol=1e-5)


@here
def test_a_neighbour_may_be_ruled_out_by_its_bias() -> None:
    query, key = (normal(1, 6, 3, 4, 3, seed=seed) for seed in (0, 1))
    bias = normal(1, 3, 3, 3, seed=2)
    bias[:, 0, 0] = -torch.inf
    expected = offset_attention(query.double(), key.double(), bias.double())
    parts = heads_apart(query, key, heads=1)
    found = kernels.attend(*parts, None, bias.flatten(1).to(DEVICE), (3, 3, 3), 1.0).flatten(1, 2)
    assert torch.allclose(found.cpu().double(), expected, atol=1e-5)


@here
def test_a_softmax_of_large_logits_stays_finite() -> None:
    query, key, value = (100 * normal(1, 4, 3, 3, 4, seed=seed) for seed in range(3))
    expected = neighbourhood_attention(query.double(), key.double(), value.double())
    found = kernels.attend(*heads_apart(query, key, value, heads=1), None, (3, 3, 3), 0.5).flatten(1, 2)
    assert torch.allclose(found.cpu().double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler, which the interpreter replaces")
@pytest.mark.parametrize(
    ("name", "others"),
    [("sample", {}), ("attend", {}), ("attend", {"key": "*fp32", "value": "*fp16"}), ("attend", {"offsets": True})],
)
def test_kernels_compile_for_a_gpu_also_where_there_is_none(
    name: str, others: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # its default so far; without it, 3.9 warns
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel = getattr(importlib.import_module("iregzoo._triton"), name)
    window = {f"window_{axis}": 3 for axis in range(3)}
    constants = {
        "sample": {"relative": True, "border": True, "block": 64, "block_channels": 32},
        "attend": {**window, "offsets": False, "block": 64, "block_channels": 32, "block_values": 32},
    }[name]
    constants |= {argument: value for argument, value in others.items() if argument in constants}
    volumes = dict.fromkeys(("image", "out", "query", "key", "value", "bias"), "*bf16")
    types = {**volumes, "places": "*fp32", "scale": "fp32", **others, **dict.fromkeys(constants, "constexpr")}
    signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
    given = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    compiled = compile(ASTSource(kernel, signature, constexprs=given), target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]


def test_a_cpu_goes_the_other_ways() -> None:
    image, places = normal(1, 2, 4, 4, 4), normal(1, 3, 4, 4, 4)
    assert not kernels.samples(image, places)
    assert not kernels.attends(image, image, image)


@pytest.mark.skipif(not TRITON, reason="needs Triton, which is for Linux")
def test_where_triton_cannot_run_a_warning_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Tensor:
        raise RuntimeError("Failed to find\nC compiler")

    monkeypatch.setattr(kernels, "computes_bfloat16", lambda device: True)
    monkeypatch.setattr(kernels, "sample", broken)
    with pytest.warns(UserWarning, match=r"does not run on cpu \(Failed to find C compiler\).*needs a C compiler"):
        assert not kernels._works.__wrapped__(torch.device("cpu"))
    monkeypatch.setattr(kernels, "computes_bfloat16", lambda device: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is tried
        assert not kernels._works.__wrapped__(torch.device("cpu"))


@pytest.mark.skipif(not GPU, reason="needs a GPU and Triton")
def test_a_gpu_goes_this_way_unless_gradients_are_wanted() -> None:
    image, places = normal(1, 2, 4, 4, 4).cuda(), normal(1, 3, 4, 4, 4).cuda()
    assert kernels.samples(image, places, places)
    assert kernels.attends(image, image, image)
    image.requires_grad_()
    assert not kernels.samples(image, places)
    assert not kernels.attends(places, image, image)
    with torch.no_grad():
        assert kernels.samples(image, places)


@pytest.mark.skipif(not GPU, reason="needs a GPU and Triton")
def test_what_the_kernels_cannot_read_goes_the_other_ways() -> None:
    image, places = normal(2, 2, 4, 4, 4).cuda(), normal(2, 3, 4, 4, 4).cuda()
    others = [(image.double(), places), (image, places.double()), (image[:1], places), (image[:0], places[:0])]
    others += [(MetaTensor(image), places), (image.cpu(), places)]
    assert not any(kernels.samples(*each) for each in others)
    assert not kernels.samples(image, places, places.double())


@pytest.mark.skipif(not GPU, reason="needs a GPU and Triton")
def test_a_network_s_own_bias_goes_this_way(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor | None] = []
    attend = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *given: asked.append(given[3]) or attend(*given))
    query = normal(1, 6, 4, 4, 4).cuda()
    with torch.inference_mode():
        offset_attention(query, query, torch.nn.Parameter(torch.zeros(1, 3, 3, 3, device="cuda")))
    assert len(asked) == 1
