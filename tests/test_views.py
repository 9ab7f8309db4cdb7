"""The volumes that the report's page shows: where they lie, and what their bytes mean."""

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from geometry import GRIDS, make_grid, world_points
from iregzoo.planes import JACOBIAN_LIMITS
from iregzoo.quality import compare
from iregzoo.register import Result, Scans, finish
from iregzoo.registration import Registration
from iregzoo.space.frame import Frame
from iregzoo.space.grid import Grid
from iregzoo.space.scan import Scan, read_scan
from iregzoo.views import ANOTHER, LARGEST_AXIS, LARGEST_FIELD, MOST_LABELS, oblique_degrees, view_grid, views

RAS = np.array([-1.0, -1.0, 1.0])  # of LPS
FINE = make_grid((300, 150, 40), (0.5, 0.7, 3.0), axes=(1, 0, 2), signs=(-1, 1, -1), centre=(5, -20, 31))


def tensor(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))[None, None]


def make_result(
    grid: Grid, image: NDArray[Any], labels: NDArray[Any] | None = None, displacement: torch.Tensor | None = None
) -> Result:
    """A scan registered to itself, by a displacement (1, 3, *shape) in its voxels."""
    scan = Scan(tensor(image).float(), grid, Path("scan.nii.gz"))
    label_map = None if labels is None else Scan(tensor(labels).int(), grid, Path("labels.nii.gz"))
    moved = torch.zeros(1, 3, *grid.shape) if displacement is None else displacement
    frame = Frame(grid, grid, grid, np.eye(4))
    return finish(Scans(scan, scan, label_map, label_map), frame, "none", Registration(moved))


def shown(result: Result) -> dict[str, Any]:
    """The views, as a browser gets them."""
    found: dict[str, Any] = json.loads(json.dumps(views(result, compare(result)), allow_nan=False))
    return found


def unpack(text: str, shape: Sequence[int], kind: type[np.generic] = np.uint8) -> NDArray[Any]:
    steps = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
    return np.cumsum(steps, dtype=np.uint8).view(kind).reshape(shape)


def places(found: dict[str, Any]) -> NDArray[np.float64]:
    """World position, LPS mm, of every voxel that is shown."""
    return world_points(Grid(tuple(found["shape"]), np.array(found["affine"])))


@pytest.mark.parametrize("grid", [*GRIDS.values(), FINE], ids=[*GRIDS, "fine"])
def test_every_voxel_shown_is_that_of_its_place(grid: Grid) -> None:
    """An image that brightens along a line through the world does so in the views, whatever its axes."""
    line = np.array([0.5, -0.3, 0.8])
    image = world_points(grid) @ line
    found = shown(make_result(grid, image))
    volume = unpack(found["volumes"]["fixed"], found["shape"]).astype(float)
    low, high = np.percentile(image, (0.5, 99.5))
    expected = 255 * ((places(found) @ line - low) / (high - low)).clip(0, 1)
    inner = (slice(2, -2),) * 3  # smoothing bends a line at the faces
    assert np.abs(volume - expected)[inner].max() < 3
    # Axes run to right, anterior and superior.
    steps = (np.array(found["affine"])[:3, :3].T * RAS).T
    assert (np.abs(steps).argmax(axis=0) == range(3)).all()
    assert (np.diag(steps) > 0).all()


@pytest.mark.parametrize("grid", [*GRIDS.values(), FINE], ids=[*GRIDS, "fine"])
def test_what_is_shown_is_the_whole_field_of_view_and_not_too_fine(grid: Grid) -> None:
    small = view_grid(grid)
    assert max(small.shape) <= LARGEST_AXIS
    np.testing.assert_allclose(small.centre, grid.centre, atol=1e-6)
    size = np.sort(np.array(grid.shape) * grid.spacing)
    np.testing.assert_allclose(np.sort(np.array(small.shape) * small.spacing), size, rtol=1e-9)
    if max(grid.shape) <= LARGEST_AXIS:
        assert sorted(small.shape) == sorted(grid.shape)


def test_fold_of_one_voxel_is_seen_where_the_views_are_coarser() -> None:
    result = make_result(FINE, world_points(FINE)[..., 0])
    images = compare(result)
    determinant = torch.full_like(images.determinant, 1.2)
    determinant[0, 123, 77, 11] = -0.01
    found = json.loads(json.dumps(views(result, replace(images, determinant=determinant))))
    assert max(found["shape"]) < 300
    codes = unpack(found["volumes"]["jacobian"], found["shape"])
    assert (codes == 0).sum() == 1
    fold = places(found)[codes == 0][0]
    apart = np.abs(fold - world_points(FINE)[123, 77, 11])
    assert (np.sort(apart) <= np.sort(np.array(found["spacing"])) / 2 + 1e-6).all()
    low, high = JACOBIAN_LIMITS
    values = low + (codes[codes > 0].astype(float) - 1) / 254 * (high - low)
    np.testing.assert_allclose(values, 1.2, atol=0.01)


def test_what_nearly_folds_is_seen_where_the_views_are_coarser() -> None:
    """Beside a voxel that is shown: the smallest of both."""
    result = make_result(FINE, world_points(FINE)[..., 0])
    images = compare(result)
    determinant = torch.full_like(images.determinant, 1.2)
    determinant[0, 122:125, 77, 11] = torch.tensor([0.09, 0.02, 0.05])
    determinant[0, 9, 20, 5] = 0.2  # not as small, and nearest to none that is shown
    found = json.loads(json.dumps(views(result, replace(images, determinant=determinant))))
    codes = unpack(found["volumes"]["jacobian"], found["shape"])
    low, high = JACOBIAN_LIMITS
    assert low + (float(codes.min()) - 1) / 254 * (high - low) == pytest.approx(0.02, abs=0.005)
    assert codes.min() > 0
    assert not ((codes > 10) & (codes < 100)).any()


@pytest.mark.parametrize("grid", [*GRIDS.values(), FINE], ids=[*GRIDS, "fine"])
def test_field_is_the_deformation_in_mm_along_the_axes_shown(grid: Grid) -> None:
    mm = torch.tensor([2.0, -3.0, 1.0], dtype=torch.float64)  # LPS
    inverse = torch.from_numpy(np.linalg.inv(grid.affine)[:3, :3])
    voxels = (inverse @ mm).float().view(1, 3, 1, 1, 1).expand(1, 3, *grid.shape)
    found = shown(make_result(grid, world_points(grid)[..., 2], displacement=voxels))
    field = found["field"]
    samples = unpack(field["data"], (3, *field["shape"]), np.int8) * field["unit_mm"]
    axes = np.array(found["affine"])[:3, :3] / found["spacing"]
    expected = np.broadcast_to((axes.T @ mm.numpy())[:, None, None, None], samples.shape)
    np.testing.assert_allclose(samples, expected, atol=field["unit_mm"])
    assert max(field["shape"]) <= LARGEST_FIELD
    reach = (np.array(field["shape"]) - 1) * field["every"]
    assert (reach < found["full_shape"]).all()
    assert (reach + field["every"] >= found["full_shape"]).all()


def test_labels_are_the_values_that_the_bytes_mean() -> None:
    grid = GRIDS["flipped"]
    labels = np.zeros(grid.shape, int)
    labels[:, 3:9], labels[:, 9:14], labels[:, 20] = -4, 17, 2035
    found = shown(make_result(grid, world_points(grid)[..., 0], labels))
    assert found["labels"] == [-4, 17, 2035]
    codes = unpack(found["volumes"]["fixed_labels"], found["shape"])
    for code, label in enumerate(found["labels"], 1):
        assert (codes == code).sum() == (labels == label).sum()
    np.testing.assert_array_equal(unpack(found["volumes"]["warped_labels"], found["shape"]), codes)


def test_more_labels_than_bytes_are_left_out() -> None:
    grid = GRIDS["plain"]
    labels = np.arange(np.prod(grid.shape)).reshape(grid.shape) % 400
    found = shown(make_result(grid, world_points(grid)[..., 0], labels))
    assert found["labels"] == list(range(1, MOST_LABELS + 1))
    codes = unpack(found["volumes"]["fixed_labels"], found["shape"])
    assert ((codes > 0) & (codes < ANOTHER)).sum() == ((labels > 0) & (labels <= MOST_LABELS)).sum()
    assert (codes == ANOTHER).sum() == (labels > MOST_LABELS).sum() > 0  # and are not called none


def test_no_labels_no_volumes_of_labels() -> None:
    found = shown(make_result(GRIDS["plain"], world_points(GRIDS["plain"])[..., 0]))
    assert set(found["volumes"]) == {"fixed", "moving", "warped", "jacobian"}
    assert found["labels"] == []
    assert unpack(found["field"]["data"], (3, *found["field"]["shape"]), np.int8).max() == 0


def test_oblique_angle_is_that_of_the_most_turned_axis() -> None:
    assert oblique_degrees(GRIDS["flipped"]) == pytest.approx(0, abs=1e-5)
    assert oblique_degrees(make_grid(degrees=(0, 0, 20))) == pytest.approx(20)
    assert oblique_degrees(make_grid(degrees=(0, 0, 80))) == pytest.approx(10)


def test_whole_head_stays_small_enough_to_send(test_data: Path) -> None:
    scan = read_scan(test_data / "scans" / "t1_brain_a.nii.gz")
    found = shown(make_result(scan.grid, scan.data[0, 0].numpy()))
    assert max(found["shape"]) == LARGEST_AXIS
    assert len(json.dumps(found)) < 6e6
