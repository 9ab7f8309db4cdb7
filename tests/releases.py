"""A release on a real HTTP server that can misbehave, bundles to put into it, and downloads from it."""

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from iregzoo.manifest import archive_bytes
from iregzoo.zoo import read_bundle
from shell import run

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"
VERSION = read_bundle(BUNDLES / "iirp").version


@dataclass
class Release:
    """What a server has, how it behaves, and what it was asked for.

    Attributes:
        files: by their names.
        requests: (name, Range header) of each.
        cut: bytes of an answer's body after which the connection is closed, for an archive.
        stall: bytes after which nothing more comes, for an archive.
        slow: seconds that each 64 KiB of an archive take.
        length: added to the Content-Length of an archive.
        ranges: whether Range is understood.
        shift: bytes by which the wrong range is given.
        flip: place of a byte that is changed on its way.
        status: of every answer about an archive, if not the ordinary one.
        times: how many requests for an archive see any of this; all if None.
        redirect: whether archives are looked for elsewhere first; stays, whatever ``behave`` mends.
        circles: whether archives are looked for where they have been looked for already.
        index_cut: how many of the next requests for anything else get half of it.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    cut: int | None = None
    stall: int | None = None
    slow: float = 0.0
    length: int = 0
    ranges: bool = True
    shift: int = 0
    flip: int | None = None
    status: int | None = None
    times: int | None = None
    redirect: bool = False
    circles: bool = False
    index_cut: int = 0
    closing: threading.Event = field(default_factory=threading.Event)

    def behave(self) -> None:
        """From now on as a server should."""
        self.cut = self.stall = self.flip = self.status = self.times = None
        self.length, self.ranges, self.slow, self.shift = 0, True, 0.0, 0

    def archives(self) -> list[str | None]:
        """The Range headers of the requests for archives."""
        return [wanted for name, wanted in self.requests if name.endswith(".zip")]

    def publish(self, name: str, version: str, content: bytes, **changes: Any) -> dict[str, Any]:
        """Add an archive and its entry in the index; the entry may be changed to lie."""
        file = f"{name}_v{version}.zip"
        digest = hashlib.sha256(content).hexdigest()
        entry = {"name": name, "version": version, "file": file, "sha256": digest, "size": len(content)}
        entry |= changes
        listed = json.loads(self.files.get("index.json", b'{"bundles": []}'))["bundles"]
        self.files |= {file: content, "index.json": json.dumps({"bundles": [*listed, entry]}).encode()}
        return entry


class _Handler(BaseHTTPRequestHandler):
    release: Release

    def do_GET(self) -> None:
        release, name = self.release, self.path.rpartition("/")[2]
        wanted = self.headers.get("Range")
        release.requests.append((name, wanted))
        elsewhere = self.path.startswith("/elsewhere/") and not release.circles
        if (release.redirect or release.circles) and name.endswith(".zip") and not elsewhere:
            self.send_response(302)
            self.send_header("Location", f"/elsewhere/{name}")
            self.end_headers()
            return
        odd = name.endswith(".zip") and (release.times is None or len(release.archives()) <= release.times)
        content = release.files.get(name)
        if content is None or (odd and release.status):
            self.send_error(release.status or 404)
            return
        begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and (release.ranges or not odd) else 0
        if begin >= len(content):
            self.send_error(416)
            return
        if odd and release.flip is not None:
            place = release.flip
            content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        if odd and begin:
            begin += release.shift
        self._answer(content, begin, bool(wanted) and (release.ranges or not odd), odd)

    def _answer(self, content: bytes, begin: int, partial: bool, odd: bool) -> None:
        release, body = self.release, content[begin:]
        self.send_response(206 if partial else 200)
        if partial:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body) + (release.length if odd else 0)))
        self.end_headers()
        if not odd and release.index_cut:
            release.index_cut -= 1
            body = body[: len(body) // 2]
        if odd and release.cut is not None:
            body = body[: release.cut]
        if odd and release.stall is not None:
            self.wfile.write(body[: release.stall])
            self.wfile.flush()
            release.closing.wait(30)
            return
        for place in range(0, len(body), 1 << 16):
            self.wfile.write(body[place : place + (1 << 16)])
            if odd and release.slow:
                self.wfile.flush()
                time.sleep(release.slow)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that goes away is what some tests are about


@contextmanager
def serve(files: Mapping[str, bytes] | None = None) -> Iterator[Release]:
    """A server of these files on this machine, while the block lasts."""
    release = Release(files=dict(files or {}))
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"release": release}))
    release.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield release
    finally:
        release.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def variant(folder: Path, version: str, name: str = "iirp") -> Path:
    """A copy of a bundle in a folder of its own, with another version."""
    copy = folder / version / name
    shutil.copytree(BUNDLES / name, copy)
    change_metadata(copy, version=version)
    return copy


def change_metadata(bundle: Path, **changes: Any) -> None:
    path = bundle / "configs" / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}))


def archive(bundle: Path) -> bytes:
    return archive_bytes(read_bundle(bundle))


def tree(folder: Path) -> dict[str, str]:
    """The hash of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Downloads:
    """``iregzoo download`` in this process, and what it left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path) -> None:
        self.monkeypatch, self.capsys, self.home = monkeypatch, capsys, home

    @property
    def place(self) -> Path:
        return self.home / "bundles" / "iirp"

    @property
    def work(self) -> Path:
        return self.home / "downloads" / "iirp"

    def works(self, *arguments: str, source: str | None = None) -> str:
        """Run it to its good end, and give back what it says."""
        code = self._run(arguments, source)
        shown = self.capsys.readouterr()
        assert code == 0, shown.err
        assert shown.err == ""
        assert not self.work.exists() or [path.name for path in self.work.iterdir()] == ["lock"]
        return shown.out

    def refused(self, *words: str, arguments: tuple[str, ...] = (), source: str | None = None) -> None:
        """It ends with 2 and a line that holds the words, and the user's bundles are as they were."""
        before = tree(self.home / "bundles")
        code = self._run(arguments, source)
        error = self.capsys.readouterr().err.strip()
        assert code == 2
        assert len(error.splitlines()) == 1, error
        assert error.startswith("iregzoo: ")
        for word in words:
            assert word in error
        assert tree(self.home / "bundles") == before
        assert not (self.work / "new").exists()
        assert not (self.work / "former").exists()

    def _run(self, arguments: tuple[str, ...], source: str | None) -> int:
        where = ["--source", source] if source else []
        return run(self.monkeypatch, "download", "iirp", *arguments, *where)

    def partial(self) -> Path:
        (found,) = self.work.glob("*.partial")
        return found
