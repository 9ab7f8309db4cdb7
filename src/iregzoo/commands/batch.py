"""``iregzoo batch``: a cohort."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iregzoo.commands.shared import Progress, say_ignored
from iregzoo.errors import InputError


def batch(
    pairs: str,
    output: str,
    bundle: str = "ipear",
    weights: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    init: str = "auto",
    controller: str = "auto",
    max_iterations: int | None = None,
    refine: int | None = None,
    inverse: bool = False,
    jacobian: bool = False,
    workers: int = 1,
    threads: int = 1,
    align: str | None = None,
    scheduler: str | None = None,
    overwrite: bool = False,
) -> None:
    """Register (or align) every pair of a table, each into its own folder with the files of iregzoo register.

    Running the same command again resumes the batch and retries failed pairs. A pair counts as done if its folder is
    complete and was made by the same method with the same options from the same files. The output folder also gets
    summary.csv, with a row for each pair: its status, the reason if it failed, and its figures.

    Args:
        pairs: CSV file with columns fixed, moving and, optionally, fixed_labels, moving_labels, fixed_mask,
            moving_mask, init (a file with the pair's own linear start), name (of the pair's folder; by default
            MOVING_to_FIXED from the file names). Relative paths are resolved from the table's folder.
        output: folder for the pairs' folders and the summary.
        bundle: the method; see iregzoo list, or give the folder of a bundle of your own.
        weights: a name from iregzoo list, or a weights file, for all pairs. By default each pair gets, as in iregzoo
            register, those for brains where both scans show a whole brain, and else the bundle's first.
        device: auto, cpu, cuda (of several cuda:1, for instance) or mps.
        precision: auto (bfloat16 where it is fast and was measured to change little), float32 or bfloat16.
        init: affine start: auto (what the weights need; with --align its kind), none (trust the headers), center, rigid
            or affine.
        controller: iteration controller: auto (the best for the weights), tci, iterstop or fixed.
        max_iterations: maximum iterations per pyramid level (at most 100).
        refine: gradient steps after the network, as in register; by default those in the weights' card.
        inverse: also write the inverse transform, as iregzoo register does.
        jacobian: also write jacobian.nii.gz, as iregzoo register does.
        workers: number of processes that register pairs in parallel; each needs the memory of iregzoo register.
        threads: threads per process. The last digits of a result depend on it, but not on the number of workers.
        align: rigid or affine, to align every pair so, as iregzoo align does, instead of deforming it: for scans of one
            person, on several days or of several contrasts.
        scheduler: address of a Dask cluster that does the work instead, such as tcp://host:8786; its workers must have
            iregzoo, and see the files and the output folder under the same paths.
        overwrite: replace results in the folder that were made with other settings.
    """
    from contextlib import ExitStack
    from functools import partial

    from iregzoo.batch import alone, run
    from iregzoo.cases import COLUMNS
    from iregzoo.engines import on_cluster, on_this_machine
    from iregzoo.flags import check_count
    from iregzoo.jobs import Settings, checked, find_done, read_jobs

    check_count(workers, "workers")
    if scheduler and workers != 1:
        raise InputError(f"workers {workers}: a cluster has its own workers; leave out --workers or --scheduler")
    settings = Settings(
        bundle,
        weights,
        device,
        precision,
        init,
        controller,
        max_iterations,
        refine,
        inverse=inverse,
        jacobian=jacobian,
        threads=threads,
        align=align,
    )
    target, settings = Path(output), checked(settings, here=not scheduler)
    jobs = read_jobs(Path(pairs), settings, target)
    say_ignored(pairs, COLUMNS)
    with ExitStack() as stack:
        cluster = stack.enter_context(on_cluster(scheduler)) if scheduler else None
        stack.enter_context(alone(target))
        done = find_done(jobs, target, overwrite=overwrite)
        bar = stack.enter_context(Progress(len(jobs) - len(done)))
        rows = run(jobs, done, target, cluster or partial(on_this_machine, workers=workers), bar)
    print(totals(rows, len(done), "aligned" if align else "registered"))
    if weights is None and (chosen := choices_made(rows, next(iter(settings.origins)))):
        print(f"note: {chosen}, by what the scans show; --weights gives all pairs the same")
    failed = [row for row in rows if row["status"] == "failed"]
    if failed:
        raise InputError(
            f"{len(failed)} of {len(rows)} pairs failed, first {failed[0]['name']}: {failed[0]['reason']} "
            f"(all are in {target / 'summary.csv'}; run the same command again to retry them)"
        )
    print(f"written to {output}: summary.csv has a row for each pair")


def choices_made(rows: Sequence[dict[str, Any]], first: str) -> str:
    """Which weights the pairs of a batch got, where some got others than the bundle's first."""
    counts = Counter(row["weights"] for row in rows if row["status"] == "done")
    if set(counts) <= {first}:
        return ""
    return ", ".join(f"{count} pair{'s' * (count > 1)} got the weights {name}" for name, count in counts.most_common())


def totals(rows: Sequence[dict[str, Any]], earlier: int, what: str = "registered") -> str:
    """What a batch has done, in a line: how many pairs, and their mean figures."""
    from iregzoo.tables import counted

    done = [row for row in rows if row["status"] == "done"]
    parts = [f"{len(done)} of {len(rows)} pairs {what}" + (f", {earlier} in an earlier run" if earlier else "")]
    for title, before, after in (("NCC", "ncc_before", "ncc_after"), ("Dice", "dice_before_mean", "dice_mean")):
        both = [(row[before], row[after]) for row in done if before in row and after in row]
        if both:
            means = (sum(column) / len(both) for column in zip(*both, strict=True))
            some = f" of {counted(len(both), 'pair')}" if len(both) < len(done) else ""
            parts.append(f"{title}{some} {' → '.join(f'{mean:.3f}' for mean in means)}")
    if done:
        parts.append(f"folding {sum(row['folding_percent'] for row in done) / len(done):.3f} %")
    doubtful = sum(bool(row["warnings"]) for row in done)
    return ", ".join([*parts, *([f"{doubtful} with warnings"] if doubtful else [])])
