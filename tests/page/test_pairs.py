"""Pages of pairs of all kinds: doubtful, hostile, anisotropic, real."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from geometry import make_grid
from iregzoo.align import align
from iregzoo.register import read_scans, register
from iregzoo.results import provenance, write
from iregzoo.zoo import load
from pages import PLANES, Page, blobs, still


def test_no_warnings_are_said_and_warnings_stand_on_top(browser: Chrome, page: Page, tmp_path: Path) -> None:
    assert page.report["warnings"] == []
    assert page.find("#warnings").text.startswith("No warnings")
    grid = make_grid((24, 26, 28))
    write(still(blobs(grid, 1), blobs(grid, 2)), tmp_path, {})
    page = Page(browser, tmp_path)
    assert page.report["warnings"] != []
    assert page.find("#warnings [role=alert] strong").is_displayed()
    assert page.texts("#warnings li") == page.report["warnings"]
    assert page.find("#warnings").rect["y"] < page.find("#viewer").rect["y"]
    assert page.find("#warnings").rect["y"] < 250
    worrying = page.texts("#lines tr.worrying th")
    assert len(worrying) == 1
    assert "Image similarity" in worrying[0]


def test_what_was_aligned_without_a_network_says_so(browser: Chrome, tmp_path: Path) -> None:
    scan = still(blobs(make_grid((24, 26, 28)), 1), blobs(make_grid((24, 26, 28)), 1)).scans
    write(align(scan), tmp_path, {"aligned": "rigid"})
    page = Page(browser, tmp_path)
    assert page.find("#made").text == "rigid alignment · affine start rigid"
    assert page.find("#trace-note").text == "None: the scans were aligned without a network."
    assert page.report["warnings"] == []
    assert "Network input" not in page.texts("#origin dt")
    assert browser.get_log("browser") == []


def test_names_of_files_stay_names(browser: Chrome, tmp_path: Path) -> None:
    """A path that would end the script, and one that is markup."""
    grid = make_grid((24, 26, 28))
    path = "a</script><img src=x onerror=document.title='taken'>.nii.gz"
    other = "<script>document.title='taken'<!--{{script}}.nii.gz"
    hostile = {"bundle": "</script><script>document.title='taken'</script>", "weights": "\u2028<!--<script>&lt;'\""}
    result = still(blobs(grid, 1, other), blobs(grid, 2, path))
    (tmp_path / "out").mkdir()
    write(result, tmp_path / "out", hostile)
    page = Page(browser, tmp_path / "out")
    assert page.find("h1").text == f"{Path(path).name} → {other}"
    assert page.browser.title == f"{Path(path).name} to {other}"
    assert path in page.texts("#origin dd")
    assert json.loads(page.find("#report").get_property("textContent")) == page.report
    assert page.report["bundle"] == hostile["bundle"]
    assert not page.browser.find_elements(By.CSS_SELECTOR, "img")
    assert len(page.browser.find_elements(By.CSS_SELECTOR, "script")) == 2
    assert page.pixels("axial").std() > 0.1
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [360, 1280])
def test_voxels_that_are_no_cubes_have_their_size(browser: Chrome, tmp_path: Path, width: int) -> None:
    grid = make_grid((40, 60, 12), (1.5, 0.8, 6.0), degrees=(0, 0, 8))
    write(still(blobs(grid, 1), blobs(grid, 2)), tmp_path, {})
    page = Page(browser, tmp_path, width=width)
    millimetres = dict(zip(PLANES, ((60, 48), (60, 72), (48, 72)), strict=True))
    for plane, (along, up) in millimetres.items():
        size = page.canvas(plane).size
        assert size["width"] / size["height"] == pytest.approx(along / up, rel=0.03)
    assert "oblique by 8°" in page.find("#resolution").text
    wide, seen = page.browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= seen == width


def test_without_labels_and_iterations_neither_is_shown(browser: Chrome, tmp_path: Path) -> None:
    grid = make_grid((24, 26, 28))
    write(still(blobs(grid, 1), blobs(grid, 1)), tmp_path, {})
    page = Page(browser, tmp_path)
    assert not page.find("#overlap").is_displayed()
    assert not page.find("[name=labels]").is_displayed()
    assert "None recorded" in page.find("#trace-note").text
    assert page.texts("#trace svg") == []
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(page: Page, scheme: str) -> None:
    """A contrast of at least 4.5, as WCAG asks of text, in what carries the report's words."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    style = "const s = getComputedStyle(arguments[0]); return [s.color, s.backgroundColor]"

    def colours(css: str) -> list[NDArray[np.float64]]:
        found = page.browser.execute_script(style, page.find(css))
        return [np.array(re.findall(r"[\d.]+", colour)[:3], float) / 255 for colour in found]

    paper = colours("#viewer")[1]
    assert (paper.mean() < 0.5) == (scheme == "dark")
    for css, ground in (
        ("#lines td:nth-child(3)", paper),
        ("#lines th", paper),
        (".help", paper),
        ("#warnings .note", colours("#warnings .note")[1]),
        ("[name=mode]:checked + span", colours("[name=mode]:checked + span")[1]),
        ("#made", colours("body")[1]),
    ):
        assert contrast(colours(css)[0], ground) > 4.5, css
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def contrast(first: Sequence[float] | NDArray[Any], second: Sequence[float] | NDArray[Any]) -> float:
    """The ratio of two colours' luminances, as WCAG 2 defines it."""
    light = []
    for colour in (first, second):
        channels = np.asarray(colour)
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        light.append(float(linear @ [0.2126, 0.7152, 0.0722]))
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_real_pair_is_shown(browser: Chrome, test_data: Path, tmp_path: Path) -> None:
    images, labels = test_data / "hippocampus" / "images", test_data / "hippocampus" / "labels"
    names = "hippocampus_001.nii.gz", "hippocampus_003.nii.gz"
    scans = read_scans(*(images / name for name in names), *(labels / name for name in names))
    method = load("iirp")
    write(register(scans, method), tmp_path, provenance(method))
    page = Page(browser, tmp_path)
    assert page.find("h1").text == f"{names[1]} → {names[0]}"
    assert all(page.pixels(plane, which).std() > 0.1 for plane in PLANES for which in (0, 1))
    values = [float(text) for text in page.texts("#dice td:nth-child(3)")]
    assert values == [round(page.report["dice"][label], 3) for label in "12"]
    assert (tmp_path / "report.html").stat().st_size < 1e6
    assert browser.get_log("browser") == []
