"""One of three ranks is killed, paused, stopped or frozen in a phase of a run: the run heals, or all ranks end.

    python -m tests.faults.ranks [--count N] [--seed S] [--continue FILE] [--case I]

Within BOUND_SECONDS every process has ended with a reason, or the run has gone on to its end. Then the same command,
undisturbed, completes the run: as the one that was never disturbed, but for what other orders of summation change.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import warm_process
from training_runs import CTX, ROOT, flags, log_lines, losses

from tests.faults.campaign import Outcome, run_cases
from tests.faults.rank_main import FAULTS, PHASES
from tests.faults.runs import SECONDS, Ended, finish, plain, summary, workshop

RANKS, STEPS = 3, 8
BOUND_SECONDS = 75.0  # from the fault to the end of the last process
PAUSE_SECONDS = 5.0
# what the last lines of a rank's output have to name
REASONS = ("rank", "process", "stopped", "the same command")


def argv(run: Path) -> list[str]:
    shop = workshop()
    return flags(
        run, shop.data, devices=RANKS, n_layer=1, n_embd=16, micro_bsz=1, my_exit_tokens=CTX * RANKS * STEPS,
        epoch_steps=2, epoch_save=1, val_data_file=shop.held_out, val_windows=3, val_every="2steps",
    )  # fmt: skip


def start(argv: list[str], planned: dict | None = None) -> warm_process.Popen:
    """train.py with these flags, of which one rank suffers what is planned."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RANK_FAULT": json.dumps(planned or {})}
    return warm_process.Popen(
        [sys.executable, "-m", "tests.faults.rank_main", *argv], cwd=ROOT, env=environment, text=True,
        stdout=warm_process.PIPE, stderr=warm_process.STDOUT, start_new_session=True, ranks=True,
    )  # fmt: skip


def case(number: int, chance: random.Random) -> Outcome:
    phase = list(PHASES)[number % len(PHASES)]
    fault, rank = chance.choice(FAULTS), chance.randrange(RANKS)
    shop = workshop()
    run, note = shop.new_folder(f"ranks-{number}"), shop.folder / "note"
    note.unlink(missing_ok=True)
    what = f"{fault}, rank {rank}, {phase}"
    process = start(argv(run), {"rank": rank, "phase": phase, "fault": fault, "note": str(note)})
    if not _wait_for(note, process):
        ended = finish(process, 1)
        return Outcome("not reached", detail=f"{what}\n{ended.output}")
    if fault == "pause":
        time.sleep(PAUSE_SECONDS)
        os.kill(int(note.read_text()), signal.SIGCONT)
    begin = time.monotonic()
    first = finish(process, BOUND_SECONDS)
    seconds = time.monotonic() - begin
    wrong = _wrong_end(first, fault)
    detail = f"{what}: {seconds:.1f} s\n{first.output}"
    if not wrong:
        again = finish(start(argv(run)), SECONDS)
        detail += f"\n---- the next start\n{again.output}"
        wrong = _difference(run) if again.code == 0 else f"the next start: {summary(again)}"
    return Outcome(f"{fault}, {phase}", (f"{what}: {wrong}",) if wrong else (), detail)


def _wait_for(note: Path, process: warm_process.Popen) -> bool:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and not (note.exists() and note.read_text()):
        if process.poll() is not None:
            return note.exists()
        time.sleep(0.02)
    return note.exists()


def _wrong_end(ended: Ended, fault: str) -> str:
    if ended.code is None:
        return f"a process has not ended within {BOUND_SECONDS:.0f} s"
    if "Traceback" in ended.output:
        return summary(ended)
    if fault == "pause" and ended.code != 0:
        return f"a pause of {PAUSE_SECONDS:.0f} s ended the run: {summary(ended)}"
    if ended.code != 0 and not any(reason in ended.output for reason in REASONS):
        return f"no reason is given: {plain(ended.output[-200:])}"
    return ""


def _difference(run: Path) -> str:
    weights = torch.load(run / "rwkv-final.pth")
    if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
        return "weights that are not finite"
    if len(losses(run)) != STEPS or [int(line[0]) for line in log_lines(run)] != list(range(STEPS // 2)):
        return "logs lack or repeat lines"
    expected = _undisturbed()
    return "" if np.allclose(losses(run), expected, atol=1e-3) else "other losses"


def _undisturbed() -> list[float]:
    whole = workshop().folder / "whole of three"
    if not (whole / "rwkv-final.pth").exists():
        ended = finish(start(argv(whole)), SECONDS)
        assert ended.code == 0, ended.output
    return losses(whole)


if __name__ == "__main__":
    run_cases("ranks", case)
