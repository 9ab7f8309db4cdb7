"""Run ``monailabel`` where torchvision was built for a GPU and PyTorch was not.

    python tests/label/launcher.py start_server --app DIR --studies DIR …

Such a torchvision cannot be imported, since two operators lack their declarations. MONAI Label imports it, and
registration uses nothing of it: declaring the operators is enough. With builds that match, nothing is done.
"""

import sys

import torch

OPERATORS = ("nms", "qnms")


def declare_operators() -> torch.library.Library | None:
    """Declare torchvision's operators if it cannot be imported without; they last as long as what is given back."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in OPERATORS:
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


if __name__ == "__main__":
    declared = declare_operators()
    from monailabel.main import Main

    Main().run()
