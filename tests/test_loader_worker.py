"""The DataLoader's worker process outlives what is meant for the run, and never outlives the run."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_runs import CTX, flags, from_a_terminal_without_figures, metrics, newest_state, train_process

from src.dataset.loader import _leave_signals_to_main_process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a worker as a Linux machine with a GPU has it")
RUN = {"accumulate_grad_batches": 10, "my_exit_tokens": CTX * 4 * 10 * 3000, "epoch_steps": 1000, "save_minutes": 0}


def start(*argv):
    """In a process group of its own, as a terminal or a scheduler starts it."""
    return train_process(
        argv,
        program=("-m", "tests.worker_run"),
        start_new_session=True,
        preexec_fn=from_a_terminal_without_figures,
    )


def members(group):
    """The processes of a group by their number: zombies too."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone in the meantime
            _, _, of = (
                (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            )  # after the name: state, parent, group
            found += [int(folder.name)] * (int(of) == group)
    return found


def finish(process):
    try:
        output, _ = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"it hangs: {process.communicate()[0][-3000:]}")
    assert members(process.pid) == []
    return output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_whole_group_saves_and_stops(tmp_path, data, number):
    out = tmp_path / "run"
    process = start(*flags(out, data, **RUN))
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not ((out / "metrics.csv").exists() and len(metrics(out)) > 2):
        time.sleep(0.05)
    assert len(members(process.pid)) == 2
    os.killpg(process.pid, number)
    output = finish(process)
    assert process.returncode == 128 + number, output
    assert f"{number.name} received; the state is saved" in output
    assert "Traceback" not in output
    assert newest_state(out).position.step == len(metrics(out)) > 2


def test_it_goes_with_a_run_that_is_done_and_with_one_that_fails(tmp_path, data):
    short = {**RUN, "accumulate_grad_batches": 2, "my_exit_tokens": CTX * 4 * 2 * 5}
    process = start(*flags(tmp_path / "done", data, **short))
    output = finish(process)
    assert process.returncode == 0, output
    process = start("--fail", *flags(tmp_path / "failed", data, **short))
    output = finish(process)
    assert process.returncode == 1, output
    assert "a step that fails" in output


def worker(ready):
    _leave_signals_to_main_process(0)
    ready.send(True)
    time.sleep(60)


def test_the_run_itself_can_still_end_it():
    """As multiprocessing does at the interpreter's end with a worker that nobody has told to go."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=worker, args=(theirs,), daemon=True)
    process.start()
    assert ours.recv()
    for name in ("INT", "HUP", "TERM"):
        send = f"import os, signal; os.kill({process.pid}, signal.SIG{name})"  # another process than the run
        subprocess.run([sys.executable, "-c", send], check=True)
    process.join(timeout=1)
    assert process.is_alive()
    process.terminate()
    process.join(timeout=60)
    assert process.exitcode == 0
