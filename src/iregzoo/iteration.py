"""Adaptive refinement: controllers that say when to stop, and the one loop that they steer.

A level of a pyramid proposes a better displacement as often as it is asked. A controller looks at the similarity of the
moving image, warped at full resolution, to the fixed one, and decides for each pair of a batch whether a proposal is
taken and whether to ask again. Pairs that have finished stop moving while others go on, so a batch gives each pair what
it would get alone. Scores stay on their device; the host reads two flags an iteration, together.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from iregzoo.similarity import mae, mse, ncc

Metric = Literal["ncc", "mse", "mae"]
MAX_ITERATIONS = 10


class Verdict(NamedTuple):
    """For each pair (B,): take the newest candidate, and propose another."""

    accept: Tensor
    proceed: Tensor


class AdaptiveController(Protocol):
    """Steers ``refine`` by the scores of its candidates."""

    @property
    def max_iterations(self) -> int: ...
    @property
    def compares_start(self) -> bool:
        """Whether the displacement a level starts from is scored, too."""
        ...

    @property
    def keeps_best(self) -> bool:
        """Whether a level returns its best-scoring displacement instead of its last."""
        ...

    def score(self, warped: Tensor, fixed: Tensor) -> Tensor:
        """Similarity per pair (B,), higher is better."""
        ...

    def judge(self, scores: Tensor, start: Tensor | None) -> Verdict:
        """Judge the newest of the scores (K, B) seen at this level; ``start`` (B,) is the level's first field's."""
        ...


def score(warped: Tensor, fixed: Tensor, metric: Metric) -> Tensor:
    """Similarity per pair (B,), higher is better: NCC, or the negative of MSE or MAE (iPEAR's ablation)."""
    if metric == "ncc":
        return ncc(warped, fixed)
    if metric == "mse":
        return -mse(warped, fixed)
    _check_metric(metric)
    return -mae(warped, fixed)


def _check_iterations(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}; expected a whole number of at least 1")


def _check_metric(metric: str) -> None:
    if metric not in get_args(Metric):
        raise ValueError(f"metric={metric!r}; expected one of {', '.join(get_args(Metric))}")


def _check_threshold(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ValueError(f"{name}={value!r}; expected a number")


@dataclass(frozen=True)
class FixedIterations:
    """The same number of refinements at every level, every one taken. One is the plain pyramid network."""

    max_iterations: int = 1

    def __post_init__(self) -> None:
        _check_iterations("max_iterations", self.max_iterations)


Controller = FixedIterations | AdaptiveController


@dataclass(frozen=True)
class IterStop:
    """Stop at the first refinement that gains less than ``threshold``, and do not take it (IIRP-Net, Algorithm 1).

    Line 9 of the algorithm prints the difference the other way round; the text means a gain s(φ_t) − s(φ_(t−1)). The
    published code takes the rejected refinement at all but the coarsest level and scores the first one against 0; here,
    as in the algorithm, it is not taken. The first estimate of the coarsest level is always taken. A finer level starts
    from the score that the coarser one reached; the algorithm scores the resized displacement once more.
    """

    threshold: float = 0.005
    max_iterations: int = MAX_ITERATIONS
    metric: Metric = "ncc"
    compares_start: ClassVar[bool] = True
    keeps_best: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_iterations("max_iterations", self.max_iterations)
        _check_threshold("threshold", self.threshold)
        _check_metric(self.metric)

    def score(self, warped: Tensor, fixed: Tensor) -> Tensor:
        return score(warped, fixed, self.metric)

    def judge(self, scores: Tensor, start: Tensor | None) -> Verdict:
        previous = scores[-2] if len(scores) > 1 else start
        if previous is None:
            yes = torch.ones_like(scores[-1], dtype=torch.bool)
            return Verdict(yes, yes)
        gained = scores[-1] - previous >= self.threshold
        return Verdict(gained, gained)


Order = Literal["stability-first", "convergence-first", "stability", "convergence"]


@dataclass(frozen=True)
class TCI:
    """Threshold-controlled iteration: stop once the scores are stable, and then no longer rising (iPEAR, Algorithm 1).

    Stability: population standard deviation (15) of the last ``window`` scores at most ``stability``.
    Convergence: the last gain (16) is at most ``convergence``. Both are asked only of a full window, so a level takes
    at least ``window`` refinements, or ``max_iterations`` where these are fewer. (15) does not say which standard
    deviation it is. Every refinement is taken.

    ``order`` gives the ablations of iPEAR's Table 6: one stage alone, or both in either order. As Algorithm 1 writes
    them, both stages look at the same scores, so the two orders stop at the same iteration; both names are kept so that
    the table's four rows can be run.
    ``keeps_best`` goes beyond the paper: a level returns its best-scoring displacement instead of its last.
    """

    window: int = 3
    stability: float = 0.005
    convergence: float = 0.005
    max_iterations: int = MAX_ITERATIONS
    metric: Metric = "ncc"
    order: Order = "stability-first"
    keeps_best: bool = False
    compares_start: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_iterations("max_iterations", self.max_iterations)
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 2:
            raise ValueError(f"window={self.window!r}; expected a whole number: a gain needs at least 2 scores")
        for name in ("stability", "convergence"):
            _check_threshold(name, getattr(self, name))
        _check_metric(self.metric)
        if self.order not in get_args(Order):
            raise ValueError(f"order={self.order!r}; expected one of {', '.join(get_args(Order))}")

    def score(self, warped: Tensor, fixed: Tensor) -> Tensor:
        return score(warped, fixed, self.metric)

    def judge(self, scores: Tensor, start: Tensor | None) -> Verdict:
        yes = torch.ones_like(scores[-1], dtype=torch.bool)
        if len(scores) < self.window:
            return Verdict(yes, yes)
        return Verdict(yes, ~self._finished(scores))

    def _finished(self, scores: Tensor) -> Tensor:
        recent = scores[-self.window :]
        stable = recent.std(0, correction=0) <= self.stability
        converged = recent[-1] - recent[-2] <= self.convergence
        if self.order == "stability":
            return stable
        if self.order == "convergence":
            return converged
        return stable & converged


class Refinement(NamedTuple):
    """The outcome of one level.

    Attributes:
        displacement: (B, N, *shape).
        iterations: refinements taken (B,).
        scores: of every candidate, (K, B); (0, B) if none.
        reached: score of the displacement (B,); None where the controller asks for none.
    """

    displacement: Tensor
    iterations: Tensor
    scores: Tensor
    reached: Tensor | None = None


def refine(
    displacement: Tensor,
    propose: Callable[[Tensor], Tensor],
    similarity: Callable[[Tensor], Tensor] | None,
    controller: Controller,
    *,
    coarsest: bool = False,
    reached: Tensor | None = None,
) -> Refinement:
    """Refine one level's displacement under a controller.

    Args:
        displacement: (B, N, *shape), where the level starts.
        propose: gives a candidate displacement from the present one, in memory of its own.
        similarity: scores a displacement of this level, (B,), higher is better; fixed iterations need none.
        controller: decides what is taken and when to stop.
        coarsest: the start is no estimate yet, so there is nothing to compare the first candidate with.
        reached: score of the start (B,), where it is known.

    Raises:
        ValueError: for an adaptive controller without a similarity.
    """
    batch = displacement.shape[0]
    if isinstance(controller, FixedIterations):
        for _ in range(controller.max_iterations):
            displacement = propose(displacement)
        counts = torch.full((batch,), controller.max_iterations, dtype=torch.long, device=displacement.device)
        return Refinement(displacement, counts, displacement.new_empty((0, batch)))
    if similarity is None:
        raise ValueError(f"{type(controller).__name__} steers by scores; give a similarity")
    start = None
    if controller.compares_start and not coarsest:
        start = similarity(displacement) if reached is None else reached
    return _refine_adaptively(displacement, propose, similarity, controller, start)


def _refine_adaptively(
    displacement: Tensor,
    propose: Callable[[Tensor], Tensor],
    similarity: Callable[[Tensor], Tensor],
    controller: AdaptiveController,
    start: Tensor | None,
) -> Refinement:
    batch = displacement.shape[0]
    reached = start
    active = torch.ones(batch, dtype=torch.bool, device=displacement.device)
    counts = torch.zeros(batch, dtype=torch.long, device=displacement.device)
    scores: list[Tensor] = []
    best = (displacement, start) if controller.keeps_best and start is not None else None
    for _ in range(controller.max_iterations):
        candidate = propose(displacement)
        scores.append(torch.where(active, similarity(candidate), torch.nan))
        accept, proceed = controller.judge(torch.stack(scores), start)
        accept = accept & active
        active = accept & proceed
        all_accept, any_active = torch.stack((accept.all(), active.any())).tolist()
        displacement = candidate if all_accept else _select(accept, candidate, displacement)
        reached = scores[-1] if reached is None else torch.where(accept, scores[-1], reached)
        counts = counts + accept
        if controller.keeps_best:
            # Where a candidate is not taken, what is left has an earlier score.
            best = _better(best, displacement, torch.where(accept, scores[-1], torch.nan))
        if not any_active:
            break
    if best is not None:
        displacement, reached = best
    return Refinement(displacement, counts, torch.stack(scores), reached)


def _select(mask: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    return torch.where(mask.view(-1, *[1] * (chosen.dim() - 1)), chosen, other)


def _better(best: tuple[Tensor, Tensor] | None, displacement: Tensor, newest: Tensor) -> tuple[Tensor, Tensor]:
    if best is None:
        return displacement, newest
    # The score of a finished pair, and of a candidate that was not taken, is NaN and improves nothing.
    improved = (newest > best[1]) | best[1].isnan()
    return _select(improved, displacement, best[0]), torch.where(improved, newest, best[1])
