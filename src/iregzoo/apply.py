"""Transforms at work: an image, a label map or a list of points through one, or back."""

from dataclasses import dataclass, replace
from pathlib import Path

import SimpleITK as sitk
import torch

from iregzoo.errors import InputError
from iregzoo.space.files import write_volume
from iregzoo.space.grid import Grid
from iregzoo.space.points import read_point_list, voxel_places
from iregzoo.space.scan import Scan, as_float32, looks_like_labels
from iregzoo.space.transforms import Chain, Moved, move
from iregzoo.space.volume import check_finite, read_volume

IMAGES = (".nii.gz", ".nii", ".nrrd", ".mha")
POINTS = (".csv", ".json")
INTERPOLATIONS = ("auto", "linear", "nearest")
MUCH_MM = 0.5  # of an inverse's error


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


def check_names(source: str | Path, reference: str | Path | None, output: str | Path, interpolation: str) -> None:
    """Refuse, before any work, what the names alone show to be wrong.

    Raises:
        InputError: for an output that is not of the input's kind, an image without a reference, and another
            interpolation.
    """
    if interpolation not in INTERPOLATIONS:
        raise InputError(f"interpolation {interpolation!r} is unknown; choose {', '.join(INTERPOLATIONS)}")
    if str(source).lower().endswith(".fcsv"):
        raise InputError(f"{source}: iregzoo does not read .fcsv; save the points as .mrk.json in 3D Slicer")
    endings: tuple[str, ...] = IMAGES
    if is_points(source):
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
) -> Report:
    """Resample an image or label map through a chain, on a reference's grid, once, and write it.

    Its type of voxel stays. Outside its field of view lies 0, or its lowest value where that is below 0.

    Args:
        chain: from the reference to the image.
        source: the image; a folder with one DICOM series will do.
        reference: an image, of which the grid counts.
        output: the file to write.
        interpolation: ``linear``, ``nearest``, or ``auto``, which takes nearest for what looks like a label map.

    Raises:
        InputError: as ``read_volume`` does.
    """
    image, path = read_volume(source)
    grid = Grid.of(read_volume(reference)[0])
    array = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
    check_finite(array, path)
    scan = Scan(torch.from_numpy(as_float32(array, path))[None, None], Grid.of(image), path)
    nearest = looks_like_labels(scan) if interpolation == "auto" else interpolation == "nearest"
    transform, moved = _inverse_on(chain, grid) if chain.undoes else (chain.composite, None)
    write_volume(output, _resample(image, grid, transform, nearest=nearest, outside=0.0 if nearest else scan.outside))
    report = Report() if moved is None else _inverse_report(moved, "voxels")
    if interpolation == "auto":
        chosen, kind = ("nearest", "a label map") if nearest else ("linear", "an image")
        report = replace(report, interpolation=f"interpolation: {chosen}, because {path.name} looks like {kind}")
    return report


def _inverse_on(chain: Chain, grid: Grid) -> tuple[sitk.Transform, Moved]:
    """A chain that undoes something, at the voxels of a grid, and how well it went."""
    places = voxel_places(grid)
    moved = move(chain, places)
    vectors = (moved.points - places).reshape(*grid.shape, 3).numpy()
    return sitk.DisplacementFieldTransform(grid.to_sitk(vectors, vector=True)), moved


def _resample(image: sitk.Image, grid: Grid, transform: sitk.Transform, *, nearest: bool, outside: float) -> sitk.Image:
    """An image read once on a grid, in its own type of voxel; ITK alone would cut decimals off whole numbers."""
    own, mode = image.GetPixelID(), sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear
    whole = not nearest and "float" not in image.GetPixelIDTypeAsString()
    geometry = (
        grid.shape,
        transform,
        mode,
        grid.affine[:3, 3].tolist(),
        grid.spacing.tolist(),
        (grid.affine[:3, :3] / grid.spacing).ravel().tolist(),
    )
    read = sitk.Resample(image, *geometry, outside, sitk.sitkFloat64 if whole else own)
    return sitk.Cast(sitk.Round(read), own) if whole else read


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
