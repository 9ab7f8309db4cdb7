"""What the page says and shows, and that it is alone."""

import base64
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import torch
from matplotlib.image import imread
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from geometry import make_grid
from iregzoo.page import explained
from iregzoo.results import write
from iregzoo.space.scan import Scan
from pages import PLANES, Page, still


def test_page_is_alone_and_runs_its_own_script_only(phantom: Path, page: Page) -> None:
    text = (phantom / "report.html").read_text(encoding="utf-8")
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    policy = re.search(r'content="(default-src [^"]*)"', text)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert f"script-src 'sha256-{digest}'" in policy[1]
    assert not re.findall(r"""\b(?:src|href)=(?!["']?data:)|url\(|@import|https?://(?!www\.w3\.org)""", text)
    assert page.browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_figures_are_those_of_the_report(page: Page) -> None:
    report = page.report
    assert json.loads(page.find("#report").get_property("textContent")) == report
    rows = dict(zip(page.texts("#lines th"), page.texts("#lines td:nth-child(2)"), strict=True))
    expected = {line.name: line.value for line in explained(report)}
    assert rows == expected
    likeness = rows["Image similarity (NCC)"]
    assert [float(word) for word in likeness.split() if word[0].isdigit()] == [
        round(report[f"ncc_{when}"], 3) for when in ("before", "start", "after")
    ]
    assert rows["Folding"].startswith(f"{report['folding_percent']:.3f} %")
    assert rows["Deformation"] == (
        f"{report['displacement_mean_mm']:.1f} mm mean, {report['displacement_max_mm']:.1f} mm maximum"
    )
    assert "Inverse" in rows
    assert page.texts("#dice tbody th") == ["1", "2", "3", "4"]
    for column, name in ((2, "dice_before"), (3, "dice")):
        values = [float(text) for text in page.texts(f"#dice td:nth-child({column})")]
        assert values == [round(report[name][label], 3) for label in "1234"]
    assert report["weights_sha256"] in page.texts("#origin dd")
    assert "Not a medical device" in page.find("header").text


def test_an_alignment_is_not_called_a_start(page: Page) -> None:
    """The matrix of a report is where the alignment ended, and not what ``init`` names."""
    alike = {"information_start": 0.5, "information_network": 0.4}
    for said, expected in (
        ({}, ("Affine start", "none: ")),
        ({"aligned": "rigid"}, ("Alignment", "rigid, from none: ")),
        ({"network_left_out": alike}, ("Affine start", "none: ")),  # headers that are trusted are used as they are
        ({"network_left_out": alike, "init": "center"}, ("Alignment", "rigid, from center: ")),
        ({"network_left_out": alike, "init": "affine"}, ("Alignment", "affine, from affine: ")),
    ):
        report = {**page.report, "init": "none", **said}
        line = next(line for line in explained(report) if "rotated by" in line.value)
        assert line.name == expected[0]
        assert line.value.startswith(expected[1])


def test_iterations_are_drawn_as_they_were_tried(page: Page) -> None:
    scores, taken = page.report["scores"], page.report["iterations"]
    assert len(page.texts("#trace .taken")) == sum(taken)
    assert len(page.texts("#trace circle")) == sum(map(len, scores)) > sum(taken)
    heights = [float(dot.get_attribute("cy")) for dot in page.browser.find_elements(By.CSS_SELECTOR, "#trace circle")]
    flat = [score for level in scores for score in level]
    assert np.argsort(heights).tolist() == np.argsort(flat)[::-1].tolist()
    words = page.texts("#trace-words li")
    assert len(words) == len(taken)
    assert words[0].startswith(f"Level 1 (coarsest): {taken[0]} accepted, {len(scores[0])} tried")


def test_pictures_show_the_three_planes_with_the_patients_sides(page: Page, tmp_path: Path) -> None:
    for plane, sides in PLANES.items():
        assert "".join(page.texts(f"#{plane} figure:nth-of-type(1) b")) == sides
        for which in (0, 1):
            assert page.pixels(plane, which).std() > 0.1
        left, right, top, bottom = (
            box.rect for box in page.browser.find_elements(By.CSS_SELECTOR, f"#{plane} figure:nth-of-type(1) b")
        )
        assert left["x"] < top["x"] < right["x"]
        assert top["y"] < left["y"] < bottom["y"]
    assert page.browser.save_screenshot(str(tmp_path / "page.png"))
    assert len(np.unique(imread(tmp_path / "page.png").reshape(-1, 4), axis=0)) > 100


def test_right_is_on_the_left_and_front_and_top_are_up(browser: Chrome, tmp_path: Path) -> None:
    """A bright ball at the patient's right, front and top, in an image stored otherwise."""
    grid = make_grid((30, 20, 26), (1.0, 1.5, 1.2), axes=(2, 0, 1), signs=(-1, 1, -1))
    index = np.stack(np.indices(grid.shape), -1)
    world = index @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    ball = np.linalg.norm(world - np.array([-8.0, -6.0, 10.0]), axis=-1) < 4
    image = torch.from_numpy(ball.astype(np.float32))[None, None]
    scan = Scan(image, grid, Path("ball.nii.gz"))
    write(still(scan, scan), tmp_path, {})
    page = Page(browser, tmp_path)
    for plane in PLANES:
        pixels = page.pixels(plane).mean(-1)
        down, right = (np.argwhere(pixels > 0.8).mean(0) + 0.5) / pixels.shape
        assert right < 0.45
        assert down < 0.45
