"""Ranks that die, stop, hang or raise: torch's agent starts them again, or the run ends with the reason, told once."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from training_runs import CTX, flags, losses, metrics

from tests.faults import ranks as faulty
from tests.faults.runs import finish

RANKS, STEPS = 2, 12


@pytest.fixture(scope="module")
def start(data):
    """Starts train.py in two ranks, of which one may suffer a fault; a state after every step."""

    def started(run, fault=None, **changed):
        settings = {
            "devices": RANKS, "n_layer": 1, "n_embd": 16, "micro_bsz": 1, "my_exit_tokens": CTX * RANKS * STEPS,
            "epoch_steps": 4, "epoch_save": 1, "save_minutes": 1e-6, "dist_timeout": 30, "random_seed": 3, **changed,
        }  # fmt: skip
        return faulty.start(flags(run, data, **settings), fault)

    return started


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The run that nothing happens to."""
    run = tmp_path_factory.mktemp("whole")
    ended = finish(start(run), 120)
    assert ended.code == 0, ended.output
    return run


def planned(folder, rank, phase, fault, **more):
    return {"rank": rank, "phase": phase, "fault": fault, "note": str(folder / "note"), **more}


def assert_same_run(run, whole):
    assert [int(row["step"]) for row in metrics(run)] == list(range(STEPS))
    assert losses(run) == losses(whole)
    weights, expected = (torch.load(folder / "rwkv-final.pth") for folder in (run, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_killed_rank_is_started_again_and_the_run_ends_as_if_it_had_not_been(start, whole, tmp_path):
    ended = finish(start(tmp_path / "run", planned(tmp_path, 1, "step", "kill")), 120)
    assert ended.code == 0, ended.output
    told = [line for line in ended.output.splitlines() if line.startswith("train.py:")]
    assert len(told) == 1, ended.output
    assert "rank 1 of 2 (" in told[0]
    assert "was killed by signal 9 (SIGKILL); all processes start again, from the state of step " in told[0]
    assert told[0].endswith("; 2 more restarts (--max_restarts 3)")
    assert "Traceback" not in ended.output
    assert_same_run(tmp_path / "run", whole)


def test_an_error_that_comes_again_in_the_same_step_ends_the_run(start, tmp_path):
    ended = finish(start(tmp_path / "run", planned(tmp_path, 1, "first step", "raise", always=True)), 120)
    assert ended.code == 1, ended.output
    lines = [line for line in ended.output.splitlines() if line.startswith("train.py:")]
    assert len(lines) == 2, ended.output
    first, second = lines
    assert "): ValueError: a fault of the test; all processes start again, from the beginning; 2 more" in first
    assert "the same error again in step 1, so the processes are not started again" in second
    assert ended.output.count("Traceback (most recent call last)") == 2  # of each attempt, that of the first rank


def test_a_mistake_of_the_user_on_one_rank_is_told_once_and_not_tried_again(start, tmp_path):
    ended = finish(start(tmp_path / "run", vocab_size=20), 120)
    assert ended.code == 2, ended.output
    assert ended.output.count("train.py:") == 1, ended.output
    assert "start again" not in ended.output
    assert "Traceback" not in ended.output


def wait_for(condition, seconds=100):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["stop", "freeze"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stands_still_is_replaced(start, whole, tmp_path, rank, fault):
    process = start(tmp_path / "run", planned(tmp_path, rank, "step", fault))
    wait_for((tmp_path / "note").exists)
    begin = time.monotonic()
    ended = finish(process, 150)
    assert ended.code == 0, ended.output
    assert "all processes start again" in ended.output
    assert time.monotonic() - begin < 75  # with the rest of the run
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_ranks_end_when_their_agent_is_killed(start, tmp_path, monkeypatch):
    note = tmp_path / "note"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    process = start(
        tmp_path / "run", planned(tmp_path, 1, "step", "pause"), my_exit_tokens=CTX * RANKS * 100_000, save_minutes=30
    )
    wait_for(lambda: note.exists() and note.read_text())
    assert list(temporary.glob("train-ranks-*"))
    process.kill()
    os.kill(int(note.read_text()), signal.SIGCONT)
    begin = time.monotonic()
    output, _ = process.communicate(timeout=75)  # until the last of them has closed its output
    assert time.monotonic() - begin < 75
    assert "stops: the process that started it has ended" in output
    assert "the state is saved" in output
    wait_for(lambda: has_ended(int(note.read_text())), seconds=10)


def has_ended(pid):
    """It may not be waited for yet: its parent, the agent, is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
