"""Where a network runs."""

from iregzoo.errors import InputError


def choose_device(name: str) -> str:
    """The device that ``--device`` means.

    Raises:
        InputError: for another name, or a device that this machine lacks.
    """
    import torch

    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return "cuda" if present["cuda"] else "cpu"
    if name not in present:
        raise InputError(f"device {name!r} is unknown; choose auto, {', '.join(present)}")
    if not present[name]:
        raise InputError(f"device {name!r} is not available on this machine; choose auto or cpu")
    return name
