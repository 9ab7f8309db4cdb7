"""What a release of a bundle is, to the byte, and the manifest by which iregzoo signs off its own bundles."""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from iregzoo.errors import InputError
from iregzoo.outputs import whole_file
from iregzoo.states import sha256
from iregzoo.zoo import Bundle, find_weights, numbers, read_bundle, shipped

SIGN = "python -m iregzoo.manifest"
# Everything that a bundle may hold: no code, and no name that leads out of its folder.
BELONGS = re.compile(
    r"LICENSE|configs/\w[\w.-]*\.(json|conf)|models/\w[\w.-]*\.pt|docs/\w[\w.-]*\.(md|txt|png)", re.ASCII
)
KINDS = "LICENSE, configs/*.json, configs/*.conf, models/*.pt, docs/*.md, docs/*.txt and docs/*.png"
EARLIEST = (1980, 1, 1, 0, 0, 0)  # the first date that a ZIP file can tell


def file_name(name: str, version: str) -> str:
    """The name of the archive of a bundle's version, as MONAI looks for it.

    Raises:
        InputError: for a name or a version that MONAI could not read back from it.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or "_v" in name:
        raise InputError(f"bundle {name!r}: use only letters, digits and _, without a leading digit and without _v")
    if not numbers(version):
        raise InputError(f"version {version!r} of {name}: give numbers separated by dots, such as 0.2.0")
    return f"{name}_v{version}.zip"


def files(bundle: Bundle) -> dict[str, Path]:
    """The files of a bundle by their names in it, sorted. Hidden ones do not count.

    Raises:
        InputError: naming a file that has no place in a bundle.
    """
    found = {}
    for path in bundle.path.rglob("*"):
        name = path.relative_to(bundle.path).as_posix()
        if path.is_dir() or any(part.startswith(".") for part in name.split("/")):
            continue
        if not BELONGS.fullmatch(name) or path.is_symlink():
            raise InputError(f"{path}: does not belong in a bundle, which holds only {KINDS}; move it elsewhere")
        found[name] = path
    return dict(sorted(found.items()))


def archive_bytes(bundle: Bundle) -> bytes:
    """The archive of a bundle, a ZIP file with one folder of its name. The same files give the same bytes anywhere.

    Entries are sorted, their times and rights fixed, and nothing is compressed: compressed bytes differ between builds
    of zlib, and weights hardly shrink.

    Raises:
        InputError: see ``files``.
    """
    content = BytesIO()
    with ZipFile(content, "w", ZIP_STORED) as archive:
        for name, path in files(bundle).items():
            entry = ZipInfo(f"{bundle.name}/{name}", EARLIEST)
            entry.create_system = 3  # Unix, wherever this runs
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, path.read_bytes())
    return content.getvalue()


def manifest_path() -> Path:
    """The file that signs off the bundles of this iregzoo; it lies beside them."""
    return next((root for root in shipped() if root.is_dir()), shipped()[0]) / "manifest.json"


def manifest() -> dict[str, dict[str, dict[str, Any]]]:
    """What this iregzoo signs off: by bundle and version the archive's ``sha256`` and ``size``, and ``files``' hashes.

    Raises:
        InputError: where it is missing or damaged.
    """
    found = read_object(manifest_path())
    if not found:
        raise InputError(f"{manifest_path()}: is missing or empty; reinstall iregzoo")
    return found


def own_bundles() -> list[Bundle]:
    """The bundles beside the manifest, whatever the user has downloaded."""
    return [read_bundle(path.parents[1]) for path in sorted(manifest_path().parent.glob("*/configs/metadata.json"))]


def signed(bundles: Iterable[Bundle], before: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A manifest that is true of these bundles, and says what it said before of others and of other versions.

    Raises:
        InputError: where one of them cannot be released.
    """
    entries = {name: dict(versions) for name, versions in before.items()}
    for bundle in bundles:
        file_name(bundle.name, bundle.version)
        content = archive_bytes(bundle)
        entries.setdefault(bundle.name, {})[bundle.version] = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "size": len(content),
            "files": {name: sha256(path) for name, path in files(bundle).items()},
        }
    return {name: dict(sorted(entries[name].items(), key=lambda item: numbers(item[0]))) for name in sorted(entries)}


def sign() -> Path:
    """Rewrite the manifest to be true of the bundles beside it, and give back its path.

    Raises:
        InputError: where one of them cannot be released, as where a weights file is not the one of its card, or the
            manifest cannot be read or written.
    """
    path, bundles = manifest_path(), own_bundles()
    for bundle in bundles:
        for name in bundle.weights:
            find_weights(bundle, name)
    write_object(path, signed(bundles, read_object(path)))
    return path


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is no file.

    Raises:
        InputError: for a file that is no such thing.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError("not an object")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the folder") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: is not readable JSON ({error}); correct or remove it") from None
    return content


def write_object(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object into a file that appears whole or not at all.

    Raises:
        InputError: where it cannot be written.
    """
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all; its folder is made if need be.

    Raises:
        InputError: where it cannot be written.
    """
    with whole_file(path, overwrite=True, option="place") as partial:
        partial.write_bytes(content)


if __name__ == "__main__":
    try:
        print(f"signed off in {sign()}")
    except InputError as error:
        sys.exit(f"iregzoo: {error}")
