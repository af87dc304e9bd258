"""One process at a time: a lock that the system gives back when its holder ends, however it ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def only_one(path: Path, wait: bool) -> Iterator[None]:
    """Holds the lock file `path` for the block. BlockingIOError when another process has it and `wait` is False."""
    import fcntl  # where it doesn't exist (Windows), reading data must still work

    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)
