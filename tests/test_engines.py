"""Every job is done once and told of, whatever happens to the processes that do them."""

import gc
import multiprocessing
import socket
import time
from collections.abc import Iterator

import pytest

from iregzoo import engines
from iregzoo.engines import on_cluster
from iregzoo.errors import InputError


def ended(seconds: float = 10) -> bool:
    """Whether all processes that this one started come to their end."""
    begin = time.monotonic()
    while multiprocessing.active_children() and time.monotonic() - begin < seconds:
        time.sleep(0.05)
    return not multiprocessing.active_children()


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
