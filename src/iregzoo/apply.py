"""Transforms at work: an image or a series of them, a label map or a list of points through one, or back."""

import os
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch

from iregzoo.errors import InputError
from iregzoo.flags import check_number
from iregzoo.space.files import write_volume
from iregzoo.space.grid import Grid
from iregzoo.space.headers import check_finite, header_doubt
from iregzoo.space.points import read_point_list, voxel_places
from iregzoo.space.scan import Scan, as_float32, looks_like_labels
from iregzoo.space.series import Series, read_series
from iregzoo.space.shares import resample_labels
from iregzoo.space.transforms import Chain, Moved, move
from iregzoo.space.volume import read_volume

IMAGES = (".nii.gz", ".nii", ".nrrd", ".mha")
POINTS = (".csv", ".json")
ITK = {"linear": sitk.sitkLinear, "nearest": sitk.sitkNearestNeighbor, "cubic": sitk.sitkBSpline}
SMOOTH = "smooth-labels"
INTERPOLATIONS = ("auto", *ITK, SMOOTH)
TURNING = (3, 6)  # components of vectors and of symmetric tensors
MUCH_MM = 0.5  # of an inverse's error
FEWEST = 3  # voxels along an axis: with two, ITK's cubic interpolation reads beyond the image
GB = 2**30


@dataclass(frozen=True)
class Report:
    """How applying a transform went, in words.

    Attributes:
        interpolation: of an image, where it was not given, and why, in a line.
        inverse: what an inverse leaves to be desired, in a line; empty where there is nothing to say.
        warnings: what should make a person doubt.
    """

    interpolation: str = ""
    inverse: str = ""
    warnings: tuple[str, ...] = ()


def is_points(path: str | Path) -> bool:
    """Whether a file's name is that of points."""
    return str(path).lower().endswith(POINTS)


def check_names(
    source: str | Path,
    reference: str | Path | None,
    output: str | Path,
    interpolation: str,
    outside: float | None = None,
) -> None:
    """Refuse, before any work, what the names and settings alone show to be wrong.

    Raises:
        InputError: for an output that is not of the input's kind, an image without a reference, another interpolation,
            what is no number for ``outside``, and either of them for points.
    """
    if outside is not None:
        check_number(outside, "outside")
    if interpolation not in INTERPOLATIONS:
        raise InputError(f"interpolation {interpolation!r} is unknown; choose {', '.join(INTERPOLATIONS)}")
    if str(source).lower().endswith(".fcsv"):
        raise InputError(f"{source}: iregzoo does not read .fcsv; save the points as .mrk.json in 3D Slicer")
    endings: tuple[str, ...] = IMAGES
    if is_points(source):
        if interpolation != "auto":
            raise InputError(f"{source}: points are not interpolated; leave out --interpolation {interpolation}")
        if outside is not None:
            raise InputError(f"{source}: points have no value outside an image; leave out --outside {outside}")
        endings = (next(ending for ending in POINTS if str(source).lower().endswith(ending)),)
    elif reference is None:
        raise InputError(f"{source}: an image needs --reference, an image whose grid the result should have")
    if not str(output).lower().endswith(endings):
        raise InputError(f"{output}: choose a name that ends with {' or '.join(endings)}, to match the input")


def apply_to_points(chain: Chain, source: str | Path, output: Path) -> Report:
    """Take the points of a file through a chain, and write a file of the same kind.

    Raises:
        InputError: as ``read_point_list`` does.
    """
    given = read_point_list(source)
    moved = move(chain, given.points)
    output.write_text(given.text(moved.points), "utf-8")
    report = _inverse_report(moved, "points") if chain.undoes else Report()
    outside, doubts = int(moved.outside.sum()), []
    if outside:
        where = f"points {'come from' if chain.undoes else 'lie'} outside the displacement field's grid"
        doubts.append(f"{outside} of {len(moved.points)} {where}, where the displacement is zero")
    if given.unplaced:
        doubts.append(f"{given.unplaced} points without a position stay without")
    return replace(report, warnings=(*report.warnings, *doubts))


def apply_to_image(
    chain: Chain,
    source: str | Path,
    reference: str | Path,
    output: Path,
    *,
    interpolation: str = "auto",
    outside: float | None = None,
) -> Report:
    """Resample an image or label map through a chain, on a reference's grid, once, and write it.

    Its type of voxel stays. Outside its field of view lies 0, or its lowest value where that is below 0, unless
    another value is given. Each volume of a 4-D series becomes what it would alone, and so do several numbers a voxel,
    but with 0 outside.

    Args:
        chain: from the reference to the image.
        source: the image; a folder with one DICOM series will do.
        reference: an image, of which the grid counts.
        output: the file to write.
        interpolation: ``linear``, ``nearest``, ``cubic``, ``smooth-labels``, or ``auto``, which takes nearest for what
            looks like a label map, and else linear.
        outside: what lies outside the image's field of view, and not for a label map; chosen as said if None.

    Raises:
        InputError: as ``read_series`` and ``read_volume`` do, for smooth labels of what is no label map, an ``outside``
            of a label map or that the image's type of voxel cannot hold, cubic interpolation along an axis of two
            voxels, and what would not fit into memory.
    """
    series, (image, path) = read_series(source), read_volume(reference)
    grid = Grid.of(image)
    warped, report = _warped(chain, series, grid, interpolation, outside)
    write_volume(output, warped)
    doubts = filter(None, (header_doubt(series.grid, series.path), header_doubt(grid, path)))
    return replace(report, warnings=(*report.warnings, *doubts))


def _warped(
    chain: Chain, series: Series, grid: Grid, interpolation: str, outside: float | None
) -> tuple[sitk.Image, Report]:
    """All volumes on a grid as one image of their kind, and how it went."""
    if interpolation == "cubic" and min(series.grid.shape) < FEWEST:
        raise InputError(
            f"{series.path}: has an axis of {min(series.grid.shape)} voxels, too few for cubic interpolation; choose "
            "linear"
        )
    _check_memory(series, grid)
    beyond, labels = _look(series, whether=interpolation in ("auto", "nearest", SMOOTH))
    mode, line = _mode(series.path, interpolation, labels)
    if outside is not None:
        _check_outside(outside, series, labels=bool(labels) or mode == SMOOTH)
        beyond = [float(outside)] * len(beyond)
    elif labels or mode == SMOOTH or series.components > 1:  # air of CT lies around grey values alone
        beyond = [0.0] * len(beyond)
    transform, moved = _on(chain, grid, once=len(series) > 1)
    pairs = zip(series, beyond, strict=True)
    image = series.join((_resample(volume, grid, transform, mode, value) for volume, value in pairs), grid)
    report = Report() if moved is None else _inverse_report(moved, "voxels")
    if series.components in TURNING:
        doubt = f"{series.components} values per voxel were resampled one by one; directions in them were not turned"
        report = replace(report, warnings=(*report.warnings, doubt))
    return image, replace(report, interpolation=line)


def _check_memory(series: Series, grid: Grid) -> None:
    """Refuse what would not fit the machine's memory, where that is known: the input, as it is held, and the result."""
    voxels = sitk.GetArrayViewFromImage(series.image)
    needed = voxels.nbytes + len(series) * prod(grid.shape) * voxels.itemsize
    held = memory()
    if held is not None and needed > held:
        from iregzoo.tables import counted  # with all that registers, for which a start need not wait

        volumes = counted(len(series), "volume")
        raise InputError(
            f"{series.path}: it and {volumes} on the reference's grid take {needed / GB:.1f} GB, but this machine has "
            f"{held / GB:.1f} GB of memory; give a coarser --reference, or fewer volumes at a time"
        )


def memory() -> int | None:
    """Bytes of this machine's memory; None where the system does not tell."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return found if found > 0 else None


def _scan(volume: sitk.Image, path: Path) -> Scan:
    array = sitk.GetArrayFromImage(volume).transpose(2, 1, 0)
    check_finite(array, path)
    return Scan(torch.from_numpy(as_float32(array, path))[None, None], Grid.of(volume), path)


def _look(series: Series, *, whether: bool) -> tuple[list[float], bool | None]:
    """What lies outside each volume, and ``whether`` every one that is not of one value only looks like a label map.

    The latter is None where it is not asked for, or where there is no such volume. Every voxel is looked at.
    """
    outside, labels = list[float](), None
    for volume in series:
        scan = _scan(volume, series.path)
        outside.append(scan.outside)
        if whether and labels is not False and scan.data.min() != scan.data.max():
            labels = looks_like_labels(scan)
    return outside, labels


def _mode(path: Path, interpolation: str, labels: bool | None) -> tuple[str, str]:
    """The interpolation, and where it was left open, why, in a line; ``labels`` is what ``_look`` says."""
    if interpolation == SMOOTH and labels is False:
        raise InputError(f"{path}: does not look like a label map, which {SMOOTH} is for; choose another")
    if interpolation != "auto":
        return interpolation, ""
    chosen, kind = ("nearest", "a label map") if labels else ("linear", "an image")
    return chosen, f"interpolation: {chosen}, because {path.name} looks like {kind}"


def _check_outside(outside: float, series: Series, *, labels: bool) -> None:
    """Refuse a value outside a label map, and one that the type of voxel cannot hold: ITK would take another."""
    if labels and outside:
        raise InputError(f"{series.path}: looks like a label map, which has 0 outside; leave out --outside {outside}")
    kind = sitk.GetArrayViewFromImage(series.image).dtype
    whole = kind.kind in "iu"
    limits: Any = np.iinfo(kind) if whole else np.finfo(kind)
    least, most = float(limits.min), float(limits.max)
    if not least <= outside <= most or (whole and outside != round(outside)):
        held = f"{'whole ' if whole else ''}numbers from {least:g} to {most:g}"
        raise InputError(f"outside {outside}: the voxels of {series.path.name} hold {held}; give one of these")


def _on(chain: Chain, grid: Grid, *, once: bool) -> tuple[sitk.Transform, Moved | None]:
    """A chain for the voxels of a grid, and how well it went where it undoes something.

    Where it does, or where it deforms and is to be followed only ``once`` for many volumes, as a field on the grid.
    """
    if chain.undoes:
        places = voxel_places(grid)
        moved = move(chain, places)
        vectors = (moved.points - places).reshape(*grid.shape, 3).numpy()
        return sitk.DisplacementFieldTransform(grid.to_sitk(vectors, vector=True)), moved
    if chain.linear or not once:
        return chain.composite, None
    field = sitk.TransformToDisplacementField(chain.composite, sitk.sitkVectorFloat64, *_geometry(grid))
    return sitk.DisplacementFieldTransform(field), None


def _resample(volume: sitk.Image, grid: Grid, transform: sitk.Transform, mode: str, outside: float) -> sitk.Image:
    """A volume read once on a grid, in its own type of voxel; ITK alone would cut decimals off whole numbers."""
    if mode == SMOOTH:
        return resample_labels(volume, grid, transform)
    own, whole = volume.GetPixelID(), mode != "nearest" and "float" not in volume.GetPixelIDTypeAsString()
    size, *place = _geometry(grid)
    read = sitk.Resample(volume, size, transform, ITK[mode], *place, outside, sitk.sitkFloat64 if whole else own)
    return sitk.Clamp(sitk.Round(read), own) if whole else read


def _geometry(grid: Grid) -> tuple[Any, ...]:
    """A grid's size, origin, spacing and axes, as ITK wants them."""
    direction = (grid.affine[:3, :3] / grid.spacing).ravel().tolist()
    return grid.shape, grid.affine[:3, 3].tolist(), grid.spacing.tolist(), direction


def _inverse_report(moved: Moved, what: str) -> Report:
    """How near to the given points or voxels a chain takes what its inverse found, where it could be found at all."""
    error = moved.error[~moved.outside]
    if not len(error):
        return Report()
    mean, most = float(error.mean()), float(error.max())
    left = f"{mean:.4f} mm on average, {most:.4f} mm at most"
    line = f"inverse: remaining error over the {what}: {left}"
    bad, squeezed = int((error > MUCH_MM).sum()), int((moved.doubtful & ~moved.outside).sum())
    doubts = []
    if bad:
        doubts.append(f"{bad} of {len(error)} {what} have no inverse within {MUCH_MM} mm; the transform folds there")
    if squeezed:
        doubts.append(
            f"{squeezed} of {len(error)} {what} come from places where the transform folds or nearly folds; their "
            "positions may be off by more than ten times the remaining error"
        )
    return Report(inverse=line, warnings=tuple(doubts))
