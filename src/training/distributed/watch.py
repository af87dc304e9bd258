"""What a rank watches in threads of its own: the process that started it, and whether steps end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

from src.training.console import log_error
from src.training.distributed.ranks import AGENT, is_supervised

PARENT_SECONDS = 50  # for a rank to save its state when its agent has been killed
STANDSTILL_SECONDS = 60.0


def watch_parent() -> None:
    """When the process that started this rank has ended, save the state and end as well."""
    parent = int(os.environ.get(AGENT, 0)) if is_supervised(os.environ) else os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        log_error(f"rank {os.environ.get('RANK', 0)} stops: the process that started it has ended")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PARENT_SECONDS)
        os._exit(1)  # the main thread may be in a collective that never returns

    threading.Thread(target=watch, daemon=True, name="parent").start()


def watch_steps(current_step: Callable[[], int], dist_timeout: float) -> None:
    """Say when no step has ended for long, once each time, before a collective operation times out."""
    begin, longest, ended, step, is_reported = time.monotonic(), 0.0, 0, current_step(), False
    while True:
        time.sleep(1)
        now = time.monotonic()
        if current_step() != step:
            ended, step = ended + 1, current_step()
            longest = max(longest, now - begin if ended > 2 else 0)  # the first includes the start
            begin, is_reported = now, is_reported and ended <= 2  # a slow start is reported once
        elif not is_reported and now - begin >= max(STANDSTILL_SECONDS, 5 * longest):
            is_reported = True
            log_error(
                f"rank {os.environ['RANK']}: no step has ended for {now - begin:.0f} s: a process starts, saves, "
                f"validates or hangs. One that waits {dist_timeout:.0f} s for others fails (--dist_timeout)"
            )
