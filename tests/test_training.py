"""Pairs for training: what is read, which pairs are drawn, and what a step reports."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.transforms import Compose, RandAdjustContrastd, RandAffined
from torch import Tensor

from iregzoo.errors import InputError
from iregzoo.iteration import FixedIterations
from iregzoo.losses import RegistrationLoss
from iregzoo.networks import IIRPNet
from iregzoo.registration import PairNetwork
from iregzoo.training import (
    CyclicPairs,
    LoadScan,
    RandomPairs,
    TrainStep,
    WarpLabels,
    find_scans,
    join_pair,
    latest_checkpoint,
    prepare_pairs,
)

SHAPE = (6, 5, 4)


def make_dataset(folder: Path, splits: dict[str, list[str]], images: str, labels: str = "") -> Path:
    """A data set of files without content: what ``find_scans`` looks at are names."""
    for kind, names in (("images", images), ("labels", labels)):
        (folder / kind).mkdir(parents=True)
        for name in names:
            (folder / kind / f"{name}.nii.gz").touch()
    (folder / "splits.json").write_text(json.dumps(splits))
    return folder


def samples(count: int = 5) -> list[dict[str, Tensor]]:
    """Scans that tell who they are: the first voxel of scan i is i; with labels."""
    generator = torch.manual_seed(0)
    found = []
    for number in range(count):
        image = torch.rand(1, *SHAPE, generator=generator)
        image[0, 0, 0, 0] = number
        found.append({"image": image, "label": (image > 0.5).int()})
    return found


def who(pair: dict[str, Tensor]) -> tuple[int, int]:
    moving, fixed = pair["image"][:, 0, 0, 0]
    return int(moving), int(fixed)


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
    with pytest.raises(InputError, match=r"x\.nii\.gz: no such file, but splits\.json names it in train"):
        find_scans(root, "train")


@pytest.mark.parametrize("names", [[], ["a"]])
def test_split_without_a_pair_is_refused(tmp_path: Path, names: list[str]) -> None:
    root = make_dataset(tmp_path, {"val": names}, images="ab")
    with pytest.raises(InputError, match=rf"split 'val' has {len(names)} scans; a pair needs two"):
        find_scans(root, "val")


def test_real_data_set_is_found_and_read(test_data: Path) -> None:
    load = LoadScan((1.0, 1.0, 1.0), (48, 64, 48))
    scans = {split: find_scans(test_data / "hippocampus", split) for split in ("train", "val", "test")}
    assert all(len(found) >= 20 for found in scans.values())
    for split, found in scans.items():
        sample = load(found[0])
        assert sample["image"].shape == sample["label"].shape == (1, 48, 64, 48), split
        assert sample["image"].min() == 0
        assert sample["image"].max() == 1
        assert sample["label"].unique().tolist() == [0, 1, 2]


# --- reading


def write(path: Path, array: np.ndarray[Any, Any]) -> str:
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return str(path)


def ramp(shape: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    """Each voxel's place along the first axis."""
    return np.broadcast_to(np.arange(1.0, shape[0] + 1)[:, None, None], shape).astype(np.float32)


def test_small_scan_is_padded_evenly(tmp_path: Path) -> None:
    load = LoadScan((1.0, 1.0, 1.0), (8, 8, 8))
    labels = np.full((4, 4, 4), 3, np.int16)
    sample = load({"image": write(tmp_path / "i.nii", ramp((4, 4, 4))), "label": write(tmp_path / "l.nii", labels)})
    expected = torch.zeros(1, 8, 8, 8)
    expected[:, 2:6, 2:6, 2:6] = 3
    assert torch.equal(sample["label"], expected.int())
    profile = sample["image"][0, :, 4, 4]
    torch.testing.assert_close(profile, torch.tensor([0, 0, 0, 1 / 3, 2 / 3, 1, 0, 0]), atol=0.02, rtol=0)


def test_large_scan_is_cut_evenly(tmp_path: Path) -> None:
    labels = ramp((12, 10, 9)).astype(np.int16)
    paths = {"image": write(tmp_path / "i.nii", ramp((12, 10, 9))), "label": write(tmp_path / "l.nii", labels)}
    sample = LoadScan((1.0, 1.0, 1.0), (6, 8, 8))(paths)
    assert sample["label"].shape == sample["image"].shape == (1, 6, 8, 8)
    assert sample["label"][0, :, 0, 0].tolist() == [4, 5, 6, 7, 8, 9]


def test_scan_is_put_on_the_spacing_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "i.nii", ramp((12, 12, 12)))
    profile = LoadScan((2.0, 2.0, 2.0), (6, 6, 6))({"image": path})["image"][0, :, 3, 3]
    torch.testing.assert_close(profile.diff(), torch.full((5,), 2 / 11), atol=0.02, rtol=0)


def test_scan_without_labels_gives_none(tmp_path: Path) -> None:
    sample = LoadScan((1.0, 1.0, 1.0), (8, 8, 8))({"image": write(tmp_path / "i.nii", ramp((8, 8, 8)))})
    assert list(sample) == ["image"]
    assert type(sample["image"]) is Tensor


# --- pairs


def epoch_of(pairs: RandomPairs, epoch: int) -> list[tuple[int, int]]:
    """The pairs of an epoch, as a trainer would see them."""
    drawn: list[tuple[int, int]] = []
    trainer = Engine(lambda engine, batch: drawn.append(who(batch)))
    pairs.attach(trainer)
    trainer.state.epoch = epoch - 1
    trainer.state.max_epochs = epoch
    trainer.state.epoch_length = len(pairs)
    trainer.run((pairs[i] for i in range(len(pairs))), max_epochs=epoch, epoch_length=len(pairs))
    return drawn


def test_pairs_depend_on_seed_epoch_and_index_alone() -> None:
    scans = samples()
    first = epoch_of(RandomPairs(scans, 40, seed=3), 1)
    assert epoch_of(RandomPairs(scans, 40, seed=3), 1) == first
    assert epoch_of(RandomPairs(scans, 40, seed=3), 2) != first
    assert epoch_of(RandomPairs(scans, 40, seed=4), 1) != first
    pairs = RandomPairs(scans, 40, seed=3)
    pairs.epoch = 1
    assert [who(pairs[i]) for i in reversed(range(40))] == first[::-1]


def test_every_ordered_pair_is_drawn_and_none_with_itself() -> None:
    pairs = RandomPairs(samples(4), 400)
    drawn = {who(pairs[i]) for i in range(400)}
    assert drawn == {(i, j) for i in range(4) for j in range(4) if i != j}


def test_pair_holds_images_and_labels_moving_first() -> None:
    scans = samples(2)
    pairs = RandomPairs(scans, 10)
    assert len(pairs) == 10
    for index in range(10):
        pair = pairs[index]
        moving, fixed = who(pair)
        for key in ("image", "label"):
            assert torch.equal(pair[key], torch.cat((scans[moving][key], scans[fixed][key])))


def test_labels_that_only_one_scan_has_are_left_out() -> None:
    with_labels, without = samples(2)
    del without["label"]
    assert list(join_pair(with_labels, without)) == list(join_pair(without, with_labels)) == ["image"]


def test_mirror_flips_images_and_labels_of_both_left_to_right() -> None:
    scans = samples()
    plain, mirrored = RandomPairs(scans, 20, mirror=0.0), RandomPairs(scans, 20, mirror=1.0)
    for index in range(20):
        for key in ("image", "label"):
            assert torch.equal(mirrored[index][key], plain[index][key].flip(1))


def test_mirror_is_as_frequent_as_asked() -> None:
    scans = samples()
    plain, sometimes = RandomPairs(scans, 200, mirror=0.0), RandomPairs(scans, 200, mirror=0.3)
    flipped = [not torch.equal(sometimes[i]["image"], plain[i]["image"]) for i in range(200)]
    assert 40 < sum(flipped) < 80


def test_augmentation_is_of_each_scan_and_the_same_for_the_same_pair() -> None:
    augmentation = Compose(
        [
            RandAffined(keys=["image", "label"], mode=["bilinear", "nearest"], prob=1.0, translate_range=[2, 2, 2]),
            RandAdjustContrastd(keys="image", prob=1.0, gamma=(0.5, 2.0)),
        ]
    )
    scans = samples(2)
    originals = [scan["image"].clone() for scan in scans]
    pairs = RandomPairs(scans, 4, seed=1, augmentation=augmentation)
    first, again, other = pairs[0], pairs[0], pairs[1]
    assert all(torch.equal(first[key], again[key]) for key in ("image", "label"))
    assert not torch.equal(first["image"], other["image"])
    assert set(first["label"].unique().tolist()) <= {0, 1}
    assert type(first["image"]) is Tensor
    assert all(torch.equal(scan["image"], original) for scan, original in zip(scans, originals, strict=True))


def test_cyclic_pairs_take_the_next_scan_as_moving() -> None:
    pairs = CyclicPairs(samples(4))
    assert len(pairs) == 4
    assert [who(pairs[i]) for i in range(4)] == [(1, 0), (2, 1), (3, 2), (0, 3)]
    with pytest.raises(IndexError, match="4"):
        pairs[4]


# --- a step


class Recorder(PairNetwork):
    """Notes the iterations that each call asks for."""

    def __init__(self) -> None:
        super().__init__(IIRPNet())
        self.asked: list[int] = []

    def forward(self, image: Tensor, complete: bool = False, controller: Any = None) -> Any:
        assert isinstance(controller, FixedIterations)
        self.asked.append(controller.max_iterations)
        return super().forward(image, complete, controller)


def make_engine(loss: RegistrationLoss) -> Any:
    """What of a MONAI trainer a step touches."""
    torch.manual_seed(0)
    network = Recorder()
    return SimpleNamespace(
        network=network,
        optimizer=torch.optim.Adam(network.parameters(), lr=1e-3),
        loss_function=loss,
        state=SimpleNamespace(device=torch.device("cpu"), iteration=1),
    )


def make_batch(size: int = 16) -> dict[str, Tensor]:
    image = torch.rand(1, 2, size, size, size, generator=torch.manual_seed(1))
    return {"image": image, "label": (image > 0.5).int()}


@pytest.mark.parametrize("amp", [False, True])
def test_step_reports_every_term_and_moves_every_weight(amp: bool) -> None:
    engine = make_engine(RegistrationLoss(folding=0.1, overlap=1.0, labels=(1,)))
    before = {name: tensor.clone() for name, tensor in engine.network.state_dict().items()}
    terms = TrainStep(amp=amp)(engine, make_batch())
    assert set(terms) == {"loss", "similarity", "smoothness", "folding", "overlap"}
    assert all(isinstance(value, float) for value in terms.values())
    assert terms["loss"] == pytest.approx(sum(terms.values()) - terms["loss"], abs=1e-5)
    after = engine.network.state_dict()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert engine.network.training


def test_step_without_labels_needs_none() -> None:
    batch = make_batch()
    del batch["label"]
    assert set(TrainStep()(make_engine(RegistrationLoss()), batch)) == {"loss", "similarity", "smoothness"}


def test_steps_lower_the_loss_on_one_pair() -> None:
    engine, batch = make_engine(RegistrationLoss(smoothness=0.1)), make_batch()
    losses = [TrainStep()(engine, batch)["loss"] for _ in range(10)]
    assert losses[-1] < losses[0] - 0.01


def test_passes_are_drawn_by_iteration_and_the_same_each_time() -> None:
    def asked(passes: tuple[int, ...]) -> list[int]:
        engine = make_engine(RegistrationLoss())
        for iteration in range(1, 9):
            engine.state.iteration = iteration
            TrainStep(passes=passes)(engine, make_batch(8))
        found: list[int] = engine.network.asked
        return found

    assert asked((1,)) == [1] * 8
    assert set(asked((1, 3))) == {1, 3}
    assert asked((1, 3)) == asked((1, 3))


# --- validation and checkpoints


def test_validation_gets_images_and_labels() -> None:
    batch = make_batch()
    image, label = prepare_pairs(batch, torch.device("cpu"), non_blocking=True, extra=1)
    assert torch.equal(image, batch["image"])
    assert torch.equal(label, batch["label"])


def test_warped_and_fixed_labels_become_one_channel_a_label() -> None:
    moving = torch.zeros(6, 6, 6, dtype=torch.int32)
    moving[2, 3, 3], moving[4, 1, 1] = 1, 5
    fixed = moving.roll(-1, 0)
    pred = torch.zeros(3, 6, 6, 6)
    pred[0] = 1.0
    found = WarpLabels([5, 1])({"pred": pred, "label": torch.stack((moving, fixed)), "image": "kept"})
    assert found["image"] == "kept"
    assert found["pred"].shape == found["label"].shape == (2, 6, 6, 6)
    assert torch.equal(found["label"], torch.stack((fixed == 5, fixed == 1)).float())
    assert torch.equal(found["pred"], found["label"])


def test_latest_checkpoint_is_the_one_with_the_most_epochs(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert latest_checkpoint(tmp_path) is None
    for name in ("best.pt", "checkpoint_epoch=9.pt", "checkpoint_epoch=10.pt", "checkpoint_epoch=11.txt"):
        torch.save({"trainer": {}}, tmp_path / name)
    assert latest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint_epoch=10.pt")
    newest = (tmp_path / "checkpoint_epoch=10.pt").read_bytes()
    (tmp_path / "checkpoint_epoch=12.pt").write_bytes(newest[: len(newest) // 2])  # cut off while it was written
    assert latest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint_epoch=10.pt")
