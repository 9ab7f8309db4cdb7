"""``iregzoo template``: the mean of a group of scans."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iregzoo.commands.shared import Progress, listed, say_ignored
from iregzoo.errors import InputError

if TYPE_CHECKING:
    from iregzoo.group import Member
    from iregzoo.space.scan import Scan


def template(
    scans: str,
    output: str,
    bundle: str = "ipear",
    weights: str | None = None,
    rounds: int = 3,
    spacing: str | None = None,
    label_names: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    init: str = "auto",
    refine: int | None = None,
    transforms: bool = False,
    overwrite: bool = False,
) -> None:
    """Build an unbiased template of a group of scans: their mean image in their mean shape, and their labels by vote.

    The scans are placed in their mean pose and averaged. In each round, every scan is registered to the mean and
    averaged anew where the mean of all displacements is zero. The folder gets template.nii.gz; agreement.csv, which
    says for each scan how well it fits the others; template.json, which says how it was made; and, if the scans have
    label maps, labels.nii.gz and labels.json. These are an atlas for iregzoo register, batch and label-app.

    A template of N scans takes as long as N × rounds registrations. While it is built, the output's disk must have room
    for the deformations: 12 bytes per voxel of the template and scan, and with --transforms 24 more. After an early
    end, such as Ctrl-C, the same command goes on from there.

    Args:
        scans: CSV file with columns image and, optionally, labels (for all scans or none) and name. Relative paths are
            resolved from the table's folder.
        output: folder for the template, new or empty.
        bundle: the method; see iregzoo list, or give the folder of a bundle of your own.
        weights: a name from iregzoo list, or a weights file. By default those for brains where all scans show a whole
            brain and the bundle has such, and else the bundle's first.
        rounds: how often the scans are registered to the mean; 0 only averages them in their mean pose.
        spacing: voxel size of the template in mm, one number or three (right, anterior, superior) separated by commas;
            by default the median of the scans.
        label_names: the labels' names, as JSON such as {"1": "thalamus"} or CSV with the columns label and name.
        device: auto, cpu, cuda (of several cuda:1, for instance) or mps.
        precision: auto (bfloat16 where it is fast and was measured to change little), float32 or bfloat16.
        init: affine start: auto (what the weights need), none (trust the headers; the template then keeps their world),
            center, rigid or affine.
        refine: gradient steps after the network, as in register; by default those in the weights' card.
        transforms: also write transforms/NAME.h5 (ITK), which warps a scan to the template with iregzoo apply.
        overwrite: replace an earlier template in the folder.
    """
    import json
    from collections import deque

    import torch

    from iregzoo.cases import whole_path
    from iregzoo.devices import choose_device
    from iregzoo.flags import check_count, flag
    from iregzoo.group import COLUMNS, check_members, labels_in, placings, read_group, read_members
    from iregzoo.groupwise import MOST_ROUNDS, agreement, build_template, template_labels, write_ways
    from iregzoo.jobs import stamp
    from iregzoo.label_names import read_names
    from iregzoo.outputs import check_kept, check_target, kept_work, whole_folder
    from iregzoo.quality import labels_of
    from iregzoo.results import provenance
    from iregzoo.steering import gradient_steps
    from iregzoo.suited import suited
    from iregzoo.template import TRANSFORMS, files_of, named, names_in, write_report, write_template
    from iregzoo.zoo import find, load

    begin, target = time.perf_counter(), Path(output)
    check_count(rounds, "rounds", least=0, most=MOST_ROUNDS)
    step = None if spacing is None else _spacing(spacing)
    members = read_members(scans)
    say_ignored(scans, COLUMNS)
    owned = files_of({*(member.name for member in members), *names_in(target)})
    read = (scans, label_names, *(path for member in members for path in (member.image, member.labels)))
    check_kept(target, read, owned)
    check_members(members)
    if label_names and not any(member.labels for member in members):
        raise InputError(
            f"label-names {label_names}: {scans} has no labels to name; add a column labels, or leave it out"
        )
    check_target(target, overwrite=overwrite, owned=owned)
    where = choose_device(device)
    if weights is None:
        with Progress(len(members)) as bar:
            suiting = suited(find(bundle), _seen_by(bar, members), where, precision)
        if suiting:
            weights, shown = suiting
            print(f"note: all scans show {shown}, so the weights are {weights}; --weights chooses others")
    method = load(bundle, weights, where, precision)
    steps = gradient_steps(refine, method.card)
    total = len(members) * (placings(init, method.card) + rounds)
    request = {
        **provenance(method),
        "card": method.card.use,
        "init": init,
        "spacing": step,
        "refine": steps,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "scans": [stamp(Path(whole_path(member.image))) for member in members],
    }
    with (
        kept_work(target, json.dumps(request)) as work,
        whole_folder(target, overwrite=overwrite, owned=owned) as folder,
        Progress(total) as bar,
    ):
        bar("read")
        labels = labels_in(members)
        names = named(labels, read_names(Path(label_names)) if label_names else None)
        group = read_group(members, method.card, init=init, spacing=step, finder=method.finder, progress=bar)
        rounds_built = build_template(group, method, work, rounds=rounds, refine=steps, resume=True, progress=bar)
        built = deque(rounds_built, maxlen=1).pop()
        bar("write")
        voted = template_labels(group, built, labels) if labels else None
        if voted is not None and not voted.any():
            voted = None
        rows = agreement(group, built, voted)
        if flag(transforms, "transforms"):
            write_ways(group, built, folder / TRANSFORMS)
        kept = [] if voted is None else labels_of(voted)
        write_template(folder, built.image, group.grid, labels=voted, names={value: names[value] for value in kept})
        made = {"scans": len(members), "rounds": rounds, "init": group.init, "refine": steps}
        made |= {"shape": list(group.grid.shape), "spacing_mm": group.grid.spacing.tolist()}
        if group.doubts:
            made["header_doubts"] = dict(group.doubts)
        made["seconds"] = round(time.perf_counter() - begin, 1)
        write_report(folder, rows, {**provenance(method), **made})
    print(f"{len(members)} scans, {', '.join(_means(rows))}, {made['seconds']} s")
    for doubt in (*_doubts(rows), *(f"{name}: {doubt}" for name, doubt in group.doubts.items())):
        print(f"warning: {doubt}")
    if left := sorted(set(labels) - set(kept)):
        print(f"warning: labels that too few scans have in one place were left out: {', '.join(map(str, left))}")
    print(f"written to {output}: agreement.csv has a row for each scan")


def _seen_by(progress: Callable[[str], None], members: Sequence["Member"]) -> Iterator["Scan"]:
    for member in members:
        progress(member.name)
        yield member.scan()


def _doubts(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What should make a person doubt a scan's place in the group, in words."""
    from iregzoo.groupwise import usual_ncc
    from iregzoo.quality import LITTLE_ALIKE, MUCH_FOLDING

    median, least = usual_ncc(rows)
    for row in rows:
        if not row["ncc"] >= LITTLE_ALIKE:
            yield f"{row['name']} is not like the other scans (NCC {row['ncc']:.2f}): check it, or leave it out"
        elif row["ncc"] < least:
            yield (
                f"{row['name']} is far less like the other scans (NCC {row['ncc']:.2f}) than most are (median "
                f"{median:.2f}): check its side, orientation and contrast, or leave it out"
            )
        if row.get("folding_percent", 0) > MUCH_FOLDING:
            yield f"{row['name']}: its deformation folds in {row['folding_percent']:.1f} % of the voxels"


def _spacing(value: str) -> list[float]:
    """One number, or three for right, anterior and superior."""
    try:
        steps = [float(step) for step in listed(value, "spacing")]
    except ValueError:
        steps = []
    if len(steps) not in (1, 3):
        raise InputError(f"spacing {value}: give one number in mm, or three separated by commas")
    return steps * (3 // len(steps))


def _means(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The mean figures of the scans, and which scan is least like the template."""
    for name, title in (("ncc", "NCC with the others"), ("dice", "Dice with the labels")):
        if name in rows[0]:
            known = [row for row in rows if not isnan(row[name])] or rows
            worst = min(known, key=lambda row: float(row[name]))
            mean = sum(row[name] for row in known) / len(known)
            yield f"{title} {mean:.3f} (lowest {worst[name]:.3f}, {worst['name']})"
    if "folding_percent" in rows[0]:
        yield f"folding {sum(row['folding_percent'] for row in rows) / len(rows):.3f} %"
