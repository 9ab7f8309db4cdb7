"""Landmarks: files of every kind, and the way that ITK takes them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from geometry import GRIDS, apply_world, field_transform, make_grid, move_all, waves, world_points
from iregzoo.errors import InputError
from iregzoo.space.grid import Grid
from iregzoo.space.points import move_points, move_points_back, reached, read_point_list, read_points, voxel_places

LPS = torch.tensor([[1.5, -20.25, 300.0], [-4.0, 5.5, -6.125]], dtype=torch.float64)
RAS = LPS * torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64)


def csv_file(path: Path, system: str, points: torch.Tensor, names: str = "x,y,z") -> Path:
    rows = [",".join(map(str, point)) for point in points.tolist()]
    path.write_text("\n".join([f"# CoordinateSystem = {system}", names, *rows]) + "\n", encoding="utf-8")
    return path


def markups(path: Path, system: str | int, positions: list[object]) -> Path:
    points = [{"id": str(number), "label": "a, b", "position": place} for number, place in enumerate(positions)]
    path.write_text(json.dumps({"markups": [{"coordinateSystem": system, "controlPoints": points}]}), encoding="utf-8")
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
        "# CoordinateSystem = LPS\n",
    ],
)
def test_csv_that_is_no_list_of_landmarks_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "points.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=r"points.csv: is not a list of landmarks; expected .*CoordinateSystem = LPS"):
        read_points(path)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("a,b,c\n1,2,3\n", ": has columns 'a, b, c'; expected x, y, z"),
        ("x;y;z\n1;2;3\n", ": has columns 'x;y;z'; expected x, y, z, once each, separated by commas"),
        ("x,y,x,z\n1,2,3,4\n", ": has columns 'x, y, x, z'"),
        ("x,y,z\n1,2,3\n\n1,2\n", ", line 5, column z: is empty"),
        ("label,x,y,z\na,1,,3\n", ", line 3, column y: is empty"),
        ("x,y,z\n1,two,3\n", ", line 3, column y: 'two' is not a number"),
        ("z,y,x\n1,2,3\n1,2,nan\n", ", line 4, column x: 'nan' is not finite"),
        ("x,y,z\n1,2,inf\n", ", line 3, column z: 'inf' is not finite"),
        ("x,y,z\n1,5,2,3\n", ", line 3: has more cells than columns"),
        ("x,y,z\n", ": holds no points"),
    ],
)
def test_what_is_wrong_in_a_csv_file_is_named_with_its_place(tmp_path: Path, table: str, words: str) -> None:
    path = tmp_path / "points.csv"
    path.write_text(f"# CoordinateSystem = LPS\n{table}")
    with pytest.raises(InputError) as refused:
        read_points(path)
    assert str(refused.value).startswith(f"{path}{words}")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"markups": []}',
        '{"markups": [{"coordinateSystem": "LPS"}]}',
        '{"markups": [{"coordinateSystem": "XYZ", "controlPoints": [{"position": [1, 2, 3]}]}]}',
    ],
)
def test_json_that_is_no_list_of_landmarks_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "points.mrk.json"
    path.write_text(text)
    with pytest.raises(
        InputError, match=r"points.mrk.json: is not a list of landmarks; expected a Slicer .mrk.json: markups"
    ) as refused:
        read_points(path)
    assert "CSV" not in str(refused.value)


@pytest.mark.parametrize("wrong", [[1, 2], [1, 2, 3, 4], None, 5, ["a", 1, 2], [1, None, 2], [1, 2, float("nan")]])
def test_position_that_is_none_is_named(tmp_path: Path, wrong: object) -> None:
    path = markups(tmp_path / "points.mrk.json", "LPS", [[1, 2, 3], wrong])
    with pytest.raises(InputError) as refused:
        read_points(path)
    said = f"{path}, control point 2: its position is {json.dumps(wrong)}, not three finite numbers"
    assert str(refused.value) == said


def test_file_that_is_missing_or_binary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent.csv: cannot be read \(No such file"):
        read_points(tmp_path / "absent.csv")
    (tmp_path / "binary.csv").write_bytes(bytes(range(128, 256)))
    with pytest.raises(InputError, match=r"binary.csv: is not UTF-8 text"):
        read_points(tmp_path / "binary.csv")


@pytest.mark.parametrize(("system", "points"), [("LPS", LPS), ("RAS", RAS)])
def test_csv_with_other_points_keeps_all_else(tmp_path: Path, system: str, points: torch.Tensor) -> None:
    rows = [f'"a, ""b""",{z},7,{y},{x},é' for x, y, z in points.tolist()]
    path = tmp_path / "points.csv"
    path.write_text("\n".join([f"# CoordinateSystem = {system}", "label,z,n,y,x,note", *rows]) + "\n", "utf-8")
    given = read_point_list(path)
    same = tmp_path / "same.csv"
    same.write_text(given.text(given.points), "utf-8")
    assert torch.equal(read_points(same), LPS)
    shifted = tmp_path / "shifted.csv"
    shifted.write_text(given.text(given.points + torch.tensor([1.0, 2.0, 3.0])), "utf-8")
    torch.testing.assert_close(read_points(shifted), LPS + torch.tensor([1.0, 2.0, 3.0]).double())
    lines = shifted.read_text("utf-8").splitlines()
    assert lines[:2] == [f"# CoordinateSystem = {system}", "label,z,n,y,x,note"]
    sign = 1 if system == "LPS" else -1
    assert lines[2] == f'"a, ""b""",303.000000,7,{sign * -18.25:.6f},{sign * 2.5:.6f},é'
    assert len(lines) == 4


@pytest.mark.parametrize(("system", "points"), [("LPS", LPS), ("RAS", RAS), ("0", RAS)])
def test_markups_with_other_points_keep_all_else(tmp_path: Path, system: str, points: torch.Tensor) -> None:
    path = markups(tmp_path / "points.mrk.json", system, points.tolist())
    document = json.loads(path.read_text("utf-8"))
    document["@schema"] = "https://example.org/markups"
    document["markups"][0]["display"] = {"color": [0.4, 1.0, 0.5], "visibility": True}
    document["markups"].append({"coordinateSystem": "LPS", "controlPoints": [{"position": [1, 2, 3], "label": "ü"}]})
    path.write_text(json.dumps(document))
    given = read_point_list(path)
    torch.testing.assert_close(given.points, torch.cat((LPS, torch.tensor([[1.0, 2.0, 3.0]]).double())))
    moved = json.loads(given.text(given.points + 10))
    signs = [1, 1, 1] if system == "LPS" else [-1, -1, 1]
    for point, place in zip(moved["markups"][0]["controlPoints"], LPS.tolist(), strict=True):
        assert point["position"] == [sign * (value + 10) for sign, value in zip(signs, place, strict=True)]
        point.pop("position")
    assert moved["markups"][1]["controlPoints"][0].pop("position") == [11, 12, 13]
    for one in (*document["markups"][0]["controlPoints"], *document["markups"][1]["controlPoints"]):
        one.pop("position")
    assert moved == document
    assert "ü" in given.text(given.points)


def test_quoted_lines_within_a_label_stay(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text('# CoordinateSystem = LPS\nlabel,x,y,z\n"two\nlines",1,2,3\n\nb,4,5,6\n')
    given = read_point_list(path)
    assert given.points.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert '"two\nlines",1.000000,2.000000,3.000000\nb,' in given.text(given.points)


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


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_points_come_back_from_within_and_beyond_the_grid(grid: Grid) -> None:
    displacement = waves(grid)
    size = np.array(grid.shape) - 1
    index = np.random.default_rng(0).uniform(-0.5 * size, 1.5 * size, (500, 3))
    places = torch.from_numpy(apply_world(grid.affine, index))
    moved = move_points(places, displacement, grid)
    for start in (None, places + 1):
        back = move_points_back(moved, displacement, grid, start)
        assert (move_points(back, displacement, grid) - moved).norm(dim=1).max() <= 1e-3
        assert (back - places).norm(dim=1).max() < 0.01
    assert (moved - places).norm(dim=1).mean() > 1


def test_a_grid_reaches_half_a_voxel_beyond_its_centres() -> None:
    grid = GRIDS["everything"]
    index = np.array([[-0.49, 0, 0], [-0.51, 0, 0], [15.49, 27, 24], [15.51, 27, 24], [3, 27.49, 4], [3, 4, 24.51]])
    places = torch.from_numpy(apply_world(grid.affine, index))
    assert reached(grid, places).tolist() == [True, False, True, False, True, False]


def test_places_of_voxels_run_along_the_last_axis_first() -> None:
    grid = GRIDS["everything"]
    np.testing.assert_allclose(voxel_places(grid).reshape(*grid.shape, 3), world_points(grid), atol=1e-9)
