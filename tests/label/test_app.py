"""The folder that ``iregzoo label-app`` prepares, and what it refuses. No server is needed."""

import json
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from pydoc import locate
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from iregzoo import zoo
from iregzoo.label.app import _further, having, start_command, suiting, write_face
from iregzoo.label.atlas import LabelledImage, packaged
from iregzoo.label.face import AtlasInferer, ReadRequest
from iregzoo.space.files import write_image
from iregzoo.space.formats import read_image
from iregzoo.space.start import on_lattice
from shell import run

from .scans import write_atlas

SCHEMA = Path(__file__).parents[1] / "bundles" / "metadata.schema.json"
EACH_WEIGHTS = pytest.mark.parametrize(
    ("bundle", "weights"), [(bundle.name, name) for bundle in zoo.bundles() for name in bundle.weights]
)
WITH_MONAI_LABEL = pytest.mark.skipif(find_spec("monailabel") is None, reason="MONAI Label is not installed")


@pytest.fixture(scope="module")
def hippocampus() -> LabelledImage:
    return packaged()


def face_of(folder: Path, bundle: str, *atlases: LabelledImage, weights: str | None = None) -> Path:
    write_face(folder / bundle, zoo.load(bundle, weights), weights, atlases)
    return folder / bundle


def config(face: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((face / "configs" / name).read_text("utf-8"))
    return content


# --- a face


def test_face_is_a_bundle_of_one_image_and_one_label_map(tmp_path: Path, hippocampus: LabelledImage) -> None:
    face = face_of(tmp_path, "iirp", hippocampus)
    metadata = config(face, "metadata.json")
    (image_key, image), (pred_key, pred) = (
        next(iter(metadata["network_data_format"][side].items())) for side in ("inputs", "outputs")
    )
    assert (image_key, image["num_channels"]) == ("image", 1)
    assert (pred_key, pred["num_channels"]) == ("pred", 1)
    assert pred["channel_def"] == {"0": "background", "1": "anterior hippocampus", "2": "posterior hippocampus"}
    assert "CC BY-SA 4.0" in (face / "atlas" / "hippocampus" / "README.md").read_text(encoding="utf-8")
    for file in ("LICENSE", "docs/README.md", "docs/data_license.txt"):
        assert (face / file).stat().st_size > 100


@EACH_WEIGHTS
def test_metadata_keep_the_specification(tmp_path: Path, hippocampus: LabelledImage, bundle: str, weights: str) -> None:
    jsonschema = pytest.importorskip("jsonschema", minversion="4")
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text("utf-8")))
    metadata = config(face_of(tmp_path, bundle, hippocampus, weights=weights), "metadata.json")
    assert [error.message for error in validator.iter_errors(metadata)] == []


@EACH_WEIGHTS
def test_face_needs_the_package_alone_and_its_weights_load_strictly(
    tmp_path: Path, hippocampus: LabelledImage, bundle: str, weights: str
) -> None:
    face = face_of(tmp_path, bundle, hippocampus, weights=weights)
    assert not (face / "scripts").exists()
    inference = config(face, "inference.json")
    steps = [*inference["preprocessing"], inference["inferer"], *inference["postprocessing"]]
    assert all(step["_target_"].startswith("iregzoo.label.") and callable(locate(step["_target_"])) for step in steps)
    given = zoo.load(bundle, weights)
    finders = ["finder.pt"] if given.card.finder else []
    assert sorted(path.name for path in face.rglob("*.pt")) == [*finders, "model.pt"]
    assert [path.name for path in face.glob("models/*")] == ["model.pt"]  # all that the panel offers
    network = zoo.build(inference["network_def"])
    network.load_state_dict(torch.load(face / "models" / "model.pt", weights_only=True))
    found = zoo.find_weights(zoo.read_bundle(face))  # checks the hash
    assert network.controller == given.network.controller
    assert found.name == weights
    assert replace(found.card, file="", sha256="") == replace(given.card, file="", sha256="")
    for name, tensor in given.network.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor)
    cards = zoo.read_bundle(face).weights
    assert not any(card.suits for name, card in cards.items() if name != weights)  # what only finds is never chosen
    finder = zoo.finder_of(zoo.read_bundle(face), found)
    assert (finder is None) == (given.finder is None)
    if finder is not None and given.finder is not None:
        for name, tensor in given.finder.network.state_dict().items():
            assert torch.equal(finder.network.state_dict()[name], tensor)


def test_weights_for_any_contrast_bring_their_network(
    tmp_path: Path, hippocampus: LabelledImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "home" / "bundles" / "any"
    shutil.copytree(zoo.find("pan").path, bundle)
    metadata = config(bundle, "metadata.json")
    metadata["weights"] = {"any": {"file": "models/any.pt", "canonical": True}}
    (bundle / "configs" / "metadata.json").write_text(json.dumps(metadata))
    network = zoo.complete(zoo.untrained(zoo.read_bundle(bundle)), zoo.WeightsCard("models/any.pt", canonical=True))
    torch.save(network.state_dict(), bundle / "models" / "any.pt")
    monkeypatch.setenv("IREGZOO_HOME", str(tmp_path / "home"))
    face = face_of(tmp_path, "any", hippocampus)
    built = zoo.build(config(face, "inference.json")["network_def"])
    built.load_state_dict(torch.load(face / "models" / "model.pt", weights_only=True))
    assert built.canonical is not None


def test_weights_within_a_checkpoint_become_plain(tmp_path: Path, hippocampus: LabelledImage) -> None:
    bundle = zoo.find("iirp")
    state = torch.load(bundle.path / "models" / "model.pt", weights_only=True)
    torch.save({"model_state": state, "epoch": 3}, tmp_path / "checkpoint.pt")
    face = face_of(tmp_path, "iirp", hippocampus, weights=str(tmp_path / "checkpoint.pt"))
    assert torch.load(face / "models" / "model.pt", weights_only=True).keys() == state.keys()
    assert zoo.find_weights(zoo.read_bundle(face)).name == "checkpoint.pt"


def test_panel_offers_iterations_to_methods_that_iterate(tmp_path: Path, hippocampus: LabelledImage) -> None:
    panels = {
        bundle: config(face_of(tmp_path, bundle, hippocampus), "inference.json")["displayable_configs"]
        for bundle in ("iirp", "sm_gicnet")
    }
    assert panels["iirp"]["controller"] == ["auto", "tci", "iterstop", "fixed"]
    assert panels["iirp"]["max_iterations"] == 0
    assert panels["sm_gicnet"].keys() == panels["iirp"].keys() - {"controller", "max_iterations"}
    assert panels["sm_gicnet"]["init"] == ["auto", "none", "center", "rigid", "affine"]


# --- which weights


def test_weights_suit_the_atlases(brain: LabelledImage, hippocampus: LabelledImage) -> None:
    """Those for any contrast, for the patients' scans are not known."""
    assert suiting([], [brain]) == {"iirp": "brain_any", "ipear": "brain_any"}
    assert suiting(["pan", "ipear"], [brain]) == {"pan": None, "ipear": "brain_any"}
    for atlases in ([hippocampus], [brain, hippocampus]):
        assert suiting([], atlases) == dict.fromkeys(having(None))
    folder = str(zoo.find("iirp").path)
    assert suiting([folder], [brain]) == {folder: "brain_any"}


@pytest.fixture
def brain(test_data: Path, hippocampus: LabelledImage) -> LabelledImage:
    image = on_lattice(read_image(test_data / "scans" / "t1_brain_a.nii.gz"), 2.0)  # as the network sees it, and fast
    labels = replace(image, data=(image.data > image.data.mean() * 2).int())
    return replace(hippocampus, name="brain", image=image, labels=labels, names={1: "bright"})


def test_a_request_gets_the_weights_that_suit_its_scans(test_data: Path, tmp_path: Path, brain: LabelledImage) -> None:
    method = zoo.load("iirp", "brain_any")
    face = tmp_path / "iirp"
    write_face(face, method, "brain_any", [brain], _further(method))
    assert sorted(path.relative_to(face).as_posix() for path in face.rglob("*.pt")) == [
        "further/model.pt",
        "models/model.pt",
    ]
    network = zoo.build(config(face, "inference.json")["network_def"])
    network.load_state_dict(torch.load(face / "models" / "model.pt", weights_only=True))
    patient = on_lattice(read_image(test_data / "scans" / "t1_brain_b.nii.gz"), 2.0)
    plain, inverted = tmp_path / "plain.nii.gz", tmp_path / "inverted.nii.gz"
    write_image(plain, patient.data, patient.grid)
    shown = patient.data > 0.02 * patient.data.max()
    write_image(inverted, torch.where(shown, 1.1 * patient.data.max() - patient.data, 0), patient.grid)
    for image, weights, suits in ((plain, "brain", "T1 brains"), (inverted, "brain_any", "brains")):
        request = ReadRequest(str(face))({"image": str(image), "refine": 0})
        report = AtlasInferer()(request["image"][None], network.eval()).meta["report"]
        assert (report["weights"], report["weights_chosen_for"]) == (weights, suits)
        assert report["weights_sha256"] == method.bundle.weights[weights].sha256
        assert report["finder_sha256"] == method.weights.sha256


def test_a_face_has_one_file_of_weights_where_no_other_suits_or_could_be_built(brain: LabelledImage) -> None:
    method = zoo.load("iirp", "brain_any")
    assert _further(method) == "brain"
    assert _further(zoo.load("iirp", "brain")) is None
    for name, change in (("brain", {"suits": ""}), ("brain", {"controller": {}})):
        cards = {**method.bundle.metadata["weights"]}
        cards[name] = {**cards[name], **change}
        other = replace(method.bundle, metadata={**method.bundle.metadata, "weights": cards})
        assert _further(replace(method, bundle=other)) is None


# --- the command


def prepare(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of ``iregzoo label-app ARGUMENTS``."""
    return run(monkeypatch, "label-app", *arguments)


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which a command ends."""
    assert prepare(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    return error


def test_a_missing_part_of_an_atlas_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = write_atlas(tmp_path)
    for start in (0, 2, 4):
        rest = options[:start] + options[start + 2 :]
        assert "needs all three" in refused(monkeypatch, capsys, str(tmp_path / "app"), *rest)
    assert not (tmp_path / "app").exists()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--atlas", "none.nii.gz", "none.nii.gz: no such file"),
        ("--atlas-labels", "none.nii.gz", "none.nii.gz: no such file"),
        ("--label-names", "none.json", "none.json: cannot be read"),
        ("--atlas-labels", "a.nii.gz,b.nii.gz", "1 atlases and 2 label maps"),
        ("--bundles", "nonesuch", "bundle 'nonesuch' is unknown"),
        ("--bundles", ",", "--bundles is empty"),
        ("--bundles", "", "--bundles is empty"),
        ("--atlas", "", "--atlas is empty"),
        ("--weights", "nonesuch", "no bundle has weights nonesuch"),
    ],
)
def test_bad_choices_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: str,
    words: str,
) -> None:
    options = [*write_atlas(tmp_path), "--bundles", "pan", "--weights", "hippocampus"]
    if option == "--weights":
        del options[6:8]  # every bundle that has them
    options[options.index(option) + 1] = value
    assert words in refused(monkeypatch, capsys, str(tmp_path / "app"), *options)
    assert not (tmp_path / "app").exists()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ('["thalamus", "putamen"]', "does not hold a JSON object; give JSON"),
        ("thalamus 1", "is not valid JSON"),
        ('{"one": "thalamus"}', "entry 1: label 'one' is not a whole number; give JSON"),
        ('{"1": "thalamus"}', "does not name the labels [2]"),
        ('{"1": "thalamus", "2": " "}', "does not name the labels [2]"),
        ('{"1": "thalamus", "2": "Thalamus"}', "labels 1 and 2 are both named 'thalamus'"),
        ('{"1": "thalamus", "2": "background"}', "labels 0 and 2 are both named 'background'"),
    ],
)
def test_names_that_do_not_tell_labels_apart_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], names: str, words: str
) -> None:
    options = write_atlas(tmp_path)
    (tmp_path / "names.json").write_text(names)
    assert words in refused(monkeypatch, capsys, str(tmp_path / "app"), *options)
    assert not (tmp_path / "app").exists()


def change_labels(path: str, change: str) -> None:
    image = nib.load(path)
    voxels = np.asarray(image.dataobj)
    changed = {"another grid": voxels[1:], "nothing": voxels * 0, "negative": -voxels}[change]
    nib.save(nib.Nifti1Image(changed, image.affine), path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("another grid", "mine_labels.nii.gz: its grid"),
        ("nothing", "mine_labels.nii.gz: is empty"),
        ("negative", "holds the negative label -2"),
    ],
)
def test_maps_that_are_no_atlas_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str, words: str
) -> None:
    options = write_atlas(tmp_path)
    change_labels(options[3], change)
    assert words in refused(monkeypatch, capsys, str(tmp_path / "app"), *options)
    assert not (tmp_path / "app").exists()


def test_image_and_map_in_each_others_place_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = write_atlas(tmp_path)
    options[1], options[3] = options[3], options[1]
    error = refused(monkeypatch, capsys, str(tmp_path / "app"), *options)
    assert "mine_labels.nii.gz: looks like a label map; give the image with --atlas" in error


def test_an_atlas_given_twice_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = write_atlas(tmp_path)
    options[1], options[3] = f"{options[1]},{options[1]}", f"{options[3]},{options[3]}"
    assert "mine.nii.gz: is given 2 times" in refused(monkeypatch, capsys, str(tmp_path / "app"), *options)
    assert not (tmp_path / "app").exists()


@WITH_MONAI_LABEL
def test_numbers_given_anew_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(monkeypatch, str(tmp_path / "app"), "--bundles", "pan", *write_atlas(tmp_path, (17, 2053))) == 0
    said = capsys.readouterr().out
    assert ": pan (hippocampus) with the atlas mine\n" in said
    assert "labels: 1 part 17 (was 17), 2 part 2053 (was 2053)\n" in said


def test_two_atlases_of_one_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options, other = write_atlas(tmp_path), write_atlas(tmp_path / "other")
    options[1], options[3] = f"{options[1]},{other[1]}", f"{options[3]},{other[3]}"
    error = refused(monkeypatch, capsys, str(tmp_path / "app"), *options)
    assert "two atlases are called 'mine'; rename one of the files" in error


def test_a_bundle_without_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "home" / "bundles" / "bare"
    (bundle / "configs").mkdir(parents=True)
    (bundle / "configs" / "metadata.json").write_text('{"version": "0.1.0"}')
    monkeypatch.setenv("IREGZOO_HOME", str(tmp_path / "home"))
    assert "bundle bare names no weights" in refused(monkeypatch, capsys, str(tmp_path / "app"), "--bundles", "bare")
    assert not (tmp_path / "app").exists()


def test_a_folder_in_use_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "main.py"
    mine.write_text("print('mine')")
    for option in ([], ["--overwrite"]):
        error = refused(monkeypatch, capsys, str(tmp_path), *option)
        assert "is not empty and not a Label app; choose another folder" in error
        (tmp_path / "model").mkdir(exist_ok=True)  # as any project may have one
    assert mine.read_text("utf-8") == "print('mine')"
    assert set(tmp_path.iterdir()) == {mine, tmp_path / "model"}


def test_page_for_clinicians_shows_the_command_that_is_printed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "clinicians.md").read_text(encoding="utf-8")
    assert f"\n{start_command(Path('hippocampus'), having(None), 'scans')}\n" in page


@pytest.mark.skipif(find_spec("monailabel") is not None, reason="MONAI Label is installed")
def test_without_monai_label_it_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert 'pip install --no-build-isolation "iregzoo[label]"' in refused(
        monkeypatch, capsys, str(tmp_path / "app"), "--bundles", "pan"
    )
    assert not (tmp_path / "app").exists()


@WITH_MONAI_LABEL
def test_app_is_the_stock_one_and_can_be_prepared_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = tmp_path / "app"
    assert prepare(monkeypatch, str(app), "--bundles", "pan,iirp") == 0
    stock = Path(sys.prefix) / "monailabel" / "sample-apps" / "monaibundle"
    files = [file.relative_to(stock) for file in stock.rglob("*") if file.is_file() and "__pycache__" not in str(file)]
    assert len(files) > 5
    for file in files:
        assert (app / file).read_bytes() == (stock / file).read_bytes()
    (app / "logs").mkdir()
    (app / "logs" / "app.log").write_text("mine")
    assert prepare(monkeypatch, str(app), "--bundles", "pan", "--overwrite", *write_atlas(tmp_path)) == 0
    assert (app / "logs" / "app.log").read_text("utf-8") == "mine"
    assert [path.name for path in (app / "model" / "pan" / "atlas").iterdir()] == ["mine"]
    assert not (app / "model" / "iirp").exists()
