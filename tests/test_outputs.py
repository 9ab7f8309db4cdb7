"""Folders of results, and files, appear whole or not at all."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from iregzoo.errors import InputError
from iregzoo.outputs import check_kept, check_target, kept_work, remove_leftovers, whole_file, whole_folder
from rights import without_rights

OWNED = ("warped.txt", "labels.txt", "report.txt")


def fill(target: Path, names: tuple[str, ...] = OWNED, *, overwrite: bool = False, text: str = "new") -> None:
    with whole_folder(target, overwrite=overwrite, owned=OWNED) as folder:
        for name in names:
            (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too; an empty folder stands for itself."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_text("utf-8")
        elif not any(path.iterdir()):
            found[str(path.relative_to(folder))] = "empty folder"
    return found


@pytest.mark.parametrize("target", ["results", "a/b/results"])
def test_folder_is_made_with_its_parents(tmp_path: Path, target: str) -> None:
    fill(tmp_path / target)
    assert contents(tmp_path) == {f"{target}/{name}": "new" for name in sorted(OWNED)}


def test_relative_target_is_below_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fill(Path("results"))
    assert set(contents(tmp_path)) == {f"results/{name}" for name in OWNED}


def test_folder_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    fill(tmp_path / "results")
    (tmp_path / "other").mkdir()
    assert (tmp_path / "results").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    fill(tmp_path / "results")
    assert len(contents(tmp_path)) == len(OWNED)


def test_nothing_is_in_the_target_before_the_end(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "results", overwrite=False, owned=OWNED) as folder:
        (folder / "warped.txt").write_text("new")
        assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError, InputError, SystemExit])
@pytest.mark.parametrize("target", ["results", "a/b/results"])
def test_whatever_ends_it_early_leaves_nothing(tmp_path: Path, stop: type[BaseException], target: str) -> None:
    def interrupted() -> None:
        with whole_folder(tmp_path / target, overwrite=False, owned=OWNED) as folder:
            (folder / "warped.txt").write_text("half")
            raise stop("stopped")

    with pytest.raises(stop, match="stopped"):
        interrupted()
    assert contents(tmp_path) == {}


def test_whatever_ends_it_early_leaves_an_earlier_run_as_it_was(tmp_path: Path) -> None:
    fill(tmp_path / "results", text="old")

    def interrupted() -> None:
        with whole_folder(tmp_path / "results", overwrite=True, owned=OWNED) as folder:
            (folder / "warped.txt").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert contents(tmp_path) == {f"results/{name}": "old" for name in sorted(OWNED)}


def test_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"is not empty; choose another --output or add --overwrite"):
        fill(tmp_path)
    assert contents(tmp_path) == {"notes.txt": "mine"}


def test_overwrite_keeps_what_is_not_its_own_and_removes_what_is_stale(tmp_path: Path) -> None:
    fill(tmp_path / "results", text="old")
    (tmp_path / "results" / "notes.txt").write_text("mine")
    fill(tmp_path / "results", ("warped.txt", "report.txt"), overwrite=True)
    assert contents(tmp_path) == {
        "results/notes.txt": "mine",
        "results/report.txt": "new",
        "results/warped.txt": "new",
    }


def test_overwrite_reaches_into_folders_and_keeps_what_is_not_its_own_there(tmp_path: Path) -> None:
    owned = ("fields/a.txt", "fields/b.txt", "c.txt")
    for text, names in (("old", ("fields/a.txt", "fields/b.txt")), ("new", ("fields/b.txt", "c.txt"))):
        with whole_folder(tmp_path / "results", overwrite=text == "new", owned=owned) as folder:
            (folder / "fields").mkdir()
            for name in names:
                (folder / name).write_text(text)
        (tmp_path / "results" / "fields" / "notes.txt").write_text("mine")
    assert contents(tmp_path / "results") == {"c.txt": "new", "fields/b.txt": "new", "fields/notes.txt": "mine"}


@pytest.mark.parametrize("stop", range(4))
def test_last_name_is_replaced_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """Whatever moment a kill comes at: a new report is never beside old files."""
    fill(tmp_path / "results", text="old")
    replace, moved = Path.replace, []

    def killed(source: Path, target: Path) -> Path:
        if len(moved) == stop:
            raise KeyboardInterrupt
        moved.append(target)
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", killed)
    with suppress(KeyboardInterrupt):
        fill(tmp_path / "results", ("report.txt", "warped.txt"), overwrite=True)
    found = contents(tmp_path / "results")
    new = {"report.txt": "new", "warped.txt": "new"}
    assert found["report.txt"] == "old" or found == new
    assert (found == new) == (stop >= 2)


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = [".git", ".other.abcdefgh.iregzoo", ".pair.20261130", ".pair.ABCDEFGH.iregzoo", "pair"]
    for name in (*kept, ".pair.abc_4567.iregzoo", ".a.b.abcdefgh.iregzoo"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "warped.txt").write_text("half")
    (tmp_path / ".pair.abcdefgh.iregzoo").write_text("a file")
    remove_leftovers(tmp_path, {"pair", "a.b"})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, ".pair.abcdefgh.iregzoo"])


def test_overwrite_leaves_no_folder_empty_of_what_is_stale(tmp_path: Path) -> None:
    for name in ("gone/deep/old.txt", "kept/old.txt", "kept/mine.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    owned = ("gone/deep/old.txt", "kept/old.txt")
    with whole_folder(tmp_path, overwrite=True, owned=owned) as folder:
        (folder / "new.txt").write_text("new")
    assert contents(tmp_path) == {"kept/mine.txt": "old", "new.txt": "new"}


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("filled", [False, True])
def test_a_link_is_followed_also_to_another_disk(tmp_path: Path, there: bool, filled: bool) -> None:
    shared = Path("/dev/shm")
    home = shared if shared.is_dir() and shared.stat().st_dev != tmp_path.stat().st_dev else tmp_path
    with TemporaryDirectory(dir=home) as elsewhere:
        target = Path(elsewhere) / "results"
        if there or filled:
            target.mkdir()
        if filled:
            fill(target, text="old", overwrite=True)
            (target / "notes.txt").write_text("mine")
        (tmp_path / "link").symlink_to(target)
        fill(tmp_path / "link", ("warped.txt", "report.txt"), overwrite=filled)
        kept = {"notes.txt": "mine"} if filled else {}
        assert contents(target) == {"warped.txt": "new", "report.txt": "new", **kept}
        assert (tmp_path / "link").is_symlink()
        assert [path.name for path in Path(elsewhere).iterdir()] == ["results"]


@pytest.mark.parametrize("there", [False, True])
def test_results_come_from_the_folder_itself_where_it_is_there(tmp_path: Path, there: bool) -> None:
    """For it may be the root of a disk, and its parent another's; what was killed there is no result."""
    target = tmp_path / "results"
    if there:
        (target / ".results.abcdefgh.iregzoo").mkdir(parents=True)
    with whole_folder(target, overwrite=False, owned=OWNED) as place:
        assert place.parents[1] == (target if there else tmp_path)
        (place / "report.txt").write_text("new")
    remove_leftovers(tmp_path, {"results"})
    assert contents(target) == {"report.txt": "new"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_results_that_another_run_wrote_meanwhile_are_kept_unless_told(tmp_path: Path, overwrite: bool) -> None:
    for target in (tmp_path / "new", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        told = nullcontext() if overwrite else pytest.raises(InputError, match=r"another run has written labels\.txt")
        with told, whole_folder(target, overwrite=overwrite, owned=OWNED) as place:
            fill(target, text="sooner")
            (place / "report.txt").write_text("later")
        assert contents(target) == ({"report.txt": "later"} if overwrite else dict.fromkeys(sorted(OWNED), "sooner"))


@pytest.mark.parametrize("moved", range(3))
def test_a_stop_between_two_files_leaves_an_empty_folder_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    replace, left = Path.replace, [moved]

    def stopped(source: Path, target: Path) -> Path:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path)
    assert contents(tmp_path) == {}


@pytest.mark.skipif(sys.platform == "win32", reason="folders have no group there")
def test_a_folder_belongs_to_the_group_of_a_shared_one(tmp_path: Path) -> None:
    tmp_path.chmod(0o2775)
    fill(tmp_path / "results")
    (tmp_path / "other").mkdir()
    assert (tmp_path / "results").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match="loop: is a circular link; choose another --output"):
        fill(tmp_path / "loop")


def test_a_place_whose_name_is_no_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "\udcff").mkdir()
    monkeypatch.chdir(tmp_path / "\udcff")
    with pytest.raises(InputError, match=r"\\xff/results: its name is not UTF-8 text"):
        fill(Path("results"))


def test_a_file_in_the_place_of_a_folder_below_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "ipear").write_text("mine")
    with (
        pytest.raises(InputError, match=r"ipear: is a file, but a folder must go there"),
        whole_folder(tmp_path, overwrite=True, owned=("a", "ipear/d")),
    ):
        raise AssertionError("the work has begun")
    assert contents(tmp_path) == {"ipear": "mine"}


def test_a_file_that_another_run_wrote_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "points.csv"

    def write() -> None:
        with whole_file(target, overwrite=False) as path:
            path.write_text("later")
            target.write_text("sooner")

    with pytest.raises(InputError, match=r"points\.csv: already exists"):
        write()
    assert contents(tmp_path) == {"points.csv": "sooner"}


@pytest.mark.parametrize("inner_first", [False, True])
def test_a_folder_may_lie_in_another_that_is_filled_too(tmp_path: Path, inner_first: bool) -> None:
    whole = [(tmp_path / "results", OWNED, "report.txt"), (tmp_path / "results" / "fields", ("a.txt",), "a.txt")]
    with ExitStack() as stack:
        for target, owned, name in reversed(whole) if inner_first else whole:
            place = stack.enter_context(whole_folder(target, overwrite=False, owned=owned))
            (place / name).write_text("new")
    assert contents(tmp_path) == {"results/fields/a.txt": "new", "results/report.txt": "new"}


def test_overwrite_that_is_neither_true_nor_false_is_refused_at_once(tmp_path: Path) -> None:
    for whole in (partial(whole_folder, owned=OWNED), whole_file):
        with (
            pytest.raises(InputError, match="overwrite 'maybe': give true or false"),
            whole(tmp_path / "new", overwrite="maybe"),
        ):
            raise AssertionError("the work has begun")


@pytest.mark.parametrize(
    "whole",
    [
        lambda target: whole_folder(target, overwrite=False, owned=OWNED),
        lambda target: whole_file(target, overwrite=False),
        lambda target: kept_work(target, "request"),
        lambda target: nullcontext(check_target(target)),
    ],
)
@pytest.mark.parametrize(
    ("name", "rights", "reason"),
    [("t" * 300, nullcontext, "File name too long"), ("closed/results", without_rights, "Permission denied")],
)
def test_target_that_the_system_does_not_know_is_refused(
    tmp_path: Path,
    whole: Callable[[Path], AbstractContextManager[Path]],
    name: str,
    rights: Callable[[], AbstractContextManager[None]],
    reason: str,
) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with (
        rights(),
        pytest.raises(InputError, match=rf": cannot be written \({reason}\); choose another --output"),
        whole(tmp_path / name),
    ):
        raise AssertionError("the work has begun")
    assert [path.name for path in tmp_path.iterdir()] == ["closed"]


def test_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("mine")
    with pytest.raises(InputError, match=r"results: is a file, not a folder; choose another --output"):
        fill(tmp_path / "results", overwrite=True)
    assert contents(tmp_path) == {"results": "mine"}


@pytest.mark.parametrize("target", ["notes/results", "notes/a/results"])
def test_file_in_the_place_of_a_parent_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(InputError, match=r"results: cannot be written .*; choose another --output"):
        fill(tmp_path / target)
    assert contents(tmp_path) == {"notes": "mine"}


def test_parent_that_cannot_be_made_leaves_none_of_the_others(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be written .*; choose another --output"):
        fill(tmp_path / "a" / "b" / ("x" * 300) / "results")
    assert contents(tmp_path) == {}


def test_folder_in_the_place_of_a_file_leaves_an_earlier_run_as_it_was(tmp_path: Path) -> None:
    fill(tmp_path / "results", ("labels.txt", "report.txt"), text="old")
    (tmp_path / "results" / "warped.txt").mkdir()
    (tmp_path / "results" / "warped.txt" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"warped.txt.*is a folder"):
        fill(tmp_path / "results", overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("target", ["points.csv", "a/b/points.csv"])
def test_a_file_is_made_with_its_folders(tmp_path: Path, target: str) -> None:
    with whole_file(tmp_path / target, overwrite=False) as path:
        assert path.name == "points.csv"
        path.write_text("new")
        assert not (tmp_path / target).exists()
    assert contents(tmp_path) == {target: "new"}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError, InputError, OSError])
@pytest.mark.parametrize("target", ["points.csv", "a/b/points.csv"])
def test_whatever_ends_it_early_leaves_no_file(tmp_path: Path, stop: type[BaseException], target: str) -> None:
    (tmp_path / "points.csv").write_text("old")

    def interrupted() -> None:
        with whole_file(tmp_path / target, overwrite=True) as path:
            path.write_text("half")
            raise stop("stopped")

    with pytest.raises(InputError if stop is OSError else stop, match="stopped"):
        interrupted()
    assert contents(tmp_path) == {"points.csv": "old"}


def test_a_file_that_is_there_is_replaced_only_where_asked(tmp_path: Path) -> None:
    (tmp_path / "points.csv").write_text("old")
    with (
        pytest.raises(InputError, match=r"points.csv: already exists; choose another --output or add --overwrite"),
        whole_file(tmp_path / "points.csv", overwrite=False),
    ):
        pass
    assert contents(tmp_path) == {"points.csv": "old"}
    with whole_file(tmp_path / "points.csv", overwrite=True) as path:
        path.write_text("new")
    assert contents(tmp_path) == {"points.csv": "new"}


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "points.csv").mkdir()
    with (
        pytest.raises(InputError, match=r"points.csv: is a folder, not a file; choose another --output"),
        whole_file(tmp_path / "points.csv", overwrite=True),
    ):
        pass
    assert contents(tmp_path) == {"points.csv": "empty folder"}


def test_a_file_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with (
        pytest.raises(InputError, match=r"points.csv: cannot be written .*; choose another --output"),
        whole_file(tmp_path / "notes" / "points.csv", overwrite=False),
    ):
        pass
    assert contents(tmp_path) == {"notes": "mine"}


# Each line of a full disk: files may grow to a limit, and no further, as on a disk that has so much room left.
FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from iregzoo.errors import InputError
from iregzoo.outputs import whole_file, whole_folder
from iregzoo.space.files import write_displacement, write_image, write_transform
from iregzoo.space.grid import Grid
import numpy as np

grid = Grid((40, 40, 40), np.eye(4))
noise = torch.rand(1, 3, 40, 40, 40)
writers = {
    "image": lambda folder: write_image(folder / "warped.nii.gz", noise[:, :1], grid),
    "displacement": lambda folder: write_displacement(folder / "displacement.nii.gz", noise, grid),
    "transform": lambda folder: write_transform(folder / "transform.h5", noise, grid, np.eye(4)),
    "text": lambda folder: (folder / "report.json").write_text("x" * 300_000),
}
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for name, write in writers.items():
    try:
        with whole_folder(Path(sys.argv[1]) / "new" / "results", overwrite=False, owned=()) as folder:
            write(folder)
    except InputError as error:
        print(f"{name}: {error}")
try:
    with whole_file(Path(sys.argv[1]) / "new" / "there.nii.gz", overwrite=False) as file:
        write_displacement(file, noise, grid)
except InputError as error:
    print(f"file: {error}")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX does")
def test_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, encoding="utf-8", timeout=120
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    results = tmp_path / "new" / "results"
    assert [line.partition(" cannot be ")[0].partition(" writing ")[0] for line in lines] == [
        f"image: {results / 'warped.nii.gz'}:",
        f"displacement: {results / 'displacement.nii.gz'}:",
        f"transform: {results / 'transform.h5'}:",
        f"text: {results}:",
        f"file: {tmp_path / 'new' / 'there.nii.gz'}:",
    ]
    assert all("File too large" in line and "disk space" in line for line in lines), run.stdout
    assert contents(tmp_path) == {}


# --- work that an early end leaves for the next run


def work_on(target: Path, request: str, stop: type[BaseException]) -> None:
    """Do some work, and end early."""
    with kept_work(target, request) as place:
        assert not (place / "part").exists()
        (place / "part").mkdir()
        (place / "part" / "done").write_text("half")
        raise stop("reason")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, InputError, RuntimeError])
def test_work_stays_for_the_same_request_alone_and_goes_in_the_end(tmp_path: Path, stop: type[BaseException]) -> None:
    target = tmp_path / "new" / "out"
    for request in ("one", "other"):
        with pytest.raises(stop):
            work_on(target, request, stop)
    with kept_work(target, "one") as place:
        assert (place / "part" / "done").read_text("utf-8") == "half"
        (target / "result").write_text("whole")
    assert [path.name for path in target.iterdir()] == ["result"]


def test_work_stays_in_a_folder_of_the_works_own_name(tmp_path: Path) -> None:
    target = tmp_path / "unfinished"
    with pytest.raises(RuntimeError):
        work_on(target, "one", RuntimeError)
    with kept_work(target, "one") as place:
        assert (place / "part" / "done").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, InputError])
def test_what_is_said_of_an_early_end_tells_where_the_work_is(tmp_path: Path, stop: type[BaseException]) -> None:
    with pytest.raises(stop, match=r"^reason; what is done stays in .*\.unfinished\.template\.iregzoo/"):
        work_on(tmp_path, "one", stop)


def test_without_work_nothing_stays(tmp_path: Path) -> None:
    def do_nothing() -> None:
        with kept_work(tmp_path / "new" / "out", "one") as place:
            (place / "empty").mkdir()
            raise KeyboardInterrupt("nothing was written")

    with pytest.raises(KeyboardInterrupt, match="nothing was written"):
        do_nothing()
    assert list(tmp_path.iterdir()) == []


def test_two_runs_are_not_at_work_at_once(tmp_path: Path) -> None:
    with kept_work(tmp_path, "one") as place:
        (place / "done").touch()
        for request in ("one", "other"):
            with pytest.raises(InputError, match="another run is at work there"):
                work_on(tmp_path, request, RuntimeError)
        assert (place / "done").exists()


def test_what_killed_runs_left_of_their_results_goes(tmp_path: Path) -> None:
    target = tmp_path / "out"
    kept = {".out.20261130", ".other.ab12cd34.iregzoo", ".unfinished.my_notes"}
    for name in (*kept, ".out.ab12cd34.iregzoo", "out/.out.ab12cd34.iregzoo"):
        (target / name).mkdir(parents=True)
    with kept_work(target, "one"):
        assert not (target / ".out.ab12cd34.iregzoo").exists()
    assert {path.name for path in target.iterdir()} == {*kept, "out"}
    assert (target / "out" / ".out.ab12cd34.iregzoo").is_dir()


def test_a_refusal_says_where_an_earlier_run_left_work(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        work_on(tmp_path, "one", RuntimeError)
    check_target(tmp_path)
    (tmp_path / "template.nii.gz").touch()
    with pytest.raises(InputError, match="add --overwrite, with which an interrupted template goes on"):
        check_target(tmp_path)


def test_work_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        work_on(tmp_path / "file" / "out", "one", RuntimeError)
    assert (tmp_path / "file").is_file()


# --- what results are made from


def test_inputs_that_results_would_replace_are_refused_whatever_links_lead_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("warped.txt", "mine.txt"):
        (out / name).touch()
    (tmp_path / "link.txt").symlink_to(out / "warped.txt")
    (tmp_path / "folder").symlink_to(out)
    check_kept(out, (None, "", "none", out / "mine.txt", tmp_path / "warped.txt"), OWNED)
    for path in (out / "warped.txt", tmp_path / "link.txt", tmp_path / "folder" / "warped.txt"):
        with pytest.raises(InputError, match=f"^{path}: would be overwritten by the results; choose another --output"):
            check_kept(out, (path,), OWNED)
