"""One system call of a run is killed or fails; then the same command must give the run that was never disturbed.

python -m tests.faults.syscalls [--count N] [--seed S] [--continue FILE] [--case I]
"""

import errno
import random
import shutil
import signal

from tests.faults.campaign import Outcome, run_cases
from tests.faults.library import Fault
from tests.faults.runs import start, summary, workshop

ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ESTALE, errno.EINTR)
# Reads and opens that fail for good mean another folder's permissions, not a fault of the disk; the others are faults.
ACTIONS = {
    "write": ("kill before", "kill within", "kill after", "fail once", "fail for good", "short"),
    "read": ("fail once", "fail for good", "short"),
    "open": ("kill before", "kill after", "fail once", "fail for good"),
    "fsync": ("kill before", "kill after", "fail once", "fail for good"),
    "rename": ("kill before", "kill after", "fail once", "fail for good"),
    "unlink": ("kill before", "kill after", "fail once", "fail for good"),
    "close": ("kill before", "kill after", "fail once"),
    "mkdir": ("kill before", "kill after", "fail once", "fail for good"),
}


def case(number: int, chance: random.Random) -> Outcome:
    shop, kind = workshop(), chance.choice(list(ACTIONS))
    action, which = chance.choice(ACTIONS[kind]), chance.randint(1, max(1, shop.calls[kind]))
    # Python repeats an interrupted call: one that is interrupted for ever never returns on any system
    error = chance.choice([e for e in ERRORS if not (action == "fail for good" and e == errno.EINTR)])
    fault = Fault(shop.new_folder(f"case-{number}"), shop.counts, kind, which, action, error)
    what = f"{kind}: {action}{f' with {errno.errorcode[error]}' if action.startswith('fail') else ''}"
    first = start(shop.argv(fault.folder), fault)
    if fault.calls()[kind] < which:
        return Outcome("not reached")
    killed = action.startswith("kill")
    detail = f"{fault}\n{first.output}"
    if "Traceback" in first.output or first.code not in ((-signal.SIGKILL,) if killed else (0, 1, 2)):
        return Outcome(what, (f"{what}: {summary(first)}",), detail)
    again = start(shop.argv(fault.folder))
    wrong = shop.difference(fault.folder) if again.code == 0 else f"the next start: {summary(again)}"
    if wrong and "with a fresh optimizer" in again.output:
        wrong += ", continued with a fresh optimizer"
    shutil.rmtree(fault.folder)
    return Outcome(what, (wrong,) if wrong else (), f"{detail}\n---- the next start\n{again.output}")


if __name__ == "__main__":
    run_cases("syscalls", case)
