"""Groupwise registration of phantoms with known deformations."""

import csv
import json
import math
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from cohort import write_bundle, write_scans
from geometry import make_grid, noise_image
from iregzoo import groupwise
from iregzoo.errors import InputError
from iregzoo.fields import invert, warp
from iregzoo.group import Group, Member, labels_in, read_group, read_members
from iregzoo.groupwise import Template, agreement, build_template, template_labels, usual_ncc, write_ways
from iregzoo.similarity import ncc
from iregzoo.space.files import write_image
from iregzoo.space.frame import Frame
from iregzoo.space.scan import read_labels, read_scan
from iregzoo.template import default, read_atlas
from iregzoo.zoo import Method, load
from shell import run

REACH, SMOOTHNESS = 2.5, 7.0  # voxels
COUNT = 5
Built = tuple[Group, list[tuple[Template, Tensor]]]  # the template and its labels after each round


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


def write_member(folder: Path, name: str, image: Tensor, labels: Tensor) -> Member:
    shape = (image.shape[2], image.shape[3], image.shape[4])
    # Axes that run right, anterior, superior; where a scan lies in the scanner is not to matter.
    grid = make_grid(shape, signs=(-1, -1, 1), centre=(3.0 * len(name), -7.0, 11.0))
    write_image(folder / f"{name}.nii.gz", image, grid)
    write_image(folder / f"{name}_labels.nii.gz", labels, grid)
    return Member(name, str(folder / f"{name}.nii.gz"), str(folder / f"{name}_labels.nii.gz"))


def write_members(
    folder: Path, phantom: tuple[Tensor, Tensor], shift: Sequence[int] = (0, 0, 0), count: int = COUNT
) -> list[Member]:
    """Scans of a phantom, so deformed that the fields that lead from the phantom to them have mean zero."""
    image, labels = (volume.roll(tuple(shift), (2, 3, 4)) for volume in phantom)
    back = invert(random_fields(count, image.shape[2:]))
    return [
        write_member(
            folder,
            f"scan_{index}",
            warp(image, back[index : index + 1], padding="border"),
            warp(labels, back[index : index + 1], mode="nearest"),
        )
        for index in range(len(back))
    ]


def centre(labels: Tensor) -> Tensor:
    return (labels[0, 0] > 0).nonzero().double().mean(0)


def fields_of(template: Template) -> Tensor:
    return torch.cat([torch.from_numpy(np.load(field)) for field in template.fields])


def build(members: Sequence[Member], method: Method, folder: Path, rounds: int) -> Built:
    """A group, and its template with labels after each round."""
    group, labels = read_group(members, method.card), labels_in(members)
    folder.mkdir()
    built = build_template(group, method, folder, rounds=rounds)
    return group, [(template, template_labels(group, template, labels)) for template in built]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, phantom: tuple[Tensor, Tensor], method: Method) -> Built:
    """The deformed phantoms, and their templates after 0, 1 and 2 rounds; the fields are of the last."""
    folder = tmp_path_factory.mktemp("group")
    return build(write_members(folder, phantom), method, folder / "fields", 2)


# --- building


def test_template_is_nearer_to_the_phantom_than_the_plain_mean(built: Built, phantom: tuple[Tensor, Tensor]) -> None:
    group, rounds = built
    image, labels = phantom
    assert group.grid.shape == image.shape[2:]
    inside = (..., slice(4, -4), slice(4, -4), slice(4, -4))  # the deformed phantoms lack what lay beyond its faces
    left = [1 - float(ncc(template.image[inside], image[inside])) for template, _ in rounds]
    assert left[1] < 0.5 * left[0]
    assert left[2] < 0.5 * left[0]
    wrong = [float((voted != labels).sum()) for _, voted in rounds]
    assert wrong[2] < 0.7 * wrong[0]


def test_template_stands_where_its_displacements_have_no_mean(
    built: Built,
) -> None:
    _, rounds = built
    assert not rounds[0][0].fields
    inside = fields_of(rounds[2][0])[:, :, 8:-8, 8:-8, 8:-8]
    assert float(inside.norm(dim=1).mean()) > 0.5
    assert float(inside.mean(0).abs().max()) < 0.01


def test_template_stands_at_the_mean_place(built: Built, phantom: tuple[Tensor, Tensor]) -> None:
    group, rounds = built
    torch.testing.assert_close(centre(rounds[2][1]), centre(phantom[1]), atol=0.35, rtol=0)
    assert np.allclose(group.grid.centre, 0)


def test_template_follows_a_shift_of_all_scans(
    tmp_path: Path,
    built: Built,
    phantom: tuple[Tensor, Tensor],
    method: Method,
) -> None:
    shift = (2, -3, 1)
    _, moved = build(write_members(tmp_path, phantom, shift), method, tmp_path / "fields", 1)
    found = centre(moved[1][1]) - centre(built[1][1][1])
    torch.testing.assert_close(found, torch.tensor(shift).double(), atol=0.35, rtol=0)


def test_order_of_the_scans_does_not_matter(tmp_path: Path, phantom: tuple[Tensor, Tensor], method: Method) -> None:
    members = write_members(tmp_path, phantom, count=3)
    _, one = build(members, method, tmp_path / "one", 1)
    _, other = build(members[::-1], method, tmp_path / "other", 1)
    torch.testing.assert_close(one[1][0].image, other[1][0].image, atol=2e-3, rtol=0)


def test_agreement_tells_what_a_round_gains(tmp_path: Path, built: Built) -> None:
    group, rounds = built
    before = agreement(group, *rounds[0])
    after = agreement(group, *rounds[2])
    assert [row["name"] for row in after] == [member.name for member in group.members]
    assert list(before[0]) == ["name", "image", "ncc", "dice"]
    for row, former in zip(after, before, strict=True):
        assert row["ncc"] > former["ncc"] + 0.02
        assert row["dice"] > former["dice"] + 0.01
        assert 0.5 < row["displacement_mean_mm"] < 5
        assert 0 <= row["folding_percent"] < 1
    assert "dice" not in agreement(group, rounds[2][0])[0]


def test_written_transforms_give_what_was_averaged(tmp_path: Path, built: Built) -> None:
    group, rounds = built
    template = rounds[2][0]
    write_ways(group, template, tmp_path / "ways")
    total = np.zeros(group.grid.shape)
    seen = np.zeros(group.grid.shape)
    reference = group.grid.to_sitk(np.zeros(group.grid.shape, np.float32))
    for member in group.members:
        transform = sitk.ReadTransform(str(tmp_path / "ways" / f"{member.name}.h5"))
        scan = member.scan()
        low, high = scan.limits
        image = scan.grid.to_sitk(((scan.data - low) / (high - low)).clamp(0, 1)[0, 0].numpy())
        shown = scan.grid.to_sitk(np.ones(scan.grid.shape, np.float32))
        for volume, sums in ((image, total), (shown, seen)):
            moved = sitk.Resample(volume, reference, transform, sitk.sitkLinear, 0.0)
            sums += sitk.GetArrayFromImage(moved).transpose(2, 1, 0)
    expected = torch.from_numpy(np.where(seen > 0, total / np.maximum(seen, 1), 0)).float()[None, None]
    apart = (template.image - expected).abs() > 1e-4
    assert int(apart.sum()) <= 6  # within a ten-thousandth of a voxel from the border of what a scan shows


def test_mean_of_deformations_is_undone_exactly(tmp_path: Path) -> None:
    """Of fields u_i around one large common field, what is left leads from the common place to the same places."""
    grid = make_grid((24, 26, 22), (1.5, 1.0, 2.0), degrees=(10, -20, 5))
    frame = Frame(grid, grid, grid, np.eye(4))
    common = random_fields(2, grid.shape, seed=3)[:1]
    parts = random_fields(2, grid.shape, seed=4) * 0.4
    given = [frame.deform(common + part).float() for part in parts.split(1)]
    for number, field in enumerate(given):
        np.save(tmp_path / f"{number}.raw.npy", field.numpy())
    groupwise._centre(tmp_path, 2, grid)
    left = [torch.from_numpy(np.load(tmp_path / f"{number}.npy")) for number in range(2)]
    mean = sum(frame.in_voxels(field) for field in given) / 2
    inside = (..., slice(6, -6), slice(6, -6), slice(6, -6))
    for before, after in zip(given, left, strict=True):
        # x → y = x + ū(x), and from y to where x was led.
        led = mean + warp(frame.in_voxels(after), mean, padding="border")
        torch.testing.assert_close(led[inside], frame.in_voxels(before)[inside], atol=0.05, rtol=0)


# --- labels


def blocks(folder: Path, method: Method, *widths: int) -> Group:
    """Scans with a block of label 3 of these widths, whose last voxel along another axis has label 5."""
    members = []
    for index, width in enumerate(widths):
        image = torch.rand(1, 1, 20, 24, 20, generator=torch.manual_seed(index))
        labels = torch.zeros(1, 1, 20, 24, 20, dtype=torch.int32)
        labels[..., 4 : 4 + width, 8:14, 6:12] = 3
        labels[..., 4 : 4 + width, 13, 6:12] = 5
        members.append(write_member(folder, f"block_{index}", image, labels))
    return read_group(members, method.card)


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
    tmp_path: Path, method: Method, widths: tuple[int, ...], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = blocks(tmp_path, method, *widths)
    (template,) = build_template(group, method, tmp_path, rounds=0)
    labels = template_labels(group, template, [3, 5])
    assert int((labels > 0).sum()) == expected * 36
    assert int((labels == 5).sum()) == expected * 6
    assert bool((labels[..., 4 : 4 + expected, 13, 6:12] == 5).all())
    monkeypatch.setattr(groupwise, "AT_ONCE", 1)
    assert torch.equal(template_labels(group, template, [3, 5]), labels)


def test_label_that_few_scans_have_is_left_out(tmp_path: Path, method: Method) -> None:
    group = blocks(tmp_path, method, 6, 6, 6, 6)
    path = Path(group.members[0].labels)
    odd = read_labels(path, group.members[0].scan())
    odd.data[..., 2:5, 2:5, 2:5] = 9
    write_image(path, odd.data, odd.grid)
    (template,) = build_template(group, method, tmp_path, rounds=0)
    labels = template_labels(group, template, [3, 5, 9])
    assert labels.unique().tolist() == [0, 3, 5]


@pytest.mark.parametrize("rounds", [-1, 1.5, 101])
def test_impossible_rounds_are_refused(tmp_path: Path, method: Method, rounds: int) -> None:
    group = blocks(tmp_path, method, 4, 4)
    with pytest.raises(InputError, match=f"rounds {rounds}"):
        next(build_template(group, method, tmp_path, rounds=rounds))


# --- the command


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of small scans with labels, and a bundle ``tiny``."""
    write_bundle(tmp_path / "home")
    monkeypatch.setenv("IREGZOO_HOME", str(tmp_path / "home"))
    lines = [f"{name}.nii.gz,{name}_labels.nii.gz" for name in write_scans(tmp_path, 3)]
    (tmp_path / "scans.csv").write_text("\n".join(["image,labels", *lines]), encoding="utf-8")
    return tmp_path / "scans.csv"


def template(monkeypatch: pytest.MonkeyPatch, table: Path, *options: str) -> int:
    """The exit code of ``iregzoo template``, into ``out`` beside the table if it is not told."""
    output = () if "--output" in options else ("--output", str(table.parent / "out"))
    return run(monkeypatch, "template", "--scans", str(table), *output, "--bundle", "tiny", *options)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_command_writes_an_atlas(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (table.parent / "names.csv").write_text("label,name\n1,rim\n2,core\n9,none\n", encoding="utf-8")
    options = ("--rounds", "1", "--spacing", "1.5", "--transforms", "--label-names", str(table.parent / "names.csv"))
    assert template(monkeypatch, table, *options) == 0
    out = table.parent / "out"
    ways = {f"transforms/head{n}.h5" for n in range(3)}
    assert files(out) == {"template.nii.gz", "labels.nii.gz", "labels.json", "agreement.csv", "template.json"} | ways
    atlas = read_atlas(out)
    assert atlas.names == {1: "rim", 2: "core"}
    image = read_scan(atlas.image)
    assert np.allclose(image.grid.spacing, 1.5)
    assert read_labels(atlas.labels, image).data.unique().tolist() == [0, 1, 2]
    with (out / "agreement.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["name"] for row in rows] == ["head0", "head1", "head2"]
    report = json.loads((out / "template.json").read_text(encoding="utf-8"))
    assert (report["scans"], report["rounds"], report["bundle"]) == (3, 1, "tiny")
    said = capsys.readouterr().out
    worst = min(rows, key=lambda row: float(row["ncc"]))
    assert said.startswith(f"3 scans, NCC with the others {sum(float(row['ncc']) for row in rows) / 3:.3f} (lowest")
    assert worst["name"] in said.splitlines()[0]


def test_labels_and_agreement_of_a_part_are_those_of_the_whole(tmp_path: Path, method: Method) -> None:
    """Beyond a cropped scan's field of view it says nothing, and the others' mean is what it would be without it."""
    image = noise_image((24, 24, 24), seed=1)
    grid = make_grid((24, 24, 24), signs=(-1, -1, 1))
    members = []
    for name, faces in (("whole", 24), ("alike", 24), ("part", 14)):
        part = make_grid((24, 24, faces), signs=(-1, -1, 1), centre=(0.0, 0.0, (faces - 24) / 2))
        varied = image + (0.01 * noise_image((24, 24, 24), seed=2) if name == "alike" else 0)
        write_image(tmp_path / f"{name}.nii.gz", varied[..., :faces], part)
        members.append(Member(name, str(tmp_path / f"{name}.nii.gz")))
    group = read_group(members, method.card, init="none")
    assert group.grid.matches(grid)
    (template,) = build_template(group, method, tmp_path, rounds=0)
    assert min(row["ncc"] for row in agreement(group, template)) > 0.99


def test_scan_that_shares_no_voxel_has_no_agreement(tmp_path: Path, method: Method) -> None:
    grids = [make_grid((12, 12, 12), centre=(0.0, 0.0, float(place))) for place in (0, 11, 22)]
    members = []
    for number, grid in enumerate(grids):
        write_image(tmp_path / f"{number}.nii.gz", noise_image(grid.shape, number), grid)
        members.append(Member(str(number), str(tmp_path / f"{number}.nii.gz")))
    wide = Group(members, [np.eye(4)] * 3, make_grid((12, 12, 34), centre=(0.0, 0.0, 11.0)))
    (template,) = build_template(wide, method, tmp_path, rounds=0)
    found = [row["ncc"] for row in agreement(wide, template)]
    assert all(value == value for value in found)
    apart = Group(members[::2], [np.eye(4)] * 2, wide.grid)
    (template,) = build_template(apart, method, tmp_path, rounds=0)
    assert all(row["ncc"] != row["ncc"] for row in agreement(apart, template))


def test_scan_comes_to_the_template_by_its_transform(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert template(monkeypatch, table, "--rounds", "1", "--transforms") == 0
    out = table.parent / "out"
    arguments = ("--reference", str(out / "template.nii.gz"), "--transform", str(out / "transforms" / "head2.h5"))
    warped = table.parent / "warped.nii.gz"
    moving = ("--input", str(table.parent / "head2.nii.gz"), "--output", str(warped))
    assert run(monkeypatch, "apply", *moving, *arguments) == 0
    with (out / "agreement.csv").open(encoding="utf-8") as stream:
        expected = float(list(csv.DictReader(stream))[2]["ncc"])
    mean, scan = read_scan(out / "template.nii.gz").data, read_scan(warped).data
    low, high = read_scan(table.parent / "head2.nii.gz").limits
    own = ((scan - low) / (high - low)).clamp(0, 1)
    assert float(ncc(3 * mean - own, own)) == pytest.approx(expected, abs=2e-3)  # with the other two


def test_command_without_labels_writes_none(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table.write_text("image\nhead0.nii.gz\nhead1.nii.gz\n", encoding="utf-8")
    assert template(monkeypatch, table, "--rounds", "0") == 0
    assert files(table.parent / "out") == {"template.nii.gz", "agreement.csv", "template.json"}


def test_labels_without_names_are_numbered(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert template(monkeypatch, table, "--rounds", "0") == 0
    assert read_atlas(table.parent / "out").names == {1: "label 1", 2: "label 2"}


def test_earlier_template_is_replaced_when_told(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert template(monkeypatch, table, "--rounds", "0", "--transforms") == 0
    assert template(monkeypatch, table, "--rounds", "0") == 2
    assert (table.parent / "out" / "transforms" / "head0.h5").is_file()
    table.write_text("image\nhead0.nii.gz\nhead1.nii.gz\n", encoding="utf-8")
    assert template(monkeypatch, table, "--rounds", "0", "--overwrite") == 0
    left = files(table.parent / "out")
    assert left == {"template.nii.gz", "agreement.csv", "template.json"}


@pytest.mark.parametrize("name", ["template.nii.gz", "agreement.csv", "labels.json"])
def test_input_is_not_overwritten(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """The second command would take the first one's result for its scan, or its table."""
    out = table.parent / "out"
    out.mkdir()
    given, options = table, ()
    if name == "labels.json":
        (out / name).write_text('{"1": "rim", "2": "core"}', encoding="utf-8")
        options = ("--label-names", str(out / name))
    elif name == "template.nii.gz":
        (table.parent / "head0.nii.gz").rename(out / name)
        table.write_text("image\nout/template.nii.gz\nhead1.nii.gz\n", encoding="utf-8")
    else:
        given = out / name
        table.rename(given)
        given.write_text("image\n../head0.nii.gz\n../head1.nii.gz\n", encoding="utf-8")
    before = (out / name).read_bytes()
    assert template(monkeypatch, given, "--output", str(out), "--rounds", "0", "--overwrite", *options) == 2
    assert f"out/{name}: would be overwritten by the results" in capsys.readouterr().err
    assert (out / name).read_bytes() == before


def test_labels_in_no_place_alike_are_left_out(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = read_scan(table.parent / "head0.nii.gz").grid
    for number in range(3):
        spots = torch.zeros(1, 1, *grid.shape, dtype=torch.int32)
        spots[..., 4 + 4 * number, 10, 10] = 7
        write_image(table.parent / f"head{number}_labels.nii.gz", spots, grid)
    monkeypatch.setattr(groupwise, "WEAKEST", 0.5)
    assert template(monkeypatch, table, "--rounds", "0", "--init", "none") == 0
    assert "warning: labels that too few scans have in one place were left out: 7" in capsys.readouterr().out
    assert files(table.parent / "out") == {"template.nii.gz", "agreement.csv", "template.json"}


def test_header_in_doubt_is_told_of(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = nib.load(table.parent / "head1.nii.gz")
    assert isinstance(image, nib.Nifti1Image)
    own, moved = image.affine.copy(), image.affine.copy()
    moved[0, 3] += 20
    image.set_sform(own, 1)
    image.set_qform(moved, 1)
    nib.save(image, table.parent / "head1.nii.gz")
    table.write_text("image\nhead0.nii.gz\nhead1.nii.gz\n", encoding="utf-8")
    assert template(monkeypatch, table, "--rounds", "0") == 0
    assert "warning: head1: " in capsys.readouterr().out


class Counted:
    """A function of ``groupwise`` that counts its calls, and is interrupted at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, stop: int = 0) -> None:
        self.function, self.calls, self.stop = getattr(groupwise, name), 0, stop
        monkeypatch.setattr(groupwise, name, self)

    def __call__(self, *given: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        return self.function(*given, **options)


def content(folder: Path) -> dict[str, object]:
    """All below a folder, without the seconds of a template."""
    found: dict[str, object] = {name: (folder / name).read_bytes() for name in files(folder)}
    return {**found, "template.json": {**json.loads((folder / "template.json").read_text("utf-8")), "seconds": 0}}


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """With which an interrupted command ends."""
    found: list[int] = []
    monkeypatch.setattr("iregzoo.cli.os._exit", found.append)
    return found


def test_an_interrupted_template_goes_on_and_ends_as_if_undisturbed(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], codes: list[int]
) -> None:
    options = ("--rounds", "2", "--transforms")
    with monkeypatch.context() as patch:
        undisturbed = Counted(patch, "register")
        assert template(monkeypatch, table, *options, "--output", str(table.parent / "undisturbed")) == 0
    expected = content(table.parent / "undisturbed")
    assert undisturbed.calls == 6
    for name, stop, registered in (
        ("register", 3, 2),
        ("register", 5, 4),
        ("compose", 2, 3),  # between the two fields of a round
        ("mean_image", 2, 3),  # of the first round
        ("agreement", 1, 6),
    ):
        out = table.parent / f"{name}{stop}"
        with monkeypatch.context() as patch:
            Counted(patch, name, stop)
            template(monkeypatch, table, *options, "--output", str(out))
        assert codes.pop() == 2
        error = capsys.readouterr().err
        (kept,) = out.iterdir()
        assert f"interrupted: what is done stays in {kept}" in error
        assert len([name for name in files(kept) if re.search(r"\d(\.raw)?\.npy", name)]) <= 3  # of one round at a time
        with monkeypatch.context() as patch:
            rest = Counted(patch, "register")
            assert template(monkeypatch, table, *options, "--output", str(out)) == 0
        assert rest.calls == 6 - registered
        assert content(out) == expected


def test_interrupt_before_anything_is_done_leaves_nothing(
    table: Path, monkeypatch: pytest.MonkeyPatch, codes: list[int]
) -> None:
    before = files(table.parent)
    with monkeypatch.context() as patch:
        Counted(patch, "register", 1)
        template(monkeypatch, table, "--output", str(table.parent / "new" / "out"))
    assert codes == [2]
    assert files(table.parent) == before
    assert not (table.parent / "new").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--rounds", "1"),
        ("--rounds", "2", "--refine", "2"),
        ("--rounds", "2", "--init", "none"),
        ("--rounds", "2", "--spacing", "1.6"),
        ("--rounds", "2", "--precision", "bfloat16"),
        ("--rounds", "2", "order"),
        ("--rounds", "2", "scan"),
    ],
)
def test_only_the_same_template_goes_on(
    table: Path, monkeypatch: pytest.MonkeyPatch, codes: list[int], options: tuple[str, ...]
) -> None:
    """Another begins anew, and takes what was left with it."""
    with monkeypatch.context() as patch:
        Counted(patch, "register", 5)
        template(monkeypatch, table, "--rounds", "2")
    if "order" in options:
        head, *lines = table.read_text("utf-8").splitlines()
        table.write_text("\n".join([head, *reversed(lines)]), encoding="utf-8")
    if "scan" in options:
        path = table.parent / "head1.nii.gz"
        image = read_scan(path)
        write_image(path, image.data.flip(-1), image.grid)
    options = tuple(option for option in options if option not in ("order", "scan"))
    for out in ("out", "other"):
        with monkeypatch.context() as patch:
            calls = Counted(patch, "register")
            assert template(monkeypatch, table, *options, "--output", str(table.parent / out)) == 0
            assert calls.calls == 3 * int(options[1])
    assert content(table.parent / "out") == content(table.parent / "other")


def test_a_build_that_does_not_resume_begins_anew(table: Path, method: Method, tmp_path: Path) -> None:
    members = read_members(table)
    folder = tmp_path / "fields"
    list(build_template(read_group(members, method.card), method, folder, rounds=2))
    group = read_group(members[:2], method.card)
    next(build_template(group, method, folder, rounds=2))  # and no further
    *_, last = build_template(group, method, folder, rounds=2, resume=True)
    *_, expected = build_template(group, method, tmp_path / "expected", rounds=2)
    assert torch.equal(last.image, expected.image)
    assert torch.equal(fields_of(last), fields_of(expected))


def test_work_that_is_damaged_is_refused_in_one_line(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], codes: list[int]
) -> None:
    with monkeypatch.context() as patch:
        Counted(patch, "compose", 1)
        template(monkeypatch, table, "--rounds", "1")
    path = next((table.parent / "out").rglob("0.raw.npy"))
    whole, other = path.read_bytes(), BytesIO()
    np.save(other, np.zeros((1, 3, 4, 4, 4), np.float32))
    for damage in (b"", b"\x93NUMPY", b"pickle?", whole[:-9], other.getvalue()):
        path.write_bytes(damage)
        capsys.readouterr()
        assert template(monkeypatch, table, "--rounds", "1") == 2
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert re.search(r"^iregzoo: .*0\.raw\.npy: is damaged; remove the folder that it is in", line)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rounds", "-1"), "rounds -1"),
        (("--rounds", "101"), "rounds 101"),
        (("--spacing", "1,2"), "spacing 1,2: give one number in mm, or three separated by commas"),
        (("--spacing", "fine"), "spacing fine: give one number"),
        (("--spacing", "0"), "spacing 0.0, 0.0, 0.0: give millimetres above 0"),
        (("--init", "nearly"), "init 'nearly' is unknown"),
        (("--label-names", "names.json"), "names.json: cannot be read"),
        (("--refine", "-3"), "refine -3"),
    ],
)
def test_command_refuses_in_one_line(
    table: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    assert template(monkeypatch, table, *options) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert not (table.parent / "out").exists()


def test_names_of_labels_that_no_scan_has_are_refused(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table.write_text("image\nhead0.nii.gz\nhead1.nii.gz\n", encoding="utf-8")
    (table.parent / "names.csv").write_text("label,name\n1,rim\n", encoding="utf-8")
    assert template(monkeypatch, table, "--label-names", str(table.parent / "names.csv")) == 2
    assert "has no labels to name; add a column labels, or leave it out" in capsys.readouterr().err


def test_labels_without_names_are_refused_where_others_have_them(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (table.parent / "names.csv").write_text("label,name\n1,rim\n2,\n", encoding="utf-8")
    assert template(monkeypatch, table, "--label-names", str(table.parent / "names.csv")) == 2
    assert "labels [2] have no names; name every label that the scans have" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("share", "words"),
    [(1.0, "noise is not like the other scans"), (0.7, "noise is far less like the other scans"), (0.0, "")],
)
def test_scan_unlike_the_others_is_told_of(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], share: float, words: str
) -> None:
    head = read_scan(table.parent / "head1.nii.gz")
    noise = torch.rand(1, 1, *head.grid.shape, generator=torch.manual_seed(0))
    mixed = share * noise + (1 - share) * head.data / head.data.max()
    write_image(table.parent / "noise.nii.gz", mixed, head.grid)
    table.write_text("image\nhead0.nii.gz\nhead1.nii.gz\nhead2.nii.gz\nnoise.nii.gz\n", encoding="utf-8")
    assert template(monkeypatch, table, "--rounds", "0") == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == bool(words)
    assert all(words in warning for warning in warnings)


def test_usual_agreement_does_not_know_of_what_is_far_off() -> None:
    def usual(*values: float) -> tuple[float, float]:
        return usual_ncc([{"ncc": value} for value in values])

    assert usual(0.92, 0.91, 0.93, 0.92, 0.92, 0.35, math.nan) == pytest.approx((0.92, 0.82))  # hardly any spread
    assert usual(0.7, 0.6, 0.8, 0.5, 0.9) == pytest.approx((0.7, 0.7 - 5 * 1.4826 * 0.1))
    middle, least = usual(0.1, 0.9)  # of two, none is the odd one
    assert middle == 0.5
    assert least < 0.1
    assert all(map(math.isnan, usual(math.nan, math.nan)))
