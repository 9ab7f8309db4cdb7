"""Quiet from libraries that write to the terminal past Python."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from iregzoo.process import shared


@shared
@contextmanager
def silence() -> Iterator[None]:
    """Keep off the terminal what a library prints itself, as greedy's optimiser and HDF5 do where they give up."""
    terminals = [os.dup(stream) for stream in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        yield
    finally:
        for stream, terminal in zip((1, 2), terminals, strict=True):
            os.dup2(terminal, stream)
        for opened in (*terminals, nowhere):
            os.close(opened)
