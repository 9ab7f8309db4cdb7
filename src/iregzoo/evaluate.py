"""Pairs in, table out: every figure on the fixed image's own grid, after the whole pipeline of ``register``."""

import csv
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from iregzoo import __version__
from iregzoo.cases import Case
from iregzoo.errors import InputError
from iregzoo.iteration import Controller
from iregzoo.metrics import mean_of, surface_scores, tre
from iregzoo.quality import compare, figures, labels_of
from iregzoo.register import Result, check_refine, choose_controller, read_scans, register
from iregzoo.space.points import move_points, read_points
from iregzoo.zoo import Method

FILES = ("metrics.csv", "summary.json")
NUMBERS = (
    "dice_mean",
    "dice_before",
    "hd95_mm",
    "assd_mm",
    "tre_mm",
    "folding_percent",
    "near_singular_percent",
    "sdlogj",
    "ncc_before",
    "ncc_after",
    "mse",
    "seconds",
)
Row = dict[str, Any]


def evaluate(
    cases: Sequence[Case],
    methods: Sequence[Method],
    folder: Path,
    *,
    controllers: Sequence[str] = ("auto",),
    init: str = "auto",
    max_iterations: int | None = None,
    refine: int = 0,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Register every case with every method and controller; write ``metrics.csv`` and ``summary.json``.

    A case that fails is listed under ``failed`` in the summary and does not stop the others.

    Raises:
        InputError: for a controller that one of the methods does not take, and for ``refine`` that is no whole number,
            before anything is measured.
    """
    check_refine(refine)
    rows: list[Row] = []
    failed: list[dict[str, str]] = []
    for method, name, controller in _settings(methods, controllers, max_iterations):
        for case in cases:
            progress(f"{method.bundle.name} {case.name}")
            try:
                row = _measure(case, method, init, controller, refine)
            except InputError as error:
                failed.append({"bundle": method.bundle.name, "pair": case.name, "reason": str(error)})
                continue
            rows.append({"bundle": method.bundle.name, "controller": name, **row})
    summary = {
        "iregzoo": __version__,
        "refine": refine,
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "methods": [{"bundle": m.bundle.name, "weights": m.weights, "sha256": m.sha256} for m in methods],
        "results": list(_summaries(rows)),
        "failed": failed,
    }
    _write_table(folder / "metrics.csv", rows)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return summary


def _settings(
    methods: Sequence[Method], controllers: Sequence[str], max_iterations: int | None
) -> list[tuple[Method, str, Controller | None]]:
    """Every method with every controller, all chosen before anything is measured."""
    chosen = []
    for method in methods:
        for name in controllers:
            try:
                controller = choose_controller(name, max_iterations, method.network.controller)
            except InputError as error:
                raise InputError(f"bundle {method.bundle.name}, {error}") from None
            chosen.append((method, name, controller))
    return chosen


def _measure(case: Case, method: Method, init: str, controller: Controller | None, refine: int) -> Row:
    scans = read_scans(case.fixed, case.moving, case.fixed_labels or None, case.moving_labels or None)
    begin = time.perf_counter()
    result = register(scans, method, init=init, controller=controller, refine=refine)
    seconds = time.perf_counter() - begin
    found = figures(result, compare(result))
    row: Row = {"fixed": case.fixed, "moving": case.moving}
    row |= _overlap(result, found)
    if case.fixed_points and case.moving_points:
        expected = read_points(case.moving_points)
        moved = move_points(read_points(case.fixed_points), result.displacement, result.frame.fixed)
        if len(moved) != len(expected):
            raise InputError(f"{case.fixed_points}: {len(moved)} points, but {case.moving_points}: {len(expected)}")
        row["tre_mm"] = float(tre(moved, expected).mean())
    for name in ("folding_percent", "near_singular_percent", "sdlogj", "ncc_before", "ncc_after"):
        row[name] = found.get(name, math.nan)
    return row | {
        "mse": found["mse_after"],
        "iterations": " ".join(map(str, found["iterations"])),
        "seconds": round(seconds, 3),
    }


def _overlap(result: Result, found: Mapping[str, Any]) -> Row:
    if "dice" not in found or result.scans.fixed_labels is None or result.warped_labels is None:
        return {}
    fixed = result.scans.fixed_labels.data
    labels = labels_of(fixed, result.warped_labels)
    hd95, assd = surface_scores(result.warped_labels, fixed, labels, result.frame.fixed.spacing.tolist())
    return {
        "dice_mean": found.get("dice_mean", math.nan),
        "dice_before": found.get("dice_before_mean", math.nan),
        **{f"dice_{label}": value for label, value in found["dice"].items()},
        "hd95_mm": mean_of(hd95),
        "assd_mm": mean_of(assd),
    }


def _summaries(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Mean and standard deviation of each figure, by method and controller, and the worst case."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["bundle"], row["controller"]), []).append(row)
    for (bundle, controller), members in groups.items():
        summary: dict[str, Any] = {"bundle": bundle, "controller": controller, "pairs": len(members)}
        for name in NUMBERS:
            values = torch.tensor([row[name] for row in members if not math.isnan(row.get(name, math.nan))])
            if len(values):
                spread = float(values.std()) if len(values) > 1 else 0.0
                summary[name] = {"mean": float(values.mean()), "sd": spread, "pairs": len(values)}
        summary["iterations"] = _mean_iterations(members)
        measured = [row for row in members if not math.isnan(row.get("dice_mean", math.nan))]
        if measured:
            worst = min(measured, key=lambda row: row["dice_mean"])
            summary["worst"] = {name: worst[name] for name in ("fixed", "moving", "dice_mean")}
        yield summary


def _mean_iterations(rows: Sequence[Row]) -> list[float]:
    counts = torch.tensor([[float(count) for count in row["iterations"].split()] for row in rows])
    return [round(value, 2) for value in counts.mean(0).tolist()]


def _write_table(path: Path, rows: Sequence[Row]) -> None:
    labels = sorted(
        {name for row in rows for name in row if name.startswith("dice_") and name[5:].isdigit()},
        key=lambda name: int(name[5:]),
    )
    columns = [
        "bundle",
        "controller",
        "fixed",
        "moving",
        "dice_mean",
        "dice_before",
        *labels,
        *NUMBERS[2:-1],
        "iterations",
        "seconds",
    ]
    if not any("tre_mm" in row for row in rows):
        columns.remove("tre_mm")
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(value) for name, value in row.items() if name in columns})


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value
