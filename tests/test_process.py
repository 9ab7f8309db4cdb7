"""Settings of the process that several threads change at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Barrier, Thread

import pytest

from iregzoo.process import shared

setting = ["usual"]


@shared
@contextmanager
def changed() -> Iterator[None]:
    found, setting[0] = setting[0], "changed"
    try:
        yield
    finally:
        setting[0] = found


def test_the_last_thread_to_leave_restores_what_the_first_found() -> None:
    entered, left = Barrier(2, timeout=10), Barrier(2, timeout=10)
    seen = []

    def first() -> None:
        with changed():
            entered.wait()
        left.wait()

    def second() -> None:
        with changed():
            entered.wait()
            left.wait()  # the first one has left
            seen.append(setting[0])

    threads = [Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["changed"]
    assert setting == ["usual"]


def test_what_cannot_be_changed_can_be_tried_again() -> None:
    refusing = [True]

    @shared
    @contextmanager
    def changing() -> Iterator[None]:
        """What it does."""
        if refusing[0]:
            raise OSError("too many open files")
        with changed():
            yield

    assert (changing.__name__, changing.__doc__) == ("changing", "What it does.")
    for _ in range(2):
        with pytest.raises(OSError, match="too many open files"), changing():
            pytest.fail("it was entered")
    refusing[0] = False
    with changing():
        seen = list(setting)
    assert (seen, setting) == (["changed"], ["usual"])


def test_an_error_restores_it_and_it_can_be_changed_again() -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), changed():
            _ = 1 / 0
        assert setting == ["usual"]
        with changed():
            seen = list(setting)
        assert seen == ["changed"]
