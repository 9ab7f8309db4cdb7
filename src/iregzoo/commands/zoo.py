"""``iregzoo list``, ``download``, ``verify``, ``pack`` and ``import-checkpoint``: bundles and their weights."""

from iregzoo.errors import InputError


def list_bundles(json: bool = False) -> None:
    """List the available bundles with their weights.

    Args:
        json: print a JSON list instead of a table.
    """
    import json as json_module

    from iregzoo.zoo import bundles

    found = bundles()
    if json:
        entries = [
            {
                "name": bundle.name,
                "version": bundle.metadata.get("version", ""),
                "task": bundle.metadata.get("task", ""),
                "path": str(bundle.path),
                "weights": {
                    name: {
                        "init": card.init,
                        "spacing": card.spacing,
                        "description": card.description,
                        "sha256": card.sha256,
                    }
                    for name, card in bundle.weights.items()
                },
            }
            for bundle in found
        ]
        print(json_module.dumps(entries, indent=2))
        return
    for bundle in found:
        print(f"{bundle.name:12} {bundle.metadata.get('version', ''):8} {bundle.metadata.get('name', '')}")
        for name, card in bundle.weights.items():
            print(f"{'':12} --weights {name}: {card.description}; start: {card.init}")
    if not found:
        raise InputError("no bundles found; is the package installed completely?")


def download(name: str, version: str | None = None, source: str | None = None) -> None:
    """Install a bundle from a release into the user's folder, ~/.cache/iregzoo or the folder that IREGZOO_HOME names.

    A bundle that is installed and intact is not downloaded again, and an interrupted download resumes. Size and sha256
    are compared with the release's index, and with what this version of iregzoo signs off, before anything is opened. A
    bundle is installed completely or not at all.

    Args:
        name: name of the bundle.
        version: version to install, by default the newest. One older than the installed version must be named.
        source: address or folder of a release; by default IREGZOO_SOURCE or the project's own releases.
    """
    from iregzoo.commands.shared import Bytes
    from iregzoo.download import download as install

    with Bytes(name) as progress:
        install(name, version, source, progress=progress, say=print)


def verify(name: str) -> None:
    """Check an installed bundle: its weights against their cards and its network, its files against the manifest.

    Args:
        name: name of the bundle.
    """
    from iregzoo.checks import check
    from iregzoo.zoo import find

    bundle = find(name)
    found = check(bundle)
    for one in found:
        print(f"{'ok' if one.good else '--' if one.good is None else 'WRONG':6} {one.what}: {one.said}")
    wrong = sum(one.good is False for one in found)
    if wrong:
        raise InputError(
            f"{wrong} of {len(found)} checks of {name} {bundle.version} in {bundle.path} failed; "
            f"get it again with iregzoo download {name}"
        )


def pack(name: str, output: str) -> None:
    """Write a bundle's archive for a release, and add it to index.json and MONAI's model_info.json next to it.

    The same bundle gives the same bytes on any machine. Several bundles may go into one folder.

    Args:
        name: name of the bundle.
        output: folder of the release.
    """
    from pathlib import Path

    from iregzoo.release import pack as release
    from iregzoo.zoo import find

    archive = release(find(name), Path(output))
    print(f"{Path(output) / archive.file}: {archive.size:,} bytes, sha256 {archive.sha256}")


def import_checkpoint(bundle: str, checkpoint: str, output: str) -> None:
    """Convert a checkpoint of a method's published code into weights for its bundle, for --weights FILE.

    Args:
        bundle: the method.
        checkpoint: the published file.
        output: the weights file to write.
    """
    from iregzoo.zoo import import_checkpoint as convert

    convert(bundle, checkpoint, output)
    print(f"written to {output}: use it with --weights {output}")
