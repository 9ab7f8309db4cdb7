"""What a person looks at to see whether a registration can be trusted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from iregzoo.errors import InputError
from iregzoo.planes import GRID_LINES, JACOBIAN_LIMITS, PLANES, Plane, Volume, canonical, canonical_vectors, middle
from iregzoo.quality import Comparison
from iregzoo.register import Result
from iregzoo.space.grid import canonical_axes

COLUMNS = (
    "fixed",
    "moving at the start",
    "warped",
    "difference at the start",
    "difference after",
    "deformed grid",
    "Jacobian",
)
JACOBIAN_COLOURS, JACOBIAN_NORM = "RdBu_r", TwoSlopeNorm(1.0, *JACOBIAN_LIMITS)
OUTLINED = [withStroke(linewidth=2, foreground="black")]
# Where the letters of a plane stand in a picture: x, y and how they are aligned.
SIDES = (
    (0.02, 0.5, "left", "center"),
    (0.98, 0.5, "right", "center"),
    (0.5, 0.98, "center", "top"),
    (0.5, 0.02, "center", "bottom"),
)


def picture(result: Result, images: Comparison, figures: Mapping[str, Any], path: Path) -> None:
    """Draw three planes of fixed, moving, warped, their differences, the deformed grid and the Jacobian determinant.

    The moving image is shown where the affine start puts it. Folds (det J at or below 0) are marked in magenta.

    Raises:
        InputError: where the file cannot be written.
    """
    grid = result.frame.fixed
    order, _ = canonical_axes(grid)
    spacing = grid.spacing[order]
    shown = {"fixed": images.fixed, "start": images.start, "warped": images.after, "jacobian": images.determinant[None]}
    volumes = {name: canonical(volume[0, 0], grid) for name, volume in shown.items()}
    place = middle(volumes["fixed"])
    figure = Figure(figsize=(2.4 * len(COLUMNS) + 0.6, 8.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, len(COLUMNS))
    for row, plane in zip(axes, PLANES, strict=True):
        cuts = {name: np.take(volume, place[plane.across], axis=plane.across) for name, volume in volumes.items()}
        lines = _lines(result, plane, place[plane.across])
        _draw_row(row, cuts, lines, spacing[plane.up] / spacing[plane.along])
        _name(row[0], plane)
    for axis, title in zip(axes[0], COLUMNS, strict=True):
        axis.set_title(title, fontsize=10)
    figure.colorbar(ScalarMappable(JACOBIAN_NORM, JACOBIAN_COLOURS), ax=axes[:, -1], shrink=0.5, label="det J")
    figure.suptitle(headline(result, figures), fontsize=10, ha="left", x=0.01)
    try:
        figure.savefig(path, dpi=80, facecolor="white")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); make room on the disk") from None


def headline(result: Result, figures: Mapping[str, Any]) -> str:
    """What was registered, and the figures that matter, in two lines."""
    names = f"{result.scans.moving.path.name}  →  {result.scans.fixed.path.name}"
    first = f"{names}   (affine start: {result.init}; radiological convention, letters name the patient's sides)"
    return f"{first}\n{'   ·   '.join(key_figures(figures))}"


def key_figures(figures: Mapping[str, Any]) -> list[str]:
    """The figures that matter, in words."""
    parts = [
        "NCC {ncc_before:.3f} as given, {ncc_start:.3f} at the start, {ncc_after:.3f} after".format_map(figures),
        f"folding {figures['folding_percent']:.3f} %",
        f"deformation {figures['displacement_mean_mm']:.1f} mm mean, {figures['displacement_max_mm']:.1f} mm largest",
    ]
    if "dice_mean" in figures:
        parts.insert(1, f"Dice {figures['dice_before_mean']:.3f} as given, {figures['dice_mean']:.3f} after")
    return parts


def _lines(result: Result, plane: Plane, index: int) -> list[NDArray[np.float64]]:
    """Where the deformation reads the moving image from a plane, in voxels along the plane's two axes."""
    grid = result.frame.fixed
    moved = np.stack([np.take(canonical(channel, grid), index, axis=plane.across) for channel in result.deformation[0]])
    turn = canonical_vectors(grid)[[plane.along, plane.up]]
    return list(np.tensordot(turn, moved, 1) + np.indices(moved.shape[1:]))


def _name(axis: Axes, plane: Plane) -> None:
    """Write the plane's name and the patient's sides on a row's first picture."""
    axis.set_ylabel(plane.name, fontsize=11)
    for (x, y, ha, va), letter in zip(SIDES, plane.sides, strict=True):
        axis.text(
            x, y, letter, ha=ha, va=va, transform=axis.transAxes, color="white", fontsize=9, path_effects=OUTLINED
        )


def _draw_row(axes: NDArray[Any], cuts: Mapping[str, Volume], lines: list[NDArray[np.float64]], aspect: float) -> None:
    for axis, name in zip(axes, ("fixed", "start", "warped"), strict=False):
        _show(axis, cuts[name], aspect, cmap="gray", vmin=0, vmax=1)
    for axis, name in zip(axes[3:], ("start", "warped"), strict=False):
        _show(axis, cuts[name] - cuts["fixed"], aspect, cmap="seismic", vmin=-1, vmax=1)
    _show(axes[5], cuts["fixed"], aspect, cmap="gray", vmin=0, vmax=2)
    _draw_grid(axes[5], lines)
    _show(axes[6], cuts["jacobian"], aspect, cmap=JACOBIAN_COLOURS, norm=JACOBIAN_NORM)
    folds = np.argwhere(cuts["jacobian"] <= 0)
    axes[6].plot(folds[:, 0], folds[:, 1], "s", color="magenta", markersize=2)


def _show(axis: Axes, cut: Volume, aspect: float, **style: Any) -> None:
    axis.imshow(cut.T, origin="lower", aspect=aspect, interpolation="nearest", **style)
    axis.set(xlim=(cut.shape[0] - 0.5, -0.5), ylim=(-0.5, cut.shape[1] - 0.5), autoscale_on=False)
    axis.set_xticks([])
    axis.set_yticks([])


def _draw_grid(axis: Axes, positions: list[NDArray[np.float64]]) -> None:
    """Lines of the fixed grid at the places where the deformation reads the moving image."""
    across, up = positions
    step = max(1, max(across.shape) // GRID_LINES)
    axis.plot(across[::step].T, up[::step].T, color="gold", linewidth=0.6)
    axis.plot(across[:, ::step], up[:, ::step], color="gold", linewidth=0.6)
