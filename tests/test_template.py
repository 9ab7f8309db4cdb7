"""Templates as files, and the one that comes with the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy.ndimage import label

from geometry import make_grid
from iregzoo.errors import InputError
from iregzoo.space.scan import read_labels, read_scan
from iregzoo.template import default, named, write_template
from iregzoo.zoo import load

ROOT = Path(__file__).parents[1]


def test_written_template_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = make_grid((20, 24, 20), signs=(-1, -1, 1))
    image = torch.rand(1, 1, *grid.shape, generator=torch.manual_seed(0))
    labels = (image > 0.5).int() * 3
    (tmp_path / "templates" / "block").mkdir(parents=True)
    write_template(tmp_path / "templates" / "block", image, grid, labels=labels, names={3: "block"})
    monkeypatch.setenv("IREGZOO_HOME", str(tmp_path))
    atlas = default("block")
    assert atlas.names == {3: "block"}
    found = read_scan(atlas.image)
    assert found.grid.matches(grid)
    torch.testing.assert_close(found.data, image)
    assert torch.equal(read_labels(atlas.labels, found).data, labels)


def test_labels_are_numbered_or_all_named() -> None:
    assert named([3, 5], None) == {3: "label 3", 5: "label 5"}
    assert named([3], {3: "block", 5: "edge"}) == {3: "block"}
    with pytest.raises(InputError, match=r"labels \[5, 7\] have no names"):
        named([3, 5, 7], {3: "block", 5: ""})


def test_unknown_template_is_refused() -> None:
    with pytest.raises(InputError, match="template 'lung' is unknown; available: hippocampus"):
        default("lung")


def test_hippocampus_template_is_whole() -> None:
    atlas = default("hippocampus")
    image = read_scan(atlas.image)
    labels = read_labels(atlas.labels, image)  # refuses another grid
    assert image.grid.spacing.tolist() == pytest.approx([1, 1, 1])
    assert image.grid.centre.tolist() == pytest.approx([0, 0, 0])
    assert all(30 <= size <= 64 for size in image.grid.shape)
    assert float(image.data.min()) >= 0
    assert 0.9 < float(image.data.max()) <= 1
    assert labels.data.unique().tolist() == [0, 1, 2]
    assert atlas.names == {1: "anterior hippocampus", 2: "posterior hippocampus"}
    for value in atlas.names:
        inside = labels.data[0, 0] == value
        assert 1200 < int(inside.sum()) < 2200  # mm³; the scans' medians are 1,726 and 1,568
        assert label(inside.numpy())[1] == 1, f"label {value} is in pieces"
    folder = atlas.image.parent
    assert sum(path.stat().st_size for path in folder.iterdir()) < 500_000
    assert "CC BY-SA 4.0" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("bundle", ["iirp", "pan"])
def test_names_are_those_of_the_weights(bundle: str) -> None:
    card = load(bundle, "hippocampus").card
    names = json.loads((default("hippocampus").image.parent / "labels.json").read_text(encoding="utf-8"))
    assert names == dict(card.labels)


def test_installed_package_has_the_template(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    command = [
        sys.executable,
        "-c",
        "import setuptools; setuptools.setup()",
        "-q",
        "build_py",
        "--build-lib",
        str(tmp_path),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = subprocess.run(
        [sys.executable, "-c", "from iregzoo.template import default; print(default('hippocampus').image)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
        capture_output=True,
        encoding="utf-8",
    )
    assert Path(found.stdout.strip()) == tmp_path / "iregzoo" / "templates" / "hippocampus" / "template.nii.gz"
