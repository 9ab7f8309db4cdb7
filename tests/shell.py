"""The command line in this process."""

import sys

import pytest

from iregzoo import cli


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of ``iregzoo ARGUMENTS``, run in this process."""
    monkeypatch.setattr(sys, "argv", ["iregzoo", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
