"""Which failures of ranks are worth another attempt, and what the user is told about one."""

from __future__ import annotations

from src.training.distributed.failure import Cause

STOPS = {129, 130, 143}  # exit codes: by a signal of the user, or of an agent that makes room for another machine
NO_RESTART = {2, 124, *STOPS}  # a mistake of the user; --time_limit


def is_repeated(cause: Cause, before: Cause | None) -> bool:
    """Whether the same rank has failed with the same error in the same step as the time before."""
    return before is not None and (before.rank, before.message, before.step) == (cause.rank, cause.message, cause.step)


def may_restart(cause: Cause, before: Cause | None) -> bool:
    """Whether another attempt may end in another way."""
    return cause.can_restart and cause.exit_code not in NO_RESTART and not is_repeated(cause, before)


def describe(cause: Cause, before: Cause | None, rank: str, left: int, max_restarts: int, where: str) -> str:
    """The line about a failure of `rank` ("rank 1 of 4 (host)"), after which `left` restarts are left, -1 if the run
    ends. `where` says where it continues. Empty after a stop, which rank 0 has told."""
    if cause.exit_code in NO_RESTART - {2}:
        return ""
    # a mistake that rank 0 found is one of all ranks
    what = cause.message if (cause.rank, cause.exit_code) == (0, 2) else f"{rank}: {cause.message}"
    if left >= 0:
        more = f"{left} more restart{'s' * (left != 1)} (--max_restarts {max_restarts})"
        return f"{what}; all processes start again, {where}; {more}"
    if is_repeated(cause, before):
        return f"{what}; the same error again in step {cause.step + 1}, so the processes are not started again"
    return f"{what}; the same command continues the run" if may_restart(cause, before) else what
