"""Power cuts at any moment of a run; what is left is continued by the same command, to complete weights and logs.

    python -m tests.faults.power [--count N] [--seed S] [--continue FILE] [--case I]

A cut is a position in the log of the run's system calls and a model of the disk (disk.py). Of two runs: one from the
start, and one that continues a run that was killed.
"""

import functools
import random
import shutil

from tests.faults.campaign import Outcome, run_cases
from tests.faults.disk import MODELS, Disk, Recording
from tests.faults.library import Fault
from tests.faults.runs import start, summary, workshop


@functools.cache
def recording(name: str) -> Recording:
    """The calls of a run "from the start" or "continued"."""
    shop = workshop()
    if name == "from the start":
        return shop.recorded
    folder = shop.new_folder("continued")
    # killed in its middle: after half of the fsyncs of a whole run
    start(shop.argv(folder), Fault(folder, shop.counts, "fsync", shop.calls["fsync"] // 2, "kill after"))
    return shop.record(folder)[0]


def case(number: int, chance: random.Random) -> Outcome:
    shop, model = workshop(), MODELS[number % len(MODELS)]
    recorded = recording(chance.choice(["from the start", "continued"]))
    cut = chance.randint(1, len(recorded.calls))
    disk = Disk(recorded.before)
    for call in recorded.calls[:cut]:
        disk.replay(call)
    folder = shop.new_folder(f"cut-{number}")
    disk.write(folder, model, chance)
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    ended = start(shop.argv(folder))
    wrong = shop.difference(folder) if ended.code == 0 else summary(ended)
    shutil.rmtree(folder)
    last = recorded.calls[cut - 1]
    detail = f"cut after call {cut}, {last.kind} {last.path}; left: {left}\n{ended.output}"
    if ended.code == 0 and wrong.startswith("other"):
        # complete, and continued from weights without their optimizer state: promised for power cuts
        return Outcome(f"{model}: complete, continued from weights", detail=detail)
    return Outcome(model, (f"{model}: {wrong}",) if wrong else (), detail)


if __name__ == "__main__":
    run_cases("power", case)
