"""One process inside a Slurm job (a batch script that calls train.py): Slurm's variables do not change the run."""

import re
import signal
import sys
import time
from pathlib import Path

import pytest
from training_runs import CTX, flags, metrics, train_process

JOB = {
    "SLURM_JOB_ID": "901234",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "4",
    "SLURM_NODELIST": "node[0-1]",
    "SLURM_PROCID": "0",
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_lightning_ignores_the_variables_of_slurm(tmp_path, data, monkeypatch):
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "run"
    out.mkdir()
    (out / "hpc_ckpt_1.ckpt").write_bytes(b"what Lightning would load in a Slurm job")
    process = train_process(flags(out, data, my_exit_tokens=CTX * 4 * 1000))
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.csv").exists() and metrics(out):
            break
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0]
    handled = re.search(r"^SigCgt:\s+(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert handled
    signals = {number for number in signal.Signals if int(handled[1], 16) >> (number - 1) & 1}
    assert signal.SIGTERM in signals
    # Lightning's handler would write a checkpoint of its own and requeue the job.
    assert signal.SIGUSR1 not in signals
