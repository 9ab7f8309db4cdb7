"""Landmarks: files of every kind, and the way that ITK takes them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from geometry import GRIDS, apply_world, field_transform, make_grid, move_all, waves
from iregzoo.errors import InputError
from iregzoo.space.grid import Grid
from iregzoo.space.points import move_points, read_points

LPS = torch.tensor([[1.5, -20.25, 300.0], [-4.0, 5.5, -6.125]], dtype=torch.float64)
RAS = LPS * torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64)


def csv_file(path: Path, system: str, points: torch.Tensor, names: str = "x,y,z") -> Path:
    rows = [",".join(map(str, point)) for point in points.tolist()]
    path.write_text("\n".join([f"# CoordinateSystem = {system}", names, *rows]) + "\n")
    return path


def markups(path: Path, system: str | int, positions: list[object]) -> Path:
    points = [{"id": str(number), "label": "a, b", "position": place} for number, place in enumerate(positions)]
    path.write_text(json.dumps({"markups": [{"coordinateSystem": system, "controlPoints": points}]}))
    return path


@pytest.mark.parametrize(("system", "points"), [("LPS", LPS), ("RAS", RAS), ("ras", RAS), ("LPS,,", LPS)])
def test_csv_is_read_in_its_own_axes(tmp_path: Path, system: str, points: torch.Tensor) -> None:
    assert torch.equal(read_points(csv_file(tmp_path / "points.csv", system, points)), LPS)


@pytest.mark.parametrize(("system", "points"), [("LPS", LPS), ("RAS", RAS), ("1", LPS), ("0", RAS), (1, LPS), (0, RAS)])
def test_slicer_markups_are_read_in_their_own_axes(tmp_path: Path, system: str | int, points: torch.Tensor) -> None:
    assert torch.equal(read_points(markups(tmp_path / "points.mrk.json", system, points.tolist())), LPS)


def test_csv_may_have_other_columns_and_the_mark_that_spreadsheets_add(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text("\ufeff# CoordinateSystem = RAS\nlabel,z,y,x\nfirst,300,20.25,-1.5\n", encoding="utf-8")
    assert torch.equal(read_points(path), LPS[:1])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x,y,z\n1,2,3\n",
        "# a comment\nx,y,z\n1,2,3\n",
        "# CoordinateSystem = IJK\nx,y,z\n1,2,3\n",
        "# CoordinateSystem = LPS\na,b,c\n1,2,3\n",
        "# CoordinateSystem = LPS\nx,y,z\n1,2\n",
        "# CoordinateSystem = LPS\nx,y,z\n1,two,3\n",
    ],
)
def test_csv_that_is_no_list_of_landmarks_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "points.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=r"points.csv: is no list of landmarks; expected .*CoordinateSystem = LPS"):
        read_points(path)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"markups": []}',
        '{"markups": [{"coordinateSystem": "LPS"}]}',
        '{"markups": [{"coordinateSystem": "LPS", "controlPoints": [{"position": null}]}]}',
        '{"markups": [{"coordinateSystem": "XYZ", "controlPoints": [{"position": [1, 2, 3]}]}]}',
        '{"markups": [{"coordinateSystem": "LPS", "controlPoints": [{"position": [1, 2]}, {"position": [1, 2, 3]}]}]}',
    ],
)
def test_json_that_is_no_list_of_landmarks_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "points.mrk.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"points.mrk.json: is no list of landmarks; expected a Slicer .mrk.json"):
        read_points(path)


def test_points_of_two_numbers_do_not_become_points_of_three(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no list of landmarks"):
        read_points(markups(tmp_path / "points.mrk.json", "LPS", [[1, 2], [3, 4], [5, 6]]))


def test_file_that_is_missing_or_binary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent.csv: cannot be read \(No such file"):
        read_points(tmp_path / "absent.csv")
    (tmp_path / "binary.csv").write_bytes(bytes(range(128, 256)))
    with pytest.raises(InputError, match=r"binary.csv: is no list of landmarks"):
        read_points(tmp_path / "binary.csv")


def test_no_points_or_infinite_ones_are_refused(tmp_path: Path) -> None:
    for name, rows in (("none", torch.empty(0, 3)), ("infinite", torch.tensor([[1.0, float("inf"), 2.0]]))):
        with pytest.raises(InputError, match=rf"{name}.csv: holds no points, or some that are not finite"):
            read_points(csv_file(tmp_path / f"{name}.csv", "LPS", rows))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_points_move_as_itk_moves_them(grid: Grid) -> None:
    displacement = waves(grid)
    index = np.random.default_rng(0).uniform(0, np.array(grid.shape) - 1, (200, 3))
    places = apply_world(grid.affine, index)
    moved = move_points(torch.from_numpy(places), displacement, grid)
    np.testing.assert_allclose(moved, move_all(field_transform(displacement, grid), places), atol=1e-9)
    assert np.abs(moved.numpy() - places).max() > 1


def test_beyond_the_grid_points_move_as_on_its_border() -> None:
    grid = make_grid((10, 12, 14))
    displacement = waves(grid)
    corner = torch.from_numpy(grid.affine[:3, 3])
    far = (corner - 100)[None]
    torch.testing.assert_close(move_points(far, displacement, grid)[0] - far[0], displacement[0, :, 0, 0, 0])
