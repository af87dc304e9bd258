"""train.py in several processes: started alone, by torchrun, on two machines; killed, and resumed by another number."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from training_runs import CTX, ROOT, flags, losses, metrics

from src.training.checkpoint.storage import state_folders
from src.training.distributed import zero

pytestmark = pytest.mark.slow
needs_deepspeed = pytest.mark.skipif(not zero.is_usable(), reason=f"{zero.REQUIREMENT} is not installed")
STEPS, SAMPLES = 120, 6  # per step, for any number of processes


def settings(proj_dir, data, processes, **changed):
    return flags(
        proj_dir, data, micro_bsz=SAMPLES // processes, my_exit_tokens=CTX * SAMPLES * STEPS, lr_init=1e-3,
        lr_final=1e-4, adam_eps=1e-8, **{"epoch_steps": 10, **changed},
    )  # fmt: skip


def start(command, **environment):
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def finish(process, timeout=300):
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"no end within {timeout} s: {output[-3000:]}")
    return output


def run_to_end(command, **environment):
    process = start(command, **environment)
    output = finish(process)
    assert process.returncode == 0, output
    return output


def train_command(*arguments):
    return [sys.executable, "train.py", *arguments]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    out = tmp_path_factory.mktemp("uninterrupted")
    run_to_end(train_command(*settings(out, data, 1)))
    return out


def assert_same_run(out, uninterrupted, tolerance=2e-3):
    assert [int(row["step"]) for row in metrics(out)] == list(range(STEPS))
    assert losses(out) == pytest.approx(losses(uninterrupted), abs=tolerance)
    assert [row["lr"] for row in metrics(out)] == [row["lr"] for row in metrics(uninterrupted)]
    expected, weights = (torch.load(folder / "rwkv-final.pth") for folder in (uninterrupted, out))
    assert weights.keys() == expected.keys()
    assert max((weights[name] - expected[name]).abs().max().item() for name in expected) < 10 * tolerance


@pytest.mark.parametrize("strategy", ["auto", pytest.param("deepspeed_stage_3", marks=needs_deepspeed)])
def test_train_py_starts_the_other_processes(tmp_path, data, uninterrupted, strategy):
    output = run_to_end(train_command(*settings(tmp_path, data, 2, devices=2, strategy=strategy)))
    assert output.count("done:") == 1  # only rank 0 prints
    assert_same_run(tmp_path, uninterrupted)
    initial, expected = (torch.load(folder / "rwkv-init.pth") for folder in (tmp_path, uninterrupted))
    assert all(torch.equal(initial[name], expected[name]) for name in expected)


def test_torchrun(tmp_path, data, uninterrupted):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    output = run_to_end([*torchrun, "train.py", *settings(tmp_path, data, 2)])
    assert output.count("done:") == 1
    assert_same_run(tmp_path, uninterrupted)


def test_a_user_error_is_printed_once(tmp_path, data):
    process = start(train_command(*settings(tmp_path, data, 2, devices=2, vocab_size=20)))
    output = finish(process)
    assert process.returncode == 2
    assert output.count("train.py:") == 1, output
    assert "Traceback" not in output


def ranks_of(process):
    """The process ids of a run by rank."""
    pids = {}
    for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ") as file:
            rank = re.search(r"(?:^|\0)RANK=(\d+)", file.read())
            if rank:
                pids[int(rank.group(1))] = int(pid)
    return pids


def wait_for(condition, seconds=200):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("deepspeed_stage_2", marks=needs_deepspeed)])
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_run_resumes_on_one_process_and_then_on_three(tmp_path, data, uninterrupted, strategy, killed):
    common = {"strategy": strategy, "epoch_save": 1, "max_restarts": 0}
    process = start(train_command(*settings(tmp_path, data, 2, devices=2, **common)))
    wait_for(lambda: state_folders(tmp_path) or process.poll() is not None)
    victims = ranks_of(process)
    assert victims.keys() == {0, 1}, process.communicate()[0]
    os.kill(victims[killed], signal.SIGKILL)
    killed_at = time.monotonic()
    output = finish(process, timeout=60)
    assert time.monotonic() - killed_at < 60
    assert process.returncode != 0
    wait_for(lambda: not os.path.exists(f"/proc/{victims[1 - killed]}"), seconds=60)
    assert f"rank {killed} of 2 (" in output, output
    assert "): was killed by signal 9 (SIGKILL); the same command continues the run" in output, output
    assert not (tmp_path / "rwkv-final.pth").exists()

    reached = state_folders(tmp_path)[0].name
    # one process resumes it and is stopped, three complete it
    process = start(train_command(*settings(tmp_path, data, 1, **common)))
    wait_for(lambda: state_folders(tmp_path)[0].name > reached or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "stopped: SIGTERM received" in output, output
    run_to_end(train_command(*settings(tmp_path, data, 3, devices=3, **common)))
    assert_same_run(tmp_path, uninterrupted)


def test_a_signal_stops_all_ranks_after_saving(tmp_path, data, uninterrupted):
    command = train_command(*settings(tmp_path, data, 2, devices=2))
    process = start(command)
    wait_for(lambda: state_folders(tmp_path) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert output.count("stopped: SIGTERM received; the state is saved") == 1
    assert "train.py:" not in output  # nothing failed
    run_to_end(command)
    assert_same_run(tmp_path, uninterrupted)


def test_a_suspended_run_goes_on_when_it_is_continued(tmp_path, data, uninterrupted):
    """Ctrl-Z and fg: the ranks, in sessions of their own, stop with their agent."""
    process = start(train_command(*settings(tmp_path, data, 2, devices=2)))
    wait_for(lambda: state_folders(tmp_path) or process.poll() is not None)
    for _ in range(2):
        process.send_signal(signal.SIGTSTP)
        wait_for(lambda: all(state_of(pid) == "T" for pid in ranks_of(process).values()))
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        time.sleep(1)
    output = finish(process)
    assert process.returncode == 0, output
    assert "start again" not in output
    assert_same_run(tmp_path, uninterrupted)


def state_of(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("launcher", ["manual", "IPv6", "torchrun"])
def test_two_machines(tmp_path, data, uninterrupted, two_machines, launcher):
    processes = []
    for node, machine in enumerate(two_machines):
        prefix = ["ip", "netns", "exec", machine]
        arguments = settings(tmp_path, data, 2, num_nodes=2, strategy="auto")
        if launcher != "torchrun":
            command = train_command(*arguments)
        else:
            agents = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(node)]
            agents += ["--master_addr", "10.77.0.1", "--master_port", "29600"]
            command = [sys.executable, "-m", "torch.distributed.run", *agents, "train.py", *arguments]
        variables = {
            "NODE_RANK": str(node),
            "MASTER_ADDR": "fd77::1" if launcher == "IPv6" else "10.77.0.1",
            "MASTER_PORT": "29600",
            "GLOO_SOCKET_IFNAME": machine,
        }
        processes.append(start([*prefix, *command], **variables))
    output = [finish(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], output
    assert_same_run(tmp_path, uninterrupted)


def test_the_uninterrupted_run_learns(uninterrupted):
    assert np.isfinite(losses(uninterrupted)).all()
    assert losses(uninterrupted)[-1] < losses(uninterrupted)[0]
