"""Networks in bfloat16: only where asked for or computed, never in training, and near to float32."""

import numpy as np
import pytest
import torch

from iregzoo import fields, zoo
from iregzoo import precision as precisions
from iregzoo.errors import InputError
from iregzoo.iteration import FixedIterations
from iregzoo.phantom import make_phantom
from iregzoo.precision import as_precision, autocast, computes_bfloat16, resolve
from iregzoo.register import read_scans
from iregzoo.space.frame import make_frame, network_input

CPU = torch.device("cpu")


def product_dtype() -> torch.dtype:
    return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


@pytest.mark.parametrize(
    ("name", "computes", "expected"),
    [
        ("float32", True, torch.float32),
        ("bfloat16", False, torch.bfloat16),
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
    ],
)
def test_auto_is_what_the_device_computes(
    monkeypatch: pytest.MonkeyPatch, name: str, computes: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(precisions, "computes_bfloat16", lambda device: computes)
    with torch.inference_mode(), autocast(CPU, as_precision(name)):
        assert product_dtype() == expected


def test_training_chooses_for_itself() -> None:
    with autocast(CPU, "bfloat16"):
        assert product_dtype() == torch.float32
    with torch.autocast("cpu", torch.bfloat16), autocast(CPU, "float32"):
        assert product_dtype() == torch.bfloat16


def test_a_cpu_is_asked_for_both_kinds_of_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    assert not computes_bfloat16(CPU)
    assert resolve("auto", CPU) == "float32"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert computes_bfloat16(CPU)
    assert not computes_bfloat16(torch.device("mps"))


def test_unknown_precisions_are_refused() -> None:
    with pytest.raises(InputError, match="precision 'half' is unknown; choose auto, float32, bfloat16"):
        zoo.load("iirp", precision="half")


def test_users_weights_stay_in_float32_unless_told() -> None:
    network = zoo.untrained(zoo.find("iirp"))
    assert zoo.complete(network, zoo.WeightsCard("mine.pt")).precision == "float32"
    assert zoo.complete(network, zoo.WeightsCard("mine.pt"), "bfloat16").precision == "bfloat16"
    assert zoo.complete(network, zoo.WeightsCard("ours.pt", precision="auto")).precision == "auto"
    assert zoo.complete(network, zoo.WeightsCard("ours.pt", precision="auto"), "float32").precision == "float32"


@pytest.fixture(scope="module")
def small_pair(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Two scans (1, 2, 16, 16, 16) of voxels of 8 mm: what emulates bfloat16 would take minutes for more."""
    phantom = make_phantom(tmp_path_factory.mktemp("phantom"))
    scans = read_scans(phantom.fixed, phantom.moving)
    frame = make_frame(scans.fixed, scans.moving, np.eye(4), spacing=(8, 8, 8), stride=1, minimum=(16, 16, 16))
    assert frame.network.shape == (16, 16, 16)
    return network_input(frame, scans.fixed, scans.moving)


@pytest.mark.parametrize("name", [bundle.name for bundle in zoo.bundles() if bundle.weights])
@torch.inference_mode()
def test_bfloat16_changes_a_field_by_little(name: str, small_pair: torch.Tensor) -> None:
    """By 5 % of it, and less than 0.05 voxel: networks that keep three bits of their weights change it by more."""
    networks = [zoo.load(name, precision=precision).network for precision in ("float32", "bfloat16")]
    full, half = (network.register(small_pair, FixedIterations()).displacement for network in networks)
    assert half.dtype == torch.float32
    moved, changed = fields.length(full).mean(), fields.length(full - half).mean()
    assert moved > 0.1
    assert 0 < changed < min(0.05, 0.05 * moved)
