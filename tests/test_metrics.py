"""Measures against numbers worked out by hand, a brute-force surface distance and Learn2Reg's own recipe."""

import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
from numpy.typing import NDArray
from scipy.ndimage import correlate1d, gaussian_filter
from torch import Tensor

from iregzoo.metrics import (
    assd,
    dice,
    folding_percent,
    hd95,
    mean_of,
    std_log_jacobian,
    surface_scores,
    tre,
)

SPACING = (0.7, 1.3, 2.9)


def label_map(*voxels: tuple[int, int, int], label: int = 1, shape: tuple[int, int, int] = (16, 16, 16)) -> Tensor:
    labels = torch.zeros(shape, dtype=torch.int16)
    for voxel in voxels:
        labels[voxel] = label
    return labels


def cube(start: tuple[int, int, int], size: int) -> Tensor:
    labels = torch.zeros(12, 12, 12, dtype=torch.int64)
    x, y, z = start
    labels[x : x + size, y : y + size, z : z + size] = 1
    return labels


def row(length: int, axis: int = 0) -> list[tuple[int, int, int]]:
    return [tuple(k if i == axis else 4 for i in range(3)) for k in range(length)]  # type: ignore[misc]


# Dice


def test_dice_counts_voxels_by_hand() -> None:
    first = torch.tensor([1, 1, 1, 2, 0, 0, 7, 0]).view(2, 2, 2)
    second = torch.tensor([1, 1, 0, 2, 2, 0, 0, 9]).view(2, 2, 2)
    scores = dice(first, second, (1, 2, 7, 9, 5))
    assert scores[1] == pytest.approx(2 * 2 / (3 + 2))
    assert scores[2] == pytest.approx(2 * 1 / (1 + 2))
    assert scores[7] == 0.0  # only the first holds it
    assert scores[9] == 0.0  # only the second holds it
    assert math.isnan(scores[5])  # neither does
    assert list(scores) == [1, 2, 7, 9, 5]


def test_dice_of_shifted_cubes_and_both_layouts() -> None:
    first, second = cube((2, 2, 2), 5), cube((3, 2, 4), 5)
    expected = 4 * 5 * 3 / 125
    assert dice(first, second, [1]) == {1: pytest.approx(expected)}
    assert dice(first[None, None], second, [1]) == {1: pytest.approx(expected)}
    assert dice(first, first, [1]) == {1: 1.0}


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.uint16, torch.int32])
def test_every_integer_dtype_works(dtype: torch.dtype) -> None:
    first, second = cube((2, 2, 2), 4).to(dtype), cube((2, 2, 3), 4).to(dtype)
    assert dice(first, second, [1])[1] == pytest.approx(0.75)
    assert assd(first, second, [1], SPACING)[1] > 0


def test_a_label_beyond_the_dtype_is_missing_and_does_not_wrap() -> None:
    labels = label_map((5, 5, 5), label=44).to(torch.uint8)
    assert math.isnan(dice(labels, labels, [300])[300])
    assert math.isnan(hd95(labels, labels, [300], SPACING)[300])


# Surface distances


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_single_voxels_are_as_far_apart_as_their_millimetres(axis: int) -> None:
    there = [5, 6, 7]
    there[axis] += 3
    first, second = label_map((5, 6, 7)), label_map((there[0], there[1], there[2]))
    assert hd95(first, second, [1], SPACING)[1] == pytest.approx(3 * SPACING[axis])
    assert assd(first, second, [1], SPACING)[1] == pytest.approx(3 * SPACING[axis])


def test_diagonal_voxels_are_pythagorean() -> None:
    scores = hd95(label_map((0, 0, 0)), label_map((4, 3, 15)), [1], (1.0, 4.0, 0.8))
    assert scores[1] == pytest.approx(math.hypot(4, 12, 12))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_cubes_shifted_by_one_voxel(axis: int) -> None:
    """Of the 5³ cube's 98 surface voxels, 34 are one step from the shifted surface and 64 lie on it.

    The 34 are the 25 of the face left behind and the 9 inner ones of the opposite face, as long as the step
    is the shortest way: the other axes' spacing is larger.
    """
    start = [3, 3, 3]
    start[axis] += 1
    spacing = [3.0, 2.0, 2.5]
    spacing[axis] = 0.5
    first, second = cube((3, 3, 3), 5), cube((start[0], start[1], start[2]), 5)
    assert hd95(first, second, [1], spacing)[1] == pytest.approx(0.5)
    assert assd(first, second, [1], spacing)[1] == pytest.approx(0.5 * 34 / 98)


def test_hd95_is_the_larger_directed_percentile() -> None:
    """11 voxels a side, one of them alone: its percentile is half way between 0 and its distance."""
    first, second = label_map(*row(11)), label_map(*row(10), (0, 4, 12))
    # There: voxel 10 is one step of 0.7 from the row; back: the outlier is 8 steps of 2.9 from it.
    assert hd95(first, second, [1], SPACING)[1] == pytest.approx(0.5 * 8 * 2.9)
    assert hd95(second, first, [1], SPACING)[1] == pytest.approx(0.5 * 8 * 2.9)


def test_assd_is_the_mean_over_all_surface_voxels() -> None:
    """11 zeros there, 11 zeros and 23.2 mm back: over 23 voxels, not half the mean over 12."""
    first, second = label_map(*row(11)), label_map(*row(11), (0, 4, 12))
    assert assd(first, second, [1], SPACING)[1] == pytest.approx(8 * 2.9 / 23)


def test_inner_voxels_are_no_surface_and_the_grid_s_edge_is() -> None:
    whole = torch.ones(5, 5, 5, dtype=torch.int64)
    centre = label_map((2, 2, 2), shape=(5, 5, 5))
    # Only the voxels at the grid's faces are the whole grid's surface; the centre is not among them, so the
    # distance back is 2 and not 0.
    distances = [
        math.dist((x, y, z), (2, 2, 2)) for x in range(5) for y in range(5) for z in range(5) if {x, y, z} & {0, 4}
    ]
    assert assd(whole, centre, [1], (1, 1, 1))[1] == pytest.approx((sum(distances) + 2.0) / (len(distances) + 1))


def surface_by_neighbours(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Voxels of which one of the six neighbours is outside the mask, one by one."""
    padded = np.pad(mask, 1)
    steps = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
    points = [
        voxel for voxel in np.argwhere(padded) if not all(padded[tuple(voxel + np.array(step))] for step in steps)
    ]
    return np.array(points) - 1


def brute_force(a: NDArray[np.bool_], b: NDArray[np.bool_], spacing: tuple[float, ...]) -> tuple[float, float]:
    first, second = surface_by_neighbours(a) * spacing, surface_by_neighbours(b) * spacing
    every = np.sqrt(((first[:, None] - second[None]) ** 2).sum(-1))
    there, back = every.min(1), every.min(0)
    pooled = np.concatenate([there, back]).mean()
    return float(max(np.percentile(there, 95), np.percentile(back, 95))), float(pooled)


def blobs(seed: int) -> NDArray[np.int64]:
    """Three labels of smoothed noise that touch each other and the grid's faces."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(11, 14, 9)), 1.2)
    return 10 * np.asarray(np.digitize(noise, np.quantile(noise, [0.6, 0.75, 0.9])), dtype=np.int64)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_surface_distances_of_blobs_are_those_of_brute_force(seed: int) -> None:
    first, second = blobs(seed), blobs(seed + 100)
    a, b = torch.from_numpy(first), torch.from_numpy(second)
    labels = (10, 20, 30)
    hausdorff, average = surface_scores(a[None, None], b[None, None], labels, SPACING)
    assert hausdorff == hd95(a, b, labels, SPACING)
    assert average == assd(a, b, labels, SPACING)
    for label in labels:
        expected = brute_force(first == label, second == label, SPACING)
        assert (hausdorff[label], average[label]) == pytest.approx(expected, rel=1e-5)
    assert hd95(b, a, labels, SPACING) == pytest.approx(hausdorff)
    assert assd(b, a, labels, SPACING) == pytest.approx(average)


def test_the_definitions_are_monai_s() -> None:
    a, b = torch.from_numpy(blobs(5)), torch.from_numpy(blobs(6))
    hausdorff, average = surface_scores(a, b, [20], SPACING)
    masks = (a == 20)[None, None].float(), (b == 20)[None, None].float()
    options = {"include_background": True, "spacing": SPACING}
    theirs_hd = compute_hausdorff_distance(*masks, percentile=95, **options)
    theirs_average = compute_average_surface_distance(*masks, symmetric=True, **options)
    assert hausdorff[20] == pytest.approx(float(theirs_hd), rel=1e-5)
    assert average[20] == pytest.approx(float(theirs_average), rel=1e-5)


def test_identical_maps_are_no_distance_apart() -> None:
    labels = torch.from_numpy(blobs(0))
    assert surface_scores(labels, labels, [10, 20], SPACING) == ({10: 0.0, 20: 0.0}, {10: 0.0, 20: 0.0})


def test_missing_labels_have_no_surface_distance() -> None:
    first, second = label_map((5, 5, 5)), label_map((5, 5, 5), label=2)
    for scores in surface_scores(first, second, [1, 2, 3], SPACING):
        assert list(scores) == [1, 2, 3]
        assert all(math.isnan(score) for score in scores.values())


# Guards of label maps


@pytest.mark.parametrize("measure", [dice, lambda a, b, labels: surface_scores(a, b, labels, SPACING)])
def test_label_maps_are_guarded(measure) -> None:  # type: ignore[no-untyped-def]
    labels = torch.zeros(4, 5, 6, dtype=torch.int16)
    with pytest.raises(ValueError, match=r"labels is empty"):
        measure(labels, labels, [])
    with pytest.raises(ValueError, match=r"\(4, 5, 6\) and \(4, 5, 7\)"):
        measure(labels, torch.zeros(1, 1, 4, 5, 7, dtype=torch.int16), [1])
    with pytest.raises(ValueError, match=r"second has shape \(2, 1, 4, 5, 6\)"):
        measure(labels, labels.expand(2, 1, 4, 5, 6), [1])
    with pytest.raises(ValueError, match=r"first has shape \(5, 6\)"):
        measure(labels[0], labels, [1])
    with pytest.raises(ValueError, match=r"second has dtype torch.float32.*\.long\(\)"):
        measure(labels, labels.float(), [1])


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (1.0, 0.0, 1.0), (1.0, -1.0, 1.0), (1.0, math.nan, 1.0)])
@pytest.mark.parametrize("measure", [hd95, assd])
def test_spacing_is_guarded(measure, spacing: tuple[float, ...]) -> None:  # type: ignore[no-untyped-def]
    labels = label_map((5, 5, 5))
    with pytest.raises(ValueError, match=r"spacing=\(1.0, .*three positive"):
        measure(labels, labels, [1], spacing)


# Landmarks


def test_tre_is_the_euclidean_distance() -> None:
    first = torch.tensor([[0.0, 0.0, 0.0], [-10.0, 20.0, 5.5]])
    second = torch.tensor([[3.0, 4.0, 12.0], [-10.0, 20.0, 3.5]], dtype=torch.float64)
    torch.testing.assert_close(tre(first, second), torch.tensor([13.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(tre(first.long(), first.long() + 1), torch.full((2,), math.sqrt(3)))
    assert tre(torch.empty(0, 3), torch.empty(0, 3)).shape == (0,)


@pytest.mark.parametrize(
    ("first", "second"),
    [((4, 3), (5, 3)), ((4, 3), (1, 3)), ((4, 2), (4, 2)), ((3,), (3,)), ((1, 4, 3), (1, 4, 3))],
)
def test_tre_guards_the_shapes(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shapes \(.*\) and \(.*\); expected \(N, 3\)") as caught:
        tre(torch.zeros(first), torch.zeros(second))
    assert f"{first} and {second}" in str(caught.value)


# Regularity


def folded_along(axis: int) -> Tensor:
    """x + u visits these positions along one axis; central differences are 0, −1 and 0 at three of ten."""
    positions = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 3.0, 2.0, 3.0, 4.0, 5.0])
    shape = [6, 7, 8]
    shape[axis] = 10
    view = [1, 1, 1]
    view[axis] = 10
    displacement = torch.zeros(1, 3, *shape)
    displacement[0, axis] = (positions - torch.arange(10)).view(view)
    return displacement


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_folding_counts_the_voxels_at_or_below_zero(axis: int) -> None:
    torch.testing.assert_close(folding_percent(folded_along(axis)), torch.tensor([30.0]))


def test_folding_of_a_batch() -> None:
    folded = folded_along(0)
    broken = folded.clone()
    broken[0, 1, 3, 3, 3] = math.nan
    mirrored = torch.zeros_like(folded)
    mirrored[0, 0] = -2 * torch.arange(10.0).view(-1, 1, 1)
    fields = torch.cat([torch.zeros_like(folded), folded, mirrored, broken])
    expected = torch.tensor([0.0, 30.0, 100.0, math.nan])
    torch.testing.assert_close(folding_percent(fields), expected, equal_nan=True)


def learn2reg(displacement: NDArray[np.float64]) -> float:
    """Learn2Reg's steps for a field (3, X, Y, Z): central differences, crop, + 3, clip, log, deviation."""
    columns = [
        correlate1d(displacement, [-0.5, 0.0, 0.5], axis=axis + 1, mode="constant", cval=0.0) for axis in range(3)
    ]
    matrix = np.stack(columns, axis=1) + np.eye(3).reshape(3, 3, 1, 1, 1)
    determinant = np.linalg.det(np.moveaxis(matrix[..., 2:-2, 2:-2, 2:-2], (0, 1), (-2, -1)))
    return float(np.log((determinant + 3).clip(1e-9, 1e9)).std())


def test_std_log_jacobian_is_learn2reg_s() -> None:
    """Of a smooth field, and of one that folds beyond det J = −3, where the clip decides."""
    noise = np.random.default_rng(0).normal(size=(2, 3, 9, 10, 11))
    fields = np.stack([gaussian_filter(noise[0], (0, 1.5, 1.5, 1.5)) * 4, noise[1] * 4])
    expected = torch.tensor([learn2reg(field) for field in fields], dtype=torch.float64)
    assert expected[0] < 0.5
    assert expected[1] > 1  # some logarithms are those of the clip, −20.7
    torch.testing.assert_close(std_log_jacobian(torch.from_numpy(fields)), expected)
    single = std_log_jacobian(torch.from_numpy(fields[1:]).float())
    torch.testing.assert_close(single, expected[1:].float(), rtol=1e-4, atol=0)


def test_std_log_jacobian_of_uniform_scaling_is_zero_whatever_the_faces_do() -> None:
    grid = torch.stack(torch.meshgrid(*[torch.arange(8.0)] * 3, indexing="ij"))[None]
    scaled = 0.25 * grid
    scaled[..., 0] += 5
    scaled[:, :, -1] -= 7
    fields = torch.cat([torch.zeros_like(grid), scaled])
    torch.testing.assert_close(std_log_jacobian(fields), torch.zeros(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("measure", [folding_percent, std_log_jacobian])
def test_fields_are_guarded(measure) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"\(1, 2, 8, 8, 8\)"):
        measure(torch.zeros(1, 2, 8, 8, 8))


def test_small_fields_are_guarded() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 4, 8\).*at least 5"):
        std_log_jacobian(torch.zeros(1, 3, 8, 4, 8))
    assert std_log_jacobian(torch.zeros(1, 3, 5, 5, 5)) == 0
    with pytest.raises(ValueError, match=r"\(8, 1, 8\)"):
        folding_percent(torch.zeros(1, 3, 8, 1, 8))


# Mean


def test_mean_of_ignores_what_could_not_be_measured() -> None:
    assert mean_of({1: 0.5, 2: math.nan, 3: 0.0}) == 0.25
    assert math.isnan(mean_of({1: math.nan}))
    assert math.isnan(mean_of({}))
