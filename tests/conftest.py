"""What every test may ask for, and what no test may see."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from iregzoo.phantom import Phantom
    from releases import Downloads, Release

# Several workers with several threads each would fight over the cores; set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _no_threads_of_the_last_test() -> Iterator[None]:
    """Commands set the threads of their process. A test after them is to be as it is by itself: ANTs repeats itself
    in one thread alone."""
    import torch

    yield
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture
def test_data() -> Path:
    """The folder of real scans; a test that asks for it is skipped where there is none."""
    folder = os.environ.get("IREGZOO_TEST_DATA")
    if not folder:
        pytest.skip("set IREGZOO_TEST_DATA to the folder of real scans to run this test")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def anatomies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three people's label maps."""
    from anatomies import write_anatomies

    return write_anatomies(tmp_path_factory.mktemp("anatomies"))


@pytest.fixture(scope="session")
def small_phantom(tmp_path_factory: pytest.TempPathFactory) -> "Phantom":
    """Every second voxel of the package's phantom, as if they were 1 mm apart: an eighth of the work."""
    import SimpleITK as sitk

    from iregzoo.phantom import make_phantom

    whole = make_phantom(tmp_path_factory.mktemp("phantom"))
    for path in (whole.fixed, whole.moving, whole.fixed_labels, whole.moving_labels):
        image = sitk.ReadImage(str(path))[::2, ::2, ::2]
        image.SetSpacing((1.0, 1.0, 1.0))
        sitk.WriteImage(image, str(path))
    return replace(whole, displacement=whole.displacement[..., ::2, ::2, ::2] / 2)


@pytest.fixture(scope="session", autouse=True)
def _no_bundles_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Test the bundles of this checkout, whatever the user has downloaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IREGZOO_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture
def release() -> "Iterator[Release]":
    """A server with the repository's own iirp."""
    from releases import BUNDLES, VERSION, archive, serve

    with serve() as server:
        server.publish("iirp", VERSION, archive(BUNDLES / "iirp"))
        yield server


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> "Downloads":
    """Downloads into a user's folder of the test's own, which soon give up."""
    from iregzoo import transfer
    from releases import Downloads

    monkeypatch.setenv("IREGZOO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("IREGZOO_SOURCE", raising=False)
    monkeypatch.setattr(transfer, "TIMEOUT", 5.0)
    monkeypatch.setattr(transfer, "PAUSE", 0.01)
    return Downloads(monkeypatch, capsys, tmp_path / "home")


@pytest.fixture
def former(downloads: "Downloads", tmp_path: Path) -> dict[str, str]:
    """The files of an older bundle that was installed before."""
    from releases import archive, serve, tree, variant

    with serve() as server:
        server.publish("iirp", "0.0.1", archive(variant(tmp_path, "0.0.1")))
        downloads.works("--version", "0.0.1", source=server.url)
    return tree(downloads.place)
