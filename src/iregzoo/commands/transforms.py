"""``iregzoo apply``: a transform that exists, on other images and on points."""

import os
from collections.abc import Sequence
from pathlib import Path

from iregzoo.errors import InputError


def apply(
    transform: str | Sequence[str],
    input: str,
    output: str,
    reference: str | None = None,
    interpolation: str = "auto",
    inverse: bool = False,
    overwrite: bool = False,
) -> None:
    """Apply a transform, or its inverse, to an image, a label map or points.

    register's transform.h5 and displacement.nii.gz map positions in the fixed scan to positions in the moving scan. So
    an image of the moving scan is resampled to the fixed scan's grid without --inverse, and an image of the fixed scan
    to the moving scan's grid with it. Points go the other way: without --inverse, points of the fixed scan are mapped
    to the moving scan (ITK's TransformPoint, antsApplyTransformsToPoints); with --inverse, points of the moving scan
    are mapped to the fixed scan.

    Several transforms are combined into one, and an image is interpolated only once. They are applied to a position on
    the reference in the order listed: with --transform A,B a voxel at x shows the input at B(A(x)), and a point x is
    mapped to B(A(x)). That is the order of antsApplyTransforms. --inverse inverts the whole chain, B before A.

    The inverse of a displacement field is computed for each voxel or point separately. Prints the remaining error and
    counts the places where the transform folds or nearly folds; the inverse is less reliable there. Outside its grid a
    displacement field displaces nothing, as in ITK.

    Args:
        transform: one or more, separated by commas; transform files that ITK can read (.h5, .tfm, .mat), or
            displacement fields, which are 3-D images of vectors in LPS mm.
        input: an image or label map, or points, in a CSV file with the first line "# CoordinateSystem = LPS" (or RAS)
            and the columns x, y, z, or in a Slicer .mrk.json file. Everything else in a file of points is kept.
        output: the file to write; .nii.gz, .nii, .nrrd or .mha for images, and for points the format of the input.
        reference: the image whose grid the result has; not needed for points.
        interpolation: for images; linear, nearest, or auto, which uses nearest if the input looks like a label map.
        inverse: apply the inverse.
        overwrite: replace the output if it already exists.
    """
    from iregzoo.apply import apply_to_image, apply_to_points, check_names, is_points
    from iregzoo.flags import flag
    from iregzoo.outputs import whole_file
    from iregzoo.space.transforms import read_chain

    listed = transform.split(",") if isinstance(transform, str) else transform
    paths = [part.strip() for part in listed if part.strip()]
    if not paths:
        raise InputError("--transform is empty; give one file, or several separated by commas")
    back = flag(inverse, "inverse")
    check_names(input, reference, output, interpolation)
    for path in filter(None, (*paths, input, reference)):
        if os.path.realpath(path) == os.path.realpath(output):
            raise InputError(f"{path}: would be overwritten by the result; choose another --output")
    with whole_file(Path(output), overwrite=overwrite) as target:
        chain = read_chain(paths)
        if is_points(input):
            report = apply_to_points(chain, input, target, inverse=back)
        else:
            assert reference is not None  # check_names saw to it
            report = apply_to_image(chain, input, reference, target, interpolation=interpolation, inverse=back)
    if report.inverse:
        print(report.inverse)
    for doubt in report.warnings:
        print(f"warning: {doubt}")
    print(f"written to {output}")
