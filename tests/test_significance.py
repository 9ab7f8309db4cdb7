"""The signed-rank test and Holm's correction against worked numbers."""

import itertools
from statistics import NormalDist

import pytest

from iregzoo.significance import holm, signed_rank


def test_ten_pairs_worked_by_hand() -> None:
    """Ranks of |difference| are 1 to 10; the negative ones are 1 and 4, so W = 5, and 10 of the 1024 equally likely
    sign patterns give at most 5 on the left: p = 2 · 10 / 1024."""
    difference = [-0.1, 0.2, 0.3, -0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    found = signed_rank(difference, [0.0] * 10)
    assert found.pairs == 10
    assert found.statistic == 5
    assert found.median_difference == pytest.approx(0.55)
    assert found.p == pytest.approx(20 / 1024)


def test_p_is_the_share_of_sign_patterns_at_least_as_extreme() -> None:
    """Every sign pattern of six pairs counted, as the test's definition says."""
    first, second = [5.1, 4.8, 6.3, 7.7, 5.0, 6.6], [4.0, 5.0, 5.8, 5.7, 4.3, 6.3]
    difference = [a - b for a, b in zip(first, second, strict=True)]
    ranks = [sorted(map(abs, difference)).index(abs(d)) + 1 for d in difference]
    positive = sum(rank for rank, d in zip(ranks, difference, strict=True) if d > 0)
    observed = min(positive, 21 - positive)
    sums = [
        sum(r for r, sign in zip(ranks, signs, strict=True) if sign) for signs in itertools.product((0, 1), repeat=6)
    ]
    expected = sum(min(total, 21 - total) <= observed for total in sums) / len(sums)
    found = signed_rank(first, second)
    assert found.statistic == observed
    assert found.p == pytest.approx(expected)
    assert signed_rank(second, first).p == pytest.approx(expected)
    assert signed_rank(second, first).median_difference == pytest.approx(-found.median_difference)


@pytest.mark.parametrize(
    ("difference", "statistic", "p"),
    [
        # Without the pair that is equal, the ranks are 1 to 5 and the negative one is 1: of 32 patterns, two give at
        # most 1 on the left.
        ([-0.1, 0.2, 0.0, 0.3, 0.4, 0.5], 1, 4 / 32),
        # Two differ by as much: the ranks are 1, 2.5, 2.5, 4 and 5, and the negative one is 2.5. None, 1, 2.5 and the
        # other 2.5 are at most that: four of 32.
        ([0.125, -0.25, 0.25, 0.5, 0.75], 2.5, 8 / 32),
    ],
)
def test_equal_pairs_and_ties_are_counted_exactly(difference: list[float], statistic: float, p: float) -> None:
    found = signed_rank(difference, [0.0] * len(difference))
    assert found.statistic == statistic
    assert found.p == pytest.approx(p)


def test_many_pairs_with_ties_have_the_normal_approximation() -> None:
    """Twenty pairs: ten differ by 1, of which two lose, and ten by 2. Ranks are 5.5 and 15.5."""
    difference = [1.0] * 8 + [-1.0] * 2 + [2.0] * 10
    found = signed_rank(difference, [0.0] * 20)
    assert found.statistic == 2 * 5.5
    mean, ties = 20 * 21 / 4, 2 * (10**3 - 10)
    sd = ((20 * 21 * 41 - ties / 2) / 24) ** 0.5
    assert found.p == pytest.approx(2 * (1 - NormalDist().cdf((mean - 11) / sd)), rel=1e-6)


def test_equal_measurements_are_not_told_apart() -> None:
    assert signed_rank([0.5, 0.6], [0.5, 0.6]).p == 1.0


def test_holm_of_four_worked_by_hand() -> None:
    """0.005·4 = 0.02, 0.01·3 = 0.03, 0.03·2 = 0.06, and 0.04·1 is raised to its predecessor's 0.06."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_of_one_changes_nothing_and_none_exceeds_one() -> None:
    assert holm([0.03]) == [0.03]
    assert holm([0.7, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ([], [], "at least one"),
        ([1.0], [1.0, 2.0], "1 and 2 measurements"),
        ([1.0, float("nan")], [1.0, 2.0], "NaN"),
    ],
)
def test_measurements_that_cannot_be_compared_are_refused(first: list[float], second: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        signed_rank(first, second)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
def test_no_probabilities_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        holm([0.1, wrong])
