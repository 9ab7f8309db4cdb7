"""What every test may ask for."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def test_data() -> Path:
    """The folder of real scans; a test that asks for it is skipped where there is none."""
    folder = os.environ.get("IREGZOO_TEST_DATA")
    if not folder:
        pytest.skip("set IREGZOO_TEST_DATA to the folder of real scans to run this test")
    return Path(folder)
