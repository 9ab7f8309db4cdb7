"""Training by MONAI from a bundle's configs: end to end, interrupted and resumed, and evaluated."""

import csv
import json
import math
import shutil
import zipfile
from operator import attrgetter
from pathlib import Path
from typing import Any

import monai.bundle
import pytest
import torch
from ignite.engine import Events
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from iregzoo import zoo
from iregzoo.iteration import FixedIterations
from iregzoo.training import find_scans, latest_checkpoint
from trainers import in_processes

pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
ROOT = Path(__file__).resolve().parents[2]
IIRP = ROOT / "bundles" / "iirp"
FOLDERS = sorted(path for path in IIRP.parent.iterdir() if path.is_dir())
EACH_BUNDLE = pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
SMALL: dict[str, Any] = {
    "device": "cpu",
    "shape": [16, 16, 16],
    "steps": 4,
    "steps_per_epoch": 2,
    "val_interval": 1,
    "save_interval": 1,
    "learning_rate": 0.001,
    "final_learning_rate": 0.0001,
}


def workflow(
    dataset: Path, output: Path, files: tuple[str, ...] = ("train.json",), bundle: Path = IIRP, **options: Any
) -> Any:
    """A workflow of MONAI, initialised and ready to run."""
    return monai.bundle.create_workflow(
        config_file=[str(bundle / "configs" / name) for name in files],
        workflow_type="train",
        bundle_root=str(bundle),
        dataset_dir=str(dataset),
        output_dir=str(output),
        **{**SMALL, **options},
    )


def train(dataset: Path, output: Path, **options: Any) -> Any:
    made = workflow(dataset, output, **options)
    made.run()
    made.finalize()
    return made


def weights_of(output: Path, epoch: int) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(output / f"checkpoint_epoch={epoch}.pt", weights_only=True)["network"]
    return state


def events_of(output: Path) -> EventAccumulator:
    return EventAccumulator(str(output / "tensorboard")).Reload()


def logged(output: Path) -> dict[str, list[int]]:
    """Steps at which TensorBoard has a number, by its name."""
    events = events_of(output)
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an uninterrupted training of two epochs with a label term."""
    output = tmp_path_factory.mktemp("trained")
    train(dataset, output, overlap=1.0)
    return output


def test_training_writes_checkpoints_and_the_best_weights(trained: Path) -> None:
    assert {path.name for path in trained.glob("*.pt")} == {"checkpoint_epoch=1.pt", "checkpoint_epoch=2.pt", "best.pt"}
    checkpoint = torch.load(trained / "checkpoint_epoch=2.pt", weights_only=True)
    assert set(checkpoint) == {"network", "optimizer", "scheduler", "trainer", "best"}
    first, last = weights_of(trained, 1), weights_of(trained, 2)
    assert all(not torch.equal(first[name], last[name]) for name in first)


def test_best_weights_load_into_the_package(trained: Path) -> None:
    method = zoo.load("iirp", str(trained / "best.pt"))
    found = method.network.network.state_dict()
    states = [weights_of(trained, epoch) for epoch in (1, 2)]
    assert any(
        all(torch.equal(found[name.removeprefix("network.")], state[name]) for name in state) for state in states
    )


def test_weights_are_used_as_they_were_trained(trained: Path, dataset: Path, tmp_path: Path) -> None:
    """On the grid of their training, and after the next one with its settings; what was added by hand stays."""
    card = zoo.load("iirp", str(trained / "best.pt")).card
    assert (card.spacing, card.minimum, card.window, card.canonical) == ([1.0, 1.0, 1.0], [16, 16, 16], None, False)
    path = tmp_path / "card.json"
    path.write_text(json.dumps({"refine": 3, "spacing": [9, 9, 9]}), "utf-8")
    controller = {"_target_": "iregzoo.iteration.FixedIterations", "max_iterations": 2}
    settings = {"spacing": [2.0, 2.0, 3.0], "intensity_window": [0, 500], "network_def#network#controller": controller}
    train(dataset, tmp_path, steps=2, **settings)
    method = zoo.load("iirp", str(tmp_path / "best.pt"))
    assert (method.card.spacing, method.card.window, method.card.refine) == ([2.0, 2.0, 3.0], [0, 500], 3)
    assert method.network.controller == FixedIterations(2)


def test_every_loss_term_is_logged_by_its_name(trained: Path) -> None:
    found = logged(trained)
    names = {tag.rpartition("/")[2] for tag in found}
    assert names == {"loss", "similarity", "smoothness", "overlap", "learning_rate", "val_dice"}
    for tag, steps in found.items():
        assert steps == ([1, 2] if tag.endswith("val_dice") else [1, 2, 3, 4]), tag


def test_training_without_a_label_term_logs_none(dataset: Path, tmp_path: Path) -> None:
    train(dataset, tmp_path, overlap=0.0, steps=2)
    names = {tag.rpartition("/")[2] for tag in logged(tmp_path)}
    assert names == {"loss", "similarity", "smoothness", "learning_rate", "val_dice"}


def test_last_epoch_is_validated_and_saved_whatever_the_intervals(
    dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # 5 steps of 2 an epoch are 3 epochs, of which only the second is a whole interval.
    train(dataset, tmp_path, steps=5, val_interval=2, save_interval=2)
    assert latest_checkpoint(tmp_path, 3) == str(tmp_path / "checkpoint_epoch=3.pt")
    found = logged(tmp_path)
    assert found["val_dice"] == [2, 3]
    (tag,) = (tag for tag in found if tag.endswith("learning_rate"))
    rates = [event.value for event in events_of(tmp_path).Scalars(tag)]
    assert rates == sorted(rates, reverse=True)
    assert len(rates) == 6
    assert rates[0] == pytest.approx(0.001)
    assert "loss=" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_interval": 0}, "save_interval 0"),
        ({"steps_per_epoch": 0}, "steps_per_epoch 0: give a whole number of at least 1"),
        ({"window": 4}, "window 4: give an odd number of voxels"),
    ],
)
def test_impossible_setting_is_refused_before_training(
    dataset: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuntimeError) as caught:
        train(dataset, tmp_path, **options)
    assert message in str(caught.value.__cause__)
    assert not list(tmp_path.glob("*.*"))


def test_whole_last_interval_is_not_done_twice(dataset: Path, tmp_path: Path) -> None:
    train(dataset, tmp_path, steps=4, val_interval=2, save_interval=2)
    assert {path.name for path in tmp_path.glob("*.pt")} == {"checkpoint_epoch=2.pt", "best.pt"}
    assert logged(tmp_path)["val_dice"] == [2]


@EACH_BUNDLE
def test_scans_without_labels_train_and_keep_the_weights_that_match_best(
    folder: Path, dataset: Path, tmp_path: Path
) -> None:
    shutil.copytree(dataset / "images", tmp_path / "data" / "images")
    shutil.copy(dataset / "splits.json", tmp_path / "data")
    with pytest.raises(RuntimeError) as caught:
        workflow(tmp_path / "data", tmp_path / "out", bundle=folder)
    assert "validation needs label maps, but scans of val have none" in str(caught.value.__cause__)
    assert not (tmp_path / "out").exists()
    made = workflow(tmp_path / "data", tmp_path / "out", ("train.json", "unlabelled.json"), folder, steps=2)
    made.run()
    (found,) = events_of(tmp_path / "out").Scalars("val_ncc")
    assert 0.1 < found.value <= 1
    assert (tmp_path / "out" / "best.pt").exists()


def test_same_seed_gives_the_same_weights_and_another_does_not(trained: Path, dataset: Path, tmp_path: Path) -> None:
    train(dataset, tmp_path / "again", overlap=1.0)
    train(dataset, tmp_path / "other", overlap=1.0, seed=1)
    expected = weights_of(trained, 2)
    again, other = weights_of(tmp_path / "again", 2), weights_of(tmp_path / "other", 2)
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert any(not torch.equal(other[name], expected[name]) for name in expected)


def test_workers_make_the_same_pairs(dataset: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "overlap": 1.0,
        "mirror": 0.5,
        "batch_size": 2,
        "augmentation": {"_target_": "RandGaussianNoised", "keys": ["image"], "prob": 0.5, "std": 0.1},
    }
    for name, workers in (("none", 0), ("two", 2)):
        made = train(dataset, tmp_path / name, workers=workers, **options)
        assert made.trainer.data_loader.num_workers == workers
    expected, found = weights_of(tmp_path / "none", 2), weights_of(tmp_path / "two", 2)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@EACH_BUNDLE
def test_workers_and_clip_reach_the_training(folder: Path, dataset: Path, tmp_path: Path) -> None:
    made = workflow(dataset, tmp_path, bundle=folder, workers=2, clip=2.5)
    assert made.trainer.data_loader.num_workers == 2
    assert made.trainer._process_function.clip == 2.5


def train_interrupted(dataset: Path, output: Path, **options: Any) -> list[int]:
    """Four epochs, stopped early in the third and started again; gives back the epochs of the second run."""
    interrupted = workflow(dataset, output, **options)
    interrupted.trainer.add_event_handler(Events.EPOCH_STARTED(once=3), lambda engine: engine.terminate())
    interrupted.run()
    assert latest_checkpoint(output, 4) == str(output / "checkpoint_epoch=2.pt")

    resumed = workflow(dataset, output, **options)
    epochs: list[int] = []
    resumed.trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: epochs.append(engine.state.epoch))
    resumed.run()
    return epochs


def test_interrupted_training_resumes_to_the_same_weights(dataset: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 8, "overlap": 1.0, "mirror": 0.5, "passes": [1, 2]}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(dataset, whole, **options)
    assert train_interrupted(dataset, parts, **options) == [3, 4]
    expected, found = weights_of(whole, 4), weights_of(parts, 4)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_resumed_training_keeps_the_best_weights_of_before(dataset: Path, tmp_path: Path) -> None:
    # A similarity of negative weight makes the second half of this training worse.
    train_interrupted(dataset, tmp_path, steps=8, similarity=-1.0, learning_rate=0.01)
    dice = events_of(tmp_path).Scalars("val_dice")
    assert [event.step for event in dice] == [1, 2, 3, 4]
    best = max(dice, key=lambda event: event.value)
    assert best.step <= 2
    found, expected = torch.load(tmp_path / "best.pt", weights_only=True), weights_of(tmp_path, best.step)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_command_that_resumes_says_the_learning_rate_and_the_length(dataset: Path, tmp_path: Path) -> None:
    train(dataset, tmp_path, steps=4, learning_rate=0.01)
    resumed = workflow(dataset, tmp_path, steps=12, learning_rate=0.002)
    optimizer, rates = resumed.parser.get_parsed_content("optimizer"), {}
    resumed.trainer.add_event_handler(
        Events.EPOCH_STARTED, lambda engine: rates.update({engine.state.epoch: optimizer.param_groups[0]["lr"]})
    )
    resumed.run()
    whole = [0.0001 + (0.002 - 0.0001) * (1 + math.cos(math.pi * epoch / 6)) / 2 for epoch in range(6)]
    assert rates == pytest.approx({epoch: whole[epoch - 1] for epoch in (3, 4, 5, 6)})


def test_finished_training_stays_finished(trained: Path, dataset: Path) -> None:
    before = {path.name: path.read_bytes() for path in trained.glob("*.pt")}
    train(dataset, trained, overlap=1.0)
    assert {path.name: path.read_bytes() for path in trained.glob("*.pt")} == before


def test_evaluation_writes_the_metrics_of_the_test_split(trained: Path, dataset: Path, tmp_path: Path) -> None:
    files = ("train.json", "evaluate.json")
    made = workflow(dataset, tmp_path, files, checkpoint_path=str(trained / "best.pt"))
    made.run()
    rows = {path.name: list(csv.reader(path.open(encoding="utf-8"))) for path in tmp_path.glob("*.csv")}
    assert {"metrics.csv", "val_dice_raw.csv", "val_dice_summary.csv"} <= set(rows)
    assert len(rows["val_dice_raw.csv"]) == 1 + len(find_scans(dataset, "test"))
    (name, mean), details = rows["metrics.csv"][0], rows["val_dice_raw.csv"][1:]
    assert name == "val_dice"
    values = [float(value) for row in details for value in row[1:3]]
    assert float(mean) == pytest.approx(sum(values) / len(values), abs=1e-3)
    assert 0.1 < float(mean) < 1
    assert not list(tmp_path.glob("*.pt"))
    assert not (tmp_path / "card.json").exists()
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError) as caught:
        workflow(dataset, tmp_path, files).run()
    assert "metrics.csv: already exists; choose another --output_dir or add --overwrite" in str(caught.value.__cause__)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written
    workflow(dataset, tmp_path, files, overwrite=True).run()
    assert (tmp_path / "metrics.csv").stat().st_mtime_ns > written["metrics.csv"]


def test_evaluation_is_of_the_bundles_own_weights_unless_told(dataset: Path, tmp_path: Path) -> None:
    made = workflow(dataset, tmp_path, ("train.json", "evaluate.json"))
    made.run()
    network = made.parser.get_parsed_content("network")
    expected = torch.load(IIRP / "models/model.pt", weights_only=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())


def test_early_stop_ends_a_training_that_gets_no_better(dataset: Path, tmp_path: Path) -> None:
    patience = {"_target_": "iregzoo.handlers.EarlyStop", "best": "@validate#best", "patience": 2}
    made = workflow(dataset, tmp_path, steps=20, learning_rate=0.0, final_learning_rate=0.0, schedule=[patience])
    made.run()
    assert [event.step for event in events_of(tmp_path).Scalars("val_dice")] == [1, 2, 3]
    resumed = workflow(dataset, tmp_path, steps=20, learning_rate=0.0, final_learning_rate=0.0, schedule=[patience])
    resumed.run()  # has two stale validations behind it, and one epoch at most before it sees them
    assert resumed.trainer.state.epoch <= 4


@EACH_BUNDLE
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": [16, 16]}, "shape [16, 16]: give the voxels of three axes"),
        ({"shape": [16, 0, 16]}, "shape [16, 0, 16]: give the voxels"),
        ({"shape": [33, 32, 32]}, "shape [33, 32, 32]: must be multiples of"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available on this machine; choose auto or cpu"),
        ({"device": "auto"}, "device 'auto': leave the setting out"),
        ({"start": 5}, "start 5: give the file of the initial weights"),
        ({"start": "nowhere.pt"}, "nowhere.pt: no such file"),
        ({"start": str(IIRP / "configs" / "train.json")}, "train.json: is not a readable weights file"),
    ],
)
def test_impossible_training_is_refused_before_a_scan_is_read(
    folder: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuntimeError) as caught:
        workflow(tmp_path / "no scans", tmp_path / "out", bundle=folder, **options)
    assert message in str(caught.value.__cause__)
    assert not (tmp_path / "out").exists()


def test_weights_of_another_network_are_no_start(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        workflow(dataset, tmp_path, start=str(ROOT / "bundles" / "pan" / "models" / "model.pt"))
    assert "model.pt: has no tensor" in str(caught.value.__cause__)


def test_checkpoint_of_a_training_is_a_start_and_weights(trained: Path, dataset: Path, tmp_path: Path) -> None:
    checkpoint = trained / "checkpoint_epoch=2.pt"
    train(dataset, tmp_path, start=str(checkpoint), steps=2, learning_rate=0.0, final_learning_rate=0.0)
    begun, expected = weights_of(tmp_path, 1), weights_of(trained, 2)
    assert all(torch.equal(begun[name], expected[name]) for name in expected)
    used = zoo.load("iirp", str(checkpoint)).network.state_dict()
    assert all(torch.equal(used[name], expected[name]) for name in expected)


# --- every bundle


@EACH_BUNDLE
def test_configs_of_each_weights_file_only_override_what_train_has(folder: Path) -> None:
    base = json.loads((folder / "configs/train.json").read_text("utf-8"))
    own = json.loads((folder / "configs/train_hippocampus.json").read_text("utf-8"))
    assert set(own) <= set(base)


@EACH_BUNDLE
@pytest.mark.parametrize("recipe", [(), ("train_hippocampus.json",)], ids=["paper", "hippocampus"])
def test_recipe_trains_and_evaluates_the_best(
    folder: Path, recipe: tuple[str, ...], dataset: Path, tmp_path: Path
) -> None:
    trained, evaluated = tmp_path / "trained", tmp_path / "evaluated"
    made = workflow(dataset, trained, ("train.json", *recipe), folder, amp=False)
    fresh = {
        name: tensor.clone() for name, tensor in made.parser.get_parsed_content("network_def").state_dict().items()
    }
    made.run()
    after = weights_of(trained, 2)
    # Not every weight: SM-GICNet trains its levels one by one, AD-RegNet's regions are one on so small a grid.
    assert any(not torch.equal(after[name], fresh[name]) for name in fresh)
    files = ("train.json", *recipe, "evaluate.json")
    workflow(dataset, evaluated, files, folder, checkpoint_path=str(trained / "best.pt")).run()
    (name, mean), *_ = csv.reader((evaluated / "metrics.csv").open(encoding="utf-8"))
    assert name == "val_dice"
    assert 0 <= float(mean) < 1


def multi_gpu(folder: Path) -> bytes:
    return (folder / "configs" / "multi_gpu_train.json").read_bytes()


# A bundle for each recipe: of those with the same one, AD-RegNet, some of whose weights so small a grid leaves unused.
MULTI_GPU = list({multi_gpu(folder): folder for folder in reversed(FOLDERS)}.values())


def run_several(dataset: Path, output: Path, files: tuple[str, ...], bundle: Path, **options: Any) -> Any:
    """MONAI's command in several processes, two unless ``count`` says otherwise."""
    given = {**SMALL, **options, "bundle_root": bundle, "dataset_dir": dataset, "output_dir": output}
    return in_processes([bundle / "configs" / name for name in files], **given)


@pytest.mark.parametrize("folder", MULTI_GPU, ids=attrgetter("name"))
def test_two_processes_train_as_one_with_their_batches_together(folder: Path, dataset: Path, tmp_path: Path) -> None:
    """MONAI's multi-GPU pattern, on the CPU: two processes with a pair each step as one process with both pairs."""
    options: dict[str, Any] = {"steps": 2, "steps_per_epoch": 1, "seed": 3}
    done = run_several(dataset, tmp_path / "two", ("train.json", "multi_gpu_train.json"), folder, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    workflow(dataset, tmp_path / "one", bundle=folder, batch_size=2, **options).run()
    expected, found = weights_of(tmp_path / "one", 2), weights_of(tmp_path / "two", 2)
    # Adam moves a weight by about the learning rate a step, in a direction that a wrong mean would change. (A bias
    # that a norm undoes goes anywhere, so not each for itself.)
    differences = torch.cat([(found[name] - expected[name]).abs().flatten() for name in expected])
    assert differences.mean() < 0.05 * SMALL["learning_rate"]


def test_two_processes_evaluate_as_one(trained: Path, dataset: Path, tmp_path: Path) -> None:
    """Each with the weights, on its part of the scans."""
    files, weights = ("train.json", "multi_gpu_train.json", "evaluate.json"), str(trained / "best.pt")
    done = run_several(dataset, tmp_path / "two", files, IIRP, checkpoint_path=weights)
    assert done.returncode == 0, done.stderr[-2000:]
    workflow(dataset, tmp_path / "one", ("train.json", "evaluate.json"), checkpoint_path=weights).run()
    expected, found = (
        sorted(row[1:] for row in csv.reader((tmp_path / name / "val_dice_raw.csv").open(encoding="utf-8")))
        for name in ("one", "two")
    )
    assert found == expected


def test_more_processes_than_pairs_to_validate_are_refused(dataset: Path, tmp_path: Path) -> None:
    data = shutil.copytree(dataset, tmp_path / "data")
    splits = json.loads((data / "splits.json").read_text("utf-8"))
    (data / "splits.json").write_text(json.dumps({**splits, "val": splits["val"][:2]}), "utf-8")
    done = run_several(data, tmp_path / "out", ("train.json", "multi_gpu_train.json"), IIRP, count=3)
    assert "iregzoo: 2 pairs to validate for 3 processes; give more, or start fewer processes" in done.stderr


# --- weights


def as_on_a_gpu(source: Path, target: Path) -> Path:
    """A file whose tensors say that they were on a GPU, as of a training there."""
    tag, other = (b"X" + len(name).to_bytes(4, "little") + name for name in (b"cpu", b"cuda:0"))
    with zipfile.ZipFile(source) as given, zipfile.ZipFile(target, "w") as made:
        for entry in given.infolist():
            content = given.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert tag in content
                content = content.replace(tag, other)
            made.writestr(entry.filename, content)
    return target


def test_weights_and_checkpoints_of_a_gpu_are_used_without_one(trained: Path, dataset: Path, tmp_path: Path) -> None:
    best = as_on_a_gpu(trained / "best.pt", tmp_path / "best.pt")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="deserialize object on a CUDA device"):
            torch.load(best)
    workflow(dataset, tmp_path / "measured", ("train.json", "evaluate.json"), checkpoint_path=str(best)).run()
    train(dataset, tmp_path / "begun", start=str(best), steps=2, learning_rate=0.0, final_learning_rate=0.0)
    expected = torch.load(trained / "best.pt", weights_only=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(tmp_path / "begun", 1).items())
    (tmp_path / "gone_on").mkdir()
    as_on_a_gpu(trained / "checkpoint_epoch=2.pt", tmp_path / "gone_on" / "checkpoint_epoch=2.pt")
    train(dataset, tmp_path / "gone_on", steps=6, overlap=1.0)
    train(dataset, shutil.copytree(trained, tmp_path / "whole"), steps=6, overlap=1.0)
    expected, found = weights_of(tmp_path / "whole", 3), weights_of(tmp_path / "gone_on", 3)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_weights_that_cannot_be_evaluated_are_refused_before_a_scan_is_read(trained: Path, tmp_path: Path) -> None:
    ruined = torch.load(trained / "best.pt", weights_only=True)
    next(iter(ruined.values())).fill_(math.nan)
    torch.save(ruined, tmp_path / "ruined.pt")
    for path, message in (
        (tmp_path / "nowhere.pt", "nowhere.pt: no such file; give a file of weights"),
        (ROOT / "bundles" / "pan" / "models" / "model.pt", "model.pt: has no tensor"),
        (tmp_path / "ruined.pt", "holds NaN or infinite values; the weights are damaged"),
    ):
        with pytest.raises(RuntimeError) as caught:
            workflow(
                tmp_path / "no scans", tmp_path / "out", ("train.json", "evaluate.json"), checkpoint_path=str(path)
            )
        assert message in str(caught.value.__cause__)


def test_fewer_steps_than_are_done_are_refused(trained: Path, dataset: Path) -> None:
    before = {path.name: path.read_bytes() for path in trained.glob("*.*")}
    assert {"best.pt", "card.json"} <= set(before)
    with pytest.raises(RuntimeError) as caught:
        train(dataset, trained, steps=2, spacing=[2.0, 2.0, 2.0])
    assert "checkpoint_epoch=2.pt: has 2 epochs, more than the 1 of steps" in str(caught.value.__cause__)
    assert {path.name: path.read_bytes() for path in trained.glob("*.*")} == before
