"""Resampling along the axes against scipy, which smooths and reads the image voxel by voxel."""

from itertools import permutations, product

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, map_coordinates

from geometry import GRIDS, noise_image
from iregzoo.space.grid import Matrix, network_grid, to_voxels
from iregzoo.space.separable import axis_order, resample_axes

SHAPE = (17, 12, 15)
ORIENTATIONS = list(product(permutations(range(3)), product((-1, 1), repeat=3)))


def along(axes: tuple[int, ...], signs: tuple[int, ...], step: tuple[float, ...]) -> Matrix:
    """From voxels of a grid to those of an image of ``SHAPE``, about from one end of it to the other."""
    matrix = np.eye(4)
    matrix[:3, :3] = 0
    for target, (source, sign) in enumerate(zip(axes, signs, strict=True)):
        matrix[source, target] = sign * step[target]
        matrix[source, 3] = 0.3 if sign > 0 else SHAPE[source] - 1.4
    return matrix


@pytest.mark.parametrize(("axes", "signs"), ORIENTATIONS)
def test_reads_and_smooths_as_scipy_does(axes: tuple[int, ...], signs: tuple[int, ...]) -> None:
    matrix, shape, sigma = along(axes, signs, (0.45, 1.9, 1.0)), (30, 7, 14), (0.8, 0.0, 1.7)
    image = noise_image(SHAPE).double().repeat(1, 2, 1, 1, 1) * torch.tensor([1.0, -3.0]).view(1, 2, 1, 1, 1)
    order = axis_order(matrix, shape)
    assert order == list(axes)
    found = resample_axes(image, matrix, shape, order, sigma=sigma)[0]
    places = np.einsum("ij,j...->i...", matrix[:3, :3], np.indices(shape)) + matrix[:3, 3].reshape(3, 1, 1, 1)
    for channel, expected in zip(found, image[0].numpy(), strict=True):
        smooth = gaussian_filter(expected, sigma, truncate=3.0)
        expected = map_coordinates(smooth, places, order=1, mode="nearest")
        assert np.ptp(expected) > 0.1
        np.testing.assert_allclose(channel, expected, atol=1e-12 * float(image.abs().max()))


def test_what_lies_outside_is_half_a_voxel_away() -> None:
    matrix = np.diag([0.25, 1.0, 1.0, 1.0])
    matrix[:3, 3] = (-1.0, 0, 0)
    image = torch.ones(1, 1, 3, 4, 5)
    found = resample_axes(image, matrix, (24, 4, 5), [0, 1, 2], outside=-7.0)[0, 0, :, 1, 1]
    places = -1 + 0.25 * np.arange(24)
    np.testing.assert_array_equal(found, np.where((places >= -0.5) & (places < 2.5), 1.0, -7.0))
    assert (resample_axes(image, matrix, (24, 4, 5), [0, 1, 2]) == 1).all()


def test_axes_that_run_aslant_are_seen() -> None:
    oblique = GRIDS["oblique"]
    own, plain = network_grid(oblique, (2, 2, 2), stride=1), GRIDS["plain"]
    assert axis_order(to_voxels(own, None, oblique), own.shape) is not None
    assert axis_order(to_voxels(plain, None, oblique), plain.shape) is None
    drifting = np.eye(4)
    drifting[1, 0] = 1e-6  # sideways, for every voxel along the first axis
    assert axis_order(drifting, (9, 9, 9)) == [0, 1, 2]
    assert axis_order(drifting, (11, 9, 9)) is None


def test_a_voxel_in_its_place_is_copied() -> None:
    image = noise_image(SHAPE)
    image[image < 0.5] = 0
    matrix = np.eye(4)
    matrix[:3, 3] = (2 + 1e-13, -1e-13, 1 - 1e-13)
    found = resample_axes(image, matrix, (10, 12, 14), [0, 1, 2])
    assert torch.equal(found, image[:, :, 2:12, :, 1:])


@pytest.mark.parametrize(("axes", "signs"), ORIENTATIONS)
def test_voxels_in_their_places_are_copied_in_any_order(axes: tuple[int, ...], signs: tuple[int, ...]) -> None:
    image = noise_image(SHAPE)
    image[..., 3, 2, 1] = torch.nan  # which a product would spread along every axis
    matrix = along(axes, signs, (1.0, 1.0, 1.0))
    matrix[:3, 3] = matrix[:3, 3].round()
    shape = [SHAPE[axis] for axis in axes]
    found = resample_axes(image, matrix, shape, axes)
    places = np.einsum("ij,j...->i...", matrix[:3, :3], np.indices(shape)) + matrix[:3, 3].reshape(3, 1, 1, 1)
    index = [np.clip(place, 0, size - 1).astype(int) for place, size in zip(places, SHAPE, strict=True)]
    np.testing.assert_array_equal(found[0, 0], image[0, 0].numpy()[tuple(index)])
    assert found.is_contiguous()


def test_what_is_read_is_the_caller_s_own() -> None:
    image = noise_image(SHAPE)
    found = resample_axes(image, np.eye(4), SHAPE, [0, 1, 2])
    assert torch.equal(found, image)
    assert found.data_ptr() != image.data_ptr()
