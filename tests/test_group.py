"""A group's mean pose: where its scans lie in their scanners is not to matter, nor which comes first."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import logm
from scipy.spatial.transform import Rotation
from torch import Tensor

from geometry import draw_head, make_grid
from iregzoo.errors import InputError
from iregzoo.group import Group, Member, _around_mean, labels_in, mean_image, placings, poses, read_group, read_members
from iregzoo.similarity import ncc
from iregzoo.space.files import write_image
from iregzoo.space.grid import Grid, Matrix
from iregzoo.space.start import STARTS
from iregzoo.zoo import WeightsCard

CARD = WeightsCard(file="none", sha256="", spacing=(4.0, 4.0, 4.0), minimum=(1, 1, 1))


def turned(degrees: Sequence[float], shift: Sequence[float], scaling: float = 1.0) -> Matrix:
    """An affine of the world."""
    matrix = np.eye(4)
    matrix[:3, :3] = scaling * Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    matrix[:3, 3] = shift
    return matrix


def write_head(folder: Path, name: str, world: Matrix, grid: Grid | None = None) -> Member:
    """A scan of the head as it lies after an affine of its world."""
    grid = grid or make_grid((44, 48, 42), (4.0, 4.0, 4.0), signs=(-1, -1, 1))
    write_image(folder / f"{name}.nii.gz", draw_head(grid, np.linalg.inv(world)), grid)
    return Member(name, str(folder / f"{name}.nii.gz"))


def mean_of(group: Group) -> Tensor:
    return mean_image(group, poses(group))[0]


def sharpness(group: Group) -> float:
    """How like the mean of a group its single scans are."""
    mean = mean_of(group)
    alone = [Group([member], [start], group.grid) for member, start in zip(group.members, group.starts, strict=True)]
    return min(float(ncc(mean, mean_of(one))) for one in alone)


POSES = (turned((0, 0, 0), (0, 0, 0)), turned((8, -4, 10), (9, -5, 4)), turned((-6, 5, -7), (-4, 8, -10)))
SIZES = {"rigid": (1.0, 1.0, 1.0), "affine": (1.0, 1.15, 0.9)}
Heads = tuple[list[Matrix], list[Member], Group]


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Heads]:
    """Where three heads lie, their scans, and the group that a start makes of them, which takes seconds."""

    @cache
    def made(init: str) -> Heads:
        worlds = [world @ turned((0, 0, 0), (0, 0, 0), size) for world, size in zip(POSES, SIZES[init], strict=True)]
        folder = tmp_path_factory.mktemp(init)
        members = [write_head(folder, f"head{number}", world) for number, world in enumerate(worlds)]
        return worlds, members, read_group(members, CARD, init=init)

    return made


@pytest.mark.parametrize("init", list(SIZES))
def test_scans_are_brought_to_one_pose(heads: Callable[[str], Heads], init: str) -> None:
    worlds, members, group = heads(init)
    apart = read_group(members, CARD, init="none")
    assert sharpness(apart) < 0.93
    assert sharpness(group) > 0.98
    # From one scan to another by way of the template, as the head was moved.
    for world, start in zip(worlds, group.starts, strict=True):
        found = start @ np.linalg.inv(group.starts[0])
        expected = world @ np.linalg.inv(worlds[0])
        assert group.grid.farthest(found @ group.grid.affine, expected @ group.grid.affine) < 6.0  # 1.5 voxels


def test_mean_pose_is_the_mean(heads: Callable[[str], Heads]) -> None:
    _, _, group = heads("affine")
    linear = np.array([start[:3, :3] for start in group.starts])
    # To second order of the turns, which do not commute.
    assert np.abs(np.mean([logm(part) for part in linear], axis=0)).max() < 0.01
    found = np.cbrt(np.linalg.det(linear))
    assert np.allclose(found, np.array(SIZES["affine"]) / np.cbrt(1.15 * 0.9), atol=0.02)
    assert np.allclose(group.grid.centre, 0, atol=1e-9)
    assert all(start[3].tolist() == [0, 0, 0, 1] for start in group.starts)


def test_first_scan_is_like_any_other(heads: Callable[[str], Heads]) -> None:
    _, members, group = heads("rigid")
    other = read_group(members[::-1], CARD, init="rigid")
    assert abs(sharpness(group) - sharpness(other)) < 0.01
    one, other = (read_group(some, CARD, init="center") for some in (members, members[::-1]))
    assert one.grid.matches(other.grid)
    torch.testing.assert_close(mean_of(one), mean_of(other), atol=1e-4, rtol=0)


def test_headers_are_trusted_where_the_start_is_none(tmp_path: Path) -> None:
    grid = make_grid((44, 48, 42), (4.0, 4.0, 4.0), signs=(-1, -1, 1), centre=(30.0, -20.0, 55.0))
    world = turned((0, 0, 0), (30, -20, 55))
    group = read_group([write_head(tmp_path, name, world, grid) for name in "ab"], CARD, init="none")
    assert all(np.array_equal(start, np.eye(4)) for start in group.starts)
    # What a scan shows with 10 mm around it, on voxels of the scan.
    offset = np.linalg.inv(grid.affine) @ group.grid.affine
    assert np.allclose(offset[:3, :3], np.eye(3))
    assert np.allclose(offset[:3, 3], np.round(offset[:3, 3]), atol=1e-6)
    torch.testing.assert_close(mean_of(group).max(), torch.tensor(1.0), atol=1e-5, rtol=0)


def test_how_a_scan_stores_its_voxels_does_not_matter(tmp_path: Path) -> None:
    plain = make_grid((44, 48, 42), (4.0, 4.0, 4.0), signs=(-1, -1, 1))
    stored = make_grid((42, 44, 48), (4.0, 4.0, 4.0), axes=(2, 0, 1), signs=(-1, 1, -1))
    means = []
    for name, grid in (("plain", plain), ("stored", stored)):
        group = read_group([write_head(tmp_path, f"{name}{n}", POSES[n], grid) for n in (0, 1)], CARD, init="center")
        means.append(mean_of(group))
    torch.testing.assert_close(*means, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("spacing", "voxels"), [(None, (2.0, 3.0, 4.0)), ((5.0, 2.5, 4.0), (5.0, 2.5, 4.0))])
def test_spacing_is_the_median_or_what_is_asked_for(
    tmp_path: Path, spacing: tuple[float, ...] | None, voxels: tuple[float, ...]
) -> None:
    # The first axis is stored last: spacings are compared by what they run along.
    grids = [
        make_grid((60, 50, 40), (2.0, 3.0, 4.0)),
        make_grid((40, 60, 50), (4.0, 2.0, 3.0), axes=(2, 0, 1)),
        make_grid((30, 30, 30), (5.0, 5.0, 5.0)),
    ]
    members = [write_head(tmp_path, f"head{n}", POSES[0], grid) for n, grid in enumerate(grids)]
    group = read_group(members, CARD, init="center", spacing=spacing)
    assert np.allclose(group.grid.spacing, voxels)
    extent = np.array(group.grid.shape) * group.grid.spacing
    assert np.all(extent >= np.median([np.array(g.shape)[list(o)] * s for g, o, s in _sizes(grids)], axis=0) - 30)


def _sizes(grids: Sequence[Grid]) -> list[tuple[Grid, tuple[int, ...], Matrix]]:
    orders = [(0, 1, 2), (1, 2, 0), (0, 1, 2)]
    return [(grid, order, grid.spacing[list(order)]) for grid, order in zip(grids, orders, strict=True)]


def test_mean_counts_only_scans_that_show_a_voxel(tmp_path: Path) -> None:
    image = torch.linspace(0, 1, 24).view(1, 1, 24, 1, 1).expand(1, 1, 24, 24, 24).contiguous()
    members = []
    for name, part in (("whole", slice(None)), ("other", slice(None)), ("part", slice(4, 20))):
        grid = make_grid((24, 24, 24 if name != "part" else 16), signs=(-1, -1, 1))
        write_image(tmp_path / f"{name}.nii.gz", image[..., part], grid)
        members.append(Member(name, str(tmp_path / f"{name}.nii.gz")))
    mean = mean_of(read_group(members, CARD, init="none"))
    assert mean.shape[2:] == (24, 24, 24)
    torch.testing.assert_close(mean[..., 0], mean[..., 12], atol=1e-6, rtol=0)


def test_window_is_kept(tmp_path: Path) -> None:
    members = [write_head(tmp_path, f"head{n}", POSES[0]) for n in (0, 1)]
    card = WeightsCard(file="none", sha256="", spacing=(4.0, 4.0, 4.0), minimum=(1, 1, 1), window=(100.0, 700.0))
    mean = mean_of(read_group(members, card, init="none"))
    assert float(mean.min()) == pytest.approx(100)
    assert float(mean.max()) == pytest.approx(700)


# --- the table


def write_table(folder: Path, text: str, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "scans.csv").write_text(text, encoding="utf-8")
    return folder / "scans.csv"


def test_table_names_the_scans(tmp_path: Path) -> None:
    table = write_table(
        tmp_path, "image,labels,name,age\na.nii.gz,l.nii.gz,,7\nb.nii.gz,,first,8\n", "a.nii.gz", "b.nii.gz", "l.nii.gz"
    )
    members = read_members(table)
    assert [member.name for member in members] == ["a", "first"]
    assert [Path(member.image).name for member in members] == ["a.nii.gz", "b.nii.gz"]
    assert members[0].labels == str(tmp_path / "l.nii.gz")
    assert not members[1].labels


def test_scans_of_one_file_name_are_told_apart(tmp_path: Path) -> None:
    table = write_table(tmp_path, "image\ns1/norm.mgz\ns2/norm.mgz\n", "s1/norm.mgz", "s2/norm.mgz")
    names = [member.name for member in read_members(table)]
    assert len(set(names)) == 2
    assert all(name.startswith("norm-") for name in names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scan\na.nii.gz\n", "expected image, labels, name; image is required"),
        ("image,label\na.nii.gz,\n", "has a column label; rename it to labels, or otherwise if it is none"),
        ("image\n", "has no scans below its header"),
        ("image,name\n,a\n", "line 2, column image: is empty"),
        ("image\nmissing.nii.gz\n", "line 2: missing.nii.gz: no such file"),
        ("image,name\na.nii.gz,x\nb.nii.gz,X\n", "scans 1 and 2 would both be called 'X'"),
        ("image,name\na.nii.gz,a/b\n", "scan 1: 'a/b' is not a valid folder name"),
    ],
)
def test_wrong_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    table = write_table(tmp_path, text, "a.nii.gz", "b.nii.gz")
    with pytest.raises(InputError) as error:
        read_members(table)
    assert message in str(error.value)


# --- what is refused


@pytest.fixture
def members(tmp_path: Path) -> list[Member]:
    return [write_head(tmp_path, name, POSES[0]) for name in "ab"]


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_scans_are_refused(members: list[Member], count: int) -> None:
    with pytest.raises(InputError, match=f"scans: {count} are too few for a mean; give two or more"):
        read_group(members[:count], CARD)


def test_scan_that_is_listed_twice_is_refused(members: list[Member]) -> None:
    again = Member("c", str(Path(members[0].image).parent / "." / "a.nii.gz"))
    with pytest.raises(InputError, match="is listed twice, as a and c"):
        read_group([*members, again], CARD)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "afine"}, "init 'afine' is unknown; choose auto, none"),
        ({"spacing": (1.0, 0.0, 1.0)}, r"spacing 1.0, 0.0, 1.0: give millimetres above 0"),
        ({"spacing": (1.0, 1.0, float("nan"))}, "spacing 1.0, 1.0, nan"),
    ],
)
def test_impossible_options_are_refused(members: list[Member], options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_group(members, CARD, **options)  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize("init", ["auto", *STARTS])
def test_progress_is_told_as_often_as_said(members: list[Member], init: str) -> None:
    told: list[str] = []
    read_group(members, CARD, init=init, progress=told.append)
    assert 2 * placings(init, CARD) - 1 == len(told)
    assert set(told) == {"a", "b"}


@pytest.mark.parametrize("spacing", [0.01, 300.0])
def test_grid_that_is_too_fine_or_too_coarse_is_refused(members: list[Member], spacing: float) -> None:
    with pytest.raises(InputError, match=rf"spacing {spacing:g}×{spacing:g}×{spacing:g} mm: the template would have"):
        read_group(members, CARD, init="none", spacing=[spacing] * 3)


def test_label_map_among_images_is_refused(tmp_path: Path, members: list[Member]) -> None:
    grid = make_grid((44, 48, 42), (4.0, 4.0, 4.0), signs=(-1, -1, 1))
    blocks = torch.zeros(1, 1, *grid.shape)
    blocks[..., 10:20, 10:20, 10:20] = 3
    write_image(tmp_path / "map.nii.gz", blocks, grid)
    with pytest.raises(InputError, match=r"map.nii.gz: looks like a label map, but a is an image"):
        read_group([*members, Member("map", str(tmp_path / "map.nii.gz"))], CARD)


def test_scan_that_the_others_do_not_meet_is_refused(tmp_path: Path, members: list[Member]) -> None:
    far = make_grid((44, 48, 42), (4.0, 4.0, 4.0), signs=(-1, -1, 1), centre=(0.0, 0.0, 500.0))
    away = write_head(tmp_path, "far", turned((0, 0, 0), (0, 0, 500)), far)
    with pytest.raises(InputError, match=r"far.nii.gz: does not meet the other scans \(init none\); align them"):
        read_group([*members, away], CARD, init="none")
    found = read_group([*members, away], CARD, init="center")  # which can
    assert found.grid.matches(read_group(members, CARD, init="center").grid)
    assert sharpness(found) > 0.98


def test_mean_of_poses_turned_apart_is_refused(members: list[Member]) -> None:
    mirrored = np.diag([-1.0, 1.0, 1.0, 1.0])
    views = [member.scan().grid for member in members]
    with pytest.raises(InputError, match=r"b.nii.gz: is turned or mirrored so far"):
        _around_mean(Group(members, [np.eye(4), mirrored], views[0], "rigid"), views, np.ones(3) * 4)


def labelled(members: Sequence[Member], *values: Sequence[int]) -> list[Member]:
    """The members with label maps that hold these values."""
    found = []
    for member, held in zip(members, values, strict=True):
        path = Path(member.image).with_name(f"{member.name}_labels.nii.gz")
        labels = torch.zeros(1, 1, 44, 48, 42, dtype=torch.int32)
        for place, value in enumerate(held):
            labels[..., 10 + place, 10:20, 10:20] = value
        write_image(path, labels, make_grid((44, 48, 42), (4.0, 4.0, 4.0), signs=(-1, -1, 1)))
        found.append(Member(member.name, member.image, str(path)))
    return found


def test_labels_are_those_of_any_scan(members: list[Member]) -> None:
    assert labels_in(labelled(members, (3, 1), (3, 7))) == [1, 3, 7]
    assert labels_in(members) == []


def test_scan_without_labels_among_others_is_refused(members: list[Member]) -> None:
    mixed = [*labelled(members, (1,), (1,))[:1], members[1]]
    with pytest.raises(InputError, match=r"b.nii.gz: has no label map, but a has; give all one or none"):
        labels_in(mixed)


def test_empty_label_map_is_refused(members: list[Member]) -> None:
    with pytest.raises(InputError, match=r"b_labels.nii.gz: is empty"):
        labels_in(labelled(members, (1,), ()))


def test_label_map_on_another_grid_is_refused(members: list[Member]) -> None:
    placed = labelled(members, (1,), (1,))
    write_image(placed[1].labels, torch.ones(1, 1, 8, 8, 8, dtype=torch.int32), make_grid((8, 8, 8)))
    with pytest.raises(InputError, match=r"b_labels.nii.gz: its grid .* differs from that of b.nii.gz"):
        labels_in(placed)
