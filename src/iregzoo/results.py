"""The files of a registration: scans, transforms, and the report on them."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from iregzoo import __version__
from iregzoo.jacobian import jacobian_determinant
from iregzoo.page import write_page
from iregzoo.precision import resolve
from iregzoo.quality import compare, figures
from iregzoo.register import Progress, Result, timed
from iregzoo.report import picture
from iregzoo.space.files import write_displacement, write_image, write_linear, write_transform
from iregzoo.space.frame import warp_scan
from iregzoo.space.grid import Grid, halved
from iregzoo.space.grid import inverse as inverse_matrix
from iregzoo.space.points import map_points, move_points, reached
from iregzoo.views import views
from iregzoo.zoo import Method

if TYPE_CHECKING:
    from iregzoo.finder import Finder

FILES = (
    "warped.nii.gz",
    "warped_labels.nii.gz",
    "displacement.nii.gz",
    "transform.h5",
    "jacobian.nii.gz",
    "inverse_warped.nii.gz",
    "inverse_warped_labels.nii.gz",
    "inverse_displacement.nii.gz",
    "inverse_transform.h5",
    "inverse_jacobian.nii.gz",
    "report.png",
    "report.html",
    "report.json",  # last: it tells what the others are
)
FINE_VOXELS = 1 << 20  # so many at most has an inverse transform of half the moving scan's spacing
PLACES = 1 << 20  # at which an inverse is judged, at most


def write(
    result: Result,
    folder: str | Path,
    provenance: Mapping[str, Any],
    *,
    inverse: bool = False,
    jacobian: bool = False,
    progress: Progress = lambda stage: None,
) -> dict[str, Any]:
    """Write every file of a result into a folder, and give back what ``report.json`` holds.

    Args:
        result: from ``register`` or ``finish``.
        folder: made if need be; files of the same names in it are replaced.
        provenance: what made the result, from the function of that name; stands at the top of the report.
        inverse: also write the other way, fixed to moving.
        jacobian: also write the Jacobian determinant of each way's deformation, without the affine.
        progress: told the name of each stage as it begins.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    seconds = dict(result.seconds)
    extra: dict[str, Any] = {}
    # One thread writes while this one looks at the result. Not more: each file makes sure of its own room on the disk.
    with ThreadPoolExecutor(1) as writer:
        writing = writer.submit(_write_forward, result, folder)
        if inverse:
            with timed("inverse", seconds, progress):
                writing.result()
                extra = _write_inverse(result, folder, jacobian=jacobian)
        with timed("report", seconds, progress):
            images = compare(result)
            files = [writing]
            if jacobian:
                grid, determinant = result.frame.fixed, images.determinant[None]
                files.append(writer.submit(write_image, folder / "jacobian.nii.gz", determinant, grid))
            found = figures(result, images) | extra
            picture(result, images, found, folder / "report.png")
            shown = views(result, images)
        with timed("write", seconds, progress):
            for file in files:
                file.result()
    names = ("fixed", "moving", "fixed_mask", "moving_mask")
    scans = {name: str(scan.path) for name in names if (scan := getattr(result.scans, name)) is not None}
    report = {**provenance, **scans, **describe(result), **found, "seconds": seconds}
    write_page(report, shown, folder / "report.html")
    sizes = {name: (folder / name).stat().st_size for name in FILES[:-1] if (folder / name).exists()}
    report["bytes"] = sizes
    (folder / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", "utf-8")
    return report


def provenance(method: Method, shown: str = "") -> dict[str, Any]:
    """What made a result: versions, bundle, weights, what looks for brains where something does, device, precision.

    Also what the scans show, where the weights were chosen for that.
    """
    finder = {"finder_sha256": method.finder.sha256} if method.finder else {}
    chosen = {"weights_chosen_for": shown} if shown else {}
    return {
        "iregzoo": __version__,
        "bundle": method.bundle.name,
        "bundle_version": method.bundle.version,
        "weights": method.weights.name,
        "weights_sha256": method.weights.sha256,
        **chosen,
        **finder,
        "device": str(method.device),
        "precision": resolve(method.network.precision, method.device),
    }


def provenance_of_alignment(kind: str, finder: "Finder | None") -> dict[str, Any]:
    """What made a rigid or affine alignment: version, kind, and what looks for brains where something does."""
    return {"iregzoo": __version__, "aligned": kind, **({"finder_sha256": finder.sha256} if finder else {})}


def describe(result: Result) -> dict[str, Any]:
    """How a result came about: affine start, and the network's grid and gradient steps where there were any."""
    frame, refinement = result.frame, result.refinement
    said: dict[str, Any] = {"init": result.init, "affine_lps_mm": frame.start.tolist()}
    if result.card is not None:
        network = refinement.network if refinement else frame.network
        said |= {"network_shape": list(network.shape), "network_spacing_mm": network.spacing.tolist()}
    if result.needless:
        said["network_left_out"] = vars(result.needless)
    if refinement is None:
        return said
    found = {name: value for name, value in vars(refinement).items() if name != "network"}
    grid = frame.network
    return {**said, "refinement": {**found, "shape": list(grid.shape), "spacing_mm": grid.spacing.tolist()}}


def _write_forward(result: Result, folder: Path) -> None:
    """The way from moving to fixed: the scan, its labels, the displacement and the transform."""
    grid = result.frame.fixed
    write_image(folder / "warped.nii.gz", result.warped, grid)
    if result.warped_labels is not None:
        write_image(folder / "warped_labels.nii.gz", result.warped_labels, grid)
    write_displacement(folder / "displacement.nii.gz", result.displacement, grid)
    if result.deformation.any():
        write_transform(folder / "transform.h5", result.deformation, grid, result.frame.start)
    else:
        write_linear(folder / "transform.h5", result.frame.start)


def _write_inverse(result: Result, folder: Path, *, jacobian: bool) -> dict[str, Any]:
    """The other way: the fixed scan on the moving grid, and how well there and back again leads."""
    scans, frame, own = result.scans, result.frame, result.registration.inverse
    finer = halved(frame.moving)
    grid = finer if np.prod(finer.shape) <= FINE_VOXELS else frame.moving
    if deforms := bool(result.deformation.any()):
        undone = frame.undo(result.deformation, grid, None if own is None else own.cpu())
    else:
        undone = torch.zeros(1, 3, *grid.shape, dtype=result.deformation.dtype)
    back = inverse_matrix(frame.start)
    here = undone[:, :, 1::2, 1::2, 1::2] if grid is finer else undone  # at the moving scan's voxels
    backward = frame.total_back(here)
    write_displacement(folder / "inverse_displacement.nii.gz", backward, frame.moving)
    if deforms:
        write_transform(folder / "inverse_transform.h5", undone, grid, back)
    else:
        write_linear(folder / "inverse_transform.h5", back)
    write_image(folder / "inverse_warped.nii.gz", warp_scan(scans.fixed, backward, frame.moving), frame.moving)
    if scans.fixed_labels is not None:
        labels = warp_scan(scans.fixed_labels, backward, frame.moving, mode="nearest")
        write_image(folder / "inverse_warped_labels.nii.gz", labels, frame.moving)
    if jacobian:
        determinant = jacobian_determinant(replace(frame, fixed=frame.moving).in_voxels(here).float())
        write_image(folder / "inverse_jacobian.nii.gz", determinant[None], frame.moving)
    begun = "" if own is None else ", starting from the method's own inverse"
    way = f"point by point{begun}" if deforms else "of the affine"
    return {"inverse": way, **_there_and_back(result, undone, grid)}


def _there_and_back(result: Result, undone: Tensor, grid: Grid) -> dict[str, float]:
    """How far apart, in mm, a place in the fixed scan and what it becomes by transform.h5 and inverse_transform.h5 are.

    Of places all over the fixed scan, also between its voxels; those that leave the moving scan do not count.
    """
    frame, count = result.frame, min(int(np.prod(result.frame.fixed.shape)), PLACES)
    random = torch.rand(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    places = map_points(frame.fixed.affine, random * (torch.tensor(frame.fixed.shape) - 1))
    there = map_points(frame.start, move_points(places, result.deformation, frame.fixed))
    inside = reached(frame.moving, there)
    back = map_points(inverse_matrix(frame.start), move_points(there[inside], undone, grid))
    error = (back - places[inside]).norm(dim=1)
    if not len(error):
        return {}
    return {"inverse_error_mean_mm": float(error.mean()), "inverse_error_max_mm": float(error.max())}
