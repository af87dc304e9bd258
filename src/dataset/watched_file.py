"""A data file that is read by position while a run lasts, and that notices when it is truncated or replaced."""

import os
from pathlib import Path

from src.errors import UserError

ADVICE = "put the file back that the run began with and run the same command again: it continues from its newest state"


class DataFileError(UserError):
    """A file of the data can't be read any more, or is not the one that was opened: what it holds may be anything."""


class WatchedFile:
    """A file, opened for reading. It is read by `pread` rather than through a memory map: where the file was truncated
    meanwhile, or the disk fails, that gives an error in place of a SIGBUS, which ends the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        self._identity = _identity(os.fstat(self._file.fileno()))

    def read(self, position: int, size: int) -> bytes:
        """`size` bytes from byte `position` on. Raises DataFileError where the file ends before, or the disk fails."""
        data = self._read_some(position, size)
        while len(data) < size:  # the system may return less than asked for, 2 GiB at most
            more = self._read_some(position + len(data), size - len(data))
            if not more:
                self.check()
                end = position + len(data)
                raise DataFileError(f"ends after {end} bytes, not {position + size}", given=self.path, advice=ADVICE)
            data += more
        return data

    def _read_some(self, position: int, size: int) -> bytes:
        try:
            return _pread(self._file.fileno(), size, position)
        except OSError as error:
            raise DataFileError(f"can't be read ({error.strerror})", given=self.path, advice=ADVICE) from error

    def check(self) -> None:
        """Raises DataFileError unless the file of this name is still the one that was opened, with its size and time
        of modification."""
        try:
            now = _identity(self.path.stat())
        except FileNotFoundError:
            raise DataFileError("was removed while it was in use", given=self.path, advice=ADVICE) from None
        if now != self._identity:
            (size, *_), (size_now, *_) = self._identity, now
            what = f"it has {size_now} bytes, it had {size}" if size != size_now else "it was written again"
            raise DataFileError(f"changed while it was in use: {what}", given=self.path, advice=ADVICE)


def _identity(stat: os.stat_result) -> tuple[int, int, int, int]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_dev


def _pread(descriptor: int, size: int, position: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, position)
    os.lseek(descriptor, position, os.SEEK_SET)  # Windows
    return os.read(descriptor, size)
