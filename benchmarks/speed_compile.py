"""Whether torch.compile pays: one pass of each network as it is, and compiled."""

import time

import torch

from documents import paragraphs, table
from iregzoo import zoo
from iregzoo.iteration import FixedIterations
from meter import Found, Settings, Shape, child, median_seconds, smooth_pair, synchronise
from verdicts import number, ratio, size

SHAPES: tuple[Shape, ...] = ((80, 96, 112),)
LIMIT_S = 240.0
NOTE = f"""\
One pass a level, in the precision that each card chooses here, each in a process of its own; *first* is the first call
of the compiled network, most of which is the compiler's, and more than {LIMIT_S:.0f} s were not waited for. It does not
show what compiling would gain on a GPU, or on a processor without the fused steps of `networks/_convolution.py`."""


@torch.inference_mode()
def run(bundle: str, shape: Shape, runs: int, device: str, compiled: bool) -> Found:
    """Measure one pass a level of a method in a child process."""
    network = zoo.load(bundle, device=device).network
    controller = FixedIterations() if network.controller is not None else None
    image = smooth_pair(shape).to(device)
    if compiled:
        network.network.compile()
    begin = time.perf_counter()
    network.register(image, controller)
    synchronise(device)
    first = time.perf_counter() - begin
    (seconds,) = median_seconds([lambda: network.register(image, controller)], runs, device)
    return {"first": first, "seconds": seconds}


def measure(settings: Settings) -> Found:
    """Every method on every grid, both ways."""
    rows = []
    for name in [bundle.name for bundle in zoo.bundles() if settings.wants(bundle.name)]:
        for shape in settings.shapes or SHAPES:
            given: Found = {"bundle": name, "shape": shape, "runs": settings.runs, "device": settings.device}
            ways = {
                way: child(__name__, "run", settings.threads, limit_s=LIMIT_S, compiled=way == "compiled", **given)
                for way in ("plain", "compiled")
            }
            rows.append({"bundle": name, "shape": list(shape), **ways})
            print(rows[-1], flush=True)
    return {"rows": rows}


def show(found: Found) -> str:
    """The part of the page."""
    rows = []
    for row in found["rows"]:
        plain, compiled = row["plain"], row["compiled"]
        part = None if {"failed"} & {*plain, *compiled} else ratio(compiled["seconds"], plain["seconds"])
        rows.append(
            (
                row["bundle"],
                size(row["shape"]),
                plain.get("failed") or number(plain["seconds"]),
                compiled.get("failed") or number(compiled["seconds"]),
                number(part),
                number(compiled.get("first")),
            )
        )
    heads = ("method", "grid", "seconds", "compiled, seconds", "part", "first, seconds")
    return paragraphs(table(heads, rows), NOTE)
