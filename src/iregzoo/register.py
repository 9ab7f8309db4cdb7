"""Scans in, transforms and warped scans out."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iregzoo import __version__
from iregzoo.errors import InputError
from iregzoo.fields import inverse_error, invert, jacobian_determinant
from iregzoo.iteration import TCI, Controller, FixedIterations, IterStop
from iregzoo.metrics import SMALLEST_AXIS, dice, folding_of, mean_of, std_log_of
from iregzoo.registration import Registration
from iregzoo.similarity import mse, ncc
from iregzoo.space.files import write_displacement, write_image, write_transform
from iregzoo.space.frame import Frame, affine_displacement, make_frame, network_input, warp_scan
from iregzoo.space.scan import Scan, intensity_range, looks_like_labels, read_labels, read_scan, scale
from iregzoo.space.start import affine_start
from iregzoo.zoo import Method

CONTROLLERS: dict[str, type[TCI] | type[IterStop] | type[FixedIterations]] = {
    "tci": TCI,
    "iterstop": IterStop,
    "fixed": FixedIterations,
}
FILES = (
    "warped.nii.gz",
    "warped_labels.nii.gz",
    "displacement.nii.gz",
    "transform.h5",
    "inverse_warped.nii.gz",
    "inverse_warped_labels.nii.gz",
    "inverse_displacement.nii.gz",
    "inverse_transform.h5",
    "report.json",
    "report.png",
)
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Scans:
    """A pair of scans, and label maps on their grids where there are any."""

    fixed: Scan
    moving: Scan
    fixed_labels: Scan | None = None
    moving_labels: Scan | None = None


@dataclass(frozen=True)
class Result:
    """A registered pair, on the fixed image's own grid.

    Attributes:
        scans: what was registered.
        frame: its geometry, with the affine start that was used.
        init: the name of that start.
        registration: what the network gave, on the network's grid.
        deformation: (1, 3, *fixed.shape), LPS mm, without the affine.
        displacement: (1, 3, *fixed.shape), LPS mm, affine included.
        warped: the moving scan on the fixed grid, (1, 1, *fixed.shape).
        warped_labels: the moving labels on the fixed grid, where there were any.
        seconds: time by stage.
    """

    scans: Scans
    frame: Frame
    init: str
    registration: Registration
    deformation: Tensor
    displacement: Tensor
    warped: Tensor
    warped_labels: Tensor | None
    seconds: dict[str, float]


def read_scans(
    fixed: str | Path,
    moving: str | Path,
    fixed_labels: str | Path | None = None,
    moving_labels: str | Path | None = None,
) -> Scans:
    """Read and check a pair of scans, and the label maps on their grids.

    Raises:
        InputError: as ``read_scan`` and ``read_labels`` do, and where one scan is an image and the other a label map.
    """
    fixed_scan, moving_scan = read_scan(fixed), read_scan(moving)
    for scan, other in ((fixed_scan, moving_scan), (moving_scan, fixed_scan)):
        if looks_like_labels(scan) and not looks_like_labels(other):
            raise InputError(
                f"{scan.path}: looks like a label map, but {other.path.name} is an image; give the image here and "
                "the label map with --fixed-labels or --moving-labels"
            )
    return Scans(
        fixed_scan,
        moving_scan,
        read_labels(fixed_labels, fixed_scan) if fixed_labels else None,
        read_labels(moving_labels, moving_scan) if moving_labels else None,
    )


def choose_controller(name: str, max_iterations: int | None, own: Controller) -> Controller:
    """The controller that ``--controller`` and ``--max-iterations`` mean, for a network with its ``own``.

    Raises:
        InputError: for another name, or a cap that is no whole number of at least 1.
    """
    if name != "auto" and name not in CONTROLLERS:
        raise InputError(f"controller {name!r} is unknown; choose auto, {', '.join(CONTROLLERS)}")
    controller = own if name == "auto" else CONTROLLERS[name]()
    if max_iterations is None:
        return controller
    if isinstance(max_iterations, bool) or not isinstance(max_iterations, int) or max_iterations < 1:
        raise InputError(f"max-iterations {max_iterations!r}: give a whole number of at least 1")
    if not isinstance(controller, (TCI, IterStop, FixedIterations)):
        raise InputError("this bundle's own controller takes no max-iterations; choose one with --controller")
    return replace(controller, max_iterations=max_iterations)


@contextmanager
def timed(stage: str, seconds: dict[str, float], progress: Progress) -> Iterator[None]:
    """Announce a stage and note how long it took."""
    progress(stage)
    begin = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - begin, 3)


@torch.inference_mode()
def register(
    scans: Scans,
    method: Method,
    *,
    init: str = "auto",
    controller: Controller | None = None,
    progress: Progress = lambda stage: None,
) -> Result:
    """Register a pair: affine start, network, and its field brought back to the fixed image's grid.

    Args:
        scans: the pair.
        method: from ``zoo.load``.
        init: affine start; ``auto`` is what the weights' card says.
        controller: of the iterations; the network's own if None.
        progress: told the name of each stage as it begins.
    """
    seconds: dict[str, float] = {}
    init = method.card.init if init == "auto" else init
    with timed("start", seconds, progress):
        start = affine_start(scans.fixed, scans.moving, init)
        frame = make_frame(
            scans.fixed,
            scans.moving,
            start,
            spacing=method.card.spacing,
            stride=method.network.stride,
            minimum=method.card.minimum,
        )
        image = network_input(frame, scans.fixed, scans.moving)
    with timed("network", seconds, progress):
        device = next(method.network.parameters()).device
        registration = method.network.register(image.to(device), controller)
        predicted = registration.displacement.cpu()
    if not torch.isfinite(predicted).all():
        raise InputError("the network gave a displacement that is not finite; are these weights damaged?")
    with timed("warp", seconds, progress):
        return finish(scans, frame, init, replace(registration, displacement=predicted), seconds)


def finish(
    scans: Scans, frame: Frame, init: str, registration: Registration, seconds: dict[str, float] | None = None
) -> Result:
    """Bring a network's displacement (on the CPU) back to the fixed image's own grid and warp the moving scan once."""
    deformation = frame.deform(registration.displacement)
    displacement = frame.total(deformation)
    labels = scans.moving_labels
    return Result(
        scans=scans,
        frame=frame,
        init=init,
        registration=registration,
        deformation=deformation,
        displacement=displacement,
        warped=warp_scan(scans.moving, displacement, frame.fixed),
        warped_labels=warp_scan(labels, displacement, frame.fixed, mode="nearest") if labels else None,
        seconds={} if seconds is None else seconds,
    )


@dataclass(frozen=True)
class Comparison:
    """A result's images on the fixed grid, intensities in [0, 1], each (1, 1, *fixed.shape), and its Jacobian.

    Attributes:
        fixed: the fixed scan.
        before: the moving scan where the headers put it.
        start: the moving scan after the affine start.
        after: the moving scan in the end.
        determinant: of the Jacobian of the deformation without the affine, (1, *fixed.shape).
    """

    fixed: Tensor
    before: Tensor
    start: Tensor
    after: Tensor
    determinant: Tensor


def compare(result: Result) -> Comparison:
    """Make what both the figures and the picture of a result show."""
    scans, frame = result.scans, result.frame
    limits = intensity_range(scans.moving)
    still = torch.zeros_like(result.displacement)
    return Comparison(
        fixed=scale(scans.fixed.data, intensity_range(scans.fixed)),
        before=scale(warp_scan(scans.moving, still, frame.fixed), limits),
        start=scale(warp_scan(scans.moving, affine_displacement(frame.start, frame.fixed), frame.fixed), limits),
        after=scale(result.warped, limits),
        determinant=jacobian_determinant(frame.in_voxels(result.deformation).float()),
    )


def figures(result: Result, images: Comparison) -> dict[str, Any]:
    """What tells whether to trust a result: similarity, overlap, regularity, iterations.

    ``before`` is the moving scan where the headers put it, ``start`` after the affine start, ``after`` in the end.
    ``sdlogj`` needs a grid of at least 5 voxels an axis.
    """
    length = torch.linalg.vector_norm(result.deformation, dim=1)
    found: dict[str, Any] = {}
    for name in ("before", "start", "after"):
        image = getattr(images, name)
        found |= {f"ncc_{name}": float(ncc(images.fixed, image)), f"mse_{name}": float(mse(images.fixed, image))}
    found["folding_percent"] = float(folding_of(images.determinant))
    if min(result.frame.fixed.shape) >= SMALLEST_AXIS:
        found["sdlogj"] = float(std_log_of(images.determinant))
    found |= {
        "displacement_mean_mm": float(length.mean()),
        "displacement_max_mm": float(length.max()),
        "iterations": [int(count[0]) for count in result.registration.iterations],
        "scores": [[round(float(s), 6) for s in level[:, 0] if s == s] for level in result.registration.scores],
    }
    return found | _overlap(result)


def _overlap(result: Result) -> dict[str, Any]:
    """Dice per label, before and after, where both scans have labels."""
    fixed, moving, warped = result.scans.fixed_labels, result.scans.moving_labels, result.warped_labels
    if fixed is None or moving is None or warped is None:
        return {}
    labels = labels_of(fixed.data, moving.data)
    if not labels:
        return {}
    unmoved = warp_scan(moving, torch.zeros_like(result.displacement), result.frame.fixed, mode="nearest")
    before = dice(unmoved, fixed.data, labels)
    after = dice(warped, fixed.data, labels)
    found = {"dice_before_mean": mean_of(before), "dice_mean": mean_of(after), "dice_before": before, "dice": after}
    # A label of the moving scan alone may lie outside the fixed field of view: no number, and JSON has no NaN.
    return {
        name: {label: number for label, number in value.items() if number == number}
        if isinstance(value, dict)
        else value
        for name, value in found.items()
        if isinstance(value, dict) or value == value
    }


def labels_of(*maps: Tensor) -> list[int]:
    """The labels, except the background 0, that any of the maps holds."""
    values = sorted(set().union(*(torch.unique(labels).tolist() for labels in maps)) - {0})
    return [int(value) for value in values]


def write(
    result: Result,
    folder: Path,
    provenance: Mapping[str, Any],
    *,
    inverse: bool = False,
    progress: Progress = lambda stage: None,
) -> dict[str, Any]:
    """Write every file of a result into a folder, and give back what ``report.json`` holds.

    Args:
        result: from ``register`` or ``finish``.
        folder: an existing folder.
        provenance: what made the result; stands at the top of the report.
        inverse: also write the other way, fixed to moving.
        progress: told the name of each stage as it begins.
    """
    from iregzoo.report import picture

    seconds = dict(result.seconds)
    grid = result.frame.fixed
    with timed("write", seconds, progress):
        write_image(folder / "warped.nii.gz", result.warped, grid)
        if result.warped_labels is not None:
            write_image(folder / "warped_labels.nii.gz", result.warped_labels, grid)
        write_displacement(folder / "displacement.nii.gz", result.displacement, grid)
        write_transform(folder / "transform.h5", result.deformation, grid, result.frame.start)
    extra: dict[str, Any] = {}
    if inverse:
        with timed("inverse", seconds, progress):
            extra = _write_inverse(result, folder)
    with timed("report", seconds, progress):
        images = compare(result)
        found = figures(result, images) | extra
        picture(result, images, found, folder / "report.png")
    report = {**provenance, **_geometry(result), **found, "seconds": seconds}
    (folder / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    return report


def provenance(method: Method) -> dict[str, Any]:
    """What made a result: versions, bundle, weights and device."""
    return {
        "iregzoo": __version__,
        "bundle": method.bundle.name,
        "bundle_version": method.bundle.metadata.get("version", ""),
        "weights": method.weights,
        "weights_sha256": method.sha256,
        "device": str(next(method.network.parameters()).device),
    }


def _geometry(result: Result) -> dict[str, Any]:
    frame = result.frame
    return {
        "fixed": str(result.scans.fixed.path),
        "moving": str(result.scans.moving.path),
        "init": result.init,
        "affine_lps_mm": frame.start.tolist(),
        "network_shape": list(frame.network.shape),
        "network_spacing_mm": frame.network.spacing.tolist(),
    }


def _write_inverse(result: Result, folder: Path) -> dict[str, Any]:
    """The other way: the fixed scan on the moving grid, and how well the inversion went."""
    scans, frame = result.scans, result.frame
    predicted, inverse = result.registration.displacement, result.registration.inverse
    if inverse is None:
        inverse = invert(predicted, iterations=25, tolerance=0.01)
    backward = frame.backward(inverse)
    write_displacement(folder / "inverse_displacement.nii.gz", backward, frame.moving)
    write_transform(folder / "inverse_transform.h5", backward, frame.moving)
    write_image(folder / "inverse_warped.nii.gz", warp_scan(scans.fixed, backward, frame.moving), frame.moving)
    if scans.fixed_labels is not None:
        labels = warp_scan(scans.fixed_labels, backward, frame.moving, mode="nearest")
        write_image(folder / "inverse_warped_labels.nii.gz", labels, frame.moving)
    error = inverse_error(predicted, inverse) * float(frame.network.spacing.max())
    return {"inverse_error_mean_mm": float(error.mean()), "inverse_error_max_mm": float(error.max())}
