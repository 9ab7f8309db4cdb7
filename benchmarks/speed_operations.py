"""Core operations beside MONAI's and beside the usual way to write them: seconds, peak memory, and the same result."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import plain
from documents import paragraphs, table
from iregzoo import attention, fields, similarity
from meter import (
    Found,
    Settings,
    Shape,
    begin_peak,
    child,
    median_seconds,
    peak_gigabytes,
    smooth_field,
    smooth_noise,
    smooth_pair,
)
from verdicts import Target, number, ratio, size, target_table

SHAPES: tuple[Shape, ...] = ((80, 96, 112), (160, 192, 160))
STEPS, REFERENCE_STEPS = 7, 14
NOTE = """\
Each is one operation by itself, the ways in turns in one process; memory is the peak beyond the inputs, each way by
itself. It does not show how large a part of a registration the operation is. *Usual* is
[benchmarks/plain.py](../benchmarks/plain.py), written from VoxelMorph's and NATTEN's formulas, not their code. What
takes very long ran once."""
OURS, MONAI, PLAIN = "iregzoo", "MONAI", "usual"
Compute = Callable[..., Tensor]


@dataclass(frozen=True)
class Operation:
    """An operation, and the ways to compute it.

    Attributes:
        title: in words.
        inputs: of a grid.
        ways: by name, what makes the function for a grid; MONAI is imported only where it is measured.
        gradient: whether the result, a number, is differentiated for the first input.
        half: whether the grid has half the size along every axis.
        reference: more exact than any of the ways.
        time, memory, difference: targets as parts of MONAI's, and of the results' difference.
    """

    title: str
    inputs: Callable[[Shape], tuple[Tensor, ...]]
    ways: Mapping[str, Callable[[Shape], Compute]]
    gradient: bool = False
    half: bool = False
    reference: Callable[[Shape, Tensor], Tensor] | None = None
    time: float | None = None
    memory: float | None = None
    difference: float | None = None


def _pair(shape: Shape) -> tuple[Tensor, ...]:
    pair = smooth_pair(shape)
    return pair[:, :1].contiguous(), pair[:, 1:].contiguous()


def _image_and_field(channels: int) -> Callable[[Shape], tuple[Tensor, ...]]:
    def make(shape: Shape) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        return smooth_noise(shape, channels, 4, generator), smooth_field(shape, generator)

    return make


def _velocity(shape: Shape) -> tuple[Tensor, ...]:
    return (smooth_field(shape, torch.Generator().manual_seed(0)),)


def _features(shape: Shape) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn((3, 1, 32, *shape), generator=generator))


def _monai_ncc(shape: Shape) -> Compute:
    from monai.losses import LocalNormalizedCrossCorrelationLoss

    loss = LocalNormalizedCrossCorrelationLoss(spatial_dims=3, kernel_size=9)
    return lambda first, second: -loss(first, second)


def _monai_warp(shape: Shape) -> Compute:
    from monai.networks.blocks import Warp

    warp: Compute = Warp("bilinear", "border")
    return warp


def _monai_integrate(shape: Shape) -> Compute:
    from monai.networks.blocks import DVF2DDF

    integrate: Compute = DVF2DDF(num_steps=STEPS, padding_mode="border")
    return integrate


def _warping(title: str, channels: int) -> Operation:
    ways: dict[str, Callable[[Shape], Compute]] = {
        OURS: lambda shape: partial(fields.warp, padding="border"),
        MONAI: _monai_warp,
        PLAIN: plain.Warp,
    }
    return Operation(title, _image_and_field(channels), ways, time=0.75)


OPERATIONS = {
    "ncc": Operation(
        "local NCC of window 9, with gradient",
        _pair,
        {
            OURS: lambda shape: lambda first, second: similarity.local_ncc(first, second, window=9).mean(),
            MONAI: _monai_ncc,
            PLAIN: lambda shape: plain.local_ncc,
        },
        gradient=True,
        time=0.5,
        memory=0.6,
        difference=1e-5,
    ),
    "warp": _warping("warp of an image", 1),
    "warp16": _warping("warp of 16 channels", 16),
    "integrate": Operation(
        f"integration, {STEPS} squarings",
        _velocity,
        {
            OURS: lambda shape: partial(fields.integrate, steps=STEPS),
            MONAI: _monai_integrate,
            PLAIN: lambda shape: plain.Integrate(shape, STEPS),
        },
        reference=lambda shape, velocity: plain.Integrate(shape, REFERENCE_STEPS, torch.float64)(velocity.double()),
        time=0.5,
    ),
    "attention": Operation(
        "attention over 3³ voxels, 32 channels, half the grid",
        _features,
        {
            OURS: lambda shape: (
                lambda query, key, value: attention.neighbourhood_attention(query, key, value, window=3)
            ),
            PLAIN: lambda shape: plain.neighbourhood_attention,
        },
        half=True,
    ),
}


def _call(operation: Operation, way: str, shape: Shape, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """The operation on these inputs, with the gradient where it has one."""
    compute = operation.ways[way](shape)
    if isinstance(compute, nn.Module):
        compute = compute.to(inputs[0].device)

    def forward() -> Tensor:
        with torch.inference_mode():
            return compute(*inputs)

    def both() -> Tensor:
        first = inputs[0].detach().requires_grad_()
        value = compute(first, *inputs[1:])
        torch.autograd.backward(value)
        return value.detach()

    return both if operation.gradient else forward


def memory(name: str, way: str, shape: Shape, device: str) -> Found:
    """Peak memory of one way beyond its inputs; on a CPU in a child process."""
    operation = OPERATIONS[name]
    # On a tiny grid first: what is loaded and started once is none of the operation's.
    tiny: Shape = (12, 12, 12)
    _call(operation, way, tiny, _inputs(operation, tiny, device))()
    call = _call(operation, way, shape, _inputs(operation, shape, device))
    held = begin_peak(device)
    call()
    return {"gigabytes": peak_gigabytes(device) - held}


def _inputs(operation: Operation, shape: Shape, device: str) -> tuple[Tensor, ...]:
    return tuple(tensor.to(device) for tensor in operation.inputs(shape))


def seconds(name: str, ways: list[str], shape: Shape, runs: int, device: str) -> Found:
    """Seconds of the ways in turns, and how far their results are from ours and the reference; as above."""
    operation = OPERATIONS[name]
    inputs = _inputs(operation, shape, device)
    results: dict[str, Tensor] = {}

    def kept(way: str) -> Callable[[], None]:
        call = _call(operation, way, shape, inputs)
        return lambda: results.update({way: call()})

    # MONAI's local NCC is convolutions: not in TF32's ten bits.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        medians = median_seconds([kept(way) for way in ways], runs, device)
    found: Found = {way: {"seconds": median} for way, median in zip(ways, medians, strict=True)}
    truth = operation.reference(shape, *(tensor.cpu() for tensor in inputs)) if operation.reference else None
    for way, result in results.items():
        if way != OURS and OURS in results:
            found[way]["difference"] = float((result - results[OURS]).abs().max())
        if truth is not None:
            found[way]["error"] = float((result.cpu() - truth).abs().max())
    return found


def measure(settings: Settings) -> Found:
    """Every operation on every grid."""
    rows = []
    for name, operation in OPERATIONS.items():
        for whole in (settings.shapes or SHAPES) if settings.wants(name) else ():
            grid = [length // 2 for length in whole] if operation.half else list(whole)
            given: dict[str, Any] = {
                "name": name,
                "shape": grid,
                "threads": settings.threads,
                "device": settings.device,
            }
            found = {way: child(__name__, "memory", way=way, **given) for way in operation.ways}
            able = [way for way, each in found.items() if "failed" not in each]
            timed = child(__name__, "seconds", ways=able, runs=settings.runs, **given) if able else {}
            for way in able:
                found[way] |= {"failed": timed["failed"]} if "failed" in timed else timed[way]
            rows.append({"operation": name, "shape": grid, "ways": found})
            print(f"{operation.title}, {size(grid)}: {found}", flush=True)
    return {"rows": rows}


def show(found: Found) -> str:
    """The part of the page."""
    return paragraphs(
        _table(found, "seconds", "seconds", 1.0),
        _table(found, "gigabytes", "MB", 1024.0),
        _results(found),
        target_table(targets(found)),
        NOTE,
    )


def _table(found: Found, figure: str, unit: str, factor: float) -> str:
    """Ours beside the others, and what part of theirs it is."""
    heads = ("operation", "grid", *(f"{way}, {unit}" for way in (OURS, MONAI, PLAIN)), "of MONAI's", "of the usual")
    rows = []
    for row in found["rows"]:
        values = {way: row["ways"].get(way, {}).get(figure) for way in (OURS, MONAI, PLAIN)}
        cells = [
            row["ways"].get(way, {}).get("failed") or number(None if value is None else factor * value)
            for way, value in values.items()
        ]
        shares = [number(ratio(values[OURS], values[way])) for way in (MONAI, PLAIN)]
        rows.append((OPERATIONS[row["operation"]].title, size(row["shape"]), *cells, *shares))
    return table(heads, rows)


def _results(found: Found) -> str:
    """How far apart the results are."""
    heads = ("largest difference from iregzoo's", "grid", MONAI, PLAIN)
    rows, errors = [], []
    for row in found["rows"]:
        title, grid = OPERATIONS[row["operation"]].title, size(row["shape"])
        cells = {
            figure: [number(row["ways"].get(way, {}).get(figure)) for way in (OURS, MONAI, PLAIN)]
            for figure in ("difference", "error")
        }
        rows.append((title, grid, *cells["difference"][1:]))
        if OPERATIONS[row["operation"]].reference:
            errors.append((title, grid, *cells["error"]))
    exact = f"largest error against {REFERENCE_STEPS} squarings in float64, voxels"
    errors_table = table((exact, "grid", OURS, MONAI, PLAIN), errors) if errors else ""
    return paragraphs(table(heads, rows), errors_table)


def targets(found: Found) -> list[Target]:
    """What was aimed at, on every grid."""
    aims = []
    for row in found["rows"]:
        operation, grid = OPERATIONS[row["operation"]], size(row["shape"])
        ours, theirs = (row["ways"].get(way, {}) for way in (OURS, MONAI))
        shares: dict[str, Any] = {
            "part of MONAI's time": (operation.time, ratio(ours.get("seconds"), theirs.get("seconds"))),
            "part of MONAI's peak memory": (operation.memory, ratio(ours.get("gigabytes"), theirs.get("gigabytes"))),
            "difference from MONAI's value": (operation.difference, theirs.get("difference")),
        }
        aims += [
            Target(f"{operation.title}, {grid}: {what}", limit, measured)
            for what, (limit, measured) in shares.items()
            if limit is not None
        ]
    return aims
