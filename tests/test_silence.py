"""Silence of libraries that write past Python."""

import os

import pytest

from iregzoo.silence import silence


def test_what_is_written_past_python_is_not_seen_until_it_ends(capfd: pytest.CaptureFixture[str]) -> None:
    with silence():
        os.write(1, b"noise")
        os.write(2, b"noise")
    os.write(1, b"out")
    os.write(2, b"err")
    assert tuple(capfd.readouterr()) == ("out", "err")


def test_the_terminal_comes_back_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), silence():
        raise RuntimeError
    os.write(2, b"err")
    assert capfd.readouterr().err == "err"
