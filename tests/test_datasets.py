"""Where the scans of a data set lie: our own layout, the published ones, and what is said of any other."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from iregzoo.datasets import LAYOUTS, find_scans
from iregzoo.errors import InputError
from layouts import GROUPS, PATHS, touch

EACH_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
TWO = {"train": 2}
DOCS = Path(__file__).resolve().parents[1] / "docs" / "datasets.md"


def make_dataset(folder: Path, splits: dict[str, Any], images: str, labels: str = "") -> Path:
    """A data set of files without content: what ``find_scans`` looks at are names."""
    for kind, names in (("images", images), ("labels", labels)):
        (folder / kind).mkdir(parents=True)
        for name in names:
            (folder / kind / f"{name}.nii.gz").touch()
    (folder / "splits.json").write_text(json.dumps(splits))
    return folder


# --- the data set


def test_scans_of_a_split_with_the_labels_that_there_are(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, {"train": ["b", "a"], "val": ["c", "d"]}, images="abcd", labels="ac")
    image, label = root / "images", root / "labels"
    assert find_scans(root, "train") == [
        {"image": str(image / "b.nii.gz")},
        {"image": str(image / "a.nii.gz"), "label": str(label / "a.nii.gz")},
    ]
    assert [Path(scan["image"]).name for scan in find_scans(str(root), "val")] == ["c.nii.gz", "d.nii.gz"]


def test_folder_without_splits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{tmp_path}: has no splits\.json"):
        find_scans(tmp_path, "train")


def test_split_that_the_data_set_does_not_have_is_refused(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, {"train": ["a", "b"], "val": ["c", "d"]}, images="abcd")
    with pytest.raises(InputError, match=r"splits\.json: has no split 'test', only train, val"):
        find_scans(root, "test")


def test_scan_that_is_named_but_missing_is_refused(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, {"train": ["a", "x"]}, images="ab")
    with pytest.raises(InputError, match=r"x\.nii\.gz: no such file, but splits\.json lists it in train"):
        find_scans(root, "train")


@pytest.mark.parametrize(
    ("units", "said"),
    [
        (5, r"split 'train' is 5; expected a list of names, or of lists of names"),
        ([1, 2], "lists 1; expected a name, or a list of names"),
        ([{"image": "a"}], "lists {'image': 'a'}; expected"),
        ([["a", "b"], []], r"lists \[\]; expected"),
        (["a", "b", "a"], "has a scan twice, with 'a'; list those of a patient once"),
        ([["a", "b"], ["a", "c"]], "has a scan twice, with \\['a', 'c'\\]"),  # a would move to itself
        ([["a", "b", "b"]], "has a scan twice"),
    ],
)
def test_a_list_of_scans_that_is_none_is_refused(tmp_path: Path, units: Any, said: str) -> None:
    root = make_dataset(tmp_path, {"train": units}, images="abc")
    with pytest.raises(InputError, match=rf"splits\.json: .*{said}"):
        find_scans(root, "train")


@pytest.mark.parametrize("names", [[], ["a"]])
def test_split_without_a_pair_is_refused(tmp_path: Path, names: list[str]) -> None:
    root = make_dataset(tmp_path, {"val": names}, images="ab")
    with pytest.raises(InputError, match=rf"split 'val' has {len(names)} scans; a pair needs two"):
        find_scans(root, "val")


def test_landmarks_and_groups_of_our_own_layout(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, {"train": [["a", "b"], ["c", "b"]]}, images="abc", labels="c")
    (root / "points").mkdir()
    for name in ("a.csv", "b.mrk.json"):
        (root / "points" / name).touch()
    first, second, third, _ = find_scans(root, "train")
    assert first == {"image": f"{root}/images/a.nii.gz", "points": f"{root}/points/a.csv", "group": "a"}
    assert second == {"image": f"{root}/images/b.nii.gz", "points": f"{root}/points/b.mrk.json", "group": "a"}
    assert third == {"image": f"{root}/images/c.nii.gz", "label": f"{root}/labels/c.nii.gz", "group": "c"}


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([["a", "b"], ["c"]], r"c\.nii\.gz: is the only scan of its patient"),
        ([["a", "b"], "c"], r"c\.nii\.gz: only some scans are listed by patient"),
        (["a", ["b", "c"]], r"b\.nii\.gz: only some scans are listed by patient"),
    ],
)
def test_groups_are_of_two_scans_and_of_all(tmp_path: Path, listed: list[Any], message: str) -> None:
    root = make_dataset(tmp_path, {"train": listed}, images="abc")
    with pytest.raises(InputError, match=message):
        find_scans(root, "train")


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_splits_that_are_no_object_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "splits.json").write_text(text)
    with pytest.raises(InputError, match=r"splits\.json: is not a JSON object of splits"):
        find_scans(tmp_path, "train")


def test_scans_that_two_splits_share_are_told_of(tmp_path: Path) -> None:
    splits = {"train": [["a", "b"], ["c", "d"]], "val": ["e"], "all": ["a", "e"]}
    root = make_dataset(tmp_path / "apart", splits, "abcde")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_scans(root, "train")
    root = make_dataset(tmp_path / "own", {**splits, "test": ["d", "e"]}, "abcde")
    with pytest.warns(UserWarning, match=r"splits\.json: d is in the splits train and test: what is measured says"):
        find_scans(root, "test")
    published = touch(tmp_path / "oasis", "oasis")
    with pytest.warns(UserWarning, match=r"OASIS\S* is in the splits train and val: what is measured"):
        find_scans(published, "train", "oasis", {"train": 2, "val": ["*"]})


def test_splits_beside_a_file_of_splits_are_refused(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, {"train": ["a", "b"]}, images="ab")
    with pytest.raises(InputError, match=r"iregzoo defines its own in splits\.json"):
        find_scans(root, "train", splits=TWO)


# --- published layouts


def all_scans(root: Path, layout: str) -> list[dict[str, str]]:
    """Every scan that is found, and no other."""
    units = len(PATHS[layout]) // (2 if layout == "dirlab" else 1)
    found = find_scans(root, "all", layout, {"all": units})
    with pytest.raises(InputError, match=rf"holds {units} of the {units + 1} scans or patients that the splits"):
        find_scans(root, "all", layout, {"all": units + 1})
    return found


@EACH_LAYOUT
@pytest.mark.parametrize("above", ["", "downloaded"])
def test_scans_of_a_layout_with_labels_and_landmarks(layout: str, above: str, tmp_path: Path) -> None:
    root = touch(tmp_path / above, layout)
    found = all_scans(tmp_path, layout)
    kinds = ("image", "label", "points")
    expected = [{k: str(root / p) for k, p in zip(kinds, scan, strict=True) if p} for scan in PATHS[layout]]
    paths = [{key: path for key, path in scan.items() if key != "group"} for scan in found]
    assert sorted(paths, key=str) == sorted(expected, key=str)
    if layout not in ("ixi", "mindboggle"):  # these two sort by file name before the folder
        assert paths == expected


def test_scans_sort_by_name_and_numbers_by_value(tmp_path: Path) -> None:
    names = [Path(scan["image"]).stem for scan in all_scans(touch(tmp_path, "ixi"), "ixi")]
    assert names == [f"subject_{number}" for number in (2, 3, 9, 10, 11, 30, 100)]


def test_counts_split_one_after_the_other(tmp_path: Path) -> None:
    root = touch(tmp_path, "ixi")
    splits = {"train": 3, "val": 2, "test": 2}
    found = {split: [Path(s["image"]).stem[8:] for s in find_scans(root, split, "ixi", splits)] for split in splits}
    assert found == {"train": ["2", "3", "9"], "val": ["10", "11"], "test": ["30", "100"]}


def test_patterns_split_by_folder(tmp_path: Path) -> None:
    ixi, mindboggle = touch(tmp_path / "ixi", "ixi"), touch(tmp_path / "mindboggle", "mindboggle")
    for split, folder in (("train", "Train"), ("val", "Val"), ("test", "Test")):
        assert {Path(scan["image"]).parent.name for scan in find_scans(ixi, split, "ixi")} == {folder}
    for split, groups in (("train", GROUPS[:2]), ("val", GROUPS[2:3]), ("test", GROUPS[3:])):
        found = find_scans(mindboggle, split, "mindboggle")
        assert {Path(scan["image"]).parents[1].name for scan in found} == {f"{group}_volumes" for group in groups}
        assert len(found) == 3 * len(groups)


def test_phases_of_a_dirlab_case_are_a_group_with_inhale_first(tmp_path: Path) -> None:
    root = touch(tmp_path, "dirlab")
    for split, cases in (("train", range(1, 7)), ("val", (7, 8)), ("test", (9, 10))):
        found = find_scans(root, split, "dirlab")
        assert [scan["group"] for scan in found] == [str(case) for case in cases for _ in range(2)]
        phases = [re.search(r"_(T\d0)", Path(scan["image"]).name) for scan in found]
        assert [phase and phase[1] for phase in phases] == ["T00", "T50"] * len(cases)


def test_learn2reg_form_of_oasis_is_found(tmp_path: Path) -> None:
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
        for number in (1, 2):
            (tmp_path / folder / f"OASIS_{number:04d}_0000.nii.gz").touch()
    found = find_scans(tmp_path, "train", "oasis", TWO)
    assert [Path(scan["label"]).parent.name for scan in found] == ["labelsTr"] * 2


def test_ct_of_the_abdomen_is_left_out(tmp_path: Path) -> None:
    found = all_scans(touch(tmp_path, "abdomen_mr"), "abdomen_mr")
    assert all(path.endswith("_0000.nii.gz") for scan in found for path in scan.values())


# --- what is missing


@EACH_LAYOUT
def test_wrong_layout_says_what_is_expected_and_where_it_is_from(layout: str, tmp_path: Path) -> None:
    other = "freesurfer" if layout == "flare21" else "flare21"
    for root in (tmp_path, touch(tmp_path / "other", other)):
        with pytest.raises(InputError) as caught:
            find_scans(root, "train", layout)
        message = str(caught.value)
        assert message.startswith(f"{root}: holds no data set of layout {layout}; expected ")
        assert LAYOUTS[layout].page in message
        assert "docs/datasets.md" in message
        assert "\n" not in message


@EACH_LAYOUT
def test_missing_companion_is_named(layout: str, tmp_path: Path) -> None:
    root = touch(tmp_path, layout)
    image, label, points = PATHS[layout][1]
    if label == image:  # one file holds both
        return
    (root / (label or points)).unlink()
    with pytest.raises(InputError) as caught:
        find_scans(root, "train", layout, {"train": 2})
    assert str(caught.value).startswith(f"{root / image}: has no {'label' if label else 'points'}; expected {root}/")
    assert LAYOUTS[layout].page in str(caught.value)


@EACH_LAYOUT
def test_documents_show_every_layout_and_page(layout: str) -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert f"`{layout}`" in text
    assert LAYOUTS[layout].page in text


def test_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere': no such folder; give the data set's folder"):
        find_scans(tmp_path / "nowhere", "train", "ixi")
    with pytest.raises(InputError, match="dataset_dir '': no such folder"):
        find_scans("", "train", "ixi")


def test_unknown_layout_and_split_are_refused(tmp_path: Path) -> None:
    root = touch(tmp_path, "oasis")
    with pytest.raises(InputError, match=r"layout 'ixxi' is unknown; choose iregzoo, ixi, freesurfer"):
        find_scans(root, "train", "ixxi")
    with pytest.raises(InputError, match=r"there is no split 'dev', only train, val, test"):
        find_scans(root, "dev", "oasis")


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        ({"train": "OASIS*"}, r"splits: train is 'OASIS\*'; give a number of scans, or a list of patterns"),
        ({"train": 2.5}, r"splits: train is 2.5; give a number"),
        (5, r"splits 5: give what belongs to each split"),
    ],
)
def test_splits_that_are_none_are_refused(tmp_path: Path, splits: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        find_scans(touch(tmp_path, "oasis"), "train", "oasis", splits)


def test_part_of_a_data_set_is_refused_unless_the_splits_say_so(tmp_path: Path) -> None:
    root = touch(tmp_path, "oasis")
    with pytest.raises(
        InputError, match=r"holds 3 of the 360 scans or patients that the splits {'train': 280, 'val': 20, 'test': 60}"
    ):
        find_scans(root, "train", "oasis")
    assert len(find_scans(root, "train", "oasis", TWO)) == 2


def test_group_of_scans_that_is_missing_is_refused(tmp_path: Path) -> None:
    root = touch(tmp_path, "mindboggle")
    for path in root.glob("MMRR-21_volumes/*/*"):
        path.unlink()
    assert len(find_scans(root, "val", "mindboggle")) == 3
    with pytest.raises(
        InputError, match=r"holds no scan of split 'test' \(MMRR-21\*\); get it from https://mindboggle"
    ):
        find_scans(root, "test", "mindboggle")


def test_patient_with_one_scan_is_refused(tmp_path: Path) -> None:
    root = touch(tmp_path, "dirlab")
    (root / "Case3Pack/Images/case3_T50_s.img").unlink()
    with pytest.raises(InputError, match=r"case3_T00_s\.img: is the only scan of its patient; a pair needs two"):
        find_scans(root, "train", "dirlab")
