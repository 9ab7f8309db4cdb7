"""Bundles from a release: found in an index, transferred, looked at, and put into the user's folder as a whole."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from filelock import FileLock, Timeout

from iregzoo import networks
from iregzoo.cards import CONTROLLERS
from iregzoo.checks import first_fault
from iregzoo.errors import InputError
from iregzoo.manifest import file_name, manifest
from iregzoo.release import Archive, index_url, read_index, source
from iregzoo.states import sha256
from iregzoo.transfer import Progress, UnreachableError, fetch, read
from iregzoo.unpack import unpack
from iregzoo.zoo import Bundle, home, numbers, read_bundle, shipped

INDEX_BYTES = 1_000_000  # the most that an index may have
OWN = {"iregzoo.registration.PairNetwork", *(f"iregzoo.networks.{name}" for name in networks.__all__)}
Say = Callable[[str], None]


def download(
    name: str,
    version: str | None = None,
    where: str | None = None,
    *,
    progress: Progress = lambda done, size: None,
    say: Say = lambda line: None,
) -> Bundle:
    """Install a bundle into the user's folder, ``zoo.home()/bundles``, unless it is there and whole.

    A transfer that breaks off goes on with the next call. Whatever happens, the folder holds a whole bundle: the former
    one until the new one has been transferred, compared with the index and with this iregzoo's manifest, unpacked and
    checked. Nothing is asked of the network where ``version`` is there already.

    Args:
        name: of the bundle.
        version: the newest of the index if None, unless it is older than the one at hand.
        where: address or folder of an index, or of what it lies in; the project's releases if None.
        progress: told the bytes that have been transferred, and those of the archive.
        say: told in words what was done.

    Raises:
        InputError: for whatever stands in the way of the above, in a line.
    """
    file_name(name, version or "0")
    present = _present(name)
    if present and present.version == version:
        say(f"{name} {version} is already installed and intact in {present.path}")
        return present
    url = index_url(where or source())
    try:
        archive = _choose(_index(url), name, version, url)
    except UnreachableError as error:
        if present is None or version is not None:
            raise
        say(
            f"{name} {present.version} is installed and intact in {present.path}; could not check for a newer version: "
            f"{error}"
        )
        return present
    if version is None:
        _refuse_older(archive, url)
    _compare(archive, url)
    if present and present.version == archive.version:
        say(
            f"{name} {present.version} is already installed and intact in {present.path}, and is the newest "
            f"version in {url}"
        )
        return present
    with _working_folder(name, say) as folder:
        present = _present(name)  # another download may have put it there
        if present and present.version == archive.version:
            say(f"{name} {present.version} was installed in {present.path} by that process")
            return present
        return _install(archive, url, folder, progress, say)


def _place(name: str) -> Path:
    return home() / "bundles" / name


def _read(path: Path) -> Bundle | None:
    try:
        return read_bundle(path)
    except InputError:
        return None


def _present(name: str) -> Bundle | None:
    """The bundle in the user's folder, if it is there and whole."""
    bundle = _read(_place(name))
    return bundle if bundle and not first_fault(bundle) else None


def _index(url: str) -> list[Archive]:
    content = read(url, INDEX_BYTES)
    try:
        index = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{url}: is not a JSON index ({error}); check the source") from None
    return read_index(index if isinstance(index, dict) else {}, url)


def _choose(archives: list[Archive], name: str, version: str | None, url: str) -> Archive:
    """The archive of a version, or the newest."""
    of_name = {archive.version: archive for archive in archives if archive.name == name}
    if not of_name:
        names = ", ".join(sorted({archive.name for archive in archives})) or "none"
        raise InputError(f"{url}: has no bundle {name!r}; it has {names}")
    versions = sorted(of_name, key=numbers)
    if version is not None and version not in of_name:
        raise InputError(f"{url}: has no version {version} of {name}; it has {', '.join(versions)}")
    return of_name[version or versions[-1]]


def _refuse_older(archive: Archive, url: str) -> None:
    """Refuse to go back behind what is at hand unless the version was named."""
    for path in (_place(archive.name), *(root / archive.name for root in shipped())):
        bundle = _read(path)
        if bundle and numbers(bundle.version) > numbers(archive.version):
            raise InputError(
                f"{url}: its newest {archive.name} is {archive.version}, older than the {bundle.version} in {path}; "
                f"add --version {archive.version} to install it anyway"
            )


def _compare(archive: Archive, url: str) -> None:
    """Refuse an index that says something else of a version than this iregzoo's manifest."""
    known = manifest().get(archive.name, {}).get(archive.version)
    if known and (known["sha256"], known["size"]) != (archive.sha256, archive.size):
        raise InputError(
            f"{url}: lists {archive.name} {archive.version} with sha256 {archive.sha256[:12]}…, but this "
            f"version of iregzoo signed off {known['sha256'][:12]}…; nothing was installed; update iregzoo, or do not "
            "trust this source"
        )


@contextmanager
def _working_folder(name: str, say: Say) -> Iterator[Path]:
    """A folder for unfinished downloads of a bundle, for one process at a time.

    It keeps a transfer that broke off. What else an earlier process was killed over is put in order: a half-unpacked
    bundle goes away, a former one comes back where the new one had not taken its place.
    """
    folder = home() / "downloads" / name
    lock = FileLock(folder / "lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held = lock.acquire(blocking=False)
        except Timeout:
            say(f"another process is downloading {name}; waiting for it to finish")
            held = lock.acquire()
        with held:
            try:
                _tidy(folder, _place(name))
                yield folder
            finally:
                _tidy(folder, _place(name))
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{home()}: cannot be written ({reason}); free up disk space, or choose another folder with IREGZOO_HOME"
        ) from None


def _tidy(folder: Path, place: Path) -> None:
    """Bring back a former bundle whose place no new one has taken, and clear away what is left over."""
    former = folder / "former"
    if former.exists() and not place.exists():
        former.rename(place)
    for leftover in (folder / "new", former):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _install(archive: Archive, url: str, folder: Path, progress: Progress, say: Say) -> Bundle:
    """Transfer an archive, look at it, and put what is in it into its place."""
    partial = folder / f"{archive.file}.partial"
    _transfer(archive, urljoin(url, archive.file), partial, progress, say)
    new, place = folder / "new" / archive.name, _place(archive.name)
    try:
        unpack(partial, archive.name, new)
        _examine(new, archive)
    except InputError as error:
        partial.unlink()
        said = str(error).replace(str(new), archive.name)
        raise InputError(f"{url}: {archive.file} was rejected, nothing was installed: {said}") from None
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        place.rename(folder / "former")
    new.rename(place)
    for leftover in folder.glob("*.partial"):
        leftover.unlink()
    known = archive.version in manifest().get(archive.name, {})
    trust = (
        "as signed off by this version of iregzoo"
        if known
        else f"unknown to this version of iregzoo, so only as trustworthy as {url}"
    )
    say(f"{archive.name} {archive.version} is installed in {place} ({archive.size:,} bytes), {trust}")
    for root in shipped():
        own = _read(root / archive.name)
        if own and numbers(own.version) > numbers(archive.version):
            say(
                f"version {own.version}, which came with iregzoo, is newer and is the one that --bundle "
                f"{archive.name} uses"
            )
    return read_bundle(place)


def _transfer(archive: Archive, url: str, partial: Path, progress: Progress, say: Say) -> None:
    """Transfer an archive and compare it with the index before anything is opened."""
    begun = partial.exists()
    if begun:
        say(f"resuming an earlier download after {partial.stat().st_size:,} bytes")
    fetch(url, partial, archive.size, progress)
    if begun and sha256(partial) != archive.sha256:  # what was there was the beginning of something else
        partial.unlink()
        fetch(url, partial, archive.size, progress)
    found = sha256(partial)
    if found != archive.sha256:
        partial.unlink()
        raise InputError(
            f"{url}: sha256 is {found[:12]}…, expected {archive.sha256[:12]}…: the download is damaged, or "
            "another file; nothing was installed; try again or use another source"
        )


def _examine(path: Path, archive: Archive) -> None:
    """Check that an unpacked bundle is what it was downloaded as, and that its network is one of iregzoo's own."""
    bundle = read_bundle(path)
    if bundle.version != archive.version:
        raise InputError(f"it claims to be version {bundle.version!r}; do not trust this source")
    try:
        definition = json.loads((path / "configs" / "inference.json").read_text(encoding="utf-8"))["network_def"]
        controllers = [card.controller for card in bundle.weights.values() if card.controller]
        foreign = sorted(_targets(definition) - OWN | set().union(*map(_targets, controllers)) - CONTROLLERS.keys())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"its inference.json defines no network ({error!r})") from None
    if foreign:  # what a definition names would be imported and called
        raise InputError(
            f"its network or controller {foreign[0]!r} is not part of this version of iregzoo; a newer "
            "version may include it"
        )
    if fault := first_fault(bundle):
        raise InputError(fault)


def _targets(definition: Mapping[str, Any]) -> set[str]:
    """Everything that a definition would have ``zoo.build`` import and call."""
    nested = [_targets(value) for value in definition.values() if isinstance(value, Mapping)]
    return {str(definition["_target_"])}.union(*nested)
