"""Parallel map over a stream on several processes, with results in order and bounded memory."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from src.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def usable_cores() -> int:
    """Number of CPU cores that this process may use; in a container or under taskset fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _initialize_worker() -> None:
    """Makes a worker single-threaded, ignore Ctrl-C, and exit when the main process is killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the only switch that the package `tokenizers` has
    # Ctrl-C reaches the whole process group; the main process handles it and shuts the pool down.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        wait([parent.sentinel])
        # Otherwise it would wait for work forever and keep the files and locks that it inherited by fork.
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`map(function, items)` on `workers` processes; with one worker in the calling process.

    At most three items per worker are in flight, so the memory doesn't depend on the length of the stream. An exception
    of `function` is raised in place of its result. UserError when a worker process was killed.
    """
    if workers == 1:
        yield from map(function, items)
        return
    # Forked workers share the memory of loaded tokenizers; on macOS fork is unsafe, and Windows has none.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, _initialize_worker)
    try:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 3 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        # The pool doesn't tell the reason; the kernel's out-of-memory killer is the usual one.
        raise UserError(
            f"one of {workers} worker processes was killed, most likely because the machine is out of memory",
            advice="use fewer workers (--workers of data/make_data.py) or free memory",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
