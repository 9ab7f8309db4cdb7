"""Templates: built from phantoms with known deformations, and the one that comes with the package."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from scipy.ndimage import gaussian_filter, label
from torch import Tensor

from geometry import make_grid
from iregzoo.datasets import Entry
from iregzoo.errors import InputError
from iregzoo.fields import invert, warp
from iregzoo.similarity import ncc
from iregzoo.space.files import write_image
from iregzoo.space.scan import read_labels, read_scan
from iregzoo.template import Group, Template, build_template, default, read_group, write_template
from iregzoo.zoo import Method, load

ROOT = Path(__file__).parents[1]
REACH, SMOOTHNESS = 2.5, 7.0  # voxels


@pytest.fixture(scope="module")
def method() -> Method:
    return load("pan", "hippocampus")


@pytest.fixture(scope="module")
def phantom() -> tuple[Tensor, Tensor]:
    """Image and labels, (1, 1, *shape), of which groups are made."""
    atlas = default("hippocampus")
    image = read_scan(atlas.image)
    return image.data, read_labels(atlas.labels, image).data


def random_fields(count: int, shape: Sequence[int], seed: int = 0) -> Tensor:
    """Smooth random displacements (count, 3, *shape) in voxels whose mean is zero."""
    noise = torch.randn(count, 3, *shape, generator=torch.manual_seed(seed)).numpy()
    smooth = torch.from_numpy(gaussian_filter(noise, (0, 0, SMOOTHNESS, SMOOTHNESS, SMOOTHNESS), mode="nearest"))
    smooth = smooth - smooth.mean(0, keepdim=True)
    return smooth * (REACH / float(smooth.norm(dim=1).mean()))


def write_scan(folder: Path, name: str, image: Tensor, labels: Tensor) -> Entry:
    shape = (image.shape[2], image.shape[3], image.shape[4])
    # Axes that run right, anterior, superior; where a scan lies in the scanner is not to matter.
    grid = make_grid(shape, signs=(-1, -1, 1), centre=(3.0 * len(name), -7.0, 11.0))
    paths = {"image": folder / f"{name}.nii.gz", "label": folder / f"{name}_labels.nii.gz"}
    write_image(paths["image"], image, grid)
    write_image(paths["label"], labels, grid)
    return {kind: str(path) for kind, path in paths.items()}


def make_scans(
    folder: Path, phantom: tuple[Tensor, Tensor], shift: Sequence[int] = (0, 0, 0), count: int = 6
) -> list[Entry]:
    """Scans of a phantom, so deformed that the fields that lead from the phantom to them have mean zero."""
    image, labels = (volume.roll(tuple(shift), (2, 3, 4)) for volume in phantom)
    back = invert(random_fields(count, image.shape[2:]))
    return [
        write_scan(
            folder,
            f"scan_{index}",
            warp(image, back[index : index + 1], padding="border"),
            warp(labels, back[index : index + 1], mode="nearest"),
        )
        for index in range(len(back))
    ]


def centre(labels: Tensor) -> Tensor:
    return (labels[0, 0] > 0).nonzero().double().mean(0)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, phantom: tuple[Tensor, Tensor], method: Method) -> list[Template]:
    """Templates of the deformed phantoms after 0, 1 and 2 rounds, cropped to their field of view."""
    return build(make_scans(tmp_path_factory.mktemp("group"), phantom), method)


def build(scans: Sequence[Entry], method: Method, rounds: int = 2) -> list[Template]:
    group = read_group(scans, method)
    return [
        Template(*(volume[group.view] for volume in (template.image, template.labels)), template.fields)
        for template in build_template(group, method, rounds=rounds)
    ]


# --- building


def test_template_is_nearer_to_the_phantom_than_the_plain_mean(
    built: list[Template], phantom: tuple[Tensor, Tensor]
) -> None:
    image, labels = phantom
    inside = (..., slice(4, -4), slice(4, -4), slice(4, -4))  # the deformed phantoms lack what lay beyond its faces
    left = [1 - float(ncc(template.image[inside], image[inside])) for template in built]
    assert left[1] < 0.5 * left[0]
    assert left[2] < 0.5 * left[0]
    wrong = [float((template.labels != labels).sum()) for template in built]
    assert wrong[2] < 0.7 * wrong[0]


def test_template_stands_where_its_displacements_have_no_mean(built: list[Template]) -> None:
    assert built[0].fields is None
    for template in built[1:]:
        assert template.fields is not None
        inside = template.fields[:, :, 8:-8, 8:-8, 8:-8]
        assert float(inside.norm(dim=1).mean()) > 0.5
        assert float(inside.mean(0).abs().max()) < 0.01


def test_template_stands_at_the_mean_place(built: list[Template], phantom: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(centre(built[2].labels), centre(phantom[1]), atol=0.35, rtol=0)


def test_template_follows_a_shift_of_all_scans(
    tmp_path: Path, built: list[Template], phantom: tuple[Tensor, Tensor], method: Method
) -> None:
    shift = (2, -3, 1)
    moved = build(make_scans(tmp_path, phantom, shift), method, rounds=1)[1]
    found = centre(moved.labels) - centre(built[1].labels)
    torch.testing.assert_close(found, torch.tensor(shift).double(), atol=0.35, rtol=0)


def test_batch_gives_what_single_scans_give(tmp_path: Path, phantom: tuple[Tensor, Tensor], method: Method) -> None:
    group = read_group(make_scans(tmp_path, phantom, count=2), method)
    *_, alone = build_template(group, method, rounds=1, batch=1)
    *_, together = build_template(group, method, rounds=1, batch=2)
    torch.testing.assert_close(alone.image, together.image, atol=1e-3, rtol=0)


def blocks(folder: Path, method: Method, *widths: int) -> Group:
    """Scans with a block of label 3 of these widths, whose last voxel along another axis has label 5."""
    entries = []
    for index, width in enumerate(widths):
        image = torch.rand(1, 1, 20, 24, 20, generator=torch.manual_seed(index))
        labels = torch.zeros(1, 1, 20, 24, 20, dtype=torch.int32)
        labels[..., 4 : 4 + width, 8:14, 6:12] = 3
        labels[..., 4 : 4 + width, 13, 6:12] = 5
        entries.append(write_scan(folder, f"block_{index}", image, labels))
    return read_group(entries, method)


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        ((6, 6, 6), 6),
        ((4, 6, 6), 6),
        ((4, 6, 6, 8, 11), 8),  # 7 on average, and what ties comes in together
        ((4, 4, 4, 10), 4),  # one of four is no reason
    ],
)
def test_labels_are_what_most_scans_have(
    tmp_path: Path, method: Method, widths: tuple[int, ...], expected: int
) -> None:
    group = blocks(tmp_path, method, *widths)
    (template,) = build_template(group, method, rounds=0)
    labels = template.labels[group.view]
    assert group.values == (0, 3, 5)
    assert int((labels > 0).sum()) == expected * 36
    assert int((labels == 5).sum()) == expected * 6
    assert bool((labels[..., 4 : 4 + expected, 13, 6:12] == 5).all())


def test_mean_counts_only_scans_that_show_a_voxel(tmp_path: Path, method: Method) -> None:
    labels = torch.zeros(1, 1, 24, 24, 24, dtype=torch.int32)
    labels[..., 10:14, 10:14, 10:14] = 1
    image = torch.linspace(0, 1, 24).view(1, 1, 24, 1, 1).expand(1, 1, 24, 24, 24).contiguous()
    whole = write_scan(tmp_path, "whole", image, labels)
    other = write_scan(tmp_path, "other", image, labels)
    part = write_scan(tmp_path, "part", image[..., 4:20], labels[..., 4:20])
    group = read_group([whole, other, part], method)
    (template,) = build_template(group, method, rounds=0)
    mean = template.image[group.view]
    assert mean.shape[2:] == (24, 24, 24)
    torch.testing.assert_close(mean[..., 0], mean[..., 12], atol=1e-6, rtol=0)
    assert float(template.image.sum()) == pytest.approx(float(mean.sum()))


# --- what is refused


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_scans_are_refused(
    tmp_path: Path, phantom: tuple[Tensor, Tensor], method: Method, count: int
) -> None:
    with pytest.raises(InputError, match=f"a group of {count} .*at least two scans"):
        read_group([write_scan(tmp_path, "a", *phantom)] * count, method)


def test_scan_without_labels_is_refused(tmp_path: Path, phantom: tuple[Tensor, Tensor], method: Method) -> None:
    scans = [write_scan(tmp_path, name, *phantom) for name in ("a", "b")]
    del scans[1]["label"]
    with pytest.raises(InputError, match=r"b.nii.gz: has no label map"):
        read_group(scans, method)


def test_another_set_of_labels_is_refused(tmp_path: Path, phantom: tuple[Tensor, Tensor], method: Method) -> None:
    image, labels = phantom
    scans = [
        write_scan(tmp_path, "both", image, labels),
        write_scan(tmp_path, "one", image, labels.clamp(max=1)),
    ]
    with pytest.raises(InputError, match=r"one_labels.nii.gz: has the labels \[0, 1\], but .* has \[0, 1, 2\]"):
        read_group(scans, method)


def test_empty_label_maps_are_refused(tmp_path: Path, phantom: tuple[Tensor, Tensor], method: Method) -> None:
    image, labels = phantom
    scans = [write_scan(tmp_path, name, image, torch.zeros_like(labels)) for name in ("a", "b")]
    with pytest.raises(InputError, match=r"a_labels.nii.gz: is empty"):
        read_group(scans, method)


@pytest.mark.parametrize("numbers", [{"rounds": -1}, {"rounds": 1, "batch": 0}])
def test_impossible_numbers_are_refused(tmp_path: Path, method: Method, numbers: dict[str, int]) -> None:
    group = blocks(tmp_path, method, 4, 4)
    with pytest.raises(InputError, match=r"rounds -1, batch 2|rounds 1, batch 0"):
        next(build_template(group, method, **numbers))


def test_labels_without_names_are_refused(tmp_path: Path, method: Method) -> None:
    group = blocks(tmp_path, method, 4, 4)
    (template,) = build_template(group, method, rounds=0)
    with pytest.raises(InputError, match=r"labels \[5\] have no names"):
        write_template(tmp_path / "out", template, group, {3: "block"})
    assert not (tmp_path / "out").exists()


# --- files


def test_written_template_is_found(tmp_path: Path, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    group = blocks(tmp_path, method, 4, 6, 6)
    (template,) = build_template(group, method, rounds=0)
    write_template(tmp_path / "templates" / "block", template, group, {3: "block", 5: "edge"})
    monkeypatch.setenv("IREGZOO_HOME", str(tmp_path))
    atlas = default("block")
    assert atlas.names == {3: "block", 5: "edge"}
    image = read_scan(atlas.image)
    assert image.grid.matches(make_grid((20, 24, 20), signs=(-1, -1, 1)))
    torch.testing.assert_close(image.data, template.image[group.view])
    assert torch.equal(read_labels(atlas.labels, image).data, template.labels[group.view])


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
        text=True,
    )
    assert Path(found.stdout.strip()) == tmp_path / "iregzoo" / "templates" / "hippocampus" / "template.nii.gz"
