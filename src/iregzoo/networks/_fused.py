"""A convolution, what is added to it, and its LeakyReLU as one operation: on a CPU that has it, without gradients.

Apart, each of the three takes the volume from memory and gives it back, which takes longer than the convolution of few
channels. The operation is oneDNN's, by the name under which ``torch.compile`` calls it. It is no public one of
PyTorch's, so whoever lacks it computes the three apart; so do layers with hooks, or a forward of their own.
"""

from typing import TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]
from torch.nn.modules import module

Layer = TypeVar("Layer", bound=nn.Module)


class ConvChain(nn.Sequential):
    """``nn.Sequential`` in which a convolution and the LeakyReLU after it may be one operation."""

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            after = layers[0] if layers else None
            if is_plain(layer, nn.Conv3d) and is_plain(after, nn.LeakyReLU) and _fuses(layer, x):
                x = _operation(layer, after.negative_slope, x)
                layers.pop(0)
            else:
                x = layer(x)
        return x


def conv_leaky(conv: nn.Conv3d, slope: float, x: Tensor, plus: Tensor) -> Tensor:
    """LeakyReLU(conv(x) + plus) of a slope: x (B, C_in, *shape) and plus (B, C_out, *new_shape) to the latter."""
    if is_plain(conv, nn.Conv3d) and _fuses(conv, x):
        return _operation(conv, slope, x, plus)
    # In place: a convolution's backward needs its input alone, and a LeakyReLU's the signs, which it keeps.
    return F.leaky_relu_(conv(x).add_(plus), slope)


def _operation(conv: nn.Conv3d, slope: float, x: Tensor, plus: Tensor | None = None) -> Tensor:
    dtype = _precision(x)
    weight, bias = conv.weight.to(dtype), None if conv.bias is None else conv.bias.to(dtype)
    settings = (weight, bias, conv.padding, conv.stride, conv.dilation, conv.groups)
    operation = torch.ops.mkldnn._convolution_pointwise
    out: Tensor
    if plus is None:
        out = operation(x.to(dtype), *settings, "leaky_relu", [slope], "")
        return out
    # It knows no LeakyReLU after a sum.
    out = operation.binary(x.to(dtype), plus.to(dtype), *settings, "add", 1.0, None, [], "")
    return F.leaky_relu_(out, slope)


def is_plain(layer: nn.Module | None, kind: type[Layer]) -> TypeGuard[Layer]:
    """Whether nothing but the layer itself has a say in what it does."""
    if type(layer) is not kind or "forward" in vars(layer):
        return False
    return not (layer._forward_hooks or layer._forward_pre_hooks or module._has_any_global_hook())  # type: ignore[no-untyped-call]


def _precision(x: Tensor) -> torch.dtype:
    """In which a convolution of x computes; autocast leaves float64 as it is."""
    lowered = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    return torch.get_autocast_dtype("cpu") if lowered else x.dtype


def _fuses(conv: nn.Conv3d, x: Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and not (is_tracing() or torch.compiler.is_compiling())  # type: ignore[no-untyped-call]
        and type(x) is Tensor
        and x.dim() == 5
        and x.device.type == conv.weight.device.type == "cpu"
        and (x.dtype == conv.weight.dtype or torch.is_autocast_enabled("cpu"))
        and conv.padding_mode == "zeros"
        and isinstance(conv.padding, tuple)
        and _has_operation(_precision(x))
    )


def _has_operation(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and this processor have the operation in a precision."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):  # type: ignore[no-untyped-call]
        return False
    names = ["_convolution_pointwise", "_is_mkldnn_bf16_supported"]
    if not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))
