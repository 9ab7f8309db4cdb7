"""A bundle run by MONAI writes what ``iregzoo register`` writes."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from iregzoo import register, results, zoo
from iregzoo.errors import InputError
from iregzoo.space.transforms import read_linear
from iregzoo.steering import choose_controller

from .conftest import Pair, some_weights

pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
ROOT = Path(__file__).resolve().parents[2]
NAMES = [path.name for path in sorted((ROOT / "bundles").iterdir()) if path.is_dir()]
EACH_BUNDLE = pytest.mark.parametrize("name", NAMES)
FILES = {"warped.nii.gz", "displacement.nii.gz", "transform.h5", "report.json", "report.png", "report.html"}
LABEL_FILES = {"warped_labels.nii.gz"}
POINTS_MM = np.random.default_rng(0).uniform(-15, 15, (50, 3))


def run(name: str, pair: Pair, output: Path, **options: Any) -> Path:
    """Run a bundle's inference by MONAI in this process; gives back the folder of its results."""
    bundle = ROOT / "bundles" / name
    arguments = {"fixed": str(pair.fixed), "moving": str(pair.moving), "output_dir": str(output), "device": "cpu"}
    monai.bundle.run(
        config_file=str(bundle / "configs/inference.json"), bundle_root=str(bundle), **{**arguments, **options}
    )
    return output


def own(
    name: str,
    pair: Pair,
    output: Path,
    *,
    weights: str | None = None,
    labels: bool = False,
    masks: bool = False,
    inverse: bool = False,
    jacobian: bool = False,
    **options: Any,
) -> Path:
    """The same by the package's own functions."""
    output.mkdir()
    method = zoo.load(name, weights)
    scans = register.read_scans(
        pair.fixed,
        pair.moving,
        *((pair.fixed_labels, pair.moving_labels) if labels else (None, None)),
        *((pair.fixed_labels, pair.moving_labels) if masks else (None, None)),  # what has a label counts
    )
    result = register.register(scans, method, **options)
    results.write(result, output, results.provenance(method), inverse=inverse, jacobian=jacobian)
    return output


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def voxels(path: Path) -> NDArray[Any]:
    found: NDArray[Any] = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    return found


def moved_points(path: Path, around: sitk.Image) -> NDArray[np.float64]:
    """Points near the middle of an image, through a transform file."""
    middle = np.array(around.TransformContinuousIndexToPhysicalPoint([(s - 1) / 2 for s in around.GetSize()]))
    transform = sitk.ReadTransform(str(path))
    return np.array([transform.TransformPoint((middle + point).tolist()) for point in POINTS_MM])


def assert_same(found: Path, expected: Path) -> None:
    """The same files, with images, fields (mm) and transforms that agree."""
    assert written(found) == written(expected)
    for image in (path.name for path in expected.glob("*.nii.gz")):
        one, other = (sitk.ReadImage(str(folder / image)) for folder in (found, expected))
        assert one.GetSize() == other.GetSize()
        assert one.GetOrigin() == other.GetOrigin()
        assert one.GetDirection() == other.GetDirection()
        assert one.GetPixelIDTypeAsString() == other.GetPixelIDTypeAsString()
        if "labels" in image:
            assert (voxels(found / image) == voxels(expected / image)).mean() > 0.9999
        else:
            np.testing.assert_allclose(voxels(found / image), voxels(expected / image), rtol=0, atol=1e-3)
    for transform in (path.name for path in expected.glob("*.h5")):
        side = "inverse_warped.nii.gz" if transform.startswith("inverse") else "warped.nii.gz"
        around = sitk.ReadImage(str(expected / side))
        one, other = (moved_points(folder / transform, around) for folder in (found, expected))
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


def report(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "report.json").read_text("utf-8"))
    return content


@EACH_BUNDLE
def test_monai_writes_what_register_writes(name: str, pair: Pair, tmp_path: Path) -> None:
    weights = some_weights(ROOT / "bundles" / name, tmp_path)
    found = run(name, pair, tmp_path / "monai", weights=weights)
    expected = own(name, pair, tmp_path / "own", weights=weights)
    assert written(found) == FILES
    assert_same(found, expected)
    assert np.abs(voxels(found / "displacement.nii.gz")).max() > 0.1
    made_by = results.provenance(zoo.load(name, weights))
    assert {key: report(found)[key] for key in made_by} == made_by
    assert report(found)["affine_lps_mm"] == report(expected)["affine_lps_mm"]


@EACH_BUNDLE
def test_real_pair_of_any_orientation_comes_closer(name: str, test_data: Path, tmp_path: Path) -> None:
    """Two hippocampi, the moving one's axes permuted and flipped: nothing method-specific, and a better Dice."""
    folder = test_data / "hippocampus"
    fixed, moving = json.loads((folder / "splits.json").read_text("utf-8"))["val"][:2]
    turned = Pair(*(tmp_path / f"{each}.nii.gz" for each in ("fixed", "moving", "fixed_labels", "moving_labels")))
    for kind, one, other in (
        ("images", turned.fixed, turned.moving),
        ("labels", turned.fixed_labels, turned.moving_labels),
    ):
        shutil.copy(folder / kind / f"{fixed}.nii.gz", one)
        scan = nib.load(folder / kind / f"{moving}.nii.gz")
        nib.save(scan.as_reoriented([[1, -1], [2, 1], [0, -1]]), other)
    own(name, turned, tmp_path / "own", weights=some_weights(ROOT / "bundles" / name, tmp_path), labels=True)
    found = report(tmp_path / "own")
    if "hippocampus" in zoo.find(name).weights:
        assert min(found["dice"].values()) > max(0.6, *found["dice_before"].values())
    else:
        assert set(found["dice"]) == {"1", "2"}


def test_command_of_monai_runs_the_bundle(pair: Pair, tmp_path: Path) -> None:
    command = (
        f"-m monai.bundle run --config_file bundles/iirp/configs/inference.json --bundle_root bundles/iirp "
        f"--fixed {pair.fixed} --moving {pair.moving} --output_dir {tmp_path / 'monai'}"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same(tmp_path / "monai", own("iirp", pair, tmp_path / "own"))


def test_labels_masks_inverse_and_jacobian_are_heeded_where_asked(pair: Pair, tmp_path: Path) -> None:
    labels = {"fixed_labels": str(pair.fixed_labels), "moving_labels": str(pair.moving_labels)}
    labels |= {"fixed_mask": str(pair.fixed_labels), "moving_mask": str(pair.moving_labels)}
    found = run("iirp", pair, tmp_path / "monai", inverse=True, jacobian=True, **labels)
    expected = own("iirp", pair, tmp_path / "own", labels=True, masks=True, inverse=True, jacobian=True)
    assert written(found) > FILES | LABEL_FILES
    assert {"inverse_warped.nii.gz", "inverse_displacement.nii.gz", "inverse_transform.h5"} <= written(found)
    assert {"jacobian.nii.gz", "inverse_jacobian.nii.gz"} <= written(found)
    assert_same(found, expected)
    assert set(np.unique(voxels(found / "warped_labels.nii.gz"))) == {0, 1, 2}
    assert report(found)["dice"] == pytest.approx(report(expected)["dice"], abs=1e-3)
    assert 1 < report(found)["counted_percent"] == pytest.approx(report(expected)["counted_percent"], abs=0.1)
    assert report(found)["moving_mask"] == str(pair.moving_labels)


@EACH_BUNDLE
def test_gradient_steps_follow_the_network(name: str, pair: Pair, tmp_path: Path) -> None:
    weights = some_weights(ROOT / "bundles" / name, tmp_path)
    found = run(name, pair, tmp_path / "monai", weights=weights, refine=4)
    assert_same(found, own(name, pair, tmp_path / "own", weights=weights, refine=4))
    assert report(found)["refinement"]["steps"] == 4


def test_controller_and_cap_steer_the_iterations(pair: Pair, tmp_path: Path) -> None:
    own_controller = zoo.load("iirp").network.controller
    once = choose_controller("fixed", None, own_controller)
    thrice = choose_controller("fixed", 3, own_controller)
    found_once = run("iirp", pair, tmp_path / "once", controller="fixed")
    found_thrice = run("iirp", pair, tmp_path / "thrice", controller="fixed", max_iterations=3)
    assert_same(found_once, own("iirp", pair, tmp_path / "own_once", controller=once))
    assert_same(found_thrice, own("iirp", pair, tmp_path / "own_thrice", controller=thrice))
    fields = [voxels(folder / "displacement.nii.gz") for folder in (found_once, found_thrice)]
    assert np.abs(fields[0] - fields[1]).max() > 0.1


def test_start_is_the_one_asked_for(pair: Pair, tmp_path: Path) -> None:
    found = run("iirp", pair, tmp_path / "monai", init="none")
    assert report(found)["init"] == "none"
    assert_same(found, own("iirp", pair, tmp_path / "own", init="none"))


def test_start_may_be_a_file(pair: Pair, tmp_path: Path) -> None:
    start = tmp_path / "start.tfm"
    sitk.WriteTransform(sitk.Euler3DTransform((1.0, 2.0, 3.0), 0.1, 0.0, -0.1, (2.0, -1.0, 0.0)), str(start))
    found = run("iirp", pair, tmp_path / "monai", init=str(start))
    assert report(found)["init"] == "given"
    assert_same(found, own("iirp", pair, tmp_path / "own", init=read_linear(start)))


def refusal(caught: pytest.ExceptionInfo[BaseException]) -> str:
    """What the package said, beneath the errors that MONAI wraps around it."""
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    assert error is not None, f"no InputError beneath {caught.value!r}"
    return str(error)


def test_scans_that_do_not_meet_are_refused(pair: Pair, tmp_path: Path) -> None:
    scan = nib.load(pair.moving)
    far = np.eye(4)
    far[:3, 3] = 5000
    nib.save(nib.Nifti1Image(scan.get_fdata(), far @ scan.affine), tmp_path / "far.nii.gz")
    with pytest.raises(RuntimeError) as caught:
        run("iirp", replace(pair, moving=tmp_path / "far.nii.gz"), tmp_path / "monai", init="none")
    assert "far.nii.gz: does not overlap" in refusal(caught)
    assert not (tmp_path / "monai").exists()


def test_folder_that_holds_something_is_refused_and_kept(pair: Pair, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises((InputError, RuntimeError)) as caught:
        run("iirp", pair, output)
    assert str(output) in refusal(caught)
    assert "not empty" in refusal(caught)
    assert written(output) == {"notes.txt"}
    assert written(tmp_path) == {"output"}


def test_scans_that_the_results_would_replace_are_refused_and_kept(pair: Pair, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    moving = Path(shutil.copy(pair.moving, output / "warped.nii.gz"))
    before = moving.read_bytes()
    with pytest.raises((InputError, RuntimeError)) as caught:
        run("iirp", replace(pair, moving=moving), output, overwrite=True)
    assert f"{moving}: would be overwritten by the results; choose another --output_dir" in refusal(caught)
    assert written(output) == {"warped.nii.gz"}
    assert moving.read_bytes() == before


def test_several_pairs_would_replace_each_others_results(pair: Pair, tmp_path: Path) -> None:
    both = {"fixed": str(pair.fixed), "moving": str(pair.moving)}
    with pytest.raises((InputError, RuntimeError)) as caught:
        run("iirp", pair, tmp_path / "out", **{"dataset#data": [both, both]})
    assert "dataset#data: has 2 pairs; give one, or run several with iregzoo batch" in refusal(caught)
    assert not (tmp_path / "out").exists()


def test_false_on_the_command_line_of_monai_is_false(pair: Pair, tmp_path: Path) -> None:
    found = run("iirp", pair, tmp_path / "monai", overwrite="false", inverse="false")
    assert written(found) == FILES
    with pytest.raises((InputError, RuntimeError)) as caught:
        run("iirp", pair, tmp_path / "monai", overwrite="false")
    assert "not empty" in refusal(caught)


def test_overwrite_keeps_foreign_files(pair: Pair, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    (output / "warped_labels.nii.gz").write_text("of an earlier run")
    run("iirp", pair, output, overwrite=True)
    assert written(output) == FILES | {"notes.txt"}


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"controller": "newton"}, "newton"),
        ({"max_iterations": 0}, "max-iterations 0"),
        ({"refine": -1}, "refine -1"),
        ({"init": "similarity"}, "similarity"),
        ({"weights": "liver"}, "liver"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available"),
        ({"moving": "nowhere.nii.gz"}, "nowhere.nii.gz"),
    ],
)
def test_bad_option_is_named_and_nothing_is_written(
    pair: Pair, tmp_path: Path, options: dict[str, Any], value: str
) -> None:
    with pytest.raises((InputError, RuntimeError)) as caught:
        run("iirp", pair, tmp_path / "output", **options)
    assert value in refusal(caught)
    assert not (tmp_path / "output").exists()
