"""What every bundle keeps: a folder of bundles/ is tested by being there."""

import ast
import json
import logging
import logging.config
import logging.handlers
import re
from collections.abc import Iterator
from configparser import RawConfigParser
from functools import cache
from pathlib import Path
from pydoc import locate
from typing import Any

import monai.bundle
import pytest
import torch
from jsonschema import Draft202012Validator
from monai.bundle.config_item import ComponentLocator, ConfigComponent

from iregzoo import states, zoo
from iregzoo.registration import PairNetwork

from .conftest import some_weights

HERE = Path(__file__).parent
FOLDERS = sorted(path for path in (HERE.parents[1] / "bundles").iterdir() if path.is_dir())
pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
EACH_BUNDLE = pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
SCHEMA = json.loads((HERE / "metadata.schema.json").read_text("utf-8"))
CONFIGS = ("metadata.json", "inference.json", "train.json", "evaluate.json")
MAX_BYTES = 25_000_000  # what MONAI's model zoo and GitHub hold without large_files.yml


def config(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "configs" / name).read_text("utf-8"))
    return content


def network_def(folder: Path) -> dict[str, Any]:
    definition: dict[str, Any] = config(folder, "inference.json")["network_def"]
    return definition


def violations(metadata: dict[str, Any]) -> list[str]:
    found = Draft202012Validator(SCHEMA).iter_errors(metadata)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


@EACH_BUNDLE
def test_files_that_a_bundle_needs_are_there(folder: Path) -> None:
    needed = ["LICENSE", "docs/README.md", "configs/logging.conf", *(f"configs/{name}" for name in CONFIGS)]
    assert [name for name in needed if not (folder / name).is_file()] == []
    assert [name for name in needed if not (folder / name).read_text(encoding="utf-8").strip()] == []


@EACH_BUNDLE
def test_name_is_one_that_monai_can_download(folder: Path) -> None:
    assert "_v" not in folder.name
    assert folder.name.isidentifier()


@EACH_BUNDLE
def test_metadata_keeps_the_specification(folder: Path) -> None:
    assert violations(config(folder, "metadata.json")) == []


@EACH_BUNDLE
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("version", "1.0"),
        ("changelog", {}),
        ("name", ""),
        ("network_data_format.inputs.image.num_channels", "2"),
        ("network_data_format.outputs.pred.value_range", [0]),
        ("network_data_format.outputs.pred.channel_def", {"x": "displacement"}),
        ("weights", {"own": {"file": "models/model.pt"}}),
    ],
)
def test_schema_refuses_what_the_specification_forbids(folder: Path, path: str, value: object) -> None:
    metadata = config(folder, "metadata.json")
    *parents, last = path.split(".")
    entry = metadata
    for key in parents:
        entry = entry[key]
    entry[last] = value
    assert [line for line in violations(metadata) if line.startswith(path)] != []


@EACH_BUNDLE
def test_version_has_a_changelog_entry(folder: Path) -> None:
    metadata = config(folder, "metadata.json")
    assert metadata["version"] in metadata["changelog"]


@EACH_BUNDLE
def test_boundary_is_image_to_pred(folder: Path) -> None:
    boundary = config(folder, "metadata.json")["network_data_format"]
    assert next(iter(boundary["inputs"])) == "image"
    assert next(iter(boundary["outputs"])) == "pred"
    image, pred = boundary["inputs"]["image"], boundary["outputs"]["pred"]
    assert image["channel_def"] == {"0": "moving", "1": "fixed"}
    assert image["num_channels"] == 2
    assert image["value_range"] == [0, 1]
    assert list(pred["channel_def"]) == ["0", "1", "2"]
    assert pred["num_channels"] == 3


@EACH_BUNDLE
def test_network_takes_and_gives_what_the_metadata_says(folder: Path) -> None:
    configs = folder / "configs"
    monai.bundle.verify_net_in_out(
        net_id="network_def",
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.json"),
        device="cpu",
        n=2,
        p=2,
    )


@EACH_BUNDLE
def test_smallest_shape_that_the_metadata_names_is_the_stride(folder: Path) -> None:
    stride = zoo.build(network_def(folder)).stride
    shape = config(folder, "metadata.json")["network_data_format"]["inputs"]["image"]["spatial_shape"]
    assert shape == [f"{stride}*n"] * 3


# --- configs


@cache
def locator() -> ComponentLocator:
    return ComponentLocator()


def targets(content: object) -> Iterator[str]:
    if isinstance(content, dict):
        if "_target_" in content:
            yield content["_target_"]
        content = list(content.values())
    if isinstance(content, list):
        for value in content:
            yield from targets(value)


@EACH_BUNDLE
def test_every_target_can_be_imported(folder: Path) -> None:
    missing = []
    found = 0
    for path in sorted((folder / "configs").glob("*.json")):
        for target in targets(json.loads(path.read_text("utf-8"))):
            found += 1
            resolved = ConfigComponent({"_target_": target}, locator=locator()).resolve_module_name()
            if not callable(locate(resolved)):
                missing.append(f"{path.name}: {target}")
    assert missing == []
    assert found > 0


def test_target_that_does_not_exist_is_seen() -> None:
    resolved = ConfigComponent({"_target_": "SupervisedTrainr"}, locator=locator()).resolve_module_name()
    assert locate(resolved) is None


@EACH_BUNDLE
def test_training_and_inference_build_the_same_network(folder: Path) -> None:
    definition = network_def(folder)
    assert definition == config(folder, "train.json")["network_def"]
    assert isinstance(zoo.build(definition), PairNetwork)


@EACH_BUNDLE
def test_configs_differ_from_the_other_bundles_by_the_method_alone(folder: Path) -> None:
    """Bundles are downloaded one by one, so each carries its configs whole; what is no method's own is the same."""
    first = FOLDERS[0]
    for name in ("evaluate.json", "multi_gpu_train.json", "logging.conf"):
        expected, found = ((path / "configs" / name).read_text("utf-8") for path in (first, folder))
        assert found.replace("true", "false") == expected.replace("true", "false"), name
    expected, found = (config(path, "inference.json") for path in (first, folder))
    assert {**found, "network_def": None} == {**expected, "network_def": None}
    expected, found = (config(path, "train.json") for path in (first, folder))
    own = {"network_def", "loss", "scheduler", "schedule"}
    same = {key for key, value in expected.items() if isinstance(value, dict)} - own
    same |= {"imports", "bundle_root", "output_dir", "device", "max_epochs", "network", "initialize", "run"}
    assert {key: found.get(key) for key in same} == {key: expected[key] for key in same}


@EACH_BUNDLE
def test_network_definition_is_plain(folder: Path) -> None:
    text = json.dumps(network_def(folder))
    assert "@" not in text
    assert "$" not in text


@EACH_BUNDLE
def test_inference_has_what_a_workflow_of_monai_needs(folder: Path, tmp_path: Path) -> None:
    workflow = monai.bundle.ConfigWorkflow(
        config_file=str(folder / "configs/inference.json"),
        workflow_type="inference",
        bundle_root=str(folder),
        weights=some_weights(folder, tmp_path),
    )
    workflow.initialize()
    assert workflow.check_properties() == []


@EACH_BUNDLE
def test_training_has_what_a_workflow_of_monai_needs(folder: Path, dataset: Path, tmp_path: Path) -> None:
    workflow = monai.bundle.ConfigWorkflow(
        config_file=str(folder / "configs/train.json"),
        workflow_type="training",
        bundle_root=str(folder),
        dataset_dir=str(dataset),
        output_dir=str(tmp_path / "out"),
        shape=[16, 16, 16],
    )
    workflow.initialize()
    assert workflow.check_properties() == []


# --- card


@EACH_BUNDLE
def test_code_that_the_card_names_exists(folder: Path) -> None:
    """The table from the paper's equations to the code: `module.py`: `Name`, `Name` …"""
    card = (folder / "docs/README.md").read_text(encoding="utf-8")
    rows = [line for line in card.splitlines() if re.match(r"\|.*`\S+\.py`", line)]
    assert rows != []
    for row in rows:
        for module, names in re.findall(r"`([a-z_/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", row):
            source = HERE.parents[1] / "src/iregzoo" / module
            tree = ast.parse(source.read_text(encoding="utf-8"))
            words = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            words |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            words |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
            for name in re.findall(r"[\w.]+", names.replace("`", " ")):
                assert set(name.split(".")) <= words, f"{module} has no {name}"


@EACH_BUNDLE
def test_card_says_how_many_parameters_the_network_has(folder: Path) -> None:
    count = sum(parameter.numel() for parameter in zoo.build(network_def(folder)).parameters())
    assert f"{count:,} parameters" in (folder / "docs/README.md").read_text(encoding="utf-8")


# --- weights


@EACH_BUNDLE
def test_weights_are_the_files_that_the_cards_name(folder: Path) -> None:
    for card in zoo.Bundle(folder, config(folder, "metadata.json")).weights.values():
        path = folder / card.file
        assert path.is_file()
        assert path.stat().st_size < MAX_BYTES
        assert card.sha256 == states.sha256(path)


@EACH_BUNDLE
def test_weights_load_without_code_and_strictly(folder: Path) -> None:
    for card in zoo.Bundle(folder, config(folder, "metadata.json")).weights.values():
        state = torch.load(folder / card.file, map_location="cpu", weights_only=True)
        zoo.complete(zoo.build(network_def(folder)), card).load_state_dict(state, strict=True)
        assert all(tensor.isfinite().all() for tensor in state.values())


@EACH_BUNDLE
def test_models_holds_the_weights_of_the_cards_and_nothing_else(folder: Path) -> None:
    cards = config(folder, "metadata.json")["weights"].values()
    files = {str(path.relative_to(folder)) for path in (folder / "models").glob("*.pt")}
    assert files == {card["file"] for card in cards}


# --- logging


@EACH_BUNDLE
def test_logging_names_classes_of_the_standard_library_alone(folder: Path) -> None:
    parser = RawConfigParser()
    parser.read(folder / "configs/logging.conf")
    names = [parser.get(section, "class") for section in parser.sections() if parser.has_option(section, "class")]
    assert names != []
    for name in names:
        module = logging.handlers if name.startswith("handlers.") else logging
        assert issubclass(getattr(module, name.rpartition(".")[2]), (logging.Handler, logging.Formatter))


@EACH_BUNDLE
def test_logging_can_be_set_up(folder: Path) -> None:
    logging.config.fileConfig(folder / "configs/logging.conf", disable_existing_loggers=False)
    assert logging.getLogger().handlers != []
    assert logging.getLogger().level == logging.INFO
