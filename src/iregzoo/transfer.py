"""Reading over the network, where anything may stall or break off: with a time limit, again, and going on."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from iregzoo import __version__
from iregzoo.errors import InputError

TIMEOUT = 20.0  # seconds in which a server must send something
ATTEMPTS = 3
PAUSE = 1.0  # seconds before the second attempt; twice as many before each further one
BLOCK = 1 << 16
AGAIN = (408, 429)  # answers that ask to try again later, as those from 500 on do

T = TypeVar("T")
Progress = Callable[[int, int], None]


class UnreachableError(InputError):
    """No answer came, or not all of it."""


class _BrokenOffError(Exception):
    """An attempt failed in a way that the next one may not."""


def read(url: str, most: int) -> bytes:
    """A small file.

    Args:
        url: http, https or file.
        most: bytes that it may have.

    Raises:
        UnreachableError: where no answer came, or not all of it.
        InputError: where the server refuses, or sends more than ``most``.
    """

    def attempt() -> bytes:
        content = bytearray()
        with _opened(Request(url)) as response:
            while block := _block(response):
                content += block
                if len(content) > most:
                    raise InputError(f"{url}: has more than {most:,} bytes, too many for such a file; check the source")
            if getattr(response, "length", None):  # bytes that were promised and did not come
                raise _BrokenOffError("the server closed the connection early")
        return bytes(content)

    content, reason = _tried(attempt)
    if content is None:
        raise UnreachableError(f"{url}: cannot be read ({reason}); check the address and the connection")
    return content


def fetch(url: str, target: Path, size: int, progress: Progress) -> None:
    """A large file, on from what ``target`` holds of it.

    What arrives is kept whatever happens, so that the next call goes on from there. Whether it is the right file is to
    be checked when it is whole.

    Args:
        url: http, https or file.
        target: the file to write, in an existing folder.
        size: bytes that the file has.
        progress: told the bytes that are there and ``size``.

    Raises:
        InputError: where the transfer broke off too often, the server refuses or sends more than ``size`` bytes, or
            ``target`` cannot be written.
    """
    done, reason = _tried(lambda: _go_on(url, target, size, progress))
    if not done:
        there = target.stat().st_size if target.exists() else 0
        raise InputError(
            f"{url}: stopped after {there:,} of {size:,} bytes ({reason}); check the connection and run the same "
            "command again to resume"
        )


def _tried(attempt: Callable[[], T]) -> tuple[T | None, str]:
    reason = ""
    for number in range(ATTEMPTS):
        if number:
            time.sleep(PAUSE * 2 ** (number - 1))
        try:
            return attempt(), ""
        except _BrokenOffError as error:
            reason = str(error)
    return None, reason


def _go_on(url: str, target: Path, size: int, progress: Progress) -> bool:
    """Add what is missing. A server that knows no ranges, or another one than asked for, makes it begin anew."""
    with _on_disk(target):
        there = target.stat().st_size if target.exists() else 0
        if there > size:
            target.unlink()
            there = 0
    if there == size:
        return True
    with _opened(Request(url, headers={"Range": f"bytes={there}-"} if there else {}), target) as response:
        if not there or response.status != 206:
            there = 0
        elif not (response.headers.get("Content-Range") or "").startswith(f"bytes {there}-"):
            target.unlink()
            raise _BrokenOffError("the server sent a different part than requested")
        with _on_disk(target), target.open("ab" if there else "wb") as stream:
            progress(there, size)
            while block := _block(response):
                there += len(block)
                if there > size:
                    break
                stream.write(block)
                stream.flush()
                progress(there, size)
    if there > size:
        target.unlink()
        raise InputError(f"{url}: has more than the {size:,} bytes that the index states; nothing was installed")
    if there < size:
        raise _BrokenOffError("the server closed the connection early")
    return True


@contextmanager
def _opened(request: Request, partial: Path | None = None) -> Iterator[Any]:
    """The answer to a request; ``partial`` is thrown away where the server cannot go on from it."""
    request.add_header("User-Agent", f"iregzoo/{__version__}")
    try:
        response = urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        with closing(error):
            circles = "infinite loop" in str(error.reason)  # which Python tells in three lines
            answer = f"{error.code} in an endless loop" if circles else f"{error.code} {error.reason}"
            if error.code == 416 and partial is not None:
                partial.unlink(missing_ok=True)
            elif error.code not in AGAIN and error.code < 500:
                raise InputError(f"{request.full_url}: the server answered {answer}; check the source") from None
            raise _BrokenOffError(answer) from None
    except (HTTPException, OSError) as error:
        if request.type == "file":
            raise InputError(f"{request.full_url}: cannot be read ({_reason(error)}); check the source") from None
        raise _BrokenOffError(_reason(error)) from None
    except ValueError as error:  # an address that is none
        raise InputError(f"{request.full_url}: is not a valid address ({error}); check the source") from None
    with closing(response):
        yield response


def _block(response: Any) -> bytes:
    """What the server has sent, once there is something; none at the end."""
    try:
        block: bytes = response.read1(BLOCK)  # read() would lose what came before a time-out
    except (HTTPException, OSError, ValueError) as error:
        raise _BrokenOffError(_reason(error)) from None
    return block


def _reason(error: Exception) -> str:
    cause = error.reason if isinstance(error, URLError) else error
    if isinstance(cause, TimeoutError):
        return f"no data for {TIMEOUT:g} s"
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


@contextmanager
def _on_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); free up disk space, or choose another folder "
            "with IREGZOO_HOME"
        ) from None
