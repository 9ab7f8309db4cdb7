"""Convolutions at inference on a CPU: oneDNN's, also of small volumes, and with what follows as one operation.

PyTorch gives a float32 convolution to oneDNN where channels × depth × height are more than 20,480, or the batch is
more than one pair; others go to a loop of its own, which mostly needs ten times as long (of a few voxels of hundreds
of channels, half as long): the coarse levels of every pyramid, and all layers of few channels. And where a
convolution, what is added to it and its LeakyReLU are three operations, each takes the volume from memory and gives
it back, which takes longer than the convolution of few channels.

The operation is oneDNN's, by the name under which ``torch.compile`` calls it. It is no public one of PyTorch's, and it
has no gradient, so whoever lacks it, or wants one, has PyTorch's own; so do layers with hooks, or a forward of their
own.
"""

from collections.abc import Sequence
from typing import TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]
from torch.nn.modules import module

from iregzoo.networks._norm import InstanceNorm, may_overwrite, normalise_

Layer = TypeVar("Layer", bound=nn.Module)


class Conv3d(nn.Conv3d):
    """``nn.Conv3d``, which is oneDNN's at inference on a CPU whatever the size."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if _takes(self, input) and _precision(input) == torch.float32:  # in bfloat16 it is oneDNN's anyway
            return _operation(input, weight, bias, self.padding, self.stride, self.dilation, self.groups)
        out: Tensor = super()._conv_forward(input, weight, bias)
        return out


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *, padding: int) -> Tensor:
    """``F.conv3d`` of a stride of one, with zeros around, as ``Conv3d`` computes it."""
    if _computes(x, weight) and _precision(x) == torch.float32:
        return _operation(x, weight, bias, [padding] * 3, [1] * 3, [1] * 3, 1)
    return F.conv3d(x, weight, bias, padding=padding)


class ConvChain(nn.Sequential):
    """``nn.Sequential`` in which a LeakyReLU and the ``Conv3d`` or ``InstanceNorm`` before it may be one operation."""

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self)
        made = False  # x, by a convolution of this chain: nobody else has it
        while layers:
            layer = layers.pop(0)
            after = layers[0] if layers else None
            if is_plain(after, nn.LeakyReLU) and is_plain(layer, Conv3d) and _takes(layer, x):
                x = _followed(layer, after.negative_slope, x)
                layers.pop(0)
            elif is_plain(after, nn.LeakyReLU) and is_plain(layer, InstanceNorm) and made and may_overwrite(x):
                x = normalise_(x, after.negative_slope)
                layers.pop(0)
            else:
                x = layer(x)
            made = is_plain(layer, Conv3d)
        return x


def conv_leaky(conv: Conv3d, slope: float, x: Tensor, plus: Tensor) -> Tensor:
    """LeakyReLU(conv(x) + plus) of a slope: x (B, C_in, *shape) and plus (B, C_out, *new_shape) to the latter."""
    if is_plain(conv, Conv3d) and _takes(conv, x):
        return _followed(conv, slope, x, plus)
    # In place: a convolution's backward needs its input alone, and a LeakyReLU's the signs, which it keeps.
    return F.leaky_relu_(conv(x).add_(plus), slope)


def is_plain(layer: nn.Module | None, kind: type[Layer]) -> TypeGuard[Layer]:
    """Whether nothing but the layer itself has a say in what it does."""
    if type(layer) is not kind or "forward" in vars(layer):
        return False
    return not (layer._forward_hooks or layer._forward_pre_hooks or module._has_any_global_hook())  # type: ignore[no-untyped-call]


def _followed(conv: Conv3d, slope: float, x: Tensor, plus: Tensor | None = None) -> Tensor:
    """LeakyReLU(conv(x) + plus), where ``_takes`` says that the operation is there."""
    settings = (conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups)
    if plus is None:
        return _operation(x, *settings, "leaky_relu", [slope])
    if not x.is_contiguous(memory_format=torch.channels_last_3d):  # PyTorch would take its own loop here, too
        return F.leaky_relu_(_operation(x, *settings).add_(plus), slope)
    # It knows no LeakyReLU after a sum.
    dtype = _precision(x)
    weight, bias, *rest = settings
    operation = torch.ops.mkldnn._convolution_pointwise.binary
    bias = None if bias is None else bias.to(dtype)
    out = operation(x.to(dtype), plus.to(dtype), weight.to(dtype), bias, *rest, "add", 1.0, None, [], "")
    return F.leaky_relu_(out, slope)


def _operation(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: str | Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "none",
    scalars: Sequence[float] = (),
) -> Tensor:
    dtype = _precision(x)
    bias = None if bias is None else bias.to(dtype)
    operands = (x.to(dtype), weight.to(dtype), bias, padding, stride, dilation, groups)
    out: Tensor = torch.ops.mkldnn._convolution_pointwise(*operands, activation, scalars, "")
    return out


def _precision(x: Tensor) -> torch.dtype:
    """In which a convolution of x computes; autocast leaves float64 as it is."""
    lowered = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    return torch.get_autocast_dtype("cpu") if lowered else x.dtype


def _takes(conv: nn.Conv3d, x: Tensor) -> bool:
    """Whether the operation can stand for a convolution."""
    return _computes(x, conv.weight) and conv.padding_mode == "zeros" and isinstance(conv.padding, tuple)


def _computes(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and not (is_tracing() or torch.compiler.is_compiling())  # type: ignore[no-untyped-call]
        and type(x) is Tensor
        and x.dim() == 5
        and x.numel() > 0
        and x.device.type == weight.device.type == "cpu"
        and (x.dtype == weight.dtype or torch.is_autocast_enabled("cpu"))
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
