"""``iregzoo evaluate``: many pairs, measured."""

from pathlib import Path
from typing import Any

from iregzoo.commands.shared import Progress, names, say_ignored
from iregzoo.errors import InputError

SHOWN = 5  # warnings of an evaluation that are printed


def evaluate(
    pairs: str,
    bundle: str,
    output: str,
    weights: str | None = None,
    peers: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    init: str = "auto",
    controller: str = "auto",
    max_iterations: int | None = None,
    refine: int | None = None,
    learn2reg: str | None = None,
    plots: bool = True,
    overwrite: bool = False,
) -> None:
    """Register every pair of a table with every method and peer, and measure the results.

    The folder gets metrics.csv (a row per pair and method), summary.json (for each method the mean, standard deviation
    and median of every figure and label, its worst case, and its comparison with each peer and each other method),
    table.md (the means), dice.png (box plots by structure), time.png (accuracy against seconds) and cases.png (best and
    worst case of each method). The column bundle has a method as --bundle names it, ipear or ipear@hippocampus.

    Everything is measured on the fixed scan's own grid: Dice, HD95 and ASSD (mm) of the moving labels, warped once with
    nearest-neighbour interpolation, of the labels that both scans have (one that a registration lost has Dice 0 and
    no distances); folding (%), near-singular voxels (%) and sd of log det J of the deformation
    without the affine; NCC, MSE and SSIM of intensities in [0, 1], NCC and MSE over the voxels that masks count;
    landmark error (mm). Seconds run from scans in memory to the warped scan; for a peer, its registration only, with
    what its own call does beside it (that of ants-syn warps both scans and writes its fields to a temporary folder).

    Peers start from the scans as positioned in the files, with the same number of threads, and their fields are
    measured by the same code. ants-syn is ants.registration, SyN with its affine and default settings; greedy is its
    affine and then its deformable registration, WNCC 2x2x2, 100x50x25 iterations each; convexadam, which has no affine,
    is convex_adam_pt with its default settings after the search of --init affine. pip install "iregzoo[peers]" installs
    them. Every method is compared with each peer on Dice (NCC where there are no labels) by Wilcoxon's
    signed-rank test, with Holm's correction over all these comparisons of the run. Methods and controllers are compared
    with each other in the same way, each two once, with a correction over these comparisons alone.

    Args:
        pairs: CSV file with columns fixed, moving and, optionally, fixed_labels, moving_labels, fixed_mask,
            moving_mask (as in register; not with --peers), fixed_points, moving_points, init (a file with the pair's
            own linear start, for the methods), name. Labels and points are those of both scans, or of neither. Relative
            paths are resolved from the table's folder.
        bundle: one or more methods, separated by commas; NAME@WEIGHTS compares several trainings of one, such as
            ipear@hippocampus,ipear@runs/best.pt. NAME may be the folder of a bundle of your own.
        output: folder for the results, new or empty.
        weights: a name from iregzoo list, or a weights file, for entries of --bundle without an @. By default those for
            brains where all scans show a whole brain and a bundle has such, and else the bundle's first.
        peers: one or more of ants-syn, greedy, convexadam, separated by commas, to compare the methods with.
        device: auto, cpu, cuda (of several cuda:1, for instance) or mps; peers run on the CPU.
        precision: auto (bfloat16 where it is fast and was measured to change little), float32 or bfloat16.
        init: affine start: auto, none, center, rigid or affine.
        controller: one or more of auto, tci, iterstop, fixed, separated by commas.
        max_iterations: maximum iterations per pyramid level (at most 100).
        refine: gradient steps after the network, as in register; by default those in the weights' card.
        learn2reg: folder, new or empty, for the displacement fields as Learn2Reg's evaluator reads them,
            disp_<fixed>_<moving>.nii.gz in voxels of the moving array; with several methods or peers, each in its own
            subfolder. With --overwrite, every disp_*.nii.gz in the folder and its subfolders gives way to them.
        plots: draw dice.png, time.png and cases.png.
        overwrite: replace the results of an earlier run in the folders.
    """
    from contextlib import ExitStack

    from iregzoo.cases import COLUMNS, read_cases
    from iregzoo.devices import choose_device
    from iregzoo.entrants import load_methods, suited_weights
    from iregzoo.evaluate import FILES
    from iregzoo.evaluate import evaluate as evaluate_cases
    from iregzoo.flags import flag
    from iregzoo.learn2reg import field_files, fields_in
    from iregzoo.outputs import check_kept, check_target, whole_folder
    from iregzoo.tables import comparison_line

    cases, target = read_cases(pairs), choose_device(device)
    say_ignored(pairs, COLUMNS)
    entries = names(bundle, "bundle")
    check_target(output, overwrite=overwrite, owned=FILES)
    read = (pairs, *(path for case in cases for path in case.paths))
    check_kept(output, read, FILES)
    chosen: dict[str, str] = {}
    if weights is None:
        with Progress(len({each for case in cases for each in case.masked})) as bar:
            suiting = suited_weights(entries, cases, target, precision, bar)
        for entry, (name, seen) in suiting.items():
            print(f"note: all scans show {seen}, so the weights of {entry} are {name}; {entry}@WEIGHTS chooses others")
            chosen[entry] = name
    methods = load_methods(entries, weights, target, precision, chosen=chosen)
    controllers, others = names(controller, "controller"), names(peers, "peers") if peers else []
    registrations = len(cases) * (len(methods) * len(controllers) + len(others))
    with ExitStack() as stack:
        folder = stack.enter_context(whole_folder(Path(output), overwrite=overwrite, owned=FILES))
        fields = None
        if learn2reg:
            owned = field_files(cases, [method.name for method in methods], controllers, others)
            owned += fields_in(learn2reg)
            check_kept(learn2reg, read, owned, option="--learn2reg")
            fields = stack.enter_context(
                whole_folder(Path(learn2reg), overwrite=overwrite, owned=owned, option="--learn2reg")
            )
        summary = evaluate_cases(
            cases,
            methods,
            folder,
            controllers=controllers,
            peers=others,
            init=init,
            max_iterations=max_iterations,
            refine=refine,
            learn2reg=fields,
            plots=flag(plots, "plots"),
            progress=stack.enter_context(Progress(registrations)),
        )
        if len(summary["failed"]) == registrations:  # the results of an earlier run stay
            raise InputError(f"every registration failed, {_first_failure(summary)}; nothing was written")
    for result in summary["results"]:
        print(result_line(result))
    for doubt in summary["warnings"][:SHOWN]:
        print(f"warning: {doubt}")
    if more := summary["warnings"][SHOWN:]:
        print(f"warning: and {len(more)} more, in summary.json")
    for comparison in (*summary["comparisons"], *summary["between_methods"]):
        print(comparison_line(comparison))
    if summary["failed"]:
        raise InputError(
            f"{len(summary['failed'])} of {registrations} registrations failed, {_first_failure(summary)} (the other "
            f"results are in {output})"
        )


def _first_failure(summary: dict[str, Any]) -> str:
    first = summary["failed"][0]
    return f"first {first['pair']} with {first['bundle']}: {first['reason']}"


def result_line(result: dict[str, Any]) -> str:
    """The summary of one method, in a line."""
    from iregzoo.tables import counted, title

    parts = [f"{title(result)}, {counted(result['pairs'], 'pair')}"]
    if "dice_mean" in result:
        dice, before = result["dice_mean"], result["dice_before"]
        some = f" of {counted(dice['pairs'], 'pair')}" if dice["pairs"] < result["pairs"] else ""
        parts.append(f"Dice{some} {dice['mean']:.4f} ± {dice['sd']:.4f} (before {before['mean']:.4f})")
    if "tre_mm" in result:
        parts.append(f"TRE {result['tre_before_mm']['mean']:.2f} → {result['tre_mm']['mean']:.2f} mm")
    if "hd95_mm" in result:
        parts.append(f"HD95 {result['hd95_mm']['mean']:.2f} mm")
    parts.append(f"folding {result['folding_percent']['mean']:.3f} %")
    parts.append(f"NCC {result['ncc_before']['mean']:.3f} → {result['ncc_after']['mean']:.3f}")
    if result["iterations"]:
        parts.append(f"iterations {result['iterations']}")
    if "network_left_out" in result:
        parts.append(f"network left out of {result['network_left_out']}")
    parts.append(f"{result['seconds']['mean']:.2f} s per pair")
    return ", ".join(parts)
