"""A function over a stream of items on several processes: results in the order of the items, memory bounded."""

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
    """Cores that this process may use: fewer than the machine has in a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare() -> None:
    """In a new worker: leaves Ctrl-C to the main process, ends when that one is killed, and keeps to one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the only way to tell it to the package `tokenizers`
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)  # else it would wait for work for ever, and hold the files and locks that it inherited

    threading.Thread(target=follow, daemon=True).start()


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`map(function, items)`; one worker is this process itself.

    At most three items a worker are on the way, so that a long stream doesn't pile up. An error in the function comes
    out where its result would; ValueError when a worker was killed.
    """
    if workers == 1:
        yield from map(function, items)
        return
    # Forked workers share the memory of what is loaded already; elsewhere than on Linux forking isn't safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, _prepare)
    try:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError("A worker process was killed, most likely for want of memory: use fewer --workers.") from error
    finally:
        pool.shutdown(cancel_futures=True)
