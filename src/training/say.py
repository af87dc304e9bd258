"""What train.py says: once, whatever the number of processes; mistakes on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from pytorch_lightning.utilities import rank_zero_only
from tqdm import tqdm


class _Outlet:
    """A stream whose reader may go away (a closed terminal, `| head`, a full disk): from then on nothing is written, and nothing raised."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._to_nowhere()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._to_nowhere()

    def _to_nowhere(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # what the stream holds back still has to go somewhere
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_the_listener() -> None:
    """A run goes on when nobody reads what it says: its logs are files."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        setattr(sys, name, _Outlet(open(os.devnull, "w") if stream is None else stream))  # noqa: SIM115 (for the process's life)


def is_first() -> bool:
    """Whether this is the process that speaks and writes the files (global rank 0)."""
    return getattr(rank_zero_only, "rank", 0) == 0


@rank_zero_only
def say(text: str) -> None:
    tqdm.write(text)  # above the live line, where there is one
    sys.stdout.flush()


def say_error(text: str) -> None:
    print(f"train.py: {text}", file=sys.stderr, flush=True)


@contextmanager
def only_warn(name: str) -> Iterator[None]:
    """For what shows a run beside its weights and logs: the run is none the worse without it, and says so."""
    try:
        yield
    except Exception as error:
        say(f"WARNING: no {name}: {type(error).__name__}: {error}. Weights and logs have nothing to do with it")
