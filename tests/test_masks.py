"""A pair with masks: what does not count pulls nothing, what counts stays, and what is wrong with one is said."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor

import cohort
from iregzoo.batch import run as run_jobs
from iregzoo.cases import read_cases
from iregzoo.continuation import continue_field
from iregzoo.errors import InputError
from iregzoo.evaluate import evaluate
from iregzoo.fields import identity, warp
from iregzoo.jobs import Settings, checked, find_done, read_jobs
from iregzoo.phantom import Phantom
from iregzoo.quality import Comparison, compare, figures
from iregzoo.register import Result, Scans, conclude, finish, read_scans, register, seen
from iregzoo.registration import Registration
from iregzoo.results import provenance, write
from iregzoo.space.files import write_image
from iregzoo.space.frame import warp_scan
from iregzoo.space.scan import Scan, mask_scan
from iregzoo.zoo import Method, load
from shell import run

LESION = torch.tensor([23.0, 20.0, 22.0]).view(1, 3, 1, 1, 1), 6.0  # where in the moving scan, and its radius: voxels


@pytest.fixture(scope="module")
def method() -> Method:
    return load("iirp")


@pytest.fixture(scope="module")
def scans(small_phantom: Phantom) -> Scans:
    return read_scans(small_phantom.fixed, small_phantom.moving)


def around_lesion(scans: Scans, margin: float = 0.0) -> Tensor:
    """The voxels of the lesion and a margin: boolean (1, 1, X, Y, Z)."""
    place, radius = LESION
    return (identity(scans.moving.grid.shape) - place).norm(dim=1, keepdim=True) < radius + margin


def masked(scan: Scan, counted: Tensor) -> Scan:
    return mask_scan(counted[0, 0].numpy(), scan.grid, "mask", scan)


def with_lesion(scans: Scans) -> tuple[Scans, Scans]:
    """The pair with a bright false lesion in the moving scan, without and with a mask that leaves it out."""
    false = replace(scans.moving, data=scans.moving.data.where(~around_lesion(scans), 1500.0))
    plain = replace(scans, moving=false)
    return plain, replace(plain, moving_mask=masked(false, ~around_lesion(scans, 2)))


def test_a_masked_lesion_pulls_less(scans: Scans, small_phantom: Phantom, method: Method) -> None:
    known = small_phantom.displacement * torch.tensor([-1.0, -1.0, 1.0]).view(1, 3, 1, 1, 1)
    lesion = warp(around_lesion(scans).int(), small_phantom.displacement, mode="nearest") > 0
    plain, left_out = (register(each, method, init="none", refine=12) for each in with_lesion(scans))
    misled, error = ((each.displacement - known).norm(dim=1, keepdim=True)[lesion].mean() for each in (plain, left_out))
    assert error < 0.75 * misled
    before, after = (figures(result, compare(result)) for result in (plain, left_out))
    assert after["folding_percent"] <= before["folding_percent"] + 0.01
    assert after["ncc_after"] > before["ncc_after"]


@pytest.fixture(scope="module")
def both(scans: Scans) -> Scans:
    """The pair with a mask of what is bright in the fixed scan, and one of all but a ball in the moving scan."""
    return replace(
        scans,
        fixed_mask=masked(scans.fixed, scans.fixed.data > 300),
        moving_mask=masked(scans.moving, ~around_lesion(scans)),
    )


@pytest.fixture(scope="module")
def result(both: Scans, method: Method) -> Result:
    return register(both, method, init="center", refine=0)


def test_what_a_lesion_looks_like_makes_no_difference(scans: Scans, method: Method) -> None:
    """Neither to the start, the network, the steps nor the figures in the end: it is as if smooth tissue were there."""
    false, left_out = with_lesion(scans)
    implant = replace(left_out, moving=replace(scans.moving, data=scans.moving.data.where(~around_lesion(scans), 4e4)))
    found, again = (register(each, method, init="rigid", refine=2) for each in (left_out, implant))
    assert torch.equal(found.displacement, again.displacement)
    likeness = [result.refinement and result.refinement.local_ncc_after for result in (found, again)]
    assert likeness[0] == likeness[1] > 0
    figure, other = (figures(result, compare(result)) for result in (found, again))
    for name in ("ncc_after", "mse_after", "counted_percent", "folding_percent"):
        assert figure[name] == other[name]
    own, seen, misled = (register(each, method, init="none").displacement for each in (scans, left_out, false))
    assert (seen - own).norm(dim=1).mean() < 0.5 * (misled - own).norm(dim=1).mean()


def test_what_counts_of_a_networks_field_stays_and_the_rest_follows_from_it(scans: Scans, method: Method) -> None:
    x, y, _ = identity(scans.fixed.grid.shape)[0]  # what is left out reaches the border: nothing is filled
    outer = replace(
        scans,
        fixed_mask=masked(scans.fixed, (x < 24)[None, None]),
        moving_mask=masked(scans.moving, (y > 9)[None, None]),
    )
    plain, result = (register(each, method, init="center", refine=0) for each in (scans, outer))
    own = plain.registration.displacement
    counted = outer.masks.counted_in(plain.frame, own)
    assert 0.1 < counted.float().mean() < 0.9
    assert torch.equal(result.registration.displacement, continue_field(own, counted))
    # What else a network gave belongs to its own field, and stays where that does.
    given = Registration(own, inverse=-own, pyramid=(own,))
    image = seen(scans, plain.frame, "center", method.card)
    altered = conclude(outer, plain.frame, "center", image, given, 0, method.card).registration
    assert altered.inverse is None
    assert altered.pyramid == ()
    kept = conclude(with_whole_masks(scans), plain.frame, "center", image, given, 0, method.card).registration
    assert kept.inverse is given.inverse
    assert torch.equal(kept.displacement, own)


def with_whole_masks(scans: Scans) -> Scans:
    """The pair with masks that leave nothing out."""
    fixed, moving = (masked(scan, torch.ones_like(scan.data)) for scan in (scans.fixed, scans.moving))
    return replace(scans, fixed_mask=fixed, moving_mask=moving)


def test_masks_that_leave_nothing_out_change_no_file(scans: Scans, method: Method, tmp_path: Path) -> None:
    files, reports = [], []
    for name, each in (("plain", scans), ("masked", with_whole_masks(scans))):
        found = register(each, method, init="center", refine=2)
        reports.append(write(found, tmp_path / name, provenance(method)))
        written = (path for path in (tmp_path / name).iterdir() if path.suffix not in (".html", ".json"))
        files.append({path.name: path.read_bytes() for path in written})
    assert files[0] == files[1]
    assert reports[1].pop("counted_percent") == 100
    assert [reports[1].pop(f"{side}_mask") for side in ("fixed", "moving")] == ["mask", "mask"]
    for report in reports:
        del report["seconds"], report["bytes"]
    assert reports[0] == reports[1]


def test_figures_and_report_are_of_what_counts(both: Scans, result: Result, method: Method, tmp_path: Path) -> None:
    report = write(result, tmp_path / "out", provenance(method))
    assert both.moving_mask is not None
    inside = warp_scan(both.moving_mask, result.displacement, both.fixed.grid, mode="nearest") > 0
    counted = (both.fixed.data > 300) & inside
    assert report["counted_percent"] == pytest.approx(100 * float(counted.double().mean()))
    images = compare(result)
    for name in ("before", "start", "after"):
        pairs = np.stack([images.fixed[counted].numpy(), getattr(images, name)[counted].numpy()])
        assert report[f"ncc_{name}"] == pytest.approx(np.corrcoef(pairs)[0, 1], abs=1e-4)
        assert report[f"mse_{name}"] == pytest.approx(np.square(pairs[0] - pairs[1]).mean(), rel=1e-4)
    assert "% of the fixed scan's voxels count" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_a_pair_of_which_nothing_counts_in_the_end_is_refused(scans: Scans, result: Result) -> None:
    left = identity(scans.moving.grid.shape)[:, :1] < 18
    halves = replace(scans, fixed_mask=masked(scans.fixed, left), moving_mask=masked(scans.moving, left))
    frame = result.frame
    moved = torch.zeros(1, 3, *frame.network.shape)
    moved[:, 0] = 18
    with pytest.raises(InputError, match=r"^mask and mask: no voxel of fixed.nii.gz counts in the end; enlarge"):
        compare(finish(halves, frame, "none", Registration(moved)))


def test_masks_on_other_grids_are_refused(scans: Scans) -> None:
    mask = masked(scans.moving, around_lesion(scans))
    with pytest.raises(ValueError, match=r"mask lies on another grid than .*fixed.nii.gz; give the mask of that scan"):
        replace(scans, fixed_mask=replace(mask, grid=replace(mask.grid, affine=2 * mask.grid.affine)))


def test_masks_that_count_next_to_nothing_are_warned_of(scans: Scans, method: Method) -> None:
    inverted = replace(scans, moving_mask=masked(scans.moving, around_lesion(scans)))
    (doubt,) = (each for each in figures(*checked_result(inverted, method))["warnings"] if "masks" in each)
    assert doubt.startswith("the masks count only 1.")
    assert "not the other way round" in doubt


def checked_result(scans: Scans, method: Method) -> tuple[Result, Comparison]:
    result = register(scans, method, init="none")
    return result, compare(result)


# --- the command line


SHAPE = (16, 20, 16)


def save(path: Path, array: np.ndarray) -> str:
    nib.save(nib.Nifti1Image(array.astype(np.float32), np.diag([1.5, 1.0, 2.0, 1.0])), path)
    return str(path)


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    random = np.random.default_rng(0)
    return [
        word
        for side in ("fixed", "moving")
        for word in (f"--{side}", save(tmp_path / f"{side}.nii.gz", random.random(SHAPE)))
    ]


def half(first: int) -> np.ndarray:
    counted = np.zeros(SHAPE)
    counted[first : first + 8] = 1
    return counted


BAD: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "another grid": (lambda path: ["--fixed-mask", save(path, np.ones((16, 20, 17)))], "differs from that of fixed"),
    "empty": (lambda path: ["--moving-mask", save(path, np.zeros(SHAPE))], "the mask is zero everywhere; set"),
    "NaN": (lambda path: ["--moving-mask", save(path, np.where(half(0), np.nan, 1))], "2560 voxels are NaN"),
    "missing": (lambda path: ["--fixed-mask", str(path)], "no such file"),
    "unreadable": (lambda path: ["--fixed-mask", str(path.write_text("mask") and path)], "not a readable NIfTI file"),
    "apart": (
        lambda path: ["--fixed-mask", save(path, half(0)), "--moving-mask", save(path.with_name("m.nii"), half(8))],
        "no voxel of fixed.nii.gz counts after the affine start (init none); enlarge the masks, or align",
    ),
}


@pytest.mark.parametrize(("made", "said"), BAD.values(), ids=BAD)
def test_a_bad_mask_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    pair: list[str],
    made: Callable[[Path], list[str]],
    said: str,
) -> None:
    path = tmp_path / "mask.nii.gz"
    options = ["--output", str(tmp_path / "out"), "--bundle", "iirp", "--init", "none"]
    assert run(monkeypatch, "register", *pair, *made(path), *options) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"iregzoo: {path}")
    assert said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("side", ["fixed", "moving"])
def test_a_mask_among_the_results_is_not_overwritten(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, pair: list[str], side: str
) -> None:
    path = save(tmp_path / "warped.nii.gz", half(0))
    options = [f"--{side}-mask", path, "--output", str(tmp_path), "--overwrite"]
    assert run(monkeypatch, "register", *pair, *options) == 2
    assert f"{path}: would be overwritten by the results" in capsys.readouterr().err


def test_a_batch_has_masks_and_registers_a_pair_anew_whose_mask_has_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cohort.write_cohort(tmp_path, 1)
    monkeypatch.setenv("IREGZOO_HOME", str(tmp_path / "home"))
    row, output = cohort.row("head0", "head1"), tmp_path / "out"
    rows = [{**row, "name": name, "moving_mask": mask} for name, mask in (("plain", ""), ("masked", "mask.nii.gz"))]
    table = cohort.write_pairs(tmp_path / "pairs.csv", rows)
    image = nib.load(tmp_path / "head1.nii.gz")
    percent = []
    for first, kept in ((4, set()), (8, {"plain"})):
        counted = np.zeros(image.shape, np.uint8)
        counted[first:] = 1
        nib.save(nib.Nifti1Image(counted, image.affine), tmp_path / "mask.nii.gz")
        jobs = read_jobs(table, checked(Settings("tiny")), output)
        done = find_done(jobs, output)
        assert done.keys() == kept
        output.mkdir(exist_ok=True)
        run_jobs(jobs, done, output, cohort.here)
        report = json.loads((output / "masked" / "report.json").read_text("utf-8"))
        assert report["moving_mask"] == str(tmp_path / "mask.nii.gz")
        percent.append(report["counted_percent"])
    assert 90 > percent[0] > percent[1] > 10
    assert "counted_percent" not in json.loads((output / "plain" / "report.json").read_text("utf-8"))


def test_evaluate_counts_what_masks_do_and_refuses_peers(
    tmp_path: Path, both: Scans, result: Result, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, mask in zip(("fixed_mask", "moving_mask"), both.masks, strict=True):
        write_image(tmp_path / f"{name}.nii.gz", mask.data, mask.grid)
    table = tmp_path / "pairs.csv"
    table.write_text(
        f"fixed,moving,fixed_mask,moving_mask\n{both.fixed.path},{both.moving.path},fixed_mask.nii.gz,moving_mask.nii.gz\n"
    )
    cases = read_cases(table)
    evaluate(cases, [method], tmp_path, init="center", plots=False)
    (row,) = csv.DictReader((tmp_path / "metrics.csv").open(encoding="utf-8"))
    assert float(row["ncc_after"]) == pytest.approx(figures(result, compare(result))["ncc_after"], abs=1e-5)
    monkeypatch.setattr("iregzoo.evaluate.find_peers", lambda names: list(names))
    with pytest.raises(InputError, match="has a mask, which greedy would not see; leave out --peers"):
        evaluate(cases, [], tmp_path, peers=["greedy"])
