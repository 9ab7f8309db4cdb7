"""What an evaluation says in figures: a CSV row a pair, a summary of each method, a Markdown table, comparisons."""

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from iregzoo.measure import LOST, Row
from iregzoo.significance import holm, signed_rank

FIRST = ("bundle", "controller", "name", "fixed", "moving", "dice_mean", "dice_before")
REST = (
    "hd95_mm",
    "assd_mm",
    "tre_mm",
    "tre_before_mm",
    "folding_percent",
    "near_singular_percent",
    "sdlogj",
    "ncc_before",
    "ncc_after",
    "mse",
    "ssim",
)
NUMBERS = (*FIRST[-2:], *REST, "seconds")
LEFT_OUT = "network_left_out"  # 1 where it was, see ``necessity.Trial``
Key = tuple[str, str]
Summary = dict[str, Any]


def by_method(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """Rows of each method (or peer) and controller, in the order in which they were measured."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["bundle"], row["controller"]), []).append(row)
    return groups


def title(of: Mapping[str, Any]) -> str:
    """A row's or a summary's method in words: ``iirp (auto)``, ``iirp@best.pt (tci)``, ``greedy``."""
    return f"{of['bundle']} ({of['controller']})" if of["controller"] else str(of["bundle"])


def numbers(rows: Iterable[Row], name: str) -> list[float]:
    """What of a column is a number."""
    return [row[name] for row in rows if not math.isnan(row.get(name, math.nan))]


def label_columns(rows: Iterable[Row]) -> list[str]:
    """Columns of single labels, ``dice_<label>``, by label."""
    found = {name for row in rows for name in row if name.startswith("dice_") and name[5:].lstrip("-").isdigit()}
    return sorted(found, key=lambda name: int(name[5:]))


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write a CSV file with a row for each pair and method; what could not be measured is empty."""
    columns = [*FIRST, *label_columns(rows), *REST, "iterations", LOST, LEFT_OUT, "seconds"]
    for name in ("name", "tre_mm", "tre_before_mm", LOST, LEFT_OUT):
        if not any(row.get(name) for row in rows):
            columns.remove(name)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: cell(value) for name, value in row.items() if name in columns})


def cell(value: Any) -> Any:
    """A value as a table shows it: six digits of a number, nothing for NaN."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def summarise(rows: Sequence[Row], label_names: Mapping[str, str]) -> Summary:
    """One method's figures over all its pairs, and its worst case.

    Each figure, and ``dice_<label>`` of each label, becomes ``mean``, ``sd`` (of the sample), ``median`` and the number
    of ``pairs`` that have it; a label that ``label_names`` knows also gets its ``name``. ``labels_lost`` is
    their number over all pairs, and ``network_left_out`` that of such pairs, where there are any.
    """
    summary: Summary = {"bundle": rows[0]["bundle"], "controller": rows[0]["controller"], "pairs": len(rows)}
    for name in (*NUMBERS, *label_columns(rows)):
        values = numbers(rows, name)
        if values:
            summary[name] = {
                "mean": statistics.fmean(values),
                "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
                "median": statistics.median(values),
                "pairs": len(values),
            }
            if name[5:] in label_names and name.startswith("dice_"):
                summary[name]["name"] = label_names[name[5:]]
    summary["iterations"] = _mean_iterations(rows)
    for name in (LOST, LEFT_OUT):
        if total := sum(row.get(name, 0) for row in rows):
            summary[name] = total
    measured = [row for row in rows if not math.isnan(row.get("dice_mean", math.nan))]
    if measured:
        worst = min(measured, key=lambda row: float(row["dice_mean"]))
        summary["worst"] = {name: worst[name] for name in ("fixed", "moving", "dice_mean")}
    return summary


def _mean_iterations(rows: Sequence[Row]) -> list[float]:
    levels = zip(*([float(count) for count in row["iterations"].split()] for row in rows), strict=True)
    return [round(statistics.fmean(level), 2) for level in levels]


def comparisons(rows: Sequence[Row], peers: Sequence[str]) -> list[dict[str, Any]]:
    """Every method against every peer on the pairs that both have: signed ranks, with Holm's correction.

    What is compared is ``dice_mean``, or ``ncc_after`` where no pair of the two has labels. Each comparison has
    ``method``, ``peer``, ``metric``, ``pairs``, ``median_difference`` (method − peer), ``statistic``, two-sided ``p``,
    and ``p_holm``, corrected for all comparisons of the list.
    """
    groups = by_method(rows)
    found: list[dict[str, Any]] = []
    for key, members in groups.items():
        if key[0] in peers:
            continue
        for peer in peers:
            compared = _compare(members, groups.get((peer, ""), []))
            if compared:
                found.append({"method": title(members[0]), "peer": peer, **compared})
    return _corrected(found)


def between_methods(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every two methods or controllers with each other, once, in the order in which they were measured.

    As ``comparisons``, with ``other`` for ``peer``, and corrected for the comparisons of this list alone: a family of
    its own, so that those with peers do not depend on how many methods take part together.
    """
    methods = [members for (_, controller), members in by_method(rows).items() if controller]
    found = []
    for members, others in combinations(methods, 2):
        compared = _compare(members, others)
        if compared:
            found.append({"method": title(members[0]), "other": title(others[0]), **compared})
    return _corrected(found)


def _corrected(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Comparisons with ``p_holm``."""
    adjusted = holm([entry["p"] for entry in found])
    return [{**entry, "p_holm": corrected} for entry, corrected in zip(found, adjusted, strict=True)]


def _compare(members: Sequence[Row], others: Sequence[Row]) -> dict[str, Any] | None:
    for metric in ("dice_mean", "ncc_after"):
        theirs = {row["case"]: row[metric] for row in others if not math.isnan(row.get(metric, math.nan))}
        ours = {row["case"]: row[metric] for row in members if not math.isnan(row.get(metric, math.nan))}
        both = [case for case in ours if case in theirs]
        if both:
            test = signed_rank([ours[case] for case in both], [theirs[case] for case in both])
            return {
                "metric": metric,
                "pairs": test.pairs,
                "median_difference": test.median_difference,
                "statistic": test.statistic,
                "p": test.p,
            }
    return None


def comparison_line(found: Mapping[str, Any]) -> str:
    """A comparison with a peer or another method in a line."""
    other = found["peer"] if "peer" in found else found["other"]
    measure = {"dice_mean": "Dice", "ncc_after": "NCC"}[found["metric"]]
    pairs = counted(found["pairs"], "pair")
    return (
        f"{found['method']} against {other}: {measure} {found['median_difference']:+.4f} (median difference, "
        f"{pairs}), Wilcoxon p = {found['p']:.2g}, with Holm's correction {found['p_holm']:.2g}"
    )


def counted(number: int, thing: str) -> str:
    """A number of things in words."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


MARKDOWN = (
    ("Dice", "dice_mean", 3),
    ("HD95, mm", "hd95_mm", 2),
    ("ASSD, mm", "assd_mm", 2),
    ("TRE, mm", "tre_mm", 2),
    ("folding, %", "folding_percent", 3),
    ("sd log J", "sdlogj", 3),
    ("NCC", "ncc_after", 3),
    ("SSIM", "ssim", 3),
    ("seconds", "seconds", 2),
)


def markdown(summary: Mapping[str, Any]) -> str:
    """The table of a summary in Markdown: a row a method or peer, means over the pairs, Dice with its deviation."""
    results = summary["results"]
    shown = [column for column in MARKDOWN if any(column[1] in result for result in results)]
    lines = [
        "| " + " | ".join(("bundle", "controller", "parameters", *(column[0] for column in shown))) + " |",
        "|" + "---|" * (3 + len(shown)),
    ]
    for result in results:
        cells = [
            result["bundle"],
            result["controller"] or "–",
            f"{result['parameters']:,}" if result["parameters"] else "–",
        ]
        cells += [_mean(result, name, digits) for _, name, digits in shown]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _caption(summary), *_compared(summary)]) + "\n"


def _mean(result: Summary, name: str, digits: int) -> str:
    if name not in result:
        return "–"
    spread = f" ± {result[name]['sd']:.{digits}f}" if name == "dice_mean" else ""
    return f"{result[name]['mean']:.{digits}f}{spread}"


def _caption(summary: Mapping[str, Any]) -> str:
    """What was measured, on how many pairs, with what: the sentence under a table."""
    results, machine = summary["results"], summary["machine"]
    spread = ", Dice ± standard deviation" if any("dice_mean" in result for result in results) else ""
    parts = [f"Means over {_pairs(result['pairs'] for result in results)}{spread}"]
    for word, name in (("Dice", "dice_mean"), ("TRE", "tre_mm")):
        having = [result for result in results if name in result]
        if any(result[name]["pairs"] < result["pairs"] for result in having):
            parts.append(f"{word} over {_pairs(result[name]['pairs'] for result in having)}")
    if any("dice_before" in result for result in results):
        before = next(result["dice_before"] for result in results if "dice_before" in result)
        parts.append(f"unregistered Dice {before['mean']:.3f}")
    if lost := [f"{title(result)} {result[LOST]}" for result in results if LOST in result]:
        parts.append(f"labels lost, whose surface distances are missing: {', '.join(lost)}")
    parts.append(f"{counted(machine['threads'], 'thread')}, {machine['device']}")
    if summary["failed"]:
        parts.append(f"{counted(len(summary['failed']), 'registration')} failed")
    return "; ".join(parts) + "."


def _pairs(counts: Iterable[int]) -> str:
    found = sorted(counts) or [0]
    return counted(found[0], "pair") if found[0] == found[-1] else f"{found[0]} to {found[-1]} pairs"


def _compared(summary: Mapping[str, Any]) -> list[str]:
    """Lists of the comparisons with peers, and of those between methods under a line of their own."""
    peers, methods = (
        [f"- {comparison_line(found)}." for found in summary[name]] for name in ("comparisons", "between_methods")
    )
    lines = ["", *peers] if peers else []
    return [*lines, "", "Between methods, with Holm's correction over these alone:", "", *methods] if methods else lines
