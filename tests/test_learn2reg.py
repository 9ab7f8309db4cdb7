"""Learn2Reg's fields: their names, and that its way of scoring finds our Dice."""

import csv
import json
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from iregzoo.cases import Case
from iregzoo.errors import InputError
from iregzoo.learn2reg import field_files, field_folders, field_names
from shell import run


def test_a_field_is_named_after_its_scans() -> None:
    cases = [Case("a/0001.nii.gz", "b/0002.nii"), Case("x/brain.one.nrrd", "dicom")]
    assert field_names(cases) == ["disp_0001_0002.nii.gz", "disp_brain.one_dicom.nii.gz"]


def test_pairs_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match=r"2 pairs .* disp_1_2\.nii\.gz"):
        field_names([Case("a/1.nii.gz", "a/2.nii.gz"), Case("b/1.nii.gz", "b/2.nii.gz")])


def test_one_method_has_the_folder_to_itself_and_several_have_one_each() -> None:
    assert field_folders(["iirp"], ["auto"], []) == {"iirp (auto)": "."}
    assert field_folders(["iirp"], ["auto"], ["greedy"]) == {"iirp (auto)": "iirp", "greedy": "greedy"}
    assert field_folders(["iirp"], ["tci", "fixed"], []) == {"iirp (tci)": "iirp-tci", "iirp (fixed)": "iirp-fixed"}
    case = [Case("1.nii.gz", "2.nii.gz")]
    assert field_files(case, ["iirp"], ["auto"], []) == ["disp_1_2.nii.gz"]
    assert field_files(case, ["iirp", "pan"], ["auto"], []) == ["iirp/disp_1_2.nii.gz", "pan/disp_1_2.nii.gz"]


def test_a_file_of_weights_makes_one_folder_and_two_never_share_one() -> None:
    assert field_folders(["iirp@brain", "iirp@runs/a.pt"], ["auto"], []) == {
        "iirp@brain (auto)": "iirp@brain",
        "iirp@runs/a.pt (auto)": "iirp@runs_a.pt",
    }
    for other in ("iirp@runs_a.pt", "iirp@Runs/A.pt"):
        with pytest.raises(
            InputError, match=r"--learn2reg: .* iirp@runs/a\.pt \(auto\) and iirp@.* rename the weights"
        ):
            field_folders(["iirp@runs/a.pt", other], ["auto"], [])


def score(field: Path, fixed_labels: Path, moving_labels: Path) -> list[float]:
    """Dice per label by scipy and nibabel alone, as Learn2Reg's evaluator goes about it."""
    fixed, moving = (np.asarray(nib.load(path).dataobj).astype(int) for path in (fixed_labels, moving_labels))
    displacement = np.asarray(nib.load(field).dataobj).transpose(3, 0, 1, 2)
    identity = np.stack(np.meshgrid(*map(np.arange, fixed.shape), indexing="ij"))
    warped = map_coordinates(moving, identity + displacement, order=0)
    return [2 * ((warped == k) & (fixed == k)).sum() / ((warped == k).sum() + (fixed == k).sum()) for k in (1, 2)]


def test_learn2reg_finds_our_dice_on_real_hippocampi(
    test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = test_data / "hippocampus"
    names = json.loads((root / "splits.json").read_text("utf-8"))["val"][:4]
    table = tmp_path / "pairs.csv"
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("fixed", "moving", "fixed_labels", "moving_labels"))
        for pair in pairwise(names):
            writer.writerow(root / kind / f"{name}.nii.gz" for kind in ("images", "labels") for name in pair)
    folder, fields = tmp_path / "out", tmp_path / "fields"
    (tmp_path / "fields").mkdir()
    command = ["evaluate", "--pairs", str(table), "--bundle", "iirp", "--output", str(folder), "--plots", "false"]
    assert run(monkeypatch, *command, "--learn2reg", str(fields)) == 0
    rows = list(csv.DictReader((folder / "metrics.csv").open(encoding="utf-8")))
    assert len(rows) == 3
    shapes = set()
    for row in rows:
        fixed, moving = (Path(row[name]) for name in ("fixed", "moving"))
        field = fields / f"disp_{fixed.name.removesuffix('.nii.gz')}_{moving.name}"
        found = score(field, *(root / "labels" / path.name for path in (fixed, moving)))
        assert found == pytest.approx([float(row["dice_1"]), float(row["dice_2"])], abs=1e-3)
        assert float(row["dice_mean"]) > float(row["dice_before"]) + 0.05
        shapes |= {nib.load(path).shape for path in (fixed, moving)}
    assert len(shapes) > 1  # grids that differ, so that the field is more than one of a shared grid
    assert not (folder / "cases.png").exists()


def test_a_folder_that_holds_something_is_refused_by_its_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fields").mkdir()
    (tmp_path / "fields" / "mine.txt").write_text("mine")
    (tmp_path / "scan.nii.gz").touch()
    (tmp_path / "pairs.csv").write_text("fixed,moving\nscan.nii.gz,scan.nii.gz\n")
    pairs, output = tmp_path / "pairs.csv", tmp_path / "out"
    command = ["evaluate", "--pairs", str(pairs), "--bundle", "iirp", "--output", str(output)]
    assert run(monkeypatch, *command, "--learn2reg", str(tmp_path / "fields")) == 2
    error = capsys.readouterr().err.strip()
    assert "is not empty; choose another --learn2reg" in error
    assert len(error.splitlines()) == 1
    assert not output.exists()
