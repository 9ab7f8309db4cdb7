"""What a batch is to do: its settings, the pairs of its table, and which of them an earlier run has done.

What is done stands in the pairs' folders alone, each of which appears whole or not at all, with a report that says what
it was made from. Done is what would say the same now.
"""

import csv
import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from iregzoo.align import check_kind, searches
from iregzoo.cases import Case, folder_names, is_made_of, read_cases, whole_path
from iregzoo.devices import choose_device
from iregzoo.errors import InputError
from iregzoo.flags import check_count
from iregzoo.outputs import check_kept, held
from iregzoo.precision import resolve
from iregzoo.results import FILES, provenance, provenance_of_alignment
from iregzoo.space.start import STARTS
from iregzoo.steering import choose_controller, gradient_steps
from iregzoo.suited import choices
from iregzoo.zoo import Method, brain_finder, bundles, find, load

INPUTS = ("fixed", "moving", "fixed_labels", "moving_labels", "fixed_mask", "moving_mask", "init")
ORIGIN = ("iregzoo", "bundle", "bundle_version", "weights_sha256", "finder_sha256")
REFINE = "refine"
CARD = "weights_card"  # which the user may have changed beside a file of weights
# What means something to networks alone.
OF_NETWORKS = ("bundle", "weights", "device", "precision", "controller", "max_iterations", "refine", "jacobian")
OPTIONS = ("precision", "init", "controller", "max_iterations", "inverse", "jacobian", "threads")
OF_ALIGNMENTS = ("init", "inverse", "threads")
DETACHED = (".hdr", ".img", ".mhd", ".nhdr")  # formats of which a scan has several files
BYSTANDERS = ("thumbs.db", "desktop.ini")  # that systems put into folders, as they do hidden files
SUMMARY = "summary.csv"
FIGURES = (
    "ncc_before",
    "ncc_after",
    "dice_before_mean",
    "dice_mean",
    "folding_percent",
    "inverse_error_mean_mm",
    "inverse_error_max_mm",
    "shared_information",
)
COLUMNS = (
    *("name", "status", "reason", "fixed", "moving", "weights", *FIGURES),
    *("iterations", "network_left_out", "warnings", "seconds"),
)
Report = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What every pair of a batch is registered with, as ``iregzoo register`` has it.

    Attributes:
        threads: of each process. The last digits of a result depend on them, so they do not follow the number of
            processes.
        weights: None lets each pair choose, see ``suited``.
        refine: gradient steps; None is those of the card of a pair's weights.
        align: ``rigid`` or ``affine`` where the pairs are aligned so, as ``iregzoo align`` does, and no network runs.
        origins: from ``checked``, by the name of each weights that a pair may get, the first first: versions, and the
            weights' hash and card. Of an alignment there is one, of no name.
        precisions: in which a network computes on this machine, by the name of weights; none where others compute.
    """

    bundle: str = "ipear"
    weights: str | None = None
    device: str = "auto"
    precision: str = "auto"
    init: str = "auto"
    controller: str = "auto"
    max_iterations: int | None = None
    refine: int | None = None
    inverse: bool = False
    jacobian: bool = False
    threads: int = 1
    align: str | None = None
    origins: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    precisions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A pair and where its results go.

    Attributes:
        case: with absolute paths.
        folder: of the results; its name is the pair's.
        inputs: which files they are, as far as that shows without reading them.
        run: the mark of the batch that wants it, see ``batch.run``; empty where it is wanted whatever runs.
    """

    case: Case
    folder: Path
    settings: Settings
    inputs: Mapping[str, Any]
    run: str = ""

    def origin(self, weights: str) -> Mapping[str, Any]:
        """What the pair's report says of what made it, with weights of that name."""
        origin = self.settings.origins[weights]
        if self.settings.align is None or not self.case.init:
            return origin
        return {name: value for name, value in origin.items() if name != "finder_sha256"}  # nothing is looked for

    def request(self, weights: str) -> dict[str, Any]:
        """What the pair's report says of it, beside the method's own, with weights of that name."""
        settings, origin = self.settings, self.settings.origins[weights]
        if settings.align is not None:
            return {name: getattr(settings, name) for name in OF_ALIGNMENTS} | {"inputs": self.inputs}
        options = {name: getattr(settings, name) for name in OPTIONS}
        made = {
            "weights_chosen_by": "scans" if settings.weights is None else "user",
            REFINE: origin[REFINE],
            CARD: origin[CARD],
        }
        return {**options, **made, "inputs": self.inputs}


def checked(settings: Settings, *, here: bool = True) -> Settings:
    """The settings with their origins, once it is sure that they can be used.

    Args:
        settings: to be checked.
        here: whether the pairs are registered on this machine, so that it has to have the device.

    Raises:
        InputError: as ``load``, ``choose_controller``, ``gradient_steps`` and ``choose_device`` do, for an unknown
            start, threads that are no whole number of at least 1, an unknown kind of alignment, and what only a network
            needs beside one.
    """
    check_count(settings.threads, "threads")
    if settings.init not in ("auto", *STARTS):
        raise InputError(
            f"init {settings.init!r} is unknown; choose auto, {', '.join(STARTS)}, or name a file for each pair in the "
            "table's column init"
        )
    if settings.align is not None:
        _check_alignment(settings, settings.align)
        finder = brain_finder() if searches(settings.init) else None
        return replace(settings, origins={"": provenance_of_alignment(settings.align, finder)})
    device = choose_device(settings.device) if here else None
    bundle, given = find(settings.bundle), settings.weights
    names = (choices(bundle) if given is None else ()) or (given,)
    origins, precisions = {}, {}
    for name in names:
        method = load(settings.bundle, name, precision=settings.precision)
        choose_controller(settings.controller, settings.max_iterations, method.network.controller)
        origins[method.weights.name] = origin_of(method, settings.refine)
        if device is not None:
            precisions[method.weights.name] = resolve(method.network.precision, device)
    if given is not None and given not in bundle.weights:
        given = whole_path(given)
    known = any(settings.bundle == each.name for each in bundles())
    bundle_name = settings.bundle if known else str(bundle.path)
    return replace(settings, bundle=bundle_name, weights=given, origins=origins, precisions=precisions)


def _check_alignment(settings: Settings, kind: str) -> None:
    """Refuse a kind that is none, and what would change nothing."""
    check_kind(kind, settings.init, "align")
    for option in fields(settings):
        value = getattr(settings, option.name)
        if option.name in OF_NETWORKS and value != option.default:
            raise InputError(
                f"{option.name} {value}: means nothing to an alignment; leave out --align, or "
                f"--{option.name.replace('_', '-')}"
            )


def origin_of(method: Method, refine: int | None) -> dict[str, Any]:
    """What has to be the same for all pairs of a method with these weights: not the device, nor the weights' name.

    Args:
        method: with the weights.
        refine: gradient steps; the card's if None.
    """
    made_by = provenance(method)
    steps = gradient_steps(refine, method.card)
    return {**{name: made_by.get(name) for name in ORIGIN}, CARD: method.card.use, REFINE: steps}


def read_jobs(pairs: Path, settings: Settings, output: Path) -> list[Job]:
    """The pairs of a table, see ``read_cases``; a file that is missing is left for its pair to fail on.

    Raises:
        InputError: for a table that cannot be read, names that cannot be folders', and files that lie where results go.
    """
    cases, output = read_cases(pairs, check=False), output.absolute()
    names = folder_names(cases)
    if SUMMARY in names:
        raise InputError(f"{SUMMARY}: is the name of the summary in {output}; choose another name")
    jobs = []
    for case, name in zip(cases, names, strict=True):
        paths = {column: whole_path(path) for column in INPUTS if (path := getattr(case, column))}
        stamps = {column: stamp(Path(path)) for column, path in paths.items()}
        jobs.append(Job(replace(case, **paths), output / name, settings, stamps))
    _check_places(pairs, jobs, output)
    return jobs


def stamp(path: Path) -> dict[str, Any]:
    """What tells a file, or a folder with a DICOM series, from what was there when a pair was registered."""
    found: dict[str, Any] = {"path": str(path)}
    with suppress(OSError):
        files = [path]
        if path.is_dir():
            files = [file for file in path.iterdir() if file.is_file() and not _bystander(file.name)]
        elif path.suffix.lower() in DETACHED:
            files = [file for file in path.parent.iterdir() if file.name.startswith(f"{path.stem}.")]
        stats = [file.stat() for file in files]
        newest = max((stat.st_mtime_ns for stat in stats), default=0)
        found |= {"files": len(files), "bytes": sum(stat.st_size for stat in stats), "modified_ns": newest}
    return found


def _bystander(name: str) -> bool:
    """Whether a file in a folder of DICOM is none of the series'."""
    return name.startswith(".") or name.lower() in BYSTANDERS


def _check_places(pairs: Path, jobs: Sequence[Job], output: Path) -> None:
    """Refuse a table, and scans, that lie where results go or around them, whatever links lead there."""
    names = [job.folder.name for job in jobs]
    read = [str(pairs), *(file["path"] for job in jobs for file in job.inputs.values())]
    around = [".", *map(str, Path(os.path.realpath(output)).parents)]
    check_kept(output, read, (*around, SUMMARY, *names, *(f"{name}/{file}" for name in names for file in FILES)))


def find_done(jobs: Sequence[Job], output: Path, *, overwrite: bool = False) -> dict[str, Report]:
    """The reports of the pairs, by name, that an earlier run has registered as they would be now.

    A pair whose files have changed, or of whose results something is missing, is to be done again.

    Args:
        jobs: from ``read_jobs``.
        output: the batch's folder.
        overwrite: whether results made with other settings, or by others, and a summary of other pairs are to be
            replaced.

    Raises:
        InputError: for such results, or such a summary, without ``overwrite``.
    """
    if not overwrite:
        _check_summary(output / SUMMARY, {job.folder.name for job in jobs})
    found = {}
    for job in jobs:
        report = _read_report(job.folder)
        reason = _difference(job, report)
        if reason and not overwrite:
            raise InputError(f"{job.folder}: {reason}; choose another --output or add --overwrite to replace it")
        if not reason and report and report["batch"].get("inputs") == job.inputs and _is_whole(job.folder, report):
            found[job.folder.name] = report
    return found


def _check_summary(summary: Path, names: Collection[str]) -> None:
    """Refuse to replace a summary that is none, or that tells of results which another one would be silent about."""
    if not summary.exists():
        return
    rows = _read_summary(summary)
    if rows is None:
        raise InputError(f"{summary}: is not the summary of a batch; move it away, or choose another --output")
    lost = [row["name"] for row in rows if row["status"] == "done" and row["name"] not in names]
    shared = [name for name in lost if any(is_made_of(name, other) for other in names)]
    if shared:
        raise InputError(
            f"{summary}: lists {shared[0]}, as several pairs of the table would now be called; give the one that is "
            "done this name in the column name, or choose another --output"
        )
    if lost:
        others = f" and {len(lost) - 1} more" if lost[1:] else ""
        raise InputError(
            f"{summary}: lists {lost[0]}{others}, missing from the table of pairs; choose another "
            "--output or add --overwrite to replace the summary"
        )


def _read_summary(path: Path) -> list[dict[str, str]] | None:
    with suppress(OSError, UnicodeDecodeError, csv.Error), path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream, restval="")
        if {"name", "status"} <= set(reader.fieldnames or ()):
            return list(reader)
    return None


def _read_report(folder: Path) -> Report | None:
    try:
        report = json.loads((folder / "report.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) else None


def _difference(job: Job, report: Report | None) -> str:
    """What keeps a folder from being this job's, in words; nothing where it is, or is to be made."""
    if report is None:
        return "holds files, but no report of a batch" if _holds_others(job.folder) else ""
    if "batch" not in report:
        return "was not made by a batch"
    if report.get("aligned") != job.settings.align:
        return f"was made {_aligning(report.get('aligned'))}, not {_aligning(job.settings.align)}"
    origins = job.settings.origins
    weights = report["weights"] if report.get("weights") in origins else next(iter(origins))
    made = {**report, **report["batch"]}
    passed = {"inputs"}
    if job.settings.align and "init" in report["batch"].get("inputs", {}):
        passed.add("finder_sha256")  # nothing was looked for then
    if computed := job.settings.precisions.get(weights):
        passed.add("precision")  # what was asked for matters less than what it came to
    for name, asked in {**job.origin(weights), **job.request(weights)}.items():
        if name not in passed and made.get(name) != asked:
            return f"was made with {name} {made.get(name)}, not {asked}"
    if computed and report.get("precision") != computed:
        precision = report.get("precision")
        return f"was computed in {precision}, where this machine takes {computed} (--precision {precision} goes on)"
    return ""


def _holds_others(folder: Path) -> bool:
    """Whether a folder without a readable report holds what no batch has left there.

    A batch's own folders appear whole. Only one that was there before, empty, can be filled half when killed; and a
    power cut can leave names of files that are still empty.
    """
    report = folder / "report.json"
    try:
        names = held(folder) if folder.is_dir() else set()
        lost = names <= set(FILES) and report.is_file() and not report.stat().st_size
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from None
    return bool(names) and not lost


def _aligning(kind: str | None) -> str:
    return f"with --align {kind}" if kind else "without --align"


def _is_whole(folder: Path, report: Report) -> bool:
    files = report.get("bytes", {}).items()
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files)
