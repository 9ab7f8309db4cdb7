"""Settings of the whole process that one thread needs for a while, and others may need at the same time."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from threading import Lock


def shared(change: Callable[[], AbstractContextManager[None]]) -> Callable[[], AbstractContextManager[None]]:
    """A context manager that changes a setting when the first thread enters it and restores it when the last leaves.

    Were each thread to restore what it had found, one that came second would bring back the first one's change.
    """
    lock, held = Lock(), list[AbstractContextManager[None]]()
    inside = 0

    @contextmanager
    @wraps(change)
    def enter() -> Iterator[None]:
        nonlocal inside
        with lock:
            if not inside:
                context = change()
                context.__enter__()
                held.append(context)
            inside += 1
        try:
            yield
        finally:
            with lock:
                inside -= 1
                if not inside:
                    held.pop().__exit__(None, None, None)

    return enter
