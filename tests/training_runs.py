"""Runs of train.py that tests share: tiny sizes, real files, real fits."""

import csv
import os
import re
import signal
import sys
import threading
from pathlib import Path

import pytest
import warm_process

from src.cli import parse
from src.run_folder import REPORT
from src.training import trainer, training_run
from src.training.checkpoint.reader import StateReader
from src.training.checkpoint.state import SavedState
from src.training.checkpoint.storage import state_folders
from src.training.run import run

PIPE, STDOUT = warm_process.PIPE, warm_process.STDOUT
ROOT = Path(__file__).parents[1]
CTX, VOCAB = 16, 64


def flags(proj_dir, data, **changed):
    settings = {
        "proj_dir": proj_dir,
        "data_file": data,
        "vocab_size": VOCAB,
        "ctx_len": CTX,
        "micro_bsz": 4,
        "n_layer": 2,
        "n_embd": 32,
        "head_size": 16,
        "lr_init": 3e-3,
        "lr_final": 3e-4,
        "my_exit_tokens": CTX * 4 * 40,
        "epoch_steps": 10,
        "epoch_save": 2,
        "random_seed": 7,
        "accelerator": "cpu",
        **changed,
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def train(proj_dir, data, **changed):
    return run(*parse(flags(proj_dir, data, **changed)))


def as_from_a_terminal():
    """In a new process, before its program: signals as a terminal leaves them. nohup and shells that start jobs have
    some ignored."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def without_figures():
    """In this process, runs of train.py end without drawing figures, which takes longer than a short run."""
    training_run.write_loss_figure = lambda run, path: path
    training_run.write_report = lambda run: run / REPORT


def from_a_terminal_without_figures():
    as_from_a_terminal()
    without_figures()


def train_process(argv, program=("train.py",), environment=None, **kwargs):
    """train.py with these flags (or another `program` of Python), in a process of its own."""
    kwargs = {"stdout": PIPE, "stderr": STDOUT, "preexec_fn": without_figures, **kwargs}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | (environment or {})
    return warm_process.Popen([sys.executable, *program, *argv], cwd=ROOT, env=environment, text=True, **kwargs)


def metrics(proj_dir):
    with open(proj_dir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def losses(proj_dir):
    return [float(row["loss"]) for row in metrics(proj_dir)]


def newest_state(proj_dir):
    """The newest full state, every file of it verified."""
    reader = verified(state_folders(proj_dir)[0])
    return SavedState.from_payload(reader.payload)


def verified(folder):
    """A reader of a state that has read every file of it. Raises DamagedStateError."""
    reader = StateReader(folder)
    assert reader.tensors()
    return reader


def log_lines(proj_dir):
    return [line.split() for line in (proj_dir / "train_log.txt").read_text().splitlines() if re.match(r"\d+ \d", line)]


class Killed(BaseException):
    """Stands for a process that is gone: nothing of ours catches it."""


def train_until(step, out, data, monkeypatch, **changed):
    """Train, and die like a killed process before `step` is taken, when the last state has been saved."""
    original = trainer.SetLearningRate.on_train_batch_start

    def dying(self, trainer, module, batch, batch_idx):
        if self.control.step == step:
            # The last state is on the disk, however slow that is: a save that finds the lock of its folder released, as
            # this process releases it on its way out, would fail.
            for thread in threading.enumerate():
                if thread.name == "state-writer":
                    thread.join()
            raise Killed
        original(self, trainer, module, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.SetLearningRate, "on_train_batch_start", dying)
        with pytest.raises(Killed):
            train(out, data, **changed)
