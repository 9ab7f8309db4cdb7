"""What every test may ask for, and what no test may see."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Several workers with several threads each would fight over the cores; set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def test_data() -> Path:
    """The folder of real scans; a test that asks for it is skipped where there is none."""
    folder = os.environ.get("IREGZOO_TEST_DATA")
    if not folder:
        pytest.skip("set IREGZOO_TEST_DATA to the folder of real scans to run this test")
    return Path(folder)


@pytest.fixture(scope="session")
def anatomies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three people's label maps."""
    from anatomies import write_anatomies

    return write_anatomies(tmp_path_factory.mktemp("anatomies"))


@pytest.fixture(scope="session", autouse=True)
def _no_bundles_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Test the bundles of this checkout, whatever the user has downloaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IREGZOO_HOME", str(tmp_path_factory.mktemp("home")))
        yield
