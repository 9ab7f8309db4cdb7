"""Transfers that break off go on with the next call, and what comes is what the index says."""

import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from iregzoo import transfer
from releases import BUNDLES, VERSION, Downloads, Release, tree

OWN = tree(BUNDLES / "iirp")


@pytest.mark.parametrize(
    ("fault", "reason", "kept"),
    [
        ({"cut": 100_000}, "stopped after 300,000 of", 300_000),
        ({"stall": 150_000}, "no data for 0.5 s", 450_000),
        ({"stall": 0}, "no data for 0.5 s", 0),
        ({"cut": 100_000, "length": -500_000}, "stopped", 300_000),
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
    if "stall" in fault:
        downloads.monkeypatch.setattr(transfer, "TIMEOUT", 0.5)
    vars(release).update(fault)
    downloads.refused(reason, "run the same command again to resume", source=release.url)
    assert tree(downloads.place) == former
    assert len(release.archives()) == transfer.ATTEMPTS
    partials = list(downloads.work.glob("*.partial"))
    assert [path.stat().st_size for path in partials] == ([] if kept is None else [kept])
    release.behave()
    release.requests.clear()
    said = downloads.works(source=release.url)
    assert release.archives() == [f"bytes={kept}-" if kept else None]
    assert ("resuming" in said) == (kept is not None)
    assert tree(downloads.place) == OWN


def test_one_run_tries_again_and_goes_on(downloads: Downloads, release: Release) -> None:
    release.cut, release.times = 100_000, 2
    downloads.works(source=release.url)
    assert release.archives() == [None, "bytes=100000-", "bytes=200000-"]
    assert tree(downloads.place) == OWN


@pytest.mark.parametrize("added", [50_000, -50_000])
def test_length_that_is_a_lie_is_not_believed(downloads: Downloads, release: Release, added: int) -> None:
    size = len(release.files[f"iirp_v{VERSION}.zip"])
    release.length, release.times = added, 1
    downloads.works(source=release.url)
    assert release.archives() == ([None] if added > 0 else [None, f"bytes={size + added}-"])
    assert tree(downloads.place) == OWN


def broken_off(downloads: Downloads, release: Release, after: int = 100_000) -> None:
    """A transfer that broke off, and a server that is well again."""
    downloads.monkeypatch.setattr(transfer, "ATTEMPTS", 1)
    release.cut = after
    downloads.refused("stopped", source=release.url)
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
    assert tree(downloads.place) == OWN


def test_redirected_transfer_goes_on(downloads: Downloads, release: Release) -> None:
    """As releases on GitHub are, which lead to another address."""
    release.redirect = True
    broken_off(downloads, release)
    downloads.works(source=release.url)
    assert release.archives() == ["bytes=100000-"] * 2
    assert tree(downloads.place) == OWN


@pytest.mark.parametrize("size", [10, 100_000, 10_000_000], ids=["shorter", "short", "longer"])
def test_leftover_of_something_else_is_not_built_on(downloads: Downloads, release: Release, size: int) -> None:
    downloads.work.mkdir(parents=True)
    (downloads.work / f"iirp_v{VERSION}.zip.partial").write_bytes(bytes(size))
    (downloads.work / "iirp_v0.0.1.zip.partial").write_bytes(bytes(size))
    downloads.works(source=release.url)
    assert release.archives()[-1] is None
    assert tree(downloads.place) == OWN


def test_archive_that_was_whole_already_is_not_transferred_again(downloads: Downloads, release: Release) -> None:
    """As after a kill between the transfer and the installation."""
    downloads.work.mkdir(parents=True)
    (downloads.work / f"iirp_v{VERSION}.zip.partial").write_bytes(release.files[f"iirp_v{VERSION}.zip"])
    downloads.works(source=release.url)
    assert release.archives() == []
    assert tree(downloads.place) == OWN


def test_file_that_became_shorter_on_the_server_is_begun_anew(downloads: Downloads, release: Release) -> None:
    broken_off(downloads, release)
    whole = release.files[f"iirp_v{VERSION}.zip"]
    release.files[f"iirp_v{VERSION}.zip"] = whole[:50_000]
    downloads.refused("stopped", source=release.url)
    assert release.archives() == ["bytes=100000-", None, "bytes=50000-"]
    release.files[f"iirp_v{VERSION}.zip"] = whole
    downloads.works(source=release.url)
    assert tree(downloads.place) == OWN


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
    assert "resuming" in downloads.works(source=release.url)
    assert release.archives() == [f"bytes={there}-"]
    assert tree(downloads.place) == OWN


def test_two_at_the_same_time_do_not_spoil_each_other(downloads: Downloads, release: Release) -> None:
    release.slow = 0.05
    command = [sys.executable, "-m", "iregzoo", "download", "iirp", "--source", release.url]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8") for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert release.archives() == [None]
    assert tree(downloads.place) == OWN
    assert [path.name for path in downloads.work.iterdir()] == ["lock"]


def test_byte_that_changed_on_the_way_is_noticed(
    downloads: Downloads, release: Release, former: dict[str, str]
) -> None:
    release.flip = 700_000
    downloads.refused("sha256 is", "nothing was installed", source=release.url)
    assert not list(downloads.work.glob("*.partial"))
    release.behave()
    downloads.works(source=release.url)
    assert tree(downloads.place) == OWN


def test_hash_is_compared_before_anything_is_opened(downloads: Downloads, release: Release) -> None:
    """What comes is no ZIP file, but that is not what it is refused for."""
    release.files[f"iirp_v{VERSION}.zip"] = bytes(len(release.files[f"iirp_v{VERSION}.zip"]))
    downloads.refused("sha256 is", source=release.url)


def test_file_longer_than_the_index_says_is_not_taken(
    downloads: Downloads, release: Release, former: dict[str, str]
) -> None:
    release.files[f"iirp_v{VERSION}.zip"] += bytes(1 << 20)
    for _ in range(2):
        downloads.refused("has more than the", "nothing was installed", source=release.url)
        assert not list(downloads.work.glob("*.partial"))
