"""Weights are chosen by what the scans show, where the user names none."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from iregzoo import suited as suiting
from iregzoo import zoo
from iregzoo.phantom import Phantom
from iregzoo.scans import Scans, read_scans
from iregzoo.space.brains import LEAST_MM3
from iregzoo.space.grid import Grid
from iregzoo.space.scan import Scan
from iregzoo.suited import LIKE_T1, suited
from shell import run
from test_finder import rendered


@pytest.fixture
def pair(small_phantom: Phantom) -> Scans:
    """As large as heads."""
    scans = read_scans(small_phantom.fixed, small_phantom.moving)
    large = replace(scans, fixed=scaled(scans.fixed, 2), moving=scaled(scans.moving, 2))
    assert large.fixed.grid.volume > LEAST_MM3
    return large


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
        assert suited(zoo.find(name), pair) == chosen


def test_a_bundle_without_weights_for_t1_has_those_for_any(pair: Scans, monkeypatch: pytest.MonkeyPatch) -> None:
    sees(monkeypatch, (0.9, 0.9))
    bundle = zoo.find("iirp")
    cards = {name: card for name, card in bundle.metadata["weights"].items() if name != "brain"}
    few = replace(bundle, metadata={**bundle.metadata, "weights": cards})
    assert suited(few, pair) == ("brain_any", "brains")


def test_nothing_is_loaded_where_nothing_can_be_chosen(pair: Scans, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suiting, "finder_of", lambda *given: pytest.fail("loaded"))
    assert suited(zoo.find("pan"), pair) is None
    small = scaled(pair.moving, 0.5)
    assert small.grid.volume < LEAST_MM3
    assert suited(zoo.find("iirp"), Scans(pair.fixed, small)) is None


def test_what_is_no_brain_gets_the_first_weights(pair: Scans) -> None:
    assert suited(zoo.find("iirp"), pair) is None


def test_brains_are_told_by_their_contrasts(test_data: Path) -> None:
    folder, bundle = test_data / "brain_labels", zoo.find("ipear")
    t1, _ = rendered(folder, "brain_04", contrast=False, stripped=False, seed=1)
    other, _ = rendered(folder, "brain_05", contrast=False, stripped=True, seed=2)
    unlike, _ = rendered(folder, "brain_07", contrast=True, stripped=False, seed=3)
    assert suited(bundle, Scans(t1, other)) == ("brain", "T1 brains")
    assert suited(bundle, Scans(t1, unlike)) == suited(bundle, Scans(unlike, other)) == ("brain_any", "brains")
    left_right = int(np.abs(t1.grid.affine[0, :3]).argmax())
    half = t1.data.narrow(2 + left_right, 0, t1.grid.shape[left_right] // 2)
    left = replace(t1, data=half, grid=Grid(tuple(half.shape[2:]), t1.grid.affine))
    assert suited(bundle, Scans(left, other)) is None


def test_register_says_what_it_chose(
    test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scans = test_data / "scans"
    pair = ["--fixed", str(scans / "t1_brain_a.nii.gz"), "--moving", str(scans / "t1_brain_b.nii.gz")]
    common = ["register", *pair, "--bundle", "iirp", "--refine", "0"]
    assert run(monkeypatch, *common, "--output", str(tmp_path / "chosen")) == 0
    said = capsys.readouterr().out
    assert "note: both scans show T1 brains, so the weights are brain; --weights chooses others" in said
    assert run(monkeypatch, *common, "--weights", "brain", "--output", str(tmp_path / "named")) == 0
    assert "note: both" not in capsys.readouterr().out
    for name in ("warped.nii.gz", "transform.h5"):
        assert (tmp_path / "chosen" / name).read_bytes() == (tmp_path / "named" / name).read_bytes()
    assert json.loads((tmp_path / "chosen" / "report.json").read_text("utf-8"))["weights"] == "brain"


def test_hippocampi_keep_the_first_weights(
    test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = sorted((test_data / "hippocampus" / "images").glob("*.nii.gz"))[:2]
    pair = ["--fixed", str(images[0]), "--moving", str(images[1])]
    assert run(monkeypatch, "register", *pair, "--bundle", "iirp", "--output", str(tmp_path / "out")) == 0
    assert "note: both" not in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))["weights"] == "hippocampus"
