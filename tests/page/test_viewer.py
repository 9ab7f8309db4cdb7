"""What moves in the page, and what does not."""

import re
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.support.wait import WebDriverWait

from geometry import make_grid, world_points
from iregzoo.results import write
from iregzoo.space.scan import Scan, read_scan
from pages import PLANES, SAME, Page, apart, blobs, still


def readout(page: Page) -> str:
    return page.find("#readout").text


def test_a_click_moves_the_crosshair_and_the_other_views(page: Page) -> None:
    shape, before, drawn = [72, 88, 72], page.at(), page.everything()
    page.click("axial", 0.25, 0.4)
    moved = page.at()
    expected = [0.75 * shape[0], 0.6 * shape[1], before[2]]
    assert np.abs(np.array(moved) - expected).max() <= 1
    assert moved[2] == before[2]
    after = page.everything()
    assert all(apart(drawn[plane], after[plane]) > 10 * SAME for plane in PLANES)
    assert "right" in readout(page)
    page.click("sagittal", 0.5, 0.1)
    assert page.at()[0] == moved[0]
    assert abs(page.at()[2] - 0.9 * shape[2]) <= 1
    assert abs(page.at()[1] - 0.5 * shape[1]) <= 1


def test_readout_is_what_the_files_say(page: Page, phantom: Path) -> None:
    page.find("[data-place=displacement]").click()
    words = readout(page)
    deformation = re.search(r"deformation ([\d.]+) mm", words)
    assert deformation is not None
    assert float(deformation[1]) == pytest.approx(page.report["displacement_max_mm"], abs=0.2)
    # The phantom is stored with its axes to right, anterior and superior, 1 mm, its middle at the origin.
    at, fixed = page.at(), read_scan(phantom / "warped.nii.gz").grid
    right, front, up = (np.array(at) - (np.array(fixed.shape) - 1) / 2).tolist()
    ways = (("right", "left", right), ("anterior", "posterior", front), ("superior", "inferior", up))
    assert words.startswith(", ".join(f"{way if mm >= 0 else other} {abs(mm):.1f}" for way, other, mm in ways))
    labels = np.asarray(nib.load(phantom / "warped_labels.nii.gz").dataobj)
    assert f"warped label {int(labels[tuple(at)]) or 'none'}" in words


def test_arrow_keys_go_through_the_slices_of_the_chosen_view(page: Page) -> None:
    page.click("coronal", 0.5, 0.5)
    begin = page.at()
    page.press(Keys.ARROW_UP, Keys.ARROW_RIGHT, Keys.ARROW_UP)
    assert page.at() == [begin[0], begin[1] + 3, begin[2]]
    page.press(Keys.ARROW_DOWN)
    assert page.at() == [begin[0], begin[1] + 2, begin[2]]
    page.press(*[Keys.ARROW_LEFT] * 60)
    assert page.at() == [begin[0], 0, begin[2]]
    assert page.find("#coronal header").text.endswith("1 / 88")
    page.find("#coronal input").send_keys(Keys.END)
    assert page.at()[1] == 87


def test_space_blinks_between_fixed_and_warped(page: Page) -> None:
    page.click("axial", 0.5, 0.5)
    fixed, warped = page.pixels("axial", 0), page.pixels("axial", 1)
    assert page.texts("#axial figcaption") == ["fixed", "warped"]
    page.press(Keys.SPACE)
    assert page.texts("#axial figure:not([hidden]) figcaption") == ["warped"]
    second = page.pixels("axial")
    page.press(Keys.SPACE)
    assert page.texts("#axial figure:not([hidden]) figcaption") == ["fixed"]
    first = page.pixels("axial")
    assert apart(first, second) > 10 * SAME
    # The same pictures as side by side, larger.
    assert abs(first.mean() - fixed.mean()) < abs(first.mean() - warped.mean())
    assert abs(second.mean() - warped.mean()) < abs(second.mean() - fixed.mean())
    page.find("#swap").click()
    assert page.find("#now").text == "warped"
    page.choose(other="moving")
    assert page.find("#now").text == "moving at affine start"
    assert apart(page.pixels("axial"), second) > 10 * SAME


def test_a_space_bar_held_down_does_not_flash(page: Page) -> None:
    page.click("axial", 0.5, 0.5)
    shown = [page.texts("#axial figure:not([hidden]) figcaption")]
    for repeat in (False, True, True):
        event = f"new KeyboardEvent('keydown', {{key: ' ', repeat: {str(repeat).lower()}, bubbles: true}})"
        page.browser.execute_script(f"document.querySelector('#axial canvas').dispatchEvent({event})")
        shown.append(page.texts("#axial figure:not([hidden]) figcaption"))
    assert shown == [["fixed", "warped"], *[["warped"]] * 3]


def test_a_wheel_steps_slices_by_its_notches_and_a_trackpad_by_how_far_it_scrolls(page: Page) -> None:
    page.click("axial", 0.5, 0.5)
    begin = page.at()[2]

    def scroll(*pixels: tuple[int, int], mode: int = 0) -> int:
        """So many slices further up."""
        before = page.at()[2]
        events = [
            f"new WheelEvent('wheel', {{deltaX: {right}, deltaY: {down}, deltaMode: {mode}, bubbles: true}})"
            for right, down in pixels
        ]
        lines = [f"document.querySelector('#axial canvas').dispatchEvent({event});" for event in events]
        page.browser.execute_script("".join(lines))
        return page.at()[2] - before

    assert scroll((0, -120)) == 1
    assert scroll((0, 120), (0, 120)) == -2
    assert scroll((50, 0), (-50, 0)) == 0
    assert scroll(*[(0, -4)] * 21) == 3  # one at once, and one for each 40 pixels more
    assert scroll((0, 3), (0, 3), mode=1) == -2  # lines
    assert page.at()[2] == begin


def test_sliders_and_the_readout_are_said_to_who_cannot_see_them(page: Page) -> None:
    page.click("axial", 0.5, 0.5)
    at, size = page.at()[2], page.find("#axial input").get_property("max")
    assert page.find("#axial input").get_attribute("aria-valuetext") == f"slice {at + 1} of {int(size) + 1}"
    assert page.find("#readout").get_attribute("role") == "status"


def test_blinking_by_itself_begins_and_ends(page: Page) -> None:
    page.choose(mode="blink")
    page.find("#play").click()
    for name in ("warped", "fixed"):
        WebDriverWait(page.browser, 20, 0.05).until(lambda _, name=name: page.find("#now").text == name)
    page.find("#play").click()
    stopped = page.find("#now").text
    assert page.browser.execute_async_script("setTimeout(arguments[0], 1600)") is None
    assert page.find("#now").text == stopped


def test_slider_uncovers_one_image_over_the_other(page: Page) -> None:
    page.choose(crosshair=False, labels=False, mode="blink")
    fixed = page.everything()
    page.find("#swap").click()
    warped = page.everything()
    page.choose(mode="wipe", wipe=100.0)
    assert all(apart(page.pixels(plane), fixed[plane]) < SAME for plane in PLANES)
    page.choose(wipe=0.0)
    part = slice(20, None)  # beyond the knob
    assert all(apart(page.pixels(plane)[:, part], warped[plane][:, part]) < SAME for plane in PLANES)
    # Drag the edge from the left to three quarters.
    canvas = page.canvas("axial")
    width = canvas.size["width"]
    actions = ActionChains(page.browser).move_to_element_with_offset(canvas, 3 - width // 2, 0).click_and_hold()
    actions.move_to_element_with_offset(canvas, width // 4, 0).release().perform()
    assert float(page.find("[name=wipe]").get_property("value")) == pytest.approx(75, abs=1)
    dragged, middle = page.pixels("axial"), width // 2
    assert apart(dragged[:, :middle], fixed["axial"][:, :middle]) < SAME
    assert apart(dragged[:, -part.start :], warped["axial"][:, -part.start :]) < SAME


def test_difference_is_smaller_after(page: Page) -> None:
    page.choose(mode="difference", crosshair=False, labels=False)
    assert page.texts("#axial figcaption") == ["difference at affine start", "difference after"]
    for plane in PLANES:
        assert page.pixels(plane, 1).mean() < 0.7 * page.pixels(plane, 0).mean()


def test_difference_is_orange_where_brighter_and_blue_where_darker(browser: Chrome, tmp_path: Path) -> None:
    """Two balls that change places, at the patient's right and left, in images of one brightness."""
    grid = make_grid((32, 24, 20))
    apart_mm = world_points(grid) - np.array([[[[8.0, 0, 0]]]])
    left = np.linalg.norm(apart_mm, axis=-1) < 5
    image = 0.5 + 0.5 * (left.astype(np.float32) - left[::-1])
    fixed, moving = (
        Scan(torch.from_numpy(np.ascontiguousarray(array))[None, None], grid, Path("balls.nii.gz"))
        for array in (image, image[::-1])
    )
    write(still(fixed, moving), tmp_path, {})
    page = Page(browser, tmp_path)
    page.choose(mode="difference", crosshair=False)
    for which in (0, 1):
        red, _, blue = np.moveaxis(page.pixels("axial", which), -1, 0)
        height, width = red.shape
        row, quarter = height // 2, width // 4
        assert red[row, quarter] > 0.9 > 0.4 > blue[row, quarter]
        assert blue[row, -quarter] > 0.9 > 0.4 > red[row, -quarter]
        assert red[:, width // 2].max() < 0.02
        assert red[: height // 8].max() < 0.02


def test_deformation_read_out_is_that_of_the_place(browser: Chrome, tmp_path: Path) -> None:
    """A stretch by a fifth from the middle, where the views and the field are coarser than the scan."""
    grid = make_grid((150, 30, 20), (0.8, 1.5, 3.0))
    result = still(blobs(grid, 1), blobs(grid, 2))
    stretched = torch.zeros_like(result.deformation)
    stretched[0, 0] = torch.from_numpy(0.2 * world_points(grid)[..., 0])
    write(replace(result, deformation=stretched), tmp_path, {})
    page = Page(browser, tmp_path)
    for x in (0.02, 0.3, 0.6, 0.97):
        page.click("axial", x, 0.5)
        words = re.match(r"(?:right|left) ([\d.]+), .* deformation ([\d.]+) mm · det J ([\d.]+)", readout(page))
        assert words is not None
        assert float(words[2]) == pytest.approx(0.2 * float(words[1]), abs=0.5)
        assert float(words[3]) == pytest.approx(1.2, abs=0.02)


def test_grid_is_drawn_where_the_deformation_reads(browser: Chrome, tmp_path: Path) -> None:
    """A shift to the patient's left takes the whole grid to the right of the picture, and leaves its place empty."""
    grid = make_grid((60, 40, 30))
    result = still(blobs(grid, 1), blobs(grid, 2))
    shifted = torch.zeros_like(result.deformation)
    shifted[:, 0] = 15.0
    write(replace(result, deformation=shifted), tmp_path, {})
    page = Page(browser, tmp_path)
    page.choose(crosshair=False, grid=True)
    for plane in ("axial", "coronal"):
        red, _, blue = np.moveaxis(page.pixels(plane), -1, 0)
        yellow = np.flatnonzero((red - blue > 0.2).any(0)) / red.shape[1]
        assert yellow.min() == pytest.approx(15.5 / 60, abs=0.02)
        assert yellow.max() > 0.98
    red, _, blue = np.moveaxis(page.pixels("sagittal"), -1, 0)
    assert np.flatnonzero((red - blue > 0.2).any(0)).min() < 0.03 * red.shape[1]


@pytest.mark.parametrize(("name", "words"), [("grid", "regular grid"), ("jacobian", "det J 0"), ("labels", "warped")])
def test_overlays_come_and_go_with_their_legend(page: Page, name: str, words: str) -> None:
    page.choose(**{name: False})
    without, legend = page.everything(), page.find("#legend").text
    page.choose(**{name: True})
    assert all(apart(page.pixels(plane), without[plane]) > 10 * SAME for plane in PLANES)
    assert words in page.find("#legend").text
    assert words not in legend
    page.choose(**{name: False})
    assert all(apart(page.pixels(plane), without[plane]) < SAME for plane in PLANES)


def test_folds_are_marked_and_found(browser: Chrome, tmp_path: Path) -> None:
    grid = make_grid((24, 26, 28))
    result = still(blobs(grid, 1), blobs(grid, 2))
    folded = result.deformation.clone()
    folded[0, 0, 5, 6, 7] = 5.0
    write(replace(result, deformation=folded), tmp_path, {})
    page = Page(browser, tmp_path)
    page.choose(crosshair=False)
    page.find("[data-place=jacobian]").click()
    assert "fold" in readout(page)
    # The grid's first axes run to left and posterior.
    assert np.abs(np.array(page.at()) - [23 - 5, 25 - 6, 7]).max() <= 1
    magenta = np.array([255, 43, 214]) / 255
    pixels = page.pixels("axial")
    assert (np.abs(pixels - magenta).max(-1) < 0.02).any()
    page.choose(folds=False)
    assert not (np.abs(page.pixels("axial") - magenta).max(-1) < 0.02).any()
