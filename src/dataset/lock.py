"""One process at a time in a folder, as far as its file system can tell."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from src.files import locked


@contextmanager
def only_one(path: Path, wait: bool) -> Iterator[None]:
    """Holds the lock file `path` for the block. BlockingIOError when another process has it and `wait` is False.

    Where files can't be locked (some network mounts) the block runs all the same, after a warning that nothing keeps a second process out.
    """
    with locked(path, wait) as held:
        if not held:
            warnings.warn(
                f"{path.parent} is on a file system without locks: nothing keeps a second process from working in it at the same time; "
                "see to it that none does",
                stacklevel=3,
            )
        yield
