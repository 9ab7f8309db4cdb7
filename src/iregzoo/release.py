"""Releases: archives of bundles in a folder, with an index for ``download`` and another for MONAI's."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from iregzoo.checks import first_fault
from iregzoo.errors import InputError
from iregzoo.manifest import archive_bytes, file_name, read_object, write_object, write_whole
from iregzoo.zoo import Bundle, numbers

# Where the project's releases lie. MONAI looks for a bundle's versions among the files of a release of this tag.
RELEASES = "https://github.com/iregzoo/iregzoo/releases/download/hosting_storage_v1"
LARGEST = 2 << 30  # bytes of an archive, as of any file of a release on GitHub
INDEX, MODEL_INFO = "index.json", "model_info.json"


@dataclass(frozen=True)
class Archive:
    """A released version of a bundle: an entry of the index.

    Attributes:
        name: of the bundle.
        version: numbers with dots between them.
        file: the archive's name; it lies beside the index.
        sha256: of the archive, hexadecimal.
        size: of the archive, bytes.
    """

    name: str
    version: str
    file: str
    sha256: str
    size: int


def source() -> str:
    """Where releases are looked for: the variable IREGZOO_SOURCE, or the project's own."""
    return os.environ.get("IREGZOO_SOURCE") or RELEASES


def index_url(where: str) -> str:
    """The URL of the index of a source: the address or the folder of an index, or of what it lies in.

    Raises:
        InputError: for another kind of address than http, https and file.
    """
    url = where if "://" in where else Path(where).absolute().as_uri()
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InputError(f"source {where!r}: is not a valid address ({error})") from None
    if parts.scheme not in ("http", "https", "file"):
        raise InputError(f"source {where!r}: give an http or https address, or a folder")
    return url if parts.path.endswith(".json") else f"{url.rstrip('/')}/{INDEX}"


def read_index(content: Mapping[str, Any], where: str) -> list[Archive]:
    """The archives that an index lists.

    Args:
        content: the JSON object, ``{"bundles": [{"name", "version", "file", "sha256", "size"}, …]}``.
        where: it comes from, for the messages.

    Raises:
        InputError: naming the entry that is none.
    """
    entries = content.get("bundles")
    if not isinstance(entries, list):
        raise InputError(f"{where}: is not an index of bundles: it has no list 'bundles'; check the source")
    return [_entry(entry, where) for entry in entries]


def _entry(entry: Any, where: str) -> Archive:
    shown = json.dumps(entry)[:100]
    if not isinstance(entry, dict):
        raise InputError(f"{where}: the entry {shown} is not an object; check the source")
    for field in fields(Archive):
        if type(entry.get(field.name)) is not field.type:
            raise InputError(
                f"{where}: the entry {shown} has no {field.name}, or one of the wrong type; check the source"
            )
    archive = Archive(**{field.name: entry[field.name] for field in fields(Archive)})
    try:
        expected = file_name(archive.name, archive.version)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if archive.file != expected:
        raise InputError(f"{where}: the entry {shown} names a file other than {expected}; check the source")
    if not re.fullmatch("[0-9a-f]{64}", archive.sha256) or not 1 <= archive.size <= LARGEST:
        raise InputError(f"{where}: sha256 or size of {archive.file} is invalid; check the source")
    return archive


def pack(bundle: Bundle, folder: Path) -> Archive:
    """Write a bundle's archive into a folder and enter it into the index and MONAI's ``model_info.json`` there.

    Args:
        bundle: is checked first.
        folder: is made if need be; what it holds of other bundles and versions stays.

    Raises:
        InputError: for a bundle that is not whole or not as it was signed off, a name or version that cannot be
            released, a folder that cannot be written, and one that holds another archive of the same version.
    """
    file = file_name(bundle.name, bundle.version)
    if fault := first_fault(bundle):
        raise InputError(fault)
    content = archive_bytes(bundle)
    archive = Archive(bundle.name, bundle.version, file, hashlib.sha256(content).hexdigest(), len(content))
    index = folder / INDEX
    archives = read_index(read_object(index) or {"bundles": []}, str(index))
    if any(other.file == file and other.sha256 != archive.sha256 for other in archives):
        raise InputError(
            f"{folder / file}: is a different {bundle.name} {bundle.version}; raise the version in metadata.json, or "
            "choose another --output"
        )
    archives = sorted({*archives, archive}, key=lambda other: (other.name, numbers(other.version)))
    model_info = read_object(folder / MODEL_INFO) | {file.removesuffix(".zip"): _for_monai(archive, content)}
    write_whole(folder / file, content)
    write_object(folder / MODEL_INFO, dict(sorted(model_info.items())))
    write_object(index, {"bundles": [asdict(other) for other in archives]})
    return archive


def _for_monai(archive: Archive, content: bytes) -> dict[str, str]:
    """An entry of ``model_info.json``. SHA-1 is what the tools of MONAI's model zoo compare; ``download`` does not."""
    checksum = hashlib.sha1(content, usedforsecurity=False).hexdigest()
    return {"checksum": checksum, "source": urljoin(index_url(source()), archive.file)}
