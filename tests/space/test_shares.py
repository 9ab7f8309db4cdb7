"""Labels between their voxels: the largest share wins, as ITK has it, whatever the labels are."""

import numpy as np
import pytest
import SimpleITK as sitk

from geometry import GRIDS, Array, field_transform, waves
from iregzoo.space.grid import Grid
from iregzoo.space.shares import largest_share, resample_labels


def patches(shape: tuple[int, ...], labels: int, seed: int = 0) -> Array:
    """Blocks of 3×3×3 voxels, each of one label."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, labels, [size // 3 + 1 for size in shape])
    whole = np.kron(coarse, np.ones((3, 3, 3)))
    return whole[tuple(map(slice, shape))]


@pytest.mark.parametrize("labels", [2, 5, 300])
def test_the_label_of_the_largest_share_is_the_one_that_itk_takes(labels: int) -> None:
    grid, target = GRIDS["anisotropic"], GRIDS["everything"]
    image = grid.to_sitk(patches(grid.shape, labels).astype(np.int16))
    transform = field_transform(waves(target), target)
    found = resample_labels(image, target, transform)
    reference = target.to_sitk(np.zeros(target.shape))
    expected = sitk.Resample(image, reference, transform, sitk.sitkLabelLinear)
    assert found.GetPixelID() == sitk.sitkInt16
    assert Grid.of(found).matches(target)
    ours, theirs = (sitk.GetArrayFromImage(volume) for volume in (found, expected))
    assert (ours != theirs).mean() < 1e-4  # shares that rounding alone tells apart
    nearest = sitk.GetArrayFromImage(sitk.Resample(image, reference, transform, sitk.sitkNearestNeighbor))
    assert labels == 300 or (ours != nearest).mean() > 0.005  # of blocks that all differ, the nearest has most


def test_shares_by_hand_ties_and_what_lies_outside() -> None:
    labels = np.zeros((4, 3, 3), np.int32)
    labels[1], labels[2], labels[3] = 7, 3, -2
    points = [(0.5, 1, 1), (0.51, 1, 1), (1.5, 1, 1), (1.49, 1, 1), (2.5, 1, 1), (3.4, 1, 1), (3.5, 1, 1), (-0.6, 1, 1)]
    assert largest_share(labels, np.array(points)).tolist() == [0, 7, 3, 7, -2, -2, 0, 0]
    corners = np.arange(8).reshape(2, 2, 2)
    corners[1, 1] = 1  # three corners of 1 share more than any other label, though none of them is the nearest
    assert largest_share(corners, np.array([[0.45, 0.45, 0.45]])).tolist() == [1]


KINDS = ["uint8", "int8", "uint16", "uint32", "int32", "uint64", "int64", "float32", "float64"]


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_any_size_and_type_stay_exact(kind: str) -> None:
    largest = 2**24 if kind == "float32" else 2**53 - 1 if kind == "float64" else np.iinfo(kind).max
    grid = GRIDS["oblique"]
    labels = patches(grid.shape, 2).astype(kind)
    labels[labels == 1] = largest
    found = resample_labels(grid.to_sitk(labels), grid, sitk.TranslationTransform(3, (0.3, 0.2, -0.4)))
    values = sitk.GetArrayFromImage(found)
    assert values.dtype == kind
    assert {int(value) for value in np.unique(values)} == {0, int(largest)}
