"""Weights are chosen by what the scans show, where the user names none."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import monai.bundle
import numpy as np
import pytest
import SimpleITK as sitk

from cohort import batch, refusal, summary, write_pairs
from iregzoo import bundle as monai_bundle
from iregzoo import suited as suiting
from iregzoo import zoo
from iregzoo.bundle import choose_weights
from iregzoo.cases import Case
from iregzoo.entrants import load_methods, suited_weights
from iregzoo.errors import InputError
from iregzoo.networks.canonical import CanonicalNet
from iregzoo.phantom import Phantom
from iregzoo.scans import Scans, read_scans
from iregzoo.space.brains import LEAST_MM3
from iregzoo.space.files import write_image
from iregzoo.space.grid import Grid, network_grid
from iregzoo.space.scan import Scan
from iregzoo.suited import LIKE_T1, choices, suited
from shell import run
from test_finder import rendered


@pytest.fixture
def pair(small_phantom: Phantom) -> Scans:
    """As large as heads."""
    scans = read_scans(small_phantom.fixed, small_phantom.moving)
    large = replace(scans, fixed=scaled(scans.fixed, 2), moving=scaled(scans.moving, 2))
    assert large.fixed.grid.volume > LEAST_MM3
    return large


def both(scans: Scans) -> tuple[Scan, Scan]:
    return scans.fixed, scans.moving


def scaled(scan: Scan, factor: float) -> Scan:
    return replace(scan, grid=replace(scan.grid, affine=scan.grid.affine * (factor, factor, factor, 1)))


def sees(monkeypatch: pytest.MonkeyPatch, likeness: Sequence[float | None]) -> None:
    """A finder that finds fixed and moving scan so like a T1."""
    left = iter(likeness)
    finder = SimpleNamespace(likeness=lambda scan: next(left))
    monkeypatch.setattr(suiting, "finder_of", lambda *given: finder)


@pytest.mark.parametrize(
    ("likeness", "chosen"),
    [
        ((LIKE_T1 + 0.01, 0.9), ("brain", "T1 brains")),
        ((0.9, LIKE_T1 - 0.01), ("brain_any", "brains")),
        ((LIKE_T1 - 0.01, 0.9), ("brain_any", "brains")),
        ((0.9, None), None),
        ((None, 0.9), None),
        ((None, None), None),
    ],
)
def test_both_scans_decide(
    pair: Scans, monkeypatch: pytest.MonkeyPatch, likeness: Sequence[float | None], chosen: tuple[str, str] | None
) -> None:
    for name in ("iirp", "ipear"):
        sees(monkeypatch, likeness)
        assert suited(zoo.find(name), both(pair)) == chosen


def test_a_bundle_without_weights_for_t1_has_those_for_any(pair: Scans, monkeypatch: pytest.MonkeyPatch) -> None:
    sees(monkeypatch, (0.9, 0.9))
    bundle = zoo.find("iirp")
    cards = {name: card for name, card in bundle.metadata["weights"].items() if name != "brain"}
    few = replace(bundle, metadata={**bundle.metadata, "weights": cards})
    assert suited(few, both(pair)) == ("brain_any", "brains")


def test_all_of_many_scans_decide(pair: Scans, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, four = zoo.find("iirp"), [*both(pair), *both(pair)]
    for likeness, chosen in (
        ((0.9, 0.9, 0.9, 0.9), ("brain", "T1 brains")),
        ((0.9, 0.1, 0.9, 0.9), ("brain_any", "brains")),
        ((0.9, 0.1, 0.9, None), None),
    ):
        sees(monkeypatch, likeness)
        assert suited(bundle, four) == chosen
    assert suited(bundle, []) is None


def test_what_may_be_chosen() -> None:
    assert choices(zoo.find("ipear")) == ("hippocampus", "brain", "brain_any")
    assert choices(zoo.find("pan")) == ("hippocampus",)
    bundle = zoo.find("iirp")
    turned = dict(reversed(list(bundle.metadata["weights"].items())))
    assert choices(replace(bundle, metadata={"weights": turned})) == ("brain_any", "brain")
    assert choices(replace(bundle, metadata={})) == ()


def test_nothing_is_loaded_where_nothing_can_be_chosen(pair: Scans, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suiting, "finder_of", lambda *given: pytest.fail("loaded"))
    assert suited(zoo.find("pan"), both(pair)) is None
    small = scaled(pair.moving, 0.5)
    assert small.grid.volume < LEAST_MM3
    assert suited(zoo.find("iirp"), (small, pair.fixed)) is None


def test_what_is_no_brain_gets_the_first_weights(pair: Scans) -> None:
    assert suited(zoo.find("iirp"), both(pair)) is None


def test_brains_are_told_by_their_contrasts(test_data: Path) -> None:
    folder, bundle = test_data / "brain_labels", zoo.find("ipear")
    t1, _ = rendered(folder, "brain_04", contrast=False, stripped=False, seed=1)
    other, _ = rendered(folder, "brain_05", contrast=False, stripped=True, seed=2)
    unlike, _ = rendered(folder, "brain_07", contrast=True, stripped=False, seed=3)
    assert suited(bundle, (t1, other)) == ("brain", "T1 brains")
    assert suited(bundle, (t1, unlike)) == suited(bundle, (unlike, other)) == ("brain_any", "brains")
    left_right = int(np.abs(t1.grid.affine[0, :3]).argmax())
    half = t1.data.narrow(2 + left_right, 0, t1.grid.shape[left_right] // 2)
    left = replace(t1, data=half, grid=Grid(tuple(half.shape[2:]), t1.grid.affine))
    assert suited(bundle, (other, left)) is None


def test_register_says_what_it_chose(
    test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scans = test_data / "scans"
    pair = ["--fixed", str(scans / "t1_brain_a.nii.gz"), "--moving", str(scans / "t1_brain_b.nii.gz")]
    common = ["register", *pair, "--bundle", "iirp", "--refine", "0"]
    looked, look = [], CanonicalNet.forward
    with monkeypatch.context() as patch:
        patch.setattr(CanonicalNet, "forward", lambda self, images: looked.append(1) or look(self, images))
        assert run(patch, *common, "--output", str(tmp_path / "chosen")) == 0
    assert len(looked) == 2  # the choice and the start look at each scan once
    said = capsys.readouterr().out
    assert "note: both scans show T1 brains, so the weights are brain; --weights chooses others" in said
    assert run(monkeypatch, *common, "--weights", "brain", "--output", str(tmp_path / "named")) == 0
    assert "note: both" not in capsys.readouterr().out
    for name in ("warped.nii.gz", "transform.h5"):
        assert (tmp_path / "chosen" / name).read_bytes() == (tmp_path / "named" / name).read_bytes()
    assert json.loads((tmp_path / "chosen" / "report.json").read_text("utf-8"))["weights"] == "brain"


def test_register_says_where_no_brains_were_found(
    small_phantom: Phantom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = []
    for side, path in (("fixed", small_phantom.fixed), ("moving", small_phantom.moving)):
        image = sitk.ReadImage(str(path))
        image.SetSpacing([2 * step for step in image.GetSpacing()])
        sitk.WriteImage(image, str(tmp_path / f"{side}.nii.gz"))
        pair += [f"--{side}", str(tmp_path / f"{side}.nii.gz")]
    for bundle, said in (("iirp", True), ("pan", False)):
        options = ["--bundle", bundle, "--init", "none", "--output", str(tmp_path / bundle)]
        assert run(monkeypatch, "register", *pair, *options) == 0
        words = "the scans do not both show a whole brain, as the bundle's other weights need, so the weights are its"
        assert (words in capsys.readouterr().out) == said
        assert "weights_chosen_for" not in json.loads((tmp_path / bundle / "report.json").read_text("utf-8"))


def test_hippocampi_keep_the_first_weights(
    test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = sorted((test_data / "hippocampus" / "images").glob("*.nii.gz"))[:2]
    pair = ["--fixed", str(images[0]), "--moving", str(images[1])]
    assert run(monkeypatch, "register", *pair, "--bundle", "iirp", "--output", str(tmp_path / "out")) == 0
    assert "note: " not in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))["weights"] == "hippocampus"


@pytest.fixture
def mixed(test_data: Path) -> list[dict[str, str]]:
    """Rows of a pair of T1 brains and one of hippocampi."""
    brains = [str(test_data / "scans" / f"t1_brain_{name}.nii.gz") for name in "ab"]
    crops = [str(path) for path in sorted((test_data / "hippocampus" / "images").glob("*.nii.gz"))[:2]]
    return [
        {"name": name, "fixed": fixed, "moving": moving}
        for name, (fixed, moving) in (("brains", brains), ("crops", crops))
    ]


def test_each_pair_of_a_batch_gets_what_suits_it(
    mixed: list[dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, output = write_pairs(tmp_path / "pairs.csv", mixed), tmp_path / "output"
    options = ("--bundle", "iirp", "--refine", "0", "--threads", "2")
    for _ in range(2):  # the second time, all is done
        assert batch(table, output, *options) == 0
        said = capsys.readouterr().out
        assert "note: 1 pair got the weights brain, 1 pair got the weights hippocampus, by what the scans show" in said
        found = summary(output)
        assert {name: line["weights"] for name, line in found.items()} == {"brains": "brain", "crops": "hippocampus"}
    assert "2 in an earlier run" in said
    report = json.loads((output / "brains" / "report.json").read_text("utf-8"))
    assert report["weights_chosen_for"] == "T1 brains"
    assert "weights_chosen_for" not in json.loads((output / "crops" / "report.json").read_text("utf-8"))
    # The same for all is another batch, also for pairs that would get the same.
    assert "brains: was made with weights_chosen_by scans, not user" in refusal(
        capsys, table, output, *options, "--weights", "brain"
    )


def test_monai_chooses_as_register_does(
    mixed: list[dict[str, str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    brains, crops = mixed
    iirp, pan = zoo.find("iirp"), zoo.find("pan")
    found, shown = choose_weights(iirp, None, brains)
    assert (found.name, shown) == ("brain", "T1 brains")
    assert "note: both scans show T1 brains, so the weights are brain" in capsys.readouterr().out
    found, shown = choose_weights(iirp, None, crops)
    assert (found.name, shown) == ("hippocampus", "")
    with monkeypatch.context() as context:  # nothing is read where there is no choice
        context.setattr(monai_bundle, "read_scans", None)
        for method, weights, pair in (
            (iirp, "brain_any", brains),
            (pan, None, brains),
            (iirp, None, {**brains, "moving": "gone.nii.gz"}),
        ):
            found, shown = choose_weights(method, weights, pair)
            assert (found.name, shown) == (weights or "hippocampus", "")
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match="weights 'none' are neither"):
        choose_weights(iirp, "none", brains)


def test_monai_runs_weights_with_a_network_of_one_contrast(pair: Scans, tmp_path: Path) -> None:
    """On a grid that suits the method alone, and not that network: 8 divides it, 16 does not."""
    paths = {side: str(tmp_path / f"{side}.nii.gz") for side in ("fixed", "moving")}
    for side, scan in (("fixed", scaled(pair.fixed, 1.8)), ("moving", scaled(pair.moving, 1.8))):
        write_image(Path(paths[side]), scan.data, scan.grid)
    method = zoo.load("iirp", "brain_any")
    grid, card = read_scans(**paths).fixed.grid, method.card
    own, both = (
        network_grid(grid, card.spacing, stride=stride, minimum=card.minimum).shape
        for stride in (method.network.network.stride, method.network.stride)
    )
    assert own != both
    folder = method.bundle.path
    monai.bundle.run(
        config_file=str(folder / "configs" / "inference.json"),
        bundle_root=str(folder),
        output_dir=str(tmp_path / "out"),
        weights="brain_any",
        init="none",
        refine=0,
        device="cpu",
        **paths,
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert (report["weights"], tuple(report["network_shape"])) == ("brain_any", both)


def test_all_pairs_of_an_evaluation_decide(mixed: list[dict[str, str]]) -> None:
    cases = [Case(**row) for row in mixed]
    folder = str(zoo.find("iirp").path)
    entries = ["iirp", "iirp@brain_any", "pan", folder]
    gone = Case(fixed="gone.nii.gz", moving="gone.nii.gz")
    looked: list[str] = []
    found = suited_weights(entries, [cases[0], gone, cases[0]], progress=looked.append)
    assert found == {"iirp": ("brain", "T1 brains"), folder: ("brain", "T1 brains")}
    assert looked == [cases[0].fixed, cases[0].moving, gone.fixed]  # each once
    assert suited_weights(entries, cases) == suited_weights(entries, [gone]) == suited_weights(["pan"], cases) == {}
    methods = load_methods(["iirp", "iirp@brain", "pan"], chosen={"iirp": "brain"})
    assert [(each.name, each.weights.name) for each in methods] == [
        ("iirp", "brain"),
        ("iirp@brain", "brain"),
        ("pan", "hippocampus"),
    ]


def test_evaluate_and_template_say_what_they_chose(
    mixed: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write_pairs(tmp_path / "pairs.csv", mixed[:1])
    common = ["--bundle", "iirp", "--refine", "0"]
    options = [*common, "--pairs", str(pairs), "--output", str(tmp_path / "evaluated"), "--plots", "false"]
    assert run(monkeypatch, "evaluate", *options) == 0
    assert "note: all scans show T1 brains, so the weights of iirp are brain;" in capsys.readouterr().out
    found = json.loads((tmp_path / "evaluated" / "summary.json").read_text("utf-8"))
    assert [(each["bundle"], each["weights"]) for each in found["methods"]] == [("iirp", "brain")]
    scans = write_pairs(tmp_path / "scans.csv", [{"image": mixed[0][column]} for column in ("fixed", "moving")])
    options = [*common, "--scans", str(scans), "--output", str(tmp_path / "mean"), "--rounds", "0", "--spacing", "4"]
    assert run(monkeypatch, "template", *options) == 0
    assert "note: all scans show T1 brains, so the weights are brain;" in capsys.readouterr().out
    assert json.loads((tmp_path / "mean" / "template.json").read_text("utf-8"))["weights"] == "brain"
