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
) -> None:
    """Bring an image, a label map or points through a transform, or back through its inverse.

    register's transform.h5 and displacement.nii.gz lead from places in the fixed scan to places in the moving scan. So
    an image of the moving scan comes to the fixed scan's grid without --inverse, and one of the fixed scan comes to
    the moving scan's grid with it. Points go the other way: without --inverse points of the fixed scan go to the moving
    scan (ITK's TransformPoint, antsApplyTransformsToPoints), with --inverse points of the moving scan to the fixed.

    Several transforms make one way, and an image is interpolated once. They are applied as listed to a place on the
    reference, the first first: with --transform A,B a voxel at x shows the input at B(A(x)), and a point x goes to
    B(A(x)). That is the order of antsApplyTransforms. --inverse undoes the whole way, B before A.

    The inverse of a displacement is found for every voxel or point by itself; what the transform leaves between
    it and what was given is printed, and places where it folds or nearly does, which are less sure, are counted.
    Beyond its grid a displacement field displaces nothing, as in ITK.

    Args:
        transform: one or more, separated by commas: transform files that ITK reads (.h5, .tfm, .mat), and displacement
            fields, 3-D images of vectors in LPS mm. One that is to be undone has inverse before it, as in
            A,inverse:B, or stands in ANTs' brackets, [B,1].
        input: an image or label map, or points: a CSV file whose first line is "# CoordinateSystem = LPS" (or RAS) and
            that has columns x, y, z, or a Slicer .mrk.json. All else in a file of points is kept.
        output: the file to write: .nii.gz, .nii, .nrrd or .mha for images, for points what the input is.
        reference: the image on whose grid the result lies; points need none.
        interpolation: of images: linear, nearest, or auto, which takes nearest for what looks like a label map.
        inverse: apply the inverse.
        overwrite: replace the output where it is there already.
    """
    from iregzoo.apply import apply_to_image, apply_to_points, check_names, is_points
    from iregzoo.outputs import whole_file
    from iregzoo.space.transforms import link_of, links_of, read_chain

    links = links_of(transform)
    if not links:
        raise InputError("--transform names nothing; give one file, or several separated by commas")
    check_names(input, reference, output, interpolation)
    for path in filter(None, (*(link_of(link)[0] for link in links), input, reference)):
        if os.path.realpath(path) == os.path.realpath(output):
            raise InputError(f"{path}: is where the result would go; choose another --output")
    with whole_file(Path(output), overwrite=overwrite) as target:
        chain = read_chain(links)
        if inverse:
            chain = chain.inverse()
        if is_points(input):
            report = apply_to_points(chain, input, target)
        else:
            assert reference is not None  # check_names saw to it
            report = apply_to_image(chain, input, reference, target, interpolation=interpolation)
    for line in filter(None, (report.interpolation, report.inverse)):
        print(line)
    for doubt in report.warnings:
        print(f"warning: {doubt}")
    print(f"written to {output}")
