"""Brains are found whatever their contrasts and heads, by the network that the weights' card names."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from weakref import ref

import monai.bundle
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from finders import Says, Sees
from geometry import apply_world, world_points
from iregzoo import finder, register, zoo
from iregzoo.align import align
from iregzoo.anatomy import read_table
from iregzoo.bundle import LoadPair
from iregzoo.errors import InputError
from iregzoo.finder import Finder
from iregzoo.group import Member, read_group
from iregzoo.groupwise import build_template, write_ways
from iregzoo.metrics import dice
from iregzoo.networks.canonical import CanonicalNet
from iregzoo.results import provenance, write
from iregzoo.scans import Scans, read_scans
from iregzoo.similarity import ncc
from iregzoo.space import start
from iregzoo.space.brains import LEAST_MM3
from iregzoo.space.frame import affine_displacement, warp_scan
from iregzoo.space.scan import Scan, normalise, read_labels, read_scan, resample_to
from iregzoo.space.start import matrix_of
from iregzoo.space.upright import ROTATIONS, lying
from iregzoo.suited import suited

ROOT = Path(__file__).resolve().parents[1]


def rendered(folder: Path, name: str, *, contrast: bool, stripped: bool, seed: int) -> tuple[Scan, Scan]:
    """A person's scan, of a random contrast or a T1, and the labels that are compared."""
    table, labels = read_table(folder), read_labels(folder / f"{name}.nii.gz")
    synthesis = table.synthesis(t1=float(not contrast), stripped=float(stripped), blur=0.6, bias=0.2, thick=0.0)
    image = synthesis(labels.data[0].short(), torch.Generator().manual_seed(seed))
    known = torch.isin(labels.data, torch.tensor(table.compared))
    return replace(labels, data=1000 * image[None]), replace(labels, data=labels.data * known)


def test_weights_bring_what_finds_their_starts() -> None:
    carried = zoo.load("iirp", "brain_any")
    assert zoo.load("iirp").finder is None
    for name in ("brain", "brain_any"):
        found = zoo.load("iirp", name).finder
        assert found is not None
        assert not any(parameter.requires_grad for parameter in found.network.parameters())
        assert not found.network.training
        for key, tensor in found.network.state_dict().items():
            assert torch.equal(tensor, carried.network.canonical.state_dict()[key]), key


def test_the_precision_that_is_asked_for_is_the_finders_too() -> None:
    bundle = zoo.find("iirp")
    weights = zoo.find_weights(bundle, "brain")
    assert [zoo.finder_of(bundle, weights, precision=name).precision for name in ("auto", "float32", "bfloat16")] == [
        "auto",
        "float32",
        "bfloat16",
    ]


def test_a_head_of_another_contrast_is_found_for_a_brain(test_data: Path) -> None:
    """Mutual information has its maximum in a wrong place here."""
    folder = test_data / "brain_labels"
    fixed, fixed_labels = rendered(folder, "brain_05", contrast=False, stripped=True, seed=7001)
    moving, moving_labels = rendered(folder, "brain_04", contrast=True, stripped=False, seed=7000)
    method = zoo.load("iirp", "brain_any")

    def overlap(with_finder: bool) -> float:
        found = method.finder if with_finder else None
        _, start = register.start_of(Scans(fixed, moving), "affine", method.card, found)
        warped = warp_scan(moving_labels, affine_displacement(start, fixed.grid), fixed.grid, mode="nearest")
        values = [int(value) for value in fixed_labels.data.unique() if value]
        return float(np.mean([*dice(warped.int(), fixed_labels.data.int(), values).values()]))

    assert overlap(with_finder=True) > 0.4 > 0.2 > overlap(with_finder=False)


def test_a_head_is_aligned_with_the_persons_brain_of_another_contrast(test_data: Path) -> None:
    """Where the search leads astray, the brains lead to the place."""
    folder = test_data / "brain_labels"
    fixed, _ = rendered(folder, "brain_04", contrast=True, stripped=False, seed=8001)
    moving, _ = rendered(folder, "brain_04", contrast=False, stripped=True, seed=8101)
    moved = matrix_of(sitk.Euler3DTransform(fixed.grid.centre.tolist(), 0.06, -0.04, 0.05, (3.0, -2.0, 4.0)))
    scans = Scans(fixed, replace(moving, grid=replace(moving.grid, affine=moved @ moving.grid.affine)))
    brain = world_points(fixed.grid)[moving.data[0, 0].numpy() > 0][::997]

    def error_mm(finder: Finder | None) -> float:
        start = align(scans, finder=finder).frame.start
        return float(np.linalg.norm(apply_world(start, brain) - apply_world(moved, brain), axis=1).mean())

    assert error_mm(zoo.brain_finder()) < 0.3 < 5 < error_mm(None)


def test_monai_and_the_bundle_find_the_same_start(test_data: Path, tmp_path: Path) -> None:
    files = {"fixed": "t1_brain_a.nii.gz", "moving": "t1_brain_b.nii.gz"}
    paths = {side: str(test_data / "scans" / file) for side, file in files.items()}
    paths["fixed"] = str(turned(Path(paths["fixed"]), ROTATIONS[5], tmp_path))
    method = zoo.load("iirp", "brain")
    _, expected = register.start_of(read_scans(**paths), "auto", method.card, method.finder)
    _, searched = register.start_of(read_scans(**paths), "auto", method.card)
    assert np.abs(expected - searched).max() > 1e-3
    weights = zoo.find_weights(method.bundle, "brain")
    load = LoadPair(method.card, method.network.stride, finder=zoo.finder_of(method.bundle, weights))
    loaded = load(paths)
    np.testing.assert_array_equal(loaded["start"], expected)
    np.testing.assert_array_equal(loaded["upright"], ROTATIONS[5].T)
    bundle = ROOT / "bundles" / "iirp"
    monai.bundle.run(
        config_file=str(bundle / "configs/inference.json"),
        bundle_root=str(bundle),
        output_dir=str(tmp_path / "out"),
        device="cpu",
        refine=0,
        **paths,
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert (report["weights"], report["weights_chosen_for"]) == ("brain", "T1 brains")
    np.testing.assert_allclose(report["affine_lps_mm"], expected, atol=1e-6)
    assert report["finder_sha256"] == method.bundle.weights["brain_any"].sha256
    assert report["warnings"] == report["header_doubts"] == [loaded["lying"]] != [""]
    assert report["ncc_after"] > 0.95


def test_a_result_says_what_looks_for_brains() -> None:
    own = zoo.find("iirp").weights["brain_any"].sha256
    for name in ("brain", "brain_any"):
        assert provenance(zoo.load("iirp", name))["finder_sha256"] == own
    assert "finder_sha256" not in provenance(zoo.load("iirp", "hippocampus"))


def test_only_weights_for_brains_find_brains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of other organs may have a network of one contrast, too."""
    bundle = zoo.find("iirp")
    cards = bundle.metadata["weights"]
    organs = {name: {**card, "suits": ""} for name, card in cards.items()}
    other = replace(bundle, metadata={**bundle.metadata, "weights": organs})
    monkeypatch.setattr(zoo, "bundles", lambda: [other, bundle])
    found = zoo.brain_finder()
    assert found is not None
    assert found.sha256 == cards["brain_any"]["sha256"]
    monkeypatch.setattr(zoo, "bundles", lambda: [other])
    assert zoo.brain_finder() is None


def test_a_larger_field_of_view_than_a_heads_is_left_to_the_search(phantom: Scan) -> None:
    find = Finder(Itself(), (2.0, 2.0, 2.0), (16, 16, 16))
    wide = replace(phantom, grid=replace(phantom.grid, affine=phantom.grid.affine * (7, 7, 7, 1)))
    assert np.prod(wide.grid.shape * wide.grid.spacing) > finder.MOST_MM3 > np.prod(phantom.grid.shape)
    assert find(wide, phantom, rigid=True) is None
    assert find(phantom, wide, rigid=True) is None


class Itself(CanonicalNet):
    """Makes of an image the image, but of what is black white."""

    def __init__(self) -> None:
        super().__init__((8, 8))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.where(images > 0, images, 1.0)

    def certainty(self, images: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(images))


def test_what_is_seen_is_the_scan_where_it_lies_and_no_more(phantom: Scan) -> None:
    seen = Finder(Itself(), (2.0, 2.0, 2.0), (16, 16, 16)).see(phantom)
    assert seen.data.shape[2:] == seen.grid.shape
    torch.testing.assert_close(seen.data, resample_to(normalise(phantom), seen.grid))
    assert (seen.data == 0).any()
    for mine, own in zip(sorted(seen.grid.shape), sorted(phantom.grid.shape * phantom.grid.spacing), strict=True):
        assert 0 <= 2 * mine - own < 2
    np.testing.assert_allclose(seen.grid.centre, phantom.grid.centre, atol=1.0)
    exact = Finder(Itself(), (2.0, 2.0, 2.0), (16, 16, 16)).see(replace(phantom, data=phantom.data.double()))
    torch.testing.assert_close(exact.data, seen.data)


def test_a_scan_is_looked_at_once_while_it_is_there(phantom: Scan, monkeypatch: pytest.MonkeyPatch) -> None:
    find, looks = Finder(Itself(), (2.0, 2.0, 2.0), (16, 16, 16)), []
    monkeypatch.setattr(Itself, "forward", lambda self, images: looks.append(1) or images)
    assert find.see(phantom) is find.see(phantom)
    assert len(looks) == 1
    alike = replace(phantom)
    assert find.see(alike) is not find.see(phantom)
    assert len(looks) == 2
    other = Finder(find.network, (2.0, 2.0, 2.0), (16, 16, 16), window=(-500.0, 3000.0))
    assert not torch.equal(other.see(phantom).data, find.see(phantom).data)
    assert len(looks) == 3
    gone = ref(alike)
    del alike
    assert gone() is None  # nothing keeps a patient's scan


def test_the_one_file_is_read_once() -> None:
    bundle = zoo.find("iirp")
    first, again = (zoo.finder_of(bundle, zoo.find_weights(bundle, name)) for name in ("brain", "brain_any"))
    assert first is again is not None
    assert zoo.finder_of(bundle, zoo.find_weights(bundle, "brain"), precision="float32") is not first


def test_a_window_is_the_networks_own(phantom: Scan) -> None:
    seen = Finder(Itself(), (2.0, 2.0, 2.0), (16, 16, 16), window=(-500.0, 3000.0)).see(phantom)
    torch.testing.assert_close(seen.data, resample_to(normalise(phantom, (-500.0, 3000.0)), seen.grid))


class Moves(Says):
    """Says where it was asked from: 3 mm for an affine start, 2 mm for a rigid one."""

    def __call__(self, fixed: Scan, moving: Scan, *, rigid: bool) -> np.ndarray:
        start = np.eye(4)
        start[0, 3] = 2.0 if rigid else 3.0
        return start


@pytest.mark.parametrize(("init", "shift"), [("affine", 3.0), ("rigid", 2.0), ("auto", 3.0), ("none", 0.0)])
def test_register_begins_where_the_finder_says(phantom: Scan, init: str, shift: float) -> None:
    method, frames = zoo.load("iirp", "brain"), []
    seen = Scans(phantom, phantom)
    register.register(seen, replace(method, finder=Moves(None)), init=init, refine=0, placed=frames.append)
    np.testing.assert_array_equal(frames[0].start[:3, 3], (shift, 0, 0))
    named, start = register.start_of(seen, init, method.card, Moves(None))
    assert named == ("affine" if init == "auto" else init)
    np.testing.assert_array_equal(start[:3, 3], (shift, 0, 0))


def turned(path: Path, rotation: np.ndarray, folder: Path) -> Path:
    """The same voxels with a header that turns the world, LPS."""
    image = sitk.ReadImage(str(path))
    image.SetDirection((rotation[:3, :3] @ np.reshape(image.GetDirection(), (3, 3))).ravel().tolist())
    image.SetOrigin((rotation[:3, :3] @ image.GetOrigin()).tolist())
    sitk.WriteImage(image, str(folder / f"turned_{path.name}"))
    return folder / f"turned_{path.name}"


def test_it_is_seen_which_way_up_brains_lie(test_data: Path, tmp_path: Path) -> None:
    find = zoo.brain_finder()
    assert find is not None
    path = test_data / "scans" / "t1_brain_a.nii.gz"
    for number in (0, 5, 18):
        scan = read_scan(turned(path, ROTATIONS[number], tmp_path))
        np.testing.assert_array_equal(find.upright(scan) @ ROTATIONS[number], np.eye(4))
    head, _ = rendered(test_data / "brain_labels", "brain_04", contrast=True, stripped=False, seed=3)
    assert find.likeness(head) < 0.5  # no T1
    for number in (0, 11):
        other = replace(head, grid=replace(head.grid, affine=ROTATIONS[number] @ head.grid.affine))
        np.testing.assert_array_equal(find.upright(other) @ ROTATIONS[number], np.eye(4))


def test_what_is_no_brain_lies_as_its_header_says(phantom: Scan) -> None:
    find = zoo.brain_finder()
    assert find is not None
    large = replace(phantom, grid=replace(phantom.grid, affine=phantom.grid.affine * (2, 2, 2, 1)))
    assert LEAST_MM3 < large.grid.volume < finder.MOST_MM3
    for scan in (large, replace(large, data=torch.zeros_like(large.data))):
        np.testing.assert_array_equal(find.upright(scan), np.eye(4))


def test_only_what_is_clearly_surer_counts(phantom: Scan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the header's way, the other ways in their order, and the best of them as it is looked at again."""
    find = Finder(Itself(), (2.0, 2.0, 2.0), (16, 16, 16))
    monkeypatch.setattr(finder, "LEAST_MM3", 0.0)
    surer = finder.DOUBTFUL - 0.005 + finder.CLEARER
    for first, again, counts in (
        (finder.DOUBTFUL - 0.005, surer + 0.002, True),
        (finder.DOUBTFUL - 0.005, surer - 0.002, False),
        (finder.DOUBTFUL, 0.9, False),
        (0.5, finder.CERTAIN + 0.001, True),
        (0.5, finder.CERTAIN - 0.001, False),
    ):
        said = iter([first, *(0.9 if number == 3 else 0.1 for number in range(23)), again])
        monkeypatch.setattr(Finder, "_certainty", lambda self, image, said=said: next(said))
        np.testing.assert_array_equal(find.upright(replace(phantom)), ROTATIONS[4 if counts else 0])


def test_a_search_begins_with_scans_that_lie_alike(phantom: Scan) -> None:
    """Where the finder sees how scans lie, but not two whole brains."""
    turned_scan = phantom.in_world(ROTATIONS[9])
    found = start.affine_start(phantom, turned_scan, "rigid", Sees(turned_scan, ROTATIONS[9].T))
    np.testing.assert_allclose(found, ROTATIONS[9], atol=0.02)
    other = start.affine_start(phantom, turned_scan, "rigid")
    assert np.abs(other - ROTATIONS[9]).max() > 0.5


def test_where_a_start_is_given_the_moving_scan_is_not_looked_at(phantom: Scan) -> None:
    looked: list[Scan] = []

    class Looks(Says):
        def upright(self, scan: Scan) -> np.ndarray:
            looked.append(scan)
            return ROTATIONS[5]

    moving = replace(phantom, path=Path("moving"))
    pair = Scans(phantom, moving)
    for init, both in (("center", True), ("none", True), ("given", False), ("rigid", True)):
        looked.clear()
        upright, said = register.uprights(pair, init, Looks(None))
        assert (moving in looked) == both
        assert said == tuple(lying(scan, ROTATIONS[5], init) for scan in (phantom, moving)[: 1 + both])
        np.testing.assert_array_equal(upright, ROTATIONS[5])


def test_only_what_may_be_a_head_is_looked_at(phantom: Scan, monkeypatch: pytest.MonkeyPatch) -> None:
    find = Finder(Itself(), (2.0, 2.0, 2.0), (16, 16, 16))
    small, large = (
        replace(phantom, grid=replace(phantom.grid, affine=phantom.grid.affine * (factor, factor, factor, 1)))
        for factor in (0.5, 9.0)
    )
    assert small.grid.volume < LEAST_MM3 < finder.MOST_MM3 < large.grid.volume
    looked: list[torch.Tensor] = []
    monkeypatch.setattr(Finder, "_certainty", lambda self, image: looked.append(image) or 0.0)
    np.testing.assert_array_equal(find.upright(small), np.eye(4))
    assert len(looked) == 1  # and in no other way
    monkeypatch.setattr(Finder, "_look", lambda self, scan: pytest.fail("looked"))
    np.testing.assert_array_equal(find.upright(large), np.eye(4))


def test_headers_that_turn_brains_change_nothing_but_a_warning(test_data: Path, tmp_path: Path) -> None:
    """Each its own way, and what was chosen, found and deformed is what upright headers give."""
    paths = [test_data / "scans" / f"t1_brain_{name}.nii.gz" for name in "ab"]
    fixed, moving = (turned(path, ROTATIONS[n], tmp_path) for path, n in zip(paths, (9, 14), strict=True))
    method = zoo.load("iirp", "brain")
    upright, other = (register.register(read_scans(*pair), method, refine=2) for pair in (paths, (fixed, moving)))
    assert upright.lying == ()
    start = ROTATIONS[14] @ upright.frame.start @ ROTATIONS[9].T
    np.testing.assert_allclose(other.frame.start, start, atol=0.05)
    assert other.refinement.network.shape == upright.refinement.network.shape
    there = torch.from_numpy(ROTATIONS[9][:3, :3]).to(upright.deformation)
    expected = torch.einsum("ij,bj...->bi...", there, upright.deformation)
    assert float((other.deformation - expected).norm(dim=1).mean()) < 0.25 < 2 < float(expected.norm(dim=1).mean())
    suiting = suited(zoo.find("iirp"), (other.scans.fixed, other.scans.moving))
    assert suiting == ("brain", "T1 brains")
    report = write(other, tmp_path / "out", {})
    for path, warning in zip((fixed, moving), report["warnings"], strict=True):
        assert warning.startswith(f"{path.name}: its axes look like ")


def test_a_template_lies_upright_whatever_the_headers_say(test_data: Path, tmp_path: Path) -> None:
    """Its scans' transforms lead from it to where the headers say that they lie."""
    method = zoo.load("iirp", "brain")
    paths = [test_data / "scans" / f"t1_brain_{name}.nii.gz" for name in "ab"]
    groups, means = [], []
    for name, files in (("upright", paths), ("turned", [paths[0], turned(paths[1], ROTATIONS[4], tmp_path)])):
        members = [Member(path.stem, str(path)) for path in files]
        group = read_group(members, method.card, spacing=(4.0,) * 3, finder=method.finder)
        (built,) = build_template(group, method, tmp_path / name, rounds=0)
        groups.append(group)
        means.append(built.image)
        write_ways(group, built, tmp_path / f"{name} ways")
    assert groups[0].grid.shape == groups[1].grid.shape
    assert float(ncc(*means)) > 0.999
    assert list(groups[1].doubts) == [f"turned_{paths[1].stem}"]
    assert groups[0].doubts == {}
    trusted = read_group(members, method.card, init="center", spacing=(4.0,) * 3, finder=method.finder)
    assert "the start (center) did not" in trusted.doubts[f"turned_{paths[1].stem}"]
    assert [member.upright for member in trusted.members] == [None, None]
    upright, other = (
        sitk.ReadTransform(str(tmp_path / f"{name} ways" / f"{file}.h5"))
        for name, file in (("upright", paths[1].stem), ("turned", f"turned_{paths[1].stem}"))
    )
    for place in ((0.0, 0.0, 0.0), (30.0, -20.0, 10.0)):
        there = ROTATIONS[4][:3, :3] @ upright.TransformPoint(place)
        np.testing.assert_allclose(other.TransformPoint(place), there, atol=0.5)


def test_every_bundles_config_finds_starts_in_one_way() -> None:
    configs = [json.loads(path.read_text("utf-8")) for path in ROOT.glob("bundles/*/configs/inference.json")]
    assert len({config["preprocessing"]["finder"] for config in configs}) == 1
    assert len(configs) > 4


@pytest.fixture
def phantom() -> Scan:
    from geometry import draw_head, make_grid

    grid = make_grid((40, 45, 38), (1.5, 1.2, 1.7), axes=(2, 0, 1))
    return Scan(draw_head(grid, size=0.5), grid, Path("phantom"))


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("lost", "finder 'lost' of the weights brain: is not among the weights of mine with a network of one contrast"),
        ("brain_any", "brain_any.pt: the weights 'brain_any' of mine are missing; install the bundle again"),
        (
            "brain",
            "finder 'brain' of .* one contrast \\(brain_any\\); name one of these, or leave finder out",
        ),
    ],
)
def test_a_finder_that_is_none_is_named(tmp_path: Path, named: str, message: str) -> None:
    bundle = tmp_path / "mine"
    shutil.copytree(zoo.find("iirp").path, bundle, ignore=shutil.ignore_patterns("brain_any.pt"))
    path = bundle / "configs" / "metadata.json"
    metadata = json.loads(path.read_text("utf-8"))
    metadata["weights"] = {name: card for name, card in metadata["weights"].items() if name != "hippocampus"}
    metadata["weights"]["brain"]["finder"] = named
    path.write_text(json.dumps(metadata), "utf-8")
    with pytest.raises(InputError, match=message):
        zoo.load(str(bundle), "brain")
