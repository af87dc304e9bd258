"""What a rank that fails leaves for the agent in torch's error file, and which of several failures is the cause."""

from __future__ import annotations

import json
import math
import os
import signal
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from src.files import atomic_write
from src.training.console import log_error

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure  # a rank doesn't need the agent

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
USER_ERROR = 2  # the exit code for a mistake of the user
CAUSE_SECONDS = 5  # a rank that was killed less than this after an exception elsewhere was killed before it


def record_failure(
    error: BaseException, message: str, code: int, *, step: int, can_restart: bool, is_expected: bool
) -> None:
    """Write torch's error file, in the form of torch.distributed.elastic's ErrorHandler, if an agent asks for one.

    `code`: the exit code to come; the agent may end this process before it has left. `step`: optimizer steps taken.
    `can_restart`: whether another attempt may succeed. Of an error that is not
    `is_expected` the traceback is shown, too.
    """
    if not (path := os.environ.get(ERROR_FILE)):
        return
    extra = {
        "py_callstack": "" if is_expected else "".join(traceback.format_exception(error)),
        "timestamp": str(int(time.time())),
        "exit_code": code,
        "step": step,
        "can_restart": can_restart,
        # of the file system: those of connections pass
        "is_os_error": isinstance(error, OSError) and not isinstance(error, (ConnectionError, TimeoutError)),
    }
    # whole or not there: the agent would fail on half a file of a process that is killed
    try:
        with atomic_write(Path(path), "w") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
    except OSError as no_file:  # no space for temporary files: the error itself must not be lost
        log_error(f"{message} ({path} can't be written: {no_file.strerror})")


@dataclass(frozen=True)
class Cause:
    """The failure that the others follow from. `step`: the furthest that a rank reports, -1 if none does.
    `resume_point`: where the run continued if it were started now."""

    rank: int
    exit_code: int
    message: str
    traceback: str = ""
    step: int = -1
    can_restart: bool = True
    is_os_error: bool = False
    resume_point: str = ""


def with_recorded(
    failures: Mapping[int, ProcessFailure], error_files: Mapping[int, str], first_rank: int
) -> dict[int, ProcessFailure]:
    """The failures that the agent has seen, by rank, and those of ranks of its machine that have recorded an error and
    not ended yet: the others, which they leave behind, may end before them. `error_files` by local rank."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    recorded = {
        first_rank + local: ProcessFailure(local, pid=0, exitcode=1, error_file=path)
        for local, path in error_files.items()
        if Path(path).is_file()
    }
    return {**recorded, **failures}


def cause_of(failures: Mapping[int, ProcessFailure]) -> Cause:
    """The cause among failures by rank.

    A process that was killed leaves no file. The others notice by their collectives, which fail: later, in any case.
    """
    began = {rank: _began(failure) for rank, failure in failures.items()}
    first = min(began.values())
    extras = {r: _extra(f) for r, f in failures.items()}
    killed = [r for r, f in failures.items() if f.exitcode < 0 and not extras[r] and began[r] <= first + CAUSE_SECONDS]
    rank = killed[0] if killed else min(began, key=lambda rank: began[rank])
    if all(extras.get(r, {}).get("exit_code") == USER_ERROR for r in (0, rank)):
        rank = 0  # all find it, and another one was faster
    failure = failures[rank]
    step = max((extra["step"] for extra in extras.values() if extra), default=-1)
    if extra := extras[rank]:
        message = failure.error_file_data["message"]["message"]
        shown, can_restart, is_os_error = extra["py_callstack"], extra["can_restart"], extra["is_os_error"]
        return Cause(rank, extra["exit_code"], message, shown, step, can_restart, is_os_error)
    if failure.exitcode < 0:
        message = f"was killed by signal {-failure.exitcode} ({failure.signal_name()})"
    else:
        message = f"ended with code {failure.exitcode}"
    return Cause(rank, failure.exitcode, message, step=step)


def _began(failure: ProcessFailure) -> float:
    path = Path(failure.error_file)
    if path.is_file():
        return path.stat().st_mtime
    return math.inf if failure.exitcode == -signal.SIGTERM else failure.timestamp  # the agent ends those that are left


def _extra(failure: ProcessFailure) -> dict:
    message = failure.error_file_data["message"]
    return message.get("extraInfo", {}) if isinstance(message, dict) else {}
