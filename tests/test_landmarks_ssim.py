"""Landmarks, SSIM and global NCC as loss terms: against loops, MONAI, and values worked out by hand."""

import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from monai.losses import SSIMLoss
from torch import Tensor

from iregzoo.errors import InputError
from iregzoo.fields import warp
from iregzoo.losses import RegistrationLoss, landmark_error
from iregzoo.networks import IIRPNet
from iregzoo.registration import PairNetwork, Registration
from iregzoo.similarity import ncc, ssim
from iregzoo.training import TrainStep
from trainers import trainer_of

SHAPE = (8, 9, 10)
SPACING = (0.5, 2.0, 3.0)


def images(*shape: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    first, second = torch.rand(2, batch, 1, *shape, generator=torch.manual_seed(0), dtype=torch.float64)
    return first, (first + second) / 2


# --- SSIM


def plain_ssim(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any], window: int) -> float:
    """Equation (22) in every window that lies inside, one by one."""
    values = []
    for start in itertools.product(*[range(size - window + 1) for size in first.shape]):
        box = tuple(slice(begin, begin + window) for begin in start)
        a, b = first[box], second[box]
        covariance = ((a - a.mean()) * (b - b.mean())).mean()
        luminance = (2 * a.mean() * b.mean() + 0.0001) / (a.mean() ** 2 + b.mean() ** 2 + 0.0001)
        values.append(luminance * (2 * covariance + 0.0009) / (a.var() + b.var() + 0.0009))
    return float(np.mean(values))


@pytest.mark.parametrize(("shape", "window"), [(SHAPE, 7), ((8, 8, 5), 3), ((5, 5, 5), 5), ((9, 12), 7)])
def test_ssim_equals_a_loop_over_windows(shape: tuple[int, ...], window: int) -> None:
    first, second = images(*shape)
    expected = [plain_ssim(a, b, window) for a, b in zip(first[:, 0].numpy(), second[:, 0].numpy(), strict=True)]
    np.testing.assert_allclose(ssim(first, second, window=window), expected, rtol=1e-12)
    assert max(expected) < 0.95


def test_ssim_equals_monais_with_its_uniform_kernel() -> None:
    first, second = (image.float() for image in images(*SHAPE))
    expected = 1 - SSIMLoss(3, kernel_type="uniform", win_size=7, reduction="none")(first, second)[:, 0]
    torch.testing.assert_close(ssim(first, second), expected, rtol=0, atol=1e-5)


def test_ssim_of_an_image_with_itself_is_one_and_with_its_negative_below_zero() -> None:
    first, _ = images(*SHAPE)
    np.testing.assert_allclose(ssim(first, first), [1.0, 1.0], rtol=1e-12)
    assert (ssim(first, 1 - first) < 0).all()


def test_gradient_of_ssim_equals_finite_differences() -> None:
    inputs = [image.clone().requires_grad_() for image in images(4, 5, 4)]
    assert torch.autograd.gradcheck(lambda a, b: ssim(a, b, window=3), inputs)


@pytest.mark.parametrize("window", [0, -3, 4])
def test_ssim_window_without_a_centre_is_refused(window: int) -> None:
    with pytest.raises(ValueError, match=rf"window={window}; expected an odd number"):
        ssim(*images(*SHAPE), window=window)


def test_image_smaller_than_the_ssim_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 1, 8, 6, 8\); a window of 7 voxels does not fit"):
        ssim(*images(8, 6, 8))


# --- landmarks


def shift(*voxels: float, batch: int = 1) -> Tensor:
    return torch.tensor(voxels, dtype=torch.float64).view(1, 3, 1, 1, 1).expand(batch, 3, *SHAPE)


def points(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)[None]


CORNERS = points((2.0, 3.0, 4.0), (5.5, 1.25, 7.0))


def test_landmarks_that_the_field_carries_to_their_partners_have_no_error() -> None:
    moving = CORNERS + torch.tensor([1.0, -2.0, 0.5])
    assert landmark_error(shift(1.0, -2.0, 0.5), CORNERS, moving, SPACING).tolist() == [0.0]


@pytest.mark.parametrize(("axis", "size"), enumerate(SPACING))
def test_error_of_a_shift_is_its_length_in_mm(axis: int, size: float) -> None:
    still, moved = shift(0, 0, 0), shift(*[4.0 if i == axis else 0.0 for i in range(3)])
    np.testing.assert_allclose(landmark_error(moved, CORNERS, CORNERS, SPACING), [4 * size], rtol=1e-12)
    np.testing.assert_allclose(landmark_error(still, CORNERS, CORNERS + moved[0, :, 0, 0, 0], SPACING), [4 * size])


def test_error_is_the_mean_over_landmarks_and_not_over_components() -> None:
    moving = CORNERS + torch.tensor([[[6.0, 2.0, 0.0], [0.0, 0.0, 0.0]]])  # 3 mm and 4 mm: 5 mm; 0 mm
    np.testing.assert_allclose(landmark_error(shift(0, 0, 0), CORNERS, moving, SPACING), [2.5], rtol=1e-12)


def test_field_is_read_between_voxels_and_at_the_fixed_points() -> None:
    ramp = torch.zeros(1, 3, *SHAPE, dtype=torch.float64)
    # It moves along the second axis by a tenth of the place along the first.
    ramp[0, 1] = torch.arange(SHAPE[0], dtype=torch.float64).view(-1, 1, 1) / 10
    expected = 2.0 * np.mean([0.2, 0.55])
    np.testing.assert_allclose(landmark_error(ramp, CORNERS, CORNERS, SPACING), [expected], rtol=1e-12)
    beyond = points((9.0, 3.0, 4.0))
    np.testing.assert_allclose(landmark_error(ramp, beyond, beyond, SPACING), [2.0 * 0.7], rtol=1e-12)


@pytest.mark.parametrize("which", ["fixed", "moving", "both"])
def test_landmarks_with_nan_do_not_count(which: str) -> None:
    lost = points((math.nan, math.nan, math.nan)), points((1.0, math.nan, 2.0))
    good = points((1.0, 1.0, 1.0))
    fixed = torch.cat((CORNERS, good if which == "moving" else lost[0]), dim=1)
    moving = torch.cat((CORNERS, good if which == "fixed" else lost[1]), dim=1)
    u = shift(2.0, 0.0, 0.0).clone().requires_grad_()
    error = landmark_error(u, fixed, moving, SPACING)
    np.testing.assert_allclose(error.detach(), [1.0], rtol=1e-12)
    (gradient,) = torch.autograd.grad(error.sum(), u)
    assert gradient.isfinite().all()
    np.testing.assert_allclose(gradient.sum((2, 3, 4)), [[0.5, 0.0, 0.0]], atol=1e-12)  # mm a voxel


def test_each_pair_has_its_own_mean_and_one_without_landmarks_has_none() -> None:
    lost = torch.full((1, 1, 3), math.nan, dtype=torch.float64)
    fixed = torch.cat((CORNERS, torch.cat((CORNERS[:, :1], lost), dim=1), lost.expand(1, 2, 3)))
    found = landmark_error(shift(0.0, 3.0, 0.0, batch=3), fixed, fixed, SPACING)
    np.testing.assert_allclose(found, [6.0, 6.0, 0.0], rtol=1e-12)


def test_gradient_of_the_landmark_error_equals_finite_differences() -> None:
    u = 0.3 * torch.rand(2, 3, 3, 4, 5, generator=torch.manual_seed(1), dtype=torch.float64)
    fixed = 1 + torch.rand(2, 6, 3, generator=torch.manual_seed(2), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda field: landmark_error(field, fixed, fixed.flip(1), SPACING), (u.requires_grad_(),)
    )


@pytest.mark.parametrize(
    ("fixed", "moving", "spacing"),
    [((1, 4, 3), (1, 5, 3), 3), ((2, 4, 3), (2, 4, 3), 3), ((1, 4, 2), (1, 4, 2), 3), ((1, 4, 3), (1, 4, 3), 2)],
)
def test_landmarks_that_do_not_match_the_field_are_refused(
    fixed: tuple[int, ...], moving: tuple[int, ...], spacing: int
) -> None:
    with pytest.raises(ValueError, match=re.escape(f"fixed_points {fixed}, moving_points {moving}")):
        landmark_error(shift(0, 0, 0), torch.zeros(fixed), torch.zeros(moving), SPACING[:spacing])


# --- as terms of the composite


def registered_pair() -> tuple[Registration, Tensor, Tensor, Tensor, Tensor]:
    """Registration, images, and landmarks of both, moving first."""
    moving, fixed = (image.float() for image in images(*SHAPE))
    noise = torch.rand(2, 3, *SHAPE, generator=torch.manual_seed(3))
    fixed_points, moving_points = 6 * torch.rand(2, 2, 5, 3, generator=torch.manual_seed(4))
    return Registration(2 * noise - 1), moving, fixed, moving_points, fixed_points


def test_ad_regnets_terms_are_weighed_and_summed() -> None:
    registration, moving, fixed, moving_points, fixed_points = registered_pair()
    loss = RegistrationLoss(
        metric="ncc", similarity=2.0, ssim=3.0, smoothness=0.0, landmarks=5.0, spacing=SPACING, window=5
    )
    terms = loss(registration, moving, fixed, moving_points=moving_points, fixed_points=fixed_points)
    u = registration.displacement
    warped = warp(moving, u)
    expected = {
        "similarity": 2 * (1 - ncc(warped, fixed)).mean(),
        "ssim": 3 * (1 - ssim(warped, fixed)).mean(),
        "smoothness": torch.zeros(()),
        "landmarks": 5 * landmark_error(u, fixed_points, moving_points, SPACING).mean(),
    }
    assert set(terms) == {"loss", *expected}
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    torch.testing.assert_close(terms["loss"], sum(expected.values(), torch.zeros(())))
    # The field goes from the fixed landmarks to the moving ones, not back.
    swapped = loss(registration, moving, fixed, moving_points=fixed_points, fixed_points=moving_points)
    assert (swapped["landmarks"] - terms["landmarks"]).abs() > 1e-3


def test_loss_of_an_image_with_itself_is_zero() -> None:
    _, image, *_ = registered_pair()
    still = Registration(torch.zeros(2, 3, *SHAPE))
    terms = RegistrationLoss(metric="ncc", ssim=1.0, landmarks=1.0)(still, image, image)
    assert terms["loss"].abs() < 1e-5


def test_every_new_term_pulls_on_the_field() -> None:
    registration, moving, fixed, moving_points, fixed_points = registered_pair()
    u = registration.displacement.requires_grad_()
    loss = RegistrationLoss(metric="ncc", ssim=1.0, landmarks=1.0)
    terms = loss(registration, moving, fixed, None, None, moving_points, fixed_points)
    for name in ("similarity", "ssim", "landmarks"):
        (gradient,) = torch.autograd.grad(terms[name], u, retain_graph=True)
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


def test_landmark_term_is_left_out_of_a_batch_without_landmarks_and_without_a_weight() -> None:
    registration, moving, fixed, *landmarks = registered_pair()
    assert "landmarks" not in RegistrationLoss(landmarks=1.0)(registration, moving, fixed)
    assert "landmarks" not in RegistrationLoss()(registration, moving, fixed, None, None, *landmarks)


@pytest.mark.parametrize("missing", ["moving_points", "fixed_points"])
def test_landmarks_of_one_image_alone_are_refused(missing: str) -> None:
    registration, moving, fixed, *landmarks = registered_pair()
    given = {**dict(zip(("moving_points", "fixed_points"), landmarks, strict=True)), missing: None}
    with pytest.raises(ValueError, match="needs the points of both images"):
        RegistrationLoss(landmarks=1.0)(registration, moving, fixed, **given)


def test_metric_of_another_name_is_refused() -> None:
    with pytest.raises(InputError, match="metric 'mse': choose local_ncc or ncc"):
        RegistrationLoss(metric="mse")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0.0, -1.0, math.nan])
def test_spacing_that_is_not_positive_is_refused(size: float) -> None:
    with pytest.raises(InputError, match=r"spacing \[1.0, .*: give positive sizes in mm"):
        RegistrationLoss(spacing=(1.0, size, 1.0))


def test_spacing_from_a_config_is_a_list() -> None:
    assert RegistrationLoss(spacing=[1.0, 2.0, 3.0]).spacing == (1.0, 2.0, 3.0)  # type: ignore[arg-type]


# --- in a training step


def step(loss: Any, batch: dict[str, Tensor]) -> dict[str, float]:
    torch.manual_seed(0)
    network = PairNetwork(IIRPNet(channels=(4, 4), widths=(4, 4)))
    return TrainStep()(trainer_of(network, loss), batch)


def test_step_gives_the_loss_the_landmarks_of_both_images_moving_first() -> None:
    image = torch.rand(1, 2, *[8] * 3, generator=torch.manual_seed(1))
    given: dict[str, Tensor] = {}

    def loss(registration: Registration, *images: Tensor, **landmarks: Tensor) -> dict[str, Tensor]:
        given.update(landmarks)
        return {"loss": registration.displacement.sum()}

    landmarks = torch.rand(1, 2, 7, 3)
    step(loss, {"image": image, "points": landmarks})
    assert torch.equal(given["moving_points"], landmarks[:, 0])
    assert torch.equal(given["fixed_points"], landmarks[:, 1])
    assert "landmarks" in step(RegistrationLoss(landmarks=1.0), {"image": image, "points": landmarks})


def test_loss_that_takes_no_landmarks_needs_a_batch_without() -> None:
    def loss(registration: Registration, moving: Tensor, fixed: Tensor) -> dict[str, Tensor]:
        return {"loss": registration.displacement.sum()}

    image = torch.rand(1, 2, *[8] * 3)
    assert list(step(loss, {"image": image})) == ["loss", "learning_rate"]
    with pytest.raises(TypeError, match="moving_points"):
        step(loss, {"image": image, "points": torch.rand(1, 2, 7, 3)})
