"""A cohort: what a batch writes, whatever stops it, is what an undisturbed one would have written."""

import csv
import json
import multiprocessing
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from os import killpg
from pathlib import Path
from random import Random
from threading import Thread

import nibabel as nib
import numpy as np
import psutil
import pytest
import SimpleITK as sitk

from cohort import (
    SHAPE,
    at_work,
    batch,
    command,
    refusal,
    row,
    summary,
    tree,
    wait_for,
    write_cohort,
    write_pairs,
)
from iregzoo.commands.batch import totals
from iregzoo.results import FILES
from shell import run

NAMES = ["first", "second", "head3_to_head2", "head4_to_head3"]
ALL = ("--inverse", "--jacobian")


@pytest.fixture(scope="module", autouse=True)
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cohort")
    assert write_cohort(folder, len(NAMES)) == NAMES
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IREGZOO_HOME", str(folder / "home"))
        yield folder


@pytest.fixture(scope="module")
def undisturbed(cohort: Path) -> Path:
    assert batch(cohort / "pairs.csv", cohort / "undisturbed", *ALL) == 0
    return cohort / "undisturbed"


# --- what is written


def test_each_pair_gets_the_files_of_register(
    cohort: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {path.name for path in undisturbed.iterdir()} == {*NAMES, "summary.csv"}
    pair = [f"--{column.replace('_', '-')}={cohort / file}" for column, file in row("head0", "head1").items()]
    options = ["--output", str(tmp_path / "one"), "--bundle", "tiny", *ALL]
    assert run(monkeypatch, "register", *pair, *options) == 0
    expected, found = tree(tmp_path / "one"), tree(undisturbed / "first")
    assert set(found) == set(FILES)
    inputs = found["report.json"].pop("batch")["inputs"]
    assert inputs["fixed"]["bytes"] == (cohort / "head0.nii.gz").stat().st_size
    assert '"batch":' in found.pop("report.html")  # it holds the report
    assert '"batch":' not in expected.pop("report.html")
    assert found == expected


def test_aligned_pairs_are_what_align_makes_of_them(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, own = tmp_path / "output", ("--bundle", "ipear")
    for said in ("4 of 4 pairs aligned, NCC", "4 of 4 pairs aligned, 4 in an earlier run"):
        assert batch(cohort / "pairs.csv", output, *own, "--align", "rigid", "--inverse") == 0
        assert said in capsys.readouterr().out
    pair = [f"--{column.replace('_', '-')}={cohort / file}" for column, file in row("head0", "head1").items()]
    assert run(monkeypatch, "align", *pair, "--output", str(tmp_path / "one"), "--inverse") == 0
    expected, found = tree(tmp_path / "one"), tree(output / "first")
    assert found["report.json"].pop("batch")["init"] == "auto"
    assert '"batch":' in found.pop("report.html")
    assert '"batch":' not in expected.pop("report.html")
    assert found == expected
    assert found["report.json"]["aligned"] == "rigid"
    for name, line in summary(output).items():
        report = json.loads((output / name / "report.json").read_text("utf-8"))
        assert (line["weights"], float(line["shared_information"])) == ("", report["shared_information"])
    sitk.WriteTransform(sitk.TranslationTransform(3, (1.0, 0.0, 0.0)), str(cohort / "given.tfm"))
    with (cohort / "pairs.csv").open(encoding="utf-8") as stream:
        rows = [{**line, "init": "given.tfm" * (line["name"] == "second")} for line in csv.DictReader(stream)]
    for said in ("4 of 4 pairs aligned, 3 in an earlier run", "4 of 4 pairs aligned, 4 in an earlier run"):
        table = write_pairs(cohort / "given.csv", rows)
        assert batch(table, output, *own, "--align", "rigid", "--inverse") == 0
        assert said in capsys.readouterr().out
    report = json.loads((output / "second" / "report.json").read_text("utf-8"))
    assert report["init"] == "given"
    assert "finder_sha256" not in report  # nothing was looked for
    assert batch(cohort / "pairs.csv", output, *own, "--align", "rigid", "--inverse") == 0  # the start is taken away
    assert "4 of 4 pairs aligned, 3 in an earlier run" in capsys.readouterr().out
    for options, words in (
        ((*own, "--align", "affine", "--inverse"), "with --align rigid, not with --align affine"),
        ((*own, "--align", "rigid"), "with inverse True, not False"),
        (("--inverse",), "with --align rigid, not without --align"),
    ):
        assert f"first: was made {words}" in refusal(capsys, cohort / "pairs.csv", output, *options)


def test_a_pair_that_gets_a_start_of_its_own_is_done_anew(cohort: Path, undisturbed: Path, tmp_path: Path) -> None:
    output = shutil.copytree(undisturbed, tmp_path / "output")
    sitk.WriteTransform(sitk.TranslationTransform(3, (2.0, -1.0, 0.0)), str(cohort / "start.tfm"))
    with (cohort / "pairs.csv").open(encoding="utf-8") as stream:
        rows = [{**line, "init": "start.tfm" * (line["name"] == "second")} for line in csv.DictReader(stream)]
    before = {name: (output / name / "report.json").stat().st_mtime_ns for name in NAMES}
    assert batch(write_pairs(cohort / "starts.csv", rows), output, *ALL) == 0
    assert [name for name in NAMES if (output / name / "report.json").stat().st_mtime_ns != before[name]] == ["second"]
    report = json.loads((output / "second" / "report.json").read_text("utf-8"))
    assert report["init"] == "given"
    assert [line[3] for line in report["affine_lps_mm"][:3]] == [2.0, -1.0, 0.0]
    assert {path.name for path in output.iterdir()} == {*NAMES, "summary.csv"}


def test_summary_has_the_figures_of_each_report_in_the_order_of_the_table(undisturbed: Path) -> None:
    rows = summary(undisturbed)
    assert list(rows) == NAMES
    for name, found in rows.items():
        report = json.loads((undisturbed / name / "report.json").read_text("utf-8"))
        assert found["status"] == "done"
        for figure in ("ncc_before", "ncc_after", "dice_mean", "inverse_error_mean_mm", "inverse_error_max_mm"):
            assert float(found[figure]) == pytest.approx(report[figure], rel=1e-5)
        assert float(found["seconds"]) == pytest.approx(sum(report["seconds"].values()), rel=1e-3)
        assert found["iterations"] == " ".join(map(str, report["iterations"]))
        assert found["network_left_out"] == ("1" if "network_left_out" in report else "")
        assert found["warnings"] == "; ".join(report["warnings"])


# --- stopped, killed, and started again


@contextmanager
def running(table: Path, output: Path) -> Iterator[subprocess.Popen[str]]:
    """A batch in a process, and a group of processes, of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command(table, output, *ALL)],
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
        # A shell's background job, which these tests may be, ignores SIGINT, and so would the process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        process.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals as POSIX has them")
def test_a_run_that_was_stopped_or_killed_goes_on_and_ends_as_if_undisturbed(
    cohort: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, output, random, hits = cohort / "pairs.csv", tmp_path / "new" / "output", Random(7), 0
    for blow in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM):
        with running(table, output) as process:

            def begun(process: subprocess.Popen[str] = process) -> bool:
                return at_work(output) > 0 or process.poll() is not None

            wait_for((output / ".batch.lock").exists if hits == 0 else begun)
            time.sleep(random.uniform(0, 2 if hits == 0 else 0.5))
            alive = process.poll() is None
            workers = psutil.Process(process.pid).children() if alive else []
            if alive and blow == signal.SIGINT:
                assert "another batch is writing there" in refusal(capsys, table, output, *ALL)
                killpg(process.pid, blow)  # as a terminal does
            process.send_signal(blow)
            error = process.communicate(timeout=300)[1].strip()
        assert psutil.wait_procs(workers, timeout=60)[1] == []
        hits += process.returncode != 0
        if process.returncode == 2:
            done = sum(found["status"] == "done" for found in summary(output).values())
            assert error == f"iregzoo: interrupted: {done} of {len(NAMES)} pairs are done; run the command again"
            assert at_work(output) == 0
    assert hits >= 2
    assert batch(table, output, *ALL) == 0
    assert tree(output) == tree(undisturbed)


def test_two_workers_of_which_one_is_killed_write_what_one_does(
    cohort: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output, killed = tmp_path / "output", []

    def kill_one() -> None:
        wait_for(lambda: at_work(output) == 2)
        killed.append(multiprocessing.active_children()[0])
        killed[0].kill()

    killer = Thread(target=kill_one)
    killer.start()
    assert batch(cohort / "pairs.csv", output, *ALL, "--workers", "2") == 0
    killer.join()
    assert killed[0].exitcode == -signal.SIGKILL
    assert tree(output) == tree(undisturbed)


@contextmanager
def dask(folder: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A scheduler's address, and two workers."""
    distributed = pytest.importorskip("distributed")
    file, processes = folder / "scheduler.json", []

    def start(program: str, *options: str) -> None:
        arguments = [sys.executable, "-m", f"distributed.cli.{program}", "--scheduler-file", str(file), *options]
        arguments.append("--no-dashboard")
        processes.append(subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    try:
        start("dask_scheduler", "--host", "127.0.0.1", "--port", "0")
        for _ in range(2):
            start("dask_worker", "--no-nanny", "--nthreads", "2")
        wait_for(file.exists)
        address = json.loads(file.read_text("utf-8"))["address"]
        with distributed.Client(address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=300)
        yield address, processes[1:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_cluster_of_which_one_worker_is_killed_writes_what_one_process_does(
    cohort: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    with dask(tmp_path) as (address, workers):

        def kill_one() -> None:
            wait_for(lambda: at_work(output) == 2)
            workers[0].kill()

        killer = Thread(target=kill_one)
        killer.start()
        assert batch(cohort / "pairs.csv", output, *ALL, "--scheduler", address) == 0
        killer.join()
        assert workers[0].wait() == -signal.SIGKILL
    assert tree(output) == tree(undisturbed)


def test_figures_of_some_pairs_say_of_how_many() -> None:
    row = {"status": "done", "ncc_before": 0.1, "ncc_after": 0.2, "folding_percent": 0.0, "warnings": ""}
    rows = [row, row | {"dice_before_mean": 0.3, "dice_mean": 0.4}, {"status": "failed"}]
    said = "2 of 3 pairs registered, NCC 0.100 → 0.200, Dice of 1 pair 0.300 → 0.400, folding 0.000 %"
    assert totals(rows, 0) == said


# --- pairs that fail


def test_bad_pairs_are_told_of_and_tried_again_while_the_others_are_done(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("head0.nii.gz", "head1.nii.gz"):
        shutil.copy(cohort / name, tmp_path)
    hole, flat = np.ones(SHAPE, np.float32), np.ones(SHAPE[:2], np.float32)
    hole[3, 3, 3] = np.nan
    (tmp_path / "loop").symlink_to("loop")
    for name, array in (("hole", hole), ("flat", flat)):
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"{name}.nii.gz")
    moving = {
        "hole": "hole.nii.gz",
        "flat": "flat.nii.gz",
        "gone": "gone.nii.gz",
        "long": "l" * 300,
        "loop": "loop",
        "lost": "lost.nii.gz",
        "good": "head1.nii.gz",
    }
    rows = [{"name": name, "fixed": "head0.nii.gz", "moving": file} for name, file in moving.items()]
    table, output = write_pairs(tmp_path / "pairs.csv", rows), tmp_path / "output"
    said = refusal(capsys, table, output)
    assert "6 of 7 pairs failed, first hole: " in said
    assert str(output / "summary.csv") in said
    found = summary(output)
    assert list(found) == list(moving)
    words = {"hole": "1 voxels are NaN", "flat": "has size 20×24", "gone": "no such file", "lost": "no such file"}
    words |= {"long": "no such file", "loop": "no such file"}
    for name, word in words.items():
        assert found[name]["status"] == "failed"
        assert word in found[name]["reason"]
    assert found["good"]["status"] == "done"
    assert sorted(path.name for path in output.iterdir()) == ["good", "summary.csv"]
    written = (output / "good" / "report.json").stat().st_mtime_ns
    for name in ("hole", "flat", "gone"):
        shutil.copy(cohort / "head2.nii.gz", tmp_path / f"{name}.nii.gz")
    assert "3 of 7 pairs failed, first long: " in refusal(capsys, table, output)
    assert [line["status"] for line in summary(output).values()] == [*["done"] * 3, *["failed"] * 3, "done"]
    assert (output / "good" / "report.json").stat().st_mtime_ns == written
    (tmp_path / "hole.nii.gz").unlink()
    assert "4 of 7 pairs failed, first hole: " in refusal(capsys, table, output)
    kept = "the result of an earlier run stays in its folder"
    assert [kept in line["reason"] for line in summary(output).values()] == [True, *[False] * 6]
    assert (output / "hole" / "report.json").is_file()


# --- real scans


def test_real_scans_come_out_as_register_leaves_them(
    test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = test_data / "hippocampus"
    scans = sorted(path.name for path in (folder / "images").glob("*.nii.gz"))[:3]
    places = {
        "fixed": ("images", 0),
        "moving": ("images", 1),
        "fixed_labels": ("labels", 0),
        "moving_labels": ("labels", 1),
    }
    rows = [
        {column: str(folder / kind / pair[place]) for column, (kind, place) in places.items()}
        for pair in pairwise(scans)
    ]
    table, output = write_pairs(tmp_path / "pairs.csv", rows), tmp_path / "output"
    assert batch(table, output, "--bundle", "iirp", "--workers", "2") == 0
    for found in summary(output).values():
        assert float(found["dice_mean"]) > float(found["dice_before_mean"]) + 0.1
    pair = [f"--{column.replace('_', '-')}={path}" for column, path in rows[0].items()]
    options = ["--output", str(tmp_path / "one"), "--bundle", "iirp"]
    assert run(monkeypatch, "register", *pair, *options) == 0
    found, expected = tree(output / next(iter(summary(output)))), tree(tmp_path / "one")
    found["report.json"].pop("batch")
    for files in (found, expected):
        del files["report.html"]  # it holds the report
    assert found == expected
