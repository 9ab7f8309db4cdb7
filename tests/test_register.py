"""Scans in, files out: what is written, read by SimpleITK alone, gives back what was promised."""

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.spatial.transform import Rotation

from cards import with_card
from geometry import GRIDS, apply_world, draw_head, from_image, move_all, to_image, world_points
from iregzoo.errors import InputError
from iregzoo.iteration import TCI, FixedIterations, IterStop, Verdict
from iregzoo.networks import IIRPNet
from iregzoo.quality import compare, doubts, figures, labels_of
from iregzoo.register import Result, Scans, read_scans, register
from iregzoo.registration import PairNetwork
from iregzoo.results import FILES, provenance, write
from iregzoo.space.files import affine_transform
from iregzoo.space.grid import Grid, Matrix
from iregzoo.space.scan import Scan
from iregzoo.steering import choose_controller, gradient_steps
from iregzoo.zoo import Bundle, Method, Weights, WeightsCard

SIZE = 0.16  # of the phantom's head, to fit 24×32×28 mm
MOVED = np.eye(4)
MOVED[:3, :3] = Rotation.from_euler("xyz", (6, -4, 8), degrees=True).as_matrix() * 1.04
MOVED[:3, 3] = (2.0, -1.5, 1.0)
RANGE_TOLERANCE = 1e-4  # of the intensity range


@cache
def method(spacing: float = 1.0) -> Method:
    """A small network of random weights whose coarse levels move by some voxels: a smooth field that is not zero."""
    torch.manual_seed(0)
    network = IIRPNet(channels=(4, 8, 8), widths=(8, 8, 8), controller=FixedIterations(2))
    with torch.no_grad():
        for level, factor in enumerate((0.0, 3.0, 6.0)):
            for parameter in network.estimators[level][-1].parameters():
                parameter.mul_(factor)
    network.eval().requires_grad_(False)
    weights = Weights("random", WeightsCard(file="", init="none", spacing=(spacing,) * 3), Path("random.pt"), "")
    return Method(Bundle(Path("random"), {"version": "0"}), weights, PairNetwork(network))


@pytest.fixture(autouse=True)
def _what_a_random_network_gives_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it makes the scans more alike or not; tests/test_align.py has what is left out."""
    monkeypatch.setattr("iregzoo.necessity.Trial.needless", None)


def labels_on(grid: Grid, to_head: Matrix | None = None) -> torch.Tensor:
    image = draw_head(grid, to_head, size=SIZE)
    return (image > 300).int() + (image > 700).int()


def store(folder: Path, name: str, grid: Grid, to_head: Matrix | None = None) -> None:
    sitk.WriteImage(to_image(draw_head(grid, to_head, size=SIZE), grid), str(folder / f"{name}.nii.gz"))
    sitk.WriteImage(to_image(labels_on(grid, to_head), grid), str(folder / f"{name}_labels.nii.gz"))


@dataclass(frozen=True)
class Run:
    scans: Scans
    result: Result
    report: dict[str, Any]
    folder: Path

    def image(self, name: str) -> sitk.Image:
        return sitk.ReadImage(str(self.folder / name))

    def transform(self, name: str) -> sitk.Transform:
        return sitk.ReadTransform(str(self.folder / name))

    def field(self, name: str) -> sitk.Transform:
        return sitk.DisplacementFieldTransform(sitk.Cast(self.image(name), sitk.sitkVectorFloat64))


def run(folder: Path, fixed: Grid, moving: Grid, init: str, *, spacing: float = 1.0, **options: bool) -> Run:
    """Write a pair, register it and write the results, by files alone."""
    store(folder, "fixed", fixed)
    store(folder, "moving", moving, np.linalg.inv(MOVED))
    scans = read_scans(*(folder / f"{name}.nii.gz" for name in ("fixed", "moving", "fixed_labels", "moving_labels")))
    chosen = method(spacing)
    result = register(scans, chosen, init=init)
    (folder / "out").mkdir()
    report = write(result, folder / "out", provenance(chosen), **options)
    return Run(scans, result, report, folder / "out")


def around(grid: Grid, place: tuple[float, float, float] = (0, 0, 0)) -> Grid:
    affine = grid.affine.copy()
    affine[:3, 3] += np.array(place) - grid.centre
    return replace(grid, affine=affine)


def resampled(
    scan: Scan, reference: sitk.Image, transform: sitk.Transform, mode: int = sitk.sitkLinear
) -> torch.Tensor:
    image = sitk.ReadImage(str(scan.path))
    return from_image(sitk.Resample(image, reference, transform, mode, scan.outside))


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max()) / float(expected.max() - expected.min())


PAIRS = [
    ("plain", "plain", "none"),
    ("oblique", "anisotropic", "center"),
    ("anisotropic", "flipped", "affine"),
    ("flipped", "oblique", "none"),
    ("everything", "everything", "center"),
    ("oblique", "everything", "affine"),
]


@pytest.mark.parametrize(("fixed", "moving", "init"), PAIRS)
def test_itk_gets_the_warped_scan_from_the_transform_alone(tmp_path: Path, fixed: str, moving: str, init: str) -> None:
    # Fields of view that do not agree: with none of the starts is everything inside the other image.
    done = run(tmp_path, around(GRIDS[fixed]), around(GRIDS[moving], (4, -3, 2)), init)
    moved = done.result.deformation.norm(dim=1)
    assert float(moved.median()) > 0.3
    warped = done.image("warped.nii.gz")
    assert done.scans.fixed.grid.matches(Grid.of(warped))
    for name, transform in (
        ("transform.h5", done.transform("transform.h5")),
        ("displacement.nii.gz", done.field("displacement.nii.gz")),
    ):
        difference = largest_difference(resampled(done.scans.moving, warped, transform), from_image(warped))
        print(f"{fixed} <- {moving}, {init}: {name} and warped.nii.gz differ by at most {difference:.1e} of the range")
        assert difference < RANGE_TOLERANCE
        assert done.scans.moving_labels is not None
        labels = resampled(done.scans.moving_labels, warped, transform, sitk.sitkNearestNeighbor)
        assert len(labels.unique()) == 3
        assert (labels != from_image(done.image("warped_labels.nii.gz"))).float().mean() < 1e-3


@pytest.mark.parametrize(
    ("fixed", "moving", "init"), [("oblique", "everything", "affine"), ("flipped", "plain", "none")]
)
def test_inverse_files_go_the_other_way(tmp_path: Path, fixed: str, moving: str, init: str) -> None:
    done = run(tmp_path, around(GRIDS[fixed]), around(GRIDS[moving], (2, -1, 2)), init, inverse=True)
    warped = done.image("inverse_warped.nii.gz")
    assert done.scans.moving.grid.matches(Grid.of(warped))
    backward = done.transform("inverse_transform.h5")
    for transform in (backward, done.field("inverse_displacement.nii.gz")):
        difference = largest_difference(resampled(done.scans.fixed, warped, transform), from_image(warped))
        print(f"{fixed} -> {moving}, {init}: inverse differs by at most {difference:.1e} of the range")
        assert difference < RANGE_TOLERANCE
    assert done.scans.fixed_labels is not None
    labels = resampled(done.scans.fixed_labels, warped, backward, sitk.sitkNearestNeighbor)
    assert (labels != from_image(done.image("inverse_warped_labels.nii.gz"))).float().mean() < 1e-3
    # There and back again, for places of the head, well inside both fields of view.
    places = apply_world(MOVED, np.random.default_rng(0).uniform(-6, 6, (300, 3)))
    again = move_all(done.transform("transform.h5"), move_all(backward, places))
    error = np.linalg.norm(again - places, axis=1)
    print(f"forward after backward: {error.mean():.4f} mm on average, at most {error.max():.4f} mm")
    assert error.mean() < 0.05
    assert done.report["inverse_error_mean_mm"] < 0.1


@pytest.mark.parametrize(
    ("fixed", "moving", "init"), [("oblique", "everything", "affine"), ("flipped", "anisotropic", "none")]
)
def test_jacobian_files_tell_the_change_of_volume_that_itk_finds(
    tmp_path: Path, fixed: str, moving: str, init: str
) -> None:
    done = run(tmp_path, around(GRIDS[fixed]), around(GRIDS[moving], (2, -1, 2)), init, inverse=True, jacobian=True)
    changes = {}
    for way in ("", "inverse_"):
        image, transform = done.image(f"{way}jacobian.nii.gz"), done.transform(f"{way}transform.h5")
        grid = Grid.of(image)
        index = np.stack([np.random.default_rng(3).integers(2, size - 2, 100) for size in grid.shape], axis=1)
        sides = [
            move_all(transform, apply_world(grid.affine, index + step))
            - move_all(transform, apply_world(grid.affine, index - step))
            for step in np.eye(3)
        ]
        change = np.linalg.det(np.stack(sides, axis=2) / 2) / np.linalg.det(grid.affine[:3, :3])
        affine = float(np.linalg.det(np.array(done.report["affine_lps_mm"])[:3, :3])) ** (-1 if way else 1)
        changes[way] = from_image(image)[0, 0].numpy()[tuple(index.T)]
        np.testing.assert_allclose(changes[way] * affine, change, rtol=1e-3, atol=1e-3)
        assert change.std() > 0.02
    assert float(changes[""].min()) > 0


STORED = {
    "permuted": {"axes": (2, 0, 1), "signs": (1, 1, 1)},
    "flipped": {"axes": (0, 1, 2), "signs": (-1, 1, -1)},
    "both": {"axes": (1, 2, 0), "signs": (-1, -1, -1)},
}


def stored_otherwise(scan: Scan, axes: tuple[int, int, int], signs: tuple[int, int, int]) -> Scan:
    """The same scan, its voxels in the same places, with its array's axes in another order and direction."""
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for axis, (source, sign) in enumerate(zip(axes, signs, strict=True)):
        matrix[source, axis] = sign
        matrix[source, 3] = 0 if sign > 0 else scan.grid.shape[source] - 1
    data = scan.data[0, 0].permute(axes).flip([axis for axis in range(3) if signs[axis] < 0])
    x, y, z = data.shape
    return Scan(data[None, None].contiguous(), Grid((x, y, z), scan.grid.affine @ matrix), scan.path)


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
@pytest.mark.parametrize("init", ["none", "center"])
def test_order_and_direction_of_stored_axes_change_nothing(stored: dict[str, Any], init: str) -> None:
    fixed_grid, moving_grid = around(GRIDS["oblique"]), around(GRIDS["anisotropic"], (1, 2, -1))
    fixed = Scan(draw_head(fixed_grid, size=SIZE), fixed_grid, Path("fixed"))
    moving = Scan(draw_head(moving_grid, np.linalg.inv(MOVED), size=SIZE), moving_grid, Path("moving"))
    expected = register(Scans(fixed, moving), method(), init=init)
    turned_fixed, turned_moving = stored_otherwise(fixed, **stored), stored_otherwise(moving, **stored)
    # The same places have the same values, to begin with.
    place = world_points(turned_fixed.grid)[1, 2, 3]
    index = np.rint(np.linalg.inv(fixed_grid.affine)[:3] @ [*place, 1]).astype(int)
    assert turned_fixed.data[0, 0, 1, 2, 3] == fixed.data[0, 0, index[0], index[1], index[2]]
    for pair in (Scans(turned_fixed, moving), Scans(fixed, turned_moving), Scans(turned_fixed, turned_moving)):
        found = register(pair, method(), init=init)
        warped, displacement = found.warped, found.displacement
        if pair.fixed is turned_fixed:
            reference = stored_otherwise(Scan(expected.warped, fixed_grid, Path()), **stored).data
            vectors = [
                stored_otherwise(Scan(expected.displacement[:, i : i + 1], fixed_grid, Path()), **stored).data
                for i in range(3)
            ]
            expected_displacement = torch.cat(vectors, dim=1)
        else:
            reference, expected_displacement = expected.warped, expected.displacement
        assert largest_difference(warped, reference) < 1e-3
        torch.testing.assert_close(displacement, expected_displacement, rtol=0, atol=2e-3)


REPORTED = {
    *(
        "iregzoo",
        "bundle",
        "bundle_version",
        "weights",
        "weights_sha256",
        "device",
        "precision",
        "fixed",
        "moving",
        "init",
    ),
    *("affine_lps_mm", "network_shape", "network_spacing_mm", "seconds", "bytes", "iterations", "scores"),
    *("ncc_before", "ncc_start", "ncc_after", "mse_before", "mse_start", "mse_after"),
    *("folding_percent", "near_singular_percent", "sdlogj", "displacement_mean_mm", "displacement_max_mm", "warnings"),
    *("dice_before", "dice_before_mean", "dice", "dice_mean"),
    *("inverse", "inverse_error_mean_mm", "inverse_error_max_mm"),
}


def test_folder_holds_every_file_and_the_report_every_figure(tmp_path: Path) -> None:
    done = run(tmp_path, GRIDS["plain"], GRIDS["plain"], "affine", inverse=True, jacobian=True)
    assert {path.name for path in done.folder.iterdir()} == set(FILES)
    assert (done.folder / "report.png").read_bytes().startswith(b"\x89PNG")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    report = json.loads((done.folder / "report.json").read_text("utf-8"), parse_constant=refuse)
    assert report == json.loads(json.dumps(done.report))
    assert report["ncc_after"] < report["ncc_before"]  # by a random network; where it falls, the information is told
    assert set(report) == REPORTED | {"mutual_information"}
    assert set(report["seconds"]) == {"start", "network", "check", "warp", "write", "inverse", "report"}
    assert set(report["dice"]) == {"1", "2"}
    assert report["iterations"] == [2, 2, 2]
    assert report["init"] == "affine"
    np.testing.assert_allclose(report["affine_lps_mm"], done.result.frame.start)
    assert report["ncc_start"] > report["ncc_before"]
    values = [value for value in report.values() if isinstance(value, float)]
    assert len(values) > 10
    assert all(math.isfinite(value) for value in values)


def test_what_was_not_asked_for_is_not_written(tmp_path: Path) -> None:
    for name, grid in (("fixed", GRIDS["plain"]), ("moving", GRIDS["oblique"])):
        store(tmp_path, name, around(grid))
    scans = read_scans(tmp_path / "fixed.nii.gz", tmp_path / "moving.nii.gz")
    (tmp_path / "out").mkdir()
    report = write(register(scans, method()), tmp_path / "out", provenance(method()))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("warped.nii.gz", "displacement.nii.gz", "transform.h5", "report.json", "report.png", "report.html")
    }
    assert not [key for key in report if key.startswith(("dice", "inverse"))]


def pair(fixed_labels: torch.Tensor | None = None, moving_labels: torch.Tensor | None = None) -> Scans:
    grid = GRIDS["plain"]
    fixed = Scan(draw_head(grid, size=SIZE), grid, Path("fixed"))
    moving = Scan(draw_head(grid, np.linalg.inv(MOVED), size=SIZE), grid, Path("moving"))
    maps = [None if data is None else Scan(data, grid, Path("labels")) for data in (fixed_labels, moving_labels)]
    return Scans(fixed, moving, *maps)


def test_empty_and_foreign_label_maps_give_figures_without_nan() -> None:
    drawn = labels_on(GRIDS["plain"])
    empty = torch.zeros_like(drawn)
    corner = empty.clone()
    corner[0, 0, 0, 0, 0] = 9  # moves out of the field of view
    result = register(pair(drawn, drawn), method())
    images = compare(result)
    for fixed, moving in ((empty, empty), (empty, drawn), (drawn, empty), (drawn, drawn + corner), (empty, corner)):
        scans = pair(fixed, moving)
        assert scans.moving_labels is not None
        warped = result.warped_labels if moving is drawn else torch.zeros_like(moving)
        found = figures(replace(result, scans=scans, warped_labels=warped), images)
        json.dumps(found, allow_nan=False)
        assert ("dice" in found) == bool(fixed.any() and moving.any())
        apart = {"fixed": fixed, "moving": moving}
        expected = {name: labels_of(each) for name, each in apart.items() if each.any()} if "dice" not in found else {}
        assert found.get("labels_unpaired", {}) == ({"moving": [9]} if (moving == 9).any() else expected)
    assert found["labels_lost"] == [9]
    assert "labels_lost" not in figures(result, images)


def test_dice_is_of_the_labels_that_both_scans_have_whatever_is_left_of_them() -> None:
    """A label of one scan alone never counts, whether something of it is left or nothing; a lost one counts 0."""
    drawn = labels_on(GRIDS["plain"])
    more = drawn.clone()
    more[..., :3, :3, :3] = 7
    result = register(pair(drawn, more), method())
    images = compare(result)
    warped = torch.where(drawn == 2, 0, drawn)
    for left in (warped, torch.where(more == 7, more, warped)):
        found = figures(replace(result, warped_labels=left), images)
        assert found["dice"] == {1: 1.0, 2: 0.0}
        assert found["dice_before"] == {1: 1.0, 2: 1.0}
        assert found["dice_mean"] == 0.5
        assert found["labels_unpaired"] == {"moving": [7]}
        assert "labels_unpaired" not in doubts(found)
    apart = figures(replace(result, scans=pair(drawn, torch.where(drawn > 0, drawn + 4, 0))), images)
    said = "the label maps share no label (fixed: 1, 2; moving: 5, 6), so there is no Dice"
    assert doubts(apart)["dice_missing"] == said
    nothing = figures(replace(result, scans=pair(drawn, 0 * drawn), warped_labels=0 * drawn), images)
    assert doubts(nothing)["dice_missing"] == "the moving scan's label map is empty, so there is no Dice"


def test_dice_is_that_of_the_warped_labels() -> None:
    drawn = labels_on(GRIDS["plain"])
    result = register(pair(drawn, labels_on(GRIDS["plain"], np.linalg.inv(MOVED))), method())
    found = figures(result, compare(result))
    assert result.warped_labels is not None
    for label in (1, 2):
        ours, theirs = result.warped_labels == label, drawn == label
        expected = 2 * float((ours & theirs).sum()) / float(ours.sum() + theirs.sum())
        assert found["dice"][label] == pytest.approx(expected, abs=1e-6)
    assert found["dice_mean"] == pytest.approx((found["dice"][1] + found["dice"][2]) / 2)


def test_labels_are_those_of_any_map_without_background() -> None:
    assert labels_of(torch.tensor([0, 3, 3]), torch.tensor([7, 0, -1])) == [-1, 3, 7]


def test_identical_scans_differ_by_nothing_before() -> None:
    scan = pair().fixed
    result = register(Scans(scan, scan), method())
    found = figures(result, compare(result))
    assert found["ncc_before"] == pytest.approx(1, abs=1e-3)
    assert found["mse_before"] == pytest.approx(0, abs=1e-10)
    assert found["ncc_after"] < 0.99


def test_stages_are_announced_and_timed() -> None:
    told: list[str] = []
    result = register(pair(), method(), progress=told.append)
    assert told == list(result.seconds) == ["start", "network", "check", "warp"]


def test_init_auto_is_what_the_weights_card_says() -> None:
    chosen = with_card(method(), init="center")
    scans = pair()
    elsewhere = replace(scans.moving, grid=around(scans.moving.grid, (50, 0, 0)))
    result = register(replace(scans, moving=elsewhere), chosen)
    assert result.init == "center"
    np.testing.assert_allclose(result.frame.start[:3, 3], (50, 0, 0), atol=1e-9)


def test_a_matrix_may_be_the_start() -> None:
    scans = pair()
    result = register(scans, method(), init=MOVED)
    assert result.init == "given"
    assert np.array_equal(result.frame.start, MOVED)
    unmoved = register(scans, method(), init=np.eye(4))
    assert torch.equal(unmoved.displacement, register(scans, method(), init="none").displacement)


def test_a_file_may_be_the_start(tmp_path: Path) -> None:
    file = tmp_path / "start.tfm"
    sitk.WriteTransform(affine_transform(MOVED), str(file))
    for init in (file, str(file)):
        result = register(pair(), method(), init=init)
        assert result.init == "given"
        np.testing.assert_allclose(result.frame.start, MOVED, atol=1e-12)
    with pytest.raises(InputError, match=r"init 'sideways' is unknown; choose auto, .*a transform file"):
        register(pair(), method(), init="sideways")


def test_a_result_may_take_part_in_the_callers_gradients() -> None:
    result = register(pair(), method(), refine=1)
    weight = torch.ones(1, requires_grad=True)
    for tensor in (result.warped, result.displacement, result.deformation, result.registration.displacement):
        assert not tensor.is_inference()
        assert not tensor.requires_grad
        (tensor * weight).square().sum().backward()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("wrong", ["tci", TCI])
def test_a_controller_is_an_object(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"such as TCI\(\), IterStop\(\) or FixedIterations"):
        register(pair(), method(), controller=wrong)


def test_a_controller_without_a_cap_keeps_its_own_end() -> None:
    class Own:
        max_iterations, compares_start, keeps_best = 2, False, False

        def score(self, warped: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(warped))

        def judge(self, scores: torch.Tensor, start: torch.Tensor | None) -> Verdict:
            return Verdict(scores[-1] == 0, scores[-1] != 0)

    own = Own()
    assert choose_controller("auto", None, own) is own
    assert choose_controller("tci", 3, own) == TCI(max_iterations=3)
    with pytest.raises(InputError, match="this bundle's own controller does not support max-iterations"):
        choose_controller("auto", 3, own)


def test_a_folder_is_made_for_the_files(tmp_path: Path) -> None:
    write(register(pair(), method()), str(tmp_path / "new" / "result"), provenance(method()))
    assert (tmp_path / "new" / "result" / "report.json").is_file()


def test_damaged_weights_are_named() -> None:
    damaged = IIRPNet(channels=(4, 8), widths=(8, 8), controller=FixedIterations())
    with torch.no_grad():
        damaged.estimators[0][-1].bias.fill_(float("nan"))
    with pytest.raises(InputError, match="displacement that is not finite"):
        register(pair(), replace(method(), network=PairNetwork(damaged.eval())))


def test_controller_is_the_one_that_was_asked_for() -> None:
    own = TCI(window=7, max_iterations=11)
    assert choose_controller("auto", None, own) is own
    assert choose_controller("auto", 3, own) == replace(own, max_iterations=3)
    assert isinstance(choose_controller("iterstop", None, own), IterStop)
    assert choose_controller("fixed", 4, own) == FixedIterations(4)
    with pytest.raises(InputError, match=r"controller 'never' is unknown; choose auto, tci, iterstop, fixed"):
        choose_controller("never", None, own)
    for cap in (0, -1, 2.5, True, "3"):
        for one in (own, None):
            with pytest.raises(InputError, match=rf"max-iterations {cap!r}: give a whole number of at least 1"):
                choose_controller("tci", cap, one)


def test_counts_that_would_never_end_are_refused() -> None:
    assert choose_controller("fixed", 100, TCI()) == FixedIterations(100)
    card = method().card
    assert gradient_steps(1000, card) == 1000
    for own in (TCI(), None):
        with pytest.raises(InputError, match="max-iterations 101: give at most 100"):
            choose_controller("fixed", 101, own)
    with pytest.raises(InputError, match="refine 10000000: give at most 1000"):
        gradient_steps(10_000_000, card)
    with pytest.raises(InputError, match="refine 1001: give at most 1000"):
        register(pair(), method(), refine=1001)


def test_method_of_one_pass_takes_no_controller_that_iterates() -> None:
    assert choose_controller("auto", None, None) is None
    assert choose_controller("fixed", 1, None) is None
    for name, cap, asked in (("tci", None, "controller 'tci'"), ("auto", 2, "max-iterations 2")):
        with pytest.raises(InputError, match=rf"{asked}: .*runs a single pass"):
            choose_controller(name, cap, None)


@pytest.mark.parametrize("way", [1, -1])
def test_real_scans_make_the_round_trip(tmp_path: Path, test_data: Path, way: int) -> None:
    paths = []
    for name in ("t1_brain_a", "t1_brain_b"):
        image = sitk.ReadImage(str(test_data / "scans" / f"{name}.nii.gz"), sitk.sitkFloat32)
        paths.append(tmp_path / f"{name}.nii.gz")
        sitk.WriteImage(sitk.BinShrink(image, [4, 4, 4]), str(paths[-1]))
    scans = read_scans(*paths[::way])
    chosen = method(4.0)
    result = register(scans, chosen, init="affine")
    (tmp_path / "out").mkdir()
    report = write(result, tmp_path / "out", provenance(chosen), inverse=True)
    assert report["ncc_start"] > 0.8
    for name, scan in (("", scans.moving), ("inverse_", scans.fixed)):
        warped = sitk.ReadImage(str(tmp_path / "out" / f"{name}warped.nii.gz"))
        transform = sitk.ReadTransform(str(tmp_path / "out" / f"{name}transform.h5"))
        difference = largest_difference(resampled(scan, warped, transform), from_image(warped))
        print(f"{name}transform.h5 and {name}warped.nii.gz differ by at most {difference:.1e} of the range")
        assert difference < RANGE_TOLERANCE


def test_correlation_alone_says_nothing_across_contrasts(tmp_path: Path) -> None:
    """Of a head and the same one inverted, but for the air, NCC falls where one comes to lie on the other."""
    store(tmp_path, "head", around(GRIDS["oblique"]))
    scans = read_scans(tmp_path / "head.nii.gz", tmp_path / "head.nii.gz")
    result = register(scans, method())
    images = compare(result)
    head = images.fixed
    inverted, off = torch.where(head > 0.1, 1.1 - head, 0), head.roll(2, 2)
    torch.manual_seed(0)
    for after, less in ((inverted, False), (torch.rand_like(head), True)):
        found = figures(result, replace(images, before=off, start=off, after=after))
        assert found["ncc_after"] < found["ncc_before"] - 0.1
        assert found["mutual_information"].keys() == {"before", "start", "after"}
        assert ("the images are less similar than before" in found["warnings"]) == less
        assert less or "ncc_after" not in doubts(found)
    assert "mutual_information" not in figures(result, replace(images, before=inverted, start=inverted, after=head))


@pytest.mark.parametrize("swapped", ["fixed", "moving"])
def test_label_map_in_the_place_of_a_scan_is_refused(tmp_path: Path, swapped: str) -> None:
    for name in ("fixed", "moving"):
        store(tmp_path, name, around(GRIDS["oblique"]))
    paths = {name: tmp_path / f"{name}{'_labels' * (name == swapped)}.nii.gz" for name in ("fixed", "moving")}
    with pytest.raises(InputError, match=rf"{swapped}_labels.nii.gz: looks like a label map"):
        read_scans(**paths)
    # Two maps of tissue may be registered to each other.
    both = read_scans(tmp_path / "fixed_labels.nii.gz", tmp_path / "moving_labels.nii.gz")
    assert both.fixed.data.unique().tolist() == [0, 1, 2]


def test_doubts_are_said() -> None:
    fine = {"ncc_before": 0.5, "ncc_start": 0.6, "ncc_after": 0.9, "folding_percent": 0.0, "near_singular_percent": 1.0}
    assert doubts(fine) == {}
    assert "less similar" in doubts({**fine, "ncc_after": 0.55})["ncc_after"]
    less = {**fine, "ncc_after": 0.45, "mutual_information": {"before": 0.2, "start": 0.4, "after": 0.3}}
    assert doubts(less)["ncc_after"] == "the images are less similar than at the affine start"
    less["mutual_information"]["before"] = 0.31
    assert doubts(less)["ncc_after"] == "the images are less similar than before"
    less["mutual_information"]["after"] = 0.41
    assert doubts(less) == doubts({**less, "ncc_after": -0.4}) == {}
    assert "still dissimilar" in doubts({**fine, "ncc_before": 0.0, "ncc_start": 0.1, "ncc_after": 0.2})["ncc_after"]
    assert doubts({**fine, "shared_information": 0.31}) == {}
    unlike = {**fine, "ncc_before": 0.0, "ncc_start": 0.05, "ncc_after": 0.2}  # one person in two contrasts
    assert doubts({**unlike, "shared_information": 0.31}) == {}
    assert {"ncc_after", "ncc_start"} < doubts({**unlike, "shared_information": 0.12}).keys()
    assert "too little of each other for one person's (0.12 of" in str(doubts({**fine, "shared_information": 0.12}))
    bad_start = doubts({**fine, "ncc_before": -0.1, "ncc_start": -0.014})
    assert "were hardly similar before the deformation (NCC -0.01)" in bad_start["ncc_start"]
    assert "folds in 2.0 %" in doubts({**fine, "folding_percent": 2.0})["folding_percent"]
    assert "shrinks 9.0 %" in doubts({**fine, "near_singular_percent": 9.0})["near_singular_percent"]
    assert "not left on the fixed scan's grid: 4, 7" in doubts({**fine, "labels_lost": [4, 7]})["labels_lost"]
    assert doubts({**fine, "header_doubts": ["a: its sform"]}) == {"header_0": "a: its sform"}
    assert "no label overlaps" in doubts({**fine, "dice_mean": 0.0})["dice_mean"]
    assert doubts({**fine, "field_size": 6.0}) == {}
    assert (
        "cover 24 times the volume that these weights were made for"
        in doubts({**fine, "field_size": 24.1})["field_size"]
    )


def test_scans_far_larger_than_what_weights_were_made_for_are_doubted() -> None:
    made, found = method(), {}
    for size in (8, 24, 48):
        chosen = with_card(made, minimum=(size, size, size), spacing=(1.0, 1.0, 1.0))
        result = register(pair(), chosen)
        volume = np.prod(np.array(result.frame.network.shape) * result.frame.network.spacing)
        found[size] = figures(result, compare(result))
        assert found[size]["field_size"] == pytest.approx(volume / size**3, rel=0.01)
    assert any("times the volume" in each for each in found[8]["warnings"])
    assert not any("times the volume" in each for each in found[48]["warnings"])
    # A file of one's own has no such size, and a refinement's own grid is not the network's.
    own, refined = register(pair(), made), register(pair(), chosen, refine=1)
    assert "field_size" not in figures(own, compare(own))
    assert figures(refined, compare(refined))["field_size"] == found[48]["field_size"]


def test_a_squashed_volume_is_counted() -> None:
    """det J of 0.05 in half of the grid: no fold, but near-singular."""
    result = register(pair(), method())
    images = compare(result)
    half = torch.ones_like(images.determinant)
    half[:, : half.shape[1] // 2] = 0.05
    found = figures(result, replace(images, determinant=half))
    assert found["folding_percent"] == 0
    assert found["near_singular_percent"] == pytest.approx(100 * (half.shape[1] // 2) / half.shape[1], abs=1e-3)
