"""A cohort: each pair of a table registered into a folder of its own, by a run that can stop and go on."""

import csv
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import SimpleITK as sitk
import torch

from iregzoo.align import align, searches
from iregzoo.devices import choose_device
from iregzoo.engines import Engine
from iregzoo.errors import InputError, in_a_line
from iregzoo.jobs import COLUMNS, FIGURES, REFINE, SUMMARY, Job, Report, Settings, origin_of
from iregzoo.outputs import check_target, claim, remove_leftovers, whole_file, whole_folder
from iregzoo.register import read_scans, register
from iregzoo.results import FILES, provenance, provenance_of_alignment, write
from iregzoo.scans import Scans
from iregzoo.space.grid import Matrix
from iregzoo.space.transforms import read_linear
from iregzoo.steering import choose_controller
from iregzoo.suited import suited
from iregzoo.tables import cell
from iregzoo.zoo import Method, brain_finder, find, load

LOCK, RUN = ".batch.lock", ".batch.run"
LOOKS = (0.1, 1.0, 3.0)  # seconds between looks for the batch that a worker works for
Row = dict[str, Any]


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """The one batch that writes into a folder, which is made if need be. A kill ends the claim.

    Raises:
        InputError: where another batch is at work, or the folder cannot be written.
    """
    check_target(output, overwrite=True)
    lock = claim(output, output / LOCK, output, "batch is writing")
    try:
        yield
    finally:
        with suppress(OSError):
            (output / LOCK).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # there are results
            output.rmdir()


_ONE_AT_A_TIME = threading.Lock()  # a Dask worker has several threads, which would share one network and its threads


def register_job(job: Job) -> Report | str:
    """Register a pair into its folder: what its report holds, or a line on why there is none.

    The process gets the settings' number of threads, and keeps the network for the next pair.
    """
    try:
        with _ONE_AT_A_TIME:
            return _register(job)
    except Exception as error:
        return in_a_line(error)


def _check_wanted(job: Job) -> None:
    """Refuse to work for a batch that has ended: a cluster goes on with what its workers have begun.

    Raises:
        InputError: where another run, or none, is writing into the batch's folder.
    """
    if not job.run:
        return
    for wait in (*LOOKS, None):  # a share may be late, or away for a moment
        with suppress(FileNotFoundError):
            if (job.folder.parent / RUN).read_text("utf-8") == job.run:
                return
        if wait is not None:
            time.sleep(wait)
    raise InputError("the batch that asked for it has ended")


def _register(job: Job) -> Report:
    settings, case = job.settings, job.case
    _check_wanted(job)
    torch.set_num_threads(settings.threads)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(settings.threads)
    scans, device = read_scans(*case.scans), choose_device(settings.device)
    init = read_linear(case.init) if case.init else settings.init
    if settings.align is not None:
        return _align(job, scans, settings.align, init)
    chosen = _suited(scans, settings, device)
    method, origin = _prepared(settings, chosen[0] if chosen else settings.weights, device)
    controller = choose_controller(settings.controller, settings.max_iterations, method.network.controller)
    with whole_folder(job.folder, overwrite=True, owned=FILES) as folder:
        result = register(scans, method, init=init, controller=controller, refine=origin[REFINE])
        made_by = {**provenance(method, chosen[1] if chosen else ""), "batch": job.request(method.weights.name)}
        report = write(result, folder, made_by, inverse=settings.inverse, jacobian=settings.jacobian)
        _check_wanted(job)
        return report


def _align(job: Job, scans: Scans, kind: str, init: str | Matrix) -> Report:
    finder = brain_finder() if searches(init) else None
    made_by = provenance_of_alignment(kind, finder)
    _check_same(made_by, job.origin(""))
    with whole_folder(job.folder, overwrite=True, owned=FILES) as folder:
        result = align(scans, kind, init=init, finder=finder)
        report = write(result, folder, {**made_by, "batch": job.request("")}, inverse=job.settings.inverse)
        _check_wanted(job)
        return report


def _suited(scans: Scans, settings: Settings, device: str) -> tuple[str, str] | None:
    if settings.weights is not None or len(settings.origins) < 2:
        return None
    return suited(find(settings.bundle), (scans.filled.fixed, scans.filled.moving), device, settings.precision)


def _prepared(settings: Settings, weights: str | None, device: str) -> tuple[Method, Mapping[str, Any]]:
    """The method with these weights, and its origin, which has to be the batch's."""
    first = next(iter(settings.origins))
    origin = settings.origins.get(weights or first, settings.origins[first])
    expected = origin["weights_sha256"], origin["finder_sha256"]
    method = _method(settings.bundle, weights, device, settings.precision, expected)
    _check_same(origin_of(method, settings.refine), origin)
    return method, origin


def _check_same(here: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    """Refuse a worker that would do otherwise than the batch says."""
    for name in {**origin, **here}:
        if here.get(name) != origin.get(name):
            raise InputError(
                f"a worker has {name} {here.get(name)}, but the batch uses {origin.get(name)}; install the same on all "
                "workers"
            )


@lru_cache(maxsize=3)  # of the weights that pairs choose from
def _method(bundle: str, weights: str | None, device: str, precision: str, expected: tuple[str | None, ...]) -> Method:
    """The method, loaded once a process; ``expected``, the hashes, makes a process that lives long look again."""
    return load(bundle, weights, device, precision)


def run(
    jobs: Sequence[Job],
    done: Mapping[str, Report],
    output: Path,
    engine: Engine,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """Register the jobs that are not done, and write ``summary.csv``: its rows, in the jobs' order.

    Whatever ends it early, the pairs that are done stay, and the summary says which.

    Args:
        jobs: all of them, from ``read_jobs``.
        done: from ``find_done``.
        output: the batch's folder, held by ``alone``.
        engine: from ``engines``.
        progress: told "begin", and then each pair's name as it ends.

    Raises:
        KeyboardInterrupt: which says how many pairs are done.
        InputError: as the engine does, or where the summary cannot be written.
    """
    names = [job.folder.name for job in jobs]
    remove_leftovers(output, {*names, SUMMARY})
    outcomes: dict[str, Report | str] = dict(done)
    progress("begin")
    token = uuid4().hex
    try:
        with whole_file(output / RUN, overwrite=True) as partial:
            partial.write_text(token, "utf-8")
        left = [replace(job, run=token) for job in jobs if job.folder.name not in done]
        with closing(engine(register_job, left)) as ended:
            for job, outcome in ended:
                outcomes[job.folder.name] = outcome
                progress(job.folder.name)
    except KeyboardInterrupt:
        finished = sum(isinstance(outcome, dict) for outcome in outcomes.values())
        raise KeyboardInterrupt(f"{finished} of {len(jobs)} pairs are done") from None
    finally:
        with suppress(OSError):
            (output / RUN).unlink(missing_ok=True)
        remove_leftovers(output, {*names, SUMMARY, RUN})  # of workers that died or were ended
        rows = [_row(job, outcomes.get(job.folder.name)) for job in jobs]
        _write_summary(output / SUMMARY, rows)
    return rows


def _row(job: Job, outcome: Report | str | None) -> Row:
    row: Row = {"name": job.folder.name, "fixed": job.case.fixed, "moving": job.case.moving}
    if outcome is None:
        return {**row, "status": "waiting"}
    if isinstance(outcome, str):
        kept = (
            "; the result of an earlier run stays in its folder"
            if os.access(job.folder / "report.json", os.F_OK)
            else ""
        )
        return {**row, "status": "failed", "reason": " ".join(outcome.split()) + kept}
    return {
        **row,
        "status": "done",
        "weights": outcome.get("weights", ""),
        **{name: outcome[name] for name in FIGURES if name in outcome},
        "iterations": " ".join(map(str, outcome["iterations"])),
        "network_left_out": int("network_left_out" in outcome) or "",
        "warnings": "; ".join(outcome["warnings"]),
        "seconds": round(sum(outcome["seconds"].values()), 3),
    }


def _write_summary(path: Path, rows: Sequence[Row]) -> None:
    with whole_file(path, overwrite=True) as partial, partial.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)
