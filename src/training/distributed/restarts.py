"""Which failures of ranks are worth another attempt, and the message about one."""

from __future__ import annotations

import re
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

from src.terminal import show
from src.training.console import log_error
from src.training.distributed.failure import Cause

STOPS = {129, 130, 143}  # exit codes: by a signal of the user, or of an agent that makes room for another machine
NO_RESTART = {2, 124, *STOPS}  # a mistake of the user; --time_limit


@dataclass
class RestartPolicy:
    """What follows from a failure of ranks: whether all start again, the message, the exit code."""

    max_restarts: int = 0
    is_elastic: bool = False  # whether machines may join and leave
    where_it_continues: Callable[[int], str] = lambda step: ""  # of the message about a failure in a step
    stop_signal: int = 0  # of the user: no rank is started again
    last: Cause | None = None

    def restarts_left(self, cause: Cause, world_size: int, left: int) -> int:
        """How many of the restarts that were `left` are now; 0 ends the run. Reports the failure."""
        cause = replace(cause, resume_point=self.where_it_continues(-1))
        before, self.last = self.last, cause
        if self.is_elastic and cause.exit_code in STOPS and not self.stop_signal:
            log_error("a machine joins or leaves: all processes start again")
            return left + 1  # torch counts this one, too
        if self.stop_signal or not may_restart(cause, before):
            left = 0
        if self.stop_signal and cause.exit_code == -signal.SIGTERM:  # it hadn't begun to train
            return left
        if cause.traceback:
            show(cause.traceback, file=sys.stderr)
        rank = f"rank {cause.rank} of {world_size} ({socket.gethostname()})"
        if message := describe(cause, before, rank, left - 1, self.max_restarts, self.where_it_continues(cause.step)):
            log_error(message)
        return left

    @property
    def exit_code(self) -> int:
        """Of a run that has failed or was stopped."""
        code = self.last.exit_code if self.last else 0
        return code if code > 0 else (128 + self.stop_signal if self.stop_signal else 1)


def is_repeated(cause: Cause, before: Cause | None) -> bool:
    """Whether ranks have failed in the same way as the time before: the same rank with the same error in the same step.
    Or by the same error of the file system, where no state was saved since: a full disk stays full."""
    if before is None:
        return False
    if cause.is_os_error and before.is_os_error and cause.resume_point == before.resume_point:
        return _without_numbers(cause.message) == _without_numbers(before.message)
    return (before.rank, before.message, before.step) == (cause.rank, cause.message, cause.step)


def may_restart(cause: Cause, before: Cause | None) -> bool:
    """Whether another attempt may end in another way."""
    return cause.can_restart and cause.exit_code not in NO_RESTART and not is_repeated(cause, before)


def describe(cause: Cause, before: Cause | None, rank: str, left: int, max_restarts: int, where: str) -> str:
    """The line about a failure of `rank` ("rank 1 of 4 (host)"), after which `left` restarts are left, -1 if the run
    ends. `where` says where it continues. Empty after a stop, which rank 0 has reported."""
    if cause.exit_code in NO_RESTART - {2}:
        return ""
    # a mistake that rank 0 found is one of all ranks
    what = cause.message if (cause.rank, cause.exit_code) == (0, 2) else f"{rank}: {cause.message}"
    if left >= 0:
        more = f"{left} more restart{'s' * (left != 1)} (--max_restarts {max_restarts})"
        return f"{what}; all processes start again, {where}; {more}"
    if is_repeated(cause, before):
        assert before is not None
        place = f" in step {cause.step + 1}" if cause.step == before.step else ", and no state was saved since"
        return f"{what}; the same error again{place}, so the processes are not started again"
    return f"{what}; the same command continues the run" if may_restart(cause, before) else what


def _without_numbers(message: str) -> str:
    """Steps and numbers of processes differ, in the names of files too."""
    return re.sub(r"\d+", "", message)
