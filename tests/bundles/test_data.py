"""The papers' data sets through the bundles' configs: each is one override, and training sees what inference sees."""

import inspect
import json
from dataclasses import replace
from pathlib import Path
from pydoc import locate
from typing import Any

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from scipy.ndimage import map_coordinates

from cards import with_card
from iregzoo import register, zoo
from iregzoo.bundle import LoadPair
from iregzoo.datasets import LAYOUTS, find_scans
from iregzoo.errors import InputError
from iregzoo.training import LoadScan
from layouts import touch, write, write_dirlab

pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
ROOT = Path(__file__).resolve().parents[2]
IIRP = ROOT / "bundles" / "iirp"
DOCS = (ROOT / "docs/datasets.md").read_text(encoding="utf-8")
FILES = sorted(ROOT.glob("bundles/*/configs/data_*.json"))
NAMES = [f"{path.parents[1].name}-{path.stem.removeprefix('data_')}" for path in FILES]
EACH_FILE = pytest.mark.parametrize("path", FILES, ids=NAMES)
SETTINGS = {"layout", "splits", "spacing", "shape", "center", "intensity_window", "labels"}
SMALL: dict[str, Any] = {
    "device": "cpu",
    "shape": [16, 16, 16],
    "steps": 2,
    "steps_per_epoch": 2,
    "val_interval": 1,
    "save_interval": 1,
}


def parser_of(path: Path) -> ConfigParser:
    """An override merged over its bundle's training."""
    return ConfigParser(ConfigParser.load_config_files([str(path.with_name("train.json")), str(path)]))


def test_every_paper_has_its_data_sets() -> None:
    assert set(NAMES) == {
        *("iirp-mindboggle", "iirp-flare"),
        *("ipear-mindboggle", "ipear-lpba40", "ipear-ixi", "ipear-flare"),
        *("pan-ixi", "pan-lpba40", "pan-abdomen_mr"),
        *("sm_gicnet-ixi", "sm_gicnet-oasis"),
        *("ad_regnet-ixi", "ad_regnet-dirlab"),
    }


@EACH_FILE
def test_override_merges_and_sets_nothing_but_the_data(path: Path) -> None:
    own = json.loads(path.read_text("utf-8"))
    extra = {"smoothness"} if path.stem == "data_abdomen_mr" else set()
    if path.stem == "data_dirlab":  # landmarks are what validation measures
        steps = ("evaluator#prepare_batch", "postprocessing", "key_metric", "best#lowest")
        extra = {f"validate#{step}" for step in steps}
    if path.parents[1].name == "ad_regnet" and path.stem == "data_ixi":  # the size of its regions is the data set's
        extra = {"network_def#network#patch"}
    if path.parents[1].name == "sm_gicnet" and path.stem == "data_oasis":  # the paper counts epochs
        extra = {"starts", "steps"}
    assert set(own) == SETTINGS | extra
    base = ConfigParser(ConfigParser.load_config_files([str(path.with_name("train.json"))]))
    merged = parser_of(path)
    for key, value in own.items():
        parent, _, last = key.rpartition("#")
        known = set(base[parent] if parent else base.get())
        if last not in known:
            known |= set(inspect.signature(locate(base[parent]["_target_"])).parameters)
        assert last in known
        merged.get_parsed_content(key, instantiate=False)
        assert merged.get(key) == value
    assert merged.get("steps") == own.get("steps", base.get("steps"))


@pytest.mark.parametrize(("name", "scans"), [("sm_gicnet-ixi", 269), ("sm_gicnet-oasis", 280)])
def test_levels_of_sm_gicnet_begin_at_the_papers_epochs(name: str, scans: int) -> None:
    """4, 4, 6 and 6, of all unordered pairs, in whole epochs of a training here."""
    settings = parser_of(override(name))
    ends = np.cumsum([4, 4, 6, 6]) * (scans * (scans - 1) // 2)
    rounded = (np.round(ends / settings["steps_per_epoch"]) * settings["steps_per_epoch"]).astype(int).tolist()
    assert [*settings["starts"][1:], settings["steps"]] == pytest.approx(rounded, abs=settings["steps_per_epoch"])
    assert settings["splits"]["train"] == scans


@EACH_FILE
def test_override_is_of_a_known_layout_and_a_grid_that_networks_take(path: Path) -> None:
    own = json.loads(path.read_text("utf-8"))
    assert own["layout"] in LAYOUTS
    splits = own["splits"] or LAYOUTS[own["layout"]].splits
    assert list(splits) == ["train", "val", "test"]
    stride = zoo.untrained(zoo.read_bundle(path.parents[1])).stride
    assert all(size % stride == 0 for size in own["shape"])
    assert own["labels"] is None or len(set(own["labels"])) == len(own["labels"])
    assert own["center"] in ("scan", "labels")


@pytest.mark.parametrize(("name", "patch"), [("ad_regnet-ixi", 24), ("ad_regnet-dirlab", 16)])
def test_regions_of_ad_regnet_are_of_the_papers_size(name: str, patch: int) -> None:
    network = parser_of(override(name)).get_parsed_content("network_def").network
    assert {level.regions.patch for level in network.levels} == {patch}


def test_landmarks_are_looked_at_beside_label_maps_and_images_alone_where_asked() -> None:
    path = override("ad_regnet-dirlab")
    configs = [path.with_name(name) for name in ("train.json", path.name, "unlabelled.json")]
    for count, prepare, lowest in ((2, "prepare_landmarks", True), (3, "prepare_pairs", False)):
        merged = ConfigParser(ConfigParser.load_config_files(list(map(str, configs[:count]))))
        assert merged["validate"]["evaluator"]["prepare_batch"] == f"$training.{prepare}"
        assert merged["validate"]["best"]["lowest"] is lowest


@EACH_FILE
def test_document_names_every_override(path: Path) -> None:
    assert f"`{path.parents[1].name}/{path.stem}`" in DOCS


@EACH_FILE
def test_override_finds_its_data_set(path: Path, tmp_path: Path) -> None:
    """The whole of the config's way to the files, with counts that fit the few scans here."""
    root = touch(tmp_path, json.loads(path.read_text("utf-8"))["layout"])
    parser = parser_of(path)
    parser["dataset_dir"] = str(root)
    if isinstance((parser.get("splits") or {}).get("train"), int):
        parser["splits"] = {"train": 2}
    if parser.get("layout") in ("oasis", "lpba40", "flare21"):
        parser["splits"] = {"train": 2}
    assert len(parser.get_parsed_content("train#scans#data")) >= 2


def test_labels_of_the_papers_are_as_many_as_they_say() -> None:
    labels = {name: json.loads(path.read_text("utf-8"))["labels"] for name, path in zip(NAMES, FILES, strict=True)}
    assert len(labels["iirp-mindboggle"]) == 62
    assert set(labels["ipear-mindboggle"]) == {14, 15, 16, *labels["iirp-mindboggle"]}
    assert len(labels["ipear-lpba40"]) == 54
    assert set(labels["pan-lpba40"]) == {181, 182, *labels["ipear-lpba40"]}
    assert labels["ipear-flare"] == labels["pan-abdomen_mr"] == [1, 2, 3, 4]


# --- end to end


def train(root: Path, output: Path, path: Path, bundle: Path = IIRP, **options: Any) -> Any:
    made = monai.bundle.create_workflow(
        config_file=[str(bundle / "configs/train.json"), str(path)],
        workflow_type="train",
        bundle_root=str(bundle),
        dataset_dir=str(root),
        output_dir=str(output),
        **{**SMALL, **options},
    )
    made.run()
    return made


def override(name: str) -> Path:
    return FILES[NAMES.index(name)]


@pytest.mark.parametrize(
    ("name", "layout", "labels", "options"),
    [
        ("iirp-mindboggle", "mindboggle", (1002, 2035), {}),
        ("iirp-flare", "flare21", (1, 3), {"splits": {"train": 2, "val": 2}, "spacing": [1.0] * 3}),
        ("pan-ixi", "ixi", (7, 45), {}),
        ("sm_gicnet-ixi", "freesurfer", (17, 53), {"splits": {"train": 2, "val": ["IXI*"]}, "overlap": 1.0}),
    ],
)
def test_data_set_of_a_paper_trains(
    name: str, layout: str, labels: tuple[int, int], options: dict[str, Any], tmp_path: Path
) -> None:
    if layout == "flare21":
        options = {**options, "splits": {"train": 2, "val": ["*"]}}
    root = write(tmp_path / "data", layout, labels)
    parser = train(root, tmp_path / "out", override(name), **options).parser
    compared = parser.get_parsed_content("compared")
    assert set(labels) <= set(compared)
    sample = parser.get_parsed_content("train#dataset")[0]
    assert sample["image"].shape == (2, 16, 16, 16)
    assert set(sample["label"].unique().tolist()) <= {0, *labels}
    dice = parser.get_parsed_content("validate#evaluator").state.metrics["val_dice"]
    assert 0.2 < dice <= 1
    assert (tmp_path / "out" / "best.pt").is_file()


def test_dirlab_trains_and_reports_the_error_of_its_landmarks(tmp_path: Path) -> None:
    places = np.array([(100, 100, 40), (150, 120, 60)])
    write_dirlab(tmp_path / "data", 1, {"T00": places, "T50": places + np.array([0, 0, 2])}, offset=1024)
    path = override("ad_regnet-dirlab")
    splits = {"train": ["Case1*"], "val": ["Case1*"]}
    options = {"splits": splits, "spacing": [6.0] * 3, "learning_rate": 1e-9}
    parser = train(tmp_path / "data", tmp_path / "out", path, path.parents[1], **options).parser
    pair = parser.get_parsed_content("validate#dataset")[0]
    assert list(pair) == ["image", "points"]
    moving, fixed = pair["points"] * 6.0
    torch.testing.assert_close((moving - fixed).abs(), torch.tensor([[0.0, 0, 5], [0, 0, 5]]), atol=1e-3, rtol=0)
    network = parser.get_parsed_content("network").eval()
    with torch.inference_mode():
        field = network(pair["image"][None])[0].numpy()
    at_fixed = [map_coordinates(component, pair["points"][1].T.numpy(), order=1) for component in field]
    errors = fixed + 6.0 * np.stack(at_fixed, axis=1) - moving
    tre = parser.get_parsed_content("validate#evaluator").state.metrics["val_tre_mm"]
    assert tre == pytest.approx(float(np.linalg.norm(errors, axis=1).mean()), rel=1e-4)
    assert parser.get_parsed_content("validate#best").best == pytest.approx(tre)


# --- the window of training is the window of inference


def write_ct(path: Path, seed: int) -> Path:
    """A small CT all above -1000 HU, so that none of it is empty."""
    hu = np.random.default_rng(seed).uniform(-990, 300, (16, 16, 16)).astype(np.float32)
    hu[4:12, 5:11, 3:13] -= 100
    nib.save(nib.Nifti1Image(np.maximum(hu, -999), np.diag([1.0, 1.0, 1.0, 1.0])), path)
    return path


def test_training_and_inference_see_a_windowed_ct_alike(tmp_path: Path) -> None:
    paths = {name: str(write_ct(tmp_path / f"{name}.nii.gz", seed)) for seed, name in enumerate(("moving", "fixed"))}
    load = LoadScan((1.0, 1.0, 1.0), (16, 16, 16), window=[-1000, -200])
    trained = torch.cat([load({"image": paths[name]})["image"] for name in ("moving", "fixed")])
    card = zoo.WeightsCard(file="", init="center", minimum=(16, 16, 16), window=(-1000, -200))
    inferred = LoadPair(card, stride=8)(paths)["image"]
    torch.testing.assert_close(inferred, trained, atol=1e-5, rtol=0)
    without = LoadPair(replace(card, window=None), stride=8)(paths)["image"]
    assert (without - trained).abs().max() > 0.1


def test_register_uses_the_window_of_the_card(tmp_path: Path) -> None:
    scans = register.read_scans(write_ct(tmp_path / "f.nii.gz", 0), write_ct(tmp_path / "m.nii.gz", 1))
    method = zoo.load("iirp")
    fields = [
        register.register(scans, with_card(method, window=window), init="none").displacement
        for window in (None, (-1000, -200))
    ]
    assert (fields[0] - fields[1]).abs().max() > 1e-3
    with pytest.raises(InputError, match=r"f\.nii\.gz: its values, .* lie outside the intensity window 2000 to 3000"):
        register.register(scans, with_card(method, window=(2000, 3000)), init="none")


def test_settings_on_the_command_line_reach_the_data(tmp_path: Path) -> None:
    root = touch(tmp_path, "oasis")
    assert len(find_scans(root, "train", "oasis", {"train": 3})) == 3
    parser = ConfigParser(ConfigParser.load_config_files([str(IIRP / "configs/train.json")]))
    parser.update({"dataset_dir": str(root), "layout": "oasis", "splits": {"train": 3}, "train#scans#cache_num": 1})
    assert len(parser.get_parsed_content("train#scans#data")) == 3
    assert parser.get("train#scans")["cache_num"] == 1
