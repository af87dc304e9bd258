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
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if not _stands_under(path, file.fileno()):  # its last holder has deleted it in the meantime
                continue
            yield
            return


def _stands_under(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
