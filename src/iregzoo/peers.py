"""What people use instead: ANTs SyN, greedy and ConvexAdam, from the scans as they are in the files.

Each has an affine of its own but ConvexAdam, which has none and begins where the search for a start ends. Their fields
become the same kind of thing as a network's, so that the same code measures both. They come with the optional extra
``peers``; nothing here is imported before one of them is asked for.
"""

import io
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import SimpleITK as sitk
import torch
import torch.nn.functional as F
from torch import Tensor

from iregzoo.errors import InputError
from iregzoo.register import Result, Scans, finish
from iregzoo.registration import Registration
from iregzoo.silence import silence
from iregzoo.space.frame import Frame
from iregzoo.space.grid import RAS_FROM_LPS, Matrix, pull, to_voxels
from iregzoo.space.scan import Scan
from iregzoo.space.start import affine_start, matrix_of

Found = tuple[Matrix, Tensor, float]
# Its weighted NCC leaves out what lies beyond the moving scan, which plain NCC takes for black: on small fields of view
# that shrinks the affine. On the 20 validation pairs of the hippocampus: Dice 0.803 with WNCC, 0.755 with NCC.
GREEDY_AFFINE = "-a -ia-image-centers -m WNCC 2x2x2 -n 100x50x25"
GREEDY_DEFORMABLE = "-m WNCC 2x2x2 -n 100x50x25 -wp 0"
CONVEXADAM_CELL = 6  # voxels of the fixed scan, of which ConvexAdam's first field has one vector
SEED = "1"


@dataclass(frozen=True)
class Peer:
    """A registration tool that is no network.

    Attributes:
        name: as ``--peers`` knows it.
        module, package: what to import, and the package that has it.
        settings: what is run, in the tool's own words.
        run: a pair to the affine (4, 4), LPS mm, the deformation on the fixed grid, (1, 3, *fixed.shape), LPS mm, that
            comes before the affine, and the seconds that the tool took.
    """

    name: str
    module: str
    package: str
    settings: str
    run: Callable[[Scans], Found]


def find_peers(names: Sequence[str]) -> list[Peer]:
    """The peers of these names, each of which is installed.

    Raises:
        InputError: for another name, and for a peer whose package is not installed.
    """
    found = []
    for name in names:
        if name not in PEERS:
            raise InputError(f"peer {name!r} is unknown; choose from {', '.join(PEERS)}")
        peer = PEERS[name]
        # ANTs reads these: as many threads as the networks have, and a seed, without which no run is like another.
        os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(torch.get_num_threads())
        os.environ["ANTS_RANDOM_SEED"] = SEED
        try:
            with warnings.catch_warnings():  # ConvexAdam silences all warnings of the process that imports it
                import_module(peer.module)
        except ImportError as error:
            raise InputError(
                f'peer {name} needs the package {peer.package} ({error}); pip install "iregzoo[peers]"'
            ) from None
        found.append(peer)
    return found


def describe(peer: Peer) -> dict[str, str]:
    """What a summary says of a peer: name, package, version, settings."""
    return {"name": peer.name, "package": peer.package, "version": version(peer.package), "settings": peer.settings}


def register_with(peer: Peer, scans: Scans) -> tuple[Result, float]:
    """Register a pair with a peer, with as many threads as torch has.

    Returns:
        The result, as ``register`` gives it, and the seconds of the peer alone, without reading files or warping here.

    Raises:
        InputError: where the peer gives up.
    """
    try:
        affine, deformation, seconds = peer.run(scans)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{peer.name} failed on {scans.moving.path.name} ({reason})") from None
    frame = Frame(scans.fixed.grid, scans.moving.grid, scans.fixed.grid, affine)
    result = finish(scans, frame, f"{peer.name}'s own", Registration(frame.in_voxels(deformation)))
    return result, seconds


def _vectors(field: sitk.Image) -> Tensor:
    """A field of (X, Y, Z) voxels, LPS mm, as (1, 3, X, Y, Z) in float64."""
    return torch.from_numpy(sitk.GetArrayFromImage(field).transpose(3, 2, 1, 0).copy()).double()[None]


def _ants_syn(scans: Scans) -> Found:
    """``ants.registration(type_of_transform="SyN")``: its affine on Mattes' MI, then SyN; see ``PEERS``."""
    ants = import_module("ants")

    def image(scan: Scan) -> object:
        grid = scan.grid
        return ants.from_numpy(
            scan.data[0, 0].numpy(),
            origin=tuple(grid.affine[:3, 3].tolist()),
            spacing=tuple(grid.spacing.tolist()),
            direction=grid.affine[:3, :3] / grid.spacing,
        )

    fixed, moving = image(scans.fixed), image(scans.moving)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        ants.registration(fixed, moving, type_of_transform="SyN", outprefix=f"{folder}/")
        seconds = time.perf_counter() - begin
        affine = matrix_of(sitk.ReadTransform(str(Path(folder) / "0GenericAffine.mat")))
        return affine, _vectors(sitk.ReadImage(str(Path(folder) / "1Warp.nii.gz"))), seconds


def _greedy(scans: Scans) -> Found:
    """Greedy's affine, then its deformable registration; see ``PEERS``."""
    tool = import_module("picsl_greedy").Greedy3D()
    fixed, moving = (scan.grid.to_sitk(scan.data[0, 0].numpy()) for scan in (scans.fixed, scans.moving))
    printed = io.StringIO()
    common = f"-d 3 -V 0 -seed {SEED} -threads {torch.get_num_threads()} -i fixed moving"
    begin = time.perf_counter()
    with silence():
        given = {"fixed": fixed, "moving": moving, "affine": None}
        tool.execute(f"{common} {GREEDY_AFFINE} -o affine", **given, out=printed, err=printed)
        tool.execute(f"{common} -it affine {GREEDY_DEFORMABLE} -o warp", warp=None, out=printed, err=printed)
    seconds = time.perf_counter() - begin
    return RAS_FROM_LPS @ tool["affine"] @ RAS_FROM_LPS, _vectors(tool["warp"]), seconds


def _convexadam(scans: Scans) -> Found:
    """``convex_adam_pt`` on the fixed grid, after the affine search of ``affine_start``; see ``PEERS``.

    Both scans are continued to whole cells of its first field, by which it is scaled: of a part it would be wrong.
    """
    tool = import_module(PEERS["convexadam"].module)
    grid, (fixed, moving) = scans.fixed.grid, (scans.fixed, scans.moving)
    begin = time.perf_counter()
    affine = affine_start(fixed, moving, "affine")
    brought = pull(moving.data, to_voxels(grid, affine, moving.grid), grid.shape, outside=moving.outside)
    missing = [-size % CONVEXADAM_CELL for size in reversed(grid.shape)]
    around = [side for size in missing for side in (0, size)]
    whole = [F.pad(image, around, mode="replicate")[0, 0] for image in (fixed.data, brought)]
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch asks after defaults that ConvexAdam relies on
        field = tool.convex_adam_pt(*whole, grid_sp=CONVEXADAM_CELL, dtype=torch.float32, device=torch.device("cpu"))
    seconds = time.perf_counter() - begin
    x, y, z = grid.shape
    voxels = torch.from_numpy(field[:x, :y, :z].transpose(3, 0, 1, 2).copy()).double()[None]
    return affine, grid.in_mm(voxels), seconds


PEERS = {
    "ants-syn": Peer(
        "ants-syn",
        "ants",
        "antspyx",
        f"ants.registration, type_of_transform SyN, its defaults (Mattes, 40x20x0), seed {SEED}",
        _ants_syn,
    ),
    "greedy": Peer(
        "greedy",
        "picsl_greedy",
        "picsl_greedy",
        f"greedy {GREEDY_AFFINE}, then {GREEDY_DEFORMABLE}, seed {SEED}",
        _greedy,
    ),
    "convexadam": Peer(
        "convexadam",
        "convexAdam.convex_adam_MIND",
        "convexAdam",
        f"convex_adam_pt, its defaults (MIND-SSC, grid_sp {CONVEXADAM_CELL}), after iregzoo's affine search",
        _convexadam,
    ),
}
