"""Transforms from files: what ITK reads, one after the other, and points through them, there and back.

A transform takes a point of the scan that a result lies on to the scan that it is read from, which is what ITK's
resampler wants. Places and displacements are LPS mm.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from iregzoo.errors import InputError
from iregzoo.inversion import PIECE, doubtful, invert_at
from iregzoo.silence import silence
from iregzoo.space.files import affine_transform
from iregzoo.space.grid import Grid, Matrix, inverse
from iregzoo.space.points import STEP, TOLERANCE_MM, move_points, move_points_back, reached
from iregzoo.space.start import SINGULAR, check_affine, matrix_of
from iregzoo.space.volume import check_there, itk_reason, read_volume

TEXTS = (".tfm", ".txt")
TRANSFORM_FILES = (".h5", ".hdf5", ".mat", *TEXTS)
LINK = re.compile(r"\s*\[[^\]]*\]|[^,]+")  # of a list
BRACKETS = re.compile(r"\[[^\]]*\]")
INVERSE = re.compile(r"inverse:(.+)|\[(.+?)\s*,\s*([01])\]")  # a transform that is to be undone, or not for 0


@dataclass(frozen=True)
class Undone:
    """The inverse of a transform that deforms, found for each place by itself."""

    transform: sitk.Transform


@dataclass(frozen=True)
class Chain:
    """Transforms one after the other.

    Attributes:
        parts: none of them composite, in the order in which a point passes them.
    """

    parts: tuple[sitk.Transform | Undone, ...]

    @cached_property
    def composite(self) -> sitk.CompositeTransform:
        """All parts as one ITK transform; of a chain that undoes nothing."""
        composite = sitk.CompositeTransform(3)
        for part in reversed(self.parts):  # ITK applies the transform that was added last first
            composite.AddTransform(part)
        return composite

    @property
    def undoes(self) -> bool:
        """Whether a part is the inverse of one that deforms."""
        return any(isinstance(part, Undone) for part in self.parts)

    @property
    def linear(self) -> bool:
        """Whether one matrix says it all."""
        return all(not isinstance(part, Undone) and part.IsLinear() for part in self.parts)

    def inverse(self) -> "Chain":
        """The way back: exact for matrices, and to 0.001 mm for what deforms.

        Raises:
            InputError: where a matrix is singular.
        """
        return Chain(tuple(_undo(part) for part in reversed(self.parts)))


def _undo(part: sitk.Transform | Undone) -> sitk.Transform | Undone:
    if isinstance(part, Undone):
        return part.transform
    return affine_transform(inverse_matrix(part)) if part.IsLinear() else Undone(part)


@dataclass(frozen=True)
class Moved:
    """Points (N, 3) that went through a chain, LPS mm.

    Attributes:
        points: where they are now.
        outside: (N,), which of them a displacement field did not reach: there it displaces nothing, as ITK has it.
        error: (N,) mm, how far from where they were the transforms that are undone take what was found, together.
        doubtful: (N,), which of them a transform that is undone folds or nearly folds, see ``inversion.doubtful``: they
            may be off by far more than the error.
    """

    points: Tensor
    outside: Tensor
    error: Tensor
    doubtful: Tensor


def links_of(text: str) -> list[str]:
    """The transforms between the commas of a list, in which ANTs' ``[FILE,1]`` is one.

    Raises:
        InputError: where nothing stands between two commas, or before the first or behind the last.
    """
    if os.path.exists(text) or not text.strip(" ,"):  # a path with a comma in it; nothing at all
        return [text] if text.strip(" ,") else []
    links = [link.strip() for link in LINK.findall(text)]
    if not all(links) or len(links) != BRACKETS.sub("", text).count(",") + 1:
        raise InputError(f"transforms {text!r}: one of them is empty; check the commas and what stands for each")
    return links


def link_of(text: str) -> tuple[str, bool]:
    """The path of a transform of a list, and whether it is to be undone."""
    marked = INVERSE.fullmatch(text)
    if not marked and text.startswith("[") and not os.path.exists(text):
        raise InputError(f"transform {text!r}: give [FILE,1] for the inverse, or [FILE,0]")
    return (marked[1] or marked[2], marked[3] != "0") if marked else (text, False)


def read_chain(paths: Sequence[str | Path]) -> Chain:
    """Read transforms, the first of which is applied to a point first.

    Each is a transform file that ITK reads (.h5, .tfm, .mat, …), or an image of displacements in LPS mm. One that is to
    be undone has ``inverse:`` before its path, or stands in ANTs' brackets, ``[FILE,1]``.

    Raises:
        InputError: missing or unreadable, not 3-D, or not finite; a matrix that is singular and is to be undone.
    """
    parts: list[sitk.Transform | Undone] = []
    for path in paths:
        name, undone = link_of(str(path))
        chain = Chain(tuple(_read(Path(name))))
        parts += chain.inverse().parts if undone else chain.parts
    return Chain(tuple(parts))


def read_linear(path: str | Path) -> Matrix:
    """The affine (4, 4), LPS mm, that a file says.

    Raises:
        InputError: as ``read_chain`` does, and for a transform that deforms or has no inverse.
    """
    chain = read_chain([path])
    if not chain.linear:
        raise InputError(f"{path}: holds more than a rigid or affine transform; give a file with only that")
    matrix = matrix_of(chain.composite)
    check_affine(matrix, str(path))
    return matrix


def _read(path: Path) -> list[sitk.Transform]:
    check_there(path)
    if not path.name.lower().endswith(TRANSFORM_FILES):
        image, _ = read_volume(path, components=3)
        transform = sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64))
    elif not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    else:
        try:
            with silence():
                transform = sitk.ReadTransform(str(path))
        except RuntimeError as error:
            if _is_plain_matrix(path):
                raise InputError(
                    f"{path}: is a plain matrix, as FSL and greedy write it; convert it to ITK's form, for instance "
                    "with c3d_affine_tool's -oitk"
                ) from None
            unknown = "Could not create" in str(error)  # of which ITK says much, and that the suffix were wrong
            reason = "" if unknown else f" ({itk_reason(error)})"
            raise InputError(f"{path}: is not a transform that ITK can read{reason}; export it again") from None
        if path.suffix.lower() in TEXTS:
            _check_alone(path)
    if transform.GetDimension() != 3:
        raise InputError(f"{path}: is a transform for {transform.GetDimension()}-D images; give one for 3-D images")
    parts = list(flatten(transform))
    if not parts:
        raise InputError(f"{path}: holds no transform; export it again")
    for part in parts:
        if not np.isfinite(_numbers(part)).all():
            raise InputError(f"{path}: its {part.GetName()} holds NaN or infinite values; recreate it")
    return parts


def _is_plain_matrix(path: Path) -> bool:
    """Whether a file holds the sixteen numbers of a matrix and nothing else."""
    try:
        return len([float(number) for number in path.read_text("utf-8").split()]) == 16
    except ValueError:  # also what is no text
        return False


def _check_alone(path: Path) -> None:
    """Refuse a text file with several transforms side by side, of which SimpleITK would take the first."""
    with path.open("rb") as stream:
        kinds = [line for line in stream if line.startswith(b"Transform:")]
    if len(kinds) > 1 and b"Composite" not in kinds[0]:
        raise InputError(f"{path}: holds {len(kinds)} transforms side by side; write each to its own file")


def flatten(transform: sitk.Transform) -> Iterator[sitk.Transform]:
    """The parts of a transform, none of them composite, in the order in which a point passes them."""
    transform = transform.Downcast()
    if not isinstance(transform, sitk.CompositeTransform):
        yield transform
        return
    count = transform.GetNumberOfTransforms()
    if count == 1 and transform.IsLinear() and isinstance(transform.GetNthTransform(0), sitk.CompositeTransform):
        # So SimpleITK has a matrix of a kind that it does not know, as convert3d writes it: as a composite of itself.
        yield affine_transform(matrix_of(transform))
        return
    for index in reversed(range(count)):
        yield from flatten(transform.GetNthTransform(index))


def _numbers(part: sitk.Transform) -> Matrix:
    if isinstance(part, sitk.DisplacementFieldTransform):
        return np.asarray(sitk.GetArrayViewFromImage(part.GetDisplacementField()))
    return np.array([*part.GetParameters(), *part.GetFixedParameters()])


def move(chain: Chain, points: Tensor) -> Moved:
    """Points (N, 3) through a chain, by ITK; where a part of it is undone, see ``Chain.inverse``.

    Where an undone field folds, a point comes from several places, of which one is given. A field reaches no further
    than its grid: for a point that would come from beyond, it is the point itself where that lies beyond the grid, too,
    and else where the border's displacement brings it from; its error then says how far that is off.
    """
    outside, folded = torch.zeros(2, len(points), dtype=torch.bool)
    error = torch.zeros(len(points), dtype=torch.float64)
    for part in chain.parts:
        if isinstance(part, Undone):
            places, beyond, squeezed = _back(part.transform, points)
            error += (itk_move(part.transform, places) - points).norm(dim=1)
            outside, folded, points = outside | beyond, folded | squeezed, places
            continue
        if isinstance(part, sitk.DisplacementFieldTransform):
            outside = outside | ~reached(Grid.of(part.GetDisplacementField()), points)
        points = itk_move(part, points)
    return Moved(points, outside, error, folded)


def inverse_matrix(transform: sitk.Transform) -> Matrix:
    """The affine (4, 4), LPS mm, that undoes a linear ITK transform.

    Raises:
        InputError: where it is singular.
    """
    matrix = matrix_of(transform)
    if np.linalg.cond(matrix[:3, :3]) > SINGULAR:
        shown = [[round(value, 6) for value in row] for row in matrix[:3, :3].tolist()]
        raise InputError(f"the transform's matrix {shown} is singular and has no inverse; do not invert it")
    return inverse(matrix)


def _back(transform: sitk.Transform, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where a transform that deforms takes points (N, 3) from, which are beyond its grid, and which doubtful."""
    if isinstance(transform, sitk.DisplacementFieldTransform):
        return _back_through_field(transform, points)
    # A B-spline, say: its control points lie far apart, and what it does beyond them is for ITK to know.
    through = partial(itk_move, transform)
    places = invert_at(through, points, start=points, step=STEP, tolerance=TOLERANCE_MM)
    return places, torch.zeros(len(points), dtype=torch.bool), doubtful(through, places, STEP)


def _back_through_field(field: sitk.DisplacementFieldTransform, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of a displacement field."""
    image = field.GetDisplacementField()
    grid = Grid.of(image)
    vectors = torch.from_numpy(sitk.GetArrayFromImage(image).transpose(3, 2, 1, 0).copy())[None]
    places = move_points_back(points, vectors, grid)
    beyond = ~reached(grid, places)
    squeezed = doubtful(lambda at: move_points(at, vectors, grid), places, STEP * float(grid.spacing.min()))
    return torch.where((beyond & ~reached(grid, points))[:, None], points, places), beyond, squeezed & ~beyond


def itk_move(transform: sitk.Transform, points: Tensor) -> Tensor:
    """Points (N, 3) through any ITK transform, as its TransformPoint takes each, but many in one call.

    The points are made the displacement field of a row of voxels, which the transform then follows.
    """
    return torch.cat([_itk_move(transform, part) for part in torch.split(points, PIECE)]) if len(points) else points


def _itk_move(transform: sitk.Transform, points: Tensor) -> Tensor:
    row = np.zeros((len(points), 3))
    row[:, 0] = np.arange(len(points))
    image = sitk.GetImageFromArray((points.double().numpy() - row)[None, None], isVector=True)
    both = sitk.CompositeTransform(3)
    both.AddTransform(transform)
    both.AddTransform(sitk.DisplacementFieldTransform(image))
    field = sitk.TransformToDisplacementField(both, sitk.sitkVectorFloat64, [len(points), 1, 1])
    return torch.from_numpy(row + sitk.GetArrayFromImage(field)[0, 0])
