"""Ranks for tests of what several processes do: `python -c` or `-m` programs that call `join_ranks` first."""

import os
import sys

from src.training.distributed.launch import launch
from src.training.distributed.process_group import ProcessGroup, join
from src.training.distributed.ranks import is_supervised
from src.training.distributed.restarts import RestartPolicy


def join_ranks(processes: int, timeout: float = 60) -> ProcessGroup:
    """The group of this rank, one of `processes`. In the first process: starts them all, and ends with their code."""
    if processes > 1 and not is_supervised(os.environ):
        sys.exit(launch(processes, RestartPolicy()))
    return join("cpu", timeout)
