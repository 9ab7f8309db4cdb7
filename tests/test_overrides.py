import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigParser

from iregzoo.errors import InputError
from iregzoo.overrides import arguments_of_run, check_overrides, end_in_a_line, refuse_unknown

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("bundles/*/docs/*.md")]
TRAIN, RECIPE = (f"bundles/iirp/configs/{name}.json" for name in ("train", "train_hippocampus"))
FILES = ["--config_file", f"['{TRAIN}','{RECIPE}']"]


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder from which the documents' commands are run."""
    monkeypatch.chdir(ROOT)


def check(*words: str) -> None:
    refuse_unknown(arguments_of_run(words))


def documented() -> Iterator[list[str]]:
    """What follows ``monai.bundle run`` in every command of the documents, their one-letter variables filled in."""
    for page in PAGES:
        values: dict[str, str] = {}
        for block in re.findall(r"```sh\n(.*?)```", page.read_text("utf-8").replace("\\\n", " "), re.DOTALL):
            for line in block.replace("bundles/mine", "bundles/iirp").splitlines():
                for name, value in values.items():
                    line = line.replace(name, value)
                if assigned := re.fullmatch(r'([A-Z])=("?)(.*)\2', line):
                    values[f"${assigned[1]}"] = assigned[3]
                elif "monai.bundle run" in line:
                    yield shlex.split(line.partition("monai.bundle run")[2])


def test_commands_of_the_documents_are_allowed() -> None:
    commands = list(documented())
    assert len(commands) > 30
    for words in commands:
        check(*words)
        with pytest.raises(InputError, match=r"--bundle_rot: .* did you mean --bundle_root"):
            check(*(word.replace("bundle_root", "bundle_rot") for word in words))


@pytest.mark.parametrize(
    "words",
    [
        ["--learning_rate", "1e-3"],
        ["--learning-rate=1e-3"],
        ["--train#dataset#length", "4"],
        ["--train::trainer::foo", "4"],
        ["--_meta_#version", "1"],
        ["--amp"],
        ["run", "initialize", "--final_id", "finalize", "--logging_file", "logging.conf", "--workflow_type", "train"],
        ["--tracking", "mlflow", "--run_name", "first"],
        ["--tracking", "{'handlers_id':{},'configs':{'mine':1}}", "--mine", "2"],
    ],
    ids=" ".join,
)
def test_settings_of_the_configs_and_of_monai_are_allowed(words: list[str]) -> None:
    check(*words, *FILES)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--learnig_rate", "1e-3"], "--learnig_rate: .* did you mean --learning_rate"),
        (["--steps", "3", "--lerning-rate=1"], "--lerning_rate: .* did you mean --learning_rate"),
        (["--trian#dataset#length", "4"], "--trian#dataset#length: .* did you mean --train"),
        (["--trian::loss", "4"], "did you mean --train"),
        (["--run_name", "first"], "--run_name"),
        (["--zzzz"], "--zzzz: .* leave it out"),
        (["--checkpoint_path", "best.pt"], "--checkpoint_path"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_setting_that_no_config_has_is_refused(words: list[str], named: str) -> None:
    with pytest.raises(InputError, match=named):
        check(*words, *FILES)


def test_file_of_arguments_is_read_below_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "args.json"
    path.write_text(json.dumps({"config_file": TRAIN, "steps": 3, "run_id": "run"}), "utf-8")
    given = arguments_of_run(["--args_file", str(path), "--steps", "4"])
    assert given == {"config_file": TRAIN, "steps": 4, "run_id": "run"}
    refuse_unknown(given)
    path.write_text(json.dumps({"config_file": TRAIN, "stepps": 3}), "utf-8")
    with pytest.raises(InputError, match=r"--stepps: .* did you mean --steps"):
        check("--args_file", str(path))


@pytest.mark.parametrize(
    ("config", "word", "meant"),
    [
        ("bundles/ipear/configs/inference.json", "refin", "refine"),
        ("bundles/pan/configs/train.json", "learnig_rate", "learning_rate"),
        ("['bundles/pan/configs/train.json','bundles/pan/configs/multi_gpu_train.json']", "step", "steps"),
        ("['bundles/iirp/configs/train.json','bundles/iirp/configs/evaluate.json']", "splt", "split"),
        ("canonical/train.json", "bach_size", "batch_size"),
    ],
)
def test_command_of_monai_ends_before_it_begins(
    config: str,
    word: str,
    meant: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--config_file", config, "--output_dir", str(tmp_path / "out"), f"--{word}", "0"]
    monkeypatch.setattr(sys, "argv", ["monai.bundle", "run", *words])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which the command changes
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
    assert stop.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("iregzoo: ")]
    assert said == [f"iregzoo: --{word}: the config files have no such setting; did you mean --{meant}?"]
    assert not (tmp_path / "out").exists()


def test_bad_input_that_monai_wraps_ends_its_command_in_a_line(tmp_path: Path) -> None:
    scan, output = str(tmp_path / "none.nii.gz"), tmp_path / "out"
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "bundles/iirp/configs/inference.json"]
    command += ["--bundle_root", "bundles/iirp", "--fixed", scan, "--moving", scan, "--output_dir", str(output)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"iregzoo: {scan}: no such file or folder; check the path"
    assert "Traceback" not in done.stderr
    assert not output.exists()


def test_other_errors_are_left_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    error = RuntimeError("of another kind")
    end_in_a_line(RuntimeError, error, None)
    assert capsys.readouterr().err == "RuntimeError: of another kind\n"
    error.__cause__ = ValueError("wrapped")
    error.__cause__.__cause__ = InputError("thickness 0: give more")
    with pytest.raises(SystemExit) as stop:
        end_in_a_line(RuntimeError, error, None)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "iregzoo: thickness 0: give more\n"


def test_nothing_is_checked_where_monai_is_called_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["somebody's.py", "run", "--anything", "1", *FILES])
    before = sys.excepthook
    check_overrides()
    assert sys.excepthook is before


def configs() -> dict[str, dict[str, Any]]:
    paths = (*ROOT.glob("bundles/*/configs/*.json"), *ROOT.glob("canonical/*.json"))
    return {str(path.relative_to(ROOT)): json.loads(path.read_text("utf-8")) for path in paths}


def test_a_recipe_adds_to_what_the_config_before_it_imports() -> None:
    """A list of its own would take the place of the other's, and leave what is imported to the order of the files."""
    whole = {name for name, content in configs().items() if "imports" in content}
    assert {Path(name).name for name in whole} == {"train.json", "inference.json"}
    adding = {name for name, content in configs().items() if "+imports" in content}
    assert {Path(name).name for name in adding} == {"multi_gpu_train.json", "brain.json"}
    bundle = "bundles/iirp/configs"
    files = (f"{bundle}/train.json", "canonical/brain.json", f"{bundle}/multi_gpu_train.json")
    merged = ConfigParser.load_config_files([str(ROOT / name) for name in files])["imports"]
    each = [json.loads((ROOT / name).read_text("utf-8")) for name in files]
    assert merged == [line for content in each for line in content.get("imports", content.get("+imports"))]


def test_every_config_that_prepares_a_run_looks_at_its_settings_first() -> None:
    first = {name: content["initialize"][0] for name, content in configs().items() if "initialize" in content}
    assert len(first) == 16
    assert [name for name, step in first.items() if step != {"_target_": "iregzoo.overrides.check_overrides"}] == []
