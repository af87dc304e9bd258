"""train.py with a fault in one rank. `python -m tests.faults.rank_main FLAGS`, started for each rank in the same way.

RANK_FAULT in the environment: JSON of {"rank", "phase", "fault", "note"}. When that rank enters the phase it writes its
process number to the file `note` and is killed, stopped, raises an exception, or its main thread freezes while its
other threads go on. Once: not when the ranks are started again, unless "always" is set. With {"pids": FOLDER} each rank
writes its process number to FOLDER/RANK.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAULTS = ("kill", "pause", "stop", "freeze", "raise")  # pause: stopped, and continued by the one who started the run
# The calls at whose beginning a phase begins: module, attribute; the number of the call.
PHASES = {
    "start": None,  # the first line of the program
    "join": ("src.training.distributed.process_group", "_connect", 1),
    "agree": ("src.training.run", "_run_mode", 1),
    "build": ("src.training.trainer", "build_model", 1),
    "first step": ("src.training.module.TrainingModule", "training_step", 1),
    "step": ("src.training.module.TrainingModule", "training_step", 6),
    "save": ("src.training.checkpoint.callbacks.CheckpointCallback", "_save", 2),
    "write": ("src.training.checkpoint.storage.StateWriter", "_write_shards", 2),  # in the thread
    "publish": ("src.training.checkpoint.storage.StateWriter", "_on_rank_zero", 4),
    "weights": ("src.training.checkpoint.results.Results", "write", 2),
    "validation": ("src.training.module.TrainingModule", "validation_step", 2),
    "end": ("src.training.checkpoint.callbacks.CheckpointCallback", "on_train_end", 1),
    "shutdown": ("src.training.distributed.process_group.DistributedProcessGroup", "shutdown", 1),
}


def suffer(fault: str, note: Path) -> None:
    note.write_text(str(os.getpid()))
    if fault == "raise":
        raise ValueError("a fault of the test")
    if fault == "freeze":
        time.sleep(1e6)
    os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)


def at_call(path: str, name: str, number: int, action: Callable[[], None]) -> None:
    """Before the n-th call of a function or method, do `action`."""
    import importlib

    owner: Any
    try:
        owner = importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, owner_name = path.rpartition(".")
        owner = getattr(importlib.import_module(module), owner_name)
    original, calls = getattr(owner, name), 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            action()
        return original(*args, **kwargs)

    setattr(owner, name, called)


def main() -> int:
    planned = json.loads(os.environ.get("RANK_FAULT", "{}"))
    if "pids" in planned and "RANK" in os.environ:
        Path(planned["pids"], os.environ["RANK"]).write_text(str(os.getpid()))
    is_due = "phase" in planned and (planned.get("always") or not Path(planned["note"]).exists())
    if is_due and os.environ.get("RANK") == str(planned["rank"]):  # not in the agent, which has no rank

        def action() -> None:
            suffer(planned["fault"], Path(planned["note"]))

        hook = PHASES[planned["phase"]]
        action() if hook is None else at_call(*hook, action)
    from training_runs import without_figures

    without_figures()
    import train

    return train.main()


if __name__ == "__main__":
    sys.exit(main())
