"""Losses against values worked out by hand, and against numpy."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import map_coordinates
from torch import Tensor

from iregzoo.errors import InputError
from iregzoo.fields import invert, warp
from iregzoo.jacobian import jacobian_determinant
from iregzoo.losses import (
    RegistrationLoss,
    diffusion,
    folding,
    gradicon,
    inverse_consistency,
    one_hot,
    orthogonality,
)
from iregzoo.overlap import overlap_loss
from iregzoo.registration import Registration
from iregzoo.similarity import local_ncc

SHAPES = {2: (9, 12), 3: (7, 9, 12)}
AXES = pytest.mark.parametrize("axes", [2, 3])
MATRICES = {n: 0.1 * np.array([[1.0, -0.7, 0.3], [0.4, -0.8, 0.5], [-0.2, 0.6, 0.9]])[:n, :n] for n in (2, 3)}

FIELD_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "diffusion": diffusion,
    "folding": folding,
    "inverse_consistency": lambda u: inverse_consistency(u, u.flip(1)),
    "gradicon": lambda u: gradicon(u, u.flip(1)),
}
EACH_FIELD_LOSS = pytest.mark.parametrize("name", FIELD_LOSSES)


def rough_field(axes: int, reach: float = 1.0, batch: int = 2) -> Tensor:
    noise = torch.rand(batch, axes, *SHAPES[axes], generator=torch.manual_seed(1), dtype=torch.float64)
    return (2 * noise - 1) * reach


def shift(axes: int, *voxels: float) -> Tensor:
    return torch.tensor(voxels, dtype=torch.float64).view(1, axes, *[1] * axes).expand(1, axes, *SHAPES[axes])


def affine_field(matrix: np.ndarray, axes: int) -> Tensor:
    """u(x) = matrix (x − centre): (1, N, *shape)."""
    centre = (np.array(SHAPES[axes]).reshape(-1, *[1] * axes) - 1) / 2
    return torch.from_numpy(np.einsum("ij,j...->i...", matrix, np.indices(SHAPES[axes]) - centre))[None]


def numpy_composition(forward: Tensor, backward: Tensor) -> np.ndarray:
    """backward(x) + forward(x + backward(x)) of each pair, the border continued."""
    composed = []
    for outer, inner in zip(forward.numpy(), backward.numpy(), strict=True):
        places = np.indices(inner.shape[1:]) + inner
        composed.append(inner + [map_coordinates(c, places, order=1, mode="nearest") for c in outer])
    return np.array(composed)


def numpy_jacobian(displacement: np.ndarray, axes: int) -> np.ndarray:
    """∂u_i/∂x_j as (B, *shape, N, N)."""
    columns = np.stack(np.gradient(displacement, axis=tuple(range(2, 2 + axes))), axis=2)
    return np.moveaxis(columns, (1, 2), (-2, -1))


# --- fields


@AXES
def test_diffusion_of_a_shift_is_zero(axes: int) -> None:
    assert diffusion(shift(axes, *[1.5, -2.0, 3.0][:axes])).tolist() == [0.0]


@AXES
def test_diffusion_of_an_affine_field_is_the_mean_square_of_its_matrix(axes: int) -> None:
    found = diffusion(affine_field(MATRICES[axes], axes))
    np.testing.assert_allclose(found, [(MATRICES[axes] ** 2).mean()], rtol=1e-12)


@AXES
def test_diffusion_equals_numpy(axes: int) -> None:
    u = rough_field(axes)
    each = [[(np.diff(pair, axis=1 + axis) ** 2).mean() for axis in range(axes)] for pair in u.numpy()]
    np.testing.assert_allclose(diffusion(u), np.mean(each, axis=1), rtol=1e-12)


@AXES
def test_diffusion_along_an_axis_of_one_voxel_is_zero(axes: int) -> None:
    u = rough_field(axes)[:, :, :1].requires_grad_()
    each = [
        [0.0, *((np.diff(pair, axis=1 + axis) ** 2).mean() for axis in range(1, axes))] for pair in u.detach().numpy()
    ]
    np.testing.assert_allclose(diffusion(u).detach(), np.mean(each, axis=1), rtol=1e-12)
    assert torch.autograd.gradcheck(diffusion, u[(..., *[slice(3)] * (axes - 1))].detach().requires_grad_())
    assert diffusion(u[(..., *[slice(1)] * axes)]).tolist() == [0.0, 0.0]


@AXES
def test_folding_of_a_field_without_folds_is_zero(axes: int) -> None:
    assert folding(torch.cat((shift(axes, *[0.0] * axes), affine_field(MATRICES[axes], axes)))).tolist() == [
        0,
        0,
    ]


@AXES
@pytest.mark.parametrize(("rate", "expected"), [(-0.5, 0.0), (-1.0, 0.0), (-2.0, 1.0), (-3.5, 2.5)])
def test_folding_of_a_mirrored_axis_is_how_far_it_is_stretched(axes: int, rate: float, expected: float) -> None:
    matrix = np.zeros((axes, axes))
    matrix[-1, -1] = rate
    np.testing.assert_allclose(folding(affine_field(matrix, axes)), [expected], atol=1e-12)


@AXES
def test_folding_equals_numpy(axes: int) -> None:
    u = rough_field(axes, reach=2.0)
    determinant = np.linalg.det(numpy_jacobian(u.numpy(), axes) + np.eye(axes))
    assert (determinant < 0).any()
    expected = np.maximum(-determinant, 0).reshape(2, -1).mean(1)
    np.testing.assert_allclose(folding(u), expected, rtol=1e-10)


# --- pairs of fields


@AXES
@pytest.mark.parametrize("loss", [inverse_consistency, gradicon])
def test_consistency_of_a_field_and_its_inverse_is_zero(axes: int, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    # towards the centre, so that the composition reads nothing from beyond the border
    backward = affine_field(-np.diag([0.2, 0.3, 0.1][:axes]), axes)
    forward = affine_field(np.diag([0.2 / 0.8, 0.3 / 0.7, 0.1 / 0.9][:axes]), axes)
    assert loss(forward, backward).item() < 1e-24
    assert loss(backward, backward).item() > 1e-2


@AXES
def test_consistency_of_an_inverted_field_is_small(axes: int) -> None:
    u = affine_field(MATRICES[axes], axes)
    inverse = invert(u, tolerance=1e-9)
    assert inverse_consistency(u, inverse).item() < 1e-12
    assert gradicon(u, inverse).item() < 1e-12


@AXES
def test_inverse_consistency_of_a_shift_is_its_squared_length(axes: int) -> None:
    moved, still = shift(axes, *[1.0, -2.0, 2.0][:axes]), shift(axes, *[0.0] * axes)
    for pair in ((moved, still), (still, moved)):
        np.testing.assert_allclose(inverse_consistency(*pair), [5.0 if axes == 2 else 9.0], rtol=1e-12)


@AXES
def test_gradicon_ignores_a_shift_and_sums_the_squared_gradient(axes: int) -> None:
    still = shift(axes, *[0.0] * axes)
    np.testing.assert_allclose(gradicon(shift(axes, *[2.0] * axes), still), [0.0], atol=1e-24)
    field = affine_field(MATRICES[axes], axes)
    for pair in ((field, still), (still, field)):
        np.testing.assert_allclose(gradicon(*pair), [(MATRICES[axes] ** 2).sum()], rtol=1e-12)


@AXES
def test_consistencies_equal_numpy(axes: int) -> None:
    forward, backward = rough_field(axes), rough_field(axes, reach=2.0).flip(0, 1)
    composed = numpy_composition(forward, backward)
    squared = (composed**2).sum(1).reshape(2, -1).mean(1)
    np.testing.assert_allclose(inverse_consistency(forward, backward), squared, rtol=1e-12)
    gradients = (numpy_jacobian(composed, axes) ** 2).sum((-2, -1)).reshape(2, -1).mean(1)
    np.testing.assert_allclose(gradicon(forward, backward), gradients, rtol=1e-12)


@AXES
@EACH_FIELD_LOSS
def test_batch_equals_its_singles(name: str, axes: int) -> None:
    loss, u = FIELD_LOSSES[name], rough_field(axes, batch=3)
    assert torch.equal(loss(u), torch.cat([loss(single) for single in u.split(1)]))


@AXES
@EACH_FIELD_LOSS
def test_gradient_of_a_field_loss_equals_finite_differences(name: str, axes: int) -> None:
    # all determinants of one sign, and no sample on a voxel: away from the kinks of relu and interpolation
    noise = torch.rand(2, axes, *[3, 4, 5][:axes], generator=torch.manual_seed(2), dtype=torch.float64)
    u = 0.1 + 0.2 * noise
    if name == "folding":
        u[:, -1] -= 3.0 * torch.arange(u.shape[-1])
        assert (folding(u) > 0).all()
    assert torch.autograd.gradcheck(FIELD_LOSSES[name], (u.requires_grad_(),))


# --- tokens and labels


def random_tokens() -> Tensor:
    """Of 2 pairs, 3 heads."""
    return torch.randn(2, 3, 4, 2, 3, 2, generator=torch.manual_seed(3), dtype=torch.float64)


def test_orthogonality_of_orthogonal_heads_is_zero() -> None:
    heads = torch.linalg.qr(random_tokens().flatten(2).mT).Q.mT * torch.tensor([[1.0], [5.0], [0.1]]).double()
    assert orthogonality(heads.view(2, 3, 4, 2, 3, 2)).max() < 1e-24


def test_orthogonality_of_equal_heads_counts_every_pair() -> None:
    equal = random_tokens()[:, :1].expand(-1, 3, -1, -1, -1, -1) * torch.tensor([1.0, -5.0, 0.1]).view(3, 1, 1, 1, 1)
    np.testing.assert_allclose(orthogonality(equal), [6 / 9] * 2, rtol=1e-12)


def test_orthogonality_equals_numpy() -> None:
    tokens = random_tokens()
    expected = []
    for pair in tokens.numpy():
        cosines = [[a.ravel() @ b.ravel() / np.sqrt((a**2).sum() * (b**2).sum()) for b in pair] for a in pair]
        expected.append(((np.array(cosines) - np.eye(3)) ** 2).mean())
    assert min(expected) > 1e-3
    np.testing.assert_allclose(orthogonality(tokens), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(orthogonality, (tokens.requires_grad_(),))


def test_orthogonality_of_bfloat16_tokens_is_summed_in_float32() -> None:
    tokens = 3 + torch.randn(1, 2, 6, 20, 20, 20, generator=torch.manual_seed(3)).bfloat16()
    found = orthogonality(tokens)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, orthogonality(tokens.double()), rtol=1e-4)


def label_maps() -> tuple[Tensor, Tensor]:
    """Label 1: sizes 3 and 1 with 1 in common; label 2: sizes 1 and 3 with 1 in common; label 5 is in neither."""
    first = torch.tensor([[1, 1, 1], [0, 0, 2]]).view(1, 1, 2, 3)
    second = torch.tensor([[0, 1, 2], [0, 2, 2]]).view(1, 1, 2, 3)
    return first, second


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_one_hot_has_a_channel_per_value(dtype: torch.dtype) -> None:
    hot = one_hot(label_maps()[0].to(dtype), (2, 1, 5))
    assert hot.dtype == torch.float32
    expected = [[[0, 0, 0], [0, 0, 1]], [[1, 1, 1], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]]
    assert hot.tolist() == [expected]


# --- the composite


def registered_pair() -> tuple[Registration, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.manual_seed(5)
    moving, fixed = torch.rand(2, 2, 1, *SHAPES[3], generator=generator)
    moving_labels, fixed_labels = torch.randint(0, 4, (2, 2, 1, *SHAPES[3]), generator=generator)
    return Registration(rough_field(3, reach=2.0).float()), moving, fixed, moving_labels, fixed_labels


def test_registration_loss_is_that_of_iirp_net_by_default() -> None:
    registration, moving, fixed, _, _ = registered_pair()
    terms = RegistrationLoss()(registration, moving, fixed)
    assert list(terms) == ["loss", "similarity", "smoothness"]
    warped = warp(moving, registration.displacement)
    torch.testing.assert_close(terms["similarity"], -local_ncc(fixed, warped, window=9).mean())
    torch.testing.assert_close(terms["smoothness"], diffusion(registration.displacement).mean())
    torch.testing.assert_close(terms["loss"], terms["similarity"] + terms["smoothness"])


def test_registration_loss_weighs_and_sums_its_named_terms() -> None:
    registration, moving, fixed, moving_labels, fixed_labels = registered_pair()
    loss = RegistrationLoss(window=5, similarity=2.0, smoothness=3.0, folding=5.0, overlap=7.0, labels=(1, 3))
    terms = loss(registration, moving, fixed, moving_labels, fixed_labels)
    u = registration.displacement
    expected = {
        "similarity": -2 * local_ncc(fixed, warp(moving, u), window=5).mean(),
        "smoothness": 3 * diffusion(u).mean(),
        "folding": 5 * folding(u).mean(),
        "overlap": 7 * overlap_loss(u, moving_labels, fixed_labels, (1, 3)).mean(),
    }
    assert set(terms) == {"loss", *expected}
    for name, value in expected.items():
        assert value.abs() > 1e-3
        torch.testing.assert_close(terms[name], value)
    torch.testing.assert_close(terms["loss"], sum(expected.values(), torch.zeros(())))


def test_a_similarity_that_weighs_nothing_is_left_out() -> None:
    registration, moving, fixed, *maps = registered_pair()
    terms = RegistrationLoss(similarity=0.0, overlap=1.0, labels=(1, 3))(registration, moving, fixed, *maps)
    assert list(terms) == ["loss", "smoothness", "overlap"]


def test_every_term_of_the_registration_loss_pulls_on_the_field() -> None:
    registration, *images = registered_pair()
    u = registration.displacement.requires_grad_()
    terms = RegistrationLoss(folding=1.0, overlap=1.0, labels=(1, 2, 3))(registration, *images)
    for value in terms.values():
        (gradient,) = torch.autograd.grad(value, u, retain_graph=True)
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


def test_orthogonality_term_is_the_mean_over_all_tokens() -> None:
    bare, *images = registered_pair()
    query, key = (tokens.clone().requires_grad_() for tokens in (random_tokens(), random_tokens().square()))
    registration = replace(bare, auxiliary={"tokens": (query, key)})
    terms = RegistrationLoss(orthogonality=2.0)(registration, *images)
    torch.testing.assert_close(terms["orthogonality"], orthogonality(query).mean() + orthogonality(key).mean())
    assert orthogonality(query).mean() < 0.9 * orthogonality(key).mean()
    torch.testing.assert_close(terms["loss"].double(), sum(terms[name] for name in list(terms)[1:]).double())
    assert all(gradient.any() for gradient in torch.autograd.grad(terms["loss"], (query, key)))
    assert "orthogonality" not in RegistrationLoss()(registration, *images)


@pytest.mark.parametrize("auxiliary", [{}, {"tokens": ()}, {"heads": (torch.ones(1),)}])
def test_orthogonality_without_tokens_is_refused(auxiliary: dict[str, tuple[Tensor, ...]]) -> None:
    bare, *images = registered_pair()
    with pytest.raises(ValueError, match=r"orthogonality term needs a registration with tokens.*not in training mode"):
        RegistrationLoss(orthogonality=1.0)(replace(bare, auxiliary=auxiliary), *images)


def test_overlap_without_labels_is_refused() -> None:
    with pytest.raises(InputError, match=r"overlap 0.5 needs label values"):
        RegistrationLoss(overlap=0.5)


@pytest.mark.parametrize("window", [4, 0, 2.5])
def test_window_without_a_middle_is_refused(window: Any) -> None:
    with pytest.raises(InputError, match=rf"window {window}: give an odd number of voxels"):
        RegistrationLoss(window=window)


@pytest.mark.parametrize("missing", [3, 4])
def test_overlap_without_label_maps_is_refused(missing: int) -> None:
    inputs = list(registered_pair())
    inputs[missing] = None  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="needs the label maps"):
        RegistrationLoss(overlap=1.0, labels=(1,))(*inputs)


def test_labels_from_a_config_are_a_list() -> None:
    assert RegistrationLoss(overlap=1.0, labels=[1, 2]).labels == (1, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [diffusion, folding])
def test_field_with_the_wrong_channels_is_named(loss: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 4, 5\)"):
        loss(torch.zeros(1, 2, 3, 4, 5))


@pytest.mark.parametrize("shape", [(7, 8, 9), (6, 5), (2, 2, 2)])
@pytest.mark.parametrize("margin", [0.0, 0.2, 50.0, -50.0])
def test_folding_and_its_gradient_are_those_of_every_voxel(shape: tuple[int, ...], margin: float) -> None:
    u = torch.randn(2, len(shape), *shape, generator=torch.manual_seed(0), dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, -3.0], dtype=torch.float64)
    plain = F.relu(margin - jacobian_determinant(u)).flatten(1).mean(1)
    found = folding(u, margin=margin)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-14)
    (expected,) = torch.autograd.grad((weights * plain).sum(), u)
    torch.testing.assert_close(torch.autograd.grad((weights * found).sum(), u)[0], expected, rtol=1e-12, atol=1e-14)


def test_folding_of_what_is_not_finite_is_not_finite() -> None:
    u = torch.zeros(2, 3, 4, 4, 4)
    u[1, 0, 1, 1, 1] = torch.nan
    found = folding(u)
    assert found[0] == 0
    assert found[1].isnan()


@pytest.mark.parametrize("shape", [(3, 4, 5), (4, 2)])
def test_gradient_of_diffusion_is_its_derivative(shape: tuple[int, ...]) -> None:
    u = torch.randn(2, len(shape), *shape, generator=torch.manual_seed(0), dtype=torch.float64, requires_grad=True)
    plain = torch.stack([u.diff(dim=axis).square().flatten(1).mean(1) for axis in range(2, u.dim())]).mean(0)
    torch.testing.assert_close(diffusion(u), plain, rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(diffusion, u)


def test_folding_of_many_voxels_adds_up() -> None:
    # Every voxel is 0.1 below the margin; float32 sums of a million, one after the other, are off by a hundredth.
    assert folding(torch.zeros(1, 3, 100, 100, 100), margin=1.1).item() == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("loss", [diffusion, folding])
def test_no_pairs_have_no_losses(loss: Callable[[Tensor], Tensor]) -> None:
    u = torch.zeros(0, 3, 4, 5, 6, requires_grad=True)
    found = loss(u)
    assert found.shape == (0,)
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert u.grad is not None
    assert u.grad.shape == u.shape
