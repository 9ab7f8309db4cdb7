"""What measurements amount to: growth, targets met or missed, and how figures are written."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from documents import table

NOTHING = "–"


@dataclass(frozen=True)
class Target:
    """What was aimed at: that ``measured`` be at most ``limit``; None where it could not be measured."""

    aim: str
    limit: float
    measured: float | None

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        return "met" if self.measured <= self.limit else "missed"


def target_table(targets: Iterable[Target]) -> str:
    """Every target beside what was measured, in Markdown; nothing where there are none."""
    rows = [(each.aim, number(each.limit), number(each.measured), each.verdict) for each in targets]
    return table(("target", "at most", "measured", "verdict"), rows) if rows else ""


def slope(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Exponent p of values ~ sizes^p, by least squares of the logarithms: 1 is linear. None of fewer than two."""
    points = [(math.log(size), math.log(value)) for size, value in zip(sizes, values, strict=True) if value > 0]
    if len({size for size, _ in points}) < 2:
        return None
    middle = sum(x for x, _ in points) / len(points)
    level = sum(y for _, y in points) / len(points)
    return sum((x - middle) * (y - level) for x, y in points) / sum((x - middle) ** 2 for x, _ in points)


def ratio(value: float | None, other: float | None) -> float | None:
    """One through the other, None where either is missing or the other is nothing."""
    return None if value is None or not other else value / other


def number(value: float | None) -> str:
    """A figure of three significant digits; what is tiny or missing is shown as such."""
    if value is None:
        return NOTHING
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    digits = 2 if not value else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 4)}f}"


def size(shape: Sequence[int]) -> str:
    """A grid as text, such as 160×192×160."""
    return "×".join(map(str, shape))
