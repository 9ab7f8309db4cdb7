"""A report in a browser, and pairs that nothing is done to."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.image import imread
from numpy.typing import NDArray
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from iregzoo.register import Result, Scans, finish
from iregzoo.registration import Registration
from iregzoo.space.frame import Frame
from iregzoo.space.grid import Grid
from iregzoo.space.scan import Scan

PLANES = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}
SAME = 1e-4  # mean difference of pictures in [0, 1]: a browser rounds now and then


class Page:
    """A report in a browser."""

    def __init__(self, browser: Chrome, folder: Path, *, width: int = 1280, height: int = 900) -> None:
        self.browser = browser
        self.report = json.loads((folder / "report.json").read_text("utf-8"))
        self.report.pop("bytes", None)  # of the page, too: only the file tells them
        phone = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        browser.get_log("browser")
        browser.get((folder / "report.html").as_uri())
        WebDriverWait(browser, 60).until(lambda _: self.find("#readout").text)

    def find(self, css: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, css)

    def texts(self, css: str) -> list[str]:
        return [found.text for found in self.browser.find_elements(By.CSS_SELECTOR, css)]

    def canvas(self, plane: str, which: int = 0) -> WebElement:
        return self.browser.find_elements(By.CSS_SELECTOR, f"#{plane} canvas")[which]

    def pixels(self, plane: str, which: int = 0) -> NDArray[np.float32]:
        """What a canvas shows: (height, width, 3) in [0, 1]."""
        url = self.browser.execute_script("return arguments[0].toDataURL()", self.canvas(plane, which))
        image: NDArray[np.float32] = imread(io.BytesIO(base64.b64decode(url.split(",")[1])))[..., :3]
        return image

    def everything(self) -> dict[str, NDArray[np.float32]]:
        return {plane: self.pixels(plane) for plane in PLANES}

    def at(self) -> list[int]:
        """The crosshair's voxel: slices of the sagittal, coronal and axial plane."""
        return [int(self.find(f"#{plane} input").get_property("value")) for plane in reversed(PLANES)]

    def choose(self, **wishes: str | bool | float) -> None:
        """Set the form's fields, as a person would: a click for what is chosen, a key or two for the slider."""
        for name, value in wishes.items():
            if isinstance(value, bool):
                box = self.find(f"[name={name}]")
                if box.is_selected() != value:
                    box.click()
            elif isinstance(value, str):
                self.find(f"[name={name}][value={value}]").find_element(By.XPATH, "..").click()
            else:
                self.find(f"[name={name}]").send_keys(Keys.HOME if value == 0 else Keys.END)

    def click(self, plane: str, x: float, y: float) -> None:
        """Click at a part of a picture's width and height."""
        canvas = self.canvas(plane)
        size = canvas.size
        right, down = round((x - 0.5) * size["width"]), round((y - 0.5) * size["height"])
        ActionChains(self.browser).move_to_element_with_offset(canvas, right, down).click().perform()

    def press(self, *keys: str) -> None:
        ActionChains(self.browser).send_keys(*keys).perform()


def blobs(grid: Grid, seed: int, name: str = "scan.nii.gz") -> Scan:
    noise = torch.rand(1, 1, 6, 6, 6, generator=torch.manual_seed(seed))
    return Scan(torch.nn.functional.interpolate(noise, grid.shape, mode="trilinear"), grid, Path(name))


def still(fixed: Scan, moving: Scan) -> Result:
    """A pair that nothing is done to."""
    frame = Frame(fixed.grid, moving.grid, fixed.grid, np.eye(4))
    return finish(Scans(fixed, moving), frame, "none", Registration(torch.zeros(1, 3, *fixed.grid.shape)))


def apart(first: NDArray[Any], second: NDArray[Any]) -> float:
    return float(np.abs(first - second).mean())
