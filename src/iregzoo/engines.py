"""Where many jobs are done: in processes of this machine, or on a Dask cluster.

An engine takes a function and jobs for it, and yields each job with what came of it, as they end: what the function
gave, or a line on why it gave nothing. A process that dies takes no other job with it.
"""

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, TypeVar

from iregzoo.errors import InputError

Job = TypeVar("Job")
Result = TypeVar("Result")
Outcomes = Generator[tuple[Job, Result | str], None, None]
TRIES = 2
CONNECT_SECONDS = 10
SPAWN = multiprocessing.get_context("spawn")  # a forked PyTorch that has used its threads or a GPU hangs


class Engine(Protocol):
    """Does jobs with a function that, as they do, can be sent to another process."""

    def __call__(self, work: Callable[[Job], Result], jobs: Sequence[Job]) -> Outcomes[Job, Result]: ...


def on_this_machine(work: Callable[[Job], Result], jobs: Sequence[Job], *, workers: int) -> Outcomes[Job, Result]:
    """Do the jobs in so many processes of this machine, which end with this generator and with this process.

    A job whose process dies is done once more, in a new one.
    """
    waiting, idle = deque((job, 1) for job in jobs), deque[_Worker]()
    busy: dict[Connection, tuple[_Worker, Job, int]] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                worker = idle.pop() if idle else _Worker(work)
                job, tries = waiting.popleft()
                busy[worker.pipe] = worker, job, tries
                worker.send(job)
            ready = wait(list(busy))
            for pipe in [pipe for pipe in busy if pipe in ready]:
                worker, job, tries = busy.pop(pipe)
                try:
                    outcome = worker.pipe.recv()
                    idle.append(worker)
                except (EOFError, OSError):
                    code = worker.end()
                    if tries < TRIES:
                        waiting.append((job, tries + 1))
                        continue
                    outcome = (
                        f"its process ended {TRIES} times (exit code {code}); if memory ran out, use fewer workers"
                    )
                yield job, outcome
    finally:
        for worker in (*idle, *(worker for worker, _, _ in busy.values())):
            worker.end()


class _Worker:
    """A process that does one job after the other."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.pipe, there = SPAWN.Pipe()
        self.process = SPAWN.Process(target=_serve, args=(there,), daemon=True)
        with _deaf():
            self.process.start()
        there.close()
        self.send(work)

    def send(self, what: Any) -> None:
        with suppress(OSError):  # it is dead, which whoever listens to the pipe is told
            self.pipe.send(what)

    def end(self) -> int | None:
        """End it, if it has not ended, and give its exit code, the negative of a signal that killed it."""
        self.pipe.close()
        self.process.kill()
        self.process.join()
        return self.process.exitcode


def _serve(pipe: Connection) -> None:
    """What a worker's process does: get a function, then jobs, and send back what comes of each."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError):
        work = pipe.recv()
        while True:
            pipe.send(work(pipe.recv()))


def _end_with_parent() -> None:
    """A parent that was killed can end nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _deaf() -> Iterator[None]:
    """A process that starts in here is deaf to Ctrl-C, which a terminal sends to all; its parent will end it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    resource_tracker.ensure_running()  # which the first process would start, and which ends every block
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def on_cluster(address: str) -> Iterator[Engine]:
    """The workers of a Dask cluster whose scheduler has this address, such as ``tcp://host:8786``.

    A job whose worker dies is done again, as often as the scheduler allows (``allowed-failures``). Where there is no
    worker yet, the jobs wait for one.

    Raises:
        InputError: where Dask is not installed, no scheduler answers, or the connection to it is lost.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise InputError(f'scheduler {address!r} needs Dask ({error}); pip install "iregzoo[cluster]"') from None
    for name in ("distributed", "distributed.client"):  # what matters is said in one line of ours
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        asyncio.run(_knock(address))  # a Client that fails hangs for 20 s, and prints a traceback, as it is collected
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError, asyncio.TimeoutError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"scheduler {address!r} does not answer ({reason}); give the address that it prints") from None

    def engine(work: Callable[[Job], Result], jobs: Sequence[Job]) -> Outcomes[Job, Result]:
        from distributed import as_completed

        futures = dict(zip(client.map(work, jobs, pure=False), jobs, strict=True))
        try:
            for future in as_completed(futures, loop=client.loop):
                if future.cancelled():
                    raise InputError(f"scheduler {address!r} was lost; restart it and run the command again")
                error = future.exception()
                yield futures[future], future.result() if error is None else _first_line(error)
        finally:
            client.cancel(list(futures))

    with client:
        yield engine


async def _knock(address: str) -> None:
    from distributed import Security
    from distributed.comm import connect

    own = Security().get_connection_args("client")
    # Dask's time is for reaching a server; one that then says nothing, for it is none of Dask's, has ours.
    comm = await asyncio.wait_for(connect(address, timeout=CONNECT_SECONDS, **own), CONNECT_SECONDS + 1)
    await comm.close()


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
