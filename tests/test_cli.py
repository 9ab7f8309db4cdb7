"""The command line: every guard ends with one line and exit code 2, and nothing half-written."""

import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from fire import docstrings

from iregzoo import __version__, cli
from iregzoo.errors import InputError
from shell import run

SHAPE = (24, 28, 24)


def write_scan(path: Path, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Path:
    random = np.random.default_rng(seed)
    blurred = random.random(shape)
    for axis in range(len(shape)):
        blurred = blurred + np.roll(blurred, 1, axis) + np.roll(blurred, -1, axis)
    nib.save(nib.Nifti1Image(blurred.astype(np.float32), np.diag([1.5, 1.0, 2.0, 1.0])), path)
    return path


def write_labels(path: Path) -> Path:
    labels = np.zeros(SHAPE, np.uint8)
    labels[6:14, 8:18, 6:16] = 1
    labels[14:20, 8:18, 6:16] = 2
    nib.save(nib.Nifti1Image(labels, np.diag([1.5, 1.0, 2.0, 1.0])), path)
    return path


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    fixed, moving = write_scan(tmp_path / "fixed.nii.gz", 1), write_scan(tmp_path / "moving.nii.gz", 2)
    return ["--fixed", str(fixed), "--moving", str(moving)]


def assert_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str
) -> None:
    """Exit code 2 and one line that holds the words."""
    assert run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    assert error.startswith("iregzoo: ")
    for word in words:
        assert word in error


def test_a_field_of_view_too_large_for_the_weights_is_said_before_the_network_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, pair: list[str]
) -> None:
    def stop(*_: object) -> None:
        raise InputError("the network runs")

    monkeypatch.setattr("iregzoo.registration.PairNetwork.register", stop)
    said = []
    for limit in (0.5, 6.0):
        monkeypatch.setattr("iregzoo.quality.LARGE_FIELD", limit)
        assert run(monkeypatch, "register", *pair, "--output", str(tmp_path / "out"), "--weights", "hippocampus") == 2
        said.append(capsys.readouterr().err.strip().splitlines())
    assert said[0][0].startswith("warning: the scans cover 1 times the volume that these weights were made for: ")
    assert said[0][1:] == said[1] == ["iregzoo: the network runs"]


def test_line_ends_in_a_name_are_none_in_the_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    name = str(tmp_path / "no\nsuch.nii.gz")
    assert run(monkeypatch, "register", name, name, str(tmp_path / "out")) == 2
    assert capsys.readouterr().err.endswith("no such.nii.gz: no such file or folder; check the path\n")


def test_register_writes_every_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, pair: list[str]
) -> None:
    labels = str(write_labels(tmp_path / "labels.nii.gz"))
    output = tmp_path / "new" / "result"
    arguments = ["register", *pair, "--output", str(output), "--fixed-labels", labels, "--moving-labels", labels]
    assert run(monkeypatch, *arguments, "--inverse", "--jacobian") == 0
    assert {path.name for path in output.iterdir()} == {
        "warped.nii.gz",
        "warped_labels.nii.gz",
        "displacement.nii.gz",
        "transform.h5",
        "inverse_warped.nii.gz",
        "inverse_warped_labels.nii.gz",
        "inverse_displacement.nii.gz",
        "inverse_transform.h5",
        "jacobian.nii.gz",
        "inverse_jacobian.nii.gz",
        "report.json",
        "report.png",
        "report.html",
    }
    report = json.loads((output / "report.json").read_text("utf-8"))
    assert set(report["dice"]) == {"1", "2"}
    assert set(report["seconds"]) >= {"start", "network", "warp", "write", "inverse", "report"}
    assert "NCC" in capsys.readouterr().out
    assert [path.name for path in output.parent.iterdir()] == ["result"]


@pytest.mark.parametrize(("more", "unused"), [([], True), (["--inverse"], False)])
def test_fixed_labels_that_nothing_uses_are_told_of(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    pair: list[str],
    more: list[str],
    unused: bool,
) -> None:
    labels = str(write_labels(tmp_path / "labels.nii.gz"))
    output = ["--output", str(tmp_path / "result"), "--fixed-labels", labels]
    assert run(monkeypatch, "register", *pair, *output, *more) == 0
    assert ("warning: the fixed labels were not used" in capsys.readouterr().out) == unused


def test_overwrite_is_needed_and_removes_what_is_stale(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, pair: list[str]
) -> None:
    output = tmp_path / "result"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    (output / "warped_labels.nii.gz").write_text("of an earlier run")
    assert_refused(monkeypatch, capsys, ["register", *pair, "--output", str(output)], str(output), "--overwrite")
    assert run(monkeypatch, "register", *pair, "--output", str(output), "--overwrite") == 0
    assert (output / "notes.txt").read_text("utf-8") == "mine"
    assert (output / "warped.nii.gz").stat().st_size > 1000
    assert not (output / "warped_labels.nii.gz").exists()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--bundle", "nonesuch"], ["nonesuch", "iirp"]),
        (["--weights", "nonesuch"], ["nonesuch", "hippocampus"]),
        (["--init", "sideways"], ["sideways", "affine"]),
        (["--controller", "never"], ["never", "iterstop"]),
        (["--max-iterations", "0"], ["max-iterations", "0", "at least 1"]),
        (["--max-iterations", "2.5"], ["2.5", "whole number"]),
        (["--max-iterations", "many"], ["many", "whole number"]),
        (["--device", "abacus"], ["abacus", "cpu"]),
        (["--moving-labels", "missing.nii.gz"], ["missing.nii.gz", "no such file"]),
    ],
)
def test_bad_choices_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    pair: list[str],
    extra: list[str],
    words: list[str],
) -> None:
    output = tmp_path / "result"
    assert_refused(monkeypatch, capsys, ["register", *pair, "--output", str(output), *extra], *words)
    assert not output.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"fixed.nii.gz", "moving.nii.gz"}


def test_missing_scan_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, pair: list[str]
) -> None:
    arguments = ["register", *pair[:-1], "missing.nii.gz", "--output", str(tmp_path / "result")]
    assert_refused(monkeypatch, capsys, arguments, "missing.nii.gz: no such file")


def test_cuda_is_refused_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, pair: list[str]
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    arguments = ["register", *pair, "--output", str(tmp_path / "result"), "--device", "cuda"]
    assert_refused(monkeypatch, capsys, arguments, "cuda", "not available on this machine")


def test_a_label_map_given_as_scan_and_a_scan_as_label_map(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, pair: list[str]
) -> None:
    labels = str(write_labels(tmp_path / "labels.nii.gz"))
    swapped = ["register", *pair, "--moving-labels", pair[3], "--output", str(tmp_path / "a")]
    assert_refused(monkeypatch, capsys, swapped, "moving.nii.gz", "whole numbers")
    as_scan = ["register", "--fixed", labels, "--moving", pair[3], "--output", str(tmp_path / "b")]
    assert_refused(monkeypatch, capsys, as_scan, "labels.nii.gz", "label map", "--fixed-labels")


@pytest.mark.parametrize("name", ["truncated.pt", "noise.pt"])
def test_broken_weights_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, pair: list[str], name: str
) -> None:
    from iregzoo.zoo import find

    bundle = find("iirp")
    whole = (bundle.path / bundle.weights["hippocampus"].file).read_bytes()
    broken = tmp_path / name
    broken.write_bytes(whole[: len(whole) // 2] if name == "truncated.pt" else bytes(range(256)) * 40)
    arguments = ["register", *pair, "--output", str(tmp_path / "result"), "--weights", str(broken)]
    assert_refused(monkeypatch, capsys, arguments, name, "weights")
    assert not (tmp_path / "result").exists()


def test_an_unknown_option_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, pair: list[str]
) -> None:
    arguments = ["register", *pair, "--output", str(tmp_path / "result"), "--max-iteration", "2"]
    assert_refused(monkeypatch, capsys, arguments, "unknown option --max-iteration", "--max-iterations")
    assert not (tmp_path / "result").exists()


def test_an_option_without_its_value_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pair: list[str]
) -> None:
    assert_refused(monkeypatch, capsys, ["register", *pair, "--output"], "--output needs a value")
    assert_refused(monkeypatch, capsys, ["register", *pair, "--init", "--output", "x"], "--init needs a value")


@pytest.mark.parametrize("name", ["1e5", "007", "[1]", "None", "a b", "-minus", "it's"])
def test_names_that_look_like_something_else_stay_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pair: list[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "register", *pair, "--output", name, "--controller", "fixed") == 0
    assert (tmp_path / name / "warped.nii.gz").is_file()


@pytest.mark.parametrize(("value", "files"), [("false", 6), ("TRUE", 9)])
def test_false_is_false(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pair: list[str], value: str, files: int
) -> None:
    arguments = ["register", *pair, "--output", str(tmp_path / "out"), "--inverse", value]
    assert run(monkeypatch, *arguments, "--max-iterations", "1") == 0
    assert len(list((tmp_path / "out").iterdir())) == files


def test_a_first_letter_stands_for_the_one_option_it_may(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pair: list[str]
) -> None:
    arguments = ["register", *pair, "--output", str(tmp_path / "out"), "-b", "pan", "-d=cpu"]
    assert run(monkeypatch, *arguments) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))["bundle"] == "pan"


@pytest.mark.parametrize("asking", [["--help"], ["-h"], ["--", "--help"], ["--overwrite", "--help"]])
def test_help_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, asking: list[str]
) -> None:
    monkeypatch.setenv("PAGER", "cat")
    assert run(monkeypatch, "demo", str(tmp_path / "out"), *asking) == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_has_every_word_on_the_arguments(command: str) -> None:
    """Fire takes a colon on a later line of a description for the end of an argument's name, and loses the rest."""
    text = inspect.getdoc(cli.COMMANDS[command]) or ""
    described = docstrings.parse(text).args
    assert [one.name for one in described] == list(inspect.signature(cli.COMMANDS[command]).parameters)
    shown = " ".join(f"{one.name}: {one.description}" for one in described)
    assert shown.split() == text.partition("Args:\n")[2].split()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no such signal")
@pytest.mark.parametrize("ignored", [True, False])
def test_a_hangup_that_nohup_ignores_stays_ignored(ignored: bool) -> None:
    code = (
        "import os, signal, sys; from iregzoo import cli\n"
        f"signal.signal(signal.SIGHUP, signal.{'SIG_IGN' if ignored else 'SIG_DFL'})\n"
        "cli.COMMANDS['list'] = lambda: os.kill(os.getpid(), signal.SIGHUP) or print('went on')\n"
        "sys.argv = ['iregzoo', 'list']; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, "went on" in done.stdout) == ((0, True) if ignored else (2, False))


def test_it_says_its_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"iregzoo {__version__}\n"


def test_places_may_be_given_without_their_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pair: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "register", pair[1], pair[3], "007", "--overwrite", "--max-iterations", "1") == 0
    assert (tmp_path / "007" / "warped.nii.gz").is_file()


def test_an_input_among_the_results_is_not_overwritten(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, pair: list[str]
) -> None:
    earlier = write_scan(tmp_path / "warped.nii.gz", 3)
    before = earlier.read_bytes()
    arguments = ["register", *pair[:2], "--moving", str(earlier), "--output", str(tmp_path), "--overwrite"]
    assert_refused(monkeypatch, capsys, arguments, "warped.nii.gz", "another --output")
    assert earlier.read_bytes() == before


def test_scans_that_do_not_overlap_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, pair: list[str]
) -> None:
    image = nib.load(pair[3])
    far = tmp_path / "far.nii.gz"
    shifted = image.affine.copy()
    shifted[:3, 3] += 5000
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), shifted), far)
    arguments = ["register", *pair[:2], "--moving", str(far), "--output", str(tmp_path / "out"), "--init", "none"]
    assert_refused(monkeypatch, capsys, arguments, "far.nii.gz", "init none", "--init center")


def test_a_start_may_be_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, pair: list[str]
) -> None:
    """The file says where a place of the fixed scan is in the moving one, LPS, as ITK, ANTs and Slicer write it."""
    image = nib.load(pair[1])
    elsewhere = image.affine.copy()
    elsewhere[:3, 3] += (30.0, -20.0, 10.0)  # RAS
    moving, start = tmp_path / "elsewhere.nii.gz", tmp_path / "start.tfm"
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), elsewhere), moving)
    sitk.WriteTransform(sitk.TranslationTransform(3, (-30.0, 20.0, 10.0)), str(start))
    arguments = ["register", *pair[:2], "--moving", str(moving), "--init", str(start)]
    assert run(monkeypatch, *arguments, "--output", str(tmp_path / "out")) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert report["init"] == "given"
    assert report["ncc_start"] > 0.999 > 0.9 > report["ncc_before"]
    sitk.WriteTransform(sitk.DisplacementFieldTransform(sitk.Image([4, 4, 4], sitk.sitkVectorFloat64)), str(start))
    among = [*arguments[:-1], str(tmp_path / "out" / "transform.h5"), "--output", str(tmp_path / "out"), "--overwrite"]
    assert_refused(monkeypatch, capsys, among, "transform.h5", "another --output")
    for given, words in ((str(start), "holds more than a rigid or affine"), (f"{start}.h5", "no such file")):
        refused = [*arguments[:-1], given, "--output", str(tmp_path / "no")]
        assert_refused(monkeypatch, capsys, refused, given, words)
    refused = [*arguments[:-1], "Affine", "--output", str(tmp_path / "no")]
    assert_refused(monkeypatch, capsys, refused, "init 'Affine'", "none, center, rigid, affine or a transform file")


def test_a_copy_of_the_own_weights_is_known_by_its_hash(tmp_path: Path) -> None:
    from iregzoo.zoo import find, load

    bundle = find("iirp")
    card = bundle.weights["hippocampus"]
    copy = tmp_path / "copy.pt"
    copy.write_bytes((bundle.path / card.file).read_bytes())
    assert load("iirp", str(copy)).card == card


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["register", "--fixed", "a.nii.gz"], "register needs --moving, --output; see iregzoo register --help"),
        (["register", "a.nii.gz", "--moving", "b.nii.gz"], "register needs --output; see"),
        (["register", "--refine", "2", "-d", "cpu"], "register needs --fixed, --moving, --output; see"),
        (["register", "-f", "a.nii.gz"], "-f is not an option; use the full name: --fixed or --fixed-labels"),
        (["register", "-x", "a.nii.gz"], "-x is not an option; use the full name"),
        (["register", "-dcpu"], "-dcpu is not an option; use the full name: --device"),
        (["register", "--fixed", "a.nii", "--fixed=b.nii"], "--fixed is given twice; give it once"),
        (["apply", "--transform", "a.h5", "-t", "b.h5"], "--transform is given twice; give it once, with commas"),
        (
            ["batch", "--pairs", "a.csv", "--output", "out", "--workers", "0"],
            "workers 0: give a whole number of at least 1",
        ),
        (["register", "--inverse", "maybe"], "--inverse 'maybe': give true or false"),
        (["register", "--jacobian", "maybe"], "--jacobian 'maybe': give true or false"),
        (["batch", "--overwrite=1"], "--overwrite '1': give true or false"),
        (["regster", "--fixed", "a.nii.gz"], "unknown command regster; choose from register, align, apply,"),
        (["register", "bad\udcff.nii.gz"], "bad\\xff.nii.gz: its name is not UTF-8 text; rename it"),
        (["register", "--output", "bad\udcff"], "bad\\xff: its name is not UTF-8 text; rename it"),
        (["list", "foo"], "--json 'foo': give true or false"),
        (["list", "true", "extra"], "unexpected argument 'extra'; see iregzoo list --help"),
        (["label-app"], "label-app needs --folder; see"),
        (["label-app", ""], "an argument of label-app is empty"),
        (["label-app", "app", "--bundles="], "--bundles is empty"),
        (["label-app", "app", "--bundles", ""], "--bundles is empty"),
    ],
)
def test_missing_and_empty_arguments_end_with_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert_refused(monkeypatch, capsys, arguments, words)


@pytest.mark.parametrize("interrupt", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, interrupt: signal.Signals) -> None:
    shape = (96, 96, 96)
    fixed, moving = (write_scan(tmp_path / f"{seed}.nii.gz", seed, shape) for seed in (1, 2))
    output = tmp_path / "made" / "result"
    command = [sys.executable, "-m", "iregzoo", "register", "--fixed", str(fixed), "--moving", str(moving)]
    process = subprocess.Popen(
        [*command, "--output", str(output), "--init", "affine"],
        stderr=subprocess.PIPE,
        encoding="utf-8",
        # A shell's background job, which these tests may be, ignores SIGINT, and so would the process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    begin = time.monotonic()
    while not output.parent.exists() and time.monotonic() - begin < 120:  # the work has begun once its folder is there
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(interrupt)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 2, error
    assert error.strip().splitlines()[-1].startswith("iregzoo: interrupted")
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.nii.gz", "2.nii.gz"]


def test_an_interrupt_of_an_import_comes_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "swallowing.py").write_text(
        "import signal\ntry:\n    for _ in range(3):\n        signal.raise_signal(signal.SIGTERM)\n"
        "except BaseException:\n    pass\nwhole = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.signal(signal.SIGTERM, cli._interrupt)
    begin = time.monotonic()
    try:
        assert importlib.import_module("swallowing").whole
        with pytest.raises(KeyboardInterrupt):
            time.sleep(60)
        assert time.monotonic() - begin < 30
        time.sleep(0.3)  # nor does it come twice
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.modules.pop("swallowing", None)


def test_list_names_bundles_and_weights(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "list") == 0
    table = capsys.readouterr().out
    assert "iirp" in table
    assert "--weights hippocampus" in table
    assert run(monkeypatch, "list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert next(entry for entry in listed if entry["name"] == "iirp")["weights"]["hippocampus"]["init"] == "center"


def test_demo_recovers_much_of_a_known_deformation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "demo", "--output", str(tmp_path / "demo")) == 0
    printed = capsys.readouterr().out
    recovered = float(printed.split(": ")[1].split(" %")[0])
    assert 30 < recovered < 100
    report = json.loads((tmp_path / "demo" / "report.json").read_text("utf-8"))
    assert report["dice_mean"] > report["dice_before_mean"] + 0.1
    assert [report["fixed"], report["moving"]] == [
        str(tmp_path / "demo" / f"{name}.nii.gz") for name in ("fixed", "moving")
    ]
    assert (tmp_path / "demo" / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(sys.platform == "win32", reason="has no such pipes")
def test_output_that_nobody_reads_to_its_end_ends_quietly() -> None:
    """As of ``iregzoo list | head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "iregzoo", "list"]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_list_starts_without_pytorch() -> None:
    """Starting fast: listing needs no tensor."""
    code = "import sys; import iregzoo.cli; sys.exit('torch' in sys.modules or 'monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_register_starts_without_monai() -> None:
    """MONAI takes seconds to import; registering does not need it."""
    code = "import sys; import iregzoo.register, iregzoo.report, iregzoo.zoo; sys.exit('monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("triton", [False, True])
def test_the_end_is_quick_and_silent(triton: bool) -> None:
    """Nothing is left for Python's last look through all objects, but where Triton would report what is left."""
    if triton:
        pytest.importorskip("triton")
    code = f"""if True:
        import atexit, gc, sys
        import iregzoo.cli
        if {triton}:
            import triton
        atexit.register(lambda: print("frozen", gc.get_freeze_count() > 0))  # runs after what is registered later
        sys.argv = ["iregzoo", "list"]
        iregzoo.cli.main()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.splitlines()[-1] == f"frozen {not triton}"
    assert not done.stderr
