"""A convolution, what is added to it, and its LeakyReLU as one operation: on a CPU that has it, without gradients.

Apart, each of the three takes the volume from memory and gives it back, which takes longer than the convolution of few
channels. The operation is oneDNN's, by the name under which ``torch.compile`` calls it. It is no public one of
PyTorch's, so whoever lacks it computes the three apart, as does a convolution with a hook on it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PRECISIONS = (torch.float32, torch.bfloat16)


class Chain(nn.Sequential):
    """``nn.Sequential`` in which a convolution and the LeakyReLU after it may be one operation."""

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            after = layers[0] if layers else None
            if isinstance(layer, nn.Conv3d) and isinstance(after, nn.LeakyReLU):
                x = conv_leaky(layer, after.negative_slope, x)
                layers.pop(0)
            else:
                x = layer(x)
        return x


def conv_leaky(conv: nn.Conv3d, slope: float, x: Tensor, plus: Tensor | None = None) -> Tensor:
    """LeakyReLU(conv(x) + plus) of a slope: (B, C_in, *shape) to (B, C_out, *new_shape), as ``plus`` is."""
    out: Tensor
    if not _fuses(conv, x):
        out = conv(x)
        # In place: a convolution's backward needs its input alone, and a LeakyReLU's the signs, which it keeps.
        return F.leaky_relu_(out if plus is None else out.add_(plus), slope)
    dtype = _precision(x)
    weight, bias = conv.weight.to(dtype), None if conv.bias is None else conv.bias.to(dtype)
    settings = (weight, bias, conv.padding, conv.stride, conv.dilation, conv.groups)
    operation = torch.ops.mkldnn._convolution_pointwise
    if plus is None:
        out = operation(x.to(dtype), *settings, "leaky_relu", [slope], "")
        return out
    out = operation.binary(x.to(dtype), plus.to(dtype), *settings, "add", 1.0, None, [], "")
    return F.leaky_relu_(out, slope)


def _precision(x: Tensor) -> torch.dtype:
    """In which a convolution of x computes."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _fuses(conv: nn.Conv3d, x: Tensor) -> bool:
    plain = torch.is_grad_enabled() or type(x) is not Tensor or bool(conv._forward_hooks or conv._forward_pre_hooks)
    return (
        not plain
        and x.device.type == conv.weight.device.type == "cpu"
        and _precision(x) in _PRECISIONS
        and conv.padding_mode == "zeros"
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)  # type: ignore[no-untyped-call]
    )
