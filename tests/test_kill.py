"""A hundred runs killed at random moments, half of them while they save: each continues to the very same weights."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from training_runs import CTX, ROOT, flags, log_lines, losses, metrics

KILLS = 100
RUN = {
    "n_embd": 96,
    "head_size": 32,
    "my_exit_tokens": CTX * 4 * 40,
    "epoch_steps": 10,
    "epoch_save": 1,
    "save_minutes": 1e-6,
}


class Runs:
    """Starts runs through one process that has imported everything."""

    def __init__(self):
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.forking_runs"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.server.stdout.readline() == "ready\n"

    def start(self, argv):
        print(json.dumps(argv), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def end(self):
        return int(self.server.stdout.readline())

    def close(self):
        self.server.stdin.close()
        self.server.wait(timeout=60)


def wait_for_a_save(out, seconds):
    """Until a state is being written."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not any(out.glob("resume/.step-*.tmp/*")):
        time.sleep(0.0005)


@pytest.mark.slow
def test_killed_runs_continue_to_the_same_weights(tmp_path, data):
    runs, chance = Runs(), random.Random(1)
    whole = tmp_path / "whole"
    begin = time.monotonic()
    runs.start(flags(whole, data, **RUN))
    assert runs.end() == 0
    duration = time.monotonic() - begin
    expected = torch.load(whole / "rwkv-final.pth")
    kills = attempts = saving = 0
    while kills < KILLS or saving < KILLS // 2:
        out = tmp_path / f"run-{attempts}"
        process = runs.start(flags(out, data, **RUN))
        moment = chance.random() * duration
        if attempts % 2:
            time.sleep(moment / 2)
            wait_for_a_save(out, duration)
        else:
            time.sleep(moment)
        attempts += 1
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        if runs.end() == 0:  # it had ended before the blow
            continue
        kills += 1
        saving += any(out.glob("resume/.step-*.tmp"))
        runs.start(flags(out, data, **RUN))
        assert runs.end() == 0, f"run {kills} did not continue"
        weights = torch.load(out / "rwkv-final.pth")
        assert all(torch.equal(weights[name], expected[name]) for name in expected), f"run {kills} is another run"
        assert losses(out) == losses(whole)
        assert [int(row["step"]) for row in metrics(out)] == list(range(40))
        assert [line[:4] for line in log_lines(out)] == [line[:4] for line in log_lines(whole)]
    runs.close()
