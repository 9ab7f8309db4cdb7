"""Landmarks in scanner space: their files, and their way through a displacement, there and back."""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iregzoo.errors import InputError
from iregzoo.fields import sample
from iregzoo.inversion import invert_at
from iregzoo.space.grid import Grid, Matrix, apply_matrix, inverse, positions
from iregzoo.space.separable import EDGE

TO_LPS = {"LPS": (1.0, 1.0, 1.0), "RAS": (-1.0, -1.0, 1.0)}
TOLERANCE_MM = 1e-3  # of inverses
AXES = "xyz"
MARKUPS = "a Slicer .mrk.json: markups, each with a coordinateSystem (LPS or RAS) and controlPoints with a position"
TABLE = "a CSV file whose first line is '# CoordinateSystem = LPS' (or RAS) and whose columns are x, y, z in mm"
SOLIDS = ("ROI", "Plane")  # which Slicer builds from more than their control points
STEP = 0.02  # voxels, of their finite differences


@dataclass(frozen=True)
class PointList:
    """Landmarks and the file that they stand in.

    Attributes:
        points: (N, 3) in LPS mm, those that have a place.
        text: the file's text with other points (N, 3), LPS mm, in the places of these; all else in it is kept.
        unplaced: how many points of a Slicer file have no place yet.
    """

    points: Tensor
    text: Callable[[Tensor], str]
    unplaced: int = 0


def read_points(path: str | Path) -> Tensor:
    """Landmarks (N, 3) in LPS mm, of a file that ``read_point_list`` reads.

    Raises:
        InputError: as that does, and where a point has no place.
    """
    found = read_point_list(path)
    if found.unplaced:
        raise InputError(f"{path}: {found.unplaced} of its points have no position; place them or remove them")
    return found.points


def read_point_list(path: str | Path) -> PointList:
    """Landmarks of a Slicer markups file (.mrk.json), all its lists one after the other, or of a CSV file.

    A CSV file has columns x, y, z in mm and says its axes in its first line: ``# CoordinateSystem = LPS`` (or RAS).

    Raises:
        InputError: missing or unreadable file, unknown axes, what is no number or not finite (naming where), or no
            points.
    """
    path = Path(path)
    json_file = path.name.lower().endswith(".json")
    try:
        text = path.read_text("utf-8-sig")
        found = _read_markups(text, path) if json_file else _read_csv(text, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except InputError:  # which already names the place
        raise
    except (LookupError, ValueError, TypeError, RuntimeError, csv.Error):
        raise InputError(f"{path}: is not a list of landmarks; expected {MARKUPS if json_file else TABLE}") from None
    if len(found.points) == 0:
        raise InputError(f"{path}: holds no points")
    return found


def _read_markups(text: str, path: Path) -> PointList:
    lists = json.loads(text)["markups"]
    if not lists:
        raise ValueError("no lists")
    for markup in lists:
        if markup.get("type") in SOLIDS:
            raise InputError(
                f"{path}: holds a markup of type {markup['type']}, which a deformation cannot keep one; give points, "
                "lines or curves"
            )
    systems = [_signs(str(markup["coordinateSystem"])) for markup in lists for _ in markup["controlPoints"]]
    controls = _controls(lists)
    placed = [n for n, point in enumerate(controls) if point.get("positionStatus", "defined") == "defined"]
    signs = torch.tensor([systems[n] for n in placed]).reshape(-1, 3)
    places = [_position(controls[n]["position"], f"{path}, control point {n + 1}") for n in placed]

    def other(points: Tensor) -> str:
        document: dict[str, Any] = json.loads(text)
        found = _controls(document["markups"])
        for n, place in zip(placed, (points * signs).tolist(), strict=True):
            found[n]["position"] = [round(value, 6) for value in place]
        return json.dumps(document, indent=4, ensure_ascii=False) + "\n"

    return PointList(_tensor(places) * signs, other, len(controls) - len(placed))


def _controls(lists: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [point for markup in lists for point in markup["controlPoints"]]


def _position(position: Any, where: str) -> list[float]:
    with suppress(TypeError, ValueError):
        place = list(map(float, position))
        if len(place) == 3 and all(map(math.isfinite, place)):
            return place
    raise InputError(f"{where}: its position is {json.dumps(position)[:100]}, not three finite numbers")


def _read_csv(text: str, path: Path) -> PointList:
    comment, _, table = text.partition("\n")
    if not comment.startswith("#"):
        raise ValueError("no coordinate system")
    signs = torch.tensor(_signs(comment.split("=")[1].strip().strip(",").upper()))
    reader = csv.reader(io.StringIO(table))
    names, *rows = [(reader.line_num + 1, row) for row in reader if row]
    columns = _columns(names[1], path)
    for line, row in rows:
        if any(cell.strip() for cell in row[len(names[1]) :]):
            raise InputError(f"{path}, line {line}: has more cells than columns")
    places = [_place(row, columns, f"{path}, line {line}") for line, row in rows]

    def other(points: Tensor) -> str:
        lines = io.StringIO()
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(names[1])
        for (_, row), place in zip(rows, (points * signs).tolist(), strict=True):
            moved = dict(zip(columns.values(), place, strict=True))
            writer.writerow([f"{moved[at]:.6f}" if at in moved else cell for at, cell in enumerate(row)])
        return f"{comment}\n{lines.getvalue()}"

    return PointList(_tensor(places) * signs, other)


def _columns(names: list[str], path: Path) -> dict[str, int]:
    """Where x, y and z stand."""
    found = [name.strip() for name in names]
    if any(found.count(axis) != 1 for axis in AXES):
        raise InputError(f"{path}: has columns {', '.join(names)!r}; expected x, y, z, once each, separated by commas")
    return {axis: found.index(axis) for axis in AXES}


def _place(row: list[str], columns: dict[str, int], where: str) -> list[float]:
    """The numbers of a line."""
    place = []
    for axis, column in columns.items():
        cell = row[column] if column < len(row) else ""
        if not cell.strip():
            raise InputError(f"{where}, column {axis}: is empty")
        try:
            place.append(float(cell))
        except ValueError:
            raise InputError(f"{where}, column {axis}: {cell!r} is not a number") from None
        if not math.isfinite(place[-1]):
            raise InputError(f"{where}, column {axis}: {cell!r} is not finite")
    return place


def _signs(system: str) -> list[float]:
    """What takes the axes of a coordinate system, by its name or Slicer's number, to LPS, and back."""
    return list(TO_LPS[{"0": "RAS", "1": "LPS"}.get(system, system)])


def _tensor(places: list[list[float]]) -> Tensor:
    return torch.tensor(places, dtype=torch.float64).view(len(places), 3)


def map_points(matrix: Matrix, points: Tensor) -> Tensor:
    """Points (K, 3) through an affine (4, 4)."""
    return apply_matrix(matrix, points.T.reshape(1, 3, -1, 1, 1)).reshape(3, -1).T


def reached(grid: Grid, points: Tensor) -> Tensor:
    """Which of points (N, 3), LPS mm, a grid's voxels reach, half a voxel beyond their centres: (N,)."""
    index = map_points(inverse(grid.affine), points.double())
    return ((index >= -0.5 - EDGE) & (index < torch.tensor(grid.shape) - 0.5 - EDGE)).all(1)


def move_points(points: Tensor, displacement: Tensor, grid: Grid) -> Tensor:
    """Take points (N, 3) along a displacement (1, 3, *grid.shape), both LPS mm; beyond the grid its border goes on."""
    world = points.double()
    index = map_points(inverse(grid.affine), world).T.reshape(1, 3, -1, 1, 1)
    return world + sample(displacement.double(), index, padding="border").reshape(3, -1).T


def move_points_back(points: Tensor, displacement: Tensor, grid: Grid, start: Tensor | None = None) -> Tensor:
    """Places (N, 3) that ``move_points`` takes to points, all LPS mm, each solved to ``TOLERANCE_MM`` by itself.

    Args:
        points: (N, 3).
        displacement: (1, 3, *grid.shape).
        grid: where the displacement is; beyond it its border goes on.
        start: (N, 3), where to begin looking; the points themselves if None.
    """
    vectors = displacement.double()
    return invert_at(
        lambda places: move_points(places, vectors, grid),
        points.double(),
        start=points.double() if start is None else start.double(),
        nodes=lambda: voxel_places(grid),
        step=STEP * float(grid.spacing.min()),
        tolerance=TOLERANCE_MM,
    )


def voxel_places(grid: Grid) -> Tensor:
    """World positions of a grid's voxels, the last axis running fastest: (N, 3) LPS mm, float64."""
    return positions(grid.affine, grid.shape, slice(None)).reshape(3, -1).T
