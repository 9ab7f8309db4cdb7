"""Landmarks in scanner space: their files, and their way through a displacement, there and back."""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iregzoo.errors import InputError
from iregzoo.fields import sample
from iregzoo.inversion import invert_at
from iregzoo.space.grid import Grid, Matrix, apply_matrix, inverse, positions

TO_LPS = {"LPS": (1.0, 1.0, 1.0), "RAS": (-1.0, -1.0, 1.0)}
TOLERANCE_MM = 1e-3  # of inverses
STEP = 0.02  # voxels, of their finite differences


@dataclass(frozen=True)
class PointList:
    """Landmarks and the file that they stand in.

    Attributes:
        points: (N, 3) in LPS mm.
        text: the file's text with other points (N, 3), LPS mm, in the places of these; all else in it is kept.
    """

    points: Tensor
    text: Callable[[Tensor], str]


def read_points(path: str | Path) -> Tensor:
    """Landmarks (N, 3) in LPS mm, of a file that ``read_point_list`` reads."""
    return read_point_list(path).points


def read_point_list(path: str | Path) -> PointList:
    """Landmarks of a Slicer markups file (.mrk.json), all its lists one after the other, or of a CSV file.

    A CSV file has columns x, y, z in mm and says its axes in its first line: ``# CoordinateSystem = LPS`` (or RAS).

    Raises:
        InputError: missing or unreadable file, unknown axes, or no points.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8-sig")
        found = _read_markups(text) if path.name.lower().endswith(".json") else _read_csv(text)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (LookupError, ValueError, TypeError, RuntimeError, csv.Error):
        raise InputError(
            f"{path}: is no list of landmarks; expected a Slicer .mrk.json, or a CSV file whose first line is "
            "'# CoordinateSystem = LPS' (or RAS) and whose columns are x, y, z in mm"
        ) from None
    if len(found.points) == 0 or not torch.isfinite(found.points).all():
        raise InputError(f"{path}: holds no points, or some that are not finite")
    return found


def _read_markups(text: str) -> PointList:
    lists = json.loads(text)["markups"]
    if not lists:
        raise ValueError("no lists")
    signs = torch.tensor([_signs(str(markup["coordinateSystem"])) for markup in lists for _ in markup["controlPoints"]])
    places = [list(map(float, point["position"])) for markup in lists for point in markup["controlPoints"]]

    def other(points: Tensor) -> str:
        document: dict[str, Any] = json.loads(text)
        controls = [point for markup in document["markups"] for point in markup["controlPoints"]]
        for control, place in zip(controls, (points * signs).tolist(), strict=True):
            control["position"] = [round(value, 6) for value in place]
        return json.dumps(document, indent=4, ensure_ascii=False) + "\n"

    return PointList(_tensor(places) * signs.reshape(-1, 3), other)


def _read_csv(text: str) -> PointList:
    comment, _, table = text.partition("\n")
    if not comment.startswith("#"):
        raise ValueError("no coordinate system")
    signs = torch.tensor(_signs(comment.split("=")[1].strip().strip(",").upper()))
    names, *rows = [row for row in csv.reader(io.StringIO(table)) if row]
    columns = [names.index(axis) for axis in "xyz"]
    places = [[float(row[column]) for column in columns] for row in rows]

    def other(points: Tensor) -> str:
        lines = io.StringIO()
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(names)
        for row, place in zip(rows, (points * signs).tolist(), strict=True):
            moved = dict(zip(columns, place, strict=True))
            writer.writerow([f"{moved[at]:.6f}" if at in moved else cell for at, cell in enumerate(row)])
        return f"{comment}\n{lines.getvalue()}"

    return PointList(_tensor(places) * signs, other)


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
    return ((index >= -0.5) & (index < torch.tensor(grid.shape) - 0.5)).all(1)


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
        nodes=voxel_places(grid),
        step=STEP * float(grid.spacing.min()),
        tolerance=TOLERANCE_MM,
    )


def voxel_places(grid: Grid) -> Tensor:
    """World positions of a grid's voxels, the last axis running fastest: (N, 3) LPS mm, float64."""
    return positions(grid.affine, grid.shape, slice(None)).reshape(3, -1).T
