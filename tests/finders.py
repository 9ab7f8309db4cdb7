"""Finders that find what they are told to."""

import numpy as np

from iregzoo.space.grid import Matrix
from iregzoo.space.scan import Scan


class Says:
    """Finds the brains there, of scans that all lie upright; ``asked`` has whether each was to be rigid."""

    sha256 = "5" * 64

    def __init__(self, start: Matrix | None) -> None:
        self.start = start
        self.asked: list[bool] = []

    def __call__(self, fixed: Scan, moving: Scan, *, rigid: bool) -> Matrix | None:
        self.asked.append(rigid)
        return self.start

    def upright(self, scan: Scan) -> Matrix:
        return np.eye(4)
