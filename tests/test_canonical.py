"""The network that brings any contrast to one: what it is to make, how it is trained, and how weights carry it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import monai.bundle
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from iregzoo import zoo
from iregzoo.anatomy import read_anatomies, read_table
from iregzoo.canonical import CanonicalStep, assemble, canonical_pair, canonical_synthesis, trained
from iregzoo.errors import InputError
from iregzoo.networks import IIRPNet
from iregzoo.networks.canonical import BRIGHTNESS, LEVELS, CanonicalNet, at_corner, canonical_class, canonical_image
from iregzoo.registration import PairNetwork, Registration
from trainers import in_processes, trainer_of

ROOT = Path(__file__).resolve().parents[1]
CHAIN = (ROOT / "canonical" / "brain.json", ROOT / "canonical" / "together.json")
SMALL: dict[str, Any] = {
    "device": "cpu",
    "shape": [32, 16, 16],
    "validated": [32, 16, 16],
    "validations": 2,
    "steps": 4,
    "steps_per_epoch": 2,
    "val_interval": 1,
    "save_interval": 1,
}
pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")


def test_left_and_right_are_alike_and_what_touches_is_not() -> None:
    sides = [(2, 41), (3, 42), (4, 43), (5, 44), (7, 46), (8, 47), (10, 49), (11, 50), (12, 51), (13, 52), (17, 53)]
    assert all(BRIGHTNESS[left] == BRIGHTNESS[right] for left, right in [*sides, (18, 54), (26, 58), (28, 60)])
    touching = [(2, 3), (12, 13), (11, 26), (12, 26), (17, 18), (17, 5), (10, 28), (16, 28), (7, 8), (7, 16), (4, 11)]
    assert all(abs(BRIGHTNESS[one] - BRIGHTNESS[other]) >= 0.1 for one, other in touching)


def test_the_canonical_image_is_the_brightness_of_each_label() -> None:
    labels = torch.tensor([[0, 2, 17], [530, -5, 61]])
    expected = torch.tensor([[0.0, 1.0, 0.3], [0.0, 0.0, 0.0]])
    for dtype in (torch.int16, torch.int64, torch.float32):
        assert torch.equal(canonical_image(labels.to(dtype)), expected)


def test_every_class_has_a_brightness_of_its_own() -> None:
    labels = torch.tensor([0, 24, 2, 41, 530, -5])
    classes = canonical_class(labels)
    assert classes.tolist() == [0, LEVELS.index(0.2), LEVELS.index(1.0), LEVELS.index(1.0), 0, 0]
    assert list(LEVELS) == sorted(set(LEVELS))
    assert torch.equal(torch.tensor(LEVELS)[classes], canonical_image(labels))


def test_the_corners_of_the_blocks_are_all_voxels() -> None:
    volume = torch.rand(2, 4, 6, 8)
    rebuilt = torch.empty_like(volume)
    for corner in range(8):
        at_corner(rebuilt, corner).copy_(at_corner(volume, corner))
    assert torch.equal(rebuilt, volume)


def test_what_it_gives_is_the_brightness_it_expects() -> None:
    net, image = network(), torch.rand(1, 1, 32, 16, 16)
    made = net(image)
    for corner in (0, 3, 7):
        chances = net.logits(net.features(image), corner).softmax(1)
        expected = (chances * torch.tensor(LEVELS).view(-1, 1, 1, 1)).sum(1, keepdim=True)
        torch.testing.assert_close(at_corner(made, corner), expected)


def network() -> CanonicalNet:
    torch.manual_seed(0)
    return CanonicalNet().eval()


def test_each_channel_is_seen_by_itself() -> None:
    images = torch.rand(2, 3, 32, 16, 16, generator=torch.manual_seed(1))
    made = network()(images)
    assert made.shape == images.shape
    assert made.min() >= 0
    assert made.max() <= 1
    for item in range(2):
        for channel in range(3):
            alone = network()(images[item : item + 1, channel : channel + 1])
            torch.testing.assert_close(made[item : item + 1, channel : channel + 1], alone)


def test_every_parameter_learns() -> None:
    net = network()
    net(torch.rand(1, 2, 32, 32, 32)).square().sum().backward()
    for name, parameter in net.named_parameters():
        # A norm takes a bias away again.
        if not name.endswith("bias") or name.startswith("heads"):
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0, name


def test_shapes_that_do_not_come_down_evenly_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images have shape \(1, 2, 16, 12, 16\); expected .* multiples of 16"):
        network()(torch.rand(1, 2, 16, 12, 16))


def test_a_pair_network_registers_what_the_canonical_network_makes() -> None:
    class Recorder(torch.nn.Module):
        stride, controller = 8, None

        def forward(self, moving: Tensor, fixed: Tensor, controller: object = None) -> Registration:
            return Registration(torch.cat((moving, fixed, fixed), dim=1))

    image = torch.rand(1, 2, 32, 16, 16)
    pair = PairNetwork(Recorder(), network())
    torch.testing.assert_close(pair(image)[:, :2], network()(image))
    torch.testing.assert_close(PairNetwork(Recorder())(image)[:, :2], image)
    assert pair.stride == 16  # both go into it
    assert PairNetwork(Recorder()).stride == 8


def test_synthesised_canonical_images_look_like_the_real_ones() -> None:
    labels = torch.tensor([0, 2, 10, 17, 53])[torch.randint(0, 5, (1, 4, 4, 4), generator=torch.manual_seed(0))]
    labels = labels.repeat_interleave(6, 1).repeat_interleave(6, 2).repeat_interleave(6, 3)
    made = canonical_synthesis(blur=0.3)(labels, torch.Generator().manual_seed(0))
    assert (made - canonical_image(labels)).abs().mean() < 0.05


def run(anatomies: Path, output: Path, *files: str, **options: Any) -> Any:
    made = monai.bundle.create_workflow(
        config_file=list(files),
        workflow_type="train",
        dataset_dir=str(anatomies),
        output_dir=str(output),
        **{**SMALL, **options},
    )
    made.run()
    made.finalize()
    return made


@pytest.fixture(scope="module")
def front(anatomies: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short training of the canonical network."""
    output = tmp_path_factory.mktemp("canonical")
    run(anatomies, output, str(ROOT / "canonical" / "train.json"), bundle_root=str(ROOT / "canonical"), amp=False)
    return output


def test_its_training_writes_weights_that_load(front: Path, anatomies: Path) -> None:
    made = trained(front / "best.pt")
    assert not made.training
    torch.manual_seed(0)
    assert not torch.equal(made.heads[1].weight, CanonicalNet().heads[1].weight)
    assert (front / "checkpoint_epoch=2.pt").is_file()


def test_more_steps_come_closer(anatomies: Path, tmp_path: Path) -> None:
    run(
        anatomies,
        tmp_path,
        str(ROOT / "canonical" / "train.json"),
        bundle_root=str(ROOT / "canonical"),
        amp=False,
        learning_rate=0.005,
        steps=60,
        steps_per_epoch=20,
    )
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    name = next(tag for tag in events.Tags()["scalars"] if tag.endswith("loss"))
    losses = [event.value for event in events.Scalars(name)]
    assert sum(losses[-15:]) < 0.85 * sum(losses[:15])


def test_a_method_is_trained_with_it_and_carried_in_one_file(front: Path, anatomies: Path, tmp_path: Path) -> None:
    bundle = ROOT / "bundles" / "iirp"
    files = [str(bundle / "configs" / "train.json"), str(ROOT / "canonical" / "brain.json")]
    weights = str(front / "best.pt")
    small: dict[str, Any] = {"bundle_root": str(bundle), "amp": False, "passes": [1], "start": "$None"}
    run(anatomies, tmp_path, *files, **small, front=f"$canonical.trained('{weights}')")
    assemble(str(tmp_path / "best.pt"), weights, str(tmp_path / "brain.pt"))
    state = torch.load(tmp_path / "brain.pt", weights_only=True)
    method = zoo.complete(zoo.untrained(zoo.find("iirp")), zoo.WeightsCard("brain.pt", canonical=True))
    method.load_state_dict(state)
    torch.testing.assert_close(
        method.canonical.state_dict()["heads.3.bias"], trained(weights).heads[3].bias.data.half().float()
    )


def test_several_processes_train_it(front: Path, anatomies: Path, tmp_path: Path) -> None:
    configs = ROOT / "bundles" / "iirp" / "configs"
    begun = tmp_path / "begun.json"
    begun.write_text('{"start": null}', "utf-8")  # torchrun takes --start for an option of its own
    files = [configs / "train.json", ROOT / "canonical" / "brain.json", begun, configs / "multi_gpu_train.json"]
    given: dict[str, Any] = {
        **SMALL,
        "bundle_root": configs.parent,
        "dataset_dir": anatomies,
        "output_dir": tmp_path / "out",
        "amp": False,
        "front": f"$canonical.trained('{front / 'best.pt'}')",
    }
    done = in_processes(files, **given)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"best.pt", "card.json", "checkpoint_epoch=2.pt"}


def test_both_networks_learn_together_and_their_weights_are_one_file(anatomies: Path, tmp_path: Path) -> None:
    """Every tensor of both has moved from the start, but those before an instance norm that takes them away."""
    bundle = ROOT / "bundles" / "iirp"
    files = [str(path) for path in (bundle / "configs" / "train.json", *CHAIN)]
    torch.manual_seed(0)
    start = PairNetwork(IIRPNet(), CanonicalNet()).state_dict()
    torch.save(start, tmp_path / "start.pt")
    small: dict[str, Any] = {"bundle_root": str(bundle), "amp": False, "start": str(tmp_path / "start.pt")}
    run(anatomies, tmp_path / "run", *files, **small)
    state = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert state.keys() == start.keys()
    still = [name for name in state if torch.equal(state[name], start[name])]
    assert [name for name in still if not name.startswith("canonical.") or name.endswith("weight")] == []
    card = zoo.WeightsCard("brain.pt", canonical=True)
    zoo.complete(zoo.untrained(zoo.find("iirp")), card).load_state_dict(state)
    alone = trained(tmp_path / "run" / "best.pt").state_dict()
    assert all(torch.equal(alone[name], state[f"canonical.{name}"]) for name in alone)


def test_what_it_is_to_learn_comes_from_the_labels(anatomies: Path) -> None:
    table = read_table(anatomies)
    batch = {"image": torch.rand(1, 2, 8, 8, 8), "label": torch.full((1, 2, 8, 8, 8), 53)}
    image, target = canonical_pair(batch, torch.device("cpu"))
    assert torch.equal(image, batch["image"])
    assert torch.equal(target, torch.full_like(image, BRIGHTNESS[53]))
    assert len(read_anatomies(anatomies, "val")) == 2
    assert 53 in table.compared


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"best\.pt: no such file; train the network with canonical/train\.json"):
        trained(tmp_path / "best.pt")


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    batch = {"image": torch.full((1, 2, 32, 16, 16), float("nan")), "label": torch.zeros(1, 2, 32, 16, 16)}
    with pytest.raises(InputError, match="the loss at step 7 is not finite; lower learning_rate"):
        CanonicalStep()(trainer_of(network(), iteration=7), batch)


def test_the_command_that_joins_both_says_in_a_line_what_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "iregzoo.canonical", "--network", str(tmp_path / "nowhere.pt")]
    command += ["--canonical", str(tmp_path / "none.pt"), "--output", str(tmp_path / "brain.pt")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"iregzoo: {tmp_path / 'nowhere.pt'}: is not a readable weights file")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
