"""Levels that are trained one after the other: which step trains what, alone, resumed, wrapped, and at which rate."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from iregzoo.errors import InputError
from iregzoo.handlers import ProgressiveLevels, halving
from iregzoo.networks import SMGICNet
from iregzoo.registration import PairNetwork
from iregzoo.symmetric import SymmetricLoss
from iregzoo.training import TrainStep
from trainers import trainer_of

STARTS = (0, 2, 5, 8)
FROZEN = 2
# Levels that each step trains: the new one alone for two steps, then with those before.
TRAINED = [{1}, {1}, {2}, {2}, {1, 2}, {3}, {3}, {1, 2, 3}, {4}, {4}, {1, 2, 3, 4}]


def build() -> PairNetwork:
    torch.manual_seed(0)
    network = SMGICNet(channels=2)
    with torch.no_grad():
        for estimator in network.estimators:
            estimator.head.weight.normal_(std=0.1)
    return PairNetwork(network)


def step_of(network: nn.Module) -> Any:
    """A training step as MONAI's trainer has it, of networks of this file."""
    trainer = trainer_of(network, SymmetricLoss(), rate=1e-2)
    return lambda engine, batch: TrainStep()(trainer, batch)


def train(network: nn.Module, steps: int, done: int = 0, **settings: Any) -> list[tuple[int, set[int]]]:
    """After each step, the levels that ran and those whose weights it changed."""
    whole = getattr(network, "module", network).network
    trainer = Engine(step_of(network))
    ProgressiveLevels(network, **{"starts": STARTS, "frozen": FROZEN, **settings}).attach(trainer)
    image = torch.rand(1, 2, 16, 16, 16, generator=torch.manual_seed(1))
    history: list[tuple[int, set[int]]] = []
    weights = [levels_weights(whole)]

    def note(engine: Engine) -> None:
        weights.append(levels_weights(whole))
        changed = {n for n, pair in enumerate(zip(*weights[-2:], strict=True), 1) if not torch.equal(*pair)}
        history.append((whole.levels, changed))

    trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
    trainer.load_state_dict({"iteration": done, "epoch_length": 1, "max_epochs": steps})
    trainer.run([{"image": image}])
    return history


def levels_weights(network: SMGICNet) -> list[Tensor]:
    return [nn.utils.parameters_to_vector(estimator.parameters()).detach().clone() for estimator in network.estimators]


def test_steps_train_the_levels_one_after_the_other() -> None:
    history = train(build(), len(TRAINED))
    assert [levels for levels, _ in history] == [1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert [changed for _, changed in history] == TRAINED


@pytest.mark.parametrize("done", [1, 3, 6, 9])
def test_resumed_training_goes_on_as_it_would_have(done: int) -> None:
    history = train(build(), len(TRAINED), done)
    assert [changed for _, changed in history] == TRAINED[done:]


def test_levels_are_never_frozen_for_no_steps() -> None:
    history = train(build(), 4, starts=(0, 1), frozen=0)
    assert history == [(1, {1}), *[(2, {1, 2})] * 3]


def test_levels_that_wait_can_still_be_trained_later() -> None:
    network = build()
    train(network, 3)
    waiting = [p.requires_grad for estimator in network.network.estimators[1:] for p in estimator.parameters()]  # type: ignore[index]
    assert all(waiting)


def test_wrapped_network_is_reached() -> None:
    network = nn.DataParallel(build())
    assert [changed for _, changed in train(network, 3)] == TRAINED[:3]


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_network_of_several_processes_is_trained_alike() -> None:
    network = nn.parallel.DistributedDataParallel(build(), find_unused_parameters=True)
    assert [changed for _, changed in train(network, len(TRAINED))] == TRAINED


@pytest.mark.parametrize("starts", [(), (1, 2), (0, 5, 5), (0, 5, 4), (0, 1, 2, 3, 4)])
def test_starts_that_do_not_increase_from_0_are_refused(starts: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"starts \[.*\]: give 1 to 4 step numbers"):
        ProgressiveLevels(build(), starts)


# --- the rate


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 1), (109_999, 1), (110_000, 0.5), (159_999, 0.5), (160_000, 0.25), (200_000, 1), (309_999, 1), (310_000, 0.5)],
)
def test_rate_is_halved_within_each_level(step: int, factor: float) -> None:
    assert halving(step, starts=(0, 200_000)) == factor
    if step % 100 == 0:
        assert halving(step // 100, steps_per_epoch=100, starts=(0, 200_000)) == factor


def test_rate_drives_an_optimizer() -> None:
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=1e-4)
    rule = partial(halving, starts=(0, 6), hold=2, every=2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rule)
    rates = []
    for _ in range(9):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1e-4] * 4 + [5e-5] * 2 + [1e-4] * 3)
