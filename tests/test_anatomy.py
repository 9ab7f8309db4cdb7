"""Label maps laid alike, and the pairs that training makes of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from anatomies import HEADER, STRUCTURES
from iregzoo.anatomy import Pose, SynthesisedPairs, read_anatomies, read_table
from iregzoo.errors import InputError
from iregzoo.overlap import overlap_loss

SHAPE = (24, 24, 24)
STILL: dict[str, Any] = {"together": Pose(), "alone": Pose(), "mirror": 0.0}


def pairs_of(anatomies: Path, **settings: object) -> SynthesisedPairs:
    table = read_table(anatomies)
    arguments = {"shape": SHAPE, "spacing": [2.0], "length": 6, **settings}
    return SynthesisedPairs(read_anatomies(anatomies, "train"), table.synthesis(), **arguments)  # type: ignore[arg-type]


def test_the_table_says_what_is_compared_and_how_it_looks(anatomies: Path) -> None:
    table = read_table(anatomies)
    assert table.compared == tuple(STRUCTURES)
    assert table.tissues[502].mean == 200
    assert list(table.synthesis().head) == [502]


def test_people_of_other_size_place_and_orientation_lie_on_each_other(anatomies: Path) -> None:
    compared = read_table(anatomies).compared
    for pair in pairs_of(anatomies, **STILL):
        moving, fixed = pair["label"][None, :1], pair["label"][None, 1:]
        still = torch.zeros(1, 3, *SHAPE)
        assert overlap_loss(still, moving, fixed, compared) < 0.15


def test_left_lies_left_unless_mirrored(anatomies: Path) -> None:
    for mirror, lower in ((0.0, 10), (1.0, 49)):
        label = pairs_of(anatomies, **(STILL | {"mirror": mirror}))[0]["label"]
        middles = {value: float(torch.nonzero(label[0] == value)[:, 0].float().mean()) for value in (10, 49)}
        assert min(middles, key=lambda value: middles[value]) == lower


def test_a_pair_is_two_images_and_their_labels(anatomies: Path) -> None:
    pair = pairs_of(anatomies)[0]
    assert pair["image"].shape == pair["label"].shape == (2, *SHAPE)
    assert pair["image"].min() >= 0
    assert pair["image"].max() <= 1
    assert set(pair["label"].unique().tolist()) >= {0, 2, 502}


def test_people_are_bent_and_moved_each_by_itself(anatomies: Path) -> None:
    for setting in (Pose(turn=10.0), Pose(move=4.0), Pose(scale=0.2), Pose(bend=8.0)):
        alone = pairs_of(anatomies, **(STILL | {"alone": setting}))[0]["label"]
        assert (alone != pairs_of(anatomies, **STILL)[0]["label"]).float().mean() > 0.01


def test_the_seed_and_the_epoch_decide(anatomies: Path) -> None:
    first, second = pairs_of(anatomies), pairs_of(anatomies)
    assert torch.equal(first[3]["image"], second[3]["image"])
    second.epoch = 1
    assert not torch.equal(first[3]["image"], second[3]["image"])
    assert not torch.equal(first[3]["image"], pairs_of(anatomies, seed=5)[3]["image"])
    assert len({tuple(pair["image"].flatten()[::97].tolist()) for pair in first}) == len(first)


def test_a_bend_does_not_depend_on_the_grid(anatomies: Path) -> None:
    """As many mm on a grid of twice the spacing."""
    bends = []
    for spacing, size in ((1.0, 48), (2.0, 24)):
        pairs = pairs_of(anatomies, shape=(size, size, size), spacing=[spacing], alone=Pose(bend=5.0))
        spread = [float(pairs._bend(spacing, torch.Generator().manual_seed(s)).std()) * spacing for s in range(20)]
        bends.append(np.mean(spread))
    assert abs(bends[0] / bends[1] - 1) < 0.1


def test_a_range_of_spacings_gives_each_pair_its_own(anatomies: Path) -> None:
    sizes = [int((pair["label"] > 0).sum()) for pair in pairs_of(anatomies, **STILL, spacing=[1.0, 3.0])]
    assert max(sizes) > 2 * min(sizes)


def test_both_images_have_one_look_or_each_its_own(anatomies: Path) -> None:
    for alike in (1.0, 0.0):
        pairs = pairs_of(anatomies, **STILL, alike=alike)
        looks = [pairs._looks(torch.Generator().manual_seed(seed)) for seed in range(6)]
        assert [torch.equal(first.mean, second.mean) for first, second in looks] == [alike == 1.0] * 6


def test_the_head_is_shown_in_both_or_in_each_by_itself(anatomies: Path) -> None:
    table = read_table(anatomies)
    for both, expected in ((1.0, {0}), (0.0, {0, 1})):
        pairs = pairs_of(anatomies, **STILL, both=both, alike=0.0, length=12)
        looks = [pairs._looks(torch.Generator().manual_seed(seed)) for seed in range(12)]
        assert table.tissues[502]
        assert {abs(int(first.shown[502] > 0) - int(second.shown[502] > 0)) for first, second in looks} == expected


def test_a_network_may_bring_both_images_to_one_contrast(anatomies: Path) -> None:
    class Inverted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.ones(()))

        def forward(self, images: Tensor) -> Tensor:
            assert images.shape == (1, 2, *SHAPE)
            return self.one - images

    plain, seen = (pairs_of(anatomies, canonical=canonical)[2] for canonical in (None, Inverted()))
    assert not seen["image"].requires_grad
    assert torch.equal(seen["label"], plain["label"])
    torch.testing.assert_close(seen["image"], 1 - plain["image"])


def test_workers_make_the_same_pairs(anatomies: Path) -> None:
    pairs = pairs_of(anatomies)
    for own, other in zip(DataLoader(pairs), DataLoader(pairs, num_workers=2), strict=True):
        assert torch.equal(own["image"], other["image"])
        assert torch.equal(own["label"], other["label"])


def test_workers_cannot_use_a_network_on_another_device(anatomies: Path) -> None:
    pairs = pairs_of(anatomies, canonical=nn.Linear(1, 1, device="meta"))
    with pytest.raises(InputError, match=r"workers: the canonical-contrast network is on meta.*set workers to 0"):
        next(iter(DataLoader(pairs, num_workers=1)))


def test_one_person_makes_no_pair(anatomies: Path) -> None:
    with pytest.raises(InputError, match="1 label maps: a pair needs two subjects"):
        SynthesisedPairs(read_anatomies(anatomies, "one"), read_table(anatomies).synthesis(), SHAPE, [2.0], 1)
    with pytest.raises(InputError, match=r"spacing 2.0: give a list of 1 or 2 numbers above 0"):
        pairs_of(anatomies, spacing=2.0)


@pytest.mark.parametrize(("kept", "held"), [((), 0), ((10, 49), 2), ((2, 10, 49), 3), ((2, 10, 49, 99), 3)])
def test_maps_with_too_few_structures_to_be_laid_alike_are_refused(
    anatomies: Path, tmp_path: Path, kept: tuple[int, ...], held: int
) -> None:
    """Two middles are on a line, three in a plane; 99 is in no map."""
    for path in anatomies.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rows = [f"{label},s{label},{int(label in kept)},1,40,3,3,1" for label in (*STRUCTURES, 99)]
    (tmp_path / "labels.csv").write_text("\n".join([HEADER, *rows]) + "\n", "utf-8")
    with pytest.raises(InputError, match=rf"a\.nii\.gz: of the structures .* holds {held} with at least 20 voxels"):
        read_anatomies(tmp_path, "train")


def test_what_is_missing_is_named(anatomies: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"labels\.csv: no such file"):
        read_table(tmp_path)
    with pytest.raises(InputError, match="no split 'test', only train, val, one, gone"):
        read_anatomies(anatomies, "test")
    with pytest.raises(InputError, match=r"lost\.nii\.gz: no such file, although splits\.json lists it"):
        read_anatomies(anatomies, "gone")
    (tmp_path / "labels.csv").write_text("label,name\n0,background\n")
    with pytest.raises(InputError, match="lacks the columns evaluate"):
        read_table(tmp_path)
    (tmp_path / "labels.csv").write_text(f"{HEADER}\n0,background,0,0,dark,1,2,1\n")
    with pytest.raises(InputError, match="a cell that is not a number"):
        read_table(tmp_path)
    (tmp_path / "labels.csv").write_text(f"{HEADER}\n0,background,0,0,5,1,2,1\n24\n")
    with pytest.raises(InputError, match=r"a cell that is not a number .* give every row all"):
        read_table(tmp_path)
    (tmp_path / "labels.csv").write_bytes("Gehirnstücke".encode("latin-1"))
    with pytest.raises(InputError, match=r"labels\.csv: is not a table in UTF-8 text"):
        read_table(tmp_path)
    (tmp_path / "labels.csv").write_text(f"{HEADER}\n0,background,0,0,5,1,2,1\n")
    with pytest.raises(InputError, match=r"splits\.json: does not say which maps"):
        read_anatomies(tmp_path, "train")
    (tmp_path / "splits.json").write_text('{"train": ["torn"]}')
    (tmp_path / "torn.nii.gz").write_bytes(b"no scan")
    with pytest.raises(InputError, match=r"torn\.nii\.gz: is not a readable label map .*; get it again"):
        read_anatomies(tmp_path, "train")
