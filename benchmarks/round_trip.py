"""Check a result of ``iregzoo register`` with SimpleITK alone: do its transforms warp the moving scan to what it holds?

    python benchmarks/round_trip.py --fixed F --moving M --result DIR

Prints the largest difference between warped.nii.gz and the moving scan resampled through transform.h5, and through
displacement.nii.gz, as a part of the warped image's range of intensities.
"""

import argparse
from pathlib import Path

import numpy as np
import SimpleITK as sitk


def differences(fixed: str | Path, moving: str | Path, result: str | Path) -> dict[str, float]:
    """The largest difference through each of the two files, as a part of the range."""
    grid = sitk.ReadImage(str(fixed))
    scan = sitk.ReadImage(str(moving), sitk.sitkFloat64)
    warped = sitk.GetArrayFromImage(sitk.ReadImage(str(Path(result, "warped.nii.gz"))))
    displacement = sitk.ReadImage(str(Path(result, "displacement.nii.gz")), sitk.sitkVectorFloat64)
    transforms = {
        "transform.h5": sitk.ReadTransform(str(Path(result, "transform.h5"))),
        "displacement.nii.gz": sitk.DisplacementFieldTransform(displacement),
    }
    found = {}
    for name, transform in transforms.items():
        resampled = sitk.GetArrayFromImage(sitk.Resample(scan, grid, transform, sitk.sitkLinear, 0.0))
        found[name] = float(np.abs(resampled - warped).max()) / float(np.ptp(warped))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("fixed", "moving", "result"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    arguments = parser.parse_args()
    for name, largest in differences(arguments.fixed, arguments.moving, arguments.result).items():
        print(f"{name}: largest difference {largest:.1e} of the range")


if __name__ == "__main__":
    main()
