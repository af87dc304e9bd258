"""What train.py prints: once, whatever the number of processes; errors on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from pytorch_lightning.utilities import rank_zero_only
from tqdm import tqdm

from src.terminal import printable, show


def is_rank_zero() -> bool:
    """Whether this process is global rank 0, the one that prints and writes the files of a run."""
    # Lightning keeps the rank there; it is set before the first process group exists, and absent in a plain process
    return getattr(rank_zero_only, "rank", 0) == 0


@rank_zero_only
def log(text: str) -> None:
    """Print a line on rank 0."""
    tqdm.write(printable(text))  # above the progress bar, where there is one
    sys.stdout.flush()  # a pipe is block-buffered: the line has to be seen now


def log_error(text: str) -> None:
    """Print an error on stderr, on whichever rank it is called."""
    show(f"train.py: {text}", file=sys.stderr)


@contextmanager
def warn_on_error(name: str) -> Iterator[None]:
    """Turn an error into a warning: for figures and reports, which a run does not need."""
    try:
        yield
    except Exception as error:
        log(f"WARNING: {name} not written: {type(error).__name__}: {error}. Weights and logs are not affected")


def ignore_broken_pipe() -> None:
    """Let a run continue when its terminal or pipe is gone: its logs are files."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # open for the life of the process
        setattr(sys, name, _Unbreakable(open(os.devnull, "w") if stream is None else stream))  # noqa: SIM115


class _Unbreakable:
    """A stream that writes to os.devnull once its reader is gone (closed terminal, `| head`, full disk) instead of
    raising."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._redirect_to_devnull()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._redirect_to_devnull()

    def _redirect_to_devnull(self) -> None:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, self._stream.fileno())  # the descriptor stays valid: the stream still flushes its buffer to it
        os.close(devnull)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
