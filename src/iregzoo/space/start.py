"""Affine start: where to look in the moving image before anything deforms."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Protocol

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from iregzoo.errors import InputError
from iregzoo.process import shared
from iregzoo.space.grid import Matrix, network_grid
from iregzoo.space.scan import Scan, normalise, resample_to

SEARCHED = ("rigid", "affine")  # starts that are found in the images
STARTS = ("none", "center", *SEARCHED)
GIVEN = "given"  # the name of a start that is a matrix
SINGULAR = 1e12  # condition number of a matrix that has no inverse worth the name
COARSE_MM, FINE_MM = 5.0, 2.5
TRIED = 3  # the most places from which to search
# Parts of the fixed image's diagonal: 25 and 5 mm of a head. Nearer to each other than the first, places lead a search
# to the same end; ends nearer than the second are the same, and where a second search ends there, no third is needed.
NEAR, SAME = 0.08, 0.016
MIN_VOXELS = 16  # an axis needs so many for a mutual information that means something
MOST_VOXELS = 2.0**22  # of a thin and wide scan, whose short axis would else make the others too fine
MOST_MM3 = 2.0**31  # that a field of view measures: twice a whole person's in CT
TILT = np.deg2rad(25.0)
# Nats that an affine has to gain on a rigid motion for each unit of ``stretch``. Of two heads it was 5 to 13 nats; of a
# head and a brain without its skull 0.1 to 2, where the one was stretched to the outline of the other; and of two such
# brains 1 to 4, whose labels were no nearer for it.
IMPLAUSIBLE = 3.0


class Find(Protocol):
    """Finds where the fixed scan lies in the moving one, in place of the search; None where it cannot tell."""

    def __call__(self, fixed: Scan, moving: Scan, *, rigid: bool) -> Matrix | None: ...

    def upright(self, scan: Scan) -> Matrix:
        """A rotation (4, 4) of the world after which what a scan shows lies as the axes say."""


@dataclass(frozen=True)
class Nowhere:
    """Finds no start, so that scans are searched, but sees how they lie as another does."""

    find: Find

    def __call__(self, fixed: Scan, moving: Scan, *, rigid: bool) -> Matrix | None:
        return None

    def upright(self, scan: Scan) -> Matrix:
        return self.find.upright(scan)


def affine_start(fixed: Scan, moving: Scan, start: str | Matrix, find: Find | None = None) -> Matrix:
    """Affine (4, 4), LPS mm, from a place in the fixed image to the one in the moving image.

    ``none`` trusts the headers; ``center`` puts the middle of one field of view on the middle of the other; ``rigid``
    and ``affine`` are what ``find`` finds, or maximise Mattes' mutual information (of any two contrasts), from the best
    of several starting places and tilts, so that images that barely overlap are found, too. What an ``affine``
    stretches in that search has to be worth it (``IMPLAUSIBLE``), or else it is the rigid motion. A matrix is what is
    given back.

    Args:
        fixed, moving: the scans.
        start: a name, or a matrix.
        find: what finds ``rigid`` and ``affine`` starts for scans that it knows.

    Raises:
        InputError: for another name, a matrix that is no affine with an inverse, and a field of view of more than
            ``MOST_MM3``.
    """
    if isinstance(start, str) and start not in STARTS:
        raise InputError(f"init {start!r} is unknown; choose auto, {', '.join(STARTS)}")
    for scan in (fixed, moving):
        _check_extent(scan)
    if not isinstance(start, str):
        matrix = np.array(start, dtype=np.float64)
        check_affine(matrix, "init")
        return matrix
    if start == "none":
        return np.eye(4)
    if start == "center":
        return _shift(moving.grid.centre - fixed.grid.centre)
    if find is None:
        return _search(fixed, moving, affine=start == "affine")
    found = find(fixed, moving, rigid=start == "rigid")
    if found is not None:
        return found
    turn = alike(find, fixed, moving)
    there: Matrix = turn.T @ _search(fixed, moving.in_world(turn), affine=start == "affine")
    return there


def others(*failed: str) -> str:
    """The starts to try where those of these names failed, or will, as a message lists them."""
    return ", ".join(name for name in STARTS[1:] if name not in failed)


def alike(find: Find, fixed: Scan, moving: Scan) -> Matrix:
    """A rotation (4, 4) of the moving scan's world after which both lie alike, as they look and not as headers say."""
    turn: Matrix = find.upright(fixed).T @ find.upright(moving)
    return turn


def check_affine(matrix: Matrix, source: str) -> None:
    """Check that a matrix is an affine (4, 4) that can be undone.

    Raises:
        InputError: where it is not, naming where it is from.
    """
    affine = np.shape(matrix) == (4, 4) and np.isfinite(matrix).all() and np.array_equal(matrix[3], (0, 0, 0, 1))
    if not affine or np.linalg.cond(matrix[:3, :3]) > SINGULAR:
        shown = np.round(matrix, 6).tolist()
        raise InputError(f"{source}: the matrix {shown} is not an invertible affine (4, 4); recreate it")


def _check_extent(scan: Scan) -> None:
    """Refuse a scan of which no network's grid could be fine enough, and whose search would not end."""
    extent = np.array(scan.grid.shape) * scan.grid.spacing
    if extent.prod() > MOST_MM3:
        size, voxel = ("×".join(f"{length:.4g}" for length in lengths) for lengths in (extent, scan.grid.spacing))
        raise InputError(
            f"{scan.path}: measures {size} mm, larger than any person, with voxels of {voxel} mm; set its spacing in "
            "mm or crop it"
        )


def _shift(offset: NDArray[np.float64]) -> Matrix:
    matrix = np.eye(4)
    matrix[:3, 3] = offset
    return matrix


def _search(fixed: Scan, moving: Scan, *, affine: bool) -> Matrix:
    # All else looks at these small scans: the full ones are read once.
    fine = isotropic(normalise(fixed), FINE_MM), isotropic(normalise(moving), FINE_MM)
    coarse = isotropic(fine[0], COARSE_MM), isotropic(fine[1], COARSE_MM)
    seen = coarse[0].data[0, 0].numpy()

    def information(world: Matrix) -> float:
        return mutual_information(seen, resample_to(coarse[1], coarse[0].grid, world)[0, 0].numpy())

    ranked = sorted(candidates(*coarse), key=information, reverse=True)
    with _one_thread():
        best = max([ranked[0], *_rigid(coarse, ranked, fixed)], key=information)
        if affine:
            found = _optimise(fine, _affine(best, fixed), steps=150)
            if found is not None and information(found) > information(best) + IMPLAUSIBLE * stretch(found):
                return found
        found = _optimise(fine, _euler(best, fixed), steps=150)
    return best if found is None else max((best, found), key=information)


def stretch(world: Matrix) -> float:
    """How much an affine (4, 4) stretches or squeezes: the sum of the squared logarithms of its three factors."""
    return float((np.log(np.linalg.svd(world[:3, :3], compute_uv=False)) ** 2).sum())


def _rigid(scans: tuple[Scan, Scan], ranked: list[Matrix], fixed: Scan) -> list[Matrix]:
    """Where searches from the best places end; most begin near each other, or end in the same place."""
    grid = fixed.grid

    def among(world: Matrix, others: list[Matrix], part: float) -> bool:
        """Whether one of the others brings no corner farther away than a part of the diagonal."""
        return any(grid.farthest(world @ grid.affine, other @ grid.affine) < part * grid.diagonal for other in others)

    begun: list[Matrix] = []
    for world in ranked[:TRIED]:
        if not among(world, begun, NEAR):
            begun.append(world)

    def search(world: Matrix) -> Matrix | None:
        return _optimise(scans, _euler(world, fixed), steps=100)

    with ThreadPoolExecutor(2) as pool:  # side by side, for each is in one thread
        found = [end for end in pool.map(search, begun[:2]) if end is not None]
    if len(found) == 2 and among(found[1], found[:1], SAME):
        return found
    return found + [end for end in map(search, begun[2:]) if end is not None]


def candidates(fixed: Scan, moving: Scan) -> Iterator[Matrix]:
    """Headers, fields of view and centres of mass matched, the last also tilted about each axis."""
    yield np.eye(4)
    yield _shift(moving.grid.centre - fixed.grid.centre)
    centre, target = _centre_of_mass(fixed), _centre_of_mass(moving)
    for axis, angle in product(range(3), (-TILT, TILT)):
        angles = [0.0, 0.0, 0.0]
        angles[axis] = angle
        yield matrix_of(sitk.Euler3DTransform(centre.tolist(), *angles, (target - centre).tolist()))
    yield _shift(target - centre)


def _centre_of_mass(scan: Scan) -> NDArray[np.float64]:
    data = scan.data[0, 0].numpy().astype(np.float64)
    total = data.sum()
    index = [
        float((data.sum(tuple(a for a in range(3) if a != axis)) * np.arange(size)).sum() / total)
        for axis, size in enumerate(data.shape)
    ]
    centre: NDArray[np.float64] = scan.grid.affine[:3, :3] @ np.array(index) + scan.grid.affine[:3, 3]
    return centre


def mutual_information(first: NDArray[np.float32], second: NDArray[np.float32], bins: int = 24) -> float:
    """Mutual information in nats of two images in [0, 1] of one shape."""
    joint, _, _ = np.histogram2d(first.ravel(), second.ravel(), bins=bins, range=((0, 1), (0, 1)))
    joint /= max(joint.sum(), 1.0)  # of images without a voxel, or with none within range, it is 0
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / independent[seen])).sum())


def isotropic(scan: Scan, spacing: float) -> Scan:
    """The scan on a grid of one spacing, finer where an axis would have too few voxels and ``MOST_VOXELS`` allow it."""
    extent = np.array(scan.grid.shape) * scan.grid.spacing
    finer = min(spacing, float(extent.min()) / MIN_VOXELS)
    step = max(finer, min(spacing, float(extent.prod() / MOST_VOXELS) ** (1 / 3)))
    return on_lattice(scan, step)


def on_lattice(scan: Scan, spacing: float) -> Scan:
    """The scan on a grid of one spacing in mm, along its own axes."""
    grid = network_grid(scan.grid, (spacing,) * 3, stride=1)
    return replace(scan, data=resample_to(scan, grid), grid=grid)


def _euler(world: Matrix, fixed: Scan) -> sitk.Transform:
    transform = sitk.Euler3DTransform()
    transform.SetCenter(fixed.grid.centre.tolist())
    transform.SetMatrix(world[:3, :3].ravel().tolist(), 1e-4)
    transform.SetTranslation(_translation(world, fixed))
    return transform


def _affine(world: Matrix, fixed: Scan) -> sitk.Transform:
    transform = sitk.AffineTransform(3)
    transform.SetCenter(fixed.grid.centre.tolist())
    transform.SetMatrix(world[:3, :3].ravel().tolist())
    transform.SetTranslation(_translation(world, fixed))
    return transform


def _translation(world: Matrix, fixed: Scan) -> list[float]:
    """ITK's translation, which stands beside a rotation about the fixed image's middle."""
    centre = fixed.grid.centre
    translation: list[float] = (world[:3, :3] @ centre + world[:3, 3] - centre).tolist()
    return translation


def _optimise(scans: tuple[Scan, Scan], initial: sitk.Transform, *, steps: int) -> Matrix | None:
    """The linear transform that maximises mutual information, from an initial one that becomes it.

    None where ITK gives up, as it does where the images no longer overlap: that start leads nowhere.
    """
    fixed, moving = (scan.grid.to_sitk(scan.data[0, 0].numpy()) for scan in scans)
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricSamplingStrategy(method.REGULAR)
    voxels = int(np.prod(scans[0].grid.shape))
    method.SetMetricSamplingPercentage(min(1.0, 60_000 / voxels), 1)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=2.0, minStep=1e-3, numberOfIterations=steps, gradientMagnitudeTolerance=1e-8
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([2, 1])
    method.SetSmoothingSigmasPerLevel([1, 0])
    method.SetInitialTransform(initial, inPlace=True)
    try:
        method.Execute(fixed, moving)
    except RuntimeError:
        return None
    return matrix_of(initial)


@shared
@contextmanager
def _one_thread() -> Iterator[None]:
    """Each search of ITK's in one thread: several add up its metric in another order each time, and it goes astray.

    The number that a registration method has of its own is not heeded.
    """
    usual = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(usual)


def matrix_of(transform: sitk.Transform) -> Matrix:
    """The affine (4, 4) of a linear ITK transform."""
    origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    columns = [np.array(transform.TransformPoint(tuple(unit))) - origin for unit in np.eye(3)]
    matrix = np.eye(4)
    matrix[:3, :3] = np.stack(columns, axis=1)
    matrix[:3, 3] = origin
    return matrix
