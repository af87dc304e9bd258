"""One of three ranks is killed, paused, stopped, frozen or raises in a phase of a run: the run heals, or all ranks end.

    python -m tests.faults.ranks [--count N] [--seed S] [--continue FILE] [--case I]

Within BOUND_SECONDS the ranks have been started again and the run has gone on to its end, or every process has ended
with a reason; then the same command, undisturbed, completes the run. Weights, losses and logs are those of the run that
was never disturbed, to the bit.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import warm_process
from training_runs import CTX, ROOT, flags, log_lines, losses

from tests.faults.campaign import Outcome, run_cases
from tests.faults.rank_main import FAULTS, PHASES
from tests.faults.runs import SECONDS, Ended, finish, plain, summary, workshop

RANKS, STEPS = 3, 8
BOUND_SECONDS = 75.0  # from the fault to the end of the last process
PAUSE_SECONDS = 5.0
DIST_TIMEOUT = 30


def argv(run: Path) -> list[str]:
    shop = workshop()
    return flags(
        run, shop.data, devices=RANKS, n_layer=1, n_embd=16, micro_bsz=1, my_exit_tokens=CTX * RANKS * STEPS,
        epoch_steps=2, epoch_save=1, val_data_file=shop.held_out, val_windows=3, val_every="2steps",
        dist_timeout=DIST_TIMEOUT,
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
    if not wrong and first.code != 0:
        again = finish(start(argv(run)), SECONDS)
        detail += f"\n---- the next start\n{again.output}"
        wrong = "" if again.code == 0 else f"the next start: {summary(again)}"
    # killed before the first state: the moments are lost with it
    is_exact = "with a fresh optimizer" not in detail
    wrong = wrong or (_difference(run) if is_exact else "")
    end = "healed" if first.code == 0 and "start again" in first.output else f"code {first.code}"
    return Outcome(f"{fault}, {phase}: {end}", (f"{what}: {wrong}",) if wrong else (), detail)


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
    # of an exception, and of a collective operation that waits for a frozen rank
    if "Traceback" in ended.output and fault not in ("raise", "freeze"):
        return summary(ended)
    told = [line for line in ended.output.splitlines() if line.startswith("train.py: rank ")]
    if fault == "pause" and (told or ended.code != 0):
        return f"a pause of {PAUSE_SECONDS:.0f} s ended the run: {summary(ended)}"
    if fault != "pause" and len(told) != 1:
        return f"{len(told)} reasons are given: {plain(ended.output[-200:])}"
    return ""


def _difference(run: Path) -> str:
    whole = _undisturbed()
    weights, expected = (torch.load(folder / "rwkv-final.pth") for folder in (run, whole))
    if not all(torch.equal(weights[name], expected[name]) for name in expected):
        return "other weights"
    if len(losses(run)) != STEPS or [int(line[0]) for line in log_lines(run)] != list(range(STEPS // 2)):
        return "logs lack or repeat lines"
    return "" if losses(run) == losses(whole) else "other losses"


def _undisturbed() -> Path:
    whole = workshop().folder / "whole of three"
    if not (whole / "rwkv-final.pth").exists():
        ended = finish(start(argv(whole)), SECONDS)
        assert ended.code == 0, ended.output
    return whole


if __name__ == "__main__":
    run_cases("ranks", case)
