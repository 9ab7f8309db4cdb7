"""Unpacking an archive that may come from anybody: nothing but the files of a bundle, in the one folder of its name."""

import os
import shutil
import stat
from pathlib import Path
from zipfile import BadZipFile, ZipFile, ZipInfo
from zlib import error as ZlibError

from iregzoo.errors import InputError
from iregzoo.manifest import BELONGS, KINDS

GROWTH = 10  # times its own size that an archive may unpack to; weights hardly shrink


def unpack(archive: Path, name: str, folder: Path) -> None:
    """Unpack the archive of the bundle ``name`` into a folder, which becomes the bundle's.

    Nothing is written before every entry has been looked at.

    Raises:
        InputError: for what is no ZIP file, an entry that has no place in a bundle (code, a link, a path that leads
            elsewhere), entries of the same name, and more than ``GROWTH`` times the archive's size.
        OSError: where the files cannot be written.
    """
    try:
        with ZipFile(archive) as content:
            for path, entry in _entries(content, name, archive.stat().st_size).items():
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with content.open(entry) as packed, target.open("wb") as stream:
                    shutil.copyfileobj(packed, stream)  # no more than the entry's size: ZipFile stops there
                    stream.flush()
                    os.fsync(stream.fileno())  # a power cut must not leave an empty file under the bundle's name
    except InputError:
        raise
    # A damaged archive raises many kinds; an encrypted one RuntimeError.
    except (BadZipFile, ZlibError, EOFError, RuntimeError, ValueError, LookupError) as error:
        raise InputError(f"{name}: its archive is not an intact ZIP file ({error})") from None


def _entries(content: ZipFile, name: str, size: int) -> dict[str, ZipInfo]:
    """The entries by their names within the bundle's folder, every one looked at."""
    found: dict[str, ZipInfo] = {}
    for entry in content.infolist():
        top, _, path = entry.filename.partition("/")
        if top != name or not BELONGS.fullmatch(path):
            raise _refused(name, f"holds {entry.filename!r}, which does not belong in a bundle ({name}/ with {KINDS})")
        if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
            raise _refused(name, f"holds {entry.filename!r}, which is a link or not a regular file")
        if path.lower() in (other.lower() for other in found):
            raise _refused(name, f"holds {entry.filename!r} twice")
        found[path] = entry
    unpacked = sum(entry.file_size for entry in found.values())
    if unpacked > GROWTH * size:
        raise _refused(name, f"would unpack to {unpacked:,} bytes, more than {GROWTH} times its {size:,}")
    return found


def _refused(name: str, reason: str) -> InputError:
    return InputError(f"{name}: its archive {reason}; do not trust this source")
