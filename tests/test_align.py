"""Scans of one person on two days: aligned without a deformation, or registered without the one they do not need."""

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from cards import with_card
from finders import Says, Sees
from geometry import Array, from_image, move_all, world_points
from iregzoo import align as alignment
from iregzoo import zoo
from iregzoo.align import align
from iregzoo.errors import InputError
from iregzoo.necessity import try_without
from iregzoo.phantom import Phantom
from iregzoo.register import Scans, read_scans, register
from iregzoo.results import write
from iregzoo.space import precise
from iregzoo.space.files import affine_transform
from iregzoo.space.frame import affine_displacement
from iregzoo.space.grid import Grid
from iregzoo.space.start import affine_start, matrix_of
from iregzoo.space.transforms import read_linear
from iregzoo.space.upright import ROTATIONS, lying
from iregzoo.zoo import Method, load
from shell import run

NOISE, HEAD = 5.0, 200.0  # of the phantom's intensities


@dataclass(frozen=True)
class Days:
    """A scan and its labels, the same on another day, and the transform from the first to the second, LPS mm."""

    first: Path
    first_labels: Path
    second: Path
    second_labels: Path
    moved: sitk.Transform

    @property
    def scans(self) -> Scans:
        return read_scans(self.first, self.second, self.first_labels, self.second_labels)

    @property
    def paths(self) -> list[str]:
        return ["--fixed", str(self.first), "--moving", str(self.second)]

    def error_mm(self, transform: sitk.Transform) -> float:
        """Mean over the places of the head."""
        image = sitk.ReadImage(str(self.first))
        places: Array = world_points(Grid.of(image))[sitk.GetArrayFromImage(image).transpose(2, 1, 0) > HEAD][::97]
        apart = move_all(transform, places) - move_all(self.moved, places)
        return float(np.linalg.norm(apart, axis=1).mean())


@pytest.fixture(scope="module")
def days(small_phantom: Phantom, tmp_path_factory: pytest.TempPathFactory) -> Days:
    """Turned, shifted, brighter to one side, and with other noise."""
    folder = tmp_path_factory.mktemp("days")
    moved = sitk.Euler3DTransform()
    moved.SetRotation(0.06, -0.05, 0.08)
    moved.SetTranslation((2.5, -1.5, 1.0))
    paths = {}
    for name, path in (("image", small_phantom.fixed), ("labels", small_phantom.fixed_labels)):
        image = sitk.ReadImage(str(path))
        nearest = name == "labels"
        mode = sitk.sitkNearestNeighbor if nearest else sitk.sitkBSpline
        image = sitk.Resample(image, image, moved.GetInverse(), mode, 0.0)
        if not nearest:
            array = sitk.GetArrayFromImage(image)
            noise = np.random.default_rng(0).normal(0, NOISE, array.shape)
            shaded = array * np.linspace(0.8, 1.2, array.shape[0])[:, None, None] + noise
            other = sitk.GetImageFromArray(shaded.clip(0).astype(np.float32))
            other.CopyInformation(image)
            image = other
        paths[name] = folder / f"second_{name}.nii.gz"
        sitk.WriteImage(image, str(paths[name]))
    return Days(small_phantom.fixed, small_phantom.fixed_labels, paths["image"], paths["labels"], moved)


@cache
def method() -> Method:
    """IIRP-Net as trained on hippocampi, after a rigid search."""
    return with_card(load("iirp", "hippocampus"), init="rigid")


@pytest.mark.parametrize("kind", ["rigid", "affine"])
def test_align_writes_a_linear_transform_that_itk_resamples_with(
    kind: str, days: Days, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = ["--fixed-labels", str(days.first_labels), "--moving-labels", str(days.second_labels)]
    out = tmp_path / "out"
    assert run(monkeypatch, "align", *days.paths, *labels, "--output", str(out), "--kind", kind, "--inverse") == 0
    assert "Dice" in capsys.readouterr().out
    there, back = (sitk.ReadTransform(str(out / f"{way}transform.h5")) for way in ("", "inverse_"))
    assert there.GetName() == back.GetName() == "AffineTransform"
    assert days.error_mm(there) < 0.1
    matrix = matrix_of(there)
    np.testing.assert_allclose(matrix_of(back) @ matrix, np.eye(4), atol=1e-9)
    if kind == "rigid":
        np.testing.assert_allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=1e-9)
    np.testing.assert_array_equal(read_linear(out / "transform.h5"), matrix)  # as register --init takes it
    warped, second = sitk.ReadImage(str(out / "warped.nii.gz")), sitk.ReadImage(str(days.second))
    expected = from_image(
        sitk.Resample(second, warped, there, sitk.sitkLinear, float(sitk.GetArrayViewFromImage(second).min()))
    )
    apart = (from_image(warped) - expected).abs() > 0.2
    assert int(apart.sum()) <= 2  # within a ten-thousandth of a voxel from the border of what the scan shows
    report = json.loads((out / "report.json").read_text("utf-8"))
    assert report["init"] == kind
    assert report["ncc_after"] > max(0.9, report["ncc_before"])
    assert report["dice_mean"] > 0.9
    assert report["folding_percent"] == report["displacement_max_mm"] == 0
    assert report["inverse"] == "of the affine"
    assert report["aligned"] == kind
    assert report["shared_information"] > precise.SHARED
    assert report["warnings"] == []
    assert not {"network_shape", "bundle", "network_left_out", "refinement"} & report.keys()
    assert (out / "report.html").is_file()
    assert (out / "report.png").is_file()


def test_align_is_more_precise_than_the_search_and_begins_where_it_is_told(days: Days) -> None:
    scans = days.scans
    searched = affine_start(scans.fixed, scans.moving, "rigid")
    found = align(scans)
    assert days.error_mm(affine_transform(found.frame.start)) < days.error_mm(affine_transform(searched)) / 2
    begun = align(scans, init=matrix_of(days.moved))
    assert days.error_mm(affine_transform(begun.frame.start)) < 0.1
    again = align(scans)
    np.testing.assert_array_equal(found.frame.start, again.frame.start)
    torch.testing.assert_close(found.displacement, affine_displacement(found.frame.start, found.frame.fixed).float())


def test_align_begins_where_the_brains_are(days: Days, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "affine_start", lambda *given: pytest.fail("searched"))
    found = align(days.scans, finder=Says(matrix_of(days.moved)))
    assert found.init == "rigid"
    assert days.error_mm(affine_transform(found.frame.start)) < 0.1


def test_the_command_begins_there_and_says_what_looks_for_brains(
    days: Days, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = Says(matrix_of(days.moved))
    monkeypatch.setattr(zoo, "brain_finder", lambda: find)
    monkeypatch.setattr(alignment, "affine_start", lambda *given: pytest.fail("searched"))
    out = tmp_path / "out"
    assert run(monkeypatch, "align", *days.paths, "--output", str(out)) == 0
    assert find.asked == [True]
    assert days.error_mm(sitk.ReadTransform(str(out / "transform.h5"))) < 0.1
    assert json.loads((out / "report.json").read_text("utf-8"))["finder_sha256"] == find.sha256
    monkeypatch.undo()
    monkeypatch.setattr(zoo, "brain_finder", lambda: pytest.fail("nothing is to be found"))
    assert run(monkeypatch, "align", *days.paths, "--init", "center", "--output", str(tmp_path / "told")) == 0
    assert "finder_sha256" not in json.loads((tmp_path / "told" / "report.json").read_text("utf-8"))


def test_masks_that_leave_nothing_where_the_brains_lie_leave_it_to_the_search(days: Days) -> None:
    scans = days.scans
    half = torch.ones_like(scans.fixed.data, dtype=torch.uint8)
    half[..., half.shape[-1] // 2 :] = 0
    masked = replace(
        scans,
        fixed_mask=replace(scans.fixed, data=half),
        moving_mask=replace(scans.moving, data=half),
    )
    extent = scans.fixed.grid.spacing * scans.fixed.grid.shape
    away = np.eye(4)  # the one half on the other
    away[:3, 3] = scans.fixed.grid.affine[:3, 2] / scans.fixed.grid.spacing[2] * extent[2] * 0.55
    assert not alignment._comparable(masked, away)
    found = align(masked, finder=Says(away)).frame.start
    assert days.error_mm(affine_transform(found)) < 0.5


def test_align_asks_for_what_the_kind_needs_and_not_where_it_is_told(days: Days) -> None:
    find = Says(matrix_of(days.moved))
    align(days.scans, "affine", finder=find)
    align(days.scans, "rigid", finder=find)
    align(days.scans, "affine", init="rigid", finder=find)
    assert find.asked == [False, True, True]
    align(days.scans, init=matrix_of(days.moved), finder=find)
    align(days.scans, init="center", finder=find)
    assert len(find.asked) == 3


def test_align_says_which_headers_are_wrong(days: Days, tmp_path: Path) -> None:
    find = Says(matrix_of(days.moved), ROTATIONS[7])
    warnings = write(align(days.scans, finder=find), tmp_path / "found", {})["warnings"]
    assert warnings == [lying(scan, ROTATIONS[7], "rigid") for scan in (days.scans.fixed, days.scans.moving)]
    warnings = write(align(days.scans, init="center"), tmp_path / "told", {})["warnings"]
    assert warnings == []  # without a finder, none is seen


def test_align_searches_where_brains_are_found_in_a_wrong_place_or_none(days: Days) -> None:
    far = matrix_of(sitk.Euler3DTransform((0, 0, 0), 0.3, 0, 0, (30.0, 0, 0)))
    for finder in (Says(far), Says(None)):
        assert days.error_mm(affine_transform(align(days.scans, finder=finder).frame.start)) < 0.1


def test_align_searches_scans_as_they_lie(days: Days) -> None:
    scans = replace(days.scans, moving=days.scans.moving.in_world(ROTATIONS[9]), moving_labels=None)
    found = align(scans, finder=Sees(scans.moving, ROTATIONS[9].T))
    assert days.error_mm(affine_transform(ROTATIONS[9].T @ found.frame.start)) < 0.1
    assert found.lying == (lying(scans.moving, ROTATIONS[9].T, "rigid"),)


def test_two_people_stay_where_their_brains_are(small_phantom: Phantom, monkeypatch: pytest.MonkeyPatch) -> None:
    brains = matrix_of(sitk.Euler3DTransform((0, 0, 0), 0.02, 0, 0, (1.0, 0, 0)))
    monkeypatch.setattr(precise, "SHARED", 1.0)
    monkeypatch.setattr(precise, "SAME", 0.0)
    found = align(read_scans(small_phantom.fixed, small_phantom.moving), finder=Says(brains))
    np.testing.assert_array_equal(found.frame.start, brains)


def test_scans_that_share_too_little_are_said_to(
    test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two people; one person's are in test_align_writes_a_linear_transform_that_itk_resamples_with."""
    pair = (
        part
        for name, side in zip("ab", ("fixed", "moving"), strict=True)
        for part in (f"--{side}", str(test_data / "scans" / f"t1_brain_{name}.nii.gz"))
    )
    assert run(monkeypatch, "align", *pair, "--output", str(tmp_path / "out")) == 0
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert "too little of each other for one person's" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert 0 < report["shared_information"] < precise.SHARED
    assert report["warnings"] == [said.removeprefix("warning: ")]


def test_bad_input_to_align_is_one_line_and_writes_nothing(
    days: Days, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    far, out = tmp_path / "far.nii.gz", tmp_path / "out"
    image = sitk.ReadImage(str(days.second))
    image.SetOrigin((5000.0, 0.0, 0.0))
    sitk.WriteImage(image, str(far))
    moved = ["--fixed", str(days.first), "--moving", str(far)]
    for arguments, words in (
        ([*days.paths, "--kind", "similarity"], ("kind 'similarity'", "rigid or affine")),
        (
            [*moved, "--init", "none"],
            ("far.nii.gz", "shows nothing", "(init none); try --init center, rigid or a"),
        ),
        ([*days.paths, "--init", "affine"], ("init affine", "kind rigid must not", "--init rigid")),
        ([*days.paths, "--init", "lost.tfm"], ("lost.tfm", "no such file")),
        ([*days.paths, "--bundle", "ipear"], ("unknown option --bundle",)),
    ):
        assert run(monkeypatch, "align", *arguments, "--output", str(out)) == 2
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1, error
        for word in words:
            assert word in error
        assert not out.exists()
    with pytest.raises(InputError, match="kind 'Rigid' is unknown"):
        align(days.scans, "Rigid")


def test_one_person_is_not_deformed(
    days: Days, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--bundle", "iirp", "--weights", "hippocampus", "--init", "rigid", "--output", str(out)]
    assert run(monkeypatch, "register", *days.paths, *options) == 0
    assert "note: the scans tell less of each other with the network's deformation" in capsys.readouterr().out
    transform = sitk.ReadTransform(str(out / "transform.h5"))
    assert transform.GetName() == "AffineTransform"
    assert days.error_mm(transform) < 0.1
    report = json.loads((out / "report.json").read_text("utf-8"))
    left_out = report["network_left_out"]
    assert left_out["information_network"] < 0.9 * left_out["information_start"]
    assert report["displacement_max_mm"] == 0
    assert report["warnings"] == []
    assert "left out: local information" in (out / "report.html").read_text("utf-8")


def test_an_evaluation_counts_what_was_left_out(
    days: Days, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pairs.csv").write_text(f"fixed,moving\n{days.first},{days.second}\n", "utf-8")
    options = ["--pairs", str(tmp_path / "pairs.csv"), "--bundle", "iirp", "--init", "rigid", "--plots", "false"]
    assert run(monkeypatch, "evaluate", *options, "--output", str(tmp_path / "out")) == 0
    assert "iirp (auto), 1 pair, " in (said := capsys.readouterr().out)
    assert "network left out of 1" in said
    assert "network_left_out" in (tmp_path / "out" / "metrics.csv").read_text("utf-8").splitlines()[0]


def test_a_scan_and_itself_stay_exactly_where_they_are(days: Days) -> None:
    scans = read_scans(days.first, days.first)
    for refine in (0, 4):
        result = register(scans, method(), init="rigid", refine=refine)
        assert result.needless is not None
        assert not result.displacement.any()
        torch.testing.assert_close(result.warped, scans.fixed.data, rtol=0, atol=2e-3)


def test_a_start_that_was_given_is_used_unchanged(days: Days) -> None:
    given = matrix_of(days.moved)
    result = register(days.scans, method(), init=given)
    assert result.needless is not None
    np.testing.assert_array_equal(result.frame.start, given)


def test_gradient_steps_follow_a_change_from_a_precise_start(days: Days, tmp_path: Path) -> None:
    """What grew by a millimetre between the days is found by the steps alone."""
    image = sitk.ReadImage(str(days.first))
    grid = Grid.of(image)
    away = world_points(grid) - grid.centre
    grown = away / 5 * np.exp(0.5 - (away**2).sum(-1, keepdims=True) / (2 * 5**2))  # 1 mm at most, 5 mm from there
    growth = sitk.DisplacementFieldTransform(grid.to_sitk(grown, vector=True))
    sitk.WriteImage(sitk.Resample(image, image, growth, sitk.sitkBSpline, 0.0), str(tmp_path / "grown.nii.gz"))
    scans = read_scans(tmp_path / "grown.nii.gz", days.second)
    result = register(scans, method(), init="rigid", refine=48)
    assert result.needless is not None
    assert result.refinement is not None
    length = np.linalg.norm(grown, axis=-1)
    changed = (length > 0.4) & (scans.fixed.data[0, 0].numpy() > HEAD)
    places = world_points(grid)
    true = move_all(days.moved, (places + grown)[changed])
    found = (places + result.displacement[0].movedim(0, -1).numpy())[changed]
    assert np.linalg.norm(found - true, axis=1).mean() < 0.5 * length[changed].mean()
    assert result.refinement.local_ncc_after > result.refinement.local_ncc_before


def test_one_person_is_known_from_a_start_that_was_not_searched_for(days: Days) -> None:
    result = register(days.scans, method(), init="center")
    assert result.init == "center"
    assert result.needless is not None
    assert days.error_mm(affine_transform(result.frame.start)) < 0.1


def test_one_person_is_known_where_a_search_came_not_quite_near(days: Days, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a voxel away, what the scans share is hidden, and the network's deformation loses too little of it."""
    monkeypatch.setattr("iregzoo.register.SHARP_MM", 0.5)  # the hippocampus weights' voxels count as large ones
    near = matrix_of(days.moved) @ np.eye(4)
    near[0, 3] += 0.5
    monkeypatch.setattr("iregzoo.register.affine_start", lambda *scans: near)
    trials = []
    monkeypatch.setattr("iregzoo.register.try_without", lambda *pair: trials.append(try_without(*pair)) or trials[-1])
    result = register(days.scans, method(), init="rigid")
    assert [bool(trial.needless) for trial in trials] == [False, True]
    assert not trials[0].gains
    assert result.needless == trials[1].needless
    assert days.error_mm(affine_transform(result.frame.start)) < 0.1


def test_headers_that_are_trusted_are_used_unchanged(days: Days) -> None:
    for scans in (days.scans, read_scans(days.first, days.first)):
        np.testing.assert_array_equal(register(scans, method(), init="none").frame.start, np.eye(4))


def test_a_scan_and_itself_are_not_said_to_be_less_alike(small_phantom: Phantom, tmp_path: Path) -> None:
    """Where nothing moves, what differs is rounding."""
    scans = read_scans(small_phantom.moving, small_phantom.moving)
    assert write(align(scans), tmp_path, {})["warnings"] == []


def test_a_callers_inference_mode_changes_nothing(days: Days) -> None:
    expected = align(days.scans).frame.start, register(days.scans, method(), init="rigid").displacement
    with torch.inference_mode():
        found = align(days.scans).frame.start, register(days.scans, method(), init="rigid").displacement
    np.testing.assert_array_equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_masks_that_leave_nothing_to_compare_are_refused(days: Days) -> None:
    scans = days.scans
    few = replace(scans.fixed, data=torch.zeros_like(scans.fixed.data, dtype=torch.uint8), path=Path("few.nii.gz"))
    few.data[..., 20:22, 20:22, 20:22] = 1
    with pytest.raises(InputError, match=r"few\.nii\.gz: nowhere do 5×5×5 voxels of 1 mm count"):
        align(replace(scans, fixed_mask=few))


def test_two_people_are_deformed(small_phantom: Phantom) -> None:
    result = register(read_scans(small_phantom.fixed, small_phantom.moving), method(), init="none")
    assert result.needless is None
    assert result.deformation.any()


def test_masks_decide_together_with_the_scans(days: Days) -> None:
    scans = days.scans
    mask = replace(scans.fixed, data=(scans.fixed.data > -1).to(torch.uint8))
    mask.data[..., :4, :, :] = 0
    result = register(replace(scans, fixed_mask=mask), method(), init="rigid")
    assert result.needless is not None
    aligned = align(replace(scans, fixed_mask=mask))
    np.testing.assert_allclose(aligned.frame.start, result.frame.start, rtol=0, atol=0.02)


def test_a_result_without_a_network_is_written_as_linear_only_where_nothing_deforms(days: Days, tmp_path: Path) -> None:
    result = align(days.scans)
    bent = replace(result, deformation=result.deformation + 0.5)
    write(bent, tmp_path, {}, inverse=True)
    for name in ("transform.h5", "inverse_transform.h5"):
        assert sitk.ReadTransform(str(tmp_path / name)).GetName() == "CompositeTransform"
