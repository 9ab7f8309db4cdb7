"""Pairs in, table out: the figures against independent ones, and every guard of the table of pairs."""

import csv
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from iregzoo.cases import Case, read_cases
from iregzoo.commands.shared import names
from iregzoo.entrants import load_methods
from iregzoo.errors import InputError
from iregzoo.evaluate import FILES, evaluate, names_of_labels
from iregzoo.outputs import whole_folder
from iregzoo.phantom import make_phantom
from iregzoo.register import Scans, read_scans
from iregzoo.zoo import Method, find, load, untrained
from shell import run


@pytest.fixture(scope="module")
def method() -> Method:
    return load("iirp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom pair with labels, and the same landmarks in both scans' spaces."""
    folder = tmp_path_factory.mktemp("phantom")
    phantom = make_phantom(folder)
    inside = np.array([[30, 40, 30], [36, 50, 40], [45, 44, 33]])
    fixed = sitk.ReadImage(str(phantom.fixed))
    places = [np.array(fixed.TransformIndexToPhysicalPoint([int(i) for i in index])) for index in inside]
    moved = [phantom.displacement[0, :, i, j, k].numpy() * [-1, -1, 1] for i, j, k in inside]
    for name, points in (("fixed", places), ("moving", [p + m for p, m in zip(places, moved, strict=True)])):
        lines = ["# CoordinateSystem = LPS", "x,y,z", *(",".join(map(str, point)) for point in points)]
        (folder / f"{name}.csv").write_text("\n".join(lines))
    return folder


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def relabelled(image: sitk.Image, array: np.ndarray) -> sitk.Image:
    """Other labels on the grid of a map."""
    other = sitk.GetImageFromArray(array)
    other.CopyInformation(image)
    return other


def row(**changes: str) -> dict[str, str]:
    return {
        "fixed": "fixed.nii.gz",
        "moving": "moving.nii.gz",
        "fixed_labels": "fixed_labels.nii.gz",
        "moving_labels": "moving_labels.nii.gz",
        **changes,
    }


def test_the_table_holds_the_figures_of_each_pair_and_controller(folder: Path, method: Method, tmp_path: Path) -> None:
    table = write_table(folder / "pairs.csv", [row(fixed_points="fixed.csv", moving_points="moving.csv")])
    summary = evaluate(read_cases(table), [method], tmp_path, controllers=("iterstop", "fixed"), init="none")
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open(encoding="utf-8")))
    assert [entry["controller"] for entry in rows] == ["iterstop", "fixed"]
    for entry in rows:
        labels = [float(entry[f"dice_{label}"]) for label in (1, 2, 3, 4)]
        assert float(entry["dice_mean"]) == pytest.approx(np.mean(labels), abs=1e-5)
        assert float(entry["dice_mean"]) > float(entry["dice_before"]) + 0.1
        assert float(entry["ncc_after"]) > float(entry["ncc_before"])
        assert 0 < float(entry["assd_mm"]) < float(entry["hd95_mm"])
        assert 0 < float(entry["tre_mm"]) < 6
        assert float(entry["seconds"]) > 0
    assert rows[1]["iterations"] == "1 1 1 1"
    written = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert written["results"] == summary["results"]
    result = written["results"][1]
    assert result["dice_mean"]["mean"] == pytest.approx(float(rows[1]["dice_mean"]), abs=1e-5)
    assert result["dice_3"]["median"] == pytest.approx(float(rows[1]["dice_3"]), abs=1e-5)
    assert "name" not in result["dice_1"]  # the hippocampus of the card, which has no label 3 or 4
    assert result["parameters"] == sum(p.numel() for p in untrained(method.bundle).parameters() if p.requires_grad)
    assert written["failed"] == []
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)
    assert "| iirp | fixed |" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_a_pair_may_have_a_start_of_its_own(folder: Path, method: Method, tmp_path: Path) -> None:
    sitk.WriteTransform(sitk.TranslationTransform(3, (0.0, 0.0, 0.0)), str(folder / "nowhere.tfm"))
    found = []
    for name, init in (("nowhere.tfm", "affine"), ("", "none")):
        table = write_table(folder / "starts.csv", [row(init=name)])
        evaluate(read_cases(table), [method], tmp_path, init=init, plots=False)
        (line,) = csv.DictReader((tmp_path / "metrics.csv").open(encoding="utf-8"))
        found.append({**line, "seconds": ""})
    assert found[0] == found[1]


def test_ssim_of_the_table_is_that_of_the_written_scans(folder: Path, method: Method, tmp_path: Path) -> None:
    """From the files alone, and with MONAI's SSIM."""
    from monai.metrics.regression import SSIMMetric

    from iregzoo.register import read_scans, register
    from iregzoo.results import provenance, write

    case = Case(str(folder / "fixed.nii.gz"), str(folder / "moving.nii.gz"))
    evaluate([case], [method], tmp_path, init="none", plots=False)
    (entry,) = csv.DictReader((tmp_path / "metrics.csv").open(encoding="utf-8"))
    write(register(read_scans(case.fixed, case.moving), method, init="none"), tmp_path, provenance(method))
    images = []
    for path, limits in ((Path(case.fixed), Path(case.fixed)), (tmp_path / "warped.nii.gz", Path(case.moving))):
        values, own = (sitk.GetArrayFromImage(sitk.ReadImage(str(name))) for name in (path, limits))
        low, high = np.percentile(own, (0.5, 99.5))
        images.append(torch.from_numpy(np.clip((values - low) / (high - low), 0, 1)).float()[None, None])
    metric = SSIMMetric(3, data_range=1.0, kernel_type="uniform", win_size=7)
    assert float(entry["ssim"]) == pytest.approx(float(metric(*images)), abs=1e-3)


def test_dice_of_the_table_is_that_of_the_labels_that_itk_warps(folder: Path, method: Method, tmp_path: Path) -> None:
    """The table's Dice again, from the files of ``register`` and SimpleITK alone."""
    from iregzoo.register import read_scans, register
    from iregzoo.results import provenance, write

    scans = read_scans(*(folder / f"{name}.nii.gz" for name in ("fixed", "moving", "fixed_labels", "moving_labels")))
    write(register(scans, method, init="none"), tmp_path, provenance(method))
    fixed, moving = (sitk.ReadImage(str(folder / f"{name}_labels.nii.gz")) for name in ("fixed", "moving"))
    transform = sitk.ReadTransform(str(tmp_path / "transform.h5"))
    warped = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, sitk.sitkNearestNeighbor))
    target = sitk.GetArrayFromImage(fixed)
    independent = [
        2 * ((warped == k) & (target == k)).sum() / ((warped == k).sum() + (target == k).sum()) for k in range(1, 5)
    ]
    reported = json.loads((tmp_path / "report.json").read_text("utf-8"))["dice"]
    assert [reported[str(k)] for k in range(1, 5)] == pytest.approx(independent, abs=2e-3)


def test_a_bad_pair_is_listed_and_does_not_stop_the_others(
    folder: Path, method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.nii.gz").write_bytes(b"not an image")
    table = write_table(folder / "bad.csv", [row(moving="broken.nii.gz"), row()])
    options = ("--pairs", str(table), "--bundle", "iirp", "--output", str(tmp_path / "out"), "--plots", "false")
    assert run(monkeypatch, "evaluate", *options) == 2
    error = capsys.readouterr().err.strip()
    assert "1 of 2" in error
    assert "with iirp" in error
    assert "broken.nii.gz" in error
    assert len(list(csv.DictReader((tmp_path / "out" / "metrics.csv").open(encoding="utf-8")))) == 1
    assert len(json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))["failed"]) == 1


def test_earlier_results_stay_where_all_pairs_fail_and_earlier_fields_go_with_overwrite(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.nii.gz").write_bytes(b"not an image")
    fields = tmp_path / "fields"
    options = ("--bundle", "iirp", "--output", str(tmp_path / "out"), "--learn2reg", str(fields), "--plots", "false")
    good, bad = (
        write_table(folder / "good.csv", [row()]),
        write_table(folder / "bad.csv", [row(moving="broken.nii.gz")]),
    )
    for name in ("disp_other_pair.nii.gz", "pan/disp_other_pair.nii.gz", "pan/mine.nii.gz"):
        (fields / name).parent.mkdir(parents=True, exist_ok=True)
        (fields / name).touch()
    assert run(monkeypatch, "evaluate", "--pairs", str(good), *options, "--overwrite") == 0
    found = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in found if path.parts[0] == "fields"} == {"disp_fixed_moving.nii.gz", "mine.nii.gz"}
    assert run(monkeypatch, "evaluate", "--pairs", str(bad), *options, "--overwrite") == 2
    error = capsys.readouterr().err.strip()
    assert "every registration failed, first broken.nii.gz" in error
    assert error.endswith("; nothing was written")
    assert found == {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_table_or_scan_that_the_results_would_replace_is_refused_and_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = {name: str(folder / file) for name, file in row().items()}
    (tmp_path / "metrics").mkdir()
    table = write_table(tmp_path / "metrics" / "metrics.csv", [lines])
    scan = Path(shutil.copy(lines["moving"], tmp_path / "disp_fixed_moving.nii.gz"))  # as the first pair's field
    two = write_table(tmp_path / "pairs.csv", [lines, lines | {"moving": str(scan)}])
    for pairs, options, kept in (
        (table, ("--output", str(table.parent)), table),
        (two, ("--output", str(tmp_path / "out"), "--learn2reg", str(tmp_path)), scan),
    ):
        before = kept.read_bytes()
        assert run(monkeypatch, "evaluate", "--pairs", str(pairs), "--bundle", "iirp", "--overwrite", *options) == 2
        assert f"{kept}: would be overwritten by the results" in capsys.readouterr().err
        assert kept.read_bytes() == before


def test_whatever_a_pair_raises_is_listed_and_does_not_stop_the_others(
    folder: Path, method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "copy.nii.gz").write_bytes((folder / "moving.nii.gz").read_bytes())
    cases = read_cases(write_table(folder / "raises.csv", [row(moving="copy.nii.gz"), row()]))

    def read(fixed: str, moving: str, *others: str) -> Scans:
        if "copy" in moving:
            raise RuntimeError("what torch says first\nout of memory")
        return read_scans(fixed, moving, *others)

    monkeypatch.setattr("iregzoo.evaluate.read_scans", read)
    summary = evaluate(cases, [method], tmp_path, plots=False)
    (failed,) = summary["failed"]
    assert (failed["pair"], failed["reason"]) == ("copy.nii.gz → fixed.nii.gz", "RuntimeError: out of memory")
    assert [result["pairs"] for result in summary["results"]] == [1]


def test_structures_have_the_names_of_cards_that_name_most_of_them_and_agree() -> None:
    hippocampus, brain = (load("ipear", weights) for weights in ("hippocampus", "brain"))

    def named(labels: Sequence[int], *methods: Method) -> dict[str, str]:
        return names_of_labels([{f"dice_{label}": 0.5 for label in labels}], methods)

    front, white = hippocampus.card.labels["1"], brain.card.labels["2"]
    assert named((1, 2), hippocampus)["1"] == front
    assert named((1, 2, 3, 4, 5), hippocampus) == {}  # another data set's numbers
    assert named((2, 3, 17), hippocampus, brain)["2"] == white
    assert named((2,), hippocampus, brain) == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bundle", "iirp,pan", "--controller", "fixed", "--max-iterations", "0"], ["bundle iirp", "at least 1"]),
        (["--bundle", "iirp,sm_gicnet", "--controller", "iterstop"], ["bundle sm_gicnet", "iterstop", "single pass"]),
        (
            ["--bundle", "iirp,sm_gicnet", "--max-iterations", "2"],
            ["bundle sm_gicnet", "max-iterations 2", "single pass"],
        ),
        (["--bundle", "iirp", "--controller", ","], ["--controller", "empty"]),
        (["--bundle", "iirp", "--init", "elastic"], ["init 'elastic' is unknown", "choose auto"]),
        (["--bundle", "iirp", "--peers", "elastix"], ["peer 'elastix'", "ants-syn, greedy"]),
        (["--bundle", "iirp", "--plots", "maybe"], ["plots 'maybe'", "true or false"]),
        (["--bundle", "iirp,pan", "--weights", "elbow"], ["'elbow'", "iirp", "hippocampus"]),
        (["--bundle", "iirp,pan@elbow"], ["'elbow'", "pan", "hippocampus"]),
        (["--bundle", "iirp@"], ["--bundle iirp@:", "NAME@WEIGHTS"]),
        (["--bundle", "iirp,@hippocampus"], ["--bundle @hippocampus:", "NAME@WEIGHTS"]),
        (["--bundle", "iirp@hippocampus", "--weights", "brain"], ["--weights brain", "its own", "leave --weights out"]),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: list[str],
) -> None:
    def measure(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("iregzoo.evaluate._measure", measure)
    table = write_table(folder / "good.csv", [row()])
    output = tmp_path / "out"
    assert run(monkeypatch, "evaluate", "--pairs", str(table), "--output", str(output), *options) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert all(word in error for word in words)
    assert not output.exists()


def test_a_method_named_twice_is_measured_once() -> None:
    assert names("iirp, pan,iirp", "bundle") == ["iirp", "pan"]


def test_two_weights_of_a_bundle_are_told_apart_everywhere(
    folder: Path, method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file is named in full: that of another training may have the same name in another folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    worse = {name: value * 0.9 for name, value in method.network.state_dict().items()}
    torch.save(worse, tmp_path / "run" / "best.pt")
    (folder / "unreadable.nii.gz").write_bytes(b"not an image")
    table = write_table(folder / "trainings.csv", [row(), row(moving="unreadable.nii.gz")])
    options = ("--pairs", str(table), "--output", "out", "--learn2reg", "fields", "--init", "none")
    assert run(monkeypatch, "evaluate", *options, "--bundle", "iirp@hippocampus,iirp@run/best.pt") == 2
    expected = ["iirp@hippocampus", "iirp@run/best.pt"]
    rows = list(csv.DictReader((tmp_path / "out" / "metrics.csv").open(encoding="utf-8")))
    assert [entry["bundle"] for entry in rows] == expected
    assert float(rows[0]["dice_mean"]) > float(rows[1]["dice_mean"])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))
    for part in ("methods", "results", "failed"):
        assert [entry["bundle"] for entry in summary[part]] == expected
    assert [entry["weights"] for entry in summary["methods"]] == ["hippocampus", "best.pt"]
    assert len({entry["sha256"] for entry in summary["methods"]}) == 2
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.split(" (auto), 1 pair")[0] for line in lines[:2]] == expected
    assert lines[2].startswith("iirp@hippocampus (auto) against iirp@run/best.pt (auto): Dice +")
    assert "unreadable.nii.gz → fixed.nii.gz with iirp@hippocampus:" in captured.err
    written = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert all(f"| {name} | auto |" in written for name in expected)
    assert f"- {lines[2]}." in written
    fields = sorted(path.relative_to(tmp_path / "fields").as_posix() for path in (tmp_path / "fields").rglob("*.gz"))
    assert fields == [f"{name}/disp_fixed_moving.nii.gz" for name in ("iirp@hippocampus", "iirp@run_best.pt")]


def test_weights_of_an_entry_are_its_own_and_those_of_the_others_are_the_option(tmp_path: Path) -> None:
    """The weights begin after the first @ that does not belong to a folder's path."""
    for name in ("one.pt", "t@o.pt"):
        torch.save(load("iirp").network.state_dict(), tmp_path / name)
    mine = shutil.copytree(find("iirp").path, tmp_path / "me@home" / "mine")
    other = shutil.copytree(find("iirp").path, tmp_path / "other")
    entries = ["iirp", f"iirp@{tmp_path}/t@o.pt", "iirp@brain", str(mine), f"{other}@brain_any", f"{mine}@brain"]
    methods = load_methods(entries, str(tmp_path / "one.pt"))
    expected = ["iirp", f"iirp@{tmp_path}/t@o.pt", "iirp@brain", "mine", "other@brain_any", "mine@brain"]
    assert [method.name for method in methods] == expected
    assert [method.weights.name for method in methods] == ["one.pt", "t@o.pt", "brain", "one.pt", "brain_any", "brain"]
    assert [method.bundle.path for method in methods[3:]] == [mine, other, mine]


def test_methods_of_one_name_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [shutil.copytree(find("iirp").path, tmp_path / place / "mine") for place in "ab"]
    table, output = write_table(folder / "pairs.csv", [row()]), tmp_path / "out"
    options = ("--pairs", str(table), "--output", str(output), "--bundle", ",".join(map(str, folders)))
    assert run(monkeypatch, "evaluate", *options) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert "2 methods would be called mine; give each weights of its own, NAME@WEIGHTS" in error
    assert not output.exists()


def test_a_peer_stands_beside_the_methods(folder: Path, method: Method, tmp_path: Path) -> None:
    pytest.importorskip("picsl_greedy")
    (tmp_path / "small").mkdir()
    for name in row().values():
        image = sitk.Shrink(sitk.ReadImage(str(folder / name)), [2, 2, 2])
        sitk.WriteImage(image, str(tmp_path / "small" / name))
    cases = read_cases(write_table(tmp_path / "small" / "pairs.csv", [row()]))
    fields = tmp_path / "fields"
    summary = evaluate(cases, [method], tmp_path, init="none", peers=["greedy"], learn2reg=fields, plots=False)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open(encoding="utf-8")))
    assert [(entry["bundle"], entry["controller"]) for entry in rows] == [("iirp", "auto"), ("greedy", "")]
    assert rows[0]["dice_before"] == rows[1]["dice_before"]
    assert float(rows[1]["dice_mean"]) > float(rows[1]["dice_before"]) + 0.1
    assert float(rows[1]["folding_percent"]) < 1
    assert (rows[1]["iterations"], summary["results"][1]["parameters"]) == ("", 0)
    assert summary["peers"][0]["name"] == "greedy"
    (comparison,) = summary["comparisons"]
    assert comparison["median_difference"] == pytest.approx(
        float(rows[0]["dice_mean"]) - float(rows[1]["dice_mean"]), abs=1e-5
    )
    written = sorted(path.relative_to(fields).as_posix() for path in fields.rglob("*.gz"))
    assert written == ["greedy/disp_fixed_moving.nii.gz", "iirp/disp_fixed_moving.nii.gz"]


def test_without_labels_or_points_the_rest_is_measured(folder: Path, method: Method, tmp_path: Path) -> None:
    case = Case(str(folder / "fixed.nii.gz"), str(folder / "moving.nii.gz"))
    summary = evaluate([case], [method], tmp_path, init="none")
    (entry,) = csv.DictReader((tmp_path / "metrics.csv").open(encoding="utf-8"))
    assert entry["dice_mean"] == ""
    assert not math.isnan(float(entry["ncc_after"]))
    assert "dice_mean" not in summary["results"][0]


def test_a_lesion_of_one_scan_alone_is_measured_without_dice(
    folder: Path, method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether something of it is left or nothing: the pair keeps its other figures."""
    labels = sitk.ReadImage(str(folder / "fixed_labels.nii.gz"))
    sitk.WriteImage(0 * labels, str(tmp_path / "none.nii.gz"))
    corner = sitk.GetArrayFromImage(0 * labels)
    corner[0, 0, 0] = 3
    sitk.WriteImage(relabelled(labels, corner), str(tmp_path / "corner.nii.gz"))
    paths = {name: str(folder / f"{name}.nii.gz") for name in ("fixed", "moving")}
    none = str(tmp_path / "none.nii.gz")
    rows = [
        paths | {"fixed_labels": none, "moving_labels": moving, "name": name}
        for name, moving in (("kept", str(folder / "moving_labels.nii.gz")), ("gone", str(tmp_path / "corner.nii.gz")))
    ]
    table = write_table(tmp_path / "pairs.csv", rows)
    options = ["--bundle", "iirp", "--init", "none", "--output", str(tmp_path / "out"), "--plots", "false"]
    assert run(monkeypatch, "evaluate", "--pairs", str(table), *options) == 0
    said = capsys.readouterr().out
    assert "iirp (auto), 2 pairs, folding" in said
    for name in ("kept", "gone"):
        assert f"warning: {name}: the fixed scan's label map is empty, so there is no Dice" in said
    for entry in csv.DictReader((tmp_path / "out" / "metrics.csv").open(encoding="utf-8")):
        assert entry["dice_mean"] == entry["hd95_mm"] == ""
        assert float(entry["ncc_after"]) > float(entry["ncc_before"])


def test_landmarks_that_lie_elsewhere_are_told_of_and_the_name_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    far = (folder / "moving.csv").read_text("utf-8").splitlines()
    (tmp_path / "far.csv").write_text("\n".join([*far[:-1], "900,25,18"]), "utf-8")
    paths = {name: str(folder / f"{name}.nii.gz") for name in ("fixed", "moving")}
    fixed = str(folder / "fixed.csv")
    rows = [
        paths | {"fixed_points": fixed, "moving_points": points, "name": name, "site": "A"}
        for name, points in (("near", str(folder / "moving.csv")), ("off", str(tmp_path / "far.csv")))
    ]
    table = write_table(tmp_path / "pairs.csv", rows)
    options = ["--bundle", "iirp", "--init", "none", "--output", str(tmp_path / "out"), "--plots", "false"]
    assert run(monkeypatch, "evaluate", "--pairs", str(table), *options) == 0
    said = capsys.readouterr().out
    assert f"warning: off: 1 of 3 points of {tmp_path / 'far.csv'} lie outside their scan; check LPS and RAS" in said
    assert said.count("warning: ") == 1
    assert f"note: {table}: ignored site; the columns known here are fixed, moving, " in said
    entries = list(csv.DictReader((tmp_path / "out" / "metrics.csv").open(encoding="utf-8")))
    assert [entry["name"] for entry in entries] == ["near", "off"]
    means = [np.mean([float(entry[name]) for entry in entries]) for name in ("tre_before_mm", "tre_mm")]
    assert f"TRE {means[0]:.2f} → {means[1]:.2f} mm" in said
    assert json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))["warnings"] == [
        f"off: 1 of 3 points of {tmp_path / 'far.csv'} lie outside their scan; check LPS and RAS"
    ]


def test_labels_that_are_lost_count_in_dice_and_are_counted(folder: Path, method: Method, tmp_path: Path) -> None:
    moving = sitk.ReadImage(str(folder / "moving_labels.nii.gz"))
    array = sitk.GetArrayFromImage(moving)
    assert (array == 4).any()
    array[array == 4] = 0
    array[0, 0, 0] = 4  # a single voxel of it, in a corner that the fixed scan does not see
    sitk.WriteImage(relabelled(moving, array), str(tmp_path / "moving_labels.nii.gz"))
    paths = {name: str(folder / f"{name}.nii.gz") for name in ("fixed", "moving", "fixed_labels")}
    case = Case(**paths, moving_labels=str(tmp_path / "moving_labels.nii.gz"))
    shifted = sitk.TranslationTransform(3, (0.0, 0.0, 25.0))
    sitk.WriteTransform(shifted, str(tmp_path / "start.tfm"))
    summary = evaluate([replace(case, init=str(tmp_path / "start.tfm"))], [method], tmp_path, plots=False)
    (entry,) = csv.DictReader((tmp_path / "metrics.csv").open(encoding="utf-8"))
    assert (entry["dice_4"], entry["labels_lost"]) == ("0", "1")
    (result,) = summary["results"]
    assert result["labels_lost"] == 1
    mean = np.mean([float(entry[f"dice_{n}"]) for n in (1, 2, 3, 4)])
    assert result["dice_mean"]["mean"] == pytest.approx(mean, abs=1e-5)
    assert "labels lost, whose surface distances are missing: iirp (auto) 1" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["columns none", "fixed"]),
        ("fixed,moving\n", ["no pairs"]),
        ("fixed,target\na,b\n", ["target", "moving"]),
        ("fixed,fixed,moving\na,a,b\n", ["the column fixed more than once"]),
        ("fixed,moving\n,moving.nii.gz\n", ["line 2", "column fixed: is empty"]),
        ("fixed,moving\nfixed.nii.gz,gone.nii.gz\n", ["line 2", "gone.nii.gz", "no such file"]),
    ],
)
def test_a_bad_table_is_refused(folder: Path, content: str, words: list[str]) -> None:
    table = folder / "refused.csv"
    table.write_text(content)
    with pytest.raises(InputError) as error:
        read_cases(table)
    assert all(word in str(error.value) for word in words)


def test_a_table_that_is_no_utf8_is_refused_and_one_of_excel_is_read(folder: Path) -> None:
    table = folder / "encoded.csv"
    table.write_bytes("fixed,moving\nfixed.nii.gz,moving.nii.gz\n".encode("utf-16"))
    with pytest.raises(InputError, match="UTF-8"):
        read_cases(table)
    table.write_bytes("fixed,moving\r\nfixed.nii.gz,moving.nii.gz\r\n".encode("utf-8-sig"))
    assert read_cases(table) == [Case(str(folder / "fixed.nii.gz"), str(folder / "moving.nii.gz"))]


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.csv: no such file"):
        read_cases(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fixed_points": "fewer.csv"}, r"fewer.csv: 1 points, but .*moving.csv: 3; give as many in both"),
        ({"fixed_points": "noise.csv"}, r"noise.csv: is not a list of landmarks"),
        ({"init": "noise.tfm"}, r"noise.tfm: is not a transform"),
        ({"fixed_points": ""}, "has moving_points but no fixed_points; give both, or neither"),
        ({"moving_labels": ""}, "has fixed_labels but no moving_labels; give both, or neither"),
    ],
)
def test_bad_landmarks_and_starts_are_refused_before_any_pair_is_registered(
    folder: Path, method: Method, tmp_path: Path, change: dict[str, str], words: str
) -> None:
    (folder / "fewer.csv").write_text("# CoordinateSystem = LPS\nx,y,z\n1,2,3\n")
    for name in ("noise.csv", "noise.tfm"):
        (folder / name).write_text("noise")
    points = row(fixed_points="fixed.csv", moving_points="moving.csv", init="")
    table = write_table(folder / "bad_points.csv", [points, points | change])
    begun: list[str] = []
    with pytest.raises(InputError, match=rf"^pair 2, moving.nii.gz → fixed.nii.gz: .*{words}"):
        evaluate(read_cases(table), [method], tmp_path, progress=begun.append)
    assert begun == []


def test_real_hippocampi_gain_overlap(test_data: Path, method: Method, tmp_path: Path) -> None:
    root = test_data / "hippocampus"
    names = json.loads((root / "splits.json").read_text("utf-8"))["val"][:3]
    cases = [
        Case(*(str(root / kind / f"{name}.nii.gz") for kind in ("images", "labels") for name in pair))
        for pair in ((names[0], names[1]), (names[1], names[2]))
    ]
    with whole_folder(tmp_path / "out", overwrite=False, owned=FILES) as staging:
        (result,) = evaluate(cases, [method], staging)["results"]
    assert result["dice_mean"]["mean"] > 0.8
    assert result["folding_percent"]["mean"] < 1.0
    assert torch.tensor(result["iterations"]).min() >= 0
