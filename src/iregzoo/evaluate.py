"""Pairs in, table out: every figure on the fixed image's own grid, after the whole pipeline of ``register``.

Methods and peers start from the same scans, in one process, with as many threads, and the same code measures both.
``seconds`` are a method's from scans in memory to the warped scan, affine start included, and a peer's for its affine
and its deformable registration; neither reads or writes a file in them.
"""

import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from iregzoo import __version__
from iregzoo.cases import Case
from iregzoo.entrants import Entrant, line_up
from iregzoo.errors import InputError, in_a_line
from iregzoo.learn2reg import field_folders, field_names, write_field
from iregzoo.measure import DOUBTS, Row, check_cases, measure
from iregzoo.peers import describe, find_peers
from iregzoo.plots import Extremes, cases_picture, overlap_plot, time_plot
from iregzoo.quality import Comparison, compare
from iregzoo.register import Result, choose_start, read_scans
from iregzoo.steering import gradient_steps
from iregzoo.tables import (
    between_methods,
    by_method,
    comparisons,
    label_columns,
    markdown,
    summarise,
    title,
    write_table,
)
from iregzoo.zoo import Method

FILES = ("metrics.csv", "summary.json", "table.md", "dice.png", "time.png", "cases.png")
See = Callable[[int, Row, Result, Comparison], None]


def evaluate(
    cases: Sequence[Case],
    methods: Sequence[Method],
    folder: Path,
    *,
    controllers: Sequence[str] = ("auto",),
    peers: Sequence[str] = (),
    init: str = "auto",
    max_iterations: int | None = None,
    refine: int | None = None,
    learn2reg: Path | None = None,
    plots: bool = True,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Register every case with every method and controller, and with every peer; write ``FILES``.

    A case that fails is listed under ``failed`` in the summary and does not stop the others.

    Args:
        cases: from ``read_cases``.
        methods: from ``load_methods`` or ``zoo.load``, each of another name.
        folder: an existing folder.
        controllers: names, see ``choose_controller``.
        peers: names, see ``peers.PEERS``; every method is tested against each of them, see ``comparisons``, and methods
            with each other, see ``between_methods``.
        init: affine start of the methods; peers make their own.
        max_iterations: the most iterations a level.
        refine: gradient steps after the network; of each method what its card says if None.
        learn2reg: an existing folder for every displacement field, see ``field_folders``; none are written if None.
        plots: also draw ``dice.png`` (where there are labels), ``time.png`` and ``cases.png``.
        progress: told each registration's name as it begins.

    Returns:
        What ``summary.json`` holds.

    Raises:
        InputError: before anything is measured, for a controller that one of the methods does not take, a peer that is
            unknown or not installed, peers for pairs with masks, an ``init`` that is none, ``refine`` that is no such
            number, methods of one name, pairs that ``check_cases`` refuses, and pairs or folders of one name with
            ``learn2reg``.
    """
    choose_start(init)
    check_cases(cases)
    steps = [gradient_steps(refine, method.card) for method in methods]
    tools = find_peers(peers)
    masked = next((case for case in cases if case.fixed_mask or case.moving_mask), None)
    if tools and masked:
        raise InputError(
            f"{masked.title}: has a mask, which {', '.join(peers)} would not see; leave out --peers, or the table's "
            "columns fixed_mask and moving_mask"
        )
    entrants = line_up(methods, controllers, tools, init=init, max_iterations=max_iterations, refine=refine)
    names = field_names(cases) if learn2reg else []
    folders = field_folders([method.name for method in methods], controllers, peers) if learn2reg else {}
    extremes = Extremes()

    def see(number: int, row: Row, result: Result, images: Comparison) -> None:
        if plots:
            extremes.see(cases[number], row, result, images)
        if learn2reg:
            write_field(result, learn2reg / folders[title(row)] / names[number])

    rows, failed = _measure_all(cases, entrants, see, progress)
    label_names = names_of_labels(rows, methods)
    summary = {
        "iregzoo": __version__,
        "machine": _machine(methods),
        "methods": [
            {
                "bundle": method.name,
                "weights": method.weights.name,
                "sha256": method.weights.sha256,
                "refine": count,
            }
            for method, count in zip(methods, steps, strict=True)
        ],
        "peers": [describe(tool) for tool in tools],
        "results": list(_results(rows, entrants, label_names)),
        "comparisons": comparisons(rows, peers),
        "between_methods": between_methods(rows),
        "failed": failed,
        "warnings": _doubts(cases, rows),
    }
    _write(folder, rows, summary)
    if plots and rows:
        overlap_plot(rows, label_names, folder / "dice.png")
        time_plot(rows, folder / "time.png")
        cases_picture(extremes, folder / "cases.png")
    return summary


def _doubts(cases: Sequence[Case], rows: Sequence[Row]) -> list[str]:
    """What keeps the figures of pairs from meaning what they seem to, each once, whoever registered them."""
    said = {f"{cases[row['case']].title}: {doubt}": None for row in rows for doubt in row[DOUBTS]}
    return list(said)


def _measure_all(
    cases: Sequence[Case], entrants: Sequence[Entrant], see: See, progress: Callable[[str], None]
) -> tuple[list[Row], list[dict[str, str]]]:
    """A row for each registration that went well, and a reason for each that did not; ``see`` gets what went well."""
    rows: list[Row] = []
    failed: list[dict[str, str]] = []
    for entrant in entrants:
        for number, case in enumerate(cases):
            progress(f"{entrant.bundle} {case.title}")
            try:
                row, result, images = _measure(case, entrant)
            except Exception as error:
                failed.append({"bundle": entrant.bundle, "pair": case.title, "reason": in_a_line(error)})
                continue
            rows.append({**row, "case": number})
            see(number, row, result, images)
    return rows, failed


def _measure(case: Case, entrant: Entrant) -> tuple[Row, Result, Comparison]:
    scans = read_scans(*case.scans)
    result, seconds = entrant.run(scans, case.init)
    images = compare(result)
    row = {"bundle": entrant.bundle, "controller": entrant.controller, **measure(case, result, images)}
    return {**row, "seconds": round(seconds, 3)}, result, images


def _results(
    rows: Sequence[Row], entrants: Sequence[Entrant], label_names: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    groups = by_method(rows)
    for entrant in entrants:
        members = groups.get((entrant.bundle, entrant.controller))
        if members:
            yield {**summarise(members, label_names), "parameters": entrant.parameters}


def names_of_labels(rows: Sequence[Row], methods: Sequence[Method]) -> dict[str, str]:
    """Structures' names by label, after the cards that name most of the labels measured, and agree.

    Weights for a hippocampus do not name what another data set calls 1 and 2.
    """
    measured = [column[5:] for column in label_columns(rows)]
    fitting = [
        method.card.labels
        for method in methods
        if 2 * sum(label in method.card.labels for label in measured) > len(measured)
    ]
    names: dict[str, str] = {}
    for label in measured:
        said = {labels[label] for labels in fitting if label in labels}
        if len(said) == 1:
            names[label] = said.pop()
    return names


def _machine(methods: Sequence[Method]) -> dict[str, Any]:
    devices = {str(method.device): None for method in methods}
    return {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": ", ".join(devices) or "cpu",
    }


def _write(folder: Path, rows: Sequence[Row], summary: Mapping[str, Any]) -> None:
    write_table(folder / "metrics.csv", rows)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", "utf-8")
    (folder / "table.md").write_text(markdown(summary), encoding="utf-8")
