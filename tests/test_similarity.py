"""Similarities against their definitions, computed window by window in float64, and against MONAI."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from monai.losses import LocalNormalizedCrossCorrelationLoss
from torch import Tensor

from iregzoo.similarity import box_sum, local_information, local_ncc, local_ncc_map, mae, mse, ncc, whole_windows

SHAPES = {2: (11, 8), 3: (7, 9, 6)}
AXES = pytest.mark.parametrize("axes", [2, 3])
WINDOWS = pytest.mark.parametrize("window", [1, 3, 5, 7, 9])
EPS = 1e-5

MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mse,
    "mae": mae,
    "ncc": ncc,
    "local_ncc": lambda a, b: local_ncc(a, b, window=5),
    "local_information": local_information,
    "local_information of odd windows": lambda a, b: local_information(a, b, window=3),
}
EACH_MEASURE = pytest.mark.parametrize("name", MEASURES)


def pair(axes: int, batch: int = 2, channels: int = 2) -> tuple[Tensor, Tensor]:
    """Two images that are alike in part, in [0, 1]."""
    generator = torch.manual_seed(1)
    first = torch.rand(batch, channels, *SHAPES[axes], generator=generator, dtype=torch.float64)
    noise = torch.rand(batch, channels, *SHAPES[axes], generator=generator, dtype=torch.float64)
    return first, 0.4 * first + 0.6 * noise


def windows(volume: np.ndarray, window: int) -> np.ndarray:
    """Every window of one channel, zeros outside, farther back if even: (*shape, voxels of a window)."""
    padded = np.pad(volume, (window // 2, (window - 1) // 2))
    rows = [padded[tuple(slice(i, i + window) for i in place)].ravel() for place in product(*map(range, volume.shape))]
    return np.array(rows).reshape(*volume.shape, -1)


def channelwise(function: Callable[..., np.ndarray], *images: Tensor) -> Tensor:
    flat = [image.double().flatten(0, 1).numpy() for image in images]
    return torch.from_numpy(np.array([function(*channels) for channels in zip(*flat, strict=True)])).view(
        images[0].shape
    )


def naive_local_ncc_map(first: Tensor, second: Tensor, window: int, eps: float = EPS) -> Tensor:
    def correlate(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = windows(a, window), windows(b, window)
        a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
        return (a * b).sum(-1) ** 2 / ((a * a).sum(-1) * (b * b).sum(-1) + eps)

    return channelwise(correlate, first, second)


# --- values


@AXES
def test_mse_and_mae_equal_numpy_per_pair(axes: int) -> None:
    first, second = pair(axes)
    difference = (first - second).flatten(1).numpy()
    np.testing.assert_allclose(mse(first, second), (difference**2).mean(1), rtol=1e-12)
    np.testing.assert_allclose(mae(first, second), np.abs(difference).mean(1), rtol=1e-12)


@AXES
def test_ncc_is_the_correlation_coefficient_of_each_pair(axes: int) -> None:
    first, second = pair(axes)
    expected = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(ncc(first, second), expected, rtol=1e-12)
    np.testing.assert_allclose(ncc(first, 1 - first), [-1, -1], rtol=1e-12)


@AXES
@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_box_sum_of_nothing_is_nothing(axes: int, window: int) -> None:
    empty = torch.zeros(2, 2, *SHAPES[axes])[:, :, :0]
    assert box_sum(empty, window).shape == empty.shape


@AXES
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 7, 9])
def test_box_sum_adds_the_window_around_each_voxel(axes: int, window: int) -> None:
    volume = torch.randint(-9, 9, (2, 2, *SHAPES[axes]), generator=torch.manual_seed(2)).double()
    expected = channelwise(lambda channel: windows(channel, window).sum(-1), volume)
    assert torch.equal(box_sum(volume, window), expected)


@AXES
@WINDOWS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_local_ncc_equals_its_definition(axes: int, window: int, dtype: torch.dtype, tolerance: float) -> None:
    first, second = (image.to(dtype) for image in pair(axes))
    expected = naive_local_ncc_map(first, second, window)
    found = local_ncc_map(first, second, window=window, eps=EPS)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=10 * tolerance)
    mean = local_ncc(first, second, window=window, eps=EPS)
    torch.testing.assert_close(mean.double(), expected.flatten(1).mean(1), rtol=0, atol=tolerance)


@AXES
def test_local_ncc_equals_monai(axes: int) -> None:
    generator = torch.manual_seed(3)
    first, second = (torch.rand(1, 1, *[16, 13, 15][:axes], generator=generator) for _ in range(2))
    loss = LocalNormalizedCrossCorrelationLoss(axes, kernel_size=9, smooth_nr=0.0, smooth_dr=EPS)
    torch.testing.assert_close(local_ncc(first, second, window=9), -loss(first, second)[None], rtol=0, atol=1e-5)


def test_local_ncc_takes_windows_of_nine_by_default() -> None:
    first, second = pair(3)
    assert torch.equal(local_ncc(first, second), local_ncc(first, second, window=9))


@AXES
@pytest.mark.parametrize("window", [2, 3, 4, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_local_information_equals_its_definition(axes: int, window: int, dtype: torch.dtype, tolerance: float) -> None:
    first, second = (image.to(dtype) for image in pair(axes))
    squared = naive_local_ncc_map(first, second, window, eps=1e-6)
    expected = (-(1 - squared / 1.05).log() / 2).flatten(1).mean(1)
    found = local_information(first, second, window=window)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


def test_local_information_of_one_image_twice_is_the_most_and_of_unrelated_ones_little() -> None:
    first, second = torch.rand(2, 1, 1, 16, 16, 16, generator=torch.manual_seed(6)) - 0.5
    assert 0.99 * np.log(21) / 2 < local_information(first, first) <= np.log(21) / 2 + 1e-4
    assert 0 <= local_information(first, second, window=5) < 0.02
    assert local_information(torch.zeros_like(first), second) == 0


@pytest.mark.parametrize("window", [2, 3, 9])
def test_local_information_of_a_nearly_flat_region_and_a_strong_texture_stays_in_range(window: int) -> None:
    """Rounding leaves a flat window less variance than it has, and so more correlation than there can be."""
    texture = (torch.rand(1, 1, 20, 20, 20, generator=torch.manual_seed(5)) > 0.5).float()
    for contrast in (3e-4, 5e-4, 1e-3, 2e-3):
        flat = (0.95 + contrast * texture).requires_grad_()
        found = local_information(flat, texture, window=window)
        assert 0 <= found <= np.log(21) / 2
        (gradient,) = torch.autograd.grad(found.sum(), flat)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("window", [2, 3])
def test_windows_that_do_not_count_add_nothing_and_have_no_gradient(window: int) -> None:
    drawn = torch.rand(3, 2, 1, 4, 5, 4, generator=torch.manual_seed(0), dtype=torch.float64)
    first, second, counted = drawn[0], drawn[1], drawn[2] < 0.9
    whole = whole_windows(counted, window)
    assert 0.1 < whole.double().mean() < 0.6
    # A window is whole where nothing that does not count is in it, however large.
    spoilt = second.where(counted, 1e3)
    found, again = (local_information(first, each, window=window, counted=whole) for each in (second, spoilt))
    torch.testing.assert_close(found, again, rtol=0, atol=0)
    rest = local_information(first, second, window=window, counted=~whole)
    torch.testing.assert_close(found + rest, local_information(first, second, window=window))
    second.requires_grad_()
    assert torch.autograd.gradcheck(lambda b: local_information(first, b, window=window, counted=whole), second)
    (gradient,) = torch.autograd.grad(local_information(first, second, window=window, counted=whole).sum(), second)
    assert (gradient[~counted] == 0).all()
    for wrong in (whole.double(), whole[..., 1:]):
        with pytest.raises(ValueError, match=r"counted has shape .* expected torch.bool of"):
            local_information(first, second, window=window, counted=wrong)


@AXES
@pytest.mark.parametrize("window", [2, 4])
def test_a_transposed_sum_reaches_the_other_way(axes: int, window: int) -> None:
    volume = torch.randint(-9, 9, (2, 2, *SHAPES[axes]), generator=torch.manual_seed(2)).double()
    around = range(2, 2 + axes)
    mirrored = box_sum(volume.flip(*around), window, transposed=True).flip(*around)
    assert torch.equal(mirrored, box_sum(volume, window))
    assert not torch.equal(box_sum(volume, window, transposed=True), box_sum(volume, window))


# --- properties


@AXES
@EACH_MEASURE
def test_measure_is_symmetric(name: str, axes: int) -> None:
    first, second = pair(axes)
    torch.testing.assert_close(MEASURES[name](first, second), MEASURES[name](second, first))


@AXES
@EACH_MEASURE
def test_batch_equals_its_singles(name: str, axes: int) -> None:
    first, second = (image.float() for image in pair(axes, batch=3))
    measure = MEASURES[name]
    singles = [measure(a, b) for a, b in zip(first.split(1), second.split(1), strict=True)]
    assert torch.equal(measure(first, second), torch.cat(singles))


@AXES
@EACH_MEASURE
def test_half_precision_images_are_measured_in_float32(name: str, axes: int) -> None:
    first, second = (image.bfloat16() for image in pair(axes))
    expected = MEASURES[name](first.float(), second.float())
    assert torch.equal(MEASURES[name](first, second), expected)
    assert torch.equal(MEASURES[name](first, second.float()), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(MEASURES[name](first.float(), second.float()), expected)


@AXES
@pytest.mark.parametrize("gain", [1e-4, 255.0, 1e15])
def test_ncc_knows_no_intensity_scale_or_offset(axes: int, gain: float) -> None:
    first, second = (image.float() for image in pair(axes))
    expected = ncc(first, second)
    torch.testing.assert_close(ncc(gain * first + 0.5 * gain, second), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(ncc(-gain * first, gain * second), -expected, rtol=1e-4, atol=0)


@AXES
@pytest.mark.parametrize("gain", [0.1, -3.0, 255.0])
def test_local_ncc_knows_no_intensity_scale(axes: int, gain: float) -> None:
    first, second = pair(axes)
    expected = local_ncc(first, second, window=5, eps=0.0)
    torch.testing.assert_close(local_ncc(gain * first, second, window=5, eps=0.0), expected)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 0.7, 1.0])
def test_constant_image_correlates_with_nothing(value: float) -> None:
    texture = torch.rand(1, 1, 17, 17, 17, generator=torch.manual_seed(4))
    constant = torch.full_like(texture, value, requires_grad=True)
    # 0.1 and 0.3 have no exact float32 mean: what rounding leaves must not count as texture
    for other in (texture, torch.full_like(texture, 0.3)):
        assert ncc(constant, other).abs() < 1e-6
        inner = local_ncc_map(constant, other, window=5)[..., 2:-2, 2:-2, 2:-2]
        assert inner.abs().max() < 1e-3
        (gradient,) = torch.autograd.grad(ncc(constant, other).sum() + inner.mean(), constant)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])
def test_local_ncc_of_a_flat_region_and_a_strong_texture_stays_in_range(value: float) -> None:
    texture = (torch.rand(1, 1, 20, 20, 20, generator=torch.manual_seed(5)) > 0.5).float()
    found = local_ncc_map(torch.full_like(texture, value), texture, window=9)
    assert found.min() >= 0
    assert found.max() <= 1 + 1e-5
    assert found[..., 4:-4, 4:-4, 4:-4].max() < 1e-3


# --- flat and bright windows

FAINT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "local_ncc": local_ncc,
    "local_ncc of small windows": lambda a, b: local_ncc(a, b, window=5),
    "local_ncc_map": lambda a, b: local_ncc_map(a, b, window=7).flatten(1).mean(1),
    "local_information": lambda a, b: local_information(a, b, window=3),
}
EACH_FAINT = pytest.mark.parametrize("name", FAINT)
BRIGHTNESS = pytest.mark.parametrize("brightness", [1.0, 1000.0])
FLAT_TOO = pytest.mark.parametrize("both", [False, True], ids=["beside a texture", "beside one as faint"])


def waves(axes: int, phase: float = 0.0) -> Tensor:
    """A smooth pattern without noise, from −1 to 1, of which a window of 3 voxels sees much: (1, 1, *shape)."""
    places = torch.meshgrid(*[torch.arange(size, dtype=torch.float64) for size in (20, 24, 22)[:axes]], indexing="ij")
    return sum(f * x for f, x in zip((0.9, 0.7, 1.1), places, strict=False)).add(phase).sin()[None, None]


def faint_pair(axes: int, brightness: float, contrast: float, both: bool) -> tuple[Tensor, Tensor]:
    """A pattern of that contrast on a bright ground, and one like it in part: of as little contrast, or of much."""
    first, second = waves(axes), 0.6 * waves(axes, 0.6) + 0.4 * waves(axes, 1.0).mul(1.7).sin()
    return (brightness * (1 + contrast * first)).float(), (
        brightness * (1 + (contrast if both else 0.5) * second)
    ).float()


def value_and_gradient(name: str, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    first = first.clone().requires_grad_()
    value = FAINT[name](first, second)
    (gradient,) = torch.autograd.grad(value.sum(), first)
    return value.detach().double(), gradient.double()


@AXES
@EACH_FAINT
@BRIGHTNESS
@FLAT_TOO
@pytest.mark.parametrize("contrast", [7e-3, 1e-2, 0.1])
def test_a_faint_pattern_is_measured_as_in_float64(
    name: str, axes: int, brightness: float, contrast: float, both: bool
) -> None:
    images = faint_pair(axes, brightness, contrast, both)
    value, gradient = value_and_gradient(name, *images)
    exact, exact_gradient = value_and_gradient(name, *(image.double() for image in images))
    torch.testing.assert_close(value, exact, rtol=0, atol=3e-3)
    assert (gradient - exact_gradient).norm() < 0.03 * exact_gradient.norm()


@AXES
@EACH_FAINT
@FLAT_TOO
@pytest.mark.parametrize("contrast", [1e-5, 1e-4, 3e-4, 1e-3, 2e-3, 3e-3])
def test_rounding_is_not_taken_for_a_pattern(name: str, axes: int, contrast: float, both: bool) -> None:
    images = faint_pair(axes, 1000.0, contrast, both)
    value, gradient = value_and_gradient(name, *images)
    exact, exact_gradient = value_and_gradient(name, *(image.double() for image in images))
    assert 0 <= value <= exact + 0.01
    assert gradient.norm() <= 1.05 * exact_gradient.norm()


@AXES
@EACH_FAINT
@BRIGHTNESS
@pytest.mark.parametrize("contrast", [0.0, 1e-5, 1e-4])
def test_a_pattern_that_float32_cannot_resolve_vanishes(
    name: str, axes: int, brightness: float, contrast: float
) -> None:
    images = faint_pair(axes, brightness, contrast, False)
    value, gradient = value_and_gradient(name, *images)
    flat = torch.full_like(images[0].double(), brightness)
    nothing, gradient_of_nothing = value_and_gradient(name, flat, images[1].double())
    torch.testing.assert_close(value, nothing, rtol=0, atol=1e-4)
    torch.testing.assert_close(gradient, gradient_of_nothing, rtol=0, atol=1e-4 / brightness)


@AXES
@pytest.mark.parametrize("window", [3, 5, 9])
@pytest.mark.parametrize("contrast", [0.0, 1e-6, 1e-4, 1e-3, 2e-3])
def test_the_map_of_bright_images_is_in_range(axes: int, window: int, contrast: float) -> None:
    for brightness, both in product([0.1, 0.7, 30.1, 1000.3], [False, True]):
        found = local_ncc_map(*faint_pair(axes, brightness, contrast, both), window=window)
        assert found.min() >= 0  # and no NaN
        assert found.max() <= 1


@AXES
@EACH_FAINT
def test_flat_regions_of_a_drawing_tell_nothing(name: str, axes: int) -> None:
    """Of two drawings, one moved: what differs from float64 would be of flat regions, whose values are not round."""
    inside = torch.zeros(1, 1, *[32] * axes, dtype=torch.bool)
    inside[(..., *[slice(10, 23)] * axes)] = True
    first, second = (torch.where(inside.roll(move, -1), 907.3, 311.1) for move in (0, 2))
    value, gradient = value_and_gradient(name, first, second)
    exact, exact_gradient = value_and_gradient(name, first.double(), second.double())
    torch.testing.assert_close(value, exact, rtol=0, atol=5e-3)
    assert (gradient - exact_gradient).norm() < 0.03 * exact_gradient.norm()


@AXES
@EACH_FAINT
def test_a_flat_item_and_an_ordinary_one_get_what_they_get_alone(name: str, axes: int) -> None:
    items = [faint_pair(axes, 1000.0, 1e-4, True), faint_pair(axes, 1.0, 0.3, False)]
    alone = [value_and_gradient(name, *item) for item in items]
    value, gradient = value_and_gradient(name, *(torch.cat(images) for images in zip(*items, strict=True)))
    assert torch.equal(value, torch.cat([each for each, _ in alone]))
    assert torch.equal(gradient, torch.cat([each for _, each in alone]))


# --- gradients


@AXES
@EACH_MEASURE
def test_gradient_of_both_images_equals_finite_differences(name: str, axes: int) -> None:
    first, second = pair(axes)
    small = [slice(None)] * 2 + [slice(3)] * axes
    inputs = tuple(image[tuple(small)].clone().requires_grad_() for image in (first, second))
    assert torch.autograd.gradcheck(MEASURES[name], inputs)


@AXES
def test_gradient_of_the_local_ncc_map_equals_finite_differences(axes: int) -> None:
    small = (slice(1), slice(1), *[slice(3)] * axes)
    inputs = tuple(image[small].clone().requires_grad_() for image in pair(axes))
    assert torch.autograd.gradcheck(lambda a, b: local_ncc_map(a, b, window=3), inputs)


@pytest.mark.parametrize("wanted", [0, 1])
def test_local_ncc_gradient_of_one_image_is_that_of_both(wanted: int) -> None:
    images = pair(3)
    both = [image.clone().requires_grad_() for image in images]
    local_ncc(*both).sum().backward()
    one = [image.clone().requires_grad_(i == wanted) for i, image in enumerate(images)]
    local_ncc(*one).sum().backward()
    assert torch.equal(one[wanted].grad, both[wanted].grad)
    assert one[1 - wanted].grad is None


# --- guards


@EACH_MEASURE
def test_images_of_different_shapes_are_refused(name: str) -> None:
    message = r"\(1, 1, 4, 5\) and \(1, 1, 4, 6\)"
    with pytest.raises(ValueError, match=message):
        MEASURES[name](torch.zeros(1, 1, 4, 5), torch.zeros(1, 1, 4, 6))


@pytest.mark.parametrize("window", [-3, 0, 2, 8])
@pytest.mark.parametrize("measure", [local_ncc, local_ncc_map])
def test_window_without_a_centre_is_refused(measure: Callable[..., Tensor], window: int) -> None:
    image = torch.zeros(1, 1, 4, 5)
    with pytest.raises(ValueError, match=f"window={window}"):
        measure(image, image, window=window)


@pytest.mark.parametrize(("window", "floor"), [(1, 0.05), (0, 0.05), (2, 0.0), (2, -0.1)])
def test_a_window_without_variance_or_no_floor_is_refused(window: int, floor: float) -> None:
    image = torch.zeros(1, 1, 4, 5)
    with pytest.raises(ValueError, match=f"window={window}, floor={floor}"):
        local_information(image, image, window=window, floor=floor)
