"""A browser without a window, and a result to show in it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from iregzoo.phantom import make_phantom
from iregzoo.register import read_scans, register
from iregzoo.results import provenance, write
from iregzoo.zoo import load
from pages import Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-dev-shm-usage")


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """Chromium without a window; a test that asks for it is skipped where there is none."""
    binary, driver = next(filter(None, map(shutil.which, BROWSERS)), None), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("install chromium and chromedriver to run this test")
    options = ChromeOptions()
    options.binary_location = binary
    for argument in (*ARGUMENTS, f"user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = Chrome(options, Service(driver))
    yield chrome
    chrome.quit()


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registered phantom, with labels and the inverse."""
    files, method = make_phantom(tmp_path_factory.mktemp("phantom")), load("iirp")
    scans = read_scans(files.fixed, files.moving, files.fixed_labels, files.moving_labels)
    folder = tmp_path_factory.mktemp("result")
    write(register(scans, method, init="none"), folder, provenance(method), inverse=True)
    return folder


@pytest.fixture
def page(browser: Chrome, phantom: Path) -> Iterator[Page]:
    shown = Page(browser, phantom)
    yield shown
    assert browser.get_log("browser") == []
