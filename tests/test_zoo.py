"""Bundles and weights: what is found, what is refused, and the import of a published checkpoint."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iregzoo import states, zoo
from iregzoo.errors import InputError
from iregzoo.iteration import TCI, FixedIterations
from iregzoo.registration import PairNetwork

ROOT = Path(__file__).resolve().parents[1]
State = dict[str, Tensor]
Change = Callable[[State], object]


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user's folder of bundles that is the test's own."""
    folder = tmp_path / "home"
    monkeypatch.setenv("IREGZOO_HOME", str(folder))
    return folder


def make_state(seed: int = 0) -> State:
    torch.manual_seed(seed)
    definition = json.loads((ROOT / "bundles/iirp/configs/inference.json").read_text("utf-8"))["network_def"]
    state: State = zoo.build(definition).state_dict()
    return state


def save(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def install(home: Path, metadata: dict[str, Any] | None = None) -> Path:
    """A copy of the IIRP bundle in the user's folder, with its metadata changed."""
    folder = home / "bundles" / "iirp"
    shutil.copytree(ROOT / "bundles" / "iirp", folder)
    path = folder / "configs/metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **(metadata or {})}))
    return folder


# --- finding


def test_bundle_may_be_a_folder_of_ones_own(tmp_path: Path) -> None:
    folder = shutil.copytree(ROOT / "bundles" / "iirp", tmp_path / "mine")
    method = zoo.load(str(folder))
    assert (method.bundle.name, method.bundle.path) == ("mine", folder)
    with pytest.raises(InputError, match=r"available: .*, or the folder of a bundle of your own"):
        zoo.find(str(tmp_path))


def test_bundles_of_the_checkout_are_found_by_name() -> None:
    folders = sorted(path.parents[1].name for path in (ROOT / "bundles").glob("*/configs/metadata.json"))
    assert [bundle.name for bundle in zoo.bundles()] == folders
    assert "iirp" in folders
    assert zoo.find("iirp").path == ROOT / "bundles" / "iirp"


def test_bundle_of_the_users_folder_comes_first(home: Path) -> None:
    folder = install(home, {"version": "9.9.9"})
    assert zoo.find("iirp").path == folder
    assert zoo.find("iirp").metadata["version"] == "9.9.9"
    assert [bundle.name for bundle in zoo.bundles()].count("iirp") == 1


def test_newest_of_a_name_comes_first_by_numbers(home: Path) -> None:
    shipped = ROOT / "bundles" / "iirp"
    own = zoo.read_bundle(shipped).version
    folder = install(home)
    for version, path in (("0.0.1", shipped), (own, folder), ("10.0.0", folder), ("mine", folder), ("", folder)):
        (folder / "configs/metadata.json").write_text(json.dumps({"version": version}))
        assert zoo.find("iirp").path == path, version


@pytest.mark.parametrize(
    ("older", "newer"), [("0.9.0", "0.10.0"), ("0.1", "0.1.1"), ("9.0.0", "10.0.0"), ("1.x", "0.0.0"), ("", "0")]
)
def test_versions_are_compared_as_numbers(older: str, newer: str) -> None:
    assert zoo.numbers(older) < zoo.numbers(newer)


def test_unknown_bundle_is_refused_with_what_there_is() -> None:
    with pytest.raises(InputError, match=r"'n{300}' is unknown; available"):
        zoo.find("n" * 300)
    with pytest.raises(InputError, match=r"'voxelmorph' is unknown; available: .*iirp"):
        zoo.find("voxelmorph")


def test_target_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(InputError, match=r"'iregzoo\.networks\.Nothing' cannot be imported"):
        zoo.build({"_target_": "iregzoo.networks.Nothing"})


def test_nested_definition_is_built() -> None:
    network = zoo.build(
        {
            "_target_": "iregzoo.registration.PairNetwork",
            "network": {"_target_": "iregzoo.networks.IIRPNet", "channels": [4, 4], "widths": [6, 6]},
        }
    )
    assert isinstance(network, PairNetwork)
    assert network.stride == 2


# --- loading


def test_weights_of_a_bundle_are_loaded_ready_for_inference() -> None:
    method = zoo.load("iirp")
    name = next(iter(method.bundle.weights))
    path = method.bundle.path / method.card.file
    assert (method.weights.name, method.card) == (name, method.bundle.weights[name])
    assert method.weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not method.network.training
    assert not any(parameter.requires_grad for parameter in method.network.parameters())
    expected = torch.load(path, weights_only=True)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in method.network.state_dict().items())


def test_own_file_is_loaded_with_a_card_that_promises_nothing(tmp_path: Path) -> None:
    path = save(make_state(1), tmp_path / "own.pt")
    method = zoo.load("iirp", str(path))
    assert method.weights.name == "own.pt"
    assert method.card.init == "affine"
    assert method.weights.sha256 == states.sha256(path)
    expected = make_state(1)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in method.network.state_dict().items())


def test_weights_that_are_neither_name_nor_file_are_refused() -> None:
    with pytest.raises(InputError, match=r"'liver' are neither one of iirp's \(.*hippocampus.*\) nor a file"):
        zoo.load("iirp", "liver")
    with pytest.raises(InputError, match=r"'l{300}' are neither one of iirp's"):
        zoo.load("iirp", "l" * 300)


def test_bundle_without_weights_asks_for_a_file(home: Path) -> None:
    install(home, {"weights": {}})
    with pytest.raises(InputError, match=r"iirp names no weights .*; give a file"):
        zoo.load("iirp")


def test_weights_that_the_card_names_but_are_not_there_are_refused(home: Path) -> None:
    (install(home) / "models/model.pt").unlink()
    with pytest.raises(InputError, match=r"model\.pt: the weights 'hippocampus' of iirp are missing"):
        zoo.load("iirp", "hippocampus")


def test_weights_of_another_sha256_are_refused(home: Path) -> None:
    metadata = json.loads((ROOT / "bundles/iirp/configs/metadata.json").read_text("utf-8"))
    digest = states.sha256(ROOT / "bundles/iirp/models/model.pt")
    metadata["weights"]["hippocampus"]["sha256"] = digest
    folder = install(home, metadata)
    assert zoo.load("iirp").weights.sha256 == digest
    save(make_state(), folder / "models/model.pt")
    with pytest.raises(InputError, match=rf"model\.pt: sha256 is .*expected {digest[:12]}.*damaged"):
        zoo.load("iirp")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"network": {}}'])
def test_bundle_whose_network_is_not_defined_is_refused(home: Path, content: str | None) -> None:
    config = install(home) / "configs" / "inference.json"
    config.unlink(missing_ok=True)
    if content:
        config.write_text(content)
    with pytest.raises(InputError, match=r"inference\.json: has no readable network_def \(.*get the bundle again"):
        zoo.load("iirp")


def test_hash_of_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^{tmp_path / 'gone'}: cannot be read"):
        states.sha256(tmp_path / "gone")


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_file_is_refused(tmp_path: Path, part: float, zipped: bool) -> None:
    path = tmp_path / "weights.pt"
    torch.save(make_state(), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(InputError, match=r"weights\.pt: is not a readable weights file \(.+\); get it again"):
        zoo.load("iirp", str(path))


@pytest.mark.parametrize("seed", range(0, 60, 3))
def test_random_bytes_are_refused(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "weights.pt"
    generator = torch.manual_seed(seed)
    path.write_bytes(bytes(torch.randint(256, (1 + 5 * seed,), generator=generator).tolist()))
    with pytest.raises(InputError, match=r"weights\.pt: is not a readable weights file"):
        zoo.load("iirp", str(path))


@pytest.mark.parametrize("content", [b"\x8a", b"(R.", b"\x93", b".", b"M"])
def test_bytes_that_break_the_unpickler_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"weights\.pt: is not a readable weights file"):
        zoo.load("iirp", str(path))


class Code:
    """Makes a folder where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("way", ["torch", "pickle"])
def test_code_in_a_file_is_not_run(tmp_path: Path, recwarn: pytest.WarningsRecorder, way: str) -> None:
    path, mark = tmp_path / "weights.pt", tmp_path / "mark"
    content = {**make_state(), "code": Code(mark)}
    if way == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(InputError, match=r"weights\.pt: is not a readable weights file"):
        zoo.load("iirp", str(path))
    assert not recwarn.list  # PyTorch's of the protocol
    assert not mark.exists()
    with path.open("rb") as stream:
        assert b"mkdir" in stream.read()


@pytest.mark.parametrize(
    "content",
    [{}, [], torch.ones(3), {"a": 1}, {"model_state": {}}, {"model_state": 3}, {"network": {}}, {0: torch.ones(3)}],
)
def test_file_without_a_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    path = save(content, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"weights\.pt: holds no state_dict"):
        zoo.load("iirp", str(path))


NAME = "network.encoder.blocks.1.0.weight"


def put(name: str, value: Callable[[Tensor], Tensor]) -> Change:
    return lambda state: state.__setitem__(name, value(state[NAME]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(NAME), rf"has no tensor '{NAME}'"),
        (put("network.extra", lambda tensor: tensor), r"unexpected tensor 'network\.extra'"),
        (put(NAME, lambda tensor: tensor[:5]), rf"'{NAME}' has shape \(5, 8, 3, 3, 3\), expected \(16, 8, 3, 3, 3\)"),
        (put(NAME, lambda tensor: tensor * float("nan")), rf"'{NAME}' holds NaN"),
        (put(NAME, lambda tensor: tensor.clone().index_fill(0, torch.tensor(3), float("inf"))), rf"'{NAME}' holds NaN"),
    ],
    ids=["missing", "foreign", "shape", "nan", "infinite"],
)
def test_tensor_that_does_not_fit_is_named(tmp_path: Path, change: Change, message: str) -> None:
    state = make_state()
    change(state)
    path = save(state, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=rf"weights\.pt: .*{message}"):
        zoo.load("iirp", str(path))


# --- a checkpoint of the published code, and that code's network written out with its names

WIDTHS = {1: (8, 16), 2: (16, 32), 3: (32, 32), 4: (32, 32)}


def published_state(seed: int = 0) -> State:
    """Random tensors under the published names; flows of about a voxel, so that every step of the way shows."""
    generator = torch.manual_seed(seed)
    state: State = {}

    def add(name: str, before: int, after: int, gain: float = 1.0) -> None:
        state[f"{name}.weight"] = gain * torch.randn(after, before, 3, 3, 3, generator=generator) / (27 * before) ** 0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(after, generator=generator)

    for level, before, after in ((1, 1, 8), (2, 8, 16), (3, 16, 32), (4, 32, 32)):
        add(f"encoder.block{level}.main", before, after)
    for level, (channels, width) in WIDTHS.items():
        add(f"decoder{level}.Conv1.main", 2 * channels, width)
        add(f"decoder{level}.Conv2.main", width, width)
        add(f"decoder{level}.Conv3.main", width, width)
        add(f"decoder{level}.Conv4", width, width // 2)
        add(f"decoder{level}.Conv5", width // 2, 3, gain=2.0)
        state[f"decoder{level}.Conv5.bias"] += torch.tensor([0.6, -0.4, 0.8])
    for level in range(4):
        state[f"transformer.{level}.grid"] = torch.zeros(1, 3, 160 >> level, 192 >> level, 2)
    return state


def published_warp(image: Tensor, flow: Tensor, padding: str) -> Tensor:
    """Trilinear, align_corners=True: image(x + flow(x)), by torch's normalised coordinates."""
    sizes = image.shape[2:]
    axes = [torch.arange(size, dtype=flow.dtype) for size in sizes]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None] + flow
    scaled = [2 * places[:, axis] / (size - 1) - 1 for axis, size in enumerate(sizes)]
    return F.grid_sample(image, torch.stack(scaled[::-1], dim=-1), padding_mode=padding, align_corners=True)


def published_forward(state: State, moving: Tensor, fixed: Tensor) -> Tensor:
    """RP-Net: one pass a level, coarse to fine."""

    def conv(x: Tensor, name: str) -> Tensor:
        return F.conv3d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    def encode(image: Tensor) -> list[Tensor]:
        features = [F.leaky_relu(conv(image, "encoder.block1.main"), 0.1)]
        for level in (2, 3, 4):
            pooled = F.avg_pool3d(features[-1], 2)
            features.append(F.leaky_relu(conv(pooled, f"encoder.block{level}.main"), 0.1))
        return features

    def decode(level: int, warped: Tensor, target: Tensor) -> Tensor:
        x = F.leaky_relu(conv(torch.cat((warped, target), dim=1), f"decoder{level}.Conv1.main"), 0.1)
        for block in ("Conv2", "Conv3"):
            x = F.leaky_relu(conv(x, f"decoder{level}.{block}.main") + x, 0.1)
        return conv(conv(x, f"decoder{level}.Conv4"), f"decoder{level}.Conv5")

    features_moving, features_fixed = encode(moving), encode(fixed)
    flow = decode(4, features_moving[3], features_fixed[3])
    for level in (3, 2, 1):
        flow = 2 * F.interpolate(flow, scale_factor=2, mode="trilinear", align_corners=True)
        warped = published_warp(features_moving[level - 1], flow, "zeros")
        step = decode(level, warped, features_fixed[level - 1])
        flow = published_warp(flow, step, "zeros") + step
    return flow


def checkpoint(state: State, path: Path) -> Path:
    return save({"config": {"size": [160, 192, 160], "name": "RP-Net", "lr": 1e-4}, "model_state": state}, path)


def test_imported_checkpoint_gives_the_published_field(tmp_path: Path) -> None:
    state = published_state()
    output = tmp_path / "new" / "imported.pt"
    zoo.import_checkpoint("iirp", checkpoint(state, tmp_path / "published.pth"), output)
    method = zoo.load("iirp", weights=str(output))
    moving, fixed = torch.rand(2, 1, 1, 32, 40, 24, generator=torch.manual_seed(1))
    with torch.no_grad():
        expected = published_forward(state, moving, fixed)
        found = method.network.register(torch.cat((moving, fixed), dim=1), FixedIterations()).displacement
    assert expected.abs().mean() > 1
    assert (found - expected).abs().max() < 1e-3
    assert {path.name for path in output.parent.iterdir()} == {"imported.pt"}


def test_every_published_tensor_is_used() -> None:
    state = published_state()
    assert sum(tensor.numel() for name, tensor in state.items() if "grid" not in name) == 419_964
    moving, fixed = torch.rand(2, 1, 1, 16, 16, 16, generator=torch.manual_seed(1))
    weights = {name: tensor.requires_grad_() for name, tensor in state.items() if "grid" not in name}
    published_forward(weights, moving, fixed).square().sum().backward()
    assert [name for name, tensor in weights.items() if tensor.grad is None or not tensor.grad.any()] == []


def test_bare_state_and_half_precision_are_imported(tmp_path: Path) -> None:
    state = published_state()
    halved = {name: tensor.half() for name, tensor in state.items()}
    zoo.import_checkpoint("iirp", str(save(halved, tmp_path / "p.pth")), str(tmp_path / "imported.pt"))
    found = torch.load(tmp_path / "imported.pt", weights_only=True)
    assert set(found) == set(make_state())
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    expected = halved["decoder3.Conv2.main.weight"].float()
    assert torch.equal(found["network.estimators.2.1.conv.weight"], expected)


@pytest.mark.parametrize("name", [name for name in published_state() if "grid" not in name])
def test_missing_tensor_is_named_as_published(tmp_path: Path, name: str) -> None:
    state = published_state()
    del state[name]
    refused(tmp_path, state, rf"has no tensor '{name}'")


def test_tensor_of_another_shape_is_named_as_published(tmp_path: Path) -> None:
    state = published_state()
    state["decoder2.Conv4.weight"] = state["decoder2.Conv4.weight"][..., :1]
    refused(tmp_path, state, r"'decoder2\.Conv4\.weight' has shape \(16, 32, 3, 3, 1\), expected \(16, 32, 3, 3, 3\)")


def test_tensor_that_is_not_finite_is_named_as_published(tmp_path: Path) -> None:
    state = published_state()
    state["encoder.block3.main.bias"][2] = float("nan")
    refused(tmp_path, state, r"'encoder\.block3\.main\.bias' holds NaN")


@pytest.mark.parametrize(
    "name", ["decoder5.Conv1.main.weight", "encoder.block1.main.scale", "encoder.block1.weight", "network.grid"]
)
def test_extra_tensor_is_named_as_published(tmp_path: Path, name: str) -> None:
    refused(tmp_path, {**published_state(), name: torch.ones(3)}, rf"unexpected tensor '{name}'")


def refused(folder: Path, state: State, message: str) -> None:
    """The import of a checkpoint is refused and leaves nothing."""
    source, output = checkpoint(state, folder / "published.pth"), folder / "imported.pt"
    with pytest.raises(InputError, match=rf"published\.pth: .*{message}"):
        zoo.import_checkpoint("iirp", source, output)
    assert {path.name for path in folder.iterdir()} == {"published.pth"}


def test_output_that_exists_is_refused_and_kept(tmp_path: Path) -> None:
    source, output = checkpoint(published_state(), tmp_path / "published.pth"), tmp_path / "imported.pt"
    output.write_text("mine")
    with pytest.raises(InputError, match=r"imported\.pt: already exists"):
        zoo.import_checkpoint("iirp", source, output)
    assert output.read_text("utf-8") == "mine"
    with pytest.raises(InputError, match=r"o: cannot be written \(File name too long\); choose another --output"):
        zoo.import_checkpoint("iirp", source, tmp_path / ("o" * 300))
    with pytest.raises(InputError, match="s: no such file; check the path"):
        zoo.import_checkpoint("iirp", tmp_path / ("s" * 300), output)


def test_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    source = checkpoint(published_state(), tmp_path / "published.pth")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"file.imported\.pt: cannot be written \(.+\); choose another --output"):
        zoo.import_checkpoint("iirp", source, tmp_path / "file" / "imported.pt")


def test_disk_without_room_is_told_and_left_as_it_was(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    source = checkpoint(published_state(), tmp_path / "published.pth")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"imported\.pt: cannot be written \(.+\); choose another --output"):
            zoo.import_checkpoint("iirp", source, tmp_path / "imported.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in tmp_path.iterdir()} == {"published.pth"}


def test_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.pth: no such file"):
        zoo.import_checkpoint("iirp", tmp_path / "nowhere.pth", tmp_path / "imported.pt")


def test_weights_of_this_package_are_no_published_checkpoint(tmp_path: Path) -> None:
    refused(
        tmp_path, make_state(), r"has no tensor 'encoder\.block1\.main\.weight'; the weights belong to another network"
    )


def test_bundle_without_import_says_so(tmp_path: Path, home: Path) -> None:
    (install(home) / "configs/import.json").unlink()
    with pytest.raises(InputError, match="iirp has no published checkpoint"):
        zoo.import_checkpoint("iirp", tmp_path / "published.pth", tmp_path / "imported.pt")


def test_a_bundle_with_broken_metadata_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "bundles" / "mine" / "configs" / "metadata.json"
    broken.parent.mkdir(parents=True)
    broken.write_text('{"version": ')
    monkeypatch.setenv("IREGZOO_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"metadata\.json: is not readable metadata"):
        zoo.find("iirp")


def test_a_card_says_what_steers_the_iterations() -> None:
    definition = {"_target_": "iregzoo.iteration.FixedIterations", "max_iterations": 2}
    steered = zoo.complete(zoo.untrained(zoo.find("ipear")), zoo.WeightsCard("model.pt", controller=definition))
    assert steered.controller == FixedIterations(2)
    assert zoo.complete(zoo.untrained(zoo.find("ipear")), zoo.WeightsCard("model.pt")).controller == TCI()


def test_a_device_may_be_named_or_given() -> None:
    assert zoo.load("iirp", device="cpu").device == zoo.load("iirp", device=torch.device("cpu")).device
    assert zoo.load("iirp", device="auto").device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InputError, match="device 'gpu' is unknown; choose auto, cpu, cuda, mps"):
        zoo.load("iirp", device="gpu")
    for name in ("cuda:99", "cuda:first", "cpu:7"):
        with pytest.raises(InputError, match=f"device '{name}' is not available on this machine; choose auto or cpu"):
            zoo.load("iirp", device=name)
