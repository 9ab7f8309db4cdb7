"""Sampling and neighbourhood attention on an NVIDIA GPU as one Triton kernel each, where no gradients are wanted.

PyTorch makes coordinates, casts and each neighbour's product an operation of its own, each of which the processor has
to launch and the GPU's memory to carry; a registration at 2 mm is over before they are all launched. The CPU, training
and a machine without Triton go the other ways of ``iregzoo.fields`` and ``iregzoo.attention``, which give the same.

Those two modules come here by themselves where they can; there is nothing to switch on.
"""

import importlib
import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.jit import is_tracing  # type: ignore[attr-defined]

from iregzoo.precision import computes_bfloat16

_READ = (torch.float32, torch.bfloat16, torch.float16)
_VOXELS, _NUMBERS = 256, 2048  # the most of a program's block
_CHANNELS = 32  # of a sample that are read together


@cache
def _kernels() -> ModuleType | None:
    """The kernels, where Triton is installed; PyTorch for NVIDIA GPUs on Linux brings it."""
    try:
        return importlib.import_module("iregzoo._triton")
    except ImportError:
        return None


@cache
def _works(device: torch.device) -> bool:
    """Whether the kernels run on a GPU; where Triton is there and they do not, a warning says why."""
    if _kernels() is None or not computes_bfloat16(device):
        return False
    try:
        sample(torch.zeros(1, 1, 2, 2, 2, device=device), torch.zeros(1, 3, 2, 2, 2, device=device), relative=True)
    except Exception as error:  # of a missing C compiler, a cache that cannot be written …: each means the same here
        reason = " ".join(str(error).split())
        warnings.warn(
            f"Triton does not run on {device} ({reason}); continuing without it, which is slower. Triton needs a "
            "C compiler and a writable cache folder (TRITON_CACHE_DIR)",
            stacklevel=2,
        )
        return False
    return True


def _reads(*tensors: Tensor) -> bool:
    """Whether these are volumes on one GPU that a kernel can read, and no gradients are wanted."""
    return (
        all(type(tensor) is Tensor and tensor.is_cuda and tensor.dtype in _READ for tensor in tensors)
        and len({tensor.device for tensor in tensors}) == 1
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and not (is_tracing() or torch.compiler.is_compiling())  # type: ignore[no-untyped-call]
        and min(tensor.numel() for tensor in tensors) > 0
        and _works(tensors[0].device)
    )


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Launch on that GPU; on a CPU, Triton's interpreter computes what the tests compare."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _block(channels: int) -> int:
    """Voxels of a program's block, for so many channels of each."""
    return max(16, min(_VOXELS, _NUMBERS // channels))


def samples(image: Tensor, places: Tensor, out: Tensor | None = None) -> bool:
    """Whether ``sample`` can read the image at these places, and write it there."""
    tensors = (image, places) if out is None else (image, places, out)
    return image.dim() == 5 and len(image) == len(places) and places.dtype == torch.float32 and _reads(*tensors)


def sample(
    image: Tensor, places: Tensor, *, relative: bool, padding: str = "zeros", out: Tensor | None = None
) -> Tensor:
    """Read an image at places by linear interpolation; what lies outside is as ``grid_sample`` has it.

    Args:
        image: (B, C, D, H, W).
        places: (B, 3, *shape) in voxels of the image.
        relative: places are displacements from the voxels of their own grid, not positions.
        padding: ``zeros`` or ``border`` outside the image.
        out: (B, C, *shape) of any dtype and strides, written to and returned where given.

    Returns:
        (B, C, *shape) in the image's dtype. A place that is NaN reads NaN.
    """
    kernels = _kernels()
    assert kernels is not None
    channels, shape = image.shape[1], places.shape[2:]
    if out is None:
        last = image.is_contiguous(memory_format=torch.channels_last_3d) and channels > 1
        order = torch.channels_last_3d if last else torch.contiguous_format
        out = torch.empty((len(image), channels, *shape), dtype=image.dtype, device=image.device, memory_format=order)
    together = min(_CHANNELS, _power(channels))
    block = _block(together)
    with _on(image.device):
        kernels.sample[-(-math.prod(shape) // block), len(image)](
            *(image, places, out),
            *(channels, *image.shape[2:], *shape),
            *(*image.stride(), *places.stride(), *out.stride()),
            relative=relative,
            border=padding == "border",
            block=block,
            block_channels=together,
        )
    return out


def attends(query: Tensor, key: Tensor, value: Tensor | None = None, bias: Tensor | None = None) -> bool:
    """Whether ``attend`` can take these operands."""
    return _reads(*(operand for operand in (query, key, value, bias) if operand is not None))


def attend(
    query: Tensor, key: Tensor, value: Tensor | None, bias: Tensor | None, window: Sequence[int], scale: float
) -> Tensor:
    """Σ_o a_o v_o with a = softmax_o(scale · q·k_o + bias_o), over the windows around each voxel.

    Args:
        query, key: (B, heads, d, *shape).
        value: (B, heads, e, *shape), with windows shifted inside the volume. Without one, windows are centred, keys
            outside are zero, and values are the neighbours' offsets.
        bias: (heads, neighbours), where there is no value.
        window: voxels along each axis.
        scale: of the products q·k.

    Returns:
        (B, heads, e, *shape) in the value's dtype and order of memory; (B, heads, 3, *shape), float32, without one.
    """
    kernels = _kernels()
    assert kernels is not None
    batch, heads, channels, *shape = query.shape
    out = query.new_empty(batch, heads, 3, *shape, dtype=torch.float32) if value is None else torch.empty_like(value)
    values = key if value is None else value  # which nothing reads without one
    together = _power(channels), _power(out.shape[2])
    block = _block(max(together))
    with _on(query.device):
        kernels.attend[-(-math.prod(shape) // block), batch * heads](
            *(query, key, values, query if bias is None else bias.contiguous(), out),
            *(heads, channels, out.shape[2], *shape),
            *(*query.stride(), *key.stride(), *values.stride(), *out.stride(), scale),
            *window,
            offsets=value is None,
            block=block,
            block_channels=together[0],
            block_values=together[1],
        )
    return out


def _power(number: int) -> int:
    """The next power of two, as blocks' sizes have to be."""
    return 1 << (number - 1).bit_length()
