"""Files that are whole or not there (written beside, flushed to the disk, renamed), and files that one process at a time holds."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

# What flock says where a file system has no locks: NFS without its lock service, some network and FUSE mounts.
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


@contextmanager
def write_whole(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """A file that appears under `path` only when the block ended without an error; what was there before stays until then.

    A reader, a crash or a full disk never sees half of it. Raises OSError of the failing call; nothing is left behind then.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut (a no-op where folders can't be opened, as on Windows)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Holds the lock file `path` for the block; the system gives it back when its holder ends, however it ends.

    Yields whether it is held: False where the file system, or the system (Windows), has no such locks. The caller says what that means.
    Raises BlockingIOError when another process has it and `wait` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("ab") as file:
            held = _flock(file.fileno(), wait)
            if held and not _stands_under(path, file.fileno()):  # its last holder has deleted it in the meantime
                continue
            yield held
            return


def _flock(descriptor: int, wait: bool) -> bool:
    try:
        import fcntl
    except ModuleNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


def _stands_under(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
