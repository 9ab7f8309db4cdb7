"""Which pairs of a table are done, which are to be done, and what is refused before any work."""

import csv
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cohort import at_work, batch, here, refusal, summary, tree, write_cohort, write_pairs
from iregzoo.batch import alone, register_job, run
from iregzoo.errors import InputError
from iregzoo.jobs import Job, Settings, checked, find_done, read_jobs, stamp
from iregzoo.results import FILES
from iregzoo.zoo import find
from rights import without_rights

NAMES = {"first", "second", "head3_to_head2"}


@pytest.fixture(scope="module", autouse=True)
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cohort")
    assert set(write_cohort(folder, len(NAMES))) == NAMES
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IREGZOO_HOME", str(folder / "home"))
        yield folder


def jobs_of(cohort: Path, output: Path, **options: object) -> list[Job]:
    return read_jobs(cohort / "pairs.csv", checked(Settings("tiny", **options)), output)


def done_of(cohort: Path, output: Path) -> set[str]:
    return set(find_done(jobs_of(cohort, output, inverse=True), output))


@pytest.fixture(scope="module")
def finished(cohort: Path) -> Path:
    """A batch that was run with --inverse."""
    output = cohort / "finished"
    with alone(output):
        run(jobs_of(cohort, output, inverse=True), {}, output, here)
    return output


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """One to spoil."""
    return shutil.copytree(finished, tmp_path / "copied")


# --- what is done, and what is to be done again


def test_what_is_whole_and_of_the_same_files_is_done(cohort: Path, copied: Path) -> None:
    assert done_of(cohort, copied) == NAMES
    (copied / "first" / "warped.nii.gz").unlink()
    with (copied / "second" / "transform.h5").open("r+b") as stream:
        stream.truncate(100)
    assert done_of(cohort, copied) == {"head3_to_head2"}


def test_pair_whose_files_have_changed_or_are_gone_is_to_be_done_again(cohort: Path, copied: Path) -> None:
    scan, labels = cohort / "head0.nii.gz", cohort / "head3_labels.nii.gz"
    before = labels.stat()
    scan.rename(cohort / "away.nii.gz")
    os.utime(labels, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))
    try:
        assert done_of(cohort, copied) == {"second"}
    finally:
        (cohort / "away.nii.gz").rename(scan)
        os.utime(labels, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert done_of(cohort, copied) == NAMES


def test_scan_of_several_files_has_changed_where_one_of_them_has(tmp_path: Path) -> None:
    series = tmp_path / "series"
    series.mkdir()
    for path in (series / "1.dcm", tmp_path / "scan.mhd", tmp_path / "scan.raw"):
        path.write_bytes(b"1")
    rows = [{"fixed": "series", "moving": "scan.mhd"}]
    table = write_pairs(tmp_path / "pairs.csv", rows)
    stamps = []
    for path in (None, series / "1.dcm", series / "2.dcm", tmp_path / "scan.raw", tmp_path / "other.raw"):
        if path:
            path.write_bytes(b"22")
        (job,) = read_jobs(table, Settings("tiny"), tmp_path / "output")
        stamps.append({name: (stamp["files"], stamp["bytes"]) for name, stamp in job.inputs.items()})
    assert stamps == [
        {"fixed": (1, 1), "moving": (2, 2)},
        {"fixed": (1, 2), "moving": (2, 2)},
        {"fixed": (2, 4), "moving": (2, 2)},
        {"fixed": (2, 4), "moving": (2, 3)},
        {"fixed": (2, 4), "moving": (2, 3)},
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "inverse True, not False"),
        (["--inverse", "--init", "none"], "init auto, not none"),
        (["--inverse", "--max-iterations", "3"], "max_iterations None, not 3"),
        (["--inverse", "--controller", "tci"], "controller auto, not tci"),
        (["--inverse", "--refine", "2"], "refine 0, not 2"),
        (["--inverse", "--bundle", "iirp"], "bundle tiny, not iirp"),
        (["--inverse", "--threads", "2"], "threads 1, not 2"),
    ],
)
def test_results_of_other_settings_are_refused(
    cohort: Path, finished: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    before = tree(finished)
    said = refusal(capsys, cohort / "pairs.csv", finished, *options)
    assert f"first: was made with {words}; choose another --output or add --overwrite" in said
    assert tree(finished) == before


def test_results_of_other_weights_and_of_register_are_refused(cohort: Path, copied: Path) -> None:
    path = copied / "first" / "report.json"
    report = json.loads(path.read_text("utf-8"))
    for change, words in (
        ({"weights_sha256": "0"}, "with weights_sha256 0, not "),
        ({"finder_sha256": "0"}, "with finder_sha256 0, not None"),
        ({"batch": 0}, "not made by a batch"),
    ):
        changed = {name: value for name, value in {**report, **change}.items() if value != 0}
        path.write_text(json.dumps(changed))
        with pytest.raises(InputError, match=words):
            done_of(cohort, copied)


def test_a_bundle_in_a_folder_is_the_same_from_any_place(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(find("tiny").path, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    settings = checked(Settings("mine"))
    assert settings.bundle == str(folder)
    assert settings.origins["random"]["bundle"] == "mine"


def test_overwrite_replaces_what_was_made_with_other_settings(cohort: Path, copied: Path) -> None:
    (copied / "first" / "notes.txt").write_text("mine")
    jobs = jobs_of(cohort, copied)[:1]
    done = find_done(jobs, copied, overwrite=True)
    assert done == {}
    rows = run(jobs, done, copied, here)
    assert [row["status"] for row in rows] == ["done"]
    files = {path.name for path in (copied / "first").iterdir()}
    assert files == {"notes.txt", *(name for name in FILES if not name.startswith(("inverse", "jacobian")))}
    assert (copied / "first" / "notes.txt").read_text("utf-8") == "mine"
    assert set(find_done(jobs, copied, overwrite=True)) == {"first"}  # the same command goes on, it does not start anew
    assert summary(copied)["first"]["inverse_error_max_mm"] == ""


def test_folders_and_tables_of_others_are_refused(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("notes.txt", "warped.nii.gz", "report.json"):
        (tmp_path / "first").mkdir()
        (tmp_path / "first" / name).write_text("mine")
        said = refusal(capsys, cohort / "pairs.csv", tmp_path)
        assert "first: holds files, but no report of a batch; choose another --output or add --overwrite" in said
        assert (tmp_path / "first" / name).read_text("utf-8") == "mine"
        shutil.rmtree(tmp_path / "first")
    (tmp_path / "summary.csv").write_text("mine")
    assert "summary.csv: is not the summary of a batch" in refusal(capsys, cohort / "pairs.csv", tmp_path)
    assert (tmp_path / "summary.csv").read_text("utf-8") == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["summary.csv"]


def test_a_folder_made_before_in_which_a_run_was_killed_is_filled(cohort: Path, tmp_path: Path) -> None:
    folder = jobs_of(cohort, tmp_path)[0].folder
    (folder / f".{folder.name}.abcdefgh.iregzoo").mkdir(parents=True)
    assert done_of(cohort, tmp_path) == set()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds files, but no report"):
        done_of(cohort, tmp_path)


def test_what_was_computed_in_another_precision_is_not_mixed(
    cohort: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a move to a machine that takes another one, of the same option."""
    assert done_of(cohort, copied) == NAMES
    monkeypatch.setattr("iregzoo.jobs.resolve", lambda precision, device: "bfloat16")
    with pytest.raises(
        InputError, match=r"was computed in float32, where this machine takes bfloat16 \(--precision float32"
    ):
        done_of(cohort, copied)
    with monkeypatch.context() as patch:
        patch.setattr("iregzoo.jobs.resolve", lambda precision, device: "float32")
        named = read_jobs(cohort / "pairs.csv", checked(Settings("tiny", inverse=True, precision="float32")), copied)
    assert set(find_done(named, copied)) == NAMES
    elsewhere = read_jobs(cohort / "pairs.csv", checked(Settings("tiny", inverse=True), here=False), copied)
    assert set(find_done(elsewhere, copied)) == NAMES  # a cluster's machines are not this one


def test_the_same_pairs_are_done_wherever_a_batch_is_started(
    cohort: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (tmp_path, cohort, cohort / "home"):
        monkeypatch.chdir(place)
        table = Path(os.path.relpath(cohort / "pairs.csv"))
        assert set(find_done(read_jobs(table, checked(Settings("tiny", inverse=True)), copied), copied)) == NAMES


def test_looking_at_a_folder_of_slices_does_not_change_it(tmp_path: Path) -> None:
    (tmp_path / "series").mkdir()
    for name in ("series/1.dcm", "scan.HDR", "scan.IMG", "scan.nhdr", "scan.raw.gz"):
        (tmp_path / name).write_bytes(b"1")
    before = {name: stamp(tmp_path / name) for name in ("series", "scan.HDR", "scan.nhdr")}
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._1.dcm"):
        (tmp_path / "series" / name).write_bytes(b"1")
    assert stamp(tmp_path / "series") == before["series"]
    for name, part in (("scan.HDR", "scan.IMG"), ("scan.nhdr", "scan.raw.gz")):
        (tmp_path / part).write_bytes(b"22")
        assert stamp(tmp_path / name) != before[name]


def test_a_folder_that_may_not_be_read_is_named(cohort: Path, copied: Path) -> None:
    jobs = jobs_of(cohort, copied, inverse=True)
    (copied / "first").chmod(0o700)
    with without_rights(), pytest.raises(InputError, match=r"first: cannot be read \(Permission denied\); check its"):
        find_done(jobs, copied, overwrite=True)


def test_a_lock_that_may_not_be_touched_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:3]:
        parent.chmod(0o755)
    (tmp_path / ".batch.lock").touch(0o600)
    with (
        without_rights(),
        pytest.raises(InputError, match=r"\.batch\.lock: permission denied; remove it"),
        alone(tmp_path),
    ):
        pytest.fail("it was locked")


def test_a_folder_whose_report_a_power_cut_left_empty_is_filled(cohort: Path, copied: Path) -> None:
    (copied / "first" / "report.json").write_bytes(b"")
    assert done_of(cohort, copied) == NAMES - {"first"}
    (copied / "first" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds files, but no report"):
        done_of(cohort, copied)


def test_a_summary_that_a_spreadsheet_saved_is_still_one(cohort: Path, copied: Path) -> None:
    text = (copied / "summary.csv").read_text("utf-8")
    (copied / "summary.csv").write_text(text, "utf-8-sig")
    assert done_of(cohort, copied) == NAMES
    (copied / "summary.csv").write_text(text.replace(",", ";"), "utf-8")
    with pytest.raises(
        InputError, match=r"summary\.csv: is not the summary of a batch; move it away, or choose another"
    ):
        done_of(cohort, copied)


def test_a_pair_that_rows_added_would_rename_is_told_of(cohort: Path, tmp_path: Path) -> None:
    scans = [{"fixed": str(cohort / f"head{n}.nii.gz"), "moving": str(cohort / "head3.nii.gz")} for n in (0, 1)]
    output, table = tmp_path / "output", write_pairs(tmp_path / "pairs.csv", scans[:1])
    assert batch(table, output) == 0
    (tmp_path / "other").mkdir()
    shutil.copy(cohort / "head1.nii.gz", tmp_path / "other" / "head0.nii.gz")
    both = [*scans[:1], {**scans[0], "fixed": str(tmp_path / "other" / "head0.nii.gz")}]
    jobs = read_jobs(write_pairs(table, both), checked(Settings("tiny")), output)
    with pytest.raises(
        InputError, match="lists head3_to_head0, as several pairs of the table would now be called; give"
    ):
        find_done(jobs, output)
    named = [{**both[0], "name": "head3_to_head0"}, {**both[1], "name": "other"}]
    jobs = read_jobs(write_pairs(table, named), checked(Settings("tiny")), output)
    assert set(find_done(jobs, output)) == {"head3_to_head0"}


def test_a_name_that_only_begins_like_another_is_none_made_of_it(cohort: Path, tmp_path: Path) -> None:
    scans = [{"fixed": str(cohort / f"head{n}.nii.gz"), "moving": str(cohort / "head3.nii.gz")} for n in (0, 1)]
    rows = [{**files, "name": name} for files, name in zip(scans, ("sub1", "sub1-followup"), strict=True)]
    output, table = tmp_path / "output", write_pairs(tmp_path / "pairs.csv", rows)
    assert batch(table, output) == 0
    jobs = read_jobs(write_pairs(table, rows[1:]), checked(Settings("tiny")), output)
    with pytest.raises(InputError, match=r"lists sub1, missing from the table of pairs; .* --overwrite to replace"):
        find_done(jobs, output)


def test_a_share_that_is_late_is_waited_for(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = tmp_path / ".batch.run"
    monkeypatch.setattr("iregzoo.batch.time.sleep", lambda seconds: running.write_text("ours"))
    assert isinstance(register_job(replace(jobs_of(cohort, tmp_path)[0], run="ours")), dict)


def test_a_worker_leaves_nothing_for_a_batch_that_has_ended(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster goes on with what its workers have begun: before it is begun, and before it is published."""
    job = replace(jobs_of(cohort, tmp_path)[0], run="ours")
    monkeypatch.setattr("iregzoo.batch.LOOKS", (0.0, 0.0))
    assert register_job(job) == "the batch that asked for it has ended"
    running = tmp_path / ".batch.run"
    running.write_text("another's")
    assert register_job(job) == "the batch that asked for it has ended"
    running.write_text("ours")
    monkeypatch.setattr("iregzoo.batch.write", lambda *result, **options: running.unlink())
    monkeypatch.setattr("iregzoo.batch.LOOKS", ())
    assert register_job(job) == "the batch that asked for it has ended"
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    running.write_text("ours")
    assert isinstance(register_job(job), dict)


def test_summary_of_pairs_that_the_table_lacks_is_kept(
    cohort: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(copied)
    third = {"fixed": str(cohort / "head2.nii.gz"), "moving": str(cohort / "head0.nii.gz"), "name": "third"}
    other = write_pairs(cohort / "other.csv", [third])
    said = refusal(capsys, other, copied, "--inverse")
    assert "summary.csv: lists first and 2 more, missing from the table of pairs" in said
    assert "--overwrite to replace the summary" in said
    assert tree(copied) == before
    with (cohort / "pairs.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    longer = write_pairs(cohort / "longer.csv", [*rows, {column: third.get(column, "") for column in rows[0]}])
    assert batch(longer, copied, "--inverse") == 0
    assert set(summary(copied)) == {*NAMES, "third"}
    assert batch(other, copied, "--inverse", "--overwrite") == 0
    assert set(summary(copied)) == {"third"}


def test_pairs_that_failed_may_leave_the_table(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone, table = {"fixed": str(cohort / "head0.nii.gz"), "moving": "gone.nii.gz"}, tmp_path / "pairs.csv"
    assert "first gone_to_head0: " in refusal(capsys, write_pairs(table, [gone]), tmp_path / "output")
    assert batch(write_pairs(table, [{**gone, "moving": str(cohort / "head1.nii.gz")}]), tmp_path / "output") == 0
    assert list(summary(tmp_path / "output")) == ["head1_to_head0"]


def test_whatever_a_pair_raises_is_its_reason(cohort: Path, tmp_path: Path) -> None:
    job = jobs_of(cohort, tmp_path / "output")[0]
    reason = register_job(replace(job, inputs={"fixed": object()}))
    assert reason == "TypeError: Object of type object is not JSON serializable"
    assert list(tmp_path.iterdir()) == []


def test_worker_with_another_method_is_refused(cohort: Path, tmp_path: Path) -> None:
    job = jobs_of(cohort, tmp_path / "output")[0]
    ((name, origin),) = job.settings.origins.items()
    other = replace(job.settings, origins={name: {**origin, "bundle_version": "9"}})
    reason = register_job(replace(job, settings=other))
    assert reason == "a worker has bundle_version 0.0.1, but the batch uses 9; install the same on all workers"
    aligned = checked(Settings(align="rigid"))
    for changes, words in (({"finder_sha256": "9"}, "but the batch uses 9"), ({"iregzoo": None}, "batch uses None")):
        other = replace(aligned, origins={"": {**aligned.origins[""], **changes}})
        reason = register_job(replace(job, settings=other))
        assert isinstance(reason, str)
        assert words in reason


def test_pairs_made_with_another_card_of_the_weights_are_not_mixed(cohort: Path, tmp_path: Path) -> None:
    weights = tmp_path / "mine.pt"
    own = torch.load(cohort / "home" / "bundles" / "tiny" / "models" / "model.pt", weights_only=True)
    torch.save({name: tensor.double() for name, tensor in own.items()}, weights)  # another file than the bundle's own
    output, table = tmp_path / "output", cohort / "pairs.csv"

    def jobs(spacing: float) -> list[Job]:
        (tmp_path / "card.json").write_text(json.dumps({"init": "center", "spacing": [spacing] * 3}), "utf-8")
        return read_jobs(table, checked(Settings("tiny", weights=str(weights))), output)[:1]

    first = jobs(1.0)
    output.mkdir()
    run(first, {}, output, here)
    assert list(find_done(jobs(1.0), output)) == [first[0].folder.name]
    with pytest.raises(InputError, match=r"was made with weights_card .*1\.0, 1\.0, 1\.0.*, not .*2\.0, 2\.0, 2\.0"):
        find_done(jobs(2.0), output)


def test_leftovers_of_a_kill_are_removed(cohort: Path, copied: Path) -> None:
    (copied / ".first.abcdefgh.iregzoo").mkdir()
    (copied / ".first.abcdefgh.iregzoo" / "warped.nii.gz").write_text("half")
    jobs = jobs_of(cohort, copied, inverse=True)
    run(jobs, find_done(jobs, copied), copied, here)
    assert at_work(copied) == 0


# --- refused before any work


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--workers", "0"], "workers 0"),
        (["--workers", "many"], "workers 'many'"),
        (["--threads", "0"], "threads 0"),
        (["--init", "sideways"], "init 'sideways'"),
        (["--controller", "never"], "controller 'never'"),
        (["--refine", "-1"], "refine -1"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--weights", "nonesuch"], "weights 'nonesuch'"),
        (["--bundle", "nonesuch"], "bundle 'nonesuch'"),
        (["--pairs", "nonesuch.csv"], "nonesuch.csv: no such file"),
        (["--scheduler", "tcp://127.0.0.1:9", "--workers", "2"], "leave out --workers or --scheduler"),
        (["--bundle", "ipear", "--align", "sideways"], "align 'sideways' is unknown; choose rigid or affine"),
        (["--bundle", "ipear", "--align"], "--align needs a value"),
        (
            ["--bundle", "ipear", "--align", "rigid", "--init", "affine"],
            "which align rigid must not; choose --init rigid",
        ),
        (["--align", "rigid"], "bundle tiny: means nothing to an alignment"),
        (["--bundle", "ipear", "--align", "affine", "--max-iterations", "3"], "leave out --align, or --max-iterations"),
        (["--bundle", "ipear", "--align", "rigid", "--jacobian"], "jacobian True: means nothing"),
    ],
)
def test_bad_choices_are_refused(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert words in refusal(capsys, cohort / "pairs.csv", tmp_path / "output", *options)
    assert not (tmp_path / "output").exists()


def test_inputs_where_results_go_are_refused(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, scan = tmp_path / "output", str(cohort / "head0.nii.gz")
    for moving in (output / "other" / "warped.nii.gz", output / "pair", output, tmp_path):
        rows = [{"name": name, "fixed": scan, "moving": str(moving)} for name in ("pair", "other")]
        table = write_pairs(tmp_path / "pairs.csv", rows)
        assert f"{moving}: would be overwritten by the results" in refusal(capsys, table, output)
    assert not output.exists()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "pair").symlink_to(tmp_path / "elsewhere")
    moving = tmp_path / "elsewhere" / "warped.nii.gz"
    table = write_pairs(tmp_path / "pairs.csv", [{"name": "pair", "fixed": scan, "moving": str(moving)}])
    assert f"{moving}: would be overwritten by the results" in refusal(capsys, table, tmp_path / "linked")
    (tmp_path / "linked" / "scan").mkdir()
    moving = tmp_path / "linked" / "scan" / "warped.nii.gz"
    moving.symlink_to(scan)  # which the results would replace
    table = write_pairs(tmp_path / "pairs.csv", [{"name": "scan", "fixed": scan, "moving": str(moving)}])
    assert f"{scan}: would be overwritten by the results" in refusal(capsys, table, tmp_path / "linked")
    for place in ("summary.csv", "pair/report.json"):
        table = write_pairs(tmp_path / "linked" / place, [{"name": "pair", "fixed": scan, "moving": scan}])
        assert f"{table}: would be overwritten by the results" in refusal(capsys, table, tmp_path / "linked")
    table = write_pairs(tmp_path / "pairs.csv", [{"name": "summary.csv", "fixed": scan, "moving": scan}])
    assert "summary.csv: is the name of the summary" in refusal(capsys, table, tmp_path)


def test_output_that_cannot_be_written_is_refused(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    assert "loop: cannot be written" in refusal(capsys, cohort / "pairs.csv", tmp_path / "loop")
    assert "is a file, not a folder" in refusal(capsys, cohort / "pairs.csv", tmp_path / "file")
    assert "cannot be written" in refusal(capsys, cohort / "pairs.csv", tmp_path / "file" / "output")


def test_one_batch_at_a_time(tmp_path: Path) -> None:
    with alone(tmp_path / "output"), pytest.raises(InputError, match="another batch"), alone(tmp_path / "output"):
        pytest.fail("two at once")
    with alone(tmp_path / "output"):
        assert (tmp_path / "output").is_dir()
    assert not (tmp_path / "output").exists()
