"""Runs whose machines leave and join: the global batch, the samples of every step and the losses stay the same."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_runs import CTX, ROOT, flags, losses, metrics

from src.config import RunConfig
from src.training.hardware.selection import Hardware, with_global_batch

STEPS, SAMPLES = 60, 6
# As plain SGD: with an epsilon far above the gradients Adam divides by a constant.
SGD = {"adam_eps": 1e3, "lr_init": 300, "lr_final": 100, "beta1": 0.0, "grad_clip": 0.0}


@pytest.mark.parametrize(
    ("nodes", "devices", "accumulated", "here", "expected"),
    [
        ("4", 2, 3, 4, (3, 0)),  # not elastic
        ("2:4", 2, 1, 4, (1, 0)),
        ("2:4", 2, 1, 2, (2, 0)),
        ("1:4", 2, 3, 1, (12, 0)),
        ("2:4", 1, 3, 3, (4, 0)),  # 12 micro batches on 3 processes
        ("2:4", 1, 1, 3, (1, 1)),  # 4 on 3: 3 is nearer than 6
        ("2:5", 1, 1, 3, (2, 1)),  # 5 on 3: 6 is nearer than 3
    ],
)
def test_the_global_batch_of_the_most_nodes_is_kept(nodes, devices, accumulated, here, expected):
    config = RunConfig(num_nodes=nodes, micro_bsz=5, accumulate_grad_batches=accumulated)
    config, notes = with_global_batch(config, Hardware("cpu", devices, here, "fp32", "ddp"))
    assert (config.accumulate_grad_batches, len(notes)) == expected


def test_a_global_batch_that_the_processes_can_not_share_is_told():
    hardware = Hardware("cpu", 1, 3, "fp32", "ddp")
    _, (note,) = with_global_batch(RunConfig(num_nodes="2:4", micro_bsz=5), hardware)
    assert note == "the global batch is 15 samples: 3 processes can't share 20"


# train.py that writes down what each rank reads in each step, and takes its time; alone, it waits in step 30 as long as
# the file HOLD is there
PROGRAM = """
import json, os, sys, time, train
from src.training import trainer

set_learning_rate = trainer.SetLearningRate.on_train_batch_start

def recording(self, fit, module, batch, i):
    set_learning_rate(self, fit, module, batch, i)
    time.sleep(0.1)
    while self.control.step == 30 and os.environ["WORLD_SIZE"] == "1" and os.path.exists(os.environ["HOLD"]):
        time.sleep(0.1)
    with open(os.environ["ROWS"], "a") as file:
        file.write(json.dumps([self.control.step, batch[0].tolist()]) + "\\n")

trainer.SetLearningRate.on_train_batch_start = recording
sys.exit(train.main())
"""


class Machines:
    """train.py on machines that are network namespaces, with one folder for the run."""

    def __init__(self, folder, names, argv):
        self.rows, self.hold, self.names, self.argv = folder / "rows", folder / "hold", names, argv
        self.output = {name: folder / f"output {name}" for name in (*names, "")}
        self.started = []

    def start(self, name=""):
        prefix = ["ip", "netns", "exec", name] if name else []
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "1", "ROWS": str(self.rows), "HOLD": str(self.hold),
            "GLOO_SOCKET_IFNAME": name or "lo",
        }  # fmt: skip
        with open(self.output[name], "a") as output:
            process = subprocess.Popen(
                [*prefix, sys.executable, "-c", PROGRAM, *self.argv], cwd=ROOT, env=environment, stdout=output,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def samples(self):
        """step -> the rows that ranks have read in it."""
        read = {}
        for line in self.rows.read_text().splitlines() if self.rows.exists() else []:
            step, rows = json.loads(line)
            read.setdefault(step, set()).update(map(tuple, rows))
        return read

    def wait_for_step(self, step, *processes, seconds=240):
        deadline = time.monotonic() + seconds
        while max(self.samples(), default=-1) < step:
            assert time.monotonic() < deadline, self.all_output()
            assert all(process.poll() is None for process in processes), self.all_output()
            time.sleep(0.2)

    def wait_for(self, text, *processes, seconds=240):
        deadline = time.monotonic() + seconds
        while text not in self.all_output():
            assert time.monotonic() < deadline, self.all_output()
            assert all(process.poll() is None for process in processes), self.all_output()
            time.sleep(0.2)

    def all_output(self):
        return "\n".join(f"---- {name}\n{path.read_text()}" for name, path in self.output.items() if path.exists())

    def end(self):
        for process in self.started:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.send_signal(signal.SIGKILL)


@pytest.fixture
def machines(tmp_path, data, two_machines):
    settings = {
        "micro_bsz": SAMPLES // 2, "my_exit_tokens": CTX * SAMPLES * STEPS, "epoch_steps": 10, "save_minutes": 0.02,
        "num_nodes": "1:2", "rdzv_endpoint": "10.77.0.1:29601", "dist_timeout": 10, **SGD,
    }  # fmt: skip
    machines = Machines(tmp_path, two_machines, flags(tmp_path / "run", data, **settings))
    yield machines
    machines.end()


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data):
    """The run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    settings = {"micro_bsz": SAMPLES, "my_exit_tokens": CTX * SAMPLES * STEPS, "epoch_steps": 10, **SGD}
    alone = Machines(folder, [], flags(folder / "run", data, **settings))
    assert alone.start().wait(timeout=300) == 0, alone.all_output()
    return folder / "run", alone.samples()


def assert_same_run(run: Path, machines, alone):
    expected_run, expected_samples = alone
    assert [int(row["step"]) for row in metrics(run)] == list(range(STEPS))
    assert machines.samples() == expected_samples
    difference = max(abs(a - b) for a, b in zip(losses(run), losses(expected_run), strict=True))
    print(f"largest difference of a loss: {difference:.1e}")
    assert difference <= 1e-5
    assert [row["lr"] for row in metrics(run)] == [row["lr"] for row in metrics(expected_run)]
    assert losses(run)[-1] < losses(run)[0] - 0.5


@pytest.mark.slow
@pytest.mark.parametrize("comes_back", [True, False])
def test_a_run_goes_on_when_a_machine_is_cut_off_and_when_it_comes_back(tmp_path, machines, alone, comes_back):
    first, second = machines.names
    if comes_back:
        machines.hold.touch()
    stays, leaves = machines.start(first), machines.start(second)
    machines.wait_for_step(12, stays, leaves)
    subprocess.run(["ip", "-n", second, "link", "set", second, "down"], check=True)
    cut_at = time.monotonic()
    reached = max(machines.samples())
    machines.wait_for_step(reached + 4, stays)
    assert time.monotonic() - cut_at < 75, machines.all_output()
    assert leaves.wait(timeout=120) == 1, machines.all_output()  # it says why, and ends
    if comes_back:
        subprocess.run(["ip", "-n", second, "link", "set", second, "up"], check=True)
        joins = machines.start(second)
        machines.wait_for("a machine joins", stays, joins)
        machines.hold.unlink()
    assert stays.wait(timeout=300) == 0, machines.all_output()
    assert not comes_back or joins.wait(timeout=60) == 0, machines.all_output()
    assert_same_run(tmp_path / "run", machines, alone)


@pytest.mark.slow
def test_a_run_goes_on_when_a_machine_is_told_to_stop(tmp_path, machines, alone):
    first, second = machines.names
    stays, leaves = machines.start(first), machines.start(second)
    machines.wait_for_step(12, stays, leaves)
    leaves.send_signal(signal.SIGTERM)
    assert leaves.wait(timeout=60) == 128 + signal.SIGTERM, machines.all_output()
    assert stays.wait(timeout=300) == 0, machines.all_output()
    assert_same_run(tmp_path / "run", machines, alone)
