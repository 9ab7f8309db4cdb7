"""Peers: their fields are read as they meant them, and a missing one is said in a line."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from geometry import apply_world, draw_head, field_transform, from_image, make_grid, to_image, waves, world_points
from iregzoo.errors import InputError
from iregzoo.peers import PEERS, Peer, describe, find_peers, register_with
from iregzoo.quality import compare
from iregzoo.register import Scans
from iregzoo.similarity import mse
from iregzoo.space.grid import Grid
from iregzoo.space.scan import Scan

# From a place in the fixed scan to the same place of the head in the moving scan: stretched and shifted.
AFFINE = np.array([[1.08, 0, 0, 9], [0, 0.96, 0, -7], [0, 0, 0.95, 5], [0, 0, 0, 1.0]])


@pytest.fixture(params=sorted(PEERS))
def peer(request: pytest.FixtureRequest) -> Peer:
    pytest.importorskip(PEERS[request.param].module)
    (found,) = find_peers([request.param])
    return found


@pytest.fixture(scope="module")
def scans() -> Scans:
    """A head on two grids of different shape, spacing and orientation."""
    fixed = make_grid((40, 44, 36), (4.4, 4.6, 5.0), degrees=(6, 0, -9))
    moving = make_grid((46, 38, 42), (4.9, 4.5, 4.6), axes=(1, 0, 2), signs=(-1, 1, 1), centre=(3.0, -2.0, 5.0))

    def scan(grid: Grid, to_head: np.ndarray[Any, Any] | None, name: str) -> Scan:
        return Scan(draw_head(grid, to_head), grid, Path(name))

    return Scans(scan(fixed, None, "fixed.nii.gz"), scan(moving, np.linalg.inv(AFFINE), "moving.nii.gz"))


def test_a_peer_finds_a_known_affine_in_lps_millimetres(peer: Peer, scans: Scans) -> None:
    result, seconds = register_with(peer, scans)
    inside = scans.fixed.data[0, 0].numpy() > 0.1 * float(scans.fixed.data.max())
    places = world_points(result.frame.fixed)[inside]
    expected = apply_world(AFFINE, places)
    moved = np.linalg.norm(expected - places, axis=-1)
    assert moved.mean() > 10
    left = np.linalg.norm(apply_world(result.frame.start, places) - expected, axis=-1)
    assert left.mean() < 0.4 * moved.mean()  # less than a voxel; with a sign wrong it were more than moved
    assert seconds > 0
    assert result.init == f"{peer.name}'s own"


def test_a_peers_field_brings_the_images_nearer_than_its_affine(peer: Peer, scans: Scans) -> None:
    """On a grid of which no axis has whole cells of ConvexAdam's; with an axis or a sign wrong they were farther."""
    fixed = make_grid((47, 41, 45), (3.1, 3.6, 3.3), axes=(2, 0, 1), signs=(1, -1, 1), degrees=(0, 8, 0))
    moved = field_transform(waves(fixed, reach_mm=9.0, length_mm=90.0), fixed)
    image = sitk.Resample(to_image(scans.moving.data, scans.moving.grid), fixed.to_sitk(np.zeros(fixed.shape)), moved)
    result, _ = register_with(peer, Scans(Scan(from_image(image).float(), fixed, Path("fixed.nii.gz")), scans.moving))
    images = compare(result)
    before, after = (float(mse(images.fixed, each)) for each in (images.start, images.after))
    assert after < 0.5 * before


def test_ants_warps_as_we_do_and_does_so_again(scans: Scans, monkeypatch: pytest.MonkeyPatch) -> None:
    ants = pytest.importorskip("ants")
    (peer,) = find_peers(["ants-syn"])
    run, own = ants.registration, []

    def registration(*images: Any, **settings: Any) -> Any:
        found = run(*images, **settings)
        own.append(found["warpedmovout"].numpy())
        return found

    monkeypatch.setattr(ants, "registration", registration)
    warped = [register_with(peer, scans)[0].warped[0, 0].numpy() for _ in range(2)]
    np.testing.assert_allclose(warped[0], own[0], atol=1e-5 * own[0].max())
    np.testing.assert_array_equal(warped[0], warped[1])


def test_greedy_warps_as_we_do_and_prints_nothing(
    scans: Scans, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    greedy = pytest.importorskip("picsl_greedy")
    (peer,) = find_peers(["greedy"])
    make, tools = greedy.Greedy3D, []
    monkeypatch.setattr(greedy, "Greedy3D", lambda: tools.append(make()) or tools[0])
    result, _ = register_with(peer, scans)
    assert "".join(capfd.readouterr()) == ""
    tools[0].execute("-d 3 -V 0 -rf fixed -rm moving own -r warp affine", own=None)
    own = sitk.GetArrayFromImage(tools[0]["own"]).transpose(2, 1, 0)
    inner = (slice(4, -4),) * 3  # at the faces of the moving scan greedy fades to 0, and ITK and we do not
    difference = np.abs(result.warped[0, 0].numpy() - own)[inner]
    assert np.quantile(difference, 0.99) < 0.005 * own.max()
    capfd.readouterr()


def test_a_peer_says_what_was_run(peer: Peer) -> None:
    said = describe(peer)
    assert said["package"] == peer.package
    assert said["version"][0].isdigit()
    assert said["settings"]


def test_an_unknown_peer_is_refused() -> None:
    with pytest.raises(InputError, match="'elastix' is unknown; choose from ants-syn, greedy, convexadam"):
        find_peers(["elastix"])


@pytest.mark.parametrize("name", sorted(PEERS))
def test_a_peer_that_is_not_installed_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PEERS[name].module, None)  # what import finds where there is no such module
    with pytest.raises(InputError, match=r'pip install "iregzoo\[peers\]"') as error:
        find_peers([name])
    assert len(str(error.value).splitlines()) == 1


def test_a_peer_that_gives_up_says_so_in_a_line(scans: Scans) -> None:
    def give_up(_: Scans) -> Any:
        raise RuntimeError("Registration failed\nwith error code 1")

    with pytest.raises(InputError, match=r"greedy failed on moving.nii.gz \(Registration failed with error code 1\)"):
        register_with(Peer("greedy", "", "", "", give_up), scans)
