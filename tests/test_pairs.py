"""Scans on the network's grid, and which pairs are drawn of them."""

from pathlib import Path
from typing import Any

import monai.data
import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.transforms import Compose, RandAdjustContrastd, RandAffined
from torch import Tensor

from iregzoo.datasets import find_scans
from iregzoo.errors import InputError
from iregzoo.pairs import CyclicPairs, LoadScan, RandomPairs, join_pair
from layouts import write_dirlab

SHAPE = (6, 5, 4)


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


# --- intensity windows, what stands in the middle, landmarks and groups


def test_window_gives_intensities_between_its_ends(tmp_path: Path) -> None:
    ct = np.linspace(-2000, 1000, 8 * 8 * 8).reshape(8, 8, 8).astype(np.float32)
    path = write(tmp_path / "i.nii", ct)
    found = LoadScan((1.0, 1.0, 1.0), (8, 8, 8), window=[-1000, -200])({"image": path})["image"][0]
    expected = np.clip((ct[::-1, ::-1] + 1000) / 800, 0, 1)  # ITK's axes of this affine run left and posterior
    np.testing.assert_allclose(np.sort(found, axis=None), np.sort(expected, axis=None), atol=1e-6)
    assert LoadScan((1.0, 1.0, 1.0), (10, 8, 8), window=[-1000, -200])({"image": path})["image"][0, 0].max() == 0


def test_labels_stand_in_the_middle_where_asked(tmp_path: Path) -> None:
    image, labels = ramp((30, 20, 20)), np.zeros((30, 20, 20), np.int16)
    labels[20:26, 2:6, 15:18] = 4
    data = {"image": write(tmp_path / "i.nii", image), "label": write(tmp_path / "l.nii", labels)}
    beside = LoadScan((1.0, 1.0, 1.0), (8, 8, 8))(data)
    assert not beside["label"].any()
    found = LoadScan((1.0, 1.0, 1.0), (8, 8, 8), center="labels")(data)
    expected = torch.zeros(8, 8, 8, dtype=torch.int32)
    expected[1:7, 2:6, 2:5] = 4  # three voxels in eight: two before and three after
    assert torch.equal(found["label"][0], expected)
    expected = torch.arange(19.0, 27.0) / 29  # a ramp over the scan's 30 voxels
    torch.testing.assert_close(found["image"][0, :, 4, 2], expected, atol=0.02, rtol=0)


def test_middle_without_labels_is_refused(tmp_path: Path) -> None:
    image = write(tmp_path / "i.nii", ramp((8, 8, 8)))
    load = LoadScan((1.0, 1.0, 1.0), (8, 8, 8), center="labels")
    with pytest.raises(InputError, match=r"i\.nii: has no labels to center on; set center to scan"):
        load({"image": image})
    with pytest.raises(InputError, match="has no labels to center on"):
        load({"image": image, "label": write(tmp_path / "l.nii", np.zeros((8, 8, 8), np.int16))})
    with pytest.raises(InputError, match="center 'brain' is unknown; choose scan or labels"):
        LoadScan((1.0, 1.0, 1.0), (8, 8, 8), center="brain")


def test_settings_of_a_grid_that_are_none_are_refused() -> None:
    with pytest.raises(InputError, match="spacing 1: give a list of 3 numbers above 0"):
        LoadScan(1, (8, 8, 8))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="intensity_window 5: give a list of 2 numbers"):
        LoadScan((1.0, 1.0, 1.0), (8, 8, 8), window=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("center", ["scan", "labels"])
def test_landmarks_are_voxels_of_the_networks_grid(tmp_path: Path, center: str) -> None:
    """A bright voxel that a landmark marks is where the landmark is on the network's grid."""
    affine = np.array([[-0.96, 0.28, 0, 40], [-0.28, -0.96, 0, 12], [0, 0, 1, -30], [0, 0, 0, 1.0]])
    places = np.array([(14, 9, 7), (10, 12, 11)])
    labels = np.zeros((24, 20, 18), np.int16)
    labels[6:20, 5:16, 3:15] = 1
    for name, index in zip("ab", places, strict=True):
        image = np.zeros(labels.shape, np.float32)
        image[tuple(index)] = 1
        nib.save(nib.Nifti1Image(image, affine), tmp_path / f"{name}.nii")
    nib.save(nib.Nifti1Image(labels, affine), tmp_path / "l.nii")
    world = places @ affine[:3, :3].T + affine[:3, 3]
    rows = "\n".join(",".join(f"{value:.9g}" for value in place) for place in world)
    (tmp_path / "p.csv").write_text(f"# CoordinateSystem = RAS\nx,y,z\n{rows}\n")
    load = LoadScan((1.0, 1.0, 1.0), (16, 16, 16), window=(0, 1), center=center)
    for row, name in enumerate("ab"):
        data = {key: str(tmp_path / path) for key, path in (("image", f"{name}.nii"), ("label", "l.nii"))}
        sample = load({**data, "points": str(tmp_path / "p.csv")})
        assert sample["points"].shape == (2, 3)
        assert sample["points"].dtype == torch.float32
        brightest = np.unravel_index(int(sample["image"][0].argmax()), (16, 16, 16))
        np.testing.assert_allclose(sample["points"][row], brightest, atol=1e-3)


def test_dirlab_voxels_become_voxels_of_the_networks_grid(tmp_path: Path) -> None:
    """Analytic: 1-based indices, to mm by the published spacing, to a grid that runs right, anterior, superior."""
    places = np.array([(0, 0, 0), (128, 100, 50), (200, 30, 90)])
    write_dirlab(tmp_path, 1, {"T00": places, "T50": places + 1})
    case = tmp_path / "Case1Pack"
    data = {"image": f"{case}/Images/case1_T00_s.img", "points": f"{case}/ExtremePhases/Case1_300_T00_xyz.txt"}
    shape, step = np.array([16, 16, 16]), 10.0
    sample = LoadScan([step] * 3, shape.tolist(), window=[-1000, -200])({**data, "group": "1"})
    spacing, size = np.array([0.97, 0.97, 2.5]), np.array([256, 256, 94])
    covered = np.maximum(np.ceil(size * spacing / step), shape)
    # Left and posterior become right and anterior: voxel 0 of the grid is the last of the file.
    turned = np.where([True, True, False], size - 1 - places, places)
    # The grid begins half a voxel of its own inside the scan's face, is padded before, then cut to the middle.
    pad = (covered - np.ceil(size * spacing / step)) // 2
    start = covered // 2 - shape // 2
    expected = ((turned + 0.5) * spacing - step / 2) / step + pad - start
    np.testing.assert_allclose(sample["points"], expected, atol=1e-4)
    assert sample["group"] == "1"
    assert sample["image"].shape == (1, 16, 16, 16)
    assert 0 <= float(sample["image"].min()) < float(sample["image"].max()) <= 1


def grouped() -> list[dict[str, Any]]:
    """Two patients, of three and two scans, whose landmarks tell the scan."""
    scans: list[dict[str, Any]] = list(samples(5))
    for number, (scan, group) in enumerate(zip(scans, "ababa", strict=True)):
        scan["group"] = group
        scan["points"] = torch.full((4, 3), float(number))
    return scans


def test_groups_pair_within_and_their_first_scan_is_fixed() -> None:
    pairs = RandomPairs(grouped(), 200)
    drawn = [pairs[i] for i in range(200)]
    assert {who(pair) for pair in drawn} == {(2, 0), (4, 0), (3, 1)}
    assert [who(pair) for pair in CyclicPairs(grouped())] == [(2, 0), (4, 0), (3, 1)]
    assert len(CyclicPairs(grouped())) == 3
    for pair in drawn:
        assert list(pair) == ["image", "label", "points"]
        assert pair["points"].shape == (2, 4, 3)
        assert tuple(pair["points"][:, 0, 0].int().tolist()) == who(pair)


def test_groups_of_a_monai_data_set_are_seen_without_reading_its_scans() -> None:
    read: list[int] = []

    def load(scan: dict[str, Any]) -> dict[str, Any]:
        read.append(int(scan["image"][0, 0, 0, 0]))
        return scan

    pairs = RandomPairs(monai.data.Dataset(grouped(), load), 10)
    assert read == []
    assert who(pairs[0]) in {(2, 0), (4, 0), (3, 1)}


def test_mirror_takes_landmarks_along() -> None:
    scans = grouped()
    for scan in scans:
        scan["points"] = torch.tensor([[1.0, 2.0, 3.0], [0.5, 4.0, 1.0]])
    plain, mirrored = RandomPairs(scans, 1)[0], RandomPairs(scans, 1, mirror=1.0)[0]
    expected = torch.tensor([[SHAPE[0] - 2.0, 2.0, 3.0], [SHAPE[0] - 1.5, 4.0, 1.0]])
    assert torch.equal(mirrored["points"], expected.expand(2, 2, 3))
    x, y, z = expected[0].int().tolist()
    assert torch.equal(mirrored["image"][:, x, y, z], plain["image"][:, 1, 2, 3])
    assert torch.equal(plain["points"][0], scans[0]["points"])


def test_augmentation_of_scans_with_landmarks_is_refused() -> None:
    pairs = RandomPairs(grouped(), 1, augmentation=lambda scan: scan)
    with pytest.raises(InputError, match="augmentation: would move the scans away from their landmarks"):
        pairs[0]


def test_landmarks_that_do_not_correspond_are_refused() -> None:
    first, second = grouped()[:2]
    second["points"] = second["points"][:3]
    with pytest.raises(InputError, match="have 4 and 3 landmarks"):
        join_pair(first, second)
    del second["points"]
    assert list(join_pair(first, second)) == ["image", "label"]
