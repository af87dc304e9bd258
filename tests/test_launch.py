"""train.py in several processes, as people start it: by itself, by torchrun, on two machines; killed, and continued by other numbers."""

import contextlib
import os
import re
import shutil
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
STEPS, SAMPLES = 120, 6  # of a step, however many processes share them


def settings(proj_dir, data, processes, **changed):
    return flags(
        proj_dir, data, micro_bsz=SAMPLES // processes, my_exit_tokens=CTX * SAMPLES * STEPS, lr_init=1e-3, lr_final=1e-4,
        adam_eps=1e-8, **{"epoch_steps": 10, **changed},
    )  # fmt: skip


def start(command, **environment):
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def finish(process, timeout=300):
    try:
        words, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        words, _ = process.communicate()
        pytest.fail(f"it hangs: {words[-3000:]}")
    return words


def run_to_the_end(command, **environment):
    process = start(command, **environment)
    words = finish(process)
    assert process.returncode == 0, words
    return words


def train_command(*arguments):
    return [sys.executable, "train.py", *arguments]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, data):
    out = tmp_path_factory.mktemp("straight")
    run_to_the_end(train_command(*settings(out, data, 1)))
    return out


def assert_same_run(out, straight, tolerance=2e-3):
    assert [int(row["step"]) for row in metrics(out)] == list(range(STEPS))
    assert losses(out) == pytest.approx(losses(straight), abs=tolerance)
    assert [row["lr"] for row in metrics(out)] == [row["lr"] for row in metrics(straight)]
    one, other = (torch.load(folder / "rwkv-final.pth") for folder in (straight, out))
    assert one.keys() == other.keys()
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 10 * tolerance


@pytest.mark.parametrize("strategy", ["auto", pytest.param("deepspeed_stage_3", marks=needs_deepspeed)])
def test_train_starts_the_others_itself(tmp_path, data, straight, strategy):
    words = run_to_the_end(train_command(*settings(tmp_path, data, 2, devices=2, strategy=strategy)))
    assert words.count("done:") == 1  # one voice
    assert_same_run(tmp_path, straight)


def test_torchrun(tmp_path, data, straight):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = run_to_the_end([*torchrun, "train.py", *settings(tmp_path, data, 2)])
    assert words.count("done:") == 1
    assert_same_run(tmp_path, straight)


def test_a_mistake_is_told_once(tmp_path, data):
    process = start(train_command(*settings(tmp_path, data, 2, devices=2, vocab_size=20)))
    words = finish(process)
    assert process.returncode == 2
    assert words.count("train.py:") == 1, words
    assert "Traceback" not in words


def ranks_of(process):
    """The processes of a run by rank."""
    found = {0: process.pid}
    for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ") as file:
            rank = re.search(r"(?:^|\0)RANK=(\d+)", file.read())
            if rank:
                found[int(rank.group(1))] = int(pid)
    return found


def wait_for(condition, seconds=200):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("deepspeed_stage_2", marks=needs_deepspeed)])
@pytest.mark.parametrize("killed", [0, 1])
def test_one_dies_and_the_run_goes_on_with_one_and_then_three(tmp_path, data, straight, strategy, killed):
    common = {"strategy": strategy, "epoch_save": 1}
    process = start(train_command(*settings(tmp_path, data, 2, devices=2, **common)))
    wait_for(lambda: state_folders(tmp_path) or process.poll() is not None)
    victims = ranks_of(process)
    assert victims.keys() == {0, 1}, process.communicate()[0]
    os.kill(victims[killed], signal.SIGKILL)
    at = time.monotonic()
    words = finish(process, timeout=60)
    assert time.monotonic() - at < 60
    assert process.returncode != 0
    wait_for(lambda: not os.path.exists(f"/proc/{victims[1 - killed]}"), seconds=60)
    assert re.search(r"process 1 was killed by signal 9" if killed else r"process 0 is gone", words), words
    assert not (tmp_path / "rwkv-final.pth").exists()

    reached = state_folders(tmp_path)[0].name
    # one process takes it over and is stopped, three take it to the end
    process = start(train_command(*settings(tmp_path, data, 1, **common)))
    wait_for(lambda: state_folders(tmp_path)[0].name > reached or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    words = finish(process)
    assert "as if never stopped" in words, words
    run_to_the_end(train_command(*settings(tmp_path, data, 3, devices=3, **common)))
    assert_same_run(tmp_path, straight)


def test_a_signal_stops_all_together_with_their_state_saved(tmp_path, data, straight):
    command = train_command(*settings(tmp_path, data, 2, devices=2))
    process = start(command)
    wait_for(lambda: state_folders(tmp_path) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)  # to the first alone
    words = finish(process)
    assert process.returncode == 128 + signal.SIGTERM, words
    assert words.count("SIGTERM received; its state is saved") == 1
    assert "ends:" not in words
    run_to_the_end(command)
    assert_same_run(tmp_path, straight)


def test_one_that_falls_silent_ends_the_others(tmp_path, data):
    process = start(train_command(*settings(tmp_path, data, 2, devices=2)))
    wait_for(lambda: state_folders(tmp_path) or process.poll() is not None)
    ranks = ranks_of(process)
    os.kill(ranks[1], signal.SIGSTOP)
    words = finish(process, timeout=60)
    assert process.returncode == 1
    assert "process 1 has given no sign of life" in words
    wait_for(lambda: not os.path.exists(f"/proc/{ranks[1]}"), seconds=20)


IMPATIENT = "import sys, train; from src.training.distributed import watchdog; watchdog.SILENT_ROUNDS = 10; sys.exit(train.main())"


def test_all_may_stand_still_for_longer_than_one_may_be_silent(tmp_path, data, straight):
    """Ctrl-Z and fg, a job that is suspended, a machine that is paused."""
    process = start([sys.executable, "-c", IMPATIENT, *settings(tmp_path, data, 2, devices=2)])
    wait_for(lambda: state_folders(tmp_path) or process.poll() is not None)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(14)
        os.killpg(process.pid, signal.SIGCONT)
        time.sleep(1)
    words = finish(process)
    assert process.returncode == 0, words
    assert_same_run(tmp_path, straight)


def may_make_networks():
    return (
        bool(shutil.which("ip"))
        and subprocess.run(["ip", "netns", "add", "rwkv-probe"], capture_output=True).returncode == 0
    )


@pytest.fixture
def two_machines():
    """Two network namespaces with a wire between them: what two machines see of each other."""
    if not may_make_networks():
        pytest.skip("no right to make network namespaces here")
    tag = f"rwkv{os.getpid() % 10000}"
    names = [f"{tag}a", f"{tag}b"]
    commands = [
        "ip netns delete rwkv-probe",
        *(f"ip netns add {name}" for name in names),
        f"ip link add {names[0]} type veth peer name {names[1]}",
        *(f"ip link set {name} netns {name}" for name in names),
        *(f"ip -n {name} addr add 10.77.0.{i}/24 dev {name}" for i, name in enumerate(names, start=1)),
        *(f"ip -n {name} link set {device} up" for name in names for device in (name, "lo")),
    ]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"{command}: {done.stderr}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.mark.parametrize("launcher", ["by hand", "torchrun"])
def test_two_machines(tmp_path, data, straight, two_machines, launcher):
    processes = []
    for node, machine in enumerate(two_machines):
        inside = ["ip", "netns", "exec", machine]
        arguments = settings(tmp_path, data, 2, num_nodes=2, strategy="auto")
        if launcher == "by hand":
            command = train_command(*arguments)
        else:
            agents = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(node)]
            agents += ["--master_addr", "10.77.0.1", "--master_port", "29600"]
            command = [sys.executable, "-m", "torch.distributed.run", *agents, "train.py", *arguments]
        where = {
            "NODE_RANK": str(node),
            "MASTER_ADDR": "10.77.0.1",
            "MASTER_PORT": "29600",
            "GLOO_SOCKET_IFNAME": machine,
        }
        processes.append(start([*inside, *command], **where))
    words = [finish(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], words
    assert_same_run(tmp_path, straight)


def test_the_samples_of_a_step_do_not_depend_on_the_number_of_processes(straight):
    assert np.isfinite(losses(straight)).all()
    assert losses(straight)[-1] < losses(straight)[0]
