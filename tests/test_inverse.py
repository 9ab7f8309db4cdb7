"""``iregzoo register --inverse`` on real scans, with every bundle: there and back again, by the files alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from geometry import Array, apply_world, from_image, move_all
from iregzoo.apply import apply_to_image
from iregzoo.fields import inverse_error
from iregzoo.register import read_scans, register
from iregzoo.results import write
from iregzoo.space.grid import Grid
from iregzoo.space.points import reached
from iregzoo.space.transforms import move, read_chain
from iregzoo.zoo import bundles, load

NAMES = [bundle.name for bundle in bundles() if bundle.weights]


def voxels(path: Path) -> Array:
    return from_image(sitk.ReadImage(str(path)))[0, 0].double().numpy()


@pytest.mark.parametrize("name", NAMES)
def test_places_come_back_by_the_files_and_exactly_point_by_point(name: str, test_data: Path, tmp_path: Path) -> None:
    folder = test_data / "hippocampus"
    fixed, moving = json.loads((folder / "splits.json").read_text("utf-8"))["val"][2:4]
    result = register(read_scans(*(folder / "images" / f"{scan}.nii.gz" for scan in (fixed, moving))), load(name))
    report = write(result, tmp_path, {}, inverse=True)
    grids = [Grid.of(sitk.ReadImage(str(tmp_path / f"{way}warped.nii.gz"))) for way in ("", "inverse_")]
    index = np.random.default_rng(5).uniform(0, np.array(grids[0].shape) - 1, (4000, 3))
    places = apply_world(grids[0].affine, index)
    forward, backward = (sitk.ReadTransform(str(tmp_path / f"{way}transform.h5")) for way in ("", "inverse_"))
    there = move_all(forward, places)
    stayed = reached(grids[1], torch.from_numpy(there)).numpy()
    assert stayed.mean() > 0.8
    assert np.linalg.norm(there - places, axis=1).mean() > 2

    error = np.linalg.norm(move_all(backward, there) - places, axis=1)[stayed]
    said = report["inverse_error_mean_mm"], report["inverse_error_max_mm"]
    print(
        f"{name}: files {error.mean():.4f}, at most {error.max():.3f} mm; the report says {said[0]:.4f}, {said[1]:.3f}"
    )
    assert error.mean() < 0.1
    assert said[0] == pytest.approx(error.mean(), rel=0.15)
    assert error.max() <= 1.2 * said[1]
    own = result.registration.inverse
    assert report["inverse"] == (
        "point by point" if own is None else "point by point, starting from the method's own inverse"
    )
    if own is not None:  # the method's own is not as good: interpolation at each of its levels
        assert 3 * said[0] < float(inverse_error(result.registration.displacement, own).mean())

    chain = read_chain([tmp_path / "transform.h5"])
    np.testing.assert_allclose(move(chain, torch.from_numpy(places)).points, there, atol=1e-9)
    back = move(chain.inverse(), torch.from_numpy(there))
    error = np.linalg.norm(back.points.numpy() - places, axis=1)
    print(f"{name}: point by point {error.mean():.4f}, at most {error.max():.3f} mm")
    # Next to a fold another place goes to the same one; all go where they should.
    assert error.mean() < 0.02
    assert np.median(error) < 0.002
    assert back.error[~back.outside].max() < 0.5


def test_the_moving_scan_comes_along_as_registered_and_as_ants_has_it(test_data: Path, tmp_path: Path) -> None:
    folder = test_data / "hippocampus"
    names = json.loads((folder / "splits.json").read_text("utf-8"))["val"][2:4]
    fixed, moving = (folder / "images" / f"{name}.nii.gz" for name in names)
    labels = folder / "labels" / moving.name
    write(register(read_scans(fixed, moving, None, labels), load("iirp")), tmp_path, {})
    registered, maps = (voxels(tmp_path / f"warped{kind}.nii.gz") for kind in ("", "_labels"))
    for file in ("transform.h5", "displacement.nii.gz"):
        chain = read_chain([tmp_path / file])
        apply_to_image(chain, moving, fixed, tmp_path / "again.nii.gz")
        apply_to_image(chain, labels, fixed, tmp_path / "again_labels.nii.gz")
        again = voxels(tmp_path / "again.nii.gz")
        np.testing.assert_allclose(again, registered, atol=1e-4 * registered.max())
        assert (voxels(tmp_path / "again_labels.nii.gz") != maps).mean() < 1e-3
        ants = pytest.importorskip("ants", reason="needs antspyx, of the extra peers")
        theirs = ants.apply_transforms(
            *(ants.image_read(str(path)) for path in (fixed, moving)), [str(tmp_path / file)]
        )
        np.testing.assert_allclose(again, theirs.numpy(), atol=1e-4 * registered.max())
