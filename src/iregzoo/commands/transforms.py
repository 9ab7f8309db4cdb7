"""``iregzoo apply``: a transform that exists, on other images and on points."""

import os
from pathlib import Path

from iregzoo.errors import InputError


def apply(
    transform: str,
    input: str,
    output: str,
    reference: str | None = None,
    interpolation: str = "auto",
    inverse: bool = False,
    overwrite: bool = False,
    outside: float | None = None,
) -> None:
    """Apply a transform, or its inverse, to an image, a series of images, a label map or points.

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

    A 4-D series is resampled volume by volume and stays 4-D, with the spacing of its 4th axis (in seconds where it is
    time); an image with several values per voxel, value by value. Directions in them (vectors, tensors, a DWI's
    gradients) are not turned. The result has the input's data type: whole numbers are rounded. Outside the input's
    field of view is 0, or its lowest value if that is below 0 (air in CT), and 0 for several values per voxel, unless
    --outside says otherwise.

    Args:
        transform: one or more, separated by commas; transform files that ITK can read (.h5, .tfm, .mat), or
            displacement fields, which are 3-D images of vectors in LPS mm. To invert one of them alone, put it in ANTs'
            brackets, as in A,[B,1], or put inverse and a colon before it.
        input: an image, a 4-D series or a label map, or points, in a CSV file with the first line "# CoordinateSystem =
            LPS" (or RAS) and the columns x, y, z, or in a Slicer .mrk.json file. Everything else in a file of points is
            kept.
        output: the file to write; .nii.gz, .nii, .nrrd or .mha for images, and for points the format of the input.
        reference: the 3-D image whose grid the result has; not needed for points.
        interpolation: for images; linear; nearest; cubic, a cubic B-spline, which is sharper, but can overshoot the
            input's values beside edges (nothing is clipped, except whole numbers at the limits of their data type);
            smooth-labels, for label maps, which interpolates each label linearly and takes the one with the largest
            share, the lowest of several; or auto, which is nearest if the input looks like a label map, otherwise
            linear.
        inverse: apply the inverse.
        overwrite: replace the output if it already exists.
        outside: for images; the value outside the input's field of view, which the input's data type must hold, such as
            -1024. Label maps always have 0 there.
    """
    from iregzoo.apply import apply_to_image, apply_to_points, check_names, is_points
    from iregzoo.outputs import whole_file
    from iregzoo.space.transforms import link_of, links_of, read_chain

    links = links_of(transform)
    if not links:
        raise InputError("--transform is empty; give one file, or several separated by commas")
    check_names(input, reference, output, interpolation, outside)
    for path in filter(None, (*(link_of(link)[0] for link in links), input, reference)):
        if os.path.realpath(path) == os.path.realpath(output):
            raise InputError(f"{path}: would be overwritten by the result; choose another --output")
    with whole_file(Path(output), overwrite=overwrite) as target:
        chain = read_chain(links)
        if inverse:
            chain = chain.inverse()
        if is_points(input):
            report = apply_to_points(chain, input, target)
        else:
            assert reference is not None  # check_names saw to it
            report = apply_to_image(chain, input, reference, target, interpolation=interpolation, outside=outside)
    for line in filter(None, (report.interpolation, report.inverse)):
        print(line)
    for doubt in report.warnings:
        print(f"warning: {doubt}")
    print(f"written to {output}")
