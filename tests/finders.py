"""Finders that find what they are told to."""

from iregzoo.space.grid import Matrix
from iregzoo.space.scan import Scan
from iregzoo.space.upright import ROTATIONS


class Says:
    """Finds the brains there, of scans that all lie so; ``asked`` has whether each was to be rigid."""

    sha256 = "5" * 64

    def __init__(self, start: Matrix | None, upright: Matrix = ROTATIONS[0]) -> None:
        self.start, self.lies = start, upright
        self.asked: list[bool] = []

    def __call__(self, fixed: Scan, moving: Scan, *, rigid: bool) -> Matrix | None:
        self.asked.append(rigid)
        return self.start

    def upright(self, scan: Scan) -> Matrix:
        return self.lies


class Sees(Says):
    """Finds no brains, but sees that one scan lies otherwise than its header says."""

    def __init__(self, lying: Scan, upright: Matrix) -> None:
        super().__init__(None, upright)
        self.lying = lying

    def upright(self, scan: Scan) -> Matrix:
        return self.lies if scan is self.lying else ROTATIONS[0]
