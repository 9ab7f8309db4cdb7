"""Folders of results, and files, that appear whole or not at all."""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from iregzoo.errors import InputError, check_name
from iregzoo.flags import flag

# What is on its way to be a result lies in hidden folders of such names, as mkdtemp makes them below.
OURS = ".iregzoo"
STAGING = re.compile(rf"\.(.+)\.[a-z0-9_]{{8}}\{OURS}")
UNFINISHED, LOCK = f".unfinished.template{OURS}", ".lock"


@contextmanager
def whole_folder(target: Path, *, overwrite: bool, owned: Collection[str], option: str = "--output") -> Iterator[Path]:
    """A place to write results to, which become ``target`` once the block ends well.

    Whatever ends the block early (an error, Ctrl-C) leaves ``target`` as it was. Other files in it are never touched.

    The place is hidden in ``target`` where that is there already, and else beside it: so the results need not cross to
    another disk, of which ``target`` may be the root, and its parent need not be writable.

    Args:
        target: the folder to fill, or a link to one; made if need be.
        overwrite: allow a folder that holds something already.
        owned: every name that such results may have, with slashes below folders; with ``overwrite``, those of an
            earlier run that this one did not write are removed, with folders that this leaves empty, then the others
            replaced in this order. The last one thus tells what the others are, also after a kill.
        option: what to choose another of, for the messages.

    Raises:
        InputError: where ``target`` is a file, cannot be written, or is not empty, also where another run has filled it
            by the end of the block.
    """
    target, overwrite = _resolved(target, option), flag(overwrite, "overwrite")
    check = partial(check_target, target, overwrite=overwrite, owned=owned, option=option)
    with _staging(target, option, check) as place, _told_of(place, target):
        place.mkdir()
        yield place
        _publish(place, target, owned, overwrite=overwrite, option=option)


@contextmanager
def kept_work(target: Path, request: str, option: str = "--output") -> Iterator[Path]:
    """A hidden folder in ``target`` for work that takes long. What an early end leaves in it is there for the next run.

    It goes once the block ends well, with what other requests left, and also where it is empty in the end.

    Args:
        target: the folder that the work is for, of one run at a time; made if need be. What killed ones left of results
            on their way goes, too.
        request: what has to be the same for another run to go on.
        option: what to choose another of, for the messages.

    Raises:
        InputError: where ``target`` cannot be written, or another run is at work there; one of the block also says
            where the work is.
        KeyboardInterrupt: as one of the block, likewise.
    """
    target = _resolved(target, option)
    with _writable(target, option):
        missing = [] if target.exists() else [target, *_missing_parents(target)]
    home = target / UNFINISHED
    place = home / hashlib.sha256(request.encode()).hexdigest()[:16]
    try:
        lock = claim(place, home / LOCK, target, "run is at work", option)
    except InputError:
        _remove(missing)
        raise
    try:
        _remove_staging(target, {target.name})
        yield place
        shutil.rmtree(home, ignore_errors=True)
    except (KeyboardInterrupt, InputError) as end:
        if _holds_files(place):
            said = "; ".join(filter(None, [str(end), f"what is done stays in {place}"]))
            raise type(end)(said) from None
        raise
    finally:
        lock.release()
        if not _holds_files(home):
            shutil.rmtree(home, ignore_errors=True)
            _remove(missing)


def claim(folder: Path, lock: Path, target: Path, other: str, option: str = "--output") -> FileLock:
    """A lock that holds a folder for one run at a time. A kill ends the claim.

    Args:
        folder: made if need be.
        lock: its file, in the folder or above it.
        target, option: what the messages name.
        other: what another one does, for the messages.

    Raises:
        InputError: where another one holds it, or the folder cannot be made.
    """
    held_by_us = FileLock(lock)
    with _writable(target, option):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held_by_us.acquire(timeout=0)
        except PermissionError:
            raise InputError(f"{lock}: permission denied; remove it, or check its permissions") from None
        except Timeout:
            raise InputError(
                f"{target}: another {other} there; wait until it ends or choose another {option}"
            ) from None
    return held_by_us


def _holds_files(place: Path) -> bool:
    return any(path.is_file() and path.name != LOCK for path in place.rglob("*"))


@contextmanager
def whole_file(target: Path, *, overwrite: bool, option: str = "--output") -> Iterator[Path]:
    """A place to write a file to, of the same name, which becomes ``target`` once the block ends well.

    Whatever ends the block early (an error, Ctrl-C) leaves ``target`` as it was.

    Args:
        target: the file; folders above it are made if need be.
        overwrite: allow a file that is there already.
        option: what to choose another of, for the messages.

    Raises:
        InputError: where ``target`` is a folder, cannot be written, or is there already.
    """
    target, overwrite = _resolved(target, option), flag(overwrite, "overwrite")
    check = partial(check_file, target, overwrite=overwrite, option=option)
    with _staging(target, option, check) as place, _told_of(place, target):
        yield place
        check()  # another run may have been sooner
        place.replace(target)


def _resolved(target: Path, option: str) -> Path:
    """Where a target is in truth, its links followed."""
    real = Path(os.path.realpath(target))
    check_name(str(real))
    if os.path.islink(real):
        raise InputError(f"{target}: is a circular link; choose another {option}")
    return real


@contextmanager
def _writable(target: Path, option: str) -> Iterator[None]:
    """Say in a line what the system has against a target: no right to it or to look into its folder, a long name."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror}); choose another {option}") from None


@contextmanager
def _staging(target: Path, option: str, check: Callable[[], None]) -> Iterator[Path]:
    """A place of the target's name in a hidden folder in or beside a target that passed its check.

    The folder goes with the block, as do parents that were made.

    These stay where the target is there in the end.
    """
    check()
    with _writable(target, option):
        missing = _missing_parents(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            home = target if target.is_dir() else target.parent
            staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=OURS, dir=home))
        except OSError:
            _remove(missing)
            raise
    try:
        yield staging / target.name
        missing = []
    except OSError as error:
        raise InputError(
            f"{target}: writing failed ({error.strerror or error}); free up disk space or choose another {option}"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _remove(missing)


@contextmanager
def _told_of(place: Path, target: Path) -> Iterator[None]:
    """Errors speak of the target that a user gave, and not of the hidden place."""
    try:
        yield
    except InputError as error:
        if str(place) in str(error):
            raise InputError(str(error).replace(str(place), str(target))) from None
        raise


def check_target(
    target: str | Path, *, overwrite: bool = False, owned: Collection[str] = (), option: str = "--output"
) -> None:
    """Refuse, before any work, a folder that ``whole_folder`` would refuse.

    Raises:
        InputError: where ``target`` is a file, is not writable, or is not empty; for an ``overwrite`` that is neither
            true nor false.
    """
    target = Path(target)
    with _writable(target, option):
        if target.exists() and not target.is_dir():
            raise InputError(f"{target}: is a file, not a folder; choose another {option}")
        if target.is_dir():
            if not os.access(target, os.W_OK | os.X_OK):
                raise InputError(f"{target}: is not writable; choose another {option}")
            if not flag(overwrite, "overwrite") and held(target):
                work = ", with which an interrupted template goes on" if (target / UNFINISHED).is_dir() else ""
                raise InputError(f"{target}: is not empty; choose another {option} or add --overwrite{work}")
        for name in owned:
            if (target / name).is_dir():
                raise InputError(
                    f"{target / name}: is a folder, but a file must go there; move it or choose another {option}"
                )
            for folder in (target / name).parents:
                if target in folder.parents and folder.exists() and not folder.is_dir():
                    raise InputError(
                        f"{folder}: is a file, but a folder must go there; move it or choose another {option}"
                    )


def check_kept(
    target: str | Path, inputs: Iterable[str | Path | None], owned: Collection[str], option: str = "--output"
) -> None:
    """Refuse results that would replace what they are made from.

    Args:
        target: the folder of the results.
        inputs: files that are read, whatever links lead there; what is None or empty is passed over.
        owned: every name that the results may have.
        option: what to choose another of, for the message.

    Raises:
        InputError: naming the first such file.
    """
    places = {os.path.realpath(Path(target) / name) for name in owned}
    for path in inputs:
        if path and os.path.realpath(path) in places:
            raise InputError(f"{path}: would be overwritten by the results; choose another {option}")


def held(folder: Path) -> set[str]:
    """The names of what a folder holds, but for results that are on their way, or were when a process was killed."""
    return {path.name for path in folder.iterdir() if not (STAGING.fullmatch(path.name) and path.is_dir())}


def check_file(target: Path, *, overwrite: bool, option: str) -> None:
    """Refuse, before any work, a file that ``whole_file`` would refuse.

    Raises:
        InputError: where ``target`` is a folder, or is there already.
    """
    with _writable(target, option):
        if target.is_dir():
            raise InputError(f"{target}: is a folder, not a file; choose another {option}")
        there = target.exists()
    if there and not overwrite:
        raise InputError(f"{target}: already exists; choose another {option} or add --overwrite")


def _missing_parents(target: Path) -> list[Path]:
    """Parents that do not exist yet, the deepest first."""
    return [folder for folder in target.parents if not folder.exists()]


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # not made yet, or somebody put something there meanwhile
            folder.rmdir()


def _publish(staging: Path, target: Path, owned: Collection[str], *, overwrite: bool, option: str) -> None:
    if target.is_dir():
        written = {path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()}
        others = [name for name in {*owned, *written} if not overwrite and (target / name).exists()]
        if others:
            raise InputError(
                f"{target}: another run has written {min(others)} there in the meantime; choose another {option} or "
                "add --overwrite"
            )
        place = {name: number for number, name in enumerate(owned)}
        alone = not held(target)
        for name in place.keys() - written:
            _withdraw(target, name)
        try:
            for name in sorted(written, key=lambda name: place.get(name, -1)):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (staging / name).replace(target / name)
        except BaseException:
            if alone:  # there was nothing, so none of it stays
                for name in written:
                    _withdraw(target, name)
            raise
        return
    staging.rename(target)


def _withdraw(target: Path, name: str) -> None:
    """Remove a file, and folders that this leaves empty."""
    (target / name).unlink(missing_ok=True)
    _remove([folder for folder in (target / name).parents if target in folder.parents])


def remove_leftovers(parent: Path, names: Collection[str]) -> None:
    """Remove what killed processes left of their work on the folders ``names`` of ``parent``.

    Only for who knows that nobody is filling one of them.
    """
    for folder in (parent, *(parent / name for name in names if (parent / name).is_dir())):
        _remove_staging(folder, names)


def _remove_staging(folder: Path, names: Collection[str]) -> None:
    found: list[Path] = []
    with suppress(OSError):  # another person's folder, of which the pair will tell
        found += folder.iterdir()
    for path in found:
        staging = None if path.name == UNFINISHED else STAGING.fullmatch(path.name)
        if staging and staging[1] in names and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
