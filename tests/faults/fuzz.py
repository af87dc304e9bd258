"""Mutated inputs for every reader: each is read, or refused with a sentence, within bounds of time and memory.

    python -m tests.faults.fuzz [--count N] [--seed S] [--continue FILE] [--case I]

A case is a batch of inputs for one reader, in a forked process with limited address space and CPU time. Inputs that end
in a new way, at another line of the project or with another message, are mutated further within the batch.
"""

import mmap
import os
import pickle
import random
import re
import resource
import signal
import tempfile
import traceback
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from warm_process import PR_SET_PDEATHSIG, prctl

from tests.faults.campaign import Outcome, run_cases
from tests.faults.readers import READERS, REFUSALS, Reader

BATCH = 250
CPU_SECONDS, SECONDS = 10, 120  # for one input: of computing, and in all on a busy machine
MEMORY_BYTES = 2 << 30
DEATHS = 3  # of a batch, after which the rest of it is left out
SOURCES = str(Path(__file__).parents[2] / "src")


def case(number: int, chance: random.Random) -> Outcome:
    name = list(READERS)[number % len(READERS)]
    reasons: dict[str, bytes] = {}
    current = mmap.mmap(-1, 8 + (1 << 22))  # shared with the child: how many inputs it has tried, and the newest
    tried = deaths = 0
    while tried < BATCH:
        own_chance = random.Random(chance.random())
        ended, found = _in_child(partial(_batch, READERS[name], own_chance, BATCH - tried, current))
        reasons.update(found or {})
        done = int.from_bytes(current[:4], "little")
        tried += done
        if ended != 0:
            data = current[8 : 8 + int.from_bytes(current[4:8], "little")]
            reasons[_death(ended)] = data
            deaths += 1
            if deaths == DEATHS:
                break
    detail = "\n".join(f"{reason}\n    {data[:2000]!r}" for reason, data in reasons.items())
    return Outcome(name, tuple(f"{name}: {reason}" for reason in reasons), detail, tried)


def _death(status: int) -> str:
    if status == -signal.SIGPROF:
        return f"more than {CPU_SECONDS} s of computing"
    if status == -signal.SIGALRM:
        return f"no end within {SECONDS} s"
    return f"the process ended by signal {-status}" if status < 0 else f"the process ended with code {status}"


def _in_child(work: Any) -> tuple[int, Any]:
    """The exit status of a forked process that does `work`, and what that returned."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _child(work, write_end)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        content = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), pickle.loads(content) if content else None


def _child(work: Any, write_end: int) -> NoReturn:
    code = 1
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        with open(write_end, "wb") as pipe:
            pipe.write(pickle.dumps(work()))
        code = 0
    finally:
        os._exit(code)


def _batch(reader: Reader, chance: random.Random, count: int, current: mmap.mmap) -> dict[str, bytes]:
    """Reads `count` inputs. What broke, with an input for each."""
    current[:8] = bytes(8)
    broken: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        folder = Path(name)
        pool = reader.prepare(folder)
        seen = {_end_of(reader, folder, data)[0] for data in pool}
        used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
        for i in range(1, count + 1):
            data = reader.mutate(chance.choice(pool), chance.choice(pool), chance)[: len(current) - 8]
            current[:8] = i.to_bytes(4, "little") + len(data).to_bytes(4, "little")
            current[8 : 8 + len(data)] = data
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            end, reason = _end_of(reader, folder, data)
            if reason:
                broken.setdefault(reason, data)
            elif end not in seen and len(data) < 100_000:
                seen.add(end)
                pool.append(data)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return broken


def _end_of(reader: Reader, folder: Path, data: bytes) -> tuple[str, str]:
    """What tells ends apart, and the reason why this one should not be."""
    try:
        reader.read(folder, data)
    except BaseException as error:
        end = f"{type(error).__name__} at {_place(error)}"
        if _out_of_memory(error):
            return end, f"memory beyond {MEMORY_BYTES >> 30} GiB, {end}"
        if isinstance(error, REFUSALS):
            return f"{end} {re.sub(r'[0-9]+', 'N', str(error))[:60]}", ""
        return end, f"{end}: {error}" if isinstance(error, AssertionError) else end
    return "read", ""


def _place(error: BaseException) -> str:
    """The innermost line of the project."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(SOURCES)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "-"


def _out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


if __name__ == "__main__":
    run_cases("fuzz", case, unit=BATCH)
