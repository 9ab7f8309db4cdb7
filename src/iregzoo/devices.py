"""Where a network runs."""

from iregzoo.errors import InputError


def choose_device(name: str) -> str:
    """The device that ``--device`` means: ``auto``, ``cpu``, ``mps``, ``cuda``, or one of several such as ``cuda:1``.

    Raises:
        InputError: for another name, or a device that this machine lacks.
    """
    import torch

    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return "cuda" if present["cuda"] else "cpu"
    kind, _, number = name.partition(":")
    if kind not in present:
        raise InputError(f"device {name!r} is unknown; choose auto, {', '.join(present)}")
    if number and not (kind == "cuda" and number.isdecimal() and int(number) < torch.cuda.device_count()):
        present[kind] = False
    if not present[kind]:
        raise InputError(f"device {name!r} is not available on this machine; choose auto or cpu")
    return name


def check_device(device: object) -> None:
    """Refuse, before any work, a device in MONAI's configs that this machine lacks.

    Raises:
        InputError: for that, and for ``auto``, which is what they have by default.
    """
    if str(device) == "auto":
        raise InputError("device 'auto': leave the setting out, which then means that")
    choose_device(str(device))
