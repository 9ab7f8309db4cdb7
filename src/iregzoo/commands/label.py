"""``iregzoo label-app``: the methods in MONAI Label."""

from pathlib import Path

from iregzoo.commands.shared import listed, names
from iregzoo.errors import InputError


def label_app(
    folder: str,
    atlas: str | None = None,
    atlas_labels: str | None = None,
    label_names: str | None = None,
    bundles: str | None = None,
    weights: str | None = None,
    overwrite: bool = False,
) -> None:
    """Prepare MONAI Label's stock app with these methods, and print the command that starts its server.

    The app transfers the labels of an atlas to a patient's image, in 3D Slicer, in OHIF, or through REST. The atlas is
    the hippocampus template, or your own.

    Args:
        folder: folder for the app, new or empty.
        atlas: an image, or several with the same labels, separated by commas.
        atlas_labels: the label map of each atlas, separated by commas.
        label_names: the labels' names, as JSON such as {"1": "thalamus"} or CSV with the columns label and name.
        bundles: one or more methods, separated by commas; by default all that have such weights.
        weights: a name from iregzoo list, or a weights file. By default those for brains of any contrast where the
            atlases show whole brains, and else the first of each bundle.
        overwrite: replace an app that is in the folder.
    """
    from iregzoo.flags import flag
    from iregzoo.label.app import check_is_app, prepare, start_command
    from iregzoo.label.atlas import own, packaged
    from iregzoo.outputs import check_target

    check_is_app(Path(folder))
    check_target(folder, overwrite=flag(overwrite, "overwrite"), option="folder")
    if atlas and atlas_labels and label_names:
        atlases = own(listed(atlas, "atlas"), listed(atlas_labels, "atlas-labels"), label_names)
    elif atlas or atlas_labels or label_names:
        raise InputError("an atlas of your own needs all three: --atlas, --atlas-labels and --label-names")
    else:
        atlases = [packaged()]
    methods = prepare(
        Path(folder),
        names(bundles, "bundles") if bundles else [],
        weights,
        atlases,
        overwrite=flag(overwrite, "overwrite"),
    )
    labels = {value: name for one in atlases for value, name in one.names.items()}
    former = {now: f" (was {was})" for one in atlases for now, was in one.former.items()}
    said = [f"{name} ({its})" for name, its in methods.items()]
    print(f"written to {folder}: {', '.join(said)} with the atlas {', '.join(one.name for one in atlases)}")
    said = [f"{value} {labels[value]}{former.get(value, '')}" for value in sorted(labels)]
    print(f"labels: {', '.join(said)}")
    print("start the server with this command, replacing scans with the folder of your scans (or an empty one):")
    print(start_command(Path(folder), list(methods), "scans"))
