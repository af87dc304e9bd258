"""SIGKILL of a random one of three ranks at a random moment, every third time during a save: the agent heals the run.

    python -m tests.faults.kills [--count N] [--seed S] [--continue FILE] [--case I]

Without another command the run ends with the weights, losses and log lines of the run that was never disturbed.
"""

import os
import random
import signal
import time
from pathlib import Path

import torch
from training_runs import CTX, flags, log_lines, losses

from src.run_folder import STATES
from tests.faults.campaign import Outcome, run_cases
from tests.faults.ranks import RANKS, start
from tests.faults.runs import SECONDS, finish, summary, workshop

STEPS = 30


def argv(run: Path) -> list[str]:
    return flags(
        run, workshop().data, devices=RANKS, n_layer=1, n_embd=16, micro_bsz=1, my_exit_tokens=CTX * RANKS * STEPS,
        epoch_steps=10, epoch_save=1, save_minutes=0.005, dist_timeout=30,
    )  # fmt: skip


def case(number: int, chance: random.Random) -> Outcome:
    whole, run, in_save = _undisturbed(), workshop().new_folder(f"kills-{number}"), number % 3 == 0
    rank, after = chance.randrange(RANKS), chance.randrange(STEPS - 2)
    what = f"rank {rank}, {'during a save ' if in_save else ''}after step {after}"
    numbers = workshop().new_folder(f"numbers-{number}")
    process = start(argv(run), {"pids": str(numbers)})
    reached = _wait(lambda: _steps(run) > after, process)
    if in_save:
        reached = reached and _wait(lambda: any((run / STATES).glob(".step-*.tmp")), process)
    if reached:
        os.kill(int((numbers / str(rank)).read_text()), signal.SIGKILL)
    ended = finish(process, SECONDS)
    if not reached:
        return Outcome("not reached", detail=f"{what}\n{ended.output}")
    wrong = summary(ended) if ended.code != 0 else _difference(run, whole)
    if not wrong and f"rank {rank} of {RANKS} (" not in ended.output:
        wrong = "nothing was said"
    return Outcome(
        "killed during a save" if in_save else "killed", (f"{what}: {wrong}",) if wrong else (), ended.output
    )


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
