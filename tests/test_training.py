"""What a training step reports, and what validation makes of a prediction."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from iregzoo.errors import InputError
from iregzoo.handlers import LoadWeights, SaveBest
from iregzoo.iteration import FixedIterations
from iregzoo.losses import RegistrationLoss
from iregzoo.networks import IIRPNet
from iregzoo.registration import PairNetwork
from iregzoo.training import (
    ImageSimilarity,
    LandmarkErrors,
    TrainStep,
    WarpLabels,
    check_measurable,
    epochs,
    label_values,
    latest_checkpoint,
    prepare_landmarks,
    prepare_pairs,
)
from trainers import trainer_of

# --- a step


class Recorder(PairNetwork):
    """Notes the iterations that each call asks for."""

    def __init__(self) -> None:
        super().__init__(IIRPNet())
        self.asked: list[int] = []

    def forward(self, image: Tensor, complete: bool = False, controller: Any = None) -> Any:
        assert isinstance(controller, FixedIterations)
        self.asked.append(controller.max_iterations)
        return super().forward(image, complete, controller)


def make_engine(loss: RegistrationLoss) -> Any:
    torch.manual_seed(0)
    return trainer_of(Recorder(), loss)


def make_batch(size: int = 16) -> dict[str, Tensor]:
    image = torch.rand(1, 2, size, size, size, generator=torch.manual_seed(1))
    return {"image": image, "label": (image > 0.5).int()}


@pytest.mark.parametrize(
    ("amp", "computed", "expected"),
    [("auto", False, torch.float32), ("auto", True, torch.bfloat16), (True, False, torch.bfloat16)],
)
def test_bfloat16_is_trained_in_where_asked_or_computed(
    monkeypatch: pytest.MonkeyPatch, amp: bool | str, computed: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr("iregzoo.precision.computes_bfloat16", lambda device: computed)
    engine, seen = make_engine(RegistrationLoss()), set[torch.dtype]()
    convolution = next(part for part in engine.network.modules() if isinstance(part, torch.nn.Conv3d))
    convolution.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    TrainStep(amp=amp)(engine, make_batch(24))
    assert seen == {expected}
    with pytest.raises(InputError, match="amp 'perhaps': give true or false"):
        TrainStep(amp="perhaps")


@pytest.mark.parametrize("amp", [False, True])
def test_step_reports_every_term_and_moves_every_weight(amp: bool) -> None:
    engine = make_engine(RegistrationLoss(folding=0.1, overlap=1.0, labels=(1,)))
    before = {name: tensor.clone() for name, tensor in engine.network.state_dict().items()}
    terms = TrainStep(amp=amp)(engine, make_batch(24))
    assert terms.pop("learning_rate") == engine.optimizer.param_groups[0]["lr"]
    assert set(terms) == {"loss", "similarity", "smoothness", "folding", "overlap"}
    assert all(isinstance(value, float) for value in terms.values())
    assert terms["loss"] == pytest.approx(sum(terms.values()) - terms["loss"], abs=1e-5)
    after = engine.network.state_dict()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert engine.network.training


def test_step_without_labels_needs_none() -> None:
    batch = make_batch()
    del batch["label"]
    found = TrainStep()(make_engine(RegistrationLoss()), batch)
    assert set(found) == {"loss", "similarity", "smoothness", "learning_rate"}


def test_steps_lower_the_loss_on_one_pair() -> None:
    engine, batch = make_engine(RegistrationLoss(smoothness=0.1)), make_batch()
    losses = [TrainStep()(engine, batch)["loss"] for _ in range(10)]
    assert losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize("size", [8, 16])
def test_shape_that_bfloat16_on_a_cpu_gets_wrong_is_refused(size: int) -> None:
    with pytest.raises(InputError, match=rf"shape {size} .*bfloat16.*amp to false"):
        TrainStep(amp=True)(make_engine(RegistrationLoss()), make_batch(size))


def test_several_passes_of_a_method_that_takes_one_are_refused() -> None:
    engine = make_engine(RegistrationLoss())
    engine.network.network.controller = None
    with pytest.raises(InputError, match=r"passes \[1, 2\]: .*set passes to \[1\]"):
        TrainStep(passes=(1, 2))(engine, make_batch(8))


def test_loss_that_is_not_finite_stops_the_training_and_leaves_the_weights() -> None:
    engine = make_engine(RegistrationLoss(similarity=float("inf")))
    before = {name: tensor.clone() for name, tensor in engine.network.state_dict().items()}
    engine.state.iteration = 7
    with pytest.raises(InputError, match=r"step 7 is not finite; lower learning_rate"):
        TrainStep()(engine, make_batch(8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.network.state_dict().items())


def test_a_gradient_is_shortened_to_the_largest_norm() -> None:
    def norm(clip: float) -> Tensor:
        engine = make_engine(RegistrationLoss())
        TrainStep(clip=clip)(engine, make_batch(8))
        gradients = [each.grad.flatten() for each in engine.network.parameters() if each.grad is not None]
        return torch.cat(gradients).norm()

    whole = norm(0.0)
    assert whole > 0
    torch.testing.assert_close(norm(float(whole) / 4), whole / 4)
    torch.testing.assert_close(norm(float(whole) * 4), whole)


def test_a_gradient_that_is_not_finite_stops_the_training_and_leaves_the_weights() -> None:
    engine = make_engine(RegistrationLoss())
    first = next(engine.network.parameters())
    first.register_hook(lambda gradient: gradient * torch.inf)
    before = {name: tensor.clone() for name, tensor in engine.network.state_dict().items()}
    with pytest.raises(InputError, match=r"gradient of step 1 is not finite; lower learning_rate"):
        TrainStep(clip=1.0)(engine, make_batch(8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.network.state_dict().items())


@pytest.mark.parametrize("clip", [-1.0, float("nan"), float("inf"), None])
def test_a_norm_that_is_none_is_refused(clip: Any) -> None:
    with pytest.raises(InputError, match=r"clip .*give the maximum gradient norm, or 0"):
        TrainStep(clip=clip)


@pytest.mark.parametrize("passes", [2, [], [0], [1.5], "12"])
def test_passes_that_are_none_are_refused(passes: Any) -> None:
    with pytest.raises(InputError, match=r"passes .*: give a list of numbers of passes a level"):
        TrainStep(passes=passes)


def test_labels_that_the_loss_wants_and_a_pair_has_not_are_asked_for() -> None:
    engine = make_engine(RegistrationLoss(overlap=1.0, labels=(1,)))
    with pytest.raises(InputError, match="needs the label maps of both images; give every scan of train one"):
        TrainStep()(engine, {"image": make_batch()["image"]})


def test_passes_are_drawn_by_iteration_and_the_same_each_time() -> None:
    def asked(passes: tuple[int, ...]) -> list[int]:
        engine = make_engine(RegistrationLoss())
        for iteration in range(1, 9):
            engine.state.iteration = iteration
            TrainStep(passes=passes)(engine, make_batch(8))
        found: list[int] = engine.network.asked
        return found

    assert asked((1,)) == [1] * 8
    assert set(asked((1, 3))) == {1, 3}
    assert asked((1, 3)) == asked((1, 3))


# --- validation and checkpoints


def test_validation_gets_images_and_labels() -> None:
    batch = make_batch()
    image, label = prepare_pairs(batch, torch.device("cpu"), non_blocking=True, extra=1)
    assert torch.equal(image, batch["image"])
    assert torch.equal(label, batch["label"])


def test_warped_and_fixed_labels_become_one_channel_a_label() -> None:
    moving = torch.zeros(6, 6, 6, dtype=torch.int32)
    moving[2, 3, 3], moving[4, 1, 1] = 1, 5
    fixed = moving.roll(-1, 0)
    pred = torch.zeros(3, 6, 6, 6)
    pred[0] = 1.0
    found = WarpLabels([5, 1])({"pred": pred, "label": torch.stack((moving, fixed)), "image": "kept"})
    assert found["image"] == "kept"
    assert found["pred"].shape == found["label"].shape == (2, 6, 6, 6)
    assert torch.equal(found["label"], torch.stack((fixed == 5, fixed == 1)).float())
    assert torch.equal(found["pred"], found["label"])


def test_validation_gets_landmarks_where_there_are_no_labels_and_images_where_there_is_neither() -> None:
    batch = {"image": make_batch()["image"], "points": torch.rand(1, 2, 5, 3)}
    assert torch.equal(prepare_pairs(batch, torch.device("cpu"))[1], batch["points"])
    assert torch.equal(prepare_pairs({"image": batch["image"]}, torch.device("cpu"))[1], batch["image"])
    images, points = prepare_landmarks({**batch, "label": batch["image"]}, torch.device("cpu"))
    assert torch.equal(points, batch["points"])
    assert torch.equal(images, batch["image"])


@pytest.mark.parametrize(
    ("measured", "kind", "wanted"),
    [(WarpLabels([1]), "label", "label maps"), (LandmarkErrors((1.0, 1.0, 1.0)), "points", "landmarks")],
)
def test_scans_that_validation_cannot_measure_are_refused_at_once(measured: Any, kind: str, wanted: str) -> None:
    image = make_batch()["image"]
    check_measurable([{"image": image, kind: torch.ones_like(image)}], measured)
    check_measurable([{"image": image}], ImageSimilarity())
    with pytest.raises(InputError, match=f"validation needs {wanted}, .*add configs/unlabelled.json"):
        check_measurable([{"image": image, kind: image}, {"image": image}], measured)


def test_labels_that_no_scan_has_are_refused_at_once() -> None:
    labels = torch.zeros(1, 4, 4, 4)
    labels[0, 0] = 7
    check_measurable([{"label": labels}, {"label": 0 * labels}], WarpLabels([7, 9]))
    with pytest.raises(InputError, match=r"labels \[1, 2\]: the label maps of val have none of them, but \[7\]"):
        check_measurable([{"label": labels}], WarpLabels([1, 2]))


def test_image_similarity_is_the_ncc_of_what_is_warped() -> None:
    fixed = make_batch()["image"][0, 1:]
    moving = fixed.roll(2, dims=1)
    pred = torch.zeros(3, *fixed.shape[1:])
    pred[0] = 2.0
    apart, found = (
        ImageSimilarity()({"pred": field, "image": torch.cat((moving, fixed))}) for field in (0 * pred, pred)
    )
    assert found["pred"].shape == found["label"].shape == (1,)
    assert float(found["pred"]) > float(apart["pred"])
    against = ImageSimilarity()({"pred": 0 * pred, "image": torch.cat((1 - fixed, fixed))})
    assert float(against["pred"]) == 0  # and not as good as the same image
    back = fixed.clone()
    back[:, -2:] = 0  # from beyond the moving image
    expected = np.corrcoef(back.flatten().numpy(), fixed.flatten().numpy())[0, 1]
    assert float(found["pred"]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("labels", ["null", 1, ["1", "2"], [0.5]])
def test_labels_that_are_no_whole_numbers_are_refused(labels: Any) -> None:
    with pytest.raises(InputError, match=r"labels .*give a list of whole numbers.*'\$None' on the command line"):
        label_values(labels, [])


def test_labels_to_compare_are_those_given_or_all_that_are_found() -> None:
    scans = [{"label": torch.tensor([0, 7, 3, -1])}, {"image": torch.ones(1)}, {"label": torch.tensor([0, 2, 7])}]
    assert label_values(None, scans) == (2, 3, 7)
    assert label_values([5, 1], scans) == (5, 1)
    assert label_values([], scans) == ()
    assert label_values(None, scans[1:2]) == ()


def test_landmarks_of_the_fixed_image_go_along_the_displacement() -> None:
    """A linear field, which interpolation reproduces: distances in mm by hand."""
    x = torch.arange(8.0)
    pred = torch.stack([0.5 * x[:, None, None].expand(8, 8, 8), torch.ones(8, 8, 8), torch.zeros(8, 8, 8)])
    fixed = torch.tensor([[2.0, 3.0, 4.0], [3.5, 1.25, 6.0]])
    moved = torch.tensor([[3.0, 4.0, 4.0], [5.25, 2.25, 6.0]])
    moving = moved + torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, 4.0]])
    found = LandmarkErrors((2.0, 1.0, 0.5))({"pred": pred, "label": torch.stack((moving, fixed)), "image": "kept"})
    torch.testing.assert_close(found["pred"], torch.tensor([2.0, 13.0**0.5]))
    assert torch.equal(found["label"], torch.zeros(2))
    assert found["image"] == "kept"


def test_weights_that_are_no_file_are_refused() -> None:
    with pytest.raises(InputError, match="weights None: give a file of weights"):
        LoadWeights(torch.nn.Linear(1, 1), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("lowest", "kept"), [(False, 3.0), (True, 1.0)])
def test_best_weights_are_of_the_highest_or_the_lowest_metric(tmp_path: Path, lowest: bool, kept: float) -> None:
    network = torch.nn.Linear(1, 1)
    saver = SaveBest(network, tmp_path / "best.pt", lowest=lowest)
    for value in (2.0, 3.0, 1.0, 2.5):
        torch.nn.init.constant_(network.weight, value)
        saver(SimpleNamespace(state=SimpleNamespace(metrics={"m": value}, key_metric_name="m")))
    assert float(torch.load(tmp_path / "best.pt", weights_only=True)["weight"]) == kept
    assert saver.state_dict()["best"] == kept


def test_latest_checkpoint_is_the_one_with_the_most_epochs(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere", 10) is None
    assert latest_checkpoint(tmp_path, 10) is None
    names = ("best", "checkpoint_epoch=9", "checkpoint_epoch=10", "checkpoint_epoch=11 (1)", "checkpoint_epoch=x")
    for name in (*(f"{name}.pt" for name in names), "checkpoint_epoch=11.txt"):
        torch.save({"trainer": {}}, tmp_path / name)
    assert latest_checkpoint(str(tmp_path), 10) == str(tmp_path / "checkpoint_epoch=10.pt")
    newest = (tmp_path / "checkpoint_epoch=10.pt").read_bytes()
    (tmp_path / "checkpoint_epoch=12.pt").write_bytes(newest[: len(newest) // 2])  # cut off while it was written
    assert latest_checkpoint(str(tmp_path), 12) == str(tmp_path / "checkpoint_epoch=10.pt")
    with pytest.raises(InputError, match=r"epoch=10\.pt: has 10 epochs, more than the 9 of steps; raise steps, keep"):
        latest_checkpoint(tmp_path, 9)


@pytest.mark.parametrize(("steps", "expected"), [(0, 1), (1, 1), (100, 1), (101, 2)])
def test_a_part_of_an_epoch_is_a_whole_one(steps: int, expected: int) -> None:
    assert epochs(steps, 100) == expected


def test_numbers_of_steps_that_are_none_are_refused() -> None:
    with pytest.raises(InputError, match="steps_per_epoch 0: give a whole number of at least 1"):
        epochs(5, 0)
    with pytest.raises(InputError, match="steps 'many': give a whole number"):
        epochs("many", 5)  # type: ignore[arg-type]
