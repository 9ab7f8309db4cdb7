"""Landmarks in scanner space: reading them, and taking them through a displacement."""

import csv
import json
from pathlib import Path

import torch
from torch import Tensor

from iregzoo.errors import InputError
from iregzoo.fields import sample
from iregzoo.space.grid import Grid, apply_matrix, to_voxels

TO_LPS = {"LPS": (1.0, 1.0, 1.0), "RAS": (-1.0, -1.0, 1.0)}


def read_points(path: str | Path) -> Tensor:
    """Landmarks (N, 3) in LPS mm, from a Slicer markups file (.mrk.json) or a CSV file.

    A CSV file has columns x, y, z in mm and says its axes in its first line: ``# CoordinateSystem = LPS`` (or RAS).

    Raises:
        InputError: missing or unreadable file, unknown axes, or no points.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8-sig")
        system, rows = _read_markups(text) if path.name.endswith(".json") else _read_csv(text)
        points = torch.tensor(rows, dtype=torch.float64).view(len(rows), 3) * torch.tensor(TO_LPS[system]).double()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (LookupError, ValueError, TypeError, RuntimeError, StopIteration):
        raise InputError(
            f"{path}: is no list of landmarks; expected a Slicer .mrk.json, or a CSV file whose first line is "
            "'# CoordinateSystem = LPS' (or RAS) and whose columns are x, y, z in mm"
        ) from None
    if len(points) == 0 or not torch.isfinite(points).all():
        raise InputError(f"{path}: holds no points, or some that are not finite")
    return points


def _read_markups(text: str) -> tuple[str, list[list[float]]]:
    markup = json.loads(text)["markups"][0]
    system = {"0": "RAS", "1": "LPS"}.get(str(markup["coordinateSystem"]), str(markup["coordinateSystem"]))
    return system, [list(map(float, point["position"])) for point in markup["controlPoints"]]


def _read_csv(text: str) -> tuple[str, list[list[float]]]:
    lines = iter(text.splitlines())
    comment = next(lines)
    if not comment.startswith("#"):
        raise ValueError("no coordinate system")
    system = comment.split("=")[1].strip().strip(",").upper()
    return system, [[float(row[axis]) for axis in "xyz"] for row in csv.DictReader(lines)]


def move_points(points: Tensor, displacement: Tensor, grid: Grid) -> Tensor:
    """Take points (N, 3) along a displacement (1, 3, *grid.shape), both LPS mm; beyond the grid its border goes on."""
    world = points.T.reshape(1, 3, -1, 1, 1).double()
    unit = Grid((1, 1, 1), torch.eye(4, dtype=torch.float64).numpy())
    moved = world + sample(displacement.double(), apply_matrix(to_voxels(unit, None, grid), world), padding="border")
    return moved.reshape(3, -1).T
