"""A folder with one DICOM series as ITK reads it, where ITK would lay it out as it is."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from iregzoo.errors import InputError, check_name

# Places rounded to 0.1 mm are up to an eighth of a slice from those of an even stack; one slice missing among any
# others puts some half a slice away.
UNEVEN = 0.2  # of the usual distance between slices: how far from there one may lie
SAME_PLACE_MM = 1e-3  # between two slices: the same one again, or another volume's
ANOTHER_ANGLE = 1e-3  # between cosines
DICOM_PLACE = "0020|0032"


def read_dicom(folder: Path) -> sitk.Image:
    """The volume of a folder's series, in its own type of voxel.

    Raises:
        InputError: for no series or several, and for one of which a slice is missing, there twice, shifted or turned.
    """
    for path in folder.iterdir():
        check_name(str(path))
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        found = "no DICOM series" if not series else f"{len(series)} DICOM series"
        raise InputError(f"{folder}: holds {found}; give a folder with exactly one")
    reader = sitk.ImageSeriesReader()
    files, kinds = _in_order(reader.GetGDCMSeriesFileNames(str(folder), series[0]), folder)
    reader.SetFileNames(files)
    if len(kinds) > 1:  # slices with a slope of their own, as of PET: ITK would cut off what the first one cannot hold
        reader.SetOutputPixelType(sitk.sitkFloat64)
    return reader.Execute()


def _in_order(files: Sequence[str], folder: Path) -> tuple[Sequence[str], set[int]]:
    """The files of a series from the first slice to the last, and the types of voxel of several.

    Raises:
        InputError: for what ITK would lay out evenly although it is not: slices without a place or at different angles,
            and one that is missing, there twice, or shifted.
    """
    if len(files) < 2:
        return files, set()
    reader, corners, turns, kinds = sitk.ImageFileReader(), [], [], set()
    for file in files:
        reader.SetFileName(file)
        reader.ReadImageInformation()
        if not reader.HasMetaDataKey(DICOM_PLACE):
            raise InputError(
                f"{folder}: {Path(file).name} does not give the position of its slice; export the series again"
            )
        corners.append(reader.GetOrigin())
        turns.append(reader.GetDirection())
        kinds.add(reader.GetPixelID())
    turned = np.abs(np.array(turns) - turns[0]).max(axis=1)
    if turned.max() > ANOTHER_ANGLE:
        names = f"{Path(files[0]).name} and {Path(files[turned.argmax()]).name}"
        raise InputError(f"{folder}: {names} have different orientations; give a folder with only one volume")
    normal = np.array(turns[0]).reshape(3, 3)[:, 2]
    order = np.argsort(np.array(corners) @ normal, kind="stable")
    places, files = np.array(corners)[order], [files[number] for number in order]
    along = places @ normal
    steps = np.diff(along)
    usual, twice = float(np.median(steps)), steps.min() < SAME_PLACE_MM
    worst = int(steps.argmin() if twice else np.abs(steps - usual).argmax())
    names = " and ".join(Path(file).name for file in files[worst : worst + 2])
    if twice:
        raise InputError(f"{folder}: {names} are slices at the same position; give a folder with only one volume")
    if np.abs(along - np.linspace(along[0], along[-1], len(along))).max() > UNEVEN * usual:
        raise InputError(
            f"{folder}: its slices are {usual:.3g} mm apart, but {names} are {steps[worst]:.3g} mm; export the "
            "complete series again as one volume"
        )
    shift = float(np.linalg.norm(places - places[0] - np.outer(along - along[0], normal), axis=1).max())
    if shift > max(reader.GetSpacing()[:2]):
        raise InputError(
            f"{folder}: its slices are shifted by {shift:.3g} mm from the first to the last (a tilted gantry); "
            "resample it to a volume without tilt"
        )
    return files, kinds
