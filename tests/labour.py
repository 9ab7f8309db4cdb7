"""Work for other processes, which find it by its name."""

import os
import signal
from pathlib import Path


def square(number: int) -> int:
    return number * number


def die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def die_once(marker: Path) -> str:
    """Dies at the first call with a path, of which it leaves a file there."""
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return marker.name


def deaf(number: int) -> bool:
    """Whether Ctrl-C is kept from the process that does this."""
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
