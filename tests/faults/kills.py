"""SIGKILL of a random one of three ranks at a random moment, every third time during a save: the agent heals the run.

    python -m tests.faults.kills [--count N] [--seed S] [--continue FILE] [--case I]

Without another command the run ends with the weights, losses and log lines of the run that was never disturbed.
"""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import torch
from training_runs import CTX, flags, log_lines, losses
from warm_process import Popen

from src.run_folder import STATES
from tests.faults.campaign import Outcome, run_cases
from tests.faults.ranks import RANKS, start
from tests.faults.runs import SECONDS, finish, summary, workshop

STEPS, ATTEMPTS = 30, 5


def argv(run: Path, save_minutes: float = 0.005) -> list[str]:
    return flags(
        run, workshop().data, devices=RANKS, n_layer=1, n_embd=16, micro_bsz=1, my_exit_tokens=CTX * RANKS * STEPS,
        epoch_steps=10, epoch_save=1, save_minutes=save_minutes, dist_timeout=30,
    )  # fmt: skip


def case(number: int, chance: random.Random) -> Outcome:
    """A run may end before its moment has come: another moment is chosen then, in a run of its own."""
    whole, in_save = _undisturbed(), number % 3 == 0
    for attempt in range(ATTEMPTS):
        run, rank, after = (
            workshop().new_folder(f"kills-{number}"),
            chance.randrange(RANKS),
            chance.randrange(STEPS - 2),
        )
        what = f"rank {rank}, {'during a save ' if in_save else ''}after step {after}, attempt {attempt}"
        process = start(argv(run, *[1e-6] * in_save), {"pids": str(workshop().new_folder(f"numbers-{number}"))})
        is_killed = _kill(run, number, rank, after, in_save, process)
        ended = finish(process, SECONDS)
        if is_killed:
            break
    else:
        return Outcome("not reached", (f"{what}: not reached",), ended.output)
    wrong = summary(ended) if ended.code != 0 else _difference(run, whole)
    if not wrong and f"rank {rank} of {RANKS} (" not in ended.output:
        wrong = "nothing was said"
    return Outcome(
        "killed during a save" if in_save else "killed", (f"{what}: {wrong}",) if wrong else (), ended.output
    )


def _kill(run: Path, number: int, rank: int, after: int, in_save: bool, process: Popen) -> bool:
    """Whether the rank was killed at that moment, before the run had ended."""
    reached = _wait(lambda: _steps(run) > after, process)
    if in_save:
        reached = reached and _wait(lambda: any((run / STATES).glob(".step-*.tmp")), process)
    if reached:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int((workshop().folder / f"numbers-{number}" / str(rank)).read_text()), signal.SIGKILL)
            return True
    return False


def _wait(condition, process) -> bool:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if condition():
            return True
        time.sleep(0.001)
    return False


def _steps(run: Path) -> int:
    path = run / "metrics.csv"
    return path.read_text().count("\n") - 1 if path.exists() else -1


def _difference(run: Path, whole: Path) -> str:
    weights, expected = (torch.load(folder / "rwkv-final.pth") for folder in (run, whole))
    if not all(torch.equal(weights[name], expected[name]) for name in expected):
        return "other weights"
    if losses(run) != losses(whole):
        return "other losses"
    return "" if [line[0] for line in log_lines(run)] == [line[0] for line in log_lines(whole)] else "other log lines"


def _undisturbed() -> Path:
    whole = workshop().folder / "whole of the kills"
    if not (whole / "rwkv-final.pth").exists():
        ended = finish(start(argv(whole)), SECONDS)
        assert ended.code == 0, ended.output
    return whole


if __name__ == "__main__":
    run_cases("kills", case)
