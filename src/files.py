"""Atomic writes (temporary file, fsync, rename), file locks and checksums."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

# What flock answers on file systems without locks: NFS without its lock service, some network and FUSE mounts.
UNSUPPORTED_LOCK_ERRNOS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb", check: Callable[[], None] = lambda: None) -> Iterator[IO]:
    """Opens a temporary file that replaces `path` when the block ends without an error, and `check` raises none.

    Until then an earlier `path` stays as it was: a reader, a crash or a full disk never leaves a partial file under the
    final name. Text modes use UTF-8. On any error the temporary file is removed and the error raised.
    """
    path = Path(path)
    # In the same folder, because a rename is atomic only within one file system. Hidden and with the process id, so
    # that two writers don't share it and `run_folder.remove_leftovers` recognizes it after a kill.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # A file name may be no valid text (os.fsdecode gives it lone surrogates). As escapes these are what JSON has.
        text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
        with open(temporary, mode, **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            # Before the rename: otherwise a power failure could leave the new name with no content.
            os.fsync(file.fileno())
        check()
        os.replace(temporary, path)
    except BaseException:  # KeyboardInterrupt included
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_twice(path: Path, write: Callable[[], None]) -> None:
    """Call `write`, which writes `path`, and again when it fails, as network file systems fail for a moment.

    Raises OSError with the path for the second failure: the run stops rather than train without saves.
    """
    for attempt in (1, 2):
        try:
            write()
            return
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a failed write
            if attempt == 2:
                raise OSError(
                    f"{path} could not be written ({str(error).splitlines()[0]}). Weights saved before are complete: "
                    "free disk space or repair the folder and run the same command again, which continues from them"
                ) from error


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """As `atomic_write`, for a library that opens the file by its name, and may put another file in its place: yields
    the temporary path. `path` gets the permissions of a new file, whatever the library chose."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # by the umask, which can't be read without setting it
        yield temporary
        with open(temporary, "rb+") as file:  # for writing, as Windows requires of a file that is synced
            os.fsync(file.fileno())
        temporary.chmod(mode)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def whole_folder(path: Path, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yields a new folder that takes the place of `path` when the block ends without an error, and `check` raises
    none: for files that belong together."""
    # Beside it and then renamed; `run_folder.remove_leftovers` knows the names.
    new, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}tmp") for kind in ("", "replaced."))
    try:
        new.mkdir(parents=True)
        yield new
        check()
        if path.exists():
            path.rename(old)
        new.rename(path)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Flushes to the disk what another program wrote to a file."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` survive a power failure (a no-op where folders can't be opened, as on Windows)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Creates a folder, its parents too, so that it survives a power failure: the names of new folders are flushed."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


@contextmanager
def file_lock(path: Path, wait: bool, warn: bool = True) -> Iterator[bool]:
    """Holds an exclusive lock on the file `path` during the block; the system releases it when the process ends.

    Yields whether the lock is held: False where the file system or the operating system (Windows) doesn't support
    locks. The block runs in that case too, after a warning unless `warn` is False.
    Raises BlockingIOError when another process holds the lock and `wait` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("ab") as file:
            held = _flock(file.fileno(), wait)
            # The previous holder may have deleted the file while we waited; others would then lock a new file of the
            # same name, so this lock would exclude nobody.
            if held and not _is_same_file(path, file.fileno()):
                continue
            if not held and warn:
                warnings.warn(
                    f"{path.parent}: the file system doesn't support locks; make sure that no other process works in "
                    "this folder at the same time",
                    stacklevel=3,  # the caller's `with` statement
                )
            yield held
            return


def _flock(descriptor: int, wait: bool) -> bool:
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in UNSUPPORTED_LOCK_ERRNOS:
            return False
        raise
    return True


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal, read in blocks of 4 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
