"""The short run of train.py that suffers the faults, and its comparison with the run that suffered none."""

import contextlib
import csv
import functools
import os
import re
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import warm_process
from training_runs import CTX, ROOT, flags, log_lines, without_figures

from src.dataset.binidx import BinIdxWriter
from tests.faults.disk import Recording, read_log, snapshot
from tests.faults.library import Fault, faulty_process

SECONDS = 120  # for one start: with many times what it takes
STEPS = 8


@dataclass
class Ended:
    code: int | None  # None: it was still running after SECONDS
    output: str


def start(argv: list[str], fault: Fault | None = None) -> Ended:
    """train.py with these flags to its end, which suffers `fault`."""
    process = warm_process.Popen(
        [sys.executable, "train.py", *argv], warm=faulty_process(), cwd=ROOT, text=True, errors="replace",
        stdout=warm_process.PIPE, stderr=warm_process.STDOUT,
        preexec_fn=functools.partial(_prepare, fault), start_new_session=True,
    )  # fmt: skip
    return finish(process, SECONDS)


def finish(process: warm_process.Popen, seconds: float) -> Ended:
    """Waits until the process, and all that hold the other end of its pipe, have ended; kills its group otherwise."""
    try:
        output, _ = process.communicate(timeout=seconds)
        return Ended(process.returncode, output)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        if isinstance(error, warm_process.TimeoutExpired):
            return Ended(None, output)
        raise


def _prepare(fault: Fault | None) -> None:
    without_figures()
    if fault:
        fault.arm()


class Workshop:
    """A temporary folder with training data, held-out data and the folder of an undisturbed run, `whole`.

    recorded    the system calls of that run
    calls       how many there are of each kind
    """

    def __init__(self) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="faults-")
        self.folder = Path(self._temporary.name).resolve()
        self.counts = self.folder / "counts"
        self.data, self.held_out = (self._write_data(name, seed) for name, seed in (("data", 0), ("held-out", 1)))
        self.whole = self.new_folder("whole")
        self.recorded, self.calls = self.record(self.whole)

    def _write_data(self, name: str, seed: int) -> Path:
        numbers = np.random.default_rng(seed)
        with BinIdxWriter(self.folder / name, np.uint16) as writer:
            for _ in range(40):
                first = int(numbers.integers(1, 30))
                writer.add_document([*range(first, first + 29), 0])
        return self.folder / name

    def argv(self, run: Path) -> list[str]:
        """A state after every step, weights and validation after every second: most of the run's time is saving."""
        return flags(
            run, self.data, n_layer=1, n_embd=16, micro_bsz=2, my_exit_tokens=CTX * 2 * STEPS, epoch_steps=2,
            epoch_save=1, save_minutes=1e-6, val_data_file=self.held_out, val_windows=2, val_every="2steps",
        )  # fmt: skip

    def record(self, run: Path) -> tuple[Recording, dict[str, int]]:
        """Starts the run, to its end. Its system calls, and how many there are of each kind."""
        before, log = snapshot(run), self.folder / "log"
        fault = Fault(run, self.counts, log=log)
        ended = start(self.argv(run), fault)
        assert ended.code == 0, ended.output
        return Recording(before, read_log(log)), fault.calls()

    def new_folder(self, name: str) -> Path:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def difference(self, run: Path) -> str:
        """What is wrong with the result of a complete run; "" if it is that of `whole`."""
        weights, expected = (torch.load(folder / "rwkv-final.pth") for folder in (run, self.whole))
        if weights.keys() != expected.keys():
            return "other parameters"
        if (wrong := self._incomplete(run)) != "":
            return wrong
        if not all(torch.equal(weights[name], expected[name]) for name in expected):
            return "other weights"
        for log, columns in (("metrics.csv", ("step", "tokens", "loss", "lr")), ("val.csv", ("steps", "loss"))):
            if _columns(run / log, columns) != _columns(self.whole / log, columns):
                return f"other values in {log}"
        return ""

    def _incomplete(self, run: Path) -> str:
        for log, column in (("metrics.csv", "step"), ("val.csv", "steps")):
            rows, expected = (_columns(folder / log, (column,)) for folder in (run, self.whole))
            if rows != expected:
                return f"{log} lacks or repeats rows"
        if [line[0] for line in log_lines(run)] != [line[0] for line in log_lines(self.whole)]:
            return "train_log.txt lacks or repeats lines"
        return ""


def _columns(path: Path, names: tuple[str, ...]) -> list[tuple[str, ...]]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [tuple(row.get(name, "") for name in names) for row in rows]


def summary(ended: Ended) -> str:
    """One line that is equal for ends of one kind: without numbers and folders."""
    if ended.code is None:
        return f"no end within {SECONDS} s"
    lines = [line for line in ended.output.splitlines() if line.strip()]
    if "Traceback (most recent call last)" in ended.output:
        return f"traceback, code {ended.code}: {plain(lines[-1])}"
    return f"code {ended.code}: {plain(lines[-1]) if lines else 'no output'}"


def plain(line: str) -> str:
    return re.sub(r"\d+", "N", re.sub(r"\S*/(?=[\w.-])", "", line))[:200]


@functools.cache
def workshop() -> Workshop:
    return Workshop()
