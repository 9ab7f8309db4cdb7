"""What an evaluation says in figures, from rows made by hand."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest

from iregzoo.commands.measurement import result_line
from iregzoo.tables import between_methods, comparison_line, comparisons, markdown, summarise, title, write_table

NAN = math.nan


def make(bundle: str, case: int, dice: float, controller: str = "auto", **more: Any) -> dict[str, Any]:
    row = {
        "bundle": bundle,
        "controller": controller,
        "case": case,
        "fixed": f"f{case}",
        "moving": f"m{case}",
        "dice_mean": dice,
        "dice_before": 0.4,
        "folding_percent": 0.01,
        "ncc_after": dice / 2,
        "ncc_before": 0.1,
        "iterations": "1 2",
        "seconds": 0.5,
    }
    return row | more


def test_a_summary_has_mean_deviation_median_of_each_figure_and_label_and_the_worst_case() -> None:
    rows = [make("iirp", i, d, dice_1=d, dice_17=d + 0.1) for i, d in enumerate((0.6, 0.9, 0.75))]
    rows[1]["dice_17"], rows[2]["iterations"] = NAN, "4 2"
    summary = summarise(rows, {"17": "left hippocampus"})
    assert summary["dice_mean"] == pytest.approx({"mean": 0.75, "sd": 0.15, "median": 0.75, "pairs": 3})
    assert summary["dice_1"]["mean"] == pytest.approx(0.75)
    assert "name" not in summary["dice_1"]
    assert summary["dice_17"].pop("name") == "left hippocampus"
    assert summary["dice_17"] == pytest.approx({"mean": 0.775, "sd": 0.10606602, "median": 0.775, "pairs": 2})
    assert summary["worst"] == {"fixed": "f0", "moving": "m0", "dice_mean": 0.6}
    assert summary["iterations"] == [2.0, 2.0]
    assert "tre_mm" not in summary


def test_one_pair_has_no_spread() -> None:
    assert summarise([make("iirp", 0, 0.6)], {})["dice_mean"]["sd"] == 0.0


def test_the_table_has_labels_by_number_and_leaves_empty_what_was_not_measured(tmp_path: Path) -> None:
    rows = [make("iirp", 0, 0.6, dice_10=0.5, dice_2=0.7), make("greedy", 0, NAN, "", dice_2=0.1)]
    write_table(tmp_path / "metrics.csv", rows)
    with (tmp_path / "metrics.csv").open(encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        found = list(reader)
    assert list(reader.fieldnames or [])[4:8] == ["dice_mean", "dice_before", "dice_2", "dice_10"]
    assert "tre_mm" not in found[0]
    assert "case" not in found[0]
    assert (found[1]["dice_mean"], found[1]["dice_10"], found[1]["controller"]) == ("", "", "")
    assert found[0]["dice_10"] == "0.5"


def test_a_network_that_was_left_out_is_counted_where_it_was(tmp_path: Path) -> None:
    rows = [make("iirp", 0, 0.6), make("iirp", 1, 0.7, network_left_out=1), make("pan", 0, 0.6)]
    assert summarise(rows[:2], {})["network_left_out"] == 1
    assert "network_left_out" not in summarise(rows[2:], {})
    for some, expected in ((rows, ["", "1", ""]), (rows[2:], None)):
        write_table(tmp_path / "metrics.csv", some)
        with (tmp_path / "metrics.csv").open(encoding="utf-8") as stream:
            found = list(csv.DictReader(stream))
        assert [row.get("network_left_out") for row in found] == (expected or [None])


def test_every_method_is_compared_with_every_peer_and_corrected_for_all() -> None:
    """Six pairs that all differ one way have p = 2/64; of four such tests Holm makes 4 · 2/64 of each."""
    rows = [make(name, i, 0.8 + 0.01 * i, c) for name, c in (("iirp", "tci"), ("pan", "auto")) for i in range(6)]
    rows += [make(name, i, 0.7 + 0.002 * i**2, "") for name in ("ants-syn", "greedy") for i in range(6)]
    found = comparisons(rows, ["ants-syn", "greedy"])
    assert [(entry["method"], entry["peer"]) for entry in found] == [
        ("iirp (tci)", "ants-syn"),
        ("iirp (tci)", "greedy"),
        ("pan (auto)", "ants-syn"),
        ("pan (auto)", "greedy"),
    ]
    for entry in found:
        assert entry["metric"] == "dice_mean"
        assert entry["pairs"] == 6
        assert entry["p"] == pytest.approx(2 / 64)
        assert entry["p_holm"] == pytest.approx(8 / 64)
        assert 0.1 < entry["median_difference"] < 0.2
    line = comparison_line(found[0])
    assert line.startswith("iirp (tci) against ants-syn: Dice +0.1")
    assert "p = 0.031" in line
    assert line.endswith("0.12")


def test_every_two_methods_are_compared_once_as_a_family_of_their_own() -> None:
    """Three tests of six pairs that all differ one way: Holm makes 3 · 2/64 of each, whoever the peers are."""
    names = (("iirp@brain", "tci", 0.8), ("iirp@brain", "fixed", 0.75), ("iirp@best.pt", "tci", 0.7))
    rows = [make(name, i, dice + 0.001 * i * dice, c) for name, c, dice in names for i in range(6)]
    rows += [make("greedy", i, 0.5 + 0.002 * i**2, "") for i in range(6)]
    found = between_methods(rows)
    assert [(entry["method"], entry["other"]) for entry in found] == [
        ("iirp@brain (tci)", "iirp@brain (fixed)"),
        ("iirp@brain (tci)", "iirp@best.pt (tci)"),
        ("iirp@brain (fixed)", "iirp@best.pt (tci)"),
    ]
    assert [entry["median_difference"] for entry in found] == pytest.approx([0.05, 0.1, 0.05], abs=1e-3)
    assert [entry["p"] for entry in found] == pytest.approx([2 / 64] * 3)
    assert [entry["p_holm"] for entry in found] == pytest.approx([6 / 64] * 3)
    assert comparison_line(found[1]).startswith("iirp@brain (tci) against iirp@best.pt (tci): Dice +0.1")
    assert [entry["p_holm"] for entry in comparisons(rows, ["greedy"])] == pytest.approx([6 / 64] * 3)
    assert between_methods([entry for entry in rows if entry["bundle"] in ("iirp@best.pt", "greedy")]) == []


def test_pairs_are_matched_by_case_and_failed_ones_left_out() -> None:
    rows = [make("iirp", i, 0.8) for i in (0, 2)] + [
        make("greedy", i, d, "") for i, d in ((2, 0.7), (1, 0.1), (0, NAN))
    ]
    (found,) = comparisons(rows, ["greedy"])
    assert found["pairs"] == 1
    assert found["median_difference"] == pytest.approx(0.1)
    assert found["p"] == 1.0


def test_without_labels_correlation_is_compared() -> None:
    rows = [make("iirp", 0, NAN, ncc_after=0.9), make("greedy", 0, NAN, "", ncc_after=0.7)]
    (found,) = comparisons(rows, ["greedy"])
    assert (found["metric"], found["median_difference"]) == ("ncc_after", pytest.approx(0.2))
    assert "NCC +0.2000 (median difference, 1 pair)" in comparison_line(found)


def test_a_peer_that_failed_everywhere_is_compared_with_nothing() -> None:
    assert comparisons([make("iirp", 0, 0.8)], ["greedy"]) == []


def test_the_markdown_table_has_a_row_a_method_and_says_what_was_measured() -> None:
    rows = [make("iirp", i, d) for i, d in enumerate((0.6, 0.9))]
    others = [make("greedy", i, 0.5, "") for i in range(2)]
    summary = {
        "results": [summarise(rows, {}) | {"parameters": 1234567}, summarise(others, {}) | {"parameters": 0}],
        "machine": {"threads": 2, "device": "cpu"},
        "comparisons": comparisons([*rows, *others], ["greedy"]),
        "between_methods": [],
        "failed": [{}],
    }
    lines = markdown(summary).splitlines()
    assert lines[0] == "| bundle | controller | parameters | Dice | folding, % | NCC | seconds |"
    assert lines[2] == "| iirp | auto | 1,234,567 | 0.750 ± 0.212 | 0.010 | 0.375 | 0.50 |"
    assert lines[3] == "| greedy | – | – | 0.500 ± 0.000 | 0.010 | 0.250 | 0.50 |"
    assert all(line.count("|") == lines[0].count("|") for line in lines[1:4])
    assert "2 pairs" in lines[5]
    assert "unregistered Dice 0.400" in lines[5]
    assert "2 threads, cpu; 1 registration failed." in lines[5]
    assert lines[7].startswith("- iirp (auto) against greedy: Dice +0.2500")
    assert len(lines) == 8
    summary["between_methods"] = between_methods([*rows, *(make("pan", i, 0.5) for i in range(2))])
    below = markdown(summary).splitlines()[8:]
    assert below[:3] == ["", "Between methods, with Holm's correction over these alone:", ""]
    assert below[3].startswith("- iirp (auto) against pan (auto): Dice +0.2500")


def test_dice_and_landmarks_of_some_pairs_say_of_how_many() -> None:
    rows = [make("iirp", 0, 0.6), make("iirp", 1, NAN, tre_mm=2.0, tre_before_mm=4.0)]
    others = [make("greedy", i, 0.5, "", tre_mm=1.0, tre_before_mm=4.0) for i in range(2)]
    results = [summarise(some, {}) | {"parameters": 0} for some in (rows, others)]
    summary = {"results": results, "machine": {"threads": 2, "device": "cpu"}, "failed": []}
    caption = markdown(summary | {"comparisons": [], "between_methods": []}).splitlines()[-1]
    assert "Means over 2 pairs, Dice ± standard deviation; Dice over 1 to 2 pairs; TRE over 1 to 2 pairs; " in caption
    assert "iirp (auto), 2 pairs, Dice of 1 pair 0.6000 ± 0.0000 (before" in result_line(results[0])
    assert "greedy, 2 pairs, Dice 0.5000 ± 0.0000 (before" in result_line(results[1])
    assert "TRE 4.00 → 2.00 mm, " in result_line(results[0])


def test_a_method_is_called_by_bundle_and_controller() -> None:
    assert title({"bundle": "iirp", "controller": "tci"}) == "iirp (tci)"
    assert title({"bundle": "iirp@best.pt", "controller": "tci"}) == "iirp@best.pt (tci)"
    assert title({"bundle": "greedy", "controller": ""}) == "greedy"
