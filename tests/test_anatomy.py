"""Label maps laid alike, and the pairs that training makes of them."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from iregzoo.anatomy import Pose, SynthesisedPairs, read_anatomies, read_table
from iregzoo.errors import InputError
from iregzoo.overlap import overlap_loss

HEADER = "label,name,evaluate,intensity_class,t1_mean,t1_mean_sd,t1_std,t1_std_sd"
STRUCTURES = {
    2: (0, 0, 0, 14),
    10: (-9, 3, 2, 5),
    49: (9, 3, 2, 5),
    16: (0, -10, -6, 4),
    17: (-6, -4, 8, 4),
    53: (6, -4, 8, 4),
}
SHAPE = (24, 24, 24)
STILL: dict[str, Any] = {"together": Pose(), "alone": Pose(), "mirror": 0.0}


def write_person(path: Path, affine: np.ndarray, turn: str) -> None:
    """Balls at known places in mm, seen from a grid that an affine (4, 4) of the person moves, in an axis order."""
    grid = np.diag([1.0, 1.0, 1.0, 1.0])
    grid[:3, 3] = -30
    index = np.indices((60, 60, 60)).reshape(3, -1)
    places = np.linalg.inv(affine)[:3] @ (grid @ np.vstack((index, np.ones(index.shape[1]))))[[0, 1, 2, 3]]
    labels = np.zeros(index.shape[1], dtype=np.int16)
    for label, (x, y, z, radius) in STRUCTURES.items():
        labels[((places - [[x], [y], [z]]) ** 2).sum(0) < radius**2] = label
    labels[(labels == 0) & ((places**2).sum(0) < 20**2)] = 502
    image = nib.Nifti1Image(labels.reshape(60, 60, 60), grid)
    orientation = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(turn)
    )
    nib.save(image.as_reoriented(orientation), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("anatomies")
    rows = ["0,background,0,0,5,1,2,1", "502,head,0,9,200,5,4,1"]
    rows += [f"{label},s{label},1,{kind},{40 * kind},3,3,1" for kind, label in enumerate(STRUCTURES, 1)]
    (path / "labels.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    larger = np.diag([1.15, 1.1, 1.2, 1.0])
    larger[:3, 3] = (4, -3, 2)
    for name, affine, turn in (("a", np.eye(4), "RAS"), ("b", larger, "LIA"), ("c", np.diag([0.9, 1, 1, 1]), "PSR")):
        write_person(path / f"{name}.nii.gz", affine, turn)
    (path / "splits.json").write_text(json.dumps({"train": ["a", "b", "c"], "val": ["a"], "gone": ["a", "lost"]}))
    return path


def pairs_of(folder: Path, **settings: object) -> SynthesisedPairs:
    table = read_table(folder)
    arguments = {"shape": SHAPE, "spacing": [2.0], "length": 6, **settings}
    return SynthesisedPairs(read_anatomies(folder, "train"), table.synthesis(), **arguments)  # type: ignore[arg-type]


def test_the_table_says_what_is_compared_and_how_it_looks(folder: Path) -> None:
    table = read_table(folder)
    assert table.compared == tuple(STRUCTURES)
    assert table.tissues[502].mean == 200
    assert list(table.synthesis().head) == [502]


def test_people_of_other_size_place_and_orientation_lie_on_each_other(folder: Path) -> None:
    compared = read_table(folder).compared
    for pair in pairs_of(folder, **STILL):
        moving, fixed = pair["label"][None, :1], pair["label"][None, 1:]
        still = torch.zeros(1, 3, *SHAPE)
        assert overlap_loss(still, moving, fixed, compared) < 0.15


def test_left_lies_left_unless_mirrored(folder: Path) -> None:
    for mirror, lower in ((0.0, 10), (1.0, 49)):
        label = pairs_of(folder, **(STILL | {"mirror": mirror}))[0]["label"]
        middles = {value: float(torch.nonzero(label[0] == value)[:, 0].float().mean()) for value in (10, 49)}
        assert min(middles, key=lambda value: middles[value]) == lower


def test_a_pair_is_two_images_and_their_labels(folder: Path) -> None:
    pair = pairs_of(folder)[0]
    assert pair["image"].shape == pair["label"].shape == (2, *SHAPE)
    assert pair["image"].min() >= 0
    assert pair["image"].max() <= 1
    assert set(pair["label"].unique().tolist()) >= {0, 2, 502}


def test_people_are_bent_and_moved_each_by_itself(folder: Path) -> None:
    for setting in (Pose(turn=10.0), Pose(move=4.0), Pose(scale=0.2), Pose(bend=8.0)):
        alone = pairs_of(folder, **(STILL | {"alone": setting}))[0]["label"]
        assert (alone != pairs_of(folder, **STILL)[0]["label"]).float().mean() > 0.01


def test_the_seed_and_the_epoch_decide(folder: Path) -> None:
    first, second = pairs_of(folder), pairs_of(folder)
    assert torch.equal(first[3]["image"], second[3]["image"])
    second.epoch = 1
    assert not torch.equal(first[3]["image"], second[3]["image"])
    assert not torch.equal(first[3]["image"], pairs_of(folder, seed=5)[3]["image"])
    assert len({tuple(pair["image"].flatten()[::97].tolist()) for pair in first}) == len(first)


def test_a_bend_does_not_depend_on_the_grid(folder: Path) -> None:
    """As many mm on a grid of twice the spacing."""
    bends = []
    for spacing, size in ((1.0, 48), (2.0, 24)):
        pairs = pairs_of(folder, shape=(size, size, size), spacing=[spacing], alone=Pose(bend=5.0))
        spread = [float(pairs._bend(spacing, torch.Generator().manual_seed(s)).std()) * spacing for s in range(20)]
        bends.append(np.mean(spread))
    assert abs(bends[0] / bends[1] - 1) < 0.1


def test_a_range_of_spacings_gives_each_pair_its_own(folder: Path) -> None:
    sizes = [int((pair["label"] > 0).sum()) for pair in pairs_of(folder, **STILL, spacing=[1.0, 3.0])]
    assert max(sizes) > 2 * min(sizes)


def test_both_images_have_one_look_or_each_its_own(folder: Path) -> None:
    for alike in (1.0, 0.0):
        pairs = pairs_of(folder, **STILL, alike=alike)
        looks = [pairs._looks(torch.Generator().manual_seed(seed)) for seed in range(6)]
        assert [torch.equal(first.mean, second.mean) for first, second in looks] == [alike == 1.0] * 6


def test_the_head_is_shown_in_both_or_in_each_by_itself(folder: Path) -> None:
    table = read_table(folder)
    for both, expected in ((1.0, {0}), (0.0, {0, 1})):
        pairs = pairs_of(folder, **STILL, both=both, alike=0.0, length=12)
        looks = [pairs._looks(torch.Generator().manual_seed(seed)) for seed in range(12)]
        assert table.tissues[502]
        assert {abs(int(first.shown[502] > 0) - int(second.shown[502] > 0)) for first, second in looks} == expected


def test_one_person_makes_no_pair(folder: Path) -> None:
    with pytest.raises(InputError, match="1 label maps: a pair needs two people"):
        SynthesisedPairs(read_anatomies(folder, "val"), read_table(folder).synthesis(), SHAPE, [2.0], 1)


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"labels\.csv: no such file"):
        read_table(tmp_path)
    with pytest.raises(InputError, match="no split 'test', only train, val, gone"):
        read_anatomies(folder, "test")
    with pytest.raises(InputError, match=r"lost\.nii\.gz: no such file, though splits\.json names it"):
        read_anatomies(folder, "gone")
    (tmp_path / "labels.csv").write_text("label,name\n0,background\n")
    with pytest.raises(InputError, match="lacks the columns evaluate"):
        read_table(tmp_path)
    (tmp_path / "labels.csv").write_text(f"{HEADER}\n0,background,0,0,dark,1,2,1\n")
    with pytest.raises(InputError, match="a cell that is no number"):
        read_table(tmp_path)
    (tmp_path / "labels.csv").write_text(f"{HEADER}\n0,background,0,0,5,1,2,1\n")
    with pytest.raises(InputError, match=r"splits\.json: does not say which maps"):
        read_anatomies(tmp_path, "train")
