"""SM-GICNet's loss against its terms written out in numpy and float64, and what a training does with it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates, uniform_filter
from torch import Tensor

from iregzoo.errors import InputError
from iregzoo.networks import SMGICNet
from iregzoo.registration import Registration
from iregzoo.symmetric import SymmetricLoss

SHAPE = (16, 24, 16)
TERMS = ("similarity", "smoothness", "symmetric", "inverse", "multilevel", "gradicon")
ALL_ON = SymmetricLoss(symmetric=1.0, inverse=1.0, multilevel=1.0, folding=1.0, margin=0.5, overlap=1.0, labels=(1, 3))


def rough(*shape: int, seed: int, reach: float = 1.0) -> Tensor:
    noise = torch.rand(*shape, generator=torch.manual_seed(seed), dtype=torch.float64)
    return (2 * noise - 1) * reach


def registered(levels: int = 4, seed: int = 0, batch: int = 2, shape: tuple[int, ...] = SHAPE) -> Registration:
    """Fields of noise; the last of the pyramid is not the displacement, so that a mix-up shows."""
    coarsest = [size // 2 ** (levels - 1) for size in shape]
    pyramid = [rough(batch, 3, *[size * 2**i for size in coarsest], seed=seed + i) for i in range(levels)]
    displacement, inverse = (rough(batch, 3, *shape, seed=seed + i, reach=2.0) for i in (10, 11))
    return Registration(displacement, inverse, tuple(pyramid))


def both_ways(levels: int = 4, **settings: object) -> Registration:
    return replace(registered(levels, **settings), opposite=registered(levels, seed=20, **settings))  # type: ignore[arg-type]


def images(shape: tuple[int, ...] = SHAPE, batch: int = 2) -> tuple[Tensor, Tensor]:
    moving, fixed = torch.rand(2, batch, 1, *shape, generator=torch.manual_seed(5), dtype=torch.float64)
    return moving, fixed


def label_maps() -> tuple[Tensor, Tensor]:
    moving, fixed = torch.randint(0, 4, (2, 2, 1, *SHAPE), generator=torch.manual_seed(6))
    return moving, fixed


# --- the terms, written out


def plain_warp(image: np.ndarray, field: np.ndarray, mode: str) -> np.ndarray:
    """Every channel of (C, *shape) at x + u(x); outside zeros, reached linearly, or the border's value."""
    places = np.indices(field.shape[1:]) + field
    modes = {"zeros": "constant", "border": "nearest"}
    if mode == "zeros":  # of one voxel around the image, between which and it is interpolated
        image, places = np.pad(image, [(0, 0)] + [(1, 1)] * 3), places + 1
    return np.stack([map_coordinates(channel, places, order=1, mode=modes[mode]) for channel in image])


def plain_composition(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    return inner + plain_warp(outer, inner, "border")


def plain_pool(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    blocks = [part for small, size in zip(shape, image.shape[1:], strict=True) for part in (small, size // small)]
    return image.reshape(-1, *blocks).mean((2, 4, 6))


def plain_upsample(image: np.ndarray) -> np.ndarray:
    """To twice the grid, on which each voxel is a block of 2×2×2 and lies in its middle; the border is continued."""
    places = np.meshgrid(*[(np.arange(2 * size) - 0.5) / 2 for size in image.shape[1:]], indexing="ij")
    return np.stack([map_coordinates(channel, places, order=1, mode="nearest") for channel in image])


def plain_local_ncc(a: np.ndarray, b: np.ndarray, window: int) -> float:
    """Mean squared correlation over the windows of (1, *shape), zeros outside."""
    count = window**3

    def total(values: np.ndarray) -> np.ndarray:
        return uniform_filter(values[0], window, mode="constant") * count

    cross = total(a * b) - total(a) * total(b) / count
    spread_a, spread_b = (total(image**2) - total(image) ** 2 / count for image in (a, b))
    return float((cross**2 / (spread_a * spread_b + 1e-5)).mean())


def plain_gradients(field: np.ndarray) -> np.ndarray:
    return np.stack(np.gradient(field, axis=(1, 2, 3)))


def plain_folding(field: np.ndarray, margin: float) -> float:
    jacobian = np.moveaxis(plain_gradients(field), (0, 1), (-1, -2)) + np.eye(3)
    return float(np.maximum(margin - np.linalg.det(jacobian), 0).mean())


def plain_soft_dice(moving: np.ndarray, fixed: np.ndarray, field: np.ndarray, labels: tuple[int, ...]) -> float:
    soft = [plain_warp((moving == value).astype(float), field, "zeros")[0] for value in labels]
    hard = [(fixed[0] == value).astype(float) for value in labels]
    return float(1 - np.mean([2 * (a * b).sum() / (a + b).sum() for a, b in zip(soft, hard, strict=True)]))


def plain_terms(
    there: Registration, back: Registration, moving: Tensor, fixed: Tensor, maps: tuple[Tensor, Tensor], pair: int
) -> dict[str, float]:
    """Of one pair and one way, without weights; similarity and smoothness with those of the default."""
    assert there.inverse is not None
    a, b = moving[pair].numpy(), fixed[pair].numpy()
    u, inverse = there.displacement[pair].numpy(), there.inverse[pair].numpy()
    pyramid, opposite = ([field[pair].numpy() for field in one.pyramid] for one in (there, back))
    warped, warped_back = (
        [plain_warp(plain_pool(image, field.shape[1:]), field, "zeros") for field in fields]
        for image, fields in ((a, pyramid), (b, opposite))
    )
    count = len(pyramid)
    weights = (0.125, 0.25, 0.5, 1.0)[4 - count :]
    targets = [plain_pool(b, field.shape[1:]) for field in pyramid]
    scores = [plain_local_ncc(t, w, n) for t, w, n in zip(targets, warped, (3, 5, 7, 9), strict=False)]
    slopes = [np.mean([(np.diff(field, axis=i) ** 2).mean() for i in (1, 2, 3)]) for field in pyramid]
    before = [plain_upsample(w) for w in warped[:-1]]
    return {
        "similarity": -float(np.dot(weights, scores)),
        "smoothness": float(np.dot(weights, slopes)),
        "symmetric": float(((warped[-1] - warped_back[-1]) ** 2).mean()),
        "inverse": float((plain_composition(u, inverse) ** 2).sum(0).mean()),
        "multilevel": float(sum(((w - (w + c) / 2) ** 2).mean() for w, c in zip(warped[1:], before, strict=True))),
        "gradicon": float((plain_gradients(plain_composition(pyramid[-1], opposite[-1])) ** 2).sum((0, 1)).mean()),
        "folding": plain_folding(u, 0.5),
        "overlap": plain_soft_dice(maps[0][pair].numpy(), maps[1][pair].numpy(), u, (1, 3)),
    }


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_terms_are_the_papers_averaged_over_both_ways_and_the_batch(levels: int) -> None:
    there = both_ways(levels)
    back = there.opposite
    assert back is not None
    moving, fixed = images()
    maps = label_maps()
    found = ALL_ON(there, moving, fixed, *maps)
    each = [
        plain_terms(*way, pair)
        for pair in range(2)
        for way in ((there, back, moving, fixed, maps), (back, there, fixed, moving, maps[::-1]))
    ]
    assert set(found) == {"loss", *each[0]}
    for name in each[0]:
        expected = np.mean([terms[name] for terms in each])
        assert abs(expected) > 1e-3 or (name == "multilevel" and levels == 1)
        # labels are float32
        np.testing.assert_allclose(found[name].item(), expected, rtol=1e-5 if name == "overlap" else 1e-9, err_msg=name)
    np.testing.assert_allclose(found["loss"].item(), sum(found[name].item() for name in each[0]), rtol=1e-6)


# --- weights


def test_landmarks_of_a_data_set_change_nothing() -> None:
    points = torch.rand(2, 5, 3)
    found = ALL_ON(both_ways(), *images(), *label_maps(), moving_points=points, fixed_points=points)
    assert found == ALL_ON(both_ways(), *images(), *label_maps())


def test_weights_are_the_papers_by_default() -> None:
    loss = SymmetricLoss()
    assert (loss.symmetric, loss.inverse, loss.multilevel) == (0.001, 0.01, 0.0005)
    assert loss.windows == (3, 5, 7, 9)
    inputs = (both_ways(), *images())
    found, ones = loss(*inputs), ALL_ON(*inputs, *label_maps())
    assert list(found) == ["loss", *TERMS]
    for name, weight in (("symmetric", 0.001), ("inverse", 0.01), ("multilevel", 0.0005), ("gradicon", 1.0)):
        torch.testing.assert_close(found[name], weight * ones[name])
    torch.testing.assert_close(found["loss"], torch.stack([found[name] for name in TERMS]).sum())


@pytest.mark.parametrize("name", ["symmetric", "inverse", "multilevel", "gradicon", "folding", "overlap"])
def test_weight_is_of_its_term_alone(name: str) -> None:
    inputs = (both_ways(), *images(), *label_maps())
    once, thrice = ALL_ON(*inputs), replace(ALL_ON, **{name: 3.0})(*inputs)
    for term in once.keys() - {"loss"}:
        torch.testing.assert_close(thrice[term], (3 if term == name else 1) * once[term])


@pytest.mark.parametrize("name", ["similarity", "smoothness"])
def test_levels_have_their_own_weights(name: str) -> None:
    inputs = (both_ways(), *images())
    alone = [
        SymmetricLoss(**{name: tuple(float(i == level) for i in range(4))})(*inputs)[name]  # type: ignore[arg-type]
        for level in range(4)
    ]
    weights = (2.0, 3.0, 5.0, 7.0)
    found = SymmetricLoss(**{name: weights})(*inputs)[name]  # type: ignore[arg-type]
    torch.testing.assert_close(found, sum((w * one for w, one in zip(weights, alone, strict=True)), torch.zeros(())))
    assert len({round(one.item(), 9) for one in alone}) == 4


def test_lists_from_a_config_become_tuples() -> None:
    loss = SymmetricLoss(windows=[3, 5], similarity=[1, 1], smoothness=[1, 2], labels=[4])  # type: ignore[arg-type]
    assert (loss.windows, loss.similarity, loss.smoothness, loss.labels) == ((3, 5), (1, 1), (1, 2), (4,))


# --- properties


def test_loss_is_the_same_the_other_way_round() -> None:
    there = both_ways()
    back = there.opposite
    assert back is not None
    (moving, fixed), maps = images(), label_maps()
    found = ALL_ON(there, moving, fixed, *maps)
    other = ALL_ON(replace(back, opposite=replace(there, opposite=None)), fixed, moving, *maps[::-1])
    for name, value in found.items():
        torch.testing.assert_close(value, other[name], rtol=1e-7, atol=0)  # labels are float32


def test_equal_images_and_no_movement_leave_the_similarity_alone() -> None:
    still = [torch.zeros_like(field) for field in registered().pyramid]
    one = Registration(still[-1], still[-1], tuple(still))
    moving, _ = images()
    terms = replace(ALL_ON, margin=0.0)(replace(one, opposite=one), moving, moving, *[label_maps()[0]] * 2)
    assert terms["multilevel"] > 0  # coarse images are not fine ones
    for name in ("smoothness", "symmetric", "inverse", "gradicon", "folding"):
        assert terms[name].item() == pytest.approx(0, abs=1e-20)
    assert terms["overlap"].item() == pytest.approx(0, abs=1e-5)
    # nearly -1 at each level; less where the coarsest windows hold little contrast
    assert -1.875 <= terms["similarity"] < -1.7


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_a_coarse_ramp_is_the_fine_one_up_to_the_faces(axis: int) -> None:
    """What one level sees where nothing moves lies where the next sees it."""
    still = [torch.zeros_like(field) for field in registered(levels=2).pyramid]
    one = Registration(still[-1], still[-1], tuple(still))
    size = SHAPE[axis - 2]
    ramp = torch.arange(float(size), dtype=torch.float64).view(*[-1 if i == axis else 1 for i in range(5)])
    image = ramp.expand(2, 1, *SHAPE)
    terms = ALL_ON(replace(one, opposite=one), image, image, *label_maps())
    # At both faces half a voxel is missing; (w_i - w_(i-1)) / 2 is half of that.
    assert terms["multilevel"].item() == pytest.approx(2 * 0.25**2 / size)


@pytest.mark.parametrize("name", ["loss", *TERMS, "folding", "overlap"])
def test_every_term_pulls_on_both_ways(name: str) -> None:
    def loose(one: Registration) -> Registration:
        assert one.inverse is not None
        fields = [field.requires_grad_() for field in (one.displacement, one.inverse, *one.pyramid)]
        return Registration(fields[0], fields[1], tuple(fields[2:]))

    there, back = loose(registered()), loose(registered(seed=20))
    terms = ALL_ON(replace(there, opposite=back), *images(), *label_maps())
    for one in (there, back):
        assert one.inverse is not None
        everything = (one.displacement, one.inverse, *one.pyramid)
        grads = torch.autograd.grad(terms[name], everything, retain_graph=True, allow_unused=True)
        pulled = [grad is not None and bool(grad.abs().max() > 0) for grad in grads]
        assert all(grad.isfinite().all() for grad in grads if grad is not None)
        assert (
            pulled
            == {
                "loss": [True] * 6,
                "similarity": [False, False, True, True, True, True],
                "smoothness": [False, False, True, True, True, True],
                "symmetric": [False, False, False, False, False, True],
                "inverse": [True, True, False, False, False, False],
                "multilevel": [False, False, True, True, True, True],
                "gradicon": [False, False, False, False, False, True],
                "folding": [True, False, False, False, False, False],
                "overlap": [True, False, False, False, False, False],
            }[name]
        )


def test_gradient_equals_finite_differences() -> None:
    # no sample on a voxel or beyond the border's kink: away from where interpolation has none
    shape = (4, 4, 4)
    tensors = [
        (0.1 + 0.2 * rough(1, 3, *size, seed=seed).abs()).requires_grad_()
        for seed, size in enumerate([(2, 2, 2), shape, shape] * 2)
    ]
    moving, fixed = images(shape, batch=1)
    loss = SymmetricLoss((3, 3), (0.5, 1.0), (0.5, 1.0), symmetric=1.0, inverse=1.0, multilevel=1.0)

    def total(*fields: Tensor) -> Tensor:
        coarse, fine, inverse, coarse_back, fine_back, inverse_back = fields
        back = Registration(fine_back, inverse_back, (coarse_back, fine_back))
        return loss(Registration(fine, inverse, (coarse, fine), opposite=back), moving, fixed)["loss"]

    assert torch.autograd.gradcheck(total, tensors, fast_mode=True)


@pytest.mark.parametrize("levels", [2, 4])
def test_steps_lower_the_loss_on_one_pair(levels: int) -> None:
    torch.manual_seed(0)
    network = SMGICNet(channels=4, levels=levels).train()
    with torch.no_grad():  # a start from which a few steps get somewhere
        for estimator in network.estimators:
            estimator.head.weight.normal_(std=1e-2)
    axes = torch.meshgrid(*[torch.linspace(-1, 1, 32)] * 3, indexing="ij")
    moving = torch.exp(-4 * sum(((axis - 0.2) ** 2 for axis in axes), torch.zeros(())))[None, None]
    fixed = moving.flip(2)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    history = []
    for _ in range(8):
        optimizer.zero_grad()
        terms = SymmetricLoss()(network(moving, fixed), moving, fixed)
        terms["loss"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        history.append(terms["loss"].item())
    assert history[-1] < history[0] - 0.02


# --- guards


def without(name: str) -> Registration:
    there = both_ways()
    assert there.opposite is not None
    if name == "opposite's inverse":
        return replace(there, opposite=replace(there.opposite, inverse=None))
    return replace(there, **{name: None})


@pytest.mark.parametrize("name", ["opposite", "inverse", "opposite's inverse"])
def test_registration_of_one_way_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"fixed to moving as opposite, and the inverse of both.*both=True"):
        SymmetricLoss()(without(name), *images())


@pytest.mark.parametrize("levels", [0, 3])
def test_levels_without_weights_are_refused(levels: int) -> None:
    loss = SymmetricLoss((3, 5), (1.0, 1.0), (1.0, 1.0))
    there = both_ways(3)
    assert there.opposite is not None
    cut = replace(there, pyramid=there.pyramid[:levels])
    cut = replace(cut, opposite=replace(there.opposite, pyramid=there.opposite.pyramid[:levels]))
    with pytest.raises(ValueError, match=rf"has {levels} levels; windows=\(3, 5\) are for 1 to 2"):
        loss(cut, *images())


@pytest.mark.parametrize("name", ["windows", "similarity", "smoothness"])
def test_weights_of_different_numbers_of_levels_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name} \[3, 5, 7\].*give one of each per level"):
        SymmetricLoss(**{name: (3, 5, 7)})  # type: ignore[arg-type]


def test_overlap_without_labels_is_refused() -> None:
    with pytest.raises(InputError, match=r"overlap 0.5 needs label values"):
        SymmetricLoss(overlap=0.5)


def test_weights_that_are_no_list_and_even_windows_are_refused() -> None:
    with pytest.raises(InputError, match=r"similarity 0\.0: give a list"):
        SymmetricLoss(similarity=0.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"smoothness 'abcd': give a list"):
        SymmetricLoss(smoothness="abcd")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="windows 4: give an odd number"):
        SymmetricLoss(windows=(3, 4, 5, 7))


@pytest.mark.parametrize("maps", [(label_maps()[0], None), (None, label_maps()[0])])
def test_overlap_without_label_maps_is_refused(maps: tuple[Tensor | None, Tensor | None]) -> None:
    with pytest.raises(ValueError, match="needs the label maps of both images"):
        ALL_ON(both_ways(), *images(), *maps)
