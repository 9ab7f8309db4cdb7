"""Downloads: what is chosen and installed, from which index, and what a disk may do."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from iregzoo import manifest, zoo
from iregzoo.errors import InputError
from iregzoo.release import pack
from releases import BUNDLES, VERSION, Downloads, Release, archive, change_metadata, serve, tree, variant
from shell import run

OWN = tree(BUNDLES / "iirp")


def test_bundle_is_installed_and_used(downloads: Downloads, release: Release) -> None:
    said = downloads.works(source=release.url)
    assert f"iirp {VERSION} is installed in {downloads.place}" in said
    assert "as signed off" in said
    assert tree(downloads.place) == tree(BUNDLES / "iirp")
    assert zoo.load("iirp").bundle.path == downloads.place
    assert release.archives() == [None]


def test_installed_bundle_needs_no_network(downloads: Downloads, release: Release) -> None:
    downloads.works(source=release.url)
    asked = len(release.requests)
    assert "is already installed and intact in" in downloads.works("--version", VERSION, source=release.url)
    assert len(release.requests) == asked
    assert "the newest version in" in downloads.works(source=release.url)
    assert [name for name, _ in release.requests[asked:]] == ["index.json"]
    nowhere = "http://127.0.0.1:9"
    assert "could not check for a newer version" in downloads.works(source=nowhere)
    downloads.refused(
        "cannot be read (Connection refused)", "127.0.0.1:9", arguments=("--version", "9.0.0"), source=nowhere
    )
    assert zoo.load("iirp").bundle.path == downloads.place


def test_source_is_an_address_an_index_a_folder_or_a_variable(
    monkeypatch: pytest.MonkeyPatch, downloads: Downloads, release: Release, tmp_path: Path
) -> None:
    folder = tmp_path / "a release #1"
    pack(zoo.find("iirp"), folder)
    for source in (f"{release.url}/", f"{release.url}/index.json", str(folder), str(folder / "index.json")):
        assert "as signed off" in downloads.works(source=source)
        shutil.rmtree(downloads.home)
    monkeypatch.setenv("IREGZOO_SOURCE", release.url)
    assert "as signed off" in downloads.works()


def test_newest_is_chosen_by_numbers_and_replaces_an_older_one(
    downloads: Downloads, release: Release, tmp_path: Path, former: dict[str, str]
) -> None:
    for version in ("9.10.0", "9.9.0"):
        release.publish("iirp", version, archive(variant(tmp_path, version)))
    said = downloads.works(source=release.url)
    assert "iirp 9.10.0" in said
    assert f"unknown to this version of iregzoo, so only as trustworthy as {release.url}" in said
    assert tree(downloads.place) == tree(tmp_path / "9.10.0" / "iirp")
    assert zoo.find("iirp").version == "9.10.0"


def test_older_index_needs_the_version(downloads: Downloads, release: Release, tmp_path: Path) -> None:
    release.publish("iirp", "9.0.0", archive(variant(tmp_path, "9.0.0")))
    downloads.works(source=release.url)
    with serve() as older:
        older.publish("iirp", "8.0.0", archive(variant(tmp_path, "8.0.0")))
        downloads.refused("its newest iirp is 8.0.0, older than the 9.0.0", "--version 8.0.0", source=older.url)
        assert older.archives() == []
        assert "iirp 8.0.0 is installed in" in downloads.works("--version", "8.0.0", source=older.url)
    assert zoo.find("iirp").version == "8.0.0"


def test_older_than_what_came_with_iregzoo_needs_the_version(downloads: Downloads, tmp_path: Path) -> None:
    with serve() as older:
        older.publish("iirp", "0.0.1", archive(variant(tmp_path, "0.0.1")))
        downloads.refused(f"older than the {VERSION} in {BUNDLES}", "--version 0.0.1", source=older.url)
        said = downloads.works("--version", "0.0.1", source=older.url)
    assert f"version {VERSION}, which came with iregzoo, is newer" in said
    assert zoo.find("iirp").path == BUNDLES / "iirp"


def test_damaged_bundle_is_mended(downloads: Downloads, release: Release) -> None:
    damages = {"configs/metadata.json": b'{"weights": 3}', "models/model.pt": b"damaged", "docs/README.md": b"damaged"}
    for file, damage in (*damages.items(), ("configs/metadata.json", b"damaged")):
        downloads.works(source=release.url)
        (downloads.place / file).write_bytes(damage)
        assert "is in" in downloads.works("--version", VERSION, source=release.url)
        assert tree(downloads.place) == OWN


def test_former_bundle_comes_back_where_the_new_one_had_not_taken_its_place(
    downloads: Downloads, release: Release, former: dict[str, str]
) -> None:
    """As after a kill between the two renames."""
    downloads.place.rename(downloads.work / "former")
    release.cut = 1000
    assert run(downloads.monkeypatch, "download", "iirp", "--source", release.url) == 2
    assert tree(downloads.place) == former


# --- indices that do not have it, or say what is not so


def test_what_a_server_does_not_have_is_refused_at_once(
    downloads: Downloads, release: Release, former: dict[str, str]
) -> None:
    del release.files[f"iirp_v{VERSION}.zip"]
    downloads.refused(f"iirp_v{VERSION}.zip", "404 Not Found", source=release.url)
    del release.files["index.json"]
    downloads.refused("index.json", "404 Not Found", source=release.url)
    assert len(release.requests) == 3


def test_redirections_that_never_end_are_refused_in_a_line(downloads: Downloads, release: Release) -> None:
    release.circles = True
    downloads.refused(f"iirp_v{VERSION}.zip: the server answered 302 in an endless loop; check the", source=release.url)


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


@pytest.mark.parametrize("name", ["../iirp", "/iirp", "nonesuch"])
def test_unknown_names_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    downloads: Downloads,
    release: Release,
    name: str,
) -> None:
    assert run(monkeypatch, "download", name, "--source", release.url) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert repr(name) in error
    assert not downloads.home.exists()


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
    assert "could not check for a newer version" in downloads.works(source=release.url)
    downloads.refused(
        "cannot be read (the server closed the connection early)", arguments=("--version", "9.0.0"), source=release.url
    )


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
        downloads.refused("this version of iregzoo signed off", signed[:12], "do not trust", source=lying.url)
        downloads.refused("this version of iregzoo signed off", arguments=("--version", VERSION), source=lying.url)
        assert lying.archives() == []


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
    assert tree(downloads.place) == OWN


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
    assert tree(downloads.place) == OWN


def test_home_that_is_a_file_is_said(monkeypatch: pytest.MonkeyPatch, downloads: Downloads, release: Release) -> None:
    downloads.home.write_text("mine")
    downloads.refused(str(downloads.home), "cannot be written", "IREGZOO_HOME", source=release.url)
    assert downloads.home.read_text("utf-8") == "mine"


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


def test_python_function_says_what_it_did(downloads: Downloads, release: Release) -> None:
    from iregzoo.download import download

    seen: list[tuple[int, int]] = []
    lines: list[str] = []
    bundle = download("iirp", where=release.url, progress=lambda *bytes: seen.append(bytes), say=lines.append)
    size = len(release.files[f"iirp_v{VERSION}.zip"])
    assert (bundle.path, bundle.version) == (downloads.place, VERSION)
    assert (seen[0], seen[-1]) == ((0, size), (size, size))
    assert seen == sorted(seen)
    assert len(lines) == 1
    with pytest.raises(InputError, match="has no bundle 'voxelmorph'; it has iirp"):
        download("voxelmorph", where=release.url)
