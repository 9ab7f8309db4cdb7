"""Controllers on scripted scores: how often they iterate, and which displacement they return.

The k-th candidate of a level is a field that holds k everywhere, and the start holds 0; a script gives the score of
each, so a returned field tells which candidate it is. Scores and thresholds are binary fractions: exact in float32.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from iregzoo.iteration import TCI, Controller, FixedIterations, IterStop, Refinement, Verdict, refine
from iregzoo.similarity import mae, mse, ncc

Script = Sequence[float]


def candidates(displacement: Tensor) -> Tensor:
    """Which candidate each pair's field is (B,)."""
    return displacement.flatten(1).amax(1).long()


def play(controller: Controller, *scripts: Script, coarsest: bool = False) -> Refinement:
    """Refine a batch of one pair per script; a script's first score is the start's."""
    table = torch.tensor(scripts)
    start = torch.zeros(len(scripts), 3, 2, 3, 4)

    def similarity(displacement: Tensor) -> Tensor:
        return table[torch.arange(len(scripts)), candidates(displacement)]

    return refine(start, lambda current: current + 1, similarity, controller, coarsest=coarsest)


def outcome(controller: Controller, *scripts: Script, coarsest: bool = False) -> tuple[list[int], list[int]]:
    """Candidates returned and refinements counted, per pair."""
    result = play(controller, *scripts, coarsest=coarsest)
    return candidates(result.displacement).tolist(), result.iterations.tolist()


# --- FixedIterations


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("coarsest", [True, False])
def test_fixed_iterations_takes_every_refinement_and_scores_none(count: int, coarsest: bool) -> None:
    start = torch.zeros(2, 3, 2, 3, 4)
    result = refine(start, lambda u: u + 1, None, FixedIterations(count), coarsest=coarsest)
    assert candidates(result.displacement).tolist() == result.iterations.tolist() == [count, count]
    assert result.scores.shape == (0, 2)


def test_adaptive_controllers_need_a_similarity() -> None:
    with pytest.raises(ValueError, match="TCI steers by scores; give a similarity"):
        refine(torch.zeros(1, 3, 2, 2, 2), lambda u: u + 1, None, TCI())


def test_fixed_iterations_is_one_unless_told() -> None:
    assert FixedIterations().max_iterations == 1


# --- IterStop

RISING = [k / 8 for k in range(12)]


@pytest.mark.parametrize(
    ("script", "taken", "scored"),
    [
        ([0.5, 0.25, 0.75], 0, 1),  # a loss at once: the level keeps its start
        ([0.5, 0.75, 0.75, 1.0], 1, 2),  # no gain in the second
        ([0.5, 0.75, 0.8125, 1.0], 1, 2),  # a gain below the threshold
        ([0.0, 0.125, 0.25, 0.375, 0.25], 3, 4),  # gains of exactly the threshold are taken
        ([-1.0, -0.5, -0.25, -0.25], 2, 3),
    ],
)
def test_iterstop_returns_the_last_field_that_gained(script: Script, taken: int, scored: int) -> None:
    result = play(IterStop(threshold=0.125), script)
    assert candidates(result.displacement).tolist() == result.iterations.tolist() == [taken]
    assert result.scores[:, 0].tolist() == list(script[1 : scored + 1])


@pytest.mark.parametrize("first", [-1.0, 0.0, 0.25])
def test_iterstop_takes_the_first_estimate_of_the_coarsest_level(first: float) -> None:
    script = [0.5, first, first, 1.0]
    assert outcome(IterStop(threshold=0.125), script, coarsest=True) == ([1], [1])
    assert outcome(IterStop(threshold=0.125), script) == ([0], [0])


@pytest.mark.parametrize("cap", [1, 2, 5])
@pytest.mark.parametrize("coarsest", [True, False])
def test_iterstop_ends_at_its_maximum(cap: int, coarsest: bool) -> None:
    assert outcome(IterStop(threshold=0.125, max_iterations=cap), RISING, coarsest=coarsest) == ([cap], [cap])


def test_iterstop_has_the_settings_of_the_paper() -> None:
    controller = IterStop()
    assert (controller.threshold, controller.max_iterations, controller.metric) == (0.005, 10, "ncc")
    assert outcome(controller, [0.5, 0.506, 0.510]) == ([1], [1])
    assert outcome(controller, RISING) == ([10], [10])


# --- TCI

# Its last three scores still spread at 3; at 4 they are stable to 1/8, yet rising by 1/8; at 5 by 1/16 only.
SETTLING = [9.0, 0.0, 0.5, 0.625, 0.75, 0.8125, 0.8125, 0.8125, 0.8125]
# It stops rising at 3, while its scores still spread; they are stable at 5.
SWINGING = [9.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5]


def population_std(values: Script) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


@pytest.mark.parametrize(
    ("order", "settling", "swinging"),
    [
        ("stability", 4, 5),
        ("convergence", 5, 3),
        ("stability-first", 5, 5),
        ("convergence-first", 5, 5),
    ],
)
def test_tci_orders_stop_where_their_stages_say(order: Any, settling: int, swinging: int) -> None:
    controller = TCI(stability=0.125, convergence=0.0625, order=order)
    assert outcome(controller, SETTLING) == ([settling], [settling])
    assert outcome(controller, SWINGING) == ([swinging], [swinging])


@pytest.mark.parametrize("coarsest", [True, False])
@pytest.mark.parametrize("window", [2, 3, 5])
def test_tci_refines_at_least_a_window_and_never_looks_at_the_start(window: int, coarsest: bool) -> None:
    flat = [0.75] + [0.5] * 10
    result = play(TCI(window=window), flat, coarsest=coarsest)
    assert result.iterations.tolist() == [window]
    assert result.scores[:, 0].tolist() == [0.5] * window


def test_tci_measures_the_population_deviation_of_its_window_only() -> None:
    scores = [0.0, 1.0, 0.75, 0.625, 0.625]
    limit = population_std(scores[1:4])
    assert population_std(scores[:3]) > 1.01 * limit
    script = [9.0, *scores]
    assert outcome(TCI(stability=1.001 * limit, order="stability"), script) == ([4], [4])
    assert outcome(TCI(stability=0.999 * limit, order="stability"), script) == ([5], [5])


def test_tci_stops_at_exactly_its_thresholds() -> None:
    assert outcome(TCI(window=2, stability=0.0625, order="stability"), RISING) == ([2], [2])
    assert outcome(TCI(window=2, stability=0.0624, order="stability"), RISING) == ([10], [10])
    assert outcome(TCI(convergence=0.125, order="convergence"), RISING) == ([3], [3])
    assert outcome(TCI(convergence=0.124, order="convergence", max_iterations=6), RISING) == ([6], [6])


@pytest.mark.parametrize("cap", [1, 2, 4])
def test_tci_ends_at_its_maximum(cap: int) -> None:
    assert outcome(TCI(max_iterations=cap), RISING) == ([cap], [cap])


def test_tci_has_the_settings_of_the_paper() -> None:
    controller = TCI()
    assert (controller.window, controller.stability, controller.convergence) == (3, 0.005, 0.005)
    assert (controller.max_iterations, controller.order, controller.metric) == (10, "stability-first", "ncc")


@pytest.mark.parametrize(
    ("script", "best"),
    [
        ([9.0, 0.5, 0.75, 0.625, 0.625, 0.625, 0.625], 2),
        ([9.0, 0.75, 0.5, 0.5, 0.5, 0.5], 1),
        ([9.0, 0.0, 0.25, 0.5, 0.5, 0.5], 3),  # the first of equals
    ],
)
def test_tci_keeps_the_best_field_where_asked(script: Script, best: int) -> None:
    last = outcome(TCI(), script)[0]
    assert outcome(TCI(keeps_best=True), script) == ([best], last)
    assert last != [best]


# --- batches


@pytest.mark.parametrize(
    "controller",
    [
        FixedIterations(3),
        IterStop(threshold=0.125),
        IterStop(threshold=0.125, max_iterations=2),
        TCI(stability=0.125, convergence=0.0625),
        TCI(stability=0.125, convergence=0.0625, keeps_best=True),
    ],
    ids=["fixed", "iterstop", "iterstop-2", "tci", "tci-best"],
)
@pytest.mark.parametrize("coarsest", [True, False])
def test_batch_equals_its_singles(controller: Controller, coarsest: bool) -> None:
    scripts = [
        [0.5, 0.25, 0.75, 0.75, 0.75, 0.75, *[0.75] * 6],
        RISING,
        [0.0, 0.5, 0.625, 0.5, 1.0, 0.5, *[0.5] * 6],
        [0.5, 1.0, 0.5, 0.5, 0.5, 0.5, *[0.5] * 6],
    ]
    batch = play(controller, *scripts, coarsest=coarsest)
    singles = [play(controller, script, coarsest=coarsest) for script in scripts]
    longest = max(len(single.scores) for single in singles)
    assert len(batch.scores) == longest
    for i, single in enumerate(singles):
        assert torch.equal(batch.displacement[i], single.displacement[0])
        assert batch.iterations[i] == single.iterations[0]
        seen = len(single.scores)
        assert torch.equal(batch.scores[:seen, i], single.scores[:, 0])
        assert batch.scores[seen:, i].isnan().all()
    if not isinstance(controller, FixedIterations) and controller.max_iterations > 2:
        assert len({len(single.scores) for single in singles}) > 1


def test_refinement_asks_no_more_once_every_pair_has_finished() -> None:
    asked = []

    def propose(current: Tensor) -> Tensor:
        asked.append(current)
        return current

    refine(torch.zeros(2, 3, 2, 2, 2), propose, lambda u: torch.zeros(len(u)), IterStop())
    assert len(asked) == 1


@pytest.mark.parametrize("coarsest", [True, False])
@pytest.mark.parametrize("controller", [IterStop(0.125), TCI(2, 0.125, 0.125), TCI(2, 0.125, 0.125, keeps_best=True)])
def test_a_level_says_what_its_displacement_scores(controller: Controller, coarsest: bool) -> None:
    scripts = [[0.0, 0.5, 0.625, 0.5, 1.0, 0.5, *[0.5] * 6], [0.5, 0.25, 0.5, 0.5, 0.5, 0.5, *[0.5] * 6]]
    result = play(controller, *scripts, coarsest=coarsest)
    expected = [script[taken] for script, taken in zip(scripts, candidates(result.displacement), strict=True)]
    assert result.reached is not None
    assert result.reached.tolist() == expected


def test_a_known_score_of_the_start_is_not_asked_for() -> None:
    scored = []

    def similarity(displacement: Tensor) -> Tensor:
        scored.append(int(candidates(displacement)))
        return torch.tensor([0.5])

    start = torch.zeros(1, 3, 2, 2, 2)
    known = refine(start, lambda u: u + 1, similarity, IterStop(0.25), reached=torch.tensor([0.25]))
    assert (scored, int(known.iterations)) == ([1, 2], 1)
    asked = refine(start, lambda u: u + 1, similarity, IterStop(0.25))
    assert (scored[2:], int(asked.iterations)) == ([0, 1], 0)


# --- scores and guards


@pytest.mark.parametrize("make", [IterStop, TCI])
@pytest.mark.parametrize(("metric", "sign", "measure"), [("ncc", 1, ncc), ("mse", -1, mse), ("mae", -1, mae)])
def test_score_is_higher_for_better(
    make: Callable[..., Controller], metric: str, sign: int, measure: Callable[[Tensor, Tensor], Tensor]
) -> None:
    fixed, noise = torch.rand(2, 2, 1, 4, 5, 6, generator=torch.manual_seed(1))
    warped = torch.stack((fixed[0] + 0.01 * noise[0], noise[1]))
    scores = make(metric=metric).score(warped, fixed)
    assert torch.equal(scores, sign * measure(warped, fixed))
    assert scores[0] > scores[1]


@pytest.mark.parametrize("make", [FixedIterations, IterStop, TCI])
@pytest.mark.parametrize("count", [0, -1, 2.0, True, None])
def test_maximum_that_is_no_count_is_refused(make: Callable[..., Controller], count: Any) -> None:
    with pytest.raises(ValueError, match=f"max_iterations={count}"):
        make(max_iterations=count)


@pytest.mark.parametrize("window", [1, 0, -3])
def test_window_without_a_gain_is_refused(window: int) -> None:
    with pytest.raises(ValueError, match=f"window={window}"):
        TCI(window=window)


def test_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="order='both'"):
        TCI(order="both")  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [IterStop, TCI])
def test_unknown_metric_is_refused(make: Callable[..., Controller]) -> None:
    with pytest.raises(ValueError, match="metric='ssim'; expected one of ncc, mse, mae"):
        make(metric="ssim")


@pytest.mark.parametrize(
    ("make", "name"), [(IterStop, "threshold"), (TCI, "stability"), (TCI, "convergence"), (TCI, "window")]
)
@pytest.mark.parametrize("value", ["0.005", None, float("nan"), True, [1]])
def test_what_is_no_number_is_refused(make: Callable[..., Controller], name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}=.*; expected a"):
        make(**{name: value})


@dataclass(frozen=True)
class Choosy(TCI):
    """Takes the first candidate that gains, and no other; and a level gives its best."""

    keeps_best: bool = True
    compares_start: ClassVar[bool] = True

    def judge(self, scores: Tensor, start: Tensor | None) -> Verdict:
        gained = scores[-1] >= (scores[-2] if len(scores) > 1 else start)
        return Verdict(gained, torch.ones_like(gained))


def test_the_score_of_a_candidate_that_is_not_taken_is_not_that_of_what_is_left() -> None:
    scores = {0: 0.5, 1: 0.25, 2: 0.75}
    for script, field, reached in (([0.25, 0.25], 0, 0.5), ([0.75, 0.25], 1, 0.75)):
        told = iter(script)
        result = refine(
            torch.zeros(1, 3, 2, 2, 2),
            lambda u: u + 1,
            lambda u, told=told: torch.tensor([next(told)]),
            Choosy(max_iterations=len(script)),
            reached=torch.tensor([scores[0]]),
        )
        assert float(result.displacement.mean()) == field
        assert result.reached is not None
        assert result.reached.tolist() == [reached]
