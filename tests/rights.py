"""What permissions refuse."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def without_rights() -> Iterator[None]:
    """As a user for whom permissions count, which for the administrator they do not."""
    if not hasattr(os, "geteuid"):
        pytest.skip("permissions are another system's here")
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
