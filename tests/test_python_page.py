"""docs/python.md: its examples run in their order on a small pair, and what they make is what the page says."""

import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch import Tensor

from geometry import draw_head, from_image, make_grid, to_image
from iregzoo.iteration import TCI, FixedIterations, IterStop
from iregzoo.precision import computes_bfloat16
from iregzoo.similarity import ncc
from iregzoo.template import read_atlas

PAGE = Path(__file__).resolve().parents[1] / "docs/python.md"
FIXED = make_grid((22, 26, 20), (1.0, 1.0, 1.3), degrees=(4, 0, -5))
MOVING = make_grid((20, 24, 24), (1.2, 1.1, 1.0), axes=(0, 2, 1), centre=(4, -3, 2))
TO_HEAD = np.array([[0.95, 0.04, 0, -4], [-0.03, 1.06, 0, 3], [0, 0.02, 1.02, -2], [0, 0, 0, 1.0]])
Names = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a pair of heads on two grids, and their label maps."""
    folder = tmp_path_factory.mktemp("python")
    for name, grid, world in (("fixed", FIXED, None), ("moving", MOVING, TO_HEAD)):
        head = draw_head(grid, world, size=0.13)
        labels = (head > 300).to(torch.uint8) + (head > 700)
        for file, data in ((f"{name}.nii.gz", head), (f"{name}_labels.nii.gz", labels)):
            sitk.WriteImage(to_image(data, grid), str(folder / file))
    return folder


@pytest.fixture(scope="module")
def names(folder: Path) -> Names:
    """What all examples define, run one after the other in a folder of their own."""
    page = PAGE.read_text("utf-8")
    found: Names = {"__name__": "python_page"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for example in re.finditer(r"```python\n(.*?)```", page, re.DOTALL):
            before = page[: example.start(1)].count("\n")
            exec(compile("\n" * before + example[1], str(PAGE), "exec"), found)
    return found


def correlation(first: Tensor, second: Tensor) -> float:
    return float(ncc(first, second))


def test_two_files_are_registered(folder: Path, names: Names) -> None:
    result, scans, report = names["result"], names["scans"], names["report"]
    assert result.warped.shape == result.warped_labels.shape == (1, 1, *FIXED.shape)
    assert result.displacement.shape == result.deformation.shape == (1, 3, *FIXED.shape)
    for tensor in (result.warped, result.displacement, result.deformation):
        assert tensor.dtype == torch.float32
        assert tensor.device.type == "cpu"
    assert result.warped_labels.dtype == torch.int32
    assert result.frame.start.shape == (4, 4)
    assert result.registration.displacement.shape == (1, 3, *result.frame.network.shape)
    assert correlation(result.warped, scans.fixed.data) == pytest.approx(report["ncc_after"], abs=0.01)
    assert 1 - report["ncc_after"] < (1 - report["ncc_start"]) / 2
    assert report["dice_mean"] > report["dice_before_mean"]
    for name in ("warped.nii.gz", "transform.h5"):
        assert (folder / name).read_bytes() == (folder / "result" / name).read_bytes()


def test_the_choices_are_heeded(names: Names) -> None:
    result, chosen = names["result"], names["chosen"]
    assert chosen.init == "given"
    np.testing.assert_array_equal(chosen.frame.start, result.frame.start)
    assert chosen.refinement.steps == 5
    assert all(int(count) <= 3 for count in chosen.registration.iterations)
    assert not torch.equal(chosen.displacement, result.displacement)


def test_scans_from_memory_are_those_of_the_files(names: Names) -> None:
    pair, scans = names["pair"], names["scans"]
    for one, other in ((pair.fixed, scans.fixed), (pair.moving, scans.moving)):
        torch.testing.assert_close(one.data, other.data, rtol=0, atol=0)
        assert one.grid.matches(other.grid)


def test_tensors_are_registered_and_warped(names: Names) -> None:
    shape = names["result"].frame.network.shape
    u, moving, fixed = names["u"], names["moving"], names["fixed"]
    assert names["images"].shape == (1, 2, *shape)
    assert u.shape == (1, 3, *shape)
    torch.testing.assert_close(u, names["registration"].displacement.cpu())
    # The page's last method computes in float32, its first in what the weights say: bfloat16 where that is fast.
    most = {"rtol": 0, "atol": 0.05} if computes_bfloat16(torch.device("cpu")) else {}
    torch.testing.assert_close(u, names["result"].registration.displacement, **most)
    assert names["cropped"].shape == (1, 3, *shape[:2], shape[2] - 3)
    assert 1 - correlation(names["warped"], fixed) < (1 - correlation(moving, fixed)) / 2
    assert names["inverse_error"](u, names["back"]).mean() < 0.05
    assert names["once"].abs().mean() < 0.05
    assert names["determinant"].shape == (1, *shape)
    before = names["dice"](names["moving_labels"], names["fixed_labels"], labels=[1, 2])
    assert all(names["overlap"][label] > before[label] for label in (1, 2))


def test_many_pairs_go_on_after_one_that_fails(folder: Path, names: Names) -> None:
    assert list(names["reports"]) == [0]
    assert (folder / "pairs/0/report.json").is_file()
    both = names["both"]
    assert both.displacement.shape[0] == 2
    torch.testing.assert_close(both.displacement[:1], names["u"], rtol=0, atol=1e-3)


def test_fields_agree_between_tools(folder: Path, names: Names) -> None:
    result, transform, field = names["result"], names["transform"], names["field"]
    written = from_image(sitk.ReadImage(str(folder / "warped.nii.gz")))
    torch.testing.assert_close(from_image(names["resampled"]), written, rtol=0, atol=0.2)  # of 850
    for point in names["points"].tolist():
        np.testing.assert_allclose(field.TransformPoint(point), transform.TransformPoint(point), atol=0.01)
    torch.testing.assert_close(names["read_back"], result.displacement)
    np.testing.assert_array_equal(names["in_nibabel"], names["vectors"])
    stored = nib.load(folder / "deformation.nii.gz").get_fdata()[:, :, :, 0]
    np.testing.assert_allclose(stored, result.deformation[0].movedim(0, -1), atol=1e-4)
    assert torch.equal(names["labels_too"], result.warped_labels)


def test_the_inverse_leads_back(names: Names) -> None:
    points = names["points"]
    expected = [names["transform"].TransformPoint(point) for point in points.tolist()]
    np.testing.assert_allclose(names["on_moving"], expected, atol=1e-9)
    assert (names["on_moving"] - points).norm(dim=1).min() > 1
    torch.testing.assert_close(names["on_fixed"], points, rtol=0, atol=0.002)
    moving = names["scans"].moving.data
    assert names["backward"].shape == (1, 3, *MOVING.shape)
    assert correlation(names["fixed_on_moving"], moving) > names["report"]["ncc_before"] + 0.05


def test_losses_have_gradients(names: Names) -> None:
    moving, fixed, velocity = names["moving"], names["fixed"], names["velocity"].detach()
    warped = names["warp"](moving, names["integrate"](velocity))
    assert names["local_ncc"](fixed, warped) > 1.05 * names["local_ncc"](fixed, moving)
    assert set(names["terms"]) == {"loss", "similarity", "smoothness", "overlap"}
    assert all(parameter.grad is not None for parameter in names["network"].parameters())


def test_controllers_steer(names: Names) -> None:
    iterations = {kind: [int(n) for n in one.iterations] for kind, one in names["steered"].items()}
    assert set(iterations[FixedIterations]) == {2}
    assert min(iterations[TCI]) >= 3
    assert iterations[IterStop] != iterations[TCI]
    level = names["level"]
    assert level.displacement.shape == names["u"].shape
    assert 1 <= int(level.iterations) <= 4
    assert level.scores[0] > ncc(names["moving"], names["fixed"])


def test_monai_gives_the_same_files(folder: Path, names: Names) -> None:
    assert names["sample"]["pred"].shape == (3, *names["result"].frame.network.shape)
    assert (folder / "through_monai" / "transform.h5").is_file()
    found = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "through_a_bundle" / "displacement.nii.gz")))
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "result" / "displacement.nii.gz")))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_group_gets_a_template(folder: Path, names: Names) -> None:
    assert names["template"].image.shape == names["labels"].shape == (1, 1, *names["group"].grid.shape)
    assert [row["name"] for row in names["rows"]] == ["a", "b"]
    assert min(row["dice"] for row in names["rows"]) > 0.8
    assert read_atlas(str(folder / "atlas")).names == {1: "rim", 2: "core"}
