"""Every job is done once and told of, whatever happens to the processes that do them."""

import gc
import multiprocessing
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from iregzoo import engines
from iregzoo.engines import check_workers, on_cluster, on_this_machine
from iregzoo.errors import InputError
from labour import die_at_three, die_once, square


def ended(seconds: float = 10) -> bool:
    """Whether all processes that this one started come to their end."""
    begin = time.monotonic()
    while multiprocessing.active_children() and time.monotonic() - begin < seconds:
        time.sleep(0.05)
    return not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [1, 3])
def test_each_job_is_done_once(workers: int) -> None:
    found = list(on_this_machine(square, range(7), workers=workers))
    assert sorted(found) == [(number, number * number) for number in range(7)]
    assert ended()


def test_no_jobs_need_no_process() -> None:
    assert list(on_this_machine(square, [], workers=2)) == []


def test_job_that_kills_its_process_is_told_of_and_takes_no_other_with_it() -> None:
    found = dict(on_this_machine(die_at_three, range(6), workers=2))
    assert str(found.pop(3)).startswith("its process ended 2 times (exit code -9)")
    assert found == {number: number * number for number in (0, 1, 2, 4, 5)}
    assert ended()


def test_job_whose_process_died_is_done_again(tmp_path: Path) -> None:
    markers = [tmp_path / name for name in "abc"]
    assert sorted(on_this_machine(die_once, markers, workers=2)) == [(marker, marker.name) for marker in markers]


def test_who_stops_listening_ends_the_processes() -> None:
    outcomes = on_this_machine(square, range(100), workers=2)
    next(outcomes)
    assert len(multiprocessing.active_children()) == 2
    outcomes.close()
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals are blocked as POSIX has it")
def test_every_process_is_deaf_to_ctrl_c_from_its_start_even_the_first() -> None:
    """In a process of its own: what multiprocessing starts but once, the first worker's start would start."""
    code = (
        "import signal; from iregzoo.engines import on_this_machine; from labour import deaf;"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]);"
        "print(sorted(on_this_machine(deaf, range(2), workers=2)));"
        "print(signal.pthread_sigmask(signal.SIG_BLOCK, []) == {signal.SIGTERM})"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert (found.stdout.split("\n"), found.stderr) == (["[(0, True), (1, True)]", "True", ""], "")


@pytest.mark.parametrize("workers", [0, -1, 1.5, True, "two"])
def test_number_of_workers_is_checked(workers: int) -> None:
    with pytest.raises(InputError, match=f"workers {workers!r}: give a whole number"):
        check_workers(workers)


@pytest.fixture
def deaf() -> Iterator[str]:
    """The address of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:9", "nowhere", "carrier-pigeon://coop:1", "tls://127.0.0.1:9", "deaf"]
)
@pytest.mark.filterwarnings("error")
def test_scheduler_that_does_not_answer_is_named_soon(monkeypatch: pytest.MonkeyPatch, address: str, deaf: str) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(engines, "CONNECT_SECONDS", 1)
    address = deaf if address == "deaf" else address
    begin = time.monotonic()
    with (
        pytest.raises(InputError, match=rf"scheduler '{address}' does not answer \(.+\); give the address"),
        on_cluster(address),
    ):
        pytest.fail("there is a scheduler")
    gc.collect()  # a Client that failed would now wait for what never comes, and complain
    assert time.monotonic() - begin < 10
