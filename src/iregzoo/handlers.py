"""Handlers of training: what happens beside its steps, and a rule of its learning rate."""

import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.engines import Evaluator
from monai.handlers import CheckpointSaver
from torch.optim.lr_scheduler import LRScheduler

from iregzoo.errors import InputError
from iregzoo.flags import check_count
from iregzoo.states import load_strictly, read_state


class LoadWeights:
    """Handler that loads a network's weights when an engine starts, and says in a line what is wrong with them.

    MONAI's ``CheckpointLoader`` asks for the device that they were trained on, and takes weights that are not finite.

    Args:
        network: to load them into.
        path: of the file, see ``read_state``.

    Raises:
        InputError: for what is no path.
    """

    def __init__(self, network: torch.nn.Module, path: str | Path) -> None:
        if not isinstance(path, (str, Path)):
            raise InputError(f"weights {path!r}: give a file of weights")
        self.network, self.path = network, Path(path)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Raises InputError as ``load_strictly`` does."""
        load_strictly(self.network, read_state(self.path), self.path)


class ProgressiveLevels:
    """Handler of training: adds a network's levels one after the other, coarse to fine (SM-GICNet, section 4.2).

    What a step trains follows from its number alone, so that a resumed training goes on as it would have. A parameter
    that a step does not train has no gradient, and the optimizer leaves it as it is; DistributedDataParallel has to be
    told so (``find_unused_parameters=True``).

    Args:
        network: a ``PairNetwork``, or one wrapped for several processes, of a network with ``levels`` and with
            ``estimators``, one a level.
        starts: how many steps of the training are done when each level begins, the first 0.
        frozen: steps at the beginning of each level but the first in which the levels before are kept as they are.

    Raises:
        InputError: for starts that do not increase from 0, or more of them than the network has levels.
    """

    def __init__(self, network: torch.nn.Module, starts: Sequence[int], frozen: int = 3000) -> None:
        whole: Any = getattr(network, "module", network)
        self.network = whole.network
        self.starts, self.frozen = tuple(starts), frozen
        levels = len(self.network.estimators)
        if not 1 <= len(self.starts) <= levels or self.starts[0] != 0 or sorted(set(self.starts)) != [*self.starts]:
            raise InputError(f"starts {[*self.starts]}: give 1 to {levels} step numbers that increase from 0")

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        done = engine.state.iteration - 1
        level = bisect_right(self.starts, done)
        alone = done < self.starts[level - 1] + self.frozen
        self.network.levels = level
        for number, estimator in enumerate(self.network.estimators, start=1):
            estimator.requires_grad_(number >= level or not alone)


class FromCommand:
    """A learning rate's scheduler in a checkpoint: how far it has come, and nothing else.

    PyTorch's own state also holds the rates and the length that the training began with, which would win over those of
    the command that resumes it: a lower learning rate would do nothing, and a longer training end at its highest.

    Args:
        scheduler: stands at its beginning, with the command's settings.
    """

    def __init__(self, scheduler: LRScheduler) -> None:
        self.scheduler = scheduler

    def state_dict(self) -> dict[str, int]:
        return {"last_epoch": self.scheduler.last_epoch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go from the beginning to where the training stood; the optimizer's state has been loaded before."""
        for group, rate in zip(self.scheduler.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["initial_lr"] = rate
            group["lr"] = rate
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # before any optimizer.step
            for _ in range(state["last_epoch"]):
                self.scheduler.step()


def halving(
    epoch: int, *, steps_per_epoch: int = 1, starts: Sequence[int] = (0,), hold: int = 60_000, every: int = 50_000
) -> float:
    """Factor of the learning rate in an epoch, anew from 1 in each level: SM-GICNet's rule (section 4.2).

    The paper halves "every 50k iterations after the first 60k iterations for each level"; the first time is read as at
    ``hold`` + ``every`` steps of the level.

    Args:
        epoch: epochs that are done, as ``LambdaLR`` counts them.
        steps_per_epoch: how many steps each has.
        starts: the steps at which each level begins, as in ``ProgressiveLevels``.
        hold: steps of a level before counting begins.
        every: steps from one halving to the next.
    """
    step = epoch * steps_per_epoch
    within = step - max(start for start in starts if start <= step)
    return 0.5 ** (max(within - hold, 0) // every)


class SaveBest:
    """Handler of validation: keeps the weights with the best key metric in a file.

    MONAI's ``CheckpointSaver`` forgets, when a training resumes, how good its best was, and overwrites it; the state of
    this one goes into the training's checkpoint. Of several processes that train together, the first alone writes.

    Args:
        network: whose state_dict is written.
        path: of the file.
        lowest: whether the best is the lowest, as of an error, and not the highest.
    """

    def __init__(self, network: torch.nn.Module, path: str | Path, lowest: bool = False) -> None:
        self.network, self.path, self.lowest = network, Path(path), lowest
        self.best = float("inf" if lowest else "-inf")
        self.stale = 0  # validations since the best

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        value = float(engine.state.metrics[engine.state.key_metric_name])
        self.stale += 1
        if value < self.best if self.lowest else value > self.best:
            self.best, self.stale = value, 0
            if idist.get_rank() > 0:
                return
            partial = self.path.with_name(f".{self.path.name}.partial")
            torch.save(self.network.state_dict(), partial)
            partial.replace(self.path)

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best, "stale": self.stale}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.best, self.stale = state["best"], int(state["stale"])


class EarlyStop:
    """Handler of training: ends it when validation has brought nothing better for a while.

    What it counts is in the state of ``SaveBest``, so a resumed training counts on.

    Args:
        best: the handler of validation that knows the best.
        patience: validations without a better one after which training ends.
    """

    def __init__(self, best: SaveBest, patience: int) -> None:
        self.best, self.patience = best, patience

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if self.best.stale >= self.patience:
            engine.terminate()


class LossBar:
    """Handler of training: a progress bar for each epoch, which shows the loss."""

    def attach(self, engine: Engine) -> None:
        ProgressBar(persist=True).attach(engine, output_transform=lambda terms: {"loss": terms["loss"]})


class LastEpoch:
    """Handler of training: validates and saves after the last epoch, too, where the intervals leave it out.

    Args:
        validator: as of ``ValidationHandler``.
        saver: of the training's checkpoints.
        val_interval, save_interval: epochs from one validation, and one checkpoint, to the next.

    Raises:
        InputError: for an interval that is no whole number above 0.
    """

    def __init__(self, validator: Evaluator, saver: CheckpointSaver, val_interval: int, save_interval: int) -> None:
        check_count(val_interval, "val_interval")
        check_count(save_interval, "save_interval")
        self.validator, self.saver = validator, saver
        self.val_interval, self.save_interval = val_interval, save_interval

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        if epoch % self.val_interval:
            self.validator.run(epoch)
        if epoch % self.save_interval:
            self.saver.interval_completed(engine)
