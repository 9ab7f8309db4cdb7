"""Atlases of one's own: read, checked, numbered, and written into a face."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from iregzoo import zoo
from iregzoo.errors import InputError
from iregzoo.label.app import write_face
from iregzoo.label.atlas import LabelledImage, own, packaged, place_of, write
from iregzoo.label_names import read_names
from iregzoo.space.scan import read_labels, read_scan
from iregzoo.template import read_atlas

from .scans import SHAPE, write_atlas


def read_own(options: list[str]) -> list[LabelledImage]:
    return own(options[1].split(","), options[3].split(","), options[5])


def test_own_atlas_comes_back_as_it_was(tmp_path: Path) -> None:
    (atlas,) = read_own(write_atlas(tmp_path))
    write(tmp_path / "face", [atlas])
    found = read_atlas(place_of(tmp_path / "face", ""))
    assert (found.name, found.names) == ("mine", {1: "part 1", 2: "part 2"})
    image = read_scan(found.image)
    torch.testing.assert_close(image.data, atlas.image.data)
    assert image.grid.matches(atlas.image.grid)
    assert torch.equal(read_labels(found.labels, image).data, atlas.labels.data)


def test_labels_that_eight_bits_do_not_hold_are_numbered_anew(tmp_path: Path) -> None:
    first, second = write_atlas(tmp_path, (17, 1002, 2035), "a"), write_atlas(tmp_path, (17, 2035), "b")
    (tmp_path / "names.json").write_text(json.dumps({"17": "x", "1002": "y", "2035": "z"}))
    a, b = own([first[1], second[1]], [first[3], second[3]], first[5])
    assert a.names == {1: "x", 2: "y", 3: "z"}
    assert b.names == {1: "x", 3: "z"}
    assert (a.former, b.former) == ({1: 17, 2: 1002, 3: 2035}, {1: 17, 3: 2035})
    before = read_labels(first[3], a.image).data
    for old, new in ((0, 0), (17, 1), (1002, 2), (2035, 3)):
        assert torch.equal(a.labels.data == new, before == old)
    assert b.labels.data.unique().tolist() == [0, 1, 3]
    write_face(tmp_path / "pan", zoo.load("pan"), None, [a, b])
    metadata = json.loads((tmp_path / "pan" / "configs" / "metadata.json").read_text("utf-8"))
    labels = metadata["network_data_format"]["outputs"]["pred"]
    assert labels["channel_def"] == {"0": "background", "1": "x", "2": "y", "3": "z"}


def test_names_may_be_a_table(tmp_path: Path) -> None:
    options = write_atlas(tmp_path)
    table = tmp_path / "labels.csv"
    table.write_text("label,name,colour\n0,background,black\n1,thalamus,red\n2,left putamen,blue\n9,unused,-\n")
    (atlas,) = own([options[1]], [options[3]], str(table))
    assert atlas.names == {1: "thalamus", 2: "left putamen"}


def test_too_many_labels_are_refused(tmp_path: Path) -> None:
    options = write_atlas(tmp_path)
    labels = np.arange(np.prod(SHAPE), dtype=np.int32).reshape(SHAPE) % 300
    nib.save(nib.Nifti1Image(labels, np.diag([-1.2, 1.0, 0.9, 1.0])), options[3])
    (tmp_path / "names.json").write_text(json.dumps({str(value): f"part {value}" for value in range(300)}))
    with pytest.raises(InputError, match="299 labels, but viewers show at most 255"):
        read_own(options)


def test_an_atlas_given_twice_is_refused(tmp_path: Path) -> None:
    options = write_atlas(tmp_path)
    with pytest.raises(InputError, match=r"mine.nii.gz: is given 2 times; give each atlas once"):
        own([options[1]] * 2, [options[3]] * 2, options[5])


def test_two_images_may_share_a_label_map(tmp_path: Path) -> None:
    options = write_atlas(tmp_path)
    (tmp_path / "other.nii.gz").write_bytes(Path(options[1]).read_bytes())
    found = own([options[1], str(tmp_path / "other.nii.gz")], [options[3]] * 2, options[5])
    assert [atlas.name for atlas in found] == ["mine", "other"]


def test_atlas_of_no_such_name_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [packaged()])
    with pytest.raises(InputError, match="atlas 'lung' is unknown; available: hippocampus"):
        place_of(tmp_path, "lung")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("names.csv", b"value,title\n1,thalamus\n", "begins with 'value,title' instead of the column names; give JSON"),
        ("names.csv", b"", "begins with '' instead of the column names"),
        ("names.csv", b"label;name\n1;thalamus\n", "its columns are separated by ';'; save it with commas"),
        ("names.csv", b"label\tname\n1\tthalamus\n", "are separated by"),
        ("names.csv", b"label,name\n1,a\none,thalamus\n", "row 3: label 'one' is not a whole number"),
        ("names.csv", b"label,name\n1,a\n1,b\n2,c\n", "row 3: names the label 1 a second time"),
        ("names.csv", "label,name\n1,no\xfdau\n".encode("latin-1"), "is not UTF-8 text .byte 16.; save it"),
        ("names.json", b'{"1": "a", "01": "b"}', "entry 2: names the label 1 a second time"),
        ("names.json", b'{"1": "a", "1": "b"}', "entry 2: names the label 1 a second time"),
        ("names.json", b'{"1": "a", "2": ', "is not valid JSON"),
        ("names.json", b'["a"]', "does not hold a JSON object"),
        ("names.json", b'{"1": {"name": "a"}}', "entry 1: the name of label 1 is not text"),
        ("names.json", b'{"1": "a", "2": ["b"]}', "entry 2: the name of label 2 is not text"),
    ],
)
def test_files_that_do_not_name_labels_say_where(tmp_path: Path, file: str, content: bytes, words: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=rf"{file}: .*{words}"):
        read_names(tmp_path / file)


def test_columns_may_stand_apart(tmp_path: Path) -> None:
    (tmp_path / "names.csv").write_text("label, name\n1, thalamus\n")
    assert read_names(tmp_path / "names.csv") == {1: "thalamus"}
