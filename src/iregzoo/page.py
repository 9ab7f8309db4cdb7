"""The report as a page for a browser: one file with everything in it, which asks no network for anything."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from iregzoo.necessity import LEFT_OUT
from iregzoo.quality import LITTLE_ALIKE, MUCH_FOLDING, MUCH_SQUASHED, UNLIKE_AT_START, doubts
from iregzoo.register import TRUSTED
from iregzoo.report import key_figures

FILES = resources.files("iregzoo") / "web"
SCRIPTS = ("scene.js", "drawing.js", "viewer.js", "page.js")


@dataclass(frozen=True)
class Line:
    """A figure of the report in plain words.

    Attributes:
        name: what it is called.
        value: the figure, ready to read.
        meaning: what it says, and what should make one doubt.
        worrying: whether this one should.
    """

    name: str
    value: str
    meaning: str
    worrying: bool = False


def write_page(report: Mapping[str, Any], views: Mapping[str, Any], path: Path) -> None:
    """Write a registration's page.

    Args:
        report: what ``report.json`` holds.
        views: from ``views.views``.
        path: of the HTML file.
    """
    names = [Path(report[name]).name for name in ("moving", "fixed")]
    content = {
        "names": names,
        "summary": key_figures(report),
        "lines": [asdict(line) for line in explained(report)],
        "report": report,
        "views": views,
    }
    script = "\n".join(_read(name) for name in SCRIPTS)
    parts = {
        "title": html.escape(" to ".join(names)),
        "digest": _digest(script),
        "style": _read("page.css"),
        "data": embedded(content),
        "script": script,
    }
    # All at once: what was put in is not looked through again.
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _read("page.html"))
    path.write_text(page, encoding="utf-8")


def embedded(content: Mapping[str, Any]) -> str:
    """JSON that may stand inside a script element: nothing in it can end the element or begin another."""
    return json.dumps(content, allow_nan=False).replace("<", "\\u003c")


def explained(report: Mapping[str, Any]) -> list[Line]:
    """The figures of a report that a person should look at, each with what it means."""
    seconds = report["seconds"]
    took = ", ".join(f"{stage} {time:.2f} s" for stage, time in seconds.items())
    lines = [_likeness(report), *_overlap(report), *_regularity(report), _start(report), *_extras(report)]
    return [*lines, Line("Time", f"{sum(seconds.values()):.1f} s", took)]


def _likeness(report: Mapping[str, Any]) -> Line:
    """How alike the images are."""
    return Line(
        "Image similarity (NCC)",
        "{ncc_before:.3f} before → {ncc_start:.3f} at affine start → {ncc_after:.3f} after".format_map(report),
        "How well brightness in one image predicts brightness in the other: 1 perfectly, 0 not at all. It should rise. "
        f"A value lower than before, below {LITTLE_ALIKE:g}, or below {UNLIKE_AT_START:g} at the affine start is a "
        "warning sign. Scans of different contrasts, such as T1 and T2, stay low even when they are well aligned.",
        bool({"ncc_start", "ncc_after"} & doubts(report).keys()),
    )


def _overlap(report: Mapping[str, Any]) -> list[Line]:
    """Dice, where both scans have labels."""
    if "dice_mean" not in report:
        return []
    meaning = (
        "1 if every label matches its counterpart exactly, 0 if none overlaps it. It should rise. Small and thin "
        "structures score lower than large ones; a label that loses overlap is a warning sign."
    )
    value = f"{report['dice_before_mean']:.3f} before → {report['dice_mean']:.3f} after"
    return [Line("Label overlap (Dice), mean", value, meaning, "dice_mean" in doubts(report))]


def _regularity(report: Mapping[str, Any]) -> Iterator[Line]:
    """How the deformation folds, squashes and varies, and how far it goes."""
    worrying = doubts(report)
    yield Line(
        "Folding",
        f"{report['folding_percent']:.3f} % of the voxels",
        "Where the deformation turns space inside out (det J ≤ 0), which tissue cannot do. The best value is 0; "
        f"more than {MUCH_FOLDING:g} % is a warning sign, and so is any fold inside the structure of interest.",
        "folding_percent" in worrying,
    )
    yield Line(
        "Strong shrinkage",
        f"{report['near_singular_percent']:.3f} % of the voxels",
        f"Shrunk to a tenth of their volume or less, folds included. More than {MUCH_SQUASHED:g} % is a warning sign.",
        "near_singular_percent" in worrying,
    )
    if "sdlogj" in report:
        yield Line(
            "Irregularity (sd of log J)",
            f"{report['sdlogj']:.3f}",
            "How much expansion and shrinkage vary from place to place: 0 if nothing changes its volume, higher for a "
            "rougher deformation. Use it to compare methods on the same scans; it has no threshold.",
        )
    yield Line(
        "Deformation",
        "{displacement_mean_mm:.1f} mm mean, {displacement_max_mm:.1f} mm maximum".format_map(report),
        "How far voxels move after the affine start. It is a warning sign if it exceeds the anatomical difference that "
        "is plausible between these two scans.",
    )


def _start(report: Mapping[str, Any]) -> Line:
    """The affine start, or the alignment that was made of it, as a turn and a change of volume."""
    linear = np.array(report["affine_lps_mm"])[:3, :3]
    left, _, right = np.linalg.svd(linear)
    angle = np.rad2deg(np.arccos(np.clip((np.trace(left @ right) - 1) / 2, -1, 1)))
    moved = f"rotated by {angle:.1f}°, volume × {np.linalg.det(linear):.2f}"
    if kind := _kind_made_precise(report):
        return Line(
            "Alignment",
            f"{kind}, from {report['init']}: {moved}",
            "How the moving scan was positioned, made precise from a start (none: the positions in the files). If the "
            "moving image is far off, choose another --init.",
        )
    return Line(
        "Affine start",
        f"{report['init']}: {moved}",
        "How the moving scan was positioned before the deformation; none means that the positions in the files are "
        "trusted. If the moving image is far off at the affine start, all later results are doubtful: choose another "
        "--init.",
    )


def _kind_made_precise(report: Mapping[str, Any]) -> str:
    """By which kind of transform a start was made precise; empty if it was not."""
    if "aligned" in report:
        return str(report["aligned"])
    if "network_left_out" not in report or report["init"] in TRUSTED:
        return ""
    return "affine" if report["init"] == "affine" else "rigid"


def _extras(report: Mapping[str, Any]) -> Iterator[Line]:
    """The masks, the inverse and the gradient steps, where there were any."""
    if "counted_percent" in report:
        names = [Path(report[name]).name for name in ("fixed_mask", "moving_mask") if name in report]
        yield Line(
            "Masks",
            f"{report['counted_percent']:.1f} % of the fixed scan's voxels count",
            f"Outside {' and '.join(names)}, image similarity was not looked at; lesions were filled from their "
            "surroundings for the start and the network. Around what counts, a network's deformation is continued from "
            "inside.",
        )
    if "inverse_error_mean_mm" in report:
        yield Line(
            "Inverse",
            "{inverse_error_mean_mm:.3f} mm mean, {inverse_error_max_mm:.2f} mm maximum error".format_map(report),
            "How far a voxel ends from its starting point after mapping it forward and back. It is large where the "
            "deformation folds.",
        )
    if "network_left_out" in report:
        words = "left out: local information {information_start:.3f} nats without it, {information_network:.3f} with it"
        yield Line(
            "Network",
            words.format_map(report["network_left_out"]),
            f"{LEFT_OUT[0].upper()}{LEFT_OUT[1:]}. What still deforms, if anything does, is what gradient steps found.",
        )
    if "refinement" in report:
        words = "{steps} steps, local NCC {local_ncc_before:.3f} → {local_ncc_after:.3f}"
        begun = "from the affine start" if "network_left_out" in report else "after the network"
        yield Line(
            "Refinement",
            words.format_map(report["refinement"]),
            f"Gradient steps {begun}. They make the images more similar, which does not always mean better aligned.",
        )


def _digest(script: str) -> str:
    """What tells a browser that a script is the page's own."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


def _read(name: str) -> str:
    return (FILES / name).read_text(encoding="utf-8")
