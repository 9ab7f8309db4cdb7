"""Displacement fields in the names and folders that Learn2Reg's evaluator takes."""

from collections import Counter
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from iregzoo.cases import UNFIT, Case, stem
from iregzoo.errors import InputError
from iregzoo.register import Result
from iregzoo.space.files import write_voxel_displacement


def field_names(cases: Sequence[Case]) -> list[str]:
    """``disp_<fixed>_<moving>.nii.gz`` of each case, after its scans' file names.

    Raises:
        InputError: where two cases would have one name.
    """
    names = [f"disp_{stem(case.fixed)}_{stem(case.moving)}.nii.gz" for case in cases]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise InputError(
            f"--learn2reg: {count} pairs of the table would be written to {name}; give the scans unique names"
        )
    return names


def field_folders(methods: Sequence[str], controllers: Sequence[str], peers: Sequence[str]) -> dict[str, str]:
    """Where the fields of each method go: ``method (controller)`` or a peer to a folder.

    That is the folder itself (``.``) where only one takes part; else one for each below it, ``method`` or ``peer``, and
    ``method-controller`` where there are several controllers. What a folder's name cannot have, such as the slashes of
    ``ipear@runs/best.pt``, becomes ``_``.

    Raises:
        InputError: where two would have one folder, on a system that ignores case too.
    """
    several = len(controllers) > 1
    folders = {f"{m} ({c})": UNFIT.sub("_", f"{m}-{c}" if several else m) for m in methods for c in controllers}
    folders |= {peer: peer for peer in peers}
    first: dict[str, str] = {}
    for method, folder in folders.items():
        other = first.setdefault(folder.lower(), method)
        if other != method:
            raise InputError(
                f"--learn2reg: the fields of {other} and {method} would both go to the subfolder {folder}; rename the "
                "weights or the bundle's folder of one"
            )
    return folders if len(folders) > 1 else dict.fromkeys(folders, ".")


def field_files(
    cases: Sequence[Case], methods: Sequence[str], controllers: Sequence[str], peers: Sequence[str]
) -> list[str]:
    """Every field that may be written, relative to the folder of all."""
    folders = field_folders(methods, controllers, peers).values()
    return [(Path(folder) / name).as_posix() for folder in folders for name in field_names(cases)]


def fields_in(folder: str) -> list[str]:
    """Every field that a folder and its subfolders hold, as ``field_files`` names them, whatever run it is of."""
    return [Path(name).as_posix() for place in ("", "*/") for name in glob(f"{place}disp_*.nii.gz", root_dir=folder)]


def write_field(result: Result, path: Path) -> None:
    """Write a result's whole displacement, affine included; see ``write_voxel_displacement``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_voxel_displacement(path, result.displacement, result.frame.fixed, result.frame.moving)
