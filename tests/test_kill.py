"""A hundred runs killed at random moments, half of them while they save: each continues to the very same weights."""

import random
import time

import pytest
import torch
from training_runs import CTX, flags, log_lines, losses, metrics, train_process
from warm_process import DEVNULL

KILLS = 100
RUN = {
    "n_embd": 96,
    "head_size": 32,
    "my_exit_tokens": CTX * 4 * 40,
    "epoch_steps": 10,
    "epoch_save": 1,
    "save_minutes": 1e-6,
}


def start(argv):
    return train_process(argv, stdout=DEVNULL)


def wait_for_a_save(out, seconds):
    """Until a state is being written."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not any(out.glob("resume/.step-*.tmp/*")):
        time.sleep(0.0005)


@pytest.mark.slow
def test_killed_runs_continue_to_the_same_weights(tmp_path, data):
    chance = random.Random(1)
    whole = tmp_path / "whole"
    begin = time.monotonic()
    assert start(flags(whole, data, **RUN)).wait() == 0
    duration = time.monotonic() - begin
    expected = torch.load(whole / "rwkv-final.pth")
    kills = attempts = saving = 0
    while kills < KILLS or saving < KILLS // 2:
        out = tmp_path / f"run-{attempts}"
        process = start(flags(out, data, **RUN))
        moment = chance.random() * duration
        if attempts % 2:
            time.sleep(moment / 2)
            wait_for_a_save(out, duration)
        else:
            time.sleep(moment)
        attempts += 1
        process.kill()
        if process.wait() == 0:  # it had ended before the blow
            continue
        kills += 1
        saving += any(out.glob("resume/.step-*.tmp"))
        assert start(flags(out, data, **RUN)).wait() == 0, f"run {kills} did not continue"
        weights = torch.load(out / "rwkv-final.pth")
        assert all(torch.equal(weights[name], expected[name]) for name in expected), f"run {kills} is another run"
        assert losses(out) == losses(whole)
        assert [int(row["step"]) for row in metrics(out)] == list(range(40))
        assert [line[:4] for line in log_lines(out)] == [line[:4] for line in log_lines(whole)]
