"""On a GPU: pairs a second in batches, and training steps a second."""

from typing import Any

import torch

from documents import paragraphs, table
from iregzoo import zoo
from iregzoo.iteration import FixedIterations
from iregzoo.losses import RegistrationLoss
from iregzoo.precision import Precision
from meter import Found, Settings, Shape, begin_peak, child, median_seconds, peak_gigabytes, smooth_pair
from speed_floor import precisions
from verdicts import number, size

SHAPE: Shape = (80, 96, 112)
BATCHES = (1, 2, 4, 8)
NOTE = """\
Registrations are under each method's own controller and of equal pairs, which stop together; training is one pass a
level with the default loss, the data already on the GPU. Reading and writing scans is not in it."""


@torch.inference_mode()
def infer(bundle: str, shape: Shape, batch: int, precision: Precision, runs: int, device: str) -> Found:
    """Register a batch under the method's own controller, in a child process."""
    network = zoo.load(bundle, device=device, precision=precision).network
    images = smooth_pair(shape).expand(batch, -1, -1, -1, -1).contiguous().to(device)
    held = begin_peak(device)
    (seconds,) = median_seconds([lambda: network.register(images)], runs, device)
    return {"rate": batch / seconds, "gigabytes": peak_gigabytes(device) - held}


def train(bundle: str, shape: Shape, batch: int, precision: Precision, runs: int, device: str) -> Found:
    """Take training steps with the default loss, one pass a level, in a child process."""
    network = zoo.untrained(zoo.find(bundle)).to(device, memory_format=torch.channels_last_3d).train()  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    images = smooth_pair(shape).expand(batch, -1, -1, -1, -1).contiguous().to(device)
    loss = RegistrationLoss()
    controller = FixedIterations() if network.controller is not None else None

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            registration: Any = network(images, True, controller)
        torch.autograd.backward(loss(registration, images[:, :1], images[:, 1:])["loss"])
        optimizer.step()

    held = begin_peak(device)
    (seconds,) = median_seconds([step], runs, device)
    return {"rate": 1 / seconds, "gigabytes": peak_gigabytes(device) - held}


def measure(settings: Settings) -> Found:
    """Every method, batch and precision, for inference and training."""
    rows = []
    for name in [bundle.name for bundle in zoo.bundles() if settings.wants(bundle.name)]:
        for shape in settings.shapes or (SHAPE,):
            for kind, batches in (("infer", BATCHES), ("train", (1,))):
                for batch in batches:
                    for precision in precisions(settings.device):
                        given: Found = {"bundle": name, "shape": shape, "batch": batch, "precision": precision}
                        options: Found = {"runs": settings.runs, "device": settings.device}
                        measured = child(__name__, kind, settings.threads, **given, **options)
                        rows.append({"kind": kind, **given, "shape": list(shape), **measured})
                        print(rows[-1], flush=True)
    return {"rows": rows}


def show(found: Found) -> str:
    """The part of the page."""
    words = {"infer": "pairs a second", "train": "training steps a second"}
    rows = [
        (
            row["bundle"],
            size(row["shape"]),
            words[row["kind"]],
            row["batch"],
            row["precision"],
            row.get("failed") or number(row["rate"]),
            number(row.get("gigabytes")),
        )
        for row in found["rows"]
    ]
    heads = ("method", "grid", "what", "batch", "precision", "rate", "GB")
    return paragraphs(table(heads, rows), NOTE)
