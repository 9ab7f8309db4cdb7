"""``iregzoo register`` and ``demo``: one pair of scans."""

import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from iregzoo.commands.shared import STAGES, Progress, summary_line


def register(
    fixed: str,
    moving: str,
    output: str,
    bundle: str = "ipear",
    weights: str | None = None,
    fixed_labels: str | None = None,
    moving_labels: str | None = None,
    fixed_mask: str | None = None,
    moving_mask: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    init: str = "auto",
    controller: str = "auto",
    max_iterations: int | None = None,
    refine: int | None = None,
    inverse: bool = False,
    jacobian: bool = False,
    overwrite: bool = False,
) -> None:
    """Register a moving scan to a fixed one and write the results into a folder.

    Scans are NIfTI, NRRD, MetaImage, .mgz or a folder with one DICOM series. The folder gets warped.nii.gz,
    displacement.nii.gz (LPS mm), transform.h5 (ITK), and the report: report.html for a browser, report.png and
    report.json; warped_labels.nii.gz if moving labels are given; with --inverse the same for the inverse direction.

    Args:
        fixed: the scan that stays in place.
        moving: the scan to align with the fixed one.
        output: folder for the results, new or empty.
        bundle: the method; see iregzoo list, or give the folder of a bundle of your own.
        weights: a name from iregzoo list, or a weights file. By default those for brains where both scans show a whole
            brain and the bundle has such, and else the bundle's first.
        fixed_labels: label map on the fixed scan's grid.
        moving_labels: label map on the moving scan's grid.
        fixed_mask: mask on the fixed scan's grid: where it is 0, the images are not compared. The network sees lesions
            filled from their surroundings; outside a brain's mask, the deformation is continued from inside.
        moving_mask: the same on the moving scan's grid.
        device: auto, cpu, cuda (of several cuda:1, for instance) or mps.
        precision: auto (bfloat16 where it is fast and was measured to change little), float32 or bfloat16.
        init: affine start: auto (what the weights need), none (trust the headers), center, rigid or affine; or a file
            with a linear transform as written by 3D Slicer and ANTs (.h5, .tfm, .mat, .txt), which is used unchanged.
        controller: iteration controller: auto (the best for the weights), tci, iterstop or fixed.
        max_iterations: maximum iterations per pyramid level (at most 100).
        refine: gradient steps after the network that increase the similarity of the images at the fixed scan's
            resolution (at most 1000; 0 for none). By default 40 for brain weights and none for hippocampus weights.
        inverse: also write the inverse transform, from fixed to moving, and the fixed scan warped by it.
        jacobian: also write jacobian.nii.gz, the Jacobian determinant of the deformation without the affine start;
            above 1, tissue takes up more room in the moving scan than in the fixed one.
        overwrite: replace the results of an earlier run in the folder.
    """
    from tqdm import tqdm

    from iregzoo.devices import choose_device
    from iregzoo.outputs import check_kept, whole_folder
    from iregzoo.quality import field_size, large_field
    from iregzoo.register import choose_start, read_scans
    from iregzoo.register import register as register_scans
    from iregzoo.results import FILES, provenance, write
    from iregzoo.space.frame import Frame
    from iregzoo.steering import choose_controller
    from iregzoo.suited import for_pair
    from iregzoo.zoo import find, load

    said: list[str] = []

    def warn(frame: Frame) -> None:  # the network may take minutes
        if doubt := large_field(field_size(frame.network, method.card)):
            said.append(doubt)
            tqdm.write(f"warning: {doubt}", file=sys.stderr)  # above the progress bar

    maps = (fixed_labels, moving_labels, fixed_mask, moving_mask)
    check_kept(output, (fixed, moving, *maps, init), FILES)
    start = choose_start(init)
    stages = len(STAGES) + bool(inverse)
    with whole_folder(Path(output), overwrite=overwrite, owned=FILES) as folder, Progress(stages) as bar:
        bar("read")
        scans = read_scans(fixed, moving, *maps)
        bar("weights")
        where = choose_device(device)
        pair = scans.filled.fixed, scans.filled.moving
        shown = ""
        if weights is None:
            weights, shown, note = for_pair(find(bundle), pair, where, precision)
            if note:
                tqdm.write(f"note: {note}")
        method = load(bundle, weights, where, precision)
        steering = choose_controller(controller, max_iterations, method.network.controller)
        result = register_scans(
            scans, method, init=start, controller=steering, refine=refine, progress=bar, placed=warn
        )
        report = write(result, folder, provenance(method, shown), inverse=inverse, jacobian=jacobian, progress=bar)
    _say(report, said)
    _say_unused(fixed_labels, moving_labels, inverse)
    print(f"written to {output}: open report.html first")


def align(
    fixed: str,
    moving: str,
    output: str,
    kind: str = "rigid",
    fixed_labels: str | None = None,
    moving_labels: str | None = None,
    fixed_mask: str | None = None,
    moving_mask: str | None = None,
    init: str = "auto",
    inverse: bool = False,
    overwrite: bool = False,
) -> None:
    """Align a moving scan to a fixed one by a rigid or affine transform, without deforming it.

    For scans of one person, on two days or of two contrasts. The folder gets the files of iregzoo register, of which
    transform.h5 is a linear transform (ITK).

    Args:
        fixed: the scan that stays in place.
        moving: the scan to align with the fixed one.
        output: folder for the results, new or empty.
        kind: rigid (turned and shifted) or affine (also stretched and sheared).
        fixed_labels: label map on the fixed scan's grid.
        moving_labels: label map on the moving scan's grid.
        fixed_mask: mask on the fixed scan's grid: where it is 0, the images are not compared.
        moving_mask: the same on the moving scan's grid.
        init: where to begin: auto, rigid or affine (where the brains lie, or else a search; auto is the kind, and a
            rigid kind cannot begin with affine), none (trust the headers), center, or a file with a linear transform as
            for iregzoo register.
        inverse: also write the inverse transform, from fixed to moving, and the fixed scan warped by it.
        overwrite: replace the results of an earlier run in the folder.
    """
    from iregzoo.align import align as align_scans
    from iregzoo.align import check_kind, searches
    from iregzoo.outputs import check_kept, whole_folder
    from iregzoo.register import choose_start, read_scans
    from iregzoo.results import FILES, provenance_of_alignment, write
    from iregzoo.zoo import brain_finder

    maps = (fixed_labels, moving_labels, fixed_mask, moving_mask)
    check_kept(output, (fixed, moving, *maps, init), FILES)
    start = choose_start(init)
    check_kind(kind, start)
    with whole_folder(Path(output), overwrite=overwrite, owned=FILES) as folder, Progress(6 + bool(inverse)) as bar:
        bar("read")
        scans = read_scans(fixed, moving, *maps)
        finder = brain_finder() if searches(start) else None
        result = align_scans(scans, kind, init=start, finder=finder, progress=bar)
        report = write(result, folder, provenance_of_alignment(kind, finder), inverse=inverse, progress=bar)
    _say(report)
    _say_unused(fixed_labels, moving_labels, inverse)
    print(f"written to {output}: open report.html first")


def demo(
    output: str = "iregzoo-demo", bundle: str = "iirp", weights: str | None = None, overwrite: bool = False
) -> None:
    """Make a phantom pair with a known deformation, register it, and report how much of the deformation was recovered.

    Args:
        output: folder for the phantom (fixed, moving, labels) and the results.
        bundle: the method.
        weights: a name from iregzoo list, or a weights file; by default the bundle's first.
        overwrite: replace an earlier demo in the folder.
    """
    from iregzoo.outputs import whole_folder
    from iregzoo.phantom import FILES as PHANTOM_FILES
    from iregzoo.phantom import make_phantom, recovered
    from iregzoo.register import read_scans
    from iregzoo.register import register as register_scans
    from iregzoo.results import FILES, provenance, write
    from iregzoo.zoo import load

    owned = (*FILES, *PHANTOM_FILES)
    with whole_folder(Path(output), overwrite=overwrite, owned=owned) as folder, Progress(len(STAGES)) as bar:
        bar("read")
        phantom = make_phantom(folder)
        read = read_scans(phantom.fixed, phantom.moving, phantom.fixed_labels, phantom.moving_labels)
        # They will lie where the results go, and not where both are on their way.
        fixed, moving = (replace(scan, path=Path(output) / scan.path.name) for scan in (read.fixed, read.moving))
        scans = replace(read, fixed=fixed, moving=moving)
        bar("weights")
        method = load(bundle, weights)
        result = register_scans(scans, method, init="none", progress=bar)
        report = write(result, folder, provenance(method), progress=bar)
        found = recovered(phantom, result)
    _say(report)
    print(
        f"known deformation {found['known_mm']:.2f} mm on average, {found['left_mm']:.2f} mm of it remaining: "
        f"{found['recovered_percent']:.0f} % recovered"
    )
    print(f"written to {output}: open report.html first")


def _say(report: dict[str, Any], said: Collection[str] = ()) -> None:
    """Print what a registration did and what should make a person doubt, but for what was said before."""
    from iregzoo.necessity import LEFT_OUT

    print(summary_line(report))
    if "network_left_out" in report:
        print(f"note: {LEFT_OUT}")
    for doubt in report["warnings"]:
        if doubt not in said:
            print(f"warning: {doubt}")


def _say_unused(fixed_labels: str | None, moving_labels: str | None, inverse: bool) -> None:
    """Warn of fixed labels from which nothing was made."""
    if fixed_labels and not (moving_labels or inverse):
        print("warning: the fixed labels were not used: Dice needs --moving-labels, too, and their way back --inverse")
