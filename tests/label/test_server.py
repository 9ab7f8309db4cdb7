"""Label maps through MONAI Label's own server: what a viewer asks for, and what it gets.

The whole file is skipped without MONAI Label, which has requirements of its own: ``.ci/run`` gives it an environment.
"""

import importlib.util
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from iregzoo import zoo

from .conftest import Server
from .scans import USELESS, mirrored, thick, turned, write_dicom

METHODS = [bundle.name for bundle in zoo.bundles() if "hippocampus" in bundle.weights]
EACH_METHOD = pytest.mark.parametrize("method", METHODS)
ENOUGH = 0.75  # mean Dice of a patient; over the test split it is higher


def voxels(image: Any) -> NDArray[np.uint8]:
    return np.asarray(image.dataobj).astype(np.uint8)


def dice(found: NDArray[Any], true: NDArray[Any]) -> float:
    """Mean of both labels."""
    overlaps = [2 * ((found == v) & (true == v)).sum() / ((found == v).sum() + (true == v).sum()) for v in (1, 2)]
    return float(np.mean(overlaps))


def truth(hippocampi: Path, patient: str) -> nib.Nifti1Image:
    return nib.load(hippocampi / "labels" / f"{patient}.nii.gz")


# --- what a viewer gets


def test_server_offers_every_method_and_its_options(server: Server) -> None:
    models = server.ask("GET", "/info/").content["models"]
    assert list(models) == [*METHODS, "own"]
    for method in METHODS:
        assert models[method]["type"] == "segmentation"
        assert models[method]["labels"] == {"anterior hippocampus": 1, "posterior hippocampus": 2}
        assert models[method]["config"]["model_filename"] == ["model.pt"]
    assert models["iirp"]["config"]["controller"] == ["auto", "tci", "iterstop", "fixed"]
    assert "controller" not in models["sm_gicnet"]["config"]
    assert len(models["own"]["config"]["atlas"]) == 2


@EACH_METHOD
@pytest.mark.parametrize("change", [turned, thick])
def test_labels_lie_on_the_patient(
    server: Server,
    hippocampi: Path,
    patients: list[str],
    tmp_path: Path,
    method: str,
    change: Callable[..., nib.Nifti1Image],
) -> None:
    """On a scan with other axes, and on one of thick oblique slices, in the geometry of each."""
    patient = patients[METHODS.index(method) % len(patients)]
    asked = sitk.ReadImage(str(server.studies / f"{patient}_{change.__name__}.nii.gz"))
    path = server.labels(method, f"image={patient}_{change.__name__}", tmp_path)
    found = sitk.ReadImage(str(path))
    assert found.GetPixelID() == sitk.sitkUInt8
    assert found.GetSize() == asked.GetSize()
    for name in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(found, name)() == pytest.approx(getattr(asked, name)(), abs=1e-5)
    true = change(truth(hippocampi, patient), **({"labels": True} if change is thick else {}))
    assert dice(voxels(nib.load(path)), voxels(true)) > ENOUGH


def test_where_the_axes_run_does_not_matter(server: Server, patients: list[str], tmp_path: Path) -> None:
    plain = nib.load(server.labels("pan", f"image={patients[0]}", tmp_path, ".nii.gz"))
    other = nib.load(server.labels("pan", f"image={patients[0]}_turned", tmp_path, ".nii"))
    np.testing.assert_array_equal(voxels(turned(plain)), voxels(other))


def test_labels_come_as_slicer_asks_for_them(
    server: Server, hippocampi: Path, patients: list[str], tmp_path: Path
) -> None:
    """With the client of the Slicer plugin that comes with MONAI Label: upload, session, inference."""
    client = slicer_client()(server.url, str(tmp_path))
    image = sitk.ReadImage(str(hippocampi / "images" / f"{patients[0]}.nii.gz"))
    sitk.WriteImage(image, str(tmp_path / "upload.nii.gz"))
    session = client.create_session(str(tmp_path / "upload.nii.gz"))["session_id"]
    panel = client.info()["models"]["iirp"]["config"]
    asked = {name: value[0] if isinstance(value, list) else value for name, value in panel.items()}
    file, params = client.infer(
        "iirp",
        patients[0],
        {**asked, "result_extension": ".nrrd", "result_dtype": "uint8"},
        session_id=session,
    )
    found = sitk.ReadImage(file)
    assert found.GetPixelID() == sitk.sitkUInt8
    labels = sitk.ReadImage(str(hippocampi / "labels" / f"{patients[0]}.nii.gz"))
    assert dice(sitk.GetArrayFromImage(found), sitk.GetArrayFromImage(labels)) > ENOUGH
    assert params["label_names"] == {"anterior hippocampus": 1, "posterior hippocampus": 2}
    assert params["warnings"] == []


def slicer_client() -> Any:
    """The class through which the Slicer plugin talks to a server."""
    file = Path(sys.prefix) / "monailabel" / "plugins" / "slicer" / "MONAILabel" / "MONAILabelLib" / "client.py"
    if not file.is_file() or sys.version_info >= (3, 13):
        pytest.skip("the client of the Slicer plugin is not there, or not for this Python")
    spec = importlib.util.spec_from_file_location("slicer_client", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MONAILabelClient


def test_labels_come_as_ohif_asks_for_them(server: Server, patients: list[str]) -> None:
    asked = {"result_extension": ".nrrd", "result_dtype": "uint16", "result_compress": False}
    answer = server.infer("pan", f"image={patients[0]}&output=all", refine=None, **asked)
    assert answer.status == 200
    assert b"NRRD" in answer.content
    assert b"type: unsigned short" in answer.content
    assert b'"warnings": []' in answer.content


def test_a_dicom_series_of_many_files_is_one_scan(
    server: Server, hippocampi: Path, patients: list[str], tmp_path: Path
) -> None:
    slices = write_dicom(hippocampi / "images" / f"{patients[1]}.nii.gz", tmp_path)
    files = [("files", (path.name, path.read_bytes())) for path in slices]
    session = server.ask("PUT", "/session/", files=files).content["session_id"]
    answer = server.infer("pan", f"session_id={session}&output=image")
    assert answer.status == 200, answer.content
    (tmp_path / "labels.nii.gz").write_bytes(answer.content)
    found = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "labels.nii.gz")))
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(hippocampi / "labels" / f"{patients[1]}.nii.gz")))
    assert dice(found, labels) > ENOUGH


def test_four_requests_at_once_get_what_they_get_alone(server: Server, patients: list[str], tmp_path: Path) -> None:
    def ask(index: int) -> NDArray[np.uint8]:
        folder = tmp_path / str(index)
        folder.mkdir()
        return voxels(nib.load(server.labels("pan", f"image={patients[index % 4]}", folder)))

    with ThreadPoolExecutor(4) as together:
        found = list(together.map(ask, range(4)))
    for index, labels in enumerate(found):
        np.testing.assert_array_equal(labels, ask(index + 4))
    assert len({labels.shape for labels in found}) > 1  # other patients, other scans


# --- what tells whether to trust it


def test_figures_tell_a_good_result(server: Server, patients: list[str]) -> None:
    answer = server.infer("iirp", f"image={patients[0]}&output=json")
    found = answer.content
    assert (answer.status, found["warnings"]) == (200, [])
    assert found["ncc_after"] > found["ncc_start"] + 0.2 > found["ncc_before"] + 0.2
    assert found["folding_percent"] < 1
    assert found["covered_percent"] > 70
    assert set(found["label_size"]) == {"anterior hippocampus", "posterior hippocampus"}
    assert (found["atlas"], found["bundle"], found["weights"]) == ("hippocampus", "iirp", "hippocampus")
    assert found["weights_sha256"] == zoo.find("iirp").weights["hippocampus"].sha256


def test_the_other_side_is_doubted_and_refused_on_demand(server: Server, patients: list[str]) -> None:
    doubtful = f"image={patients[0]}_mirrored&output=json"
    answer = server.infer("sm_gicnet", doubtful)
    assert answer.status == 200
    assert "does not resemble the atlas" in answer.content["warnings"][0]
    answer = server.infer("sm_gicnet", doubtful, when_in_doubt="refuse")
    assert answer.status == 400
    assert answer.content["detail"].startswith("the result is doubtful: the scan does not resemble the atlas")
    answer = server.infer("sm_gicnet", f"image={patients[0]}&output=json", when_in_doubt="refuse")
    assert answer.status == 200


# --- options


def test_controllers_and_their_cap_act(server: Server, patients: list[str]) -> None:
    def iterations(**options: Any) -> list[int]:
        answer = server.infer("iirp", f"image={patients[0]}&output=json", **options)
        assert answer.status == 200, answer.content
        counts: list[int] = answer.content["iterations"]
        return counts

    assert iterations(controller="fixed", max_iterations=0) == [1, 1, 1, 1]
    assert iterations(controller="fixed", max_iterations=3) == [3, 3, 3, 3]
    assert iterations(controller="fixed", max_iterations="2") == [2, 2, 2, 2]
    assert max(iterations(controller="tci", max_iterations=5)) == 5
    own, asked = iterations(), iterations(controller="iterstop")
    assert own == asked != [1, 1, 1, 1]


def test_affine_start_and_refinement_act(server: Server, patients: list[str]) -> None:
    query = f"image={patients[0]}&output=json"
    plain, rigid, none = (server.infer("pan", query, init=init).content for init in ("auto", "rigid", "none"))
    assert (plain["init"], rigid["init"], none["init"]) == ("center", "rigid", "none")
    assert rigid["affine_lps_mm"] != plain["affine_lps_mm"] != none["affine_lps_mm"]
    assert none["ncc_start"] == none["ncc_before"]
    refined = server.infer("pan", query, refine=5).content
    assert refined["refinement"]["steps"] == 5
    assert refined["refinement"]["local_ncc_after"] > refined["refinement"]["local_ncc_before"]
    assert "refinement" not in server.infer("pan", query).content


def test_mirror_lays_the_atlas_on_the_other_side(server: Server, patients: list[str], tmp_path: Path) -> None:
    plain = nib.load(server.labels("pan", f"image={patients[0]}", tmp_path, ".nii.gz"))
    other = nib.load(server.labels("pan", f"image={patients[0]}_mirrored", tmp_path, ".nii", mirror=True))
    np.testing.assert_array_equal(voxels(mirrored(plain)), voxels(other))
    np.testing.assert_allclose(other.affine, plain.affine, atol=1e-5)
    report = server.infer("pan", f"image={patients[0]}_mirrored&output=json", mirror="true").content
    assert (report["mirror"], report["warnings"]) == (True, [])


def test_own_atlases_can_be_chosen(server: Server, hippocampi: Path, patients: list[str], tmp_path: Path) -> None:
    assert server.ask("GET", "/info/").content["models"]["own"]["labels"] == {
        "anterior hippocampus": 1,
        "posterior hippocampus": 2,
    }
    one, other = patients[-2:]
    true = voxels(truth(hippocampi, one))
    found = {}
    for atlas in (one, other):
        path = server.labels("own", f"image={one}", tmp_path, f".{atlas[-1]}.nii.gz", atlas=atlas)
        found[atlas] = dice(voxels(nib.load(path)), true)
    # Who is the atlas gets nearly the atlas's labels back.
    assert found[one] > 0.92 > found[other] > 0.6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"controller": "never"}, "controller 'never' is unknown"),
        (
            {"max_iterations": "many"},
            "max_iterations 'many': give a whole number from 1 to 100, or 0 for the method's default",
        ),
        ({"max_iterations": -1}, "max_iterations -1: give a whole number"),
        ({"max_iterations": 10**9}, "max_iterations 1000000000: give a whole number from 1 to 100"),
        ({"refine": 10**7}, "refine 10000000: give at most 1000"),
        ({"refine": 1.5}, "refine 1.5: give a whole number"),
        ({"init": "sideways"}, "init 'sideways' is unknown"),
        ({"init": __file__}, f"init '{__file__}' is unknown; choose auto, none, center, rigid, affine"),
        ({"atlas": "../../lung"}, "atlas '../../lung' is unknown; available: hippocampus"),
        ({"mirror": "maybe"}, "mirror 'maybe': give true or false"),
        ({"when_in_doubt": "cry"}, "when_in_doubt 'cry': choose warn or refuse"),
        ({"model_filename": "mine.pt"}, "model_filename 'mine.pt': is not among this method's weights"),
        ({"device": "nope"}, "device 'nope' is unknown; choose auto, cpu, cuda, mps"),
        ({"device": "cpu:7"}, "device 'cpu:7' is not available on this machine"),
        ({"Init": "rigid"}, "option 'Init' is unknown; did you mean 'init'?"),
        ({"max-iterations": 3}, "option 'max-iterations' is unknown; did you mean 'max_iterations'?"),
    ],
)
def test_impossible_options_are_refused(
    server: Server, patients: list[str], options: dict[str, Any], words: str
) -> None:
    answer = server.infer("iirp", f"image={patients[0]}&output=json", **options)
    assert answer.status == 400
    assert words in answer.content["detail"]


def test_options_are_never_run_as_code(server: Server, patients: list[str], tmp_path: Path) -> None:
    """MONAI's configs run what follows a $, and MONAI Label writes options into the config."""
    code = f"$__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()"
    choices = ("controller", "init", "atlas", "when_in_doubt", "device", "model_filename")
    for option in (*choices, "max_iterations", "refine"):
        answer = server.infer("iirp", f"image={patients[0]}&output=json", **{option: code})
        assert answer.status == 400
        assert "pathlib" in answer.content["detail"]
    assert not (tmp_path / "ran").exists()


# --- what goes wrong


@pytest.mark.parametrize("name", USELESS)
def test_useless_scans_are_refused_and_the_server_goes_on(server: Server, patients: list[str], name: str) -> None:
    answer = server.infer("pan", f"image={name}&output=image")
    assert answer.status == 400
    assert USELESS[name] in answer.content["detail"]
    assert server.infer("pan", f"image={patients[0]}&output=json").status == 200


@pytest.mark.parametrize("way", ["session", "file"])
def test_a_corrupt_upload_is_refused_and_the_next_one_works(
    server: Server, patients: list[str], tmp_path: Path, way: str
) -> None:
    def upload(content: bytes) -> tuple[int, Any]:
        part = ("scan.nii.gz", content)
        if way == "file":
            answer = server.infer("pan", "output=json", files={"file": part})
        else:
            session = server.ask("PUT", "/session/", files={"files": part}).content["session_id"]
            answer = server.infer("pan", f"session_id={session}&output=json")
        return answer.status, answer.content

    whole = (server.studies / f"{patients[0]}.nii.gz").read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"no image at all"):
        status, content = upload(broken)
        assert status == 400
        assert "scan.nii.gz" in content["detail"] or "not a readable NIfTI" in content["detail"]
    status, content = upload(whole)
    assert (status, content.get("warnings")) == (200, [])


def test_an_unknown_image_is_refused(server: Server) -> None:
    answer = server.infer("pan", "image=nobody&output=json")
    assert answer.status == 400
    assert "no image with this name" in answer.content["detail"]


@pytest.mark.parametrize("file", ["template.nii.gz", "labels.nii.gz", "labels.json"])
def test_a_missing_atlas_is_said_and_its_return_noticed(server: Server, patients: list[str], file: str) -> None:
    path = server.app / "model" / "pan" / "atlas" / "hippocampus" / file
    aside = path.with_name(f"{file}.aside")
    path.rename(aside)
    try:
        answer = server.infer("pan", f"image={patients[0]}&output=image")
    finally:
        aside.rename(path)
    assert answer.status == 500
    assert f"{file}: is missing" in answer.content["detail"]
    assert server.infer("pan", f"image={patients[0]}&output=json").status == 200


def test_weights_of_another_hash_are_refused(server: Server, patients: list[str]) -> None:
    path = server.app / "model" / "ipear" / "models" / "model.pt"
    aside = path.with_name("aside")
    path.rename(aside)
    shutil.copyfile(server.app / "model" / "iirp" / "models" / "model.pt", path)
    try:
        answer = server.infer("ipear", f"image={patients[0]}&output=image")
    finally:
        aside.replace(path)
    assert answer.status == 500
    assert "sha256 is" in answer.content["detail"]
    assert server.infer("ipear", f"image={patients[0]}&output=json").status == 200
