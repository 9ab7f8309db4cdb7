"""Whether one method is better than another on the same pairs: the signed-rank test, corrected for many of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

COUNTED = 13  # pairs: SciPy counts all of their 2¹³ patterns of signs, of more it would draw some at random


@dataclass(frozen=True)
class SignedRank:
    """A paired comparison of first with second.

    Attributes:
        pairs: how many were compared.
        median_difference: of first − second.
        statistic: the smaller of the two sums of signed ranks; pairs that are equal have no rank.
        p: two-sided.
    """

    pairs: int
    median_difference: float
    statistic: float
    p: float


def signed_rank(first: Sequence[float], second: Sequence[float]) -> SignedRank:
    """Wilcoxon's signed-rank test of paired measurements, two-sided (Wilcoxon, Biometrics Bulletin 1945).

    Equal pairs have no rank and are left out; where every pair is equal there is nothing to tell apart, and p is 1. The
    p-value is exact for up to 50 pairs, with ties for up to 13, else the normal approximation.

    Args:
        first, second: one number a pair, in one order.

    Raises:
        ValueError: where they are empty, of unequal length, or not finite.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} measurements; expected the same number of each, at least one")
    difference = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    if not np.isfinite(difference).all():
        raise ValueError("measurements hold NaN or infinite values; leave those pairs out")
    median = float(np.median(difference))
    if not difference.any():
        return SignedRank(len(difference), median, 0.0, 1.0)
    from scipy.stats import PermutationMethod, wilcoxon  # takes a second to import

    ranked = difference[difference != 0]
    tied = len(np.unique(np.abs(ranked))) < len(ranked)
    method = "auto"  # which SciPy's versions understand differently where there are ties
    if tied:
        method = PermutationMethod() if len(ranked) <= COUNTED else "approx"
    found = wilcoxon(ranked, alternative="two-sided", method=method)
    return SignedRank(len(difference), median, float(found.statistic), float(found.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, adjusted so that all of them together err as rarely as one (Holm, Scand J Stat 1979).

    The k-th smallest of m is multiplied by m − k + 1, never falls below its predecessor, and is at most 1.

    Raises:
        ValueError: for a value outside [0, 1].
    """
    if any(math.isnan(p) or not 0 <= p <= 1 for p in p_values):
        raise ValueError(f"p-values {list(p_values)}; expected numbers from 0 to 1")
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = least
    return adjusted
