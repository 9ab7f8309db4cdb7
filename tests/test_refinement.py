"""Finishing by gradient steps: a known shift is found better, nothing gets worse, and the stage in the pipeline."""

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch import Tensor

from cards import with_card
from geometry import GRIDS, make_grid, move_all, noise_image, waves
from iregzoo import refinement
from iregzoo.errors import InputError
from iregzoo.evaluate import evaluate
from iregzoo.fields import identity, warp
from iregzoo.jacobian import jacobian_determinant
from iregzoo.losses import diffusion, folding
from iregzoo.phantom import Phantom, recovered
from iregzoo.refinement import likeness, refine_displacement
from iregzoo.register import Scans, read_scans, register
from iregzoo.similarity import box_sum, local_information, local_ncc
from iregzoo.space.frame import Frame, warp_scan
from iregzoo.space.grid import network_grid
from iregzoo.space.scan import Scan
from iregzoo.zoo import Method, find, load
from shell import run

SHAPE = (24, 28, 20)
INSIDE = (slice(None), slice(None), *[slice(5, -5)] * 3)


def texture(batch: int = 1, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Smooth noise in [0, 1], (B, 1, *shape)."""
    image = torch.rand(batch, 1, *shape, generator=torch.manual_seed(seed))
    for _ in range(2):
        image = box_sum(image, 3) / 27
    return (image - image.amin()) / (image.amax() - image.amin())


def smooth_field(batch: int = 1, seed: int = 0, reach: float = 1.0, window: int = 9) -> Tensor:
    """A random displacement (B, 3, *SHAPE) with a standard deviation of ``reach`` voxels."""
    field = torch.randn(batch, 3, *SHAPE, generator=torch.manual_seed(seed))
    for _ in range(2):
        field = box_sum(field, window)
    return reach * field / field.std()


def shifted(voxels: float) -> Tensor:
    """The displacement that moves everything along the first axis."""
    field = torch.zeros(1, 3, *SHAPE)
    field[:, 0] = voxels
    return field


def folded_voxels(displacement: Tensor) -> list[int]:
    return (jacobian_determinant(displacement) <= 0).flatten(1).sum(1).tolist()


def objective(displacement: Tensor, start: Tensor, moving: Tensor, fixed: Tensor) -> Tensor:
    """What the steps lower, from its description alone: of every second voxel along each axis, two such lattices."""
    lattices = [(..., *[slice(first, None, 2)] * 3) for first in (0, 1)]
    warped = warp(moving, displacement)
    alike = torch.stack([local_information(fixed[each], warped[each]) for each in lattices]).mean(0)
    correction, whole = (field[lattices[0]] / 2 for field in (displacement - start, displacement))
    return 0.75 * diffusion(correction) + 100 * folding(whole, margin=0.1) - alike


@pytest.mark.parametrize("begun", [0.0, 0.6])
def test_a_known_shift_is_found_from_a_worse_start(begun: float) -> None:
    moving, true = texture(), shifted(1.0)
    fixed = warp(moving, true, padding="border")
    found = refine_displacement(shifted(begun), moving, fixed, steps=25)
    error = (found - true).norm(dim=1, keepdim=True)[INSIDE].mean()
    assert error < 0.3 * (1 - begun) + 0.03


def test_a_known_deformation_is_found_better_with_more_steps() -> None:
    moving, true = texture(seed=1), smooth_field(seed=2, reach=0.7)
    fixed = warp(moving, true, padding="border")
    errors = []
    for steps in (0, 5, 30):
        found = refine_displacement(torch.zeros_like(true), moving, fixed, steps=steps)
        errors.append(float((found - true)[INSIDE].norm(dim=1).mean()))
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.4 * errors[0]


@pytest.mark.parametrize("rate", [0.2, 3.0, 1000.0])
def test_no_pair_gets_worse_by_its_own_objective_or_folds_more(rate: float) -> None:
    """Also at rates that overshoot, and from a start that folds itself."""
    moving, fixed = texture(4, seed=3), texture(4, seed=4)
    start = torch.cat((smooth_field(2, seed=5), smooth_field(2, seed=6, reach=4.0, window=5)))
    before = folded_voxels(start)
    assert before[2] > 0
    found = refine_displacement(start, moving, fixed, steps=6, rate=rate)
    assert torch.isfinite(found).all()
    assert (objective(found, start, moving, fixed) <= objective(start, start, moving, fixed)).all()
    assert all(after <= allowed for after, allowed in zip(folded_voxels(found), before, strict=True))
    assert (found != start).any() == (rate < 10)


@pytest.mark.parametrize("shape", [(5, 4, 6), (4, 5, 5), (6, 7)])
def test_gradients_written_out_are_those_of_finite_differences(shape: tuple[int, ...]) -> None:
    coarse = tuple(-(-size // 2) for size in shape)
    raw = torch.rand(2, len(shape), *coarse, generator=torch.manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(refinement._smooth, raw)
    for lattice in refinement._lattices(len(shape), 2):
        seen = tuple(-(-(size - first) // 2) for size, first in zip(shape, lattice, strict=True))
        assert torch.autograd.gradcheck(lambda u, at=lattice, to=seen: refinement._between(u, at, to), raw)


def test_between_two_lattices_a_line_stays_a_line() -> None:
    shape = (6, 7, 9)
    line = identity(shape)
    for lattice in refinement._lattices(3, 2):
        seen = line[(..., *[slice(first, None, 2) for first in lattice])]
        found = refinement._between(line[..., ::2, ::2, ::2], lattice, seen.shape[2:])
        inner = (..., *[slice(0, (size - 1) // 2) for size in shape])
        torch.testing.assert_close(found[inner], seen[inner])


def counted_around(*places: slice) -> Tensor:
    """All that counts but a block: boolean (1, 1, *SHAPE)."""
    counted = torch.ones(1, 1, *SHAPE, dtype=torch.bool)
    counted[(..., *places)] = False
    return counted


@pytest.mark.parametrize("shape", [SHAPE, (3, *SHAPE[1:])])
def test_where_everything_counts_nothing_changes(shape: tuple[int, ...]) -> None:
    moving, fixed, start = texture(shape=shape), texture(seed=1, shape=shape), torch.zeros(1, 3, *shape)
    counted = torch.ones_like(moving, dtype=torch.bool)
    plain, masked = (refine_displacement(start, moving, fixed, steps=5, counted=each) for each in (None, counted))
    assert torch.equal(plain, masked)
    assert torch.equal(likeness(plain, moving, fixed), likeness(plain, moving, fixed, counted=counted))


def test_what_does_not_count_is_not_looked_at_and_does_not_pull() -> None:
    """A false block in the fixed image, which a mask leaves out, may be anything."""
    moving, true, block = texture(), shifted(1.0), (slice(8, 16), slice(10, 18), slice(6, 14))
    whole = warp(moving, true, padding="border")
    counted, false = counted_around(*block), [whole.clone() for _ in range(2)]
    for image, seed in zip(false, (5, 6), strict=True):
        image[(..., *block)] = 3 * texture(seed=seed)[(..., *block)]
    start = torch.zeros_like(true)
    plain, masked, other = (
        refine_displacement(start, moving, image, steps=25, counted=mask)
        for image, mask in ((false[0], None), (false[0], counted), (false[1], counted))
    )
    assert torch.equal(masked, other)
    assert likeness(masked, moving, false[0], counted=counted) == likeness(masked, moving, false[1], counted=counted)
    error, misled = ((found - true).norm(dim=1)[0][block].mean() for found in (masked, plain))
    assert error < 0.6 * misled
    assert likeness(masked, moving, false[0], counted=counted) > likeness(masked, moving, false[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_mask_that_is_not_boolean_is_refused(dtype: torch.dtype) -> None:
    image, start = texture(), torch.zeros(1, 3, *SHAPE)
    for counts in (partial(refine_displacement, steps=1), likeness):
        with pytest.raises(ValueError, match=f"type {dtype}; expected torch.bool"):
            counts(start, image, image, counted=torch.ones_like(image).to(dtype))


def test_a_window_counts_where_all_of_its_voxels_do() -> None:
    """Also those between the voxels of a lattice: of two of these along each axis, the voxel itself is the last."""
    out = torch.tensor([11, 12, 9])
    counted = torch.ones(1, 1, *SHAPE, dtype=torch.bool)
    counted[(0, 0, *out)] = False
    for lattice in refinement._lattices(3, 2):
        whole = refinement._whole(refinement._inner(counted), lattice, 2, 2)
        last = 2 * identity(whole.shape[2:]) + torch.tensor(lattice).view(1, 3, 1, 1, 1)
        behind = last - out.view(1, 3, 1, 1, 1)
        holds = ((behind >= 0) & (behind <= 2)).all(1, keepdim=True)
        assert holds.any()
        assert not whole[holds].any()
        assert whole[((behind < -1) | (behind > 3)).any(1, keepdim=True)].all()


def test_where_nothing_counts_a_pair_keeps_its_start_and_the_others_do_not_mind() -> None:
    moving, fixed = texture(2, seed=3), texture(2, seed=4)
    start = smooth_field(2, seed=6, reach=4.0, window=5)  # whose folds are something to mend
    counted = torch.cat([counted_around(slice(0)), counted_around(slice(None, None, 2))])
    found = refine_displacement(start, moving, fixed, steps=4, counted=counted)
    assert torch.equal(found[1], start[1])
    assert not torch.equal(found[:1], start[:1])
    assert torch.equal(found[:1], refine_displacement(start[:1], moving[:1], fixed[:1], steps=4))
    assert likeness(start, moving, fixed, counted=counted)[1] == 0


def test_an_empty_batch_stays_empty() -> None:
    assert refine_displacement(torch.zeros(0, 3, 8, 8, 8), *[torch.zeros(0, 1, 8, 8, 8)] * 2, steps=1).shape[0] == 0


def test_a_correction_that_folds_is_taken_back_there_alone() -> None:
    start = smooth_field(2, seed=7, reach=0.3)
    correction = 0.3 * smooth_field(2, seed=8)
    correction[0, 0, 10:13, 12:16, 8:12] += torch.tensor([3.0, 0.0, -3.0]).view(3, 1, 1)
    assert folded_voxels(start) == [0, 0]
    assert folded_voxels(start + correction)[0] > 0
    assert folded_voxels(start + correction)[1] == 0
    kept = refinement._without_folds(start, correction)
    assert folded_voxels(start + kept) == [0, 0]
    assert torch.equal(kept[1], correction[1])
    assert torch.equal(kept[0, :, :, -2:], correction[0, :, :, -2:])
    assert kept[0].norm() > 0.3 * correction[0].norm()


@pytest.mark.parametrize(
    ("shape", "place"), [((20, 20, 20), (0, 0, 10)), ((20, 20, 20), (0, 0, 0)), ((20, 20, 2), (10, 10, 1))]
)
def test_a_fold_at_the_border_or_among_few_slices_is_taken_back_alone(
    shape: tuple[int, ...], place: tuple[int, ...]
) -> None:
    start, correction = torch.zeros(1, 3, *shape), torch.full((1, 3, *shape), 0.3)
    correction[(0, slice(None), *place)] += 3.0
    assert folded_voxels(start + correction)[0] > 0
    kept = refinement._without_folds(start, correction)
    assert folded_voxels(start + kept) == [0]
    assert kept.abs().sum() > 0.4 * 0.3 * kept.numel()


@pytest.mark.parametrize("shape", [(41, 38, 45), (150, 131)])
def test_folds_are_taken_back_alike_everywhere_and_place_by_place(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.manual_seed(5)
    correction = 0.2 * torch.rand(2, len(shape), *shape, generator=generator)
    for place in (torch.rand(9, len(shape), generator=generator) * torch.tensor(shape)).long():
        correction[(0, 0, *place)] += 4.0
    start = torch.zeros_like(correction)
    assert folded_voxels(start + correction)[0] >= 9
    found = []
    for much in (0.0, 1.0):
        monkeypatch.setattr(refinement, "MUCH", much)
        found.append(refinement._without_folds(start, correction))
        assert folded_voxels(start + found[-1]) == [0, 0]
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)
    assert torch.equal(found[1][1], correction[1])
    assert (found[1][0] == correction[0]).float().mean() > 0.3


def test_what_no_round_mends_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refinement, "ROUNDS", 0)
    start, correction = torch.zeros(2, 3, *SHAPE), torch.zeros(2, 3, *SHAPE)
    correction[0, 0, 10] = 5.0
    correction[1, 0] = 0.5
    kept = refinement._without_folds(start, correction)
    assert not kept[0].any()
    assert torch.equal(kept[1], correction[1])


@pytest.mark.parametrize("contrast", ["inverted", "by parts"])
def test_images_of_different_contrast_are_brought_together(contrast: str) -> None:
    """Where few tissues meet, one image depends on the other linearly, whichever way."""
    moving, true = texture(), shifted(0.8)
    fixed = warp(moving, true, padding="border")
    fixed = 1 - fixed if contrast == "inverted" else (fixed - 0.5).abs()
    found = refine_displacement(torch.zeros_like(true), moving, fixed, steps=25)
    error = (found - true).norm(dim=1, keepdim=True)[INSIDE].mean()
    assert error < 0.4 * 0.8


@pytest.mark.parametrize("shape", [(8, 10, 12), (9, 7, 11), (4, 5, 6)])
def test_a_correction_is_linear_between_the_voxels_of_its_grid(shape: tuple[int, ...]) -> None:
    """An affine one is found exactly at every voxel but beyond the grid's last, which even sizes have."""
    empty, start = torch.zeros(1, 1, *shape), torch.zeros(1, 3, *shape)
    terms = refinement._Objective(start, empty, empty, 3, 1.0, 1.0, 0.1)
    matrix = torch.randn(3, 3, generator=torch.manual_seed(0))
    affine = torch.einsum("ij,bjxyz->bixyz", matrix, identity(shape))
    found = terms.complete(affine[..., ::2, ::2, ::2] / 2)
    known = (..., *(slice(0, 2 * ((size + 1) // 2) - 1) for size in shape))
    torch.testing.assert_close(found[known], affine[known])
    assert torch.isfinite(found).all()


def test_the_steps_see_the_whole_correction_lattice_by_lattice() -> None:
    """What a step sees at its lattice is what the finished correction has there."""
    moving, fixed, start = texture(2, seed=15), texture(2, seed=16), smooth_field(2, seed=17)
    terms = refinement._Objective(start, moving, fixed, 3, 0.0, 0.0, 0.1)
    coarse = 0.2 * torch.randn(2, 3, 12, 14, 10, generator=torch.manual_seed(18))
    steps = torch.stack([terms.step(coarse, number) for number in range(8)])
    warped = warp(moving, start + terms.complete(coarse))
    for seen, first in zip(steps, terms.lattices, strict=True):
        every = (..., *(slice(each, None, 2) for each in first))
        torch.testing.assert_close(-seen, local_information(fixed[every], warped[every]))
    torch.testing.assert_close(steps[:2].mean(0), terms.whole(terms.complete(coarse)))
    assert len({*terms.lattices}) == 8
    assert steps[:, 0].unique().numel() == 8
    torch.testing.assert_close(terms.step(coarse, 9), steps[1])


@pytest.mark.parametrize(("shape", "window", "seen"), [(SHAPE, 3, 2), (SHAPE, 5, 3), ((24, 28, 3), 3, 3)])
def test_a_lattice_sees_as_wide_a_window_as_all_voxels_would(shape: tuple[int, ...], window: int, seen: int) -> None:
    terms = refinement._Objective(torch.zeros(1, 3, *shape), *[texture(shape=shape)] * 2, window, 1.0, 1.0, 0.1)
    assert terms.window == seen


def test_likeness_is_that_of_every_second_voxel() -> None:
    moving, fixed, u = texture(2, seed=19), texture(2, seed=20), smooth_field(2, seed=21)
    some = (..., *[slice(None, None, 2)] * 3)
    torch.testing.assert_close(likeness(u, moving, fixed), local_ncc(fixed[some], warp(moving, u)[some], window=3))


def test_an_image_of_few_slices_is_finished_by_all_its_voxels() -> None:
    moving, true = texture(shape=(24, 28, 9))[..., 3:6], torch.zeros(1, 3, 24, 28, 3)
    true[:, 0] = 0.7
    fixed = warp(moving, true, padding="border")
    found = refine_displacement(torch.zeros_like(true), moving, fixed, steps=40)
    assert (found - true)[:, :, 5:-5, 5:-5].norm(dim=1).mean() < 0.4 * 0.7


def test_no_steps_are_exactly_nothing() -> None:
    start = smooth_field()
    assert torch.equal(refine_displacement(start, texture(), texture(seed=1), steps=0), start)


def test_a_batch_gives_each_pair_what_it_gets_alone() -> None:
    moving, fixed, start = texture(3, seed=9), texture(3, seed=10), smooth_field(3, seed=11)
    together = refine_displacement(start, moving, fixed, steps=4)
    for i in range(3):
        alone = refine_displacement(start[i : i + 1], moving[i : i + 1], fixed[i : i + 1], steps=4)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-4)


def test_a_pair_that_is_not_finite_keeps_its_start_and_disturbs_no_other() -> None:
    moving, fixed, start = texture(2, seed=12), texture(2, seed=13), smooth_field(2, seed=14)
    alone = refine_displacement(start[1:], moving[1:], fixed[1:], steps=3)
    moving[0, 0, 4, 4, 4] = float("nan")
    found = refine_displacement(start, moving, fixed, steps=3)
    assert torch.equal(found[0], start[0])
    torch.testing.assert_close(found[1:], alone, rtol=0, atol=1e-4)


def test_images_without_contrast_move_nothing() -> None:
    start, empty = smooth_field(reach=0.1), torch.zeros(1, 1, *SHAPE)
    assert torch.equal(refine_displacement(start, empty, empty, steps=3), start)


@pytest.mark.parametrize("inference", [False, True])
def test_inputs_are_untouched_and_no_gradient_leaves(inference: bool) -> None:
    with torch.inference_mode(inference):
        tensors = (smooth_field(), texture(), texture(seed=1))
        copies = [tensor.clone() for tensor in tensors]
        found = refine_displacement(*tensors, steps=2)
    assert not torch.equal(found, tensors[0])
    assert not found.requires_grad
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor.grad is None


def test_an_input_that_wants_a_gradient_gets_none() -> None:
    start = smooth_field().requires_grad_()
    for steps in (0, 2):
        assert not refine_displacement(start, texture(), texture(seed=1), steps=steps).requires_grad
    assert start.grad is None


def test_two_axes_and_other_precisions() -> None:
    moving, fixed = texture(shape=(40, 36, 9))[..., 4], texture(seed=1, shape=(40, 36, 9))[..., 4]
    start = torch.zeros(1, 2, 40, 36, dtype=torch.float64)
    found = refine_displacement(start, moving, fixed, steps=5)
    assert found.dtype == torch.float64
    assert local_ncc(fixed, warp(moving, found)) > local_ncc(fixed, moving)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": -1}, "steps=-1"),
        ({"window": 2}, "window=2; expected 3"),
        ({"moving": torch.zeros(1, 1, 8, 8, 8)}, r"moving has shape \(1, 1, 8, 8, 8\)"),
        ({"fixed": torch.zeros(1, 2, *SHAPE)}, r"fixed has shape \(1, 2, 24, 28, 20\)"),
        ({"displacement": torch.zeros(1, 2, *SHAPE)}, "displacement has shape"),
        ({"counted": torch.ones(1, 1, 8, 8, 8, dtype=torch.bool)}, r"counted has shape \(1, 1, 8, 8, 8\)"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], said: str) -> None:
    given = {"displacement": smooth_field(), "moving": texture(), "fixed": texture(), "steps": 1, **changes}
    with pytest.raises(ValueError, match=said):
        refine_displacement(**given)  # type: ignore[arg-type]


# --- the stage in the pipeline


@pytest.mark.parametrize("name", ["oblique", "flipped", "everything"])
def test_a_displacement_carried_to_another_grid_moves_the_same_places(name: str) -> None:
    """In mm, on the fixed grid, whether it is read from the network's grid or from the one it was carried to."""
    fixed = GRIDS[name]
    coarse = network_grid(fixed, (2.0, 2.0, 2.0), stride=4)
    own = network_grid(fixed, fixed.spacing.tolist(), stride=1)
    frame = Frame(fixed, fixed, coarse, np.eye(4))
    displacement = Frame(coarse, coarse, coarse, np.eye(4)).in_voxels(waves(coarse)).float()
    carried = frame.carry(displacement, own)
    assert carried.shape[2:] == own.shape
    again = Frame(fixed, fixed, own, np.eye(4)).deform(carried)
    difference = (again - frame.deform(displacement))[INSIDE].norm(dim=1)
    assert float(difference.max()) < 0.1
    assert float(difference.mean()) < 0.02


@pytest.fixture(scope="module")
def method() -> Method:
    return load("iirp")


@pytest.fixture(scope="module")
def phantom(small_phantom: Phantom) -> Phantom:
    return small_phantom


def test_refining_finds_more_of_a_known_deformation(phantom: Phantom, method: Method) -> None:
    scans = read_scans(phantom.fixed, phantom.moving, phantom.fixed_labels, phantom.moving_labels)
    plain, again, refined = (register(scans, method, init="none", refine=steps) for steps in (0, 0, 8))
    assert plain.refinement is None
    assert torch.equal(plain.displacement, again.displacement)
    assert recovered(phantom, refined)["recovered_percent"] > recovered(phantom, plain)["recovered_percent"] + 5
    assert refined.refinement is not None
    assert refined.refinement.local_ncc_after > refined.refinement.local_ncc_before
    assert list(refined.seconds) == ["start", "network", "check", "refine", "warp"]
    expected = warp_scan(scans.moving, refined.displacement, scans.fixed.grid)
    assert torch.equal(refined.warped, expected)


def test_a_coarse_network_is_refined_on_the_fixed_scans_own_voxels(method: Method) -> None:

    grid = make_grid((40, 36, 32), (0.9, 1.2, 1.0), axes=(2, 0, 1), signs=(-1, 1, -1))
    fixed, moving = (Scan(noise_image(grid.shape, seed), grid, Path(str(seed))) for seed in (1, 2))
    coarse = with_card(method, spacing=(2.0, 2.0, 2.0), minimum=(1, 1, 1))
    result = register(Scans(fixed, moving), coarse, init="none", refine=1)
    assert result.refinement is not None
    np.testing.assert_allclose(result.refinement.network.spacing, 2.0)
    np.testing.assert_allclose(result.frame.network.spacing, (1.2, 1.0, 0.9))
    assert sorted(result.frame.network.shape) == sorted(grid.shape)
    assert result.registration.displacement.shape[2:] == result.frame.network.shape


def test_a_card_says_how_many_steps_there_are_unless_they_are_asked_for(phantom: Phantom, method: Method) -> None:
    scans = read_scans(phantom.fixed, phantom.moving)
    card = with_card(method, refine=3)
    plain, by_card, asked, none = (
        register(scans, each, init="none", refine=steps)
        for each, steps in ((method, None), (card, None), (method, 3), (card, 0))
    )
    assert plain.refinement is none.refinement is None
    assert torch.equal(plain.displacement, none.displacement)
    assert by_card.refinement is not None
    assert by_card.refinement.steps == 3
    assert torch.equal(by_card.displacement, asked.displacement)
    assert not torch.equal(by_card.displacement, plain.displacement)


@pytest.mark.parametrize("steps", [-1, 2.5, "3", True, 10**7])
def test_a_card_with_no_number_of_steps_is_refused(phantom: Phantom, method: Method, steps: Any) -> None:
    damaged = with_card(method, refine=steps)
    with pytest.raises(InputError, match=f"refine {steps!r}: give"):
        register(read_scans(phantom.fixed, phantom.moving), damaged, init="none")


def test_the_brains_cards_ask_for_steps_and_the_hippocampus_for_none() -> None:
    for bundle in ("iirp", "ipear"):
        cards = find(bundle).weights
        assert cards["brain"].refine == cards["brain_any"].refine == 40
        assert cards["hippocampus"].refine == 0


def test_register_refines_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, phantom: Phantom) -> None:
    output = tmp_path / "out"
    pair = ["--fixed", str(phantom.fixed), "--moving", str(phantom.moving), "--output", str(output)]
    assert run(monkeypatch, "register", *pair, "--bundle", "iirp", "--init", "none", "--refine", "4", "--inverse") == 0
    report = json.loads((output / "report.json").read_text("utf-8"))
    assert report["refinement"]["steps"] == 4
    assert report["refinement"]["local_ncc_after"] > report["refinement"]["local_ncc_before"]
    assert report["refinement"]["shape"] == [36, 44, 36]
    assert report["refinement"]["spacing_mm"] == [1, 1, 1]
    assert report["seconds"]["refine"] > 0
    assert report["inverse_error_mean_mm"] < 0.05
    # The files hold the refined field, and the inverse is of that.
    fixed, moving = (sitk.ReadImage(str(path), sitk.sitkFloat32) for path in (phantom.fixed, phantom.moving))
    forward, backward = (sitk.ReadTransform(str(output / f"{way}transform.h5")) for way in ("", "inverse_"))
    warped = sitk.ReadImage(str(output / "warped.nii.gz"), sitk.sitkFloat32)
    difference = sitk.GetArrayFromImage(warped - sitk.Resample(moving, fixed, forward))
    assert np.abs(difference).max() < 1e-3 * np.ptp(sitk.GetArrayFromImage(moving))
    places = np.random.default_rng(0).uniform(-20, 20, (200, 3))
    again = move_all(forward, move_all(backward, places))
    assert np.linalg.norm(again - places, axis=1).mean() < 0.05


def test_evaluate_measures_the_refined_pair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, phantom: Phantom) -> None:
    table = tmp_path / "pairs.csv"
    paths = (phantom.fixed, phantom.moving, phantom.fixed_labels, phantom.moving_labels)
    table.write_text("fixed,moving,fixed_labels,moving_labels\n" + ",".join(map(str, paths)) + "\n")
    found = {}
    for steps in ("0", "3"):
        output = tmp_path / steps
        arguments = ["--pairs", str(table), "--bundle", "iirp", "--output", str(output), "--refine", steps]
        assert run(monkeypatch, "evaluate", *arguments, "--init", "none", "--plots", "false") == 0
        assert json.loads((output / "summary.json").read_text("utf-8"))["methods"][0]["refine"] == int(steps)
        (row,) = csv.DictReader((output / "metrics.csv").open(encoding="utf-8"))
        found[steps] = float(row["ncc_after"])
    assert found["3"] > found["0"]


@pytest.mark.parametrize("steps", ["-1", "2.5", "many", "True"])
@pytest.mark.parametrize("command", ["register", "evaluate"])
def test_what_is_no_number_of_steps_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    phantom: Phantom,
    command: str,
    steps: str,
) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text(f"fixed,moving\n{phantom.fixed},{phantom.moving}\n")
    given = {
        "register": ["--fixed", str(phantom.fixed), "--moving", str(phantom.moving)],
        "evaluate": ["--pairs", str(table), "--bundle", "iirp"],
    }[command]
    assert run(monkeypatch, command, *given, "--output", str(tmp_path / "out"), "--refine", steps) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert f"refine {steps.strip()}" in error.replace("'", "")
    assert "whole number" in error
    assert not (tmp_path / "out").exists()


def test_steps_are_checked_before_anything_is_measured(method: Method, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="refine -3: give a whole number"):
        evaluate([], [method], tmp_path, refine=-3)
