"""The least that a network could take: its arithmetic at the machine's matrix rate, its tensors at its copying rate."""

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from iregzoo.iteration import Controller
from iregzoo.precision import Precision, computes_bfloat16
from iregzoo.registration import PairNetwork
from meter import Found, synchronise

MATRIX = {"cpu": 4096, "cuda": 8192}  # rows and columns
COPIED = 1 << 30  # bytes: beyond any cache
TRIES = 5


def precisions(device: str) -> tuple[Precision, ...]:
    """What is measured on a device: bfloat16 only where it is computed and not emulated."""
    return ("float32", "bfloat16") if computes_bfloat16(torch.device(device)) else ("float32",)


def rates(device: str = "cpu") -> Found:
    """Operations a second of a matrix product in each precision, and bytes a second of a copy: the best of a few."""
    found: Found = {}
    matrices = torch.backends.cuda.matmul
    before, matrices.allow_tf32 = matrices.allow_tf32, torch.backends.cudnn.allow_tf32  # as the networks' convolutions
    for name in precisions(device):
        side = MATRIX[device]
        matrix = torch.ones(side, side, dtype=getattr(torch, name), device=device)
        found[name] = 2 * side**3 / _shortest(lambda matrix=matrix: matrix @ matrix, device)
    matrices.allow_tf32 = before
    source = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    found["bytes"] = 2 * COPIED / _shortest(lambda: target.copy_(source), device)  # read and written
    return found


def _shortest(call: Any, device: str) -> float:
    seconds = []
    for _ in range(TRIES):
        synchronise(device)
        begin = time.perf_counter()
        call()
        synchronise(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


@torch.no_grad()  # in inference mode the counter does not see linear layers
def work(network: PairNetwork, image: Tensor, controller: Controller | None) -> Found:
    """Operations of the convolutions and matrix products of one registration, and bytes into and out of its layers.

    Window attention, warps and similarities are in neither count: what is counted is less than what is done.
    """
    moved = 0

    def count(layer: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        nonlocal moved
        tensors = [each for each in (*given, made, *layer.parameters()) if isinstance(each, Tensor)]
        moved += sum(each.numel() * each.element_size() for each in tensors)

    layers = [layer for layer in network.modules() if not list(layer.children())]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with FlopCounterMode(display=False, custom_mapping=_one_dnn()) as counter:
        network.register(image, controller)
    for hook in hooks:
        hook.remove()
    return {"operations": counter.get_total_flops(), "bytes": moved}


def _one_dnn() -> dict[Any, Any]:
    """How to count the operation that stands for a convolution on a CPU, which PyTorch's counter does not know."""

    def count(x: Any, weight: Any, *settings: Any, out_shape: Any, **named: Any) -> int:
        return conv_flop_count(x, weight, out_shape)

    operation = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    return {} if operation is None else {operation: count}


def floor_seconds(work: Found, rates: Found, precision: str) -> tuple[float, float]:
    """The least for a piece of work: for its arithmetic, and for its bytes."""
    return work["operations"] / rates[precision], work["bytes"] / rates["bytes"]
