"""In which precision a network's convolutions run at inference; fields, sampling and similarities stay in float32."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch

from iregzoo.errors import InputError
from iregzoo.flags import flag

Precision = Literal["auto", "float32", "bfloat16"]


def as_precision(name: str) -> Precision:
    """The precision that ``--precision`` means.

    Raises:
        InputError: for another name.
    """
    names: tuple[Precision, ...] = get_args(Precision)
    for known in names:
        if name == known:
            return known
    raise InputError(f"precision {name!r} is unknown; choose {', '.join(names)}")


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices in hardware, several times as fast as float32.

    CPUs with AMX tiles or AVX512-BF16, and NVIDIA GPUs from compute capability 8 on. Elsewhere it is emulated and slow.
    """
    if device.type == "cpu":
        # Both checks are PyTorch's own; one that a version lacks is a no.
        checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("amx_tile", "avx512_bf16"))
        return any(check() for check in checks if check is not None)
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


def exact_dtype(device: torch.device) -> torch.dtype:
    """In what millions of numbers are added up: float64, but on a device that has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def trains_in_bfloat16(amp: bool | str, device: torch.device) -> bool:
    """What a training's setting ``amp`` means on a device: ``auto`` is bfloat16 where it computes it.

    Raises:
        InputError: for what is neither true, false nor auto.
    """
    return computes_bfloat16(device) if amp == "auto" else flag(amp, "amp")


def resolve(precision: Precision, device: torch.device | str) -> Precision:
    """``float32`` or ``bfloat16``: what ``auto`` means on a device is bfloat16 where it computes it."""
    if precision == "auto":
        return "bfloat16" if computes_bfloat16(torch.device(device)) else "float32"
    return precision


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """The context of a network at inference. Where gradients are wanted it changes nothing: training chooses itself."""
    if torch.is_grad_enabled() or resolve(precision, device) == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
