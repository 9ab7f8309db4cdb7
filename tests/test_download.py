"""Downloads: whatever a server, a disk or a neighbour does, the user's folder holds a whole bundle or none."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import pytest
import torch

from iregzoo import cli, manifest, transfer, zoo
from iregzoo.errors import InputError
from iregzoo.release import pack
from releases import BUNDLES, Release, archive, change_metadata, serve, tree, variant

VERSION = zoo.read_bundle(BUNDLES / "iirp").version
FORMER = tree(BUNDLES / "iirp")


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user's folder of the test's own, and a transfer that soon gives up."""
    monkeypatch.setenv("IREGZOO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("IREGZOO_SOURCE", raising=False)
    monkeypatch.setattr(transfer, "TIMEOUT", 0.5)
    monkeypatch.setattr(transfer, "PAUSE", 0.01)
    return tmp_path / "home"


@pytest.fixture
def release() -> Iterator[Release]:
    """A server with the repository's own bundle."""
    with serve() as server:
        server.publish("iirp", VERSION, archive(BUNDLES / "iirp"))
        yield server


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["iregzoo", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


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


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path) -> Downloads:
    return Downloads(monkeypatch, capsys, home)


@pytest.fixture
def former(downloads: Downloads) -> dict[str, str]:
    """An older bundle, installed before."""
    with serve() as server, tempfile.TemporaryDirectory() as folder:
        server.publish("iirp", "0.0.1", archive(variant(Path(folder), "0.0.1")))
        downloads.works("--version", "0.0.1", source=server.url)
    return tree(downloads.place)


# --- what goes well


def test_bundle_is_installed_and_used(downloads: Downloads, release: Release) -> None:
    said = downloads.works(source=release.url)
    assert f"iirp {VERSION} is in {downloads.place}" in said
    assert "as signed off" in said
    assert tree(downloads.place) == tree(BUNDLES / "iirp")
    assert zoo.load("iirp").bundle.path == downloads.place
    assert release.archives() == [None]


def test_installed_bundle_needs_no_network(downloads: Downloads, release: Release) -> None:
    downloads.works(source=release.url)
    asked = len(release.requests)
    assert "already, and whole" in downloads.works("--version", VERSION, source=release.url)
    assert len(release.requests) == asked
    assert "the newest of" in downloads.works(source=release.url)
    assert [name for name, _ in release.requests[asked:]] == ["index.json"]
    nowhere = "http://127.0.0.1:9"
    assert "no newer one could be asked for" in downloads.works(source=nowhere)
    downloads.refused("does not answer", "127.0.0.1:9", arguments=("--version", "9.0.0"), source=nowhere)
    assert zoo.load("iirp").bundle.path == downloads.place


def test_source_is_an_address_an_index_a_folder_or_a_variable(
    monkeypatch: pytest.MonkeyPatch, downloads: Downloads, release: Release, tmp_path: Path, home: Path
) -> None:
    folder = tmp_path / "a release #1"
    pack(zoo.find("iirp"), folder)
    for source in (f"{release.url}/", f"{release.url}/index.json", str(folder), str(folder / "index.json")):
        assert "as signed off" in downloads.works(source=source)
        shutil.rmtree(home)
    monkeypatch.setenv("IREGZOO_SOURCE", release.url)
    assert "as signed off" in downloads.works()


def test_newest_is_chosen_by_numbers_and_replaces_an_older_one(
    downloads: Downloads, release: Release, tmp_path: Path, former: dict[str, str]
) -> None:
    for version in ("9.10.0", "9.9.0"):
        release.publish("iirp", version, archive(variant(tmp_path, version)))
    said = downloads.works(source=release.url)
    assert "iirp 9.10.0" in said
    assert f"not known to this iregzoo, so trusted as {release.url}" in said
    assert tree(downloads.place) == tree(tmp_path / "9.10.0" / "iirp")
    assert zoo.find("iirp").version == "9.10.0"


def test_older_index_needs_the_version(downloads: Downloads, release: Release, tmp_path: Path) -> None:
    release.publish("iirp", "9.0.0", archive(variant(tmp_path, "9.0.0")))
    downloads.works(source=release.url)
    with serve() as older:
        older.publish("iirp", "8.0.0", archive(variant(tmp_path, "8.0.0")))
        downloads.refused("8.0.0 as its newest, older than the 9.0.0", "--version 8.0.0", source=older.url)
        assert older.archives() == []
        assert "iirp 8.0.0 is in" in downloads.works("--version", "8.0.0", source=older.url)
    assert zoo.find("iirp").version == "8.0.0"


def test_older_than_what_came_with_iregzoo_needs_the_version(downloads: Downloads, tmp_path: Path) -> None:
    with serve() as older:
        older.publish("iirp", "0.0.1", archive(variant(tmp_path, "0.0.1")))
        downloads.refused(f"older than the {VERSION} in {BUNDLES}", "--version 0.0.1", source=older.url)
        said = downloads.works("--version", "0.0.1", source=older.url)
    assert f"the {VERSION} that came with iregzoo is newer" in said
    assert zoo.find("iirp").path == BUNDLES / "iirp"


def test_damaged_bundle_is_mended(downloads: Downloads, release: Release) -> None:
    damages = {"configs/metadata.json": b'{"weights": 3}', "models/model.pt": b"damaged", "docs/README.md": b"damaged"}
    for file, damage in (*damages.items(), ("configs/metadata.json", b"damaged")):
        downloads.works(source=release.url)
        (downloads.place / file).write_bytes(damage)
        assert "is in" in downloads.works("--version", VERSION, source=release.url)
        assert tree(downloads.place) == FORMER


def test_former_bundle_comes_back_where_the_new_one_had_not_taken_its_place(
    downloads: Downloads, release: Release, former: dict[str, str]
) -> None:
    """As after a kill between the two renames."""
    downloads.place.rename(downloads.work / "former")
    release.cut = 1000
    assert run(downloads.monkeypatch, "download", "iirp", "--source", release.url) == 2
    assert tree(downloads.place) == former


# --- transfers that break off


@pytest.mark.parametrize(
    ("fault", "reason", "kept"),
    [
        ({"cut": 100_000}, "broke off after 300,000 of", 300_000),
        ({"stall": 150_000}, "nothing came for 0.5 s", 450_000),
        ({"stall": 0}, "nothing came for 0.5 s", 0),
        ({"cut": 100_000, "length": -500_000}, "broke off", 300_000),
        ({"status": 503}, "503", None),
    ],
    ids=["cut", "stall", "silence", "cut and a lie", "busy"],
)
def test_next_run_goes_on(
    downloads: Downloads,
    release: Release,
    former: dict[str, str],
    fault: dict[str, Any],
    reason: str,
    kept: int | None,
) -> None:
    vars(release).update(fault)
    downloads.refused(reason, "goes on from there", source=release.url)
    assert tree(downloads.place) == former
    assert len(release.archives()) == transfer.ATTEMPTS
    partials = list(downloads.work.glob("*.partial"))
    assert [path.stat().st_size for path in partials] == ([] if kept is None else [kept])
    release.behave()
    release.requests.clear()
    said = downloads.works(source=release.url)
    assert release.archives() == [f"bytes={kept}-" if kept else None]
    assert ("going on" in said) == (kept is not None)
    assert tree(downloads.place) == FORMER


def test_one_run_tries_again_and_goes_on(downloads: Downloads, release: Release) -> None:
    release.cut, release.times = 100_000, 2
    downloads.works(source=release.url)
    assert release.archives() == [None, "bytes=100000-", "bytes=200000-"]
    assert tree(downloads.place) == FORMER


@pytest.mark.parametrize("added", [50_000, -50_000])
def test_length_that_is_a_lie_is_not_believed(downloads: Downloads, release: Release, added: int) -> None:
    size = len(release.files[f"iirp_v{VERSION}.zip"])
    release.length, release.times = added, 1
    downloads.works(source=release.url)
    assert release.archives() == ([None] if added > 0 else [None, f"bytes={size + added}-"])
    assert tree(downloads.place) == FORMER


def broken_off(downloads: Downloads, release: Release, after: int = 100_000) -> None:
    """A transfer that broke off, and a server that is well again."""
    downloads.monkeypatch.setattr(transfer, "ATTEMPTS", 1)
    release.cut = after
    downloads.refused("broke off", source=release.url)
    downloads.monkeypatch.setattr(transfer, "ATTEMPTS", 3)
    release.behave()
    release.requests.clear()


@pytest.mark.parametrize("fault", [{"ranges": False}, {"shift": -5}, {"shift": 5}], ids=str)
def test_server_that_gives_no_range_or_another_makes_it_begin_anew(
    downloads: Downloads, release: Release, fault: dict[str, Any]
) -> None:
    broken_off(downloads, release)
    vars(release).update(fault)
    downloads.works(source=release.url)
    assert release.archives() == ["bytes=100000-", *([None] if "shift" in fault else [])]
    assert tree(downloads.place) == FORMER


def test_redirected_transfer_goes_on(downloads: Downloads, release: Release) -> None:
    """As releases on GitHub are, which lead to another address."""
    release.redirect = True
    broken_off(downloads, release)
    downloads.works(source=release.url)
    assert release.archives() == ["bytes=100000-"] * 2
    assert tree(downloads.place) == FORMER


@pytest.mark.parametrize("size", [10, 100_000, 10_000_000], ids=["shorter", "short", "longer"])
def test_leftover_of_something_else_is_not_built_on(downloads: Downloads, release: Release, size: int) -> None:
    downloads.work.mkdir(parents=True)
    (downloads.work / f"iirp_v{VERSION}.zip.partial").write_bytes(bytes(size))
    (downloads.work / "iirp_v0.0.1.zip.partial").write_bytes(bytes(size))
    downloads.works(source=release.url)
    assert release.archives()[-1] is None
    assert tree(downloads.place) == FORMER


def test_archive_that_was_whole_already_is_not_transferred_again(downloads: Downloads, release: Release) -> None:
    """As after a kill between the transfer and the installation."""
    downloads.work.mkdir(parents=True)
    (downloads.work / f"iirp_v{VERSION}.zip.partial").write_bytes(release.files[f"iirp_v{VERSION}.zip"])
    downloads.works(source=release.url)
    assert release.archives() == []
    assert tree(downloads.place) == FORMER


def test_file_that_became_shorter_on_the_server_is_begun_anew(downloads: Downloads, release: Release) -> None:
    broken_off(downloads, release)
    whole = release.files[f"iirp_v{VERSION}.zip"]
    release.files[f"iirp_v{VERSION}.zip"] = whole[:50_000]
    downloads.refused("broke off", source=release.url)
    assert release.archives() == ["bytes=100000-", None, "bytes=50000-"]
    release.files[f"iirp_v{VERSION}.zip"] = whole
    downloads.works(source=release.url)
    assert tree(downloads.place) == FORMER


def test_killed_download_goes_on(downloads: Downloads, release: Release, former: dict[str, str]) -> None:
    release.slow = 0.1
    command = [sys.executable, "-m", "iregzoo", "download", "iirp", "--source", release.url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    begin = time.monotonic()
    while time.monotonic() - begin < 60:
        if any(path.stat().st_size > 200_000 for path in downloads.work.glob("*.partial")):
            break
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    there = downloads.partial().stat().st_size
    assert 200_000 < there < len(release.files[f"iirp_v{VERSION}.zip"])
    assert tree(downloads.place) == former
    release.behave()
    release.requests.clear()
    assert "going on" in downloads.works(source=release.url)
    assert release.archives() == [f"bytes={there}-"]
    assert tree(downloads.place) == FORMER


def test_two_at_the_same_time_do_not_spoil_each_other(downloads: Downloads, release: Release) -> None:
    release.slow = 0.05
    command = [sys.executable, "-m", "iregzoo", "download", "iirp", "--source", release.url]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert release.archives() == [None]
    assert tree(downloads.place) == FORMER
    assert [path.name for path in downloads.work.iterdir()] == ["lock"]


# --- servers that do not have it, or say what is not so


def test_byte_that_changed_on_the_way_is_noticed(
    downloads: Downloads, release: Release, former: dict[str, str]
) -> None:
    release.flip = 700_000
    downloads.refused("sha256 is", "nothing was installed", source=release.url)
    assert not list(downloads.work.glob("*.partial"))
    release.behave()
    downloads.works(source=release.url)
    assert tree(downloads.place) == FORMER


def test_hash_is_compared_before_anything_is_opened(downloads: Downloads, release: Release) -> None:
    """What comes is no ZIP file, but that is not what it is refused for."""
    release.files[f"iirp_v{VERSION}.zip"] = bytes(len(release.files[f"iirp_v{VERSION}.zip"]))
    downloads.refused("sha256 is", source=release.url)


def test_file_longer_than_the_index_says_is_not_taken(
    downloads: Downloads, release: Release, former: dict[str, str]
) -> None:
    release.files[f"iirp_v{VERSION}.zip"] += bytes(1 << 20)
    downloads.refused("has more than the", source=release.url)


def test_what_a_server_does_not_have_is_refused_at_once(
    downloads: Downloads, release: Release, former: dict[str, str]
) -> None:
    del release.files[f"iirp_v{VERSION}.zip"]
    downloads.refused(f"iirp_v{VERSION}.zip", "404 Not Found", source=release.url)
    del release.files["index.json"]
    downloads.refused("index.json", "404 Not Found", source=release.url)
    assert len(release.requests) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--version", "9.9.9"), ("has no version 9.9.9 of iirp", VERSION)),
        (("--version", "newest"), ("version 'newest' of iirp", "0.2.0")),
        (("--version", "../../iirp"), ("version '../../iirp'",)),
        (("--source", "ftp://127.0.0.1/"), ("source 'ftp://127.0.0.1/'", "http")),
        (("--source", "http://[::1"), ("http://[::1",)),
        (("--source", "/nowhere"), ("/nowhere/index.json", "No such file or directory")),
    ],
)
def test_bad_choices_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    downloads: Downloads,
    release: Release,
    arguments: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    monkeypatch.setenv("IREGZOO_SOURCE", release.url)
    downloads.refused(*words, arguments=arguments)
    assert not downloads.home.exists()


@pytest.mark.parametrize("name", ["../iirp", "/iirp", "", "nonesuch"])
def test_unknown_names_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], release: Release, home: Path, name: str
) -> None:
    assert run(monkeypatch, "download", name, "--source", release.url) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert repr(name) in error
    assert not home.exists()


INDICES: dict[str, bytes] = {
    "a page": b"<html>Please log in</html>",
    "nothing": b"",
    "bytes": bytes(range(256)),
    "deep": b"[" * 100_000,
    "a list": b"[]",
    "a word": b'"bundles"',
    "no list": b'{"bundles": {}}',
    "of numbers": b'{"bundles": [3]}',
    "long": b'{"bundles": []}' + b" " * 2_000_000,
}


@pytest.mark.parametrize("content", INDICES.values(), ids=INDICES)
def test_index_that_is_none_is_refused(
    downloads: Downloads, release: Release, former: dict[str, str], content: bytes
) -> None:
    release.files["index.json"] = content
    downloads.refused(f"{release.url}/index.json", source=release.url)
    assert release.archives() == []


def test_index_that_is_cut_off_is_asked_for_again(downloads: Downloads, release: Release) -> None:
    release.index_cut = 1
    downloads.works(source=release.url)
    assert [name for name, _ in release.requests[:2]] == ["index.json"] * 2
    release.index_cut = 10
    assert "no newer one could be asked for" in downloads.works(source=release.url)
    downloads.refused("does not answer (the server ended early)", arguments=("--version", "9.0.0"), source=release.url)


@pytest.mark.parametrize(
    "change",
    [
        *({field: None} for field in ("version", "file", "sha256", "size")),
        {"size": "1787713"},
        {"size": True},
        {"size": -1},
        {"size": 10**12},
        {"sha256": "5a52"},
        {"version": 1},
        {"version": "1.0-beta"},
        {"file": "../iirp.zip"},
        {"file": "http://example.org/iirp.zip"},
        {"name": "../iirp"},
    ],
    ids=str,
)
def test_entry_that_lacks_or_changes_a_field_is_refused(
    downloads: Downloads, release: Release, former: dict[str, str], change: dict[str, Any]
) -> None:
    entry = json.loads(release.files["index.json"])["bundles"][0] | change
    entry = {name: value for name, value in entry.items() if value is not None}
    release.files["index.json"] = json.dumps({"bundles": [entry]}).encode()
    downloads.refused(f"{release.url}/index.json", source=release.url)
    assert release.archives() == []


def test_index_that_contradicts_the_manifest_is_refused(downloads: Downloads, tmp_path: Path) -> None:
    """Another archive under a version that iregzoo knows, with its true hash in the index."""
    bundle = variant(tmp_path, VERSION)
    (bundle / "docs" / "README.md").write_text("another")
    with serve() as lying:
        lying.publish("iirp", VERSION, archive(bundle))
        signed = manifest.manifest()["iirp"][VERSION]["sha256"]
        downloads.refused("this iregzoo signed off", signed[:12], "do not trust", source=lying.url)
        downloads.refused("this iregzoo signed off", arguments=("--version", VERSION), source=lying.url)
        assert lying.archives() == []


# --- archives that are not what they should be

Entries = dict[str, bytes]


def packed(entries: Entries, change: Callable[[ZipInfo], None] = lambda entry: None) -> bytes:
    content = BytesIO()
    with ZipFile(content, "w") as target:
        for name, data in entries.items():
            entry = ZipInfo(name)
            entry.external_attr = 0o100644 << 16
            change(entry)
            target.writestr(entry, data, entry.compress_type)
    return content.getvalue()


def entries_of(bundle: Path) -> Entries:
    return {f"iirp/{name}": (bundle / name).read_bytes() for name in tree(bundle)}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../outside.json", "no place in a bundle"),
        ("iirp/../../outside.json", "no place in a bundle"),
        ("iirp/configs/../../../outside.json", "no place in a bundle"),
        ("/outside.json", "no place in a bundle"),
        ("//outside.json", "no place in a bundle"),
        ("C:\\outside.json", "no place in a bundle"),
        ("iirp/configs\\..\\outside.json", "no place in a bundle"),
        ("other/configs/outside.json", "no place in a bundle"),
        ("outside.json", "no place in a bundle"),
        ("iirp/setup.py", "no place in a bundle"),
        ("iirp/configs/__init__.py", "no place in a bundle"),
        ("iirp/configs/run.sh", "no place in a bundle"),
        ("iirp/models/model.pkl", "no place in a bundle"),
        ("iirp/configs/deeper/train.json", "no place in a bundle"),
        ("iirp/configs/.hidden.json", "no place in a bundle"),
        ("iirp/extra/", "no place in a bundle"),
        ("iirp/configs/Metadata.json", "twice"),
        ("iirp/configs/metadata.json", "twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archive_with_an_entry_out_of_place_is_refused(
    downloads: Downloads, tmp_path: Path, former: dict[str, str], name: str, words: str
) -> None:
    content = BytesIO(packed(entries_of(variant(tmp_path, "9.0.0"))))
    with ZipFile(content, "a") as target:
        target.writestr(ZipInfo(name), "{}")
    refuse_archive(downloads, content.getvalue(), words)
    assert not list(tmp_path.rglob("*outside*"))
    assert not Path("/outside.json").exists()


def refuse_archive(downloads: Downloads, content: bytes, *words: str) -> None:
    """An archive that is truly listed is refused, and nothing stays of it."""
    with serve() as server:
        server.publish("iirp", "9.0.0", content)
        downloads.refused(*words, "nothing was installed", source=server.url)
        assert len(server.archives()) == 1
    assert [path.name for path in downloads.work.iterdir()] == ["lock"]


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFDIR])
def test_link_is_refused(downloads: Downloads, tmp_path: Path, former: dict[str, str], kind: int) -> None:
    def change(entry: ZipInfo) -> None:
        if entry.filename.endswith("README.md"):
            entry.external_attr = (kind | 0o777) << 16

    entries = entries_of(variant(tmp_path, "9.0.0")) | {"iirp/docs/README.md": b"/etc/passwd"}
    refuse_archive(downloads, packed(entries, change), "docs/README.md", "is a link or another thing")


def test_bomb_is_refused(downloads: Downloads, tmp_path: Path, former: dict[str, str]) -> None:
    def change(entry: ZipInfo) -> None:
        entry.compress_type = ZIP_DEFLATED

    entries = entries_of(variant(tmp_path, "9.0.0")) | {"iirp/docs/data_license.txt": bytes(40_000_000)}
    refuse_archive(downloads, packed(entries, change), "would unpack to")


def test_bomb_that_hides_its_size_is_refused(downloads: Downloads, tmp_path: Path, former: dict[str, str]) -> None:
    def change(entry: ZipInfo) -> None:
        entry.compress_type = ZIP_DEFLATED

    size = 40_000_000
    entries = entries_of(variant(tmp_path, "9.0.0")) | {"iirp/docs/data_license.txt": bytes(size)}
    content = packed(entries, change).replace(size.to_bytes(4, "little"), (100).to_bytes(4, "little"))
    refuse_archive(downloads, content, "no sound ZIP file")


@pytest.mark.parametrize("damage", ["no zip", "half", "encrypted", "another method"])
def test_archive_that_cannot_be_read_is_refused(
    downloads: Downloads, tmp_path: Path, former: dict[str, str], damage: str
) -> None:
    whole = packed(entries_of(variant(tmp_path, "9.0.0")))
    directory = whole.index(b"PK\x01\x02")
    content = {
        "no zip": b"<html>Please log in</html>",
        "half": whole[: len(whole) // 2],
        "encrypted": whole[: directory + 8] + b"\x01" + whole[directory + 9 :],
        "another method": whole[: directory + 10] + b"\x63" + whole[directory + 11 :],
    }[damage]
    refuse_archive(downloads, content, "no sound ZIP file")


class Code:
    """Makes a folder where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


def with_weights(bundle: Path, content: object) -> None:
    """Other weights, with their true hash in the card."""
    torch.save(content, bundle / "models" / "model.pt")
    cards = json.loads((bundle / "configs" / "metadata.json").read_text())["weights"]
    cards["hippocampus"]["sha256"] = zoo.sha256(bundle / "models" / "model.pt")
    change_metadata(bundle, weights=cards)


def test_pickle_is_refused_and_not_run(downloads: Downloads, tmp_path: Path, former: dict[str, str]) -> None:
    bundle = variant(tmp_path, "9.0.0")
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    with_weights(bundle, {**state, "code": Code(tmp_path / "mark")})
    refuse_archive(downloads, archive(bundle), "is no readable weights file")
    assert not (tmp_path / "mark").exists()
    torch.load(bundle / "models" / "model.pt", weights_only=False)  # it would have run
    assert (tmp_path / "mark").exists()


def test_weights_of_another_network_are_refused(downloads: Downloads, tmp_path: Path, former: dict[str, str]) -> None:
    bundle = variant(tmp_path, "9.0.0")
    with_weights(bundle, {"network.weight": torch.zeros(3)})
    refuse_archive(downloads, archive(bundle), "has no tensor", "weights are of another network")


def set_network(bundle: Path, definition: object) -> None:
    path = bundle / "configs" / "inference.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "network_def": definition}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda bundle: change_metadata(bundle, version="9.0.1"), "says that it is version '9.0.1'"),
        (lambda bundle: (bundle / "configs/metadata.json").unlink(), "is no readable metadata"),
        (lambda bundle: (bundle / "configs/metadata.json").write_text("[]"), "is no readable metadata"),
        (lambda bundle: (bundle / "configs/inference.json").unlink(), "defines no network"),
        (lambda bundle: (bundle / "configs/inference.json").write_text("[]"), "defines no network"),
        (lambda bundle: set_network(bundle, {"_target_": "os.getcwd"}), "'os.getcwd' is none of this iregzoo's"),
        (lambda bundle: set_network(bundle, {"_target_": "iregzoo.zoo.os.getcwd"}), "is none of this iregzoo's"),
        (
            lambda bundle: set_network(
                bundle, {"_target_": "iregzoo.registration.PairNetwork", "network": {"_target_": "os.getcwd"}}
            ),
            "'os.getcwd' is none of this iregzoo's",
        ),
        (
            lambda bundle: set_network(bundle, {"_target_": "iregzoo.networks.IIRPNet", "a": 1}),
            "cannot be used by this",
        ),
        (lambda bundle: set_network(bundle, "iregzoo.networks.IIRPNet"), "defines no network"),
        (lambda bundle: change_metadata(bundle, weights=[]), "not as iregzoo reads them"),
        (lambda bundle: change_metadata(bundle, weights={}), "model.pt: has no card"),
        (lambda bundle: (bundle / "LICENSE").unlink(), "has no file 'LICENSE'"),
        (lambda bundle: (bundle / "models/model.pt").write_bytes(b"damaged"), "sha256 is"),
    ],
)
def test_bundle_that_is_not_whole_is_refused(
    downloads: Downloads,
    tmp_path: Path,
    former: dict[str, str],
    change: Callable[[Path], object],
    words: str,
) -> None:
    bundle = variant(tmp_path, "9.0.0")
    change(bundle)
    content = packed(entries_of(bundle))
    refuse_archive(downloads, content, words)


# --- disks


@pytest.mark.parametrize("room", [300_000, 1_750_000], ids=["for a part", "for all but the last"])
def test_full_disk_is_said_and_goes_on_with_more_room(
    downloads: Downloads, release: Release, former: dict[str, str], room: int
) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        downloads.refused("cannot be written (File too large)", "IREGZOO_HOME", source=release.url)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert downloads.partial().stat().st_size == room
    release.requests.clear()
    downloads.works(source=release.url)
    assert release.archives() == [f"bytes={room}-"]
    assert tree(downloads.place) == FORMER


def test_full_disk_while_unpacking_keeps_the_archive(
    downloads: Downloads, release: Release, former: dict[str, str]
) -> None:
    resource = pytest.importorskip("resource")
    (downloads.work / f"iirp_v{VERSION}.zip.partial").write_bytes(release.files[f"iirp_v{VERSION}.zip"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        downloads.refused("cannot be written (File too large)", "IREGZOO_HOME", source=release.url)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    downloads.works(source=release.url)
    assert release.archives() == []
    assert tree(downloads.place) == FORMER


def test_home_that_is_a_file_is_said(monkeypatch: pytest.MonkeyPatch, downloads: Downloads, release: Release) -> None:
    downloads.home.write_text("mine")
    downloads.refused(str(downloads.home), "cannot be written", "IREGZOO_HOME", source=release.url)
    assert downloads.home.read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="POSIX has folders that cannot be written")
def test_home_that_cannot_be_written_is_said(
    monkeypatch: pytest.MonkeyPatch, downloads: Downloads, release: Release
) -> None:
    downloads.works(source=release.url)  # as another user, modules could no longer be imported
    with tempfile.TemporaryDirectory() as folder:
        home, root = Path(folder), os.geteuid() == 0
        shutil.copytree(downloads.home, home, dirs_exist_ok=True)
        change_metadata(home / "bundles" / "iirp", version="0.0.1")
        for path in (*home.rglob("*"), home):
            path.chmod(0o555 if path.is_dir() else 0o444)
        monkeypatch.setenv("IREGZOO_HOME", folder)
        downloads.home = home
        try:
            if root:  # to whom no folder is closed
                os.seteuid(65534)
            downloads.refused(folder, "cannot be written (Permission denied)", "IREGZOO_HOME", source=release.url)
            asked = len(release.requests)
            assert run(monkeypatch, "download", "iirp", "--version", "0.0.1", "--source", release.url) == 0
            assert len(release.requests) == asked
        finally:
            if root:
                os.seteuid(0)
            for path in (home, *home.rglob("*")):
                path.chmod(0o755)


def test_python_function_says_what_it_did(release: Release, home: Path) -> None:
    from iregzoo.download import download

    seen: list[tuple[int, int]] = []
    lines: list[str] = []
    bundle = download("iirp", where=release.url, progress=lambda *bytes: seen.append(bytes), say=lines.append)
    size = len(release.files[f"iirp_v{VERSION}.zip"])
    assert (bundle.path, bundle.version) == (home / "bundles" / "iirp", VERSION)
    assert (seen[0], seen[-1]) == ((0, size), (size, size))
    assert seen == sorted(seen)
    assert len(lines) == 1
    with pytest.raises(InputError, match="has no bundle 'voxelmorph'; it has iirp"):
        download("voxelmorph", where=release.url)
