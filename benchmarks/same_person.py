"""Measure how precisely one person's scans of two days are aligned, and write the table of docs/evaluation.md.

    python benchmarks/same_person.py --scans-dir DIR [--brain-dir DIR] [--peers ants-syn,greedy] [--write]

DIR holds real brains (T1); --brain-dir the label maps of whole heads, of which the two people of the split val are
rendered as T1 on the first day and in another contrast on the second. The second day is made here, so that it is known
where each voxel comes from: the head is turned by 5° and shifted by 5 mm, the image gets a bias field and noise of its
own, and a second time also four places that grew or shrank by up to 2.5 mm.
"""

import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import fire
import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray

from documents import machine_line, paragraphs, replace_part, table
from evaluation import PAGE, run
from iregzoo.align import align
from iregzoo.peers import Peer, find_peers, register_with
from iregzoo.register import Scans, read_scans, register, start_of
from iregzoo.space.frame import affine_displacement
from iregzoo.space.grid import Grid, Matrix, positions
from iregzoo.space.start import SEARCHED, affine_start
from iregzoo.tables import counted
from iregzoo.zoo import brain_finder, load

TURN, SHIFT = (0.06, -0.04, 0.05), (3.0, -2.0, 4.0)  # radians; LPS mm
GROWTH, WIDTH = (2.5, -2.5, 2.0, -2.0), 8.0  # mm: how far the skin of a place moved at most, and where it did
NOISE, BIAS = 0.03, 0.1  # of the brightest; of the logarithm
HEAD, CHANGED = 0.15, 0.5  # of the brightest, what is head; mm, what has changed
KINDS = ("T1", "T1, changed", "another contrast")
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """The second day as fixed scan and the first as moving.

    Attributes:
        scans: both.
        weights: of a network for them.
        true: where each voxel of the second day was on the first, less where it is: (X, Y, Z, 3), LPS mm.
        head, changed: voxels of the second day; nothing where nothing has changed.
    """

    scans: Scans
    weights: str
    true: Array
    head: NDArray[np.bool_]
    changed: NDArray[np.bool_]

    def errors(self, displacement: torch.Tensor) -> tuple[float, float]:
        """Means in mm over the head, and over what has changed."""
        error = np.linalg.norm(displacement[0].movedim(0, -1).numpy() - self.true, axis=-1)
        return float(error[self.head].mean()), float(error[self.changed].mean()) if self.changed.any() else float("nan")


def main(scans_dir: str, brain_dir: str | None = None, peers: str = "ants-syn,greedy", write: bool = False) -> None:
    """Measure all pairs, print the table, and with --write put it into the page."""
    names = [name for name in peers.split(",") if name] if isinstance(peers, str) else list(peers)
    with TemporaryDirectory() as scratch:
        pairs = {kind: list(make_pairs(kind, Path(scans_dir), brain_dir, Path(scratch))) for kind in KINDS}
        rows = list(measured({kind: found for kind, found in pairs.items() if found}, names))
    kinds = [kind for kind, found in pairs.items() if found]
    heads = ["", *(head for kind in kinds for head in columns(kind))]
    machine = {"threads": torch.get_num_threads(), "processor": platform.machine(), "torch": torch.__version__}
    numbers = ", ".join(f"{counted(len(pairs[kind]), 'pair')} of {kind}" for kind in kinds)
    text = paragraphs(table(heads, rows), f"{numbers}; {machine_line(machine)}.")
    print(text)
    if write:
        replace_part(PAGE, "same-person", Path(__file__).name, text)


def columns(kind: str) -> list[str]:
    return [f"{kind}: head, mm", "what changed, mm"] if kind == KINDS[1] else [f"{kind}, mm"]


def make_pairs(kind: str, scans: Path, brains: str | None, scratch: Path) -> Iterator[Pair]:
    if kind != KINDS[2]:
        for number, path in enumerate(sorted(scans.glob("t1_*.nii.gz"))):
            yield second_day(path, path, "brain", scratch / f"{kind}_{number}.nii.gz", number, kind == KINDS[1])
    elif brains:
        run("benchmarks/render_brains.py", "--dataset-dir", brains, "--output", scratch / "rendered")
        lines = (scratch / "rendered" / "t1.csv").read_text("utf-8").splitlines()[1:3]
        for number, name in enumerate(line.split(",")[0] for line in lines):
            first = scratch / "rendered" / name
            look = first.with_name(name.replace("_t1.", "_contrast."))
            yield second_day(first, look, "brain_any", scratch / f"contrast_{number}.nii.gz", number, False)


def second_day(first: Path, look: Path, weights: str, second: Path, seed: int, change: bool) -> Pair:
    """Make the second day of a person from how the first would look on it, on the same grid, and write it."""
    random = np.random.default_rng(seed)
    image = sitk.Cast(sitk.ReadImage(str(look)), sitk.sitkFloat32)
    grid = Grid.of(image)
    places: Array = positions(grid.affine, grid.shape, slice(None))[0].movedim(0, -1).numpy()
    array = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
    brightest = float(np.percentile(array, 99))
    grown = np.zeros(places.shape)
    if change:
        inside = places[array > 2 * HEAD * brightest]
        for centre, reach in zip(inside[random.integers(len(inside), size=len(GROWTH))], GROWTH, strict=True):
            away = (places - centre) / WIDTH
            grown += reach * away * np.exp(0.5 - (away**2).sum(-1, keepdims=True) / 2)
    moved = sitk.Euler3DTransform(grid.centre.tolist(), *TURN, SHIFT)
    turned = np.array(moved.GetMatrix()).reshape(3, 3)
    true = (places + grown - grid.centre) @ turned.T + grid.centre + SHIFT - places
    way = sitk.DisplacementFieldTransform(grid.to_sitk(true, vector=True))
    array = sitk.GetArrayFromImage(sitk.Resample(image, image, way, sitk.sitkBSpline, 0.0)).transpose(2, 1, 0)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, size) for size in grid.shape), indexing="ij")
    noise = random.normal(0, NOISE * brightest, array.shape) * (array > 0.02 * brightest)
    array = (array * np.exp(BIAS * (z + x * y)) + noise).clip(0).astype(np.float32)
    sitk.WriteImage(grid.to_sitk(array), str(second))
    head = array > HEAD * brightest
    changed = head & (np.linalg.norm(grown, axis=-1) > CHANGED)
    return Pair(read_scans(second, first), weights, true, head, changed)


def measured(pairs: dict[str, list[Pair]], peers: list[str]) -> Iterator[list[str]]:
    """A row for each way to align, of its mean errors in mm over the pairs of each kind."""
    for way in ways(peers):
        found: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for kind, pair in ((kind, pair) for kind, several in pairs.items() for pair in several):
            for name, displacement in way(pair).items():
                found.setdefault(name, {}).setdefault(kind, []).append(pair.errors(displacement))
        for name, errors in found.items():
            print(name, errors, file=sys.stderr)
            yield row(name, errors)


def row(name: str, found: dict[str, list[tuple[float, float]]]) -> list[str]:
    cells = (
        f"{fmean(error[column] for error in errors):.3f}"
        for kind, errors in found.items()
        for column in range(len(columns(kind)))
    )
    return [name, *cells]


def ways(peers: list[str]) -> Iterator[Callable[[Pair], dict[str, torch.Tensor]]]:
    """What aligns a pair: displacements (1, 3, X, Y, Z), LPS mm, by name."""
    yield lambda pair: {"not aligned": torch.zeros(1, 3, *pair.head.shape)}
    yield searched
    yield from (partial(aligned, kind) for kind in SEARCHED)
    yield from (partial(registered, bundle) for bundle in ("iirp", "ipear"))
    yield from (partial(with_peer, tool) for tool in find_peers(peers))


def searched(pair: Pair) -> dict[str, torch.Tensor]:
    search = affine_start(pair.scans.fixed, pair.scans.moving, "rigid")
    method = load("iirp", pair.weights)
    _, start = start_of(pair.scans, "rigid", method.card, method.finder)
    return {"search of the scans, rigid": linear(pair, search), "start of `register`, rigid": linear(pair, start)}


def aligned(kind: str, pair: Pair) -> dict[str, torch.Tensor]:
    return {f"`align`, {kind}": align(pair.scans, kind, finder=brain_finder()).displacement}


def registered(bundle: str, pair: Pair) -> dict[str, torch.Tensor]:
    return {f"`register`, {bundle}": register(pair.scans, load(bundle, pair.weights)).displacement}


def with_peer(tool: Peer, pair: Pair) -> dict[str, torch.Tensor]:
    """A peer's deformation, and the affine before it alone."""
    result, _ = register_with(tool, pair.scans)
    return {tool.name: result.displacement, f"{tool.name}, its affine": linear(pair, result.frame.start)}


def linear(pair: Pair, world: Matrix) -> torch.Tensor:
    return affine_displacement(world, pair.scans.fixed.grid)


if __name__ == "__main__":
    fire.Fire(main)
