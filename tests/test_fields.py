"""Displacement algebra against scipy, numpy, SimpleITK, MONAI and fields whose answer is known on paper."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from monai.networks.blocks import DVF2DDF, Warp
from scipy.linalg import expm
from scipy.ndimage import map_coordinates
from torch import Tensor

from iregzoo import fields
from iregzoo.fields import (
    check_displacement,
    compose,
    identity,
    integrate,
    inverse_error,
    invert,
    length,
    resize,
    sample,
    warp,
)
from iregzoo.jacobian import jacobian, jacobian_determinant

# No two sizes alike, so that a swapped axis shows.
SHAPES = {2: (17, 23), 3: (13, 17, 22)}
AXES = pytest.mark.parametrize("axes", [2, 3])
PADDING = pytest.mark.parametrize("padding", ["zeros", "border"])
EACH_AXIS = pytest.mark.parametrize(("axes", "axis"), [(n, i) for n in (2, 3) for i in range(n)])

# Asymmetric and not commuting, small enough to stay within the margins below.
OUTER = {n: 0.1 * np.array([[1.0, -0.7, 0.3], [0.4, -0.8, 0.5], [-0.2, 0.6, 0.7]])[:n, :n] for n in (2, 3)}
INNER = {n: 0.1 * np.array([[-0.5, 0.2, 0.8], [-0.9, 0.6, -0.1], [0.3, 0.5, -0.4]])[:n, :n] for n in (2, 3)}


def random_image(axes: int, batch: int = 2, channels: int = 2) -> Tensor:
    return torch.rand(batch, channels, *SHAPES[axes], generator=torch.manual_seed(1), dtype=torch.float64)


def rough_field(axes: int, reach: float = 4.0, batch: int = 2) -> Tensor:
    """Independent at every voxel, and reaching beyond every face."""
    noise = torch.rand(batch, axes, *SHAPES[axes], generator=torch.manual_seed(2), dtype=torch.float64)
    return (2 * noise - 1) * reach


def smooth_field(axes: int, reach: float = 1.5, batch: int = 2) -> Tensor:
    """One sine wave per component, each of another direction; gentle enough to have an inverse."""
    random = np.random.default_rng(3)
    waves = random.uniform(-2.5, 2.5, (batch, axes, axes)) / np.array(SHAPES[axes])
    phases = np.einsum("bij,j...->bi...", waves, np.indices(SHAPES[axes]))
    starts = random.uniform(0, 2 * np.pi, (batch, axes, *[1] * axes))
    return torch.from_numpy(reach * np.sin(phases + starts))


def affine_field(matrix: np.ndarray, axes: int) -> Tensor:
    """u(x) = matrix (x − centre): (1, N, *shape)."""
    shape = SHAPES[axes]
    centred = np.indices(shape) - (np.array(shape).reshape(-1, *[1] * axes) - 1) / 2
    return torch.from_numpy(np.einsum("ij,j...->i...", matrix, centred))[None]


def interior(tensor: Tensor, margin: int) -> Tensor:
    return tensor[(..., *[slice(margin, -margin)] * (tensor.dim() - 2))]


def scipy_sample(image: Tensor, coordinates: Tensor, padding: str, order: int = 1) -> Tensor:
    """One map_coordinates per image of a batch and channel, in float64."""
    mode = {"zeros": "grid-constant", "border": "nearest"}[padding]
    items = [
        [map_coordinates(channel, place, order=order, mode=mode) for channel in item]
        for item, place in zip(image.double().numpy(), coordinates.double().numpy(), strict=True)
    ]
    return torch.from_numpy(np.array(items))


def scipy_warp(image: Tensor, displacement: Tensor, padding: str, order: int = 1) -> Tensor:
    return scipy_sample(image, torch.from_numpy(np.indices(image.shape[2:])) + displacement, padding, order)


def close(actual: Tensor, expected: Tensor | np.ndarray, tolerance: float) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype).broadcast_to(actual.shape)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# --- sampling and warping


@AXES
def test_identity_holds_each_axis_position_in_its_channel(axes: int) -> None:
    close(identity(SHAPES[axes], dtype=torch.float64), np.indices(SHAPES[axes])[None], 0)


@AXES
@PADDING
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_warp_equals_scipy(axes: int, padding: str, dtype: torch.dtype, tolerance: float) -> None:
    image, u = random_image(axes).to(dtype), rough_field(axes).to(dtype)
    warped = warp(image, u, padding=padding)
    assert warped.dtype == dtype
    close(warped.double(), scipy_warp(image, u, padding), tolerance)


@AXES
@PADDING
@pytest.mark.parametrize(("mode", "order"), [("linear", 1), ("nearest", 0)])
def test_sample_of_another_grid_equals_scipy(axes: int, padding: str, mode: str, order: int) -> None:
    image = random_image(axes)
    sizes = torch.tensor(SHAPES[axes], dtype=torch.float64).view(1, axes, *[1] * axes)
    points = torch.rand(2, axes, *[5, 3, 8][:axes], generator=torch.manual_seed(4), dtype=torch.float64)
    points = points * (sizes + 4) - 2.5
    close(sample(image, points, mode=mode, padding=padding), scipy_sample(image, points, padding, order), 1e-12)


@AXES
def test_nothing_is_outside_an_image_unless_told(axes: int) -> None:
    image, u = random_image(axes), rough_field(axes)
    assert torch.equal(warp(image, u), warp(image, u, padding="zeros"))
    places = identity(SHAPES[axes], dtype=u.dtype) + u
    assert torch.equal(sample(image, places), sample(image, places, padding="zeros"))


@EACH_AXIS
@PADDING
def test_warp_by_one_voxel_pulls_the_next_voxel_along_that_axis(axes: int, axis: int, padding: str) -> None:
    image = random_image(axes)
    u = torch.zeros(2, axes, *SHAPES[axes], dtype=torch.float64)
    u[:, axis] = 1
    last = image.narrow(2 + axis, -1, 1)
    outside = last if padding == "border" else torch.zeros_like(last)
    expected = torch.cat((image.narrow(2 + axis, 1, image.shape[2 + axis] - 1), outside), dim=2 + axis)
    close(warp(image, u, padding=padding), expected, 1e-12)


@EACH_AXIS
@PADDING
@pytest.mark.parametrize(("mode", "order"), [("linear", 1), ("nearest", 0)])
def test_an_axis_of_one_voxel_has_an_outside_too(axes: int, axis: int, padding: str, mode: str, order: int) -> None:
    image, u = (each.narrow(2 + axis, 0, 1).contiguous() for each in (random_image(axes), rough_field(axes)))
    u.narrow(1, axis, 1).div_(3)  # so that many places are within a voxel of it
    close(warp(image, u, mode=mode, padding=padding), scipy_warp(image, u, padding, order), 1e-12)


@pytest.mark.parametrize("size", [6, 40], ids=["at once", "in slabs"])
@AXES
@PADDING
@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize("tracked", ["nothing", "image", "field"])
def test_a_place_that_is_no_number_reads_none(
    size: int, axes: int, padding: str, mode: str, channels: int, tracked: str
) -> None:
    random = torch.manual_seed(11)
    image = 1 + torch.rand(2, channels, *[size] * axes, generator=random)
    u = torch.randn(2, axes, *[size] * axes, generator=random)
    for read, field in ((warp, u), (sample, identity([size] * axes) + u)):
        expected = read(image, field, mode=mode, padding=padding)
        for axis in range(axes):
            place = (*[size // 2] * (axes - 1), axis)
            field[(1, axis, *place)] = torch.nan
            expected[(1, slice(None), *place)] = torch.nan
        given = [each.clone().requires_grad_(name == tracked) for name, each in (("image", image), ("field", field))]
        found = read(*given, mode=mode, padding=padding)
        torch.testing.assert_close(found.detach(), expected, equal_nan=True, rtol=0, atol=1e-4)


@PADDING
@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_a_place_that_is_no_number_reads_no_label(padding: str, mode: str) -> None:
    labels, u = torch.full((1, 1, 4, 5, 6), 7), torch.zeros(1, 3, 4, 5, 6)
    u[0, 1, 2, 3, 4] = torch.nan
    warped = warp(labels, u, mode=mode, padding=padding)
    assert warped[0, 0, 2, 3, 4] == 0
    assert int((warped != 7).sum()) == 1


@AXES
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_label_maps_keep_type_and_labels(axes: int, dtype: torch.dtype) -> None:
    labels = torch.randint(0, 9, (2, 1, *SHAPES[axes]), generator=torch.manual_seed(5)).to(dtype)
    u = rough_field(axes)
    warped = warp(labels, u, mode="nearest")
    assert warped.dtype == dtype
    close(warped.double(), scipy_warp(labels, u, "zeros", order=0), 0)


@AXES
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_large_labels_stay_what_they_are(axes: int, dtype: torch.dtype) -> None:
    """Beyond what float32 counts, as an atlas has them."""
    values = torch.tensor([0, 2**24 + 1, 614454277, 2**31 - 1], dtype=dtype)
    labels = values[torch.randint(0, 4, (1, 1, *SHAPES[axes]), generator=torch.manual_seed(5))]
    u = rough_field(axes)[:1].float()
    warped = warp(labels, u, mode="nearest")
    assert warped.dtype == dtype
    assert torch.equal(warped.double(), torch.as_tensor(scipy_warp(labels, u.double(), "zeros", order=0)).double())


@AXES
def test_linear_warp_of_integers_rounds(axes: int) -> None:
    image = torch.randint(-1000, 3000, (2, 1, *SHAPES[axes]), generator=torch.manual_seed(6)).short()
    u = rough_field(axes)
    close(warp(image, torch.zeros_like(u).float()).double(), image.numpy(), 0)
    close(warp(image, u).double(), scipy_warp(image, u, "zeros").round(), 0)


@AXES
@PADDING
def test_warp_equals_monai(axes: int, padding: str) -> None:
    image, u = random_image(axes).float(), rough_field(axes).float()
    close(warp(image, u, padding=padding), Warp("bilinear", padding)(image, u), 1e-4)


def itk_field(displacement: Tensor) -> sitk.Image:
    """(N, *shape) to ITK's order: components and indices are (x, y, z), the reverse of the array's axes."""
    return sitk.GetImageFromArray(displacement.flip(0).movedim(0, -1).contiguous().numpy(), isVector=True)


@AXES
def test_warp_equals_simpleitk_where_it_stays_inside(axes: int) -> None:
    image, u = random_image(axes, batch=1, channels=1), smooth_field(axes, batch=1)
    transform = sitk.DisplacementFieldTransform(sitk.Cast(itk_field(u[0]), sitk.sitkVectorFloat64))
    moved = sitk.Resample(sitk.GetImageFromArray(image[0, 0].numpy()), transform, sitk.sitkLinear, 0.0)
    expected = torch.from_numpy(sitk.GetArrayFromImage(moved))[None, None]
    close(interior(warp(image, u), 3), interior(expected, 3), 1e-4)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@PADDING
@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize(("batch", "channels"), [(1, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("slab", [2**17, 5 * 40 * 41, 1])
def test_slabs_that_threads_share_change_nothing(
    threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    padding: str,
    mode: str,
    batch: int,
    channels: int,
    slab: int,
) -> None:
    random = torch.manual_seed(8)
    image = torch.rand(batch, channels, 23, 40, 41, generator=random)
    u = (torch.rand(batch, 3, 23, 40, 41, generator=random) - 0.5) * 9
    with monkeypatch.context() as whole:
        whole.setattr(fields, "_SHARED", u.numel())
        alone, elsewhere = (
            warp(image, u, mode=mode, padding=padding),
            sample(image, 9 + 4 * u, mode=mode, padding=padding),
        )
    monkeypatch.setattr(fields, "_SLAB", slab)
    for count in (1, 2, 3, 5, 30):
        threads(count)
        shared = warp(image, u, mode=mode, padding=padding)
        assert torch.equal(shared, alone)
        assert shared.is_contiguous()
        assert torch.equal(sample(image, 9 + 4 * u, mode=mode, padding=padding), elsewhere)


@pytest.mark.parametrize(("size", "channels"), [(8, 2), (40, 2), (40, 8)], ids=["at once", "in slabs", "in rows"])
def test_warp_into_memory_at_hand(threads: Callable[[int], None], size: int, channels: int) -> None:
    threads(1)
    random = torch.manual_seed(10)
    image = torch.rand(1, channels, size, size, size, generator=random)
    u = torch.rand(1, 3, size, size, size, generator=random)
    beside = torch.zeros(1, channels + 2, size, size, size)
    assert warp(image, u, out=beside[:, 1:-1]).data_ptr() == beside[:, 1:-1].data_ptr()
    assert torch.equal(beside[:, 1:-1], warp(image, u))
    assert not beside[:, [0, -1]].any()
    with pytest.raises(ValueError, match=rf"out has shape .*; expected \(1, {channels}, {size}, {size}, {size}\)"):
        warp(image, u, out=beside)


@pytest.mark.parametrize("size", [20, 40])
def test_scans_of_monai_stay_what_they_are(size: int) -> None:
    image, u = MetaTensor(torch.rand(1, 1, size, size, size)), torch.rand(1, 3, size, size, size)
    for given in ((image, u), (image.as_tensor(), MetaTensor(u))):
        warped = warp(*given)
        assert isinstance(warped, MetaTensor)
        close(warped.as_tensor(), warp(image.as_tensor(), u), 1e-6)


def test_threads_that_share_a_volume_change_no_gradient(threads: Callable[[int], None]) -> None:
    random = torch.manual_seed(9)
    image = torch.rand(1, 2, 23, 40, 41, generator=random, dtype=torch.float64)
    start = torch.rand(1, 3, 23, 40, 41, generator=random, dtype=torch.float64)
    gradients = []
    for count in (1, 4):
        threads(count)
        u = start.clone().requires_grad_()
        warp(image, u).square().sum().backward()
        gradients.append(u.grad)
    close(gradients[1], gradients[0], 1e-12)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(
    ("batch", "channels", "count", "groups"), [(1, 12, 4, 3), (2, 12, 4, 2), (1, 7, 4, 1), (5, 12, 4, 1)]
)
def test_threads_that_share_channels_change_no_gradient(
    threads: Callable[[int], None], memory: torch.memory_format, batch: int, channels: int, count: int, groups: int
) -> None:
    random = torch.manual_seed(9)
    image = torch.rand(batch, channels, 23, 40, 41, generator=random, dtype=torch.float64).to(memory_format=memory)
    u = (torch.rand(batch, 3, 23, 40, 41, generator=random, dtype=torch.float64) - 0.5) * 9
    weights = torch.rand(image.shape, generator=random, dtype=torch.float64)
    made = []
    for number in (1, count):
        threads(number)
        volume, field = image.clone().requires_grad_(), u.clone().requires_grad_()
        assert fields._channel_groups(volume, field) == (groups if number > 1 else 1)
        warped = warp(volume, field)
        made.append((warped, *torch.autograd.grad((weights * warped).sum(), (volume, field))))
    assert torch.equal(made[1][0], made[0][0])
    assert torch.equal(made[1][1], made[0][1])
    close(made[1][2], made[0][2], 1e-12)


# --- compose, integrate, invert


@AXES
@PADDING
def test_compose_equals_scipy(axes: int, padding: str) -> None:
    outer, inner = rough_field(axes), rough_field(axes).flip(0, 1)
    close(compose(outer, inner, padding=padding), inner + scipy_warp(outer, inner, padding), 1e-12)


@AXES
def test_compose_of_affine_fields_multiplies_their_matrices(axes: int) -> None:
    a, b, unit = OUTER[axes], INNER[axes], np.eye(axes)
    composed = compose(affine_field(a, axes), affine_field(b, axes))
    expected = affine_field((unit + a) @ (unit + b) - unit, axes)
    close(interior(composed, 3), interior(expected, 3), 1e-12)


@AXES
def test_warping_by_a_composition_warps_by_outer_then_inner(axes: int) -> None:
    outer, inner = affine_field(OUTER[axes], axes), affine_field(INNER[axes], axes)
    ramp = identity(SHAPES[axes], dtype=torch.float64)
    twice = warp(warp(ramp, outer), inner)
    close(interior(warp(ramp, compose(outer, inner)), 5), interior(twice, 5), 1e-12)


@EACH_AXIS
def test_compose_continues_with_the_border_unless_told_zeros(axes: int, axis: int) -> None:
    shift = torch.zeros(1, axes, *SHAPES[axes], dtype=torch.float64)
    shift[:, axis] = 2
    twice = compose(shift, shift)
    close(twice, 2 * shift, 1e-12)
    kept = compose(shift, shift, padding="zeros").narrow(2 + axis, -2, 2)[:, axis]
    close(kept, torch.full_like(kept, 2.0), 1e-12)


@AXES
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_integrate_of_a_constant_is_the_constant(axes: int, steps: int) -> None:
    shift = torch.tensor([1.5, -2.25, 3.0][:axes], dtype=torch.float64).view(1, axes, *[1] * axes)
    shift = shift.expand(1, axes, *SHAPES[axes])
    close(integrate(shift, steps), shift, 1e-12)


def scaling_and_squaring(velocity: Tensor, steps: int) -> Tensor:
    """The plain scheme: as many squarings of the velocity over 2**steps."""
    displacement = velocity / 2**steps
    for _ in range(steps):
        displacement = compose(displacement, displacement)
    return displacement


@AXES
@pytest.mark.parametrize(("steps", "squarings"), [(1, 0), (2, 1), (4, 2), (7, 3)])
def test_integrate_squares_a_midpoint_step(axes: int, steps: int, squarings: int) -> None:
    rate, unit = OUTER[axes] / 2**squarings, np.eye(axes)
    power = np.linalg.matrix_power(unit + rate @ (unit + rate / 2), 2**squarings)
    integrated = integrate(affine_field(OUTER[axes], axes), steps)
    close(interior(integrated, 4), interior(affine_field(power - unit, axes), 4), 1e-12)


@AXES
def test_integrate_in_no_steps_is_a_copy_of_the_velocity(axes: int) -> None:
    velocity = rough_field(axes)
    still = integrate(velocity, 0)
    assert torch.equal(still, velocity)
    still.zero_()
    assert velocity.abs().max() > 1


@AXES
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7, 8])
def test_integrate_of_a_linear_velocity_is_the_matrix_exponential(axes: int, steps: int) -> None:
    """Nearer than by as many squarings, which the argument counts; at 7 steps, five times as near."""
    for matrix in (OUTER[axes], -OUTER[axes], INNER[axes], OUTER[axes] - OUTER[axes].T):
        velocity, exact = affine_field(matrix, axes), affine_field(expm(matrix) - np.eye(axes), axes)
        error, plain = (
            float(interior(found - exact, 4).abs().max())
            for found in (integrate(velocity, steps), scaling_and_squaring(velocity, steps))
        )
        assert error < plain
        if steps == 7:
            assert error < 0.2 * plain
            assert error < 1e-4 * exact.abs().max()


# Velocities of up to 6 voxels that change by up to 1 voxel from voxel to voxel.
GENTLE = [(seed, reach, bend) for seed in range(3) for reach, bend in ((1.5, 5.0), (3.0, 5.0), (3.0, 2.4), (6.0, 2.4))]


def random_velocity(axes: int, seed: int, reach: float, bend: float) -> Tensor:
    shape = (32, 36, 28)[:axes]
    random = np.random.default_rng(seed)
    waves = random.uniform(-bend, bend, (axes, axes)) / np.array(shape)
    starts = random.uniform(0, 2 * np.pi, (axes, *[1] * axes))
    return torch.from_numpy(reach * np.sin(np.einsum("ij,j...->i...", waves, np.indices(shape)) + starts))[None]


@AXES
@pytest.mark.parametrize(("seed", "reach", "bend"), GENTLE)
def test_integrate_is_nearer_to_the_exponential_than_seven_squarings(
    axes: int, seed: int, reach: float, bend: float
) -> None:
    velocity = random_velocity(axes, seed, reach, bend)
    limit = scaling_and_squaring(velocity, 14)
    for measure in (torch.Tensor.abs, torch.Tensor.square):
        error, plain = (
            measure(interior(found - limit, 7)) for found in (integrate(velocity), scaling_and_squaring(velocity, 7))
        )
        assert error.max() < 0.5 * plain.max()
        assert error.mean() < 0.5 * plain.mean()


@AXES
@pytest.mark.parametrize(("seed", "reach", "bend"), GENTLE)
def test_integrals_of_opposite_velocities_are_nearer_to_inverse_than_of_seven_squarings(
    axes: int, seed: int, reach: float, bend: float
) -> None:
    velocity = random_velocity(axes, seed, reach, bend)
    error, plain = (
        interior(inverse_error(there, back)[:, None], 7)
        for there, back in (
            (integrate(velocity), integrate(-velocity)),
            (scaling_and_squaring(velocity, 7), scaling_and_squaring(-velocity, 7)),
        )
    )
    assert error.mean() < plain.mean()
    assert error.max() < plain.max()


@AXES
def test_integrals_of_opposite_velocities_are_inverse(axes: int) -> None:
    velocity = smooth_field(axes)
    forward, backward = integrate(velocity), integrate(-velocity)
    assert interior(forward, 3).abs().max() > 0.7
    assert interior(inverse_error(forward, backward)[:, None], 3).max() < 0.05


@AXES
def test_integrate_equals_monai_with_more_steps(axes: int) -> None:
    """MONAI squares as many times as it is told, so its 7 steps are further from the exponential than ours."""
    velocity = smooth_field(axes)
    integrated = integrate(velocity)
    seven, fourteen = (interior(DVF2DDF(num_steps=steps)(velocity) - integrated, 4).abs().max() for steps in (7, 14))
    assert fourteen < 5e-4
    assert fourteen < seven / 2


@AXES
def test_invert_of_an_affine_field_inverts_its_matrix(axes: int) -> None:
    matrix, unit = OUTER[axes], np.eye(axes)
    inverse = invert(affine_field(matrix, axes), tolerance=1e-12, iterations=100)
    close(interior(inverse, 4), interior(affine_field(np.linalg.inv(unit + matrix) - unit, axes), 4), 1e-9)


@AXES
def test_inverse_undoes_a_smooth_field_on_both_sides(axes: int) -> None:
    u = smooth_field(axes)
    inverse = invert(u)
    assert inverse_error(u, inverse).max() < 2e-3
    assert interior(inverse_error(inverse, u)[:, None], 3).max() < 0.1


@AXES
def test_invert_stops_after_the_iterations_it_is_given(axes: int) -> None:
    u = smooth_field(axes)
    half = -u / 2
    close(invert(u, iterations=1), half, 1e-12)
    close(invert(u, iterations=2), half - (half + scipy_warp(u, half, "border")) / 2, 1e-12)


@AXES
def test_invert_stops_at_the_tolerance(axes: int) -> None:
    u = smooth_field(axes)
    largest = float(u.abs().max())
    close(invert(u, tolerance=1.01 * largest), torch.zeros_like(u), 1e-12)  # within it from the beginning
    left = invert(u, tolerance=0.1) + scipy_warp(u, invert(u, tolerance=0.1), "border")
    assert 0.01 < float(left.abs().max()) <= 0.1


@AXES
def test_inverse_error_is_the_length_that_is_left(axes: int) -> None:
    u = torch.zeros(1, axes, *SHAPES[axes], dtype=torch.float64)
    u[:, 0], u[:, -1] = 3, -4
    error = inverse_error(u, torch.zeros_like(u))
    assert error.shape == (1, *SHAPES[axes])
    close(error, torch.tensor(5.0), 1e-12)
    close(inverse_error(u, -u), torch.tensor(0.0), 1e-12)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_length_is_linalgs_also_in_its_gradient(dim: int) -> None:
    vectors = rough_field(3)
    vectors[0, :, 2], vectors[:, 0, 0], vectors[1, 1, 1, 1, 1] = 0, 0, torch.nan
    here, there = vectors.clone().requires_grad_(), vectors.clone().requires_grad_()
    found, expected = length(here, dim), torch.linalg.vector_norm(there, dim=dim)
    for wanted in (found, length(vectors, dim)):
        torch.testing.assert_close(wanted, expected, rtol=1e-12, atol=0, equal_nan=True)
    for result in (found, expected):
        result.nan_to_num().sum().backward()
    assert here.grad is not None
    torch.testing.assert_close(here.grad, there.grad, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_length_of_half_precision_is_exact() -> None:
    vectors = torch.full((1, 3, 2), 300.0)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(length(vectors.to(dtype)), length(vectors.to(dtype).float()))


# --- resize


@AXES
def test_resize_interpolates_between_corners_and_scales_each_component(axes: int) -> None:
    u, new = rough_field(axes), [11, 40, 9][:axes]
    corners = np.meshgrid(
        *[np.linspace(0, old - 1, size) for old, size in zip(SHAPES[axes], new, strict=True)], indexing="ij"
    )
    places = torch.from_numpy(np.array(corners))[None].expand(2, -1, *new)
    ratios = (torch.tensor(new).double() / torch.tensor(SHAPES[axes])).view(1, axes, *[1] * axes)
    close(resize(u, new), scipy_sample(u, places, "border") * ratios, 1e-12)


@AXES
def test_resize_by_one_pyramid_level_doubles_a_shift(axes: int) -> None:
    shift = torch.full((1, axes, *SHAPES[axes]), 1.25, dtype=torch.float64)
    doubled = resize(shift, [2 * size for size in SHAPES[axes]])
    close(doubled, torch.tensor(2.5), 1e-12)
    close(resize(doubled, SHAPES[axes]), shift, 1e-12)


@AXES
def test_resize_to_its_own_shape_changes_nothing(axes: int) -> None:
    u = rough_field(axes)
    assert torch.equal(resize(u, SHAPES[axes]), u)


# --- Jacobian


@AXES
def test_jacobian_of_an_affine_field_is_its_matrix_up_to_the_faces(axes: int) -> None:
    matrix = OUTER[axes] + np.eye(axes)
    expected = matrix.reshape(1, axes, axes, *[1] * axes)
    close(jacobian(affine_field(OUTER[axes], axes)), expected, 1e-12)
    determinant = jacobian_determinant(affine_field(OUTER[axes], axes))
    assert determinant.shape == (1, *SHAPES[axes])
    close(determinant, np.linalg.det(matrix), 1e-12)


@AXES
def test_jacobian_equals_numpy_gradient(axes: int) -> None:
    u = rough_field(axes)
    columns = np.stack(np.gradient(u.numpy(), axis=tuple(range(2, 2 + axes))), axis=2)
    matrix = columns + np.eye(axes).reshape(axes, axes, *[1] * axes)
    close(jacobian(u), matrix, 1e-12)
    close(jacobian_determinant(u), np.linalg.det(np.moveaxis(matrix, (1, 2), (-2, -1))), 1e-11)


@AXES
@pytest.mark.parametrize("slab", [1, 40, 2**17])
def test_the_determinant_is_the_same_slab_by_slab(monkeypatch: pytest.MonkeyPatch, axes: int, slab: int) -> None:
    """As of the whole volume, which is taken where a gradient is wanted, and of the matrices; also at the faces."""
    monkeypatch.setattr("iregzoo.jacobian._SLAB", slab)
    u = rough_field(axes)
    found = jacobian_determinant(u)
    close(found, jacobian_determinant(u.clone().requires_grad_()).detach(), 1e-12)
    close(found, torch.linalg.det(jacobian(u).movedim((1, 2), (-2, -1))), 1e-11)
    for axis in range(2, 2 + axes):
        thin = u.narrow(axis, 1, 2)
        close(jacobian_determinant(thin), jacobian_determinant(thin.clone().requires_grad_()).detach(), 1e-12)


@AXES
def test_the_determinant_has_its_derivative_along_a_direction_too(axes: int) -> None:
    u, direction = rough_field(axes), rough_field(axes).flip(-1)
    _, found = torch.func.jvp(jacobian_determinant, (u,), (direction,))
    _, expected = torch.autograd.functional.jvp(jacobian_determinant, u, direction)
    close(found, expected, 1e-11)


def test_the_determinant_of_a_meta_tensor_is_that_of_its_values() -> None:
    u = rough_field(3)
    assert torch.equal(torch.as_tensor(jacobian_determinant(MetaTensor(u))), jacobian_determinant(u))


@AXES
def test_rotation_keeps_volume(axes: int) -> None:
    cosine, sine = np.cos(0.6), np.sin(0.6)
    rotation = np.eye(axes)
    rotation[:2, :2] = [[cosine, -sine], [sine, cosine]]
    close(jacobian_determinant(affine_field(rotation - np.eye(axes), axes)), torch.tensor(1.0), 1e-12)


@EACH_AXIS
def test_reflection_folds(axes: int, axis: int) -> None:
    mirror = np.zeros((axes, axes))
    mirror[axis, axis] = -2
    close(jacobian_determinant(affine_field(mirror, axes)), torch.tensor(-1.0), 1e-12)


@AXES
def test_jacobian_determinant_equals_simpleitk_inside(axes: int) -> None:
    u = smooth_field(axes, reach=4.0, batch=1)
    itk = sitk.DisplacementFieldJacobianDeterminantFilter().Execute(sitk.Cast(itk_field(u[0]), sitk.sitkVectorFloat64))
    expected = torch.from_numpy(sitk.GetArrayFromImage(itk)).double()[None, None]
    close(interior(jacobian_determinant(u)[:, None], 1), interior(expected, 1), 1e-4)


# --- what holds of every operation

OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "warp": lambda u: warp(u.flip(1), u),
    "sample": lambda u: sample(u.flip(1), u + identity(u.shape[2:], dtype=u.dtype)),
    "compose": lambda u: compose(u.flip(1), u),
    "integrate": integrate,
    "invert": invert,
    "inverse_error": lambda u: inverse_error(u, u.flip(1)),
    "resize": lambda u: resize(u, [2 * size for size in u.shape[2:]]),
    "jacobian": jacobian,
    "jacobian_determinant": jacobian_determinant,
}
EACH_OPERATION = pytest.mark.parametrize("name", OPERATIONS)


@AXES
@EACH_OPERATION
def test_batch_equals_its_singles(name: str, axes: int) -> None:
    operation = OPERATIONS[name]
    batch = torch.cat((0.1 * smooth_field(axes, batch=1), smooth_field(axes)))
    singles = torch.cat([operation(single) for single in batch.split(1)])
    assert torch.equal(operation(batch), singles)


@AXES
@EACH_OPERATION
def test_autocast_changes_nothing(name: str, axes: int) -> None:
    u = smooth_field(axes).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = OPERATIONS[name](u)
    assert result.dtype == torch.float32
    assert torch.equal(result, OPERATIONS[name](u))


@AXES
@pytest.mark.parametrize("name", ["integrate", "invert", "resize", "jacobian", "jacobian_determinant"])
def test_bfloat16_field_is_computed_in_float32(name: str, axes: int) -> None:
    u = smooth_field(axes).bfloat16()
    assert torch.equal(OPERATIONS[name](u), OPERATIONS[name](u.float()))


def test_bfloat16_displacement_keeps_the_place_of_far_voxels() -> None:
    # bfloat16 holds 0.25 but not 199.25
    ramp = identity((2, 2, 220))[:, 2:]
    u = torch.zeros(1, 3, 2, 2, 220, dtype=torch.bfloat16)
    u[:, 2] = 0.25
    close(warp(ramp, u)[..., :-1], (ramp + 0.25)[..., :-1], 1e-3)


def away_from_voxel_centres(axes: int) -> Tensor:
    """Small, so that no step of a finite difference crosses a kink of linear interpolation."""
    noise = torch.rand(2, axes, *[3, 4, 5][:axes], generator=torch.manual_seed(7), dtype=torch.float64)
    return (0.1 + 0.2 * noise).requires_grad_()


@AXES
@pytest.mark.parametrize(
    "operation",
    [
        lambda u: warp(u.flip(1), u, padding="zeros"),
        lambda u: warp(u.flip(1), u, padding="border"),
        lambda u: sample(u.flip(1), u + identity(u.shape[2:], dtype=u.dtype)),
        lambda u: compose(u.flip(1), u),
        lambda u: integrate(u, steps=1),
        lambda u: integrate(u),
        lambda u: invert(u, iterations=3, tolerance=0.0),
        lambda u: resize(u, [size + 2 for size in u.shape[2:]]),
        jacobian_determinant,
    ],
    ids=["warp-zeros", "warp-border", "sample", "compose", "midpoint", "integrate", "invert", "resize", "determinant"],
)
def test_gradient_equals_finite_differences(axes: int, operation: Callable[[Tensor], Tensor]) -> None:
    assert torch.autograd.gradcheck(operation, (away_from_voxel_centres(axes),))


FIELD = torch.zeros(1, 3, 4, 5, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_displacement(torch.zeros(1, 2, 4, 5, 6)), r"displacement has shape \(1, 2, 4, 5, 6\)"),
        (lambda: check_displacement(torch.zeros(1, 1, 4), "velocity"), r"velocity has shape \(1, 1, 4\)"),
        (lambda: check_displacement(torch.zeros(1, 4, 2, 2, 2, 2)), r"\(1, 4, 2, 2, 2, 2\)"),
        (lambda: sample(FIELD, FIELD[:, :2]), r"coordinates has shape \(1, 2, 4, 5, 6\)"),
        (lambda: warp(FIELD, FIELD[..., :5]), r"\(4, 5, 6\) differs from displacement grid \(4, 5, 5\)"),
        (lambda: warp(FIELD, FIELD[:, :2]), r"\(1, 2, 4, 5, 6\)"),
        (lambda: warp(FIELD, FIELD, mode="cubic"), "mode='cubic'"),
        (lambda: warp(FIELD, FIELD, padding="reflection"), "padding='reflection'"),
        (lambda: compose(FIELD, FIELD, padding="wrap"), "padding='wrap'"),
        (lambda: integrate(FIELD, steps=-1), "steps=-1"),
        (lambda: resize(FIELD[:, :2], (8, 10, 12)), r"\(1, 2, 4, 5, 6\)"),
        (lambda: jacobian(FIELD[:, :, :1]), r"\(1, 5, 6\)"),
        (lambda: jacobian_determinant(FIELD[..., :1]), r"\(4, 5, 1\)"),
    ],
)
def test_bad_input_is_named(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@AXES
def test_number_of_axes_is_told(axes: int) -> None:
    assert check_displacement(rough_field(axes)) == axes


def test_invert_converges_where_the_field_expands_more_than_twofold() -> None:
    """There the plain fixed-point iteration has a slope of 1.5 and oscillates for ever."""
    x = torch.arange(64, dtype=torch.float64) - 31.5
    bump = 1.5 * x * torch.exp(-((x / 10) ** 2))
    displacement = torch.zeros(1, 2, 64, 8, dtype=torch.float64)
    displacement[:, 0] = bump[:, None]
    assert jacobian_determinant(displacement).min() > 0.2
    error = inverse_error(displacement, invert(displacement))
    assert error[:, 16:48].max() < 2e-3
