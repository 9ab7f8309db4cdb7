"""Names of pairs: whatever the table, each pair has a folder of its own."""

import os
import re
from pathlib import Path

import pytest

from iregzoo.cases import Case, distinct_names, folder_names, read_cases, stem, whole_path
from iregzoo.errors import InputError
from rights import without_rights


def test_names_are_made_of_files_and_do_not_depend_on_the_order() -> None:
    cases = [Case("s1/t1.nii.gz", "s2/t1.nii.gz"), Case("s1/t1.nii.gz", "s3/t1.nii.gz"), Case("a.b.nrrd", "dicom")]
    names = folder_names(cases)
    assert names[2] == "dicom_to_a.b"
    assert names[0] != names[1]
    assert all(name.startswith("t1_to_t1-") for name in names[:2])
    assert folder_names(cases[::-1]) == names[::-1]


def test_a_made_name_does_not_depend_on_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for place, path in (("one", "../one"), ("two", "../one"), (".", "one")):
        (tmp_path / place).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / place)
        made.append(folder_names([Case(f"{path}/a/t1.nii", "/x/mni.nii"), Case(f"{path}/b/t1.nii", "/x/mni.nii")]))
    assert made[0] == made[1] == made[2]
    assert made[0][0] != made[0][1]


def test_a_way_up_from_a_linked_folder_leads_where_the_system_goes(tmp_path: Path) -> None:
    """To the parent of what the link leads to, and not to the link's."""
    for folder in ("disk/study", "disk/scans", "data/scans"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data" / "study").symlink_to(tmp_path / "disk" / "study")
    for folder in ("disk", "data"):
        (tmp_path / folder / "scans" / "a.nii").write_text(folder)
    path = tmp_path / "data" / "study" / ".." / "scans" / "a.nii"
    assert path.read_text() == "disk"
    assert whole_path(path) == os.path.realpath(tmp_path / "disk" / "scans" / "a.nii")
    (tmp_path / "disk" / "link.nii").symlink_to(path)
    assert whole_path(tmp_path / "disk" / "link.nii") == os.path.realpath(tmp_path / "disk") + os.sep + "link.nii"
    assert whole_path(tmp_path / "data" / "study" / "..") == os.path.realpath(tmp_path / "disk")


def test_own_names_stay_and_made_ones_give_way() -> None:
    cases = [Case("a.nii", "b.nii"), Case("c.nii", "d.nii", name="B_to_A")]
    made, own = folder_names(cases)
    assert own == "B_to_A"
    assert made.startswith("b_to_a-")


@pytest.mark.parametrize(
    ("cases", "words"),
    [
        ([Case("a", "b", name="x"), Case("c", "d", name="X")], "pairs 1 and 2 would both be called 'X'"),
        ([Case("a", "b"), Case("c", "d"), Case("a", "b")], "pairs 1 and 3 would both be called 'b_to_a-"),
        ([Case("a", "b", name="x/y")], "pair 1: 'x/y' is not a valid folder name"),
        ([Case("a", "b", name="..")], "pair 1: '..' is not a valid folder name"),
        ([Case("a", "b", name=".hidden")], "is not a valid folder name"),
        ([Case("a", "b", name="dot.")], "is not a valid folder name"),
        ([Case("a", "b", name="con")], "pair 1: 'con' is not a valid folder name on all systems"),
        ([Case("a", "b", name="Aux.1")], "'Aux.1' is not a valid folder name on all systems"),
        ([Case("a", "b" * 250)], "is not a valid folder name"),
    ],
)
def test_names_that_clash_or_cannot_be_are_refused(cases: list[Case], words: str) -> None:
    with pytest.raises(InputError) as refused:
        folder_names(cases)
    assert words in str(refused.value)


def test_table_may_hold_names_and_missing_files_where_they_are_not_checked(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text("fixed,moving,name\nhere.nii,gone.nii,one\nhere.nii, here.nii , two \n")
    (tmp_path / "here.nii").touch()
    here, gone = str(tmp_path / "here.nii"), str(tmp_path / "gone.nii")
    cases = read_cases(table, check=False)
    assert cases == [Case(here, gone, name="one"), Case(here, here, name="two")]
    assert [case.title for case in cases] == ["one", "two"]
    with pytest.raises(InputError, match=r"line 2: gone.nii: no such file"):
        read_cases(table)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("fixed,moving\na,a\n\na,a,extra\n", "line 4: has the extra value 'extra' beyond its 2 columns"),
        ("fixed,moving\na,\n", "line 2, column moving: is empty; give the path of a scan"),
        ("fixed,moving,name\na,a,x\na\n", "line 3, column moving: is empty; give the path of a scan"),
        ("moving,fixed\na, \n", "line 2, column fixed: is empty; give the path of a scan"),
    ],
)
def test_lines_of_too_many_and_too_few_cells_are_refused(tmp_path: Path, lines: str, words: str, check: bool) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "pairs.csv").write_text(lines)
    with pytest.raises(InputError, match=f"pairs.csv, {words}"):
        read_cases(tmp_path / "pairs.csv", check=check)


def test_other_columns_are_passed_over_and_misspelt_ones_refused(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    table = tmp_path / "pairs.csv"
    table.write_text("Subject,Fixed, MOVING ,age\nx,a,a,70\n")
    assert read_cases(table) == [Case(str(tmp_path / "a"), str(tmp_path / "a"))]
    others = ("fixed_id", "moving_id", "moving_t1", "moving_ct", "fixed_1", "name_1", "moving_mean", "dose")
    table.write_text(f"fixed,moving,{','.join(others)}\na,a{',1' * len(others)}\n")
    assert len(read_cases(table)) == 1
    for slip, meant in (("fixed_label", "fixed_labels"), ("moving_lables", "moving_labels"), ("inits", "init")):
        table.write_text(f"fixed,moving,{slip}\na,a,a\n")
        with pytest.raises(InputError, match=f"has a column {slip}; rename it to {meant}, or otherwise"):
            read_cases(table)
    table.write_text("fixed,age\na,a\n")
    with pytest.raises(InputError, match=r"has columns fixed, age; expected fixed, moving, .* fixed and moving are"):
        read_cases(table)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("fixed,moving,fixed", "has the column fixed more than once; keep one"),
        ("fixed,,moving,,age", "has columns without a heading; give them names"),
    ],
)
def test_columns_that_cannot_be_told_apart_are_named(tmp_path: Path, header: str, words: str) -> None:
    (tmp_path / "pairs.csv").write_text(f"{header}\na,a,a,a,a\n")
    with pytest.raises(InputError, match=words):
        read_cases(tmp_path / "pairs.csv")


def test_what_stands_in_quotes_is_one_cell_and_keeps_its_line_ends(tmp_path: Path) -> None:
    names = ("two\r\nlines", "line\u2028separator", "next\x85line", "form\ffeed")
    for name in names:
        (tmp_path / name).touch()
        (tmp_path / "pairs.csv").write_bytes(f'fixed,moving\r\n"{name}","{name}"\r\n'.encode())
        assert read_cases(tmp_path / "pairs.csv") == [Case(str(tmp_path / name), str(tmp_path / name))]


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('fixed,moving\na,"' + "b" * 200_000, "pairs.csv, after line 1: is not CSV .* close its quotes"),
        ("fixed,moving\na,b\0c\n", "pairs.csv: is not UTF-8 text"),
    ],
)
def test_what_is_no_table_is_said_in_a_line(tmp_path: Path, text: str, words: str, check: bool) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        read_cases(tmp_path / "pairs.csv", check=check)


def test_paths_that_cannot_be_looked_at_are_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    table = Path("pairs.csv")
    Path("loop").symlink_to("loop")
    Path("closed").mkdir(mode=0)
    for path, reason in (
        ("b" * 300, "File name too long"),
        ("loop", "Too many levels of symbolic links"),
        ("closed/a", "Permission denied"),
        ("pairs.csv/a", "no such file"),
    ):
        table.write_text(f"fixed,moving\npairs.csv,{path}\n", "utf-8")
        with without_rights():
            assert read_cases(table, check=False) == [Case("pairs.csv", path)]
            with pytest.raises(InputError, match=f"line 2: {path[:200]}…?: {reason}, next to the table"):
                read_cases(table)
    with pytest.raises(InputError, match=r"b: cannot be read \(File name too long\)"):
        read_cases("b" * 300)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_another_separator_is_named(tmp_path: Path, separator: str) -> None:
    (tmp_path / "pairs.csv").write_text(separator.join(("fixed", "moving")) + "\n")
    with pytest.raises(
        InputError, match=f"its columns are separated by {re.escape(repr(separator))}; save it with commas"
    ):
        read_cases(tmp_path / "pairs.csv")


def test_empty_cells_beyond_the_columns_are_none(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    for text in ("fixed,moving\na,a,, \n", "fixed,moving,,\na,a,,\na,a\n", "fixed,moving,,\na,a,,\n,,,\n,,,,,\n"):
        (tmp_path / "pairs.csv").write_text(text)
        found = read_cases(tmp_path / "pairs.csv")
        assert found == [Case(str(tmp_path / "a"), str(tmp_path / "a"))] * text.count("a,a")
    (tmp_path / "pairs.csv").write_text("fixed,moving,,\na,a,x,\n")
    with pytest.raises(InputError, match="has the extra value 'x' beyond its 2 columns"):
        read_cases(tmp_path / "pairs.csv")


def test_a_series_keeps_the_dots_of_its_folder_and_a_file_loses_its_ending() -> None:
    endings = ("nii.gz", "nii", "nrrd", "mha", "mgz", "hdr", "IMG")
    assert [stem(f"in/scan.v2.{ending}") for ending in endings] == ["scan.v2"] * len(endings)
    assert stem("study/1.2.840.113") == "1.2.840.113"


def test_a_table_beside_its_only_slices_has_names_refused_and_not_broken() -> None:
    with pytest.raises(InputError, match="scan 1: '' is not a valid folder name"):
        distinct_names([""], [""], [["."]], of="scan")
