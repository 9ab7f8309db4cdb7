"""Measure what docs/evaluation.md shows, and write its tables and pictures, and those of README.md and the cards.

    python benchmarks/evaluation.py --dataset-dir DIR [--brain-dir DIR] [--scans-dir DIR]
        [--parts hippocampus,iterations,refinement,brain,stripped,turned,real] [--brain-looks t1,contrast]
        [--brain-peers t1,contrast,real]

DIR holds the hippocampus scans (images/, labels/, splits.json); --brain-dir the label maps of whole heads, which are
rendered first, the moving ones in each of --brain-looks; --scans-dir two real T1 brains without labels. Each part runs
``iregzoo evaluate`` and replaces its tables between the markers of the page. Peers need ``pip install
"iregzoo[peers]"``.
"""

import csv
import json
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fire
import nibabel as nib
import numpy as np

from documents import machine_line, replace_part
from documents import table as markdown
from iregzoo.space.grid import RAS_FROM_LPS
from iregzoo.space.upright import ROTATIONS
from iregzoo.tables import counted
from iregzoo.zoo import bundles

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "evaluation.md"
PICTURES = PAGE.with_suffix("")
PEERS = "ants-syn,greedy,convexadam"
STEPS = (0, 40)
AFTER_STEPS = {"dice_mean": 3, "hd95_mm": 2, "folding_percent": 3, "seconds": 2}
ITERATIONS = (("iterstop", None), ("tci", None), ("fixed", 1), ("fixed", 2), ("fixed", 3), ("fixed", 4))


def main(
    dataset_dir: str,
    brain_dir: str | None = None,
    scans_dir: str | None = None,
    parts: Any = "hippocampus,iterations,refinement,brain,stripped,turned,real",
    brain_looks: Any = "t1,contrast",
    brain_peers: Any = "t1,contrast,real",
) -> None:
    """Run the chosen parts and write the page; the brains take 40 minutes with peers on t1, 80 on all."""
    given = (parts, brain_looks, brain_peers)
    chosen, looks, compared = (one.split(",") if isinstance(one, str) else list(one) for one in given)
    with TemporaryDirectory() as scratch:
        if "hippocampus" in chosen:
            hippocampus(Path(dataset_dir), Path(scratch))
        if "iterations" in chosen:
            iterations(Path(dataset_dir), Path(scratch))
        if "refinement" in chosen and brain_dir:
            refinement(Path(brain_dir), Path(scratch))
        if "brain" in chosen and brain_dir and having("brain"):
            brain(Path(brain_dir), Path(scratch), looks, compared)
        if "stripped" in chosen and brain_dir and having("brain"):
            stripped(Path(brain_dir), Path(scratch))
        if "turned" in chosen and brain_dir and having("brain"):
            turned(Path(brain_dir), Path(scratch))
        if "real" in chosen and scans_dir and having("brain"):
            real(Path(scans_dir).resolve(), Path(scratch), peers="real" in compared)


def hippocampus(data: Path, scratch: Path) -> None:
    """Every method and peer on the test split."""
    pairs = cyclic(data, "test", scratch)
    found = evaluate(scratch / "hippocampus", "--pairs", pairs, "--bundle", having("hippocampus"), peers=True)
    write("hippocampus", table(found))
    picture(found, "hippocampus")
    results = [each for each in summary(found)["results"] if each["bundle"] in PAPERS]
    write("hippocampus-bundles", overview(results), ROOT / "README.md")
    for each in results:
        card = ROOT / "bundles" / each["bundle"] / "docs" / "README.md"
        write("hippocampus-card", card_table(each, summary(found)), card)


def iterations(data: Path, scratch: Path) -> None:
    """Controllers of the two methods that iterate, on the split for choosing."""
    pairs = cyclic(data, "val", scratch)
    heads = ("method", "controller", "Dice, mean ± sd", "folding, %", "iterations a level, coarse to fine", "s a pair")
    rows = []
    for controller, count in ITERATIONS:
        name = f"{controller} {count}" if count else controller
        options = ("--pairs", pairs, "--bundle", "iirp,ipear", "--controller", controller, "--plots", "false")
        limit = ("--max-iterations", str(count)) if count else ()
        folder = evaluate(scratch / name, *options, *limit)
        for result in summary(folder)["results"]:
            dice = result["dice_mean"]
            rows.append(
                (
                    result["bundle"],
                    name,
                    f"{dice['mean']:.4f} ± {dice['sd']:.3f}",
                    f"{result['folding_percent']['mean']:.3f}",
                    ", ".join(f"{n:.2f}" for n in result["iterations"]),
                    f"{result['seconds']['mean']:.2f}",
                )
            )
    rows.sort(key=lambda row: row[0])
    write("iterations", "\n".join([markdown(heads, rows), "", machine(summary(folder))]))


def refinement(data: Path, scratch: Path) -> None:
    """Gradient steps after the network, on heads of people of the training alone."""
    rendered = scratch / "choosing"
    run("benchmarks/render_brains.py", "--dataset-dir", data, "--output", rendered, "--choosing")
    heads = ("method", "weights", "moving", "steps", "Dice, mean ± sd", "HD95, mm", "folding, %", "s a pair")
    rows = []
    for weights, look in (("brain", "t1"), ("brain_any", "contrast")):
        for steps in STEPS:
            options = ("--pairs", rendered / f"{look}.csv", "--bundle", "iirp", "--weights", weights)
            folder = scratch / f"{weights}-{steps}"
            found = summary(evaluate(folder, *options, "--refine", str(steps), "--plots", "false"))
            (result,) = found["results"]
            cells = [f"{result[name]['mean']:.{digits}f}" for name, digits in AFTER_STEPS.items()]
            cells[0] += f" ± {result['dice_mean']['sd']:.3f}"
            rows.append(("iirp", f"`{weights}`", look, str(steps), *cells))
    write("refinement", "\n".join([markdown(heads, rows), "", machine(found)]))


def brain(data: Path, scratch: Path, looks: list[str], compared: list[str]) -> None:
    """Whole heads, the moving ones rendered in some looks; peers once on each that is to be compared."""
    rendered = scratch / "rendered"
    run("benchmarks/render_brains.py", "--dataset-dir", data, "--output", rendered)
    for weights, look in (("brain_any", "contrast"), ("brain_any", "t1"), ("brain", "t1")):
        if look not in looks:
            continue
        part = f"{weights}-{look}"
        options = ("--pairs", rendered / f"{look}.csv", "--bundle", having(weights), "--weights", weights)
        aside = (weights, look) == ("brain_any", "t1")  # peers see those pairs with brain
        found = evaluate(scratch / part, *options, peers=look in compared and not aside)
        write(part, table(found))
        if not aside:
            picture(found, part)
    if {"t1", "contrast"} <= set(looks):
        found_of = {look: scratch / f"brain_any-{look}" for look in ("t1", "contrast")}
        write("brain-pairs", pair_by_pair(rendered, found_of))


def stripped(data: Path, scratch: Path) -> None:
    """The same people, with the head or without in one scan or in both."""
    rendered = {"head": scratch / "heads", "brain": scratch / "brains"}
    for shows, folder in rendered.items():
        options = ("--stripped",) if shows == "brain" else ()
        run("benchmarks/render_brains.py", "--dataset-dir", data, "--output", folder, *options)
    rows = []
    for fixed, moving in product(rendered, repeat=2):
        pairs = scratch / f"{fixed}-{moving}.csv"
        write_mixed(rendered[fixed], rendered[moving], "t1.csv", pairs)
        compared = ("--pairs", pairs, "--bundle", "iirp", "--weights", "brain", "--plots", "false")
        found = summary(evaluate(scratch / f"{fixed}-{moving}", *compared))
        (result,) = found["results"]
        worst = f"{result['worst']['dice_mean']:.3f}"
        rows.append((fixed, moving, f"{result['dice_mean']['mean']:.3f} ± {result['dice_mean']['sd']:.3f}", worst))
    text = markdown(("fixed", "moving", "Dice of iirp, mean ± sd", "worst pair"), rows)
    write("brain-stripped", "\n".join([text, "", machine(found)]))


def turned(data: Path, scratch: Path) -> None:
    """The same people, with headers that turn each scan its own way, and weights chosen by what the scans show."""
    upright = scratch / "upright"
    run("benchmarks/render_brains.py", "--dataset-dir", data, "--output", upright)
    folders = {"upright": upright, "turned": turn_headers(upright, scratch / "turned")}
    rows = []
    for look, (headers, folder) in product(("t1", "contrast"), folders.items()):
        compared = ("--pairs", folder / f"{look}.csv", "--bundle", "iirp", "--plots", "false")
        found = summary(evaluate(scratch / f"{look}-{headers}", *compared))
        (result,), (method,) = found["results"], found["methods"]
        dice = f"{result['dice_mean']['mean']:.3f} ± {result['dice_mean']['sd']:.3f}"
        figures = (dice, f"{result['worst']['dice_mean']:.3f}", f"{result['seconds']['mean']:.1f}")
        rows.append((look, headers, method["weights"], *figures))
    heads = ("moving", "headers", "weights chosen", "Dice of iirp, mean ± sd", "worst pair", "s a pair")
    write("brain-turned", "\n".join([markdown(heads, rows), "", machine(found)]))


def turn_headers(source: Path, target: Path) -> Path:
    """A folder with the same voxels, whose headers turn each person's scans and label map another way."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".gz":
            shutil.copy(path, target)
            continue
        image = nib.load(path)
        person = path.name.split(".")[0].rsplit("_", 1)[0]
        rotation = ROTATIONS[1 + sum(person.encode()) % (len(ROTATIONS) - 1)]
        world = RAS_FROM_LPS @ rotation @ RAS_FROM_LPS
        nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), world @ image.affine), target / path.name)
    return target


def write_mixed(fixed: Path, moving: Path, name: str, target: Path) -> None:
    """The table of pairs of two folders alike, its fixed scans from one and its moving ones from the other."""
    with (fixed / name).open(encoding="utf-8", newline="") as file:
        pairs = list(csv.DictReader(file))
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, pairs[0])
        writer.writeheader()
        for pair in pairs:
            writer.writerow({side: (fixed if "fixed" in side else moving) / path for side, path in pair.items()})


def pair_by_pair(rendered: Path, found: dict[str, Path]) -> str:
    """Dice of each pair by the look of its moving image, beside how well that image tells white matter from cortex."""
    tissues = json.loads((rendered / "tissues.json").read_text("utf-8"))
    dice: dict[tuple[str, str], dict[str, list[str]]] = {}
    for look, folder in found.items():
        with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row["bundle"] not in PAPERS:
                    continue
                fixed, moving = (Path(row[side]).name.split(".")[0] for side in ("fixed", "moving"))
                people = fixed.removesuffix("_t1"), moving.removesuffix(f"_{look}")
                dice.setdefault(people, {}).setdefault(look, []).append(f"{float(row['dice_mean']):.3f}")
    heads = (
        "fixed",
        "moving",
        *(f"{look}: tissues apart, sd; Dice of {having('brain_any').replace(',', ', ')}" for look in found),
    )
    rows = [
        (*people, *(f"{tissues[f'{people[1]}_{look}']:.2f}; {', '.join(looks[look])}" for look in found))
        for people, looks in dice.items()
    ]
    return markdown(heads, rows)


def real(scans: Path, scratch: Path, *, peers: bool) -> None:
    """Two real T1 brains without labels, both ways: how alike they become, and how smoothly."""
    one, other = (scans / f"{name}.nii.gz" for name in ("t1_brain_a", "t1_brain_b"))
    pairs = scratch / "real.csv"
    pairs.write_text(f"fixed,moving\n{one},{other}\n{other},{one}\n", "utf-8")
    options = ("--pairs", pairs, "--bundle", having("brain"), "--weights", "brain", "--plots", "false")
    found = evaluate(scratch / "real", *options, peers=peers)
    write("brain-real", "\n".join([(found / "table.md").read_text("utf-8").strip(), "", machine(summary(found))]))


def having(weights: str) -> str:
    """The bundles that have weights of a name."""
    return ",".join(bundle.name for bundle in bundles() if weights in bundle.weights)


def cyclic(data: Path, split: str, scratch: Path) -> Path:
    """The table of pairs of a split."""
    pairs = scratch / f"{split}.csv"
    run("benchmarks/pair_table.py", "--dataset-dir", data, "--split", split, "--output", pairs)
    return pairs


def run(*command: Any) -> None:
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def evaluate(folder: Path, *options: Any, peers: bool = False) -> Path:
    """Run ``iregzoo evaluate``; gives the folder of its results."""
    run("-m", "iregzoo", "evaluate", "--output", folder, *options, *(("--peers", PEERS) if peers else ()))
    return folder


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text("utf-8"))
    return found


def table(folder: Path) -> str:
    """What the run says in Markdown, the worst cases and the machine."""
    found = summary(folder)
    worst = [f"{each['bundle']} {each['worst']['dice_mean']:.3f}" for each in found["results"] if "worst" in each]
    before = found["results"][0]["dice_before"]["mean"]
    cases = f"Dice before registration, where the headers put the scans: {before:.3f}. Worst pair of each, Dice: "
    text = (folder / "table.md").read_text(encoding="utf-8").strip()
    return "\n".join([text, "", f"{cases}{', '.join(worst)}.", "", machine(found)])


PAPERS = {
    "iirp": "IIRP-Net, CVPR 2024",
    "ipear": "iPEAR, 2025",
    "pan": "PAN, ISBI 2024",
    "sm_gicnet": "SM-GICNet, MIDL 2025",
    "ad_regnet": "AD-RegNet, 2026",
}
FIGURES = {
    "dice_mean": ("Dice, mean ± sd", 3),
    "hd95_mm": ("HD95 mm", 2),
    "assd_mm": ("ASSD mm", 2),
    "folding_percent": ("folding %", 3),
    "near_singular_percent": ("det J ≤ 0.1, %", 2),
    "sdlogj": ("sd log J", 3),
    "ncc_after": ("NCC after", 3),
    "seconds": ("s a pair", 2),
}


def overview(results: list[dict[str, Any]]) -> str:
    """The table of all bundles."""
    rows = [
        (
            f"[`{each['bundle']}`](bundles/{each['bundle']}/docs/README.md)",
            PAPERS[each["bundle"]],
            f"{each['dice_mean']['mean']:.3f}",
            f"{each['folding_percent']['mean']:.2f} %",
            f"{each['seconds']['mean']:.2f}",
        )
        for each in sorted(results, key=lambda each: list(PAPERS).index(each["bundle"]))
    ]
    return markdown(("bundle", "paper", "test Dice", "folding", "s a pair"), rows)


def card_table(result: dict[str, Any], found: dict[str, Any]) -> str:
    """How one bundle did, and its worst pair."""
    cells = [f"{result[name]['mean']:.{digits}f}" for name, (_, digits) in FIGURES.items()]
    cells[0] += f" ± {result['dice_mean']['sd']:.3f}"
    heads = [head for head, _ in FIGURES.values()]
    worst = result["worst"]
    moving, fixed = (Path(worst[side]).name.removesuffix(".nii.gz") for side in ("moving", "fixed"))
    iterations = ", ".join(f"{count:.1f}" for count in result["iterations"])
    steering = f" Iterations a level: {iterations}." if iterations else ""
    return "\n".join(
        [
            markdown(heads, [cells]),
            "",
            f"{machine(found)}{steering} Worst pair: {moving} to {fixed}, Dice {worst['dice_mean']:.3f}.",
        ]
    )


def machine(found: dict[str, Any]) -> str:
    """What it was measured on, and on how many pairs."""
    return f"{counted(found['results'][0]['pairs'], 'pair')}; {machine_line(found['machine'])}."


def picture(folder: Path, name: str) -> None:
    """Keep the box plots, and accuracy against time."""
    PICTURES.mkdir(exist_ok=True)
    for kind in ("dice", "time", "cases"):
        if (folder / f"{kind}.png").is_file():
            shutil.copy(folder / f"{kind}.png", PICTURES / f"{name}_{kind}.png")


def write(part: str, text: str, path: Path = PAGE) -> None:
    """Replace what stands between the markers of a part of a page."""
    replace_part(path, part, Path(__file__).name, text)


if __name__ == "__main__":
    fire.Fire(main)
